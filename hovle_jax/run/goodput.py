"""Where the wall time of a run went, over all its starts: WORKDIR/goodput.jsonl.

Every moment of a run's main thread is in one phase. Rows are only ever added, so the restarts of a
run add up in one file:

    {"time": 1700000000.0, "start": true}                                   a start of `hovle train`
    {"time": ..., "restored": 0, "seconds": {"init": 9.1, "compile": 30.2}} steps done before it
    {"time": ..., "step": 1, "seconds": {"step": 0.9, "data": 0.1}}         one per finished step
    {"time": ..., "step": 1, "seconds": {"evaluation": 7.5}}                after evaluating then
    {"time": ..., "seconds": {"checkpoint": 1.2}}                           after a save; at the end

`time` is Unix time, `seconds` are those since the row before. Steps after `restored` of a later row
were done for nothing: all seconds of their rows are lost work.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# step: everything else of a step, most of it the devices' work. data: devices idle for want of
# a batch. down: between the last row of a start and the next start.
PHASES = ("step", "data", "checkpoint", "evaluation", "init", "compile", "lost", "down")


class Clock:
    """Splits wall time into phases that add up to it. Begins in the phase 'init'."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._mark, self._spent = now(), defaultdict[str, float](float)
        self.current = "init"

    def enter(self, phase: str) -> None:
        """From now on it is `phase`."""
        now = self._now()
        self._spent[self.current] += now - self._mark
        self._mark, self.current = now, phase

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase inside another one."""
        outer = self.current
        self.enter(name)
        try:
            yield
        finally:
            self.enter(outer)

    def move(self, seconds: float, source: str, target: str) -> None:
        """What was counted as one phase belongs to another."""
        self._spent[source] -= seconds
        self._spent[target] += seconds

    def lap(self) -> dict[str, float]:
        """Seconds of each phase since the last lap."""
        self.enter(self.current)
        spent, self._spent = self._spent, defaultdict(float)
        return {phase: seconds for phase, seconds in spent.items() if seconds}


class GoodputLog:
    """`goodput.jsonl`, as above."""

    def __init__(self, path: str | Path, now: Callable[[], float] = time.time):
        self._path, self._now = Path(path), now
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a")
        whole = self._path.read_bytes().rpartition(b"\n")
        self._file.truncate(len(whole[0] + whole[1]))  # without a row that a kill cut short

    def write(self, **row: Any) -> None:
        self._file.write(json.dumps({"time": self._now()} | row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def split_time(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of every phase of PHASES over all starts of a run."""
    rows = list(rows)
    total: dict[str, float] = defaultdict(float)
    kept = len(rows) * [True]
    for i, row in enumerate(rows):
        if "start" in row and i:
            total["down"] += max(row["time"] - rows[i - 1]["time"], 0.0)
        if "restored" in row:
            for j in range(i):
                kept[j] &= rows[j].get("step", 0) <= row["restored"]
    for row, keep in zip(rows, kept, strict=True):
        for phase, seconds in row.get("seconds", {}).items():
            total[phase if keep else "lost"] += seconds
    return {phase: total[phase] for phase in PHASES}


def goodput(seconds: Mapping[str, float]) -> float:
    """The share of wall time in steps that count; 0 of an empty file."""
    return seconds["step"] / (sum(seconds.values()) or 1.0)
