"""A window of steps for xprof: `hovle train --profile=START:COUNT`."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from hovle_jax.errors import UserError


def parse_window(text: str) -> tuple[int, int]:
    """'100:5' -> (100, 5): the first step and how many. ('': no step)"""
    if not text:
        return 0, 0
    if not (found := re.fullmatch(r"(\d+):(\d+)", text)) or "0" in found.groups():
        raise UserError(f"--profile: {text!r} is not START:COUNT, such as 100:5 (steps 100 to 104)")
    return int(found[1]), int(found[2])


class Profile:
    """Traces the steps of a window into WORKDIR/profile, on every host."""

    def __init__(self, window: tuple[int, int], workdir: Path):
        start, count = window
        self._steps, self._directory = range(start, start + count), str(workdir / "profile")
        self._running = False

    def before(self, step: int, state: Any) -> None:
        """Call before `step` starts from `state`, which is waited for at both ends of the window,
        so that it holds whole steps."""
        if self._running == (step in self._steps):
            return
        jax.block_until_ready(state)
        if self._running:
            jax.profiler.stop_trace()
        else:
            jax.profiler.start_trace(self._directory)
        self._running = not self._running

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._running:
            jax.profiler.stop_trace()
