"""`hovle plot`: runs as one picture and one table of where their time went."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.modules import require
from hovle_jax.run.goodput import PHASES, goodput, split_time
from hovle_jax.run.metrics import read_metrics

Rows = list[dict[str, Any]]

# (title, file, prefixes of the columns; '=' marks a whole name)
_PANELS = (
    ("loss", "train", ("=loss", "loss/")),
    ("loss by source", "train", ("source/",)),
    ("held-out loss", "held_out", ("=loss", "loss/")),
    ("held-out loss by source", "held_out", ("source/",)),
    ("tasks", "held_out", ("task/",)),
    ("learning rate", "train", ("=lr",)),
    ("gradient norm", "train", ("=grad_norm", "grad_norm/")),
    ("tokens per second", "train", ("=tokens_per_second",)),
    ("tiles per second", "train", ("=tiles_per_second",)),
    ("MFU", "train", ("mfu",)),
)
_COLOURS = ("#2f5d8a", "#d9822b", "#5b8c5a", "#8e5ea2", "#b0413e", "#4a9ba8", "#8a7a2f", "#6b7480")
_DASHES = ("-", "--", ":", "-.")
_PHASE_COLOURS = dict(
    zip(PHASES, ("#5b8c5a", *_COLOURS[1:2], *_COLOURS[3:], "#d5d9de"), strict=True)
)
_MOST_POINTS = 2000  # of a curve; more are averaged


@dataclass(frozen=True)
class RunRecord:
    """What a work directory says of its run."""

    name: str
    train: Rows
    held_out: Rows
    seconds: dict[str, float]  # by phase


def read_run(directory: str | Path) -> RunRecord:
    """UserError where no run has written metrics."""
    directory = Path(directory)
    train = read_metrics(directory / "metrics.jsonl")
    if not train:
        raise UserError(
            f"{directory}: no metrics.jsonl with rows; give the work directory of a run"
        )
    return RunRecord(
        str(directory),
        train,
        read_metrics(directory / "eval.jsonl"),
        split_time(read_metrics(directory / "goodput.jsonl")),
    )


def goodput_table(runs: Sequence[RunRecord]) -> str:
    """A line per run: goodput and the share of every phase of its wall time."""
    width = max(len(run.name) for run in runs)
    lines = ["  ".join(["run".ljust(width), "goodput", "   hours", *PHASES])]
    for run in runs:
        total = sum(run.seconds.values())
        shares = (f"{run.seconds[p] / (total or 1):.1%}".rjust(len(p)) for p in PHASES)
        head = (run.name.ljust(width), f"{goodput(run.seconds):7.1%}", f"{total / 3600:8.2f}")
        lines.append("  ".join((*head, *shares)))
    return "\n".join(lines)


def write_plot(path: Path, runs: Sequence[RunRecord]) -> None:
    """Curves of all runs, overlaid, and a bar of where each one's time went, as a PNG."""
    plt = pyplot()
    panels = [p for p in _PANELS if any(_columns(getattr(r, p[1]), p[2]) for r in runs)]
    rows = -(-len(panels) // 3)
    bar = 0.9 + 0.35 * len(runs)
    size = (15, 3.2 * rows + bar)
    with plt.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=size, layout="constrained")
        grid = figure.add_gridspec(rows + 1, 3, height_ratios=[3.2] * rows + [bar])
        for i, panel in enumerate(panels):
            _draw_curves(figure.add_subplot(grid[i // 3, i % 3]), panel, runs)
        _draw_bars(figure.add_subplot(grid[rows, :]), runs)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, format="png")
        plt.close(figure)


def pyplot() -> Any:
    require("matplotlib", "demo", "a plot").use("Agg")  # machines that train have no display
    return require("matplotlib.pyplot", "demo", "a plot")


def _columns(rows: Rows, prefixes: Iterable[str]) -> list[str]:
    """Names of the columns a panel shows, in the order of their first appearance."""

    def shown(name: str) -> bool:
        if name.startswith("source/") and "/loss/" not in name:
            return False
        return any(name == p[1:] if p[0] == "=" else name.startswith(p) for p in prefixes)

    return [name for name in dict.fromkeys(k for row in rows for k in row) if shown(name)]


def _draw_curves(axes: Any, panel: tuple[str, str, tuple[str, ...]], runs: Any) -> None:
    """Columns have a colour each; of several runs, runs have a colour and columns a dash."""
    title, part, prefixes = panel
    for number, run in enumerate(runs):
        rows = getattr(run, part)
        for order, name in enumerate(_columns(rows, prefixes)):
            alone = len(runs) == 1
            axes.plot(
                *_points(rows, name),
                color=_COLOURS[(order if alone else number) % len(_COLOURS)],
                linestyle="-" if alone else _DASHES[order % len(_DASHES)],
                linewidth=1.2,
                marker="o" if len(rows) < 20 else "",
                markersize=2.5,
                label=_label(name) if alone else f"{Path(run.name).name}: {_label(name)}",
            )
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(axis="y", color="#e6e9ed", linewidth=0.7)
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=6)


def _label(column: str) -> str:
    """Of a source that is named by its path, the end of it."""
    source, loss, term = column.removeprefix("source/").partition("/loss/")
    return f"{Path(source).name}: {term}" if loss else column


def _points(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of a column; neighbours of a long one are averaged."""
    found = [(r["step"], r[name]) for r in rows if math.isfinite(r.get(name, math.nan))]
    size = max(len(found) // _MOST_POINTS, 1)
    groups = [found[i : i + size] for i in range(0, len(found), size)]
    means = [[sum(values) / len(group) for values in zip(*group, strict=True)] for group in groups]
    return [m[0] for m in means], [m[1] for m in means]


def _draw_bars(axes: Any, runs: Sequence[RunRecord]) -> None:
    for number, run in enumerate(runs):
        total, left = sum(run.seconds.values()) or 1.0, 0.0
        for phase, seconds in run.seconds.items():
            axes.barh(
                number,
                seconds / total,
                left=left,
                color=_PHASE_COLOURS[phase],
                label=phase if number == 0 else None,
            )
            left += seconds / total
    names = [f"{Path(r.name).name}  {goodput(r.seconds):.1%}" for r in runs]
    axes.set_yticks(range(len(runs)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_title("goodput: where the wall time went", loc="left", fontweight="bold")
    axes.legend(ncols=len(PHASES), frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12))
