"""The demo's report: a table with its controls, and three figures. Needs no accelerator, no JAX.

Accuracy means nothing alone, so every number stands beside the same model without an image (blind),
with another canvas's image (shuffled), and beside the commonest answer (majority).
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from hovle_jax.output import write_json
from hovle_jax.run.plot import pyplot

# {question type: {"accuracy", "blind", "shuffled", "majority", "n"}}, one per arm (ablation).
ArmResult = dict[str, dict[str, float]]
Curve = list[tuple[int, float]]

_SCORES = ("accuracy", "blind", "shuffled", "majority")
_PALETTE = ("#2f5d8a", "#d9822b", "#5b8c5a", "#8e5ea2", "#b0413e", "#4a9ba8")
_INK, _MUTED, _RIGHT, _WRONG = "#22272e", "#6b7480", "#1f7a3d", "#c0392b"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": "#b8bfc8",
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
}
_SHEET = 24
_MAPS = 6


def _cells(results: Mapping[str, ArmResult]) -> list[list[str]]:
    """The table, header first; there is no mean column, which would hide a type at chance."""
    rows = [["arm", "question type", *_SCORES, "n"]]
    for arm, types in results.items():
        for kind, r in types.items():
            rows.append([arm, kind, *(f"{r[s]:.3f}" for s in _SCORES), str(int(r["n"]))])
    return rows


def table(results: Mapping[str, ArmResult]) -> str:
    """Returns the held-out scores of every arm and question type as aligned plain text."""
    rows = _cells(results)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines, arm = [], ""
    for k, row in enumerate(rows):
        shown = [row[0] if row[0] != arm else "", *row[1:]]
        aligned = (
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(shown, widths, strict=True))
        )
        lines.append("  ".join(aligned).rstrip())
        if k == 0:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
        arm = row[0]
    return "\n".join(lines)


def _titles(fig: Any, title: str, subtitle: str) -> None:
    """A bold title and a grey line, a fixed distance from the top whatever the figure's height."""
    inches = fig.get_figheight()
    left = 0.15 / fig.get_figwidth()
    fig.text(left, 1 - 0.14 / inches, title, size=13, weight="bold", va="top")
    fig.text(left, 1 - 0.42 / inches, subtitle, size=9, color=_MUTED, va="top")


def _smooth(losses: np.ndarray) -> np.ndarray:
    """A centred running mean over about a twenty-fifth of the curve, [n] -> [n]."""
    half = len(losses) // 50
    total: np.ndarray = np.concatenate([[0.0], np.cumsum(losses)])
    i = np.arange(len(losses))
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(losses))
    return np.asarray((total[high] - total[low]) / (high - low))


def _plot_curves(path: str, curves: Mapping[str, Mapping[str, Curve]]) -> None:
    plt = pyplot()
    stages = list(dict.fromkeys(stage for arm in curves.values() for stage in arm)) or ["(none)"]
    with plt.rc_context(_STYLE):
        fig, axes = plt.subplots(1, len(stages), figsize=(4.2 * len(stages) + 0.2, 4.2))
        for stage, ax in zip(stages, np.atleast_1d(axes), strict=True):
            for i, (arm, by_stage) in enumerate(curves.items()):
                if not by_stage.get(stage):
                    continue
                step, loss = np.array(by_stage[stage], float).T
                color = _PALETTE[i % len(_PALETTE)]
                ax.plot(step, loss, color=color, alpha=0.22, lw=0.8)
                ax.plot(step, _smooth(loss), color=color, lw=1.8, label=arm)
            ax.set(title=stage, xlabel="optimiser step")
            ax.grid(axis="y", color="#e6e9ed", lw=0.7)
            ax.set_axisbelow(True)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(frameon=False, loc="upper right")
        np.atleast_1d(axes)[0].set_ylabel("training loss")
        fig.tight_layout(rect=(0, 0, 1, 1 - 0.65 / fig.get_figheight()), w_pad=2)
        _titles(fig, "Training loss by stage", "pale: each logged step, bold: running mean")
        fig.savefig(path)
        plt.close(fig)


def _show(ax: Any, path: str) -> None:
    with Image.open(path) as image:
        ax.imshow(np.asarray(image.convert("RGB")), interpolation="nearest")
    _bare(ax)


