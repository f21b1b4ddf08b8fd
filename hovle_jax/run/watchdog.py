"""A thread that ends a run which hangs, after it has said where every thread and host is."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import jax

from hovle_jax.run.agreement import last_words


class Watchdog:
    """Ends the process once `timeout` seconds have passed without a call of `beat`.

    A run that hangs in a collective cannot raise: its main thread never returns to Python. What
    starts the run again should find it ended, with a reason in its log, not silent.
    """

    def __init__(
        self,
        timeout: float,
        workdir: Path,
        doing: Callable[[], str],
        *,
        patience: float = 5.0,
        end: Callable[[int], object] = os._exit,
    ):
        """`timeout`: 0 = never. `doing`: what the run is at, for the message. `patience`: seconds
        in which other hosts may say what they are at."""
        self._timeout, self._doing, self._patience, self._end = timeout, doing, patience, end
        self._path = workdir / f"stacks-{jax.process_index()}.txt"
        self._beat, self._over = time.monotonic(), threading.Event()

    def beat(self) -> None:
        self._beat = time.monotonic()

    def __enter__(self) -> Watchdog:
        self.beat()
        if self._timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._over.set()

    def _watch(self) -> None:
        left = self._timeout
        while not self._over.wait(left):
            left = self._beat + self._timeout - time.monotonic()
            if left <= 0:
                self._bite()
                return

    def _bite(self) -> None:
        faulthandler.dump_traceback(2, all_threads=True)
        with contextlib.suppress(OSError):  # a disk that hangs or is full must not keep it alive
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        said = last_words(self._doing(), self._patience)
        print(
            f"error: nothing finished in {self._timeout:g} s (config.guards.step_timeout); {said}; "
            f"stacks of all threads are in {self._path}",
            file=sys.stderr,
            flush=True,
        )
        self._end(1)
