"""A study's result: means over seeds with 95 % intervals, as JSON, a table and a picture.

An interval is Student's t over seeds: a seed has its own data, stand-ins, order and questions, so
it is what repeats. The difference to the first arm is taken seed by seed before its interval is
made, since arms share all that a seed decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.scipy.special import betainc

from hovle_jax.output import write_json
from hovle_jax.run.plot import pyplot
from hovle_jax.study.plan import Study

Correct = dict[str, dict[str, list[list[int]]]]  # {task: {arm: per seed, 1 for each right answer}}
_COLOUR, _GREY = "#2f5d8a", "#6b7480"


def t_quantile(freedom: int) -> float:
    """The t with P(|T| < t) = 0.95, of Student's distribution."""
    low, high = 0.0, 1e3
    for _ in range(60):
        t = (low + high) / 2
        outside = float(betainc(freedom / 2, 0.5, freedom / (freedom + t * t)))
        low, high = (t, high) if outside > 0.05 else (low, t)
    return low


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % t interval of the mean; None of a single value, which has none."""
    n = len(values)
    if n < 2:
        return None
    half = t_quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def summary(study: Study, correct: Correct, cpu_seconds: float) -> dict[str, Any]:
    """What report.json holds; only seeds that every arm of a task has count."""
    results: dict[str, Any] = {}
    for task, arms in correct.items():
        if set(arms) != {arm.name for arm in study.arms}:
            continue
        seeds = min(map(len, arms.values()))
        accuracy = {arm: [float(np.mean(c)) for c in found[:seeds]] for arm, found in arms.items()}
        first = accuracy[study.arms[0].name]
        results[task] = {}
        for number, (arm, values) in enumerate(accuracy.items()):
            by_seed = [a - b for a, b in zip(values, first, strict=True)]
            difference = {"mean": float(np.mean(by_seed)), "interval": interval(by_seed)}
            results[task][arm] = {
                "accuracy": values,
                "mean": float(np.mean(values)),
                "interval": interval(values),
                "difference": difference if number else None,
                "questions": len(arms[arm][0]),
            }
    return {
        "question": study.question,
        "seeds": list(study.seeds),
        "intervals": "95 %, Student's t over seeds; differences are paired by seed",
        "cpu_seconds": cpu_seconds,
        "results": results,
    }


def write(path: Path, body: dict[str, Any]) -> None:
    """As path.json and path.md."""
    write_json(path.with_name(f"{path.name}.json"), body)
    path.with_name(f"{path.name}.md").write_text(markdown(body))


def markdown(body: dict[str, Any]) -> str:
    """A table per task."""
    lines = [f"# {body['question']}", ""]
    for task, arms in body["results"].items():
        first, example = next(iter(arms)), next(iter(arms.values()))
        seeds = len(example["accuracy"])
        lines += [
            f"**{task}**: {example['questions']} held-out questions for each of {seeds} seeds",
            "",
            f"| arm | right | 95 % | against {first} | 95 % | by seed |",
            "|---|---:|---:|---:|---:|---|",
        ]
        for arm, found in arms.items():
            other = found["difference"]
            cells = [arm, f"{found['mean']:.3f}", _range(found["interval"])]
            cells += (
                [f"{other['mean']:+.3f}", _range(other["interval"], "+")] if other else ["", ""]
            )
            cells.append(", ".join(f"{x:.3f}" for x in found["accuracy"]))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    minutes = body["cpu_seconds"] / 60
    lines += [f"Intervals: {body['intervals']}. {minutes:.0f} minutes of CPU in all.", ""]
    return "\n".join(lines)


def _range(bounds: Sequence[float] | None, sign: str = "") -> str:
    return "" if bounds is None else " to ".join(f"{x:{sign}.3f}" for x in bounds)


def draw(path: Path, body: dict[str, Any]) -> None:
    """Means with their intervals, small dots for seeds: a panel per task, a line per arm."""
    plt = pyplot()
    results = body["results"]
    arms = list(next(iter(results.values())))
    lowest = min(
        min([*found["accuracy"], *(found["interval"] or ())])
        for task in results.values()
        for found in task.values()
    )
    left = max(math.floor(lowest * 10) / 10, 0)  # of all panels: arms near the top differ, too
    size = (2.2 + 3.3 * len(results), 0.9 + 0.34 * len(arms))
    with plt.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(
            1, len(results), figsize=size, sharey=True, layout="constrained", squeeze=False
        )
        for axes, (task, found) in zip(panels[0], results.items(), strict=True):
            for row, arm in enumerate(arms):
                values, bounds = found[arm]["accuracy"], found[arm]["interval"]
                axes.plot(values, [row] * len(values), ".", color=_GREY, alpha=0.6, markersize=5)
                if bounds is not None:
                    axes.plot(np.clip(bounds, 0, 1), [row, row], color=_COLOUR, linewidth=1.6)
                axes.plot([found[arm]["mean"]], [row], "o", color=_COLOUR, markersize=5)
            axes.set_title(task, loc="left", fontweight="bold")
            axes.set_yticks(range(len(arms)), arms)
            axes.set_xlim(left - 0.02, 1.02)
            axes.grid(axis="x", color="#e6e9ed", linewidth=0.7)
            axes.set_xlabel("held-out questions answered exactly")
        panels[0][0].invert_yaxis()
        figure.savefig(path, dpi=110)
        plt.close(figure)