def _bare(ax: Any) -> None:
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _spread(examples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most `_SHEET` examples, an equal share of each type, types together."""
    kinds = list(dict.fromkeys(e["type"] for e in examples))
    share = _SHEET // max(1, len(kinds))
    return [e for kind in kinds for e in [x for x in examples if x["type"] == kind][:share]]


def _plot_samples(path: str, examples: Sequence[Mapping[str, Any]]) -> None:
    plt = pyplot()
    examples = _spread(examples)
    columns = 6
    rows = max(1, -(-len(examples) // columns))
    right = sum(e["answer"] == e["truth"] for e in examples)
    with plt.rc_context(_STYLE):
        fig, axes = plt.subplots(rows, columns, figsize=(11.4, 2.45 * rows + 0.8), squeeze=False)
        for ax in axes.flat[len(examples) :]:
            ax.axis("off")
        for ax, e in zip(axes.flat, examples, strict=False):
            _show(ax, e["image"])
            ok = e["answer"] == e["truth"]
            question = textwrap.fill(e["question"], 28, break_on_hyphens=False)
            ax.set_title(question, size=8, pad=5, linespacing=1.15)
            mark, color = ("✓", _RIGHT) if ok else ("✗", _WRONG)
            answer = textwrap.shorten(e["answer"], 26, placeholder="…") or "(nothing)"
            # The mark says it too, for eyes that do not tell green from red.
            ax.text(0.5, -0.05, f"{mark} {answer}", color=color, size=9.5, weight="bold",
                    ha="center", va="top", transform=ax.transAxes)  # fmt: skip
            if not ok:
                ax.text(0.5, -0.2, f"truth: {e['truth']}", color=_MUTED, size=8,
                        ha="center", va="top", transform=ax.transAxes)  # fmt: skip
        height = fig.get_figheight()
        fig.subplots_adjust(
            left=0.02, right=0.98, bottom=0.5 / height, top=1 - 1.1 / height, hspace=0.62
        )
        subtitle = f"canvases by held-out writers; {right} of these {len(examples)} are right"
        _titles(fig, "Questions and the model's answers", subtitle)
        fig.savefig(path)
        plt.close(fig)


def _plot_cosine(path: str, cosine_map: Mapping[str, Any]) -> None:
    plt = pyplot()
    images = list(cosine_map["images"])[:_MAPS]
    maps = {when: np.asarray(cosine_map[when], float) for when in ("before", "after")}
    columns = len(images)
    with plt.rc_context(_STYLE):
        width = max(1.55 * columns + 2.1, 6.4)
        fig, axes = plt.subplots(3, columns, figsize=(width, 6.1), squeeze=False)
        height = fig.get_figheight()
        fig.subplots_adjust(left=1.25 / width, right=1 - 0.95 / width, bottom=0.15 / height,
                            top=1 - 0.8 / height, hspace=0.22, wspace=0.08)  # fmt: skip
        for c, image in enumerate(images):
            _show(axes[0, c], image)
            for row, when in enumerate(maps, 1):
                ax, grid = axes[row, c], maps[when][c]
                shown = ax.imshow(grid, cmap="viridis", vmin=min(0.0, np.min(maps["before"])),
                                  vmax=1, interpolation="nearest")  # fmt: skip
                ax.set_title(f"mean {grid.mean():.2f}", size=8, pad=3)
                _bare(ax)
        labels = ["canvas", *(f"{w} stage I\nmean {m.mean():.2f}" for w, m in maps.items())]
        for ax, label in zip(axes[:, 0], labels, strict=True):
            ax.text(-0.1, 0.5, label, ha="right", va="center", transform=ax.transAxes)
        low, high = axes[2, -1].get_position(), axes[1, -1].get_position()
        bar = fig.add_axes((high.x1 + 0.15 / width, low.y0, 0.13 / width, high.y1 - low.y0))
        fig.colorbar(shown, cax=bar, label="cosine similarity").outline.set_visible(False)
        title = "What stage I teaches the holistic embedding"
        _titles(fig, title, "per image token: embedding output against the vision teacher")
        fig.savefig(path)
        plt.close(fig)


def _markdown(report: Mapping[str, Any]) -> str:
    header, *rows = _cells(report["results"])
    lines = [
        "# HoVLE on handwritten digits",
        "",
        f"Seed {report['seed']}, {report['minutes']:.1f} minutes.",
        "",
        "Accuracy is exact match on canvases by held-out writers. *Blind* has no image, *shuffled*"
        " another canvas's; *majority* always gives the commonest answer. Only accuracy above all"
        " three shows that the model looks.",
        "",
        f"| {' | '.join(header)} |",
        "|---|---|" + "---:|" * (len(header) - 2),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    if report.get("stand_ins"):
        lines += ["", "## Stand-ins", "", "Trained here in place of the paper's pretrained models."]
        lines += ["", "| stand-in | held-out quality |", "|---|---:|"]
        for name, value in report["stand_ins"].items():
            shown = f"{value:.3f}" if isinstance(value, float) else str(value)
            lines.append(f"| {name} | {shown} |")
    figures = {
        "curves": "Training loss by stage",
        "samples": "Questions and answers",
        "cosine": "Cosine to the vision teacher before and after stage I",
    }
    for name, text in figures.items():
        lines += ["", f"## {text}", "", f"![{text}]({name}.png)"]
    return "\n".join(lines) + "\n"


def write_report(
    out_dir: str,
    report: dict[str, Any],
    *,
    curves: dict[str, dict[str, Curve]],
    examples: list[dict[str, Any]],
    cosine_map: dict[str, Any],
) -> None:
    """Writes report.json, report.md, curves.png, samples.png and cosine.png.

    report: {"seed", "minutes", "results": {arm: ArmResult}} and anything else; "stand_ins"
      ({name: quality}) is shown in the Markdown.
    curves: {arm: {stage: [(step, loss)]}}.
    examples: {"image": path, "type", "question", "answer", "truth"} each; the first few of a type
      are shown.
    cosine_map: {"images": n >= 1 paths, "before": [n, g, g], "after": [n, g, g]}.
    """
    os.makedirs(out_dir, exist_ok=True)
    write_json(os.path.join(out_dir, "report.json"), report)
    with open(os.path.join(out_dir, "report.md"), "w", encoding="utf-8") as f:
        f.write(_markdown(report))
    _plot_curves(os.path.join(out_dir, "curves.png"), curves)
    _plot_samples(os.path.join(out_dir, "samples.png"), examples)
    _plot_cosine(os.path.join(out_dir, "cosine.png"), cosine_map)
