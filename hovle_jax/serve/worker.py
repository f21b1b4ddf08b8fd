"""The one thread that owns the engine; everybody else sends it requests and hears of progress."""

from __future__ import annotations

import threading
from collections.abc import Callable

from hovle_jax.errors import one_line
from hovle_jax.generation.engine import Engine, Progress, Request

# Called in the worker's thread: progress of a ticket, or the exception that ended the worker.
Report = Callable[[Progress | Exception], None]


class Worker:
    """Runs an engine for as long as there is work, and sleeps otherwise."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._changed = threading.Condition()
        self._inbox: list[tuple[int, Request, Report]] = []
        self._cancelled: set[int] = set()
        self._tickets = 0
        self._closing = False
        self.failure = ""  # why nothing more can be answered
        self.running = self.tokens = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def check(self, request: Request) -> None:
        self._engine.check(request)

    def submit(self, request: Request, report: Report) -> int:
        """Queues a checked request; its ticket is for `cancel`."""
        with self._changed:
            if self.failure or self._closing:
                raise RuntimeError(self.failure or "the server is stopping")
            self._tickets += 1
            self._inbox.append((self._tickets, request, report))
            self._changed.notify()
            return self._tickets

    def cancel(self, ticket: int) -> None:
        """Nothing more is made for a ticket; one that is finished may be cancelled too."""
        with self._changed:
            self._cancelled.add(ticket)
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread after its step; requests that are not finished stay unanswered."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        numbers: dict[int, int] = {}  # ticket -> the engine's number
        reports: dict[int, tuple[int, Report]] = {}  # number -> ticket and whom to tell
        engine = self._engine
        try:
            while True:
                with self._changed:
                    while not (self._inbox or self._cancelled or self._closing or numbers):
                        self._changed.wait()
                    if self._closing:
                        return
                    inbox, self._inbox = self._inbox, []
                    cancelled, self._cancelled = self._cancelled, set()
                for ticket, request, report in inbox:
                    if ticket not in cancelled:
                        numbers[ticket] = engine.submit(request)
                        reports[numbers[ticket]] = ticket, report
                for ticket in cancelled & numbers.keys():
                    number = numbers.pop(ticket)
                    engine.cancel(number)
                    del reports[number]
                for progress in engine.step():
                    ticket, report = reports[progress.number]
                    self.tokens += len(progress.tokens)
                    if progress.finish:
                        del reports[progress.number], numbers[ticket]
                    report(progress)
                self.running = engine.running
        except Exception as error:  # out of memory, say: everybody who waits has to hear of it
            with self._changed:
                self.failure = one_line(error)
                waiting = [report for _, _, report in self._inbox]
            for report in [*waiting, *(report for _, report in reports.values())]:
                report(error)
