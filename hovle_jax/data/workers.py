"""Work that processes share out, whose results come in order."""

from __future__ import annotations

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any


def in_order(
    function: Callable[[Any, Any], Any], shared: Any, items: Iterable[Any], workers: int
) -> Generator[tuple[Any, Any]]:
    """(item, function(shared, item)) of every item; what is under way at a time is bounded.

    Args:
      function: Of a module, as is all that pickles.
      shared: Sent to each process once.
      items: What is to be done.
      workers: Processes; 0: this one.

    Raises:
      concurrent.futures.BrokenExecutor: a process died.
    """
    if not workers:
        for item in items:
            yield item, function(shared, item)
        return
    # Spawned: whoever calls may have threads, which a fork does not survive.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start, (function, shared)
    )
    under_way = collections.deque[tuple[Any, concurrent.futures.Future[Any]]]()
    try:
        for item in items:
            under_way.append((item, pool.submit(_call, item)))
            if len(under_way) > 2 * workers + 2:
                item, future = under_way.popleft()
                yield item, future.result()
        for item, future in under_way:
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def follow_parent() -> None:
    """Ends this process with its parent: one that was killed cannot stop its workers, and they
    would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


_job: tuple[Callable[[Any, Any], Any], Any]  # of a worker process


def _start(function: Callable[[Any, Any], Any], shared: Any) -> None:
    global _job
    _job = function, shared
    # The parent stops its workers. By SIGTERM where one died, so that is not ignored.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent()


def _call(item: Any) -> Any:
    function, shared = _job
    return function(shared, item)
