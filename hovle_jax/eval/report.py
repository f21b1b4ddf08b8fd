"""Results as JSON, and all of a directory as Markdown rows beside the published numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hovle_jax import __version__
from hovle_jax.eval.tally import Scored, Tally
from hovle_jax.eval.tasks import TASKS, Task

HEAD = (
    "| benchmark | metric | dialect | this model | 95% interval | rows | published |",
    "|---|---|---|---|---|---|---|",
)


def results(
    name: str,
    dialect: str,
    rows: Sequence[Scored],
    tally: Tally,
    *,
    failed: int,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Values with their intervals, what they are of, and the published ones."""
    task = TASKS[name]
    scores, intervals = tally.score(), tally.intervals(resamples, seed)
    return {
        "task": name,
        "title": task.title,
        "dialect": dialect,
        "metric": task.metric,
        "value": scores[task.metric],
        "interval": intervals[task.metric],
        "rows": len(rows),
        "failed": failed,
        "bootstrap": {
            "units": len(tally.units),
            "resamples": resamples,
            "seed": seed,
            "interval": "percentile, 95%",
        },
        "values": {k: {"value": scores[k], "interval": _known(intervals[k])} for k in scores},
        "published": [dataclasses.asdict(entry) for entry in task.published],
        "hovle_jax": __version__,
    }


def _known(interval: tuple[float, float]) -> tuple[float, float] | None:
    return None if math.isnan(interval[0]) else interval  # JSON has no nan


def markdown_row(found: dict[str, Any]) -> str:
    """One row of the table, the published numbers with their sources in the last cell."""
    task: Task = TASKS[found["task"]]
    low, high = found["interval"]
    published = "; ".join(
        " ".join(filter(None, (p.model, f"{p.value:g}", p.metric, f"({p.source})")))
        for p in task.published
    )
    rows = f"{found['rows']}, {found['failed']} failed" if found["failed"] else f"{found['rows']}"
    cells = (task.title, found["metric"], found["dialect"], f"{found['value']:.1f}")
    return f"| {' | '.join(cells)} | {low:.1f} to {high:.1f} | {rows} | {published or '-'} |"


def write_table(directory: Path) -> Path:
    """DIRECTORY/results.md: a row for every results.json below, in the order of `TASKS`."""
    found = [json.loads(path.read_text()) for path in sorted(directory.glob("*/*/results*.json"))]
    order = {name: i for i, name in enumerate(TASKS)}
    found.sort(key=lambda entry: (order[entry["task"]], entry["dialect"]))
    path = directory / "results.md"
    path.write_text("\n".join((*HEAD, *map(markdown_row, found))) + "\n", encoding="utf-8")
    return path
