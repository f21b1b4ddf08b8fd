"""Metrics of a run: one JSONL row per step, and what a person watches while it runs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from hovle_jax.errors import UserError
from hovle_jax.output import replace_bytes


class MetricLog:
    """`metrics.jsonl` and its like: at most one row per step, also across restarts."""

    def __init__(self, path: str | Path, start_step: int):
        """Rows of steps after `start_step` are dropped: a resumed run writes them again."""
        self.path = Path(path)
        self._file: TextIO | None = None
        if self.path.is_file():
            kept = [r for r in read_metrics(self.path) if r["step"] <= start_step]
            replace_bytes(self.path, json_lines(kept))

    def write(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a")
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Until the next row."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, none where there is no file; as `parse_rows`."""
    path = Path(path)
    return parse_rows(path.read_text(), str(path)) if path.is_file() else []


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parse_rows(text: str, where: str) -> list[dict[str, Any]]:
    """Rows of JSON lines. A last line that a crash cut short is left out.

    Raises:
      UserError: any other line that is no JSON object: what follows it must not be lost.
    """
    *lines, last = text.split("\n")
    rows = []
    for number, line in enumerate([*lines, last], start=1):
        try:
            row = json.loads(line) if line.strip() else None
            if not isinstance(row, dict | None):
                raise ValueError
        except ValueError:
            if number > len(lines):
                break
            raise UserError(f"{where}:{number}: is no row of JSON; mend or delete it") from None
        rows += [row] if row is not None else []
    return rows


class Progress:
    """One updating line in a terminal, one line every `every` items otherwise."""

    def __init__(
        self, label: str, total: int, every: int, start: int = 0, out: TextIO | None = None
    ):
        self._label, self._total, self._every, self._start = label, total, every, start
        self._out = sys.stderr if out is None else out
        self._tty = self._out.isatty()
        self._begin = time.monotonic()
        self._last_drawn = 0.0

    def update(self, done: int, text: str = "") -> None:
        """`done` items of the total are finished."""
        now = time.monotonic()
        last = done >= self._total
        if self._tty:
            if now - self._last_drawn < 0.1 and not last:
                return
        elif done % self._every and not last:
            return
        self._last_drawn = now
        worked = max(done - self._start, 1)
        left = (now - self._begin) / worked * (self._total - done)
        line = f"{self._label} {done}/{self._total}  {text}  {_clock(left)} left"
        if self._tty:
            self._out.write(f"\r\x1b[K{line}" + ("\n" if last else ""))
        else:
            self._out.write(line + "\n")
        self._out.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
