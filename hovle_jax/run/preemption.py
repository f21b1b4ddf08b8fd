"""SIGTERM: noted from the first moment on, acted upon where all hosts can agree to stop.

A scheduler sends it to one host or to all, while a run starts, restores, compiles, steps or saves.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

_received: list[int] = []
_listeners = 0


@contextlib.contextmanager
def listening() -> Iterator[list[int]]:
    """A list that becomes non-empty when SIGTERM arrives; the same one in every nested block.

    Entering a block again also takes the signal back from whoever took it in between:
    `jax.distributed` does. Only the main thread can listen; in others the list stays empty.
    """
    global _listeners
    try:
        old = signal.signal(signal.SIGTERM, lambda *_: _received.append(signal.SIGTERM))
    except ValueError:
        yield []
        return
    _listeners += 1
    try:
        yield _received
    finally:
        _listeners -= 1
        signal.signal(signal.SIGTERM, old)
        if not _listeners:
            _received.clear()


def ignore() -> None:
    """From now on SIGTERM means nothing: all is saved, and hosts only meet once more to leave.

    One that died there would take the others' exit status with it.
    """
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
