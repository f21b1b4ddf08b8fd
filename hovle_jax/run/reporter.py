"""What a run says while it trains: metrics, goodput, bad batches, progress."""

from __future__ import annotations

import concurrent.futures
import math
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from hovle_jax.config import RunConfig
from hovle_jax.data.pipeline import Cursor
from hovle_jax.run.goodput import Clock, GoodputLog
from hovle_jax.run.guards import LossGuard
from hovle_jax.run.metrics import MetricLog, Progress, read_metrics
from hovle_jax.run.prepare import Run
from hovle_jax.run.sinks import Sink, open_sinks
from hovle_jax.stages import get_stage
from hovle_jax.tpu import aot, chips


@dataclass(frozen=True)
class _Pending:
    """A step that the devices work on."""

    step: int
    arrival: concurrent.futures.Future[tuple[dict[str, Any], float]]
    cursor: Cursor  # before its batch
    data_wait: float = 0.0


class Reporter:
    """Reads the metrics of a step only after the next one is under way.

    All hosts have one, as all look at the losses; only the first one writes.
    """

    def __init__(self, run: Run, done: int, clock: Clock, began: float, *, quiet: bool):
        """`done`: steps of the run so far. `began`: Unix time at which `clock` did."""
        config, self._run, self._clock = run.config, run, clock
        self.leads = jax.process_index() == 0
        self._quiet = quiet or not self.leads
        self._goodput = GoodputLog(run.workdir / "goodput.jsonl") if self.leads else None
        if self._goodput is not None:
            self._goodput.write(time=began, start=True)
        self._flops = peak_shares(config, run.mesh)
        self._pending: _Pending | None = None
        self._free = 0.0  # when the devices could begin with what is under way
        self.last: dict[str, Any] = {}
        self._logs: dict[str, MetricLog] = {}
        self._sinks: list[Sink] = []
        rows = read_metrics(run.workdir / "metrics.jsonl")
        self._losses = [(row["step"], row["loss"]) for row in rows]  # of all steps so far
        self._open(done)

    def _open(self, done: int) -> None:
        """Everything that rows of steps after `done` are to be written to; what is there of them
        goes."""
        self._close()
        config, workdir, self._done = self._run.config, self._run.workdir, done
        # Not read again: on other hosts the file may lag behind, and all have to see the same.
        self._losses = [(step, loss) for step, loss in self._losses if step <= done]
        recent = self._losses[-config.guards.spike_window :]
        self._guard = LossGuard(config.guards, [loss for _, loss in recent])
        self.spike: tuple[int, str] | None = None  # a step that spiked, and by how much
        names = ("metrics", "eval", "bad_batches") if self.leads else ()
        self._logs = {name: MetricLog(workdir / f"{name}.jsonl", done) for name in names}
        self._sinks = open_sinks(config, workdir, done) if self.leads else []
        self._progress = Progress(self._run.stage.name, config.steps, config.log_every, done)

    def rewound(self, done: int) -> None:
        """The run is back at `done` steps; those after it are lost."""
        if self.leads:
            spike, reason = self.spike or (0, "")
            print(
                f"warning: step {spike}: {reason}; back to step {done}, on with other batches "
                "(rewinds.jsonl)",
                file=sys.stderr,
            )
        self._pending = None
        self._open(done)
        self._account(restored=done)
        self._free = time.monotonic()

    def ready(self) -> None:
        """The end of everything before the first step."""
        self._clock.enter("step")
        self._account(restored=self._done)
        self._free = time.monotonic()

    def doing(self) -> str:
        """For whoever wonders why nothing happens."""
        done = self.last.get("step", self._done)
        return f"{done} steps done, now in {self._clock.current!r}"

    def dispatched(
        self, step: int, metrics: Any, cursor: Cursor, waited: tuple[float, float]
    ) -> None:
        """`step` is under way, from the batch after `cursor`; the step before is reported.

        waited: when the wait for its batch began and ended, in seconds of `time.monotonic`.

        Raises:
          UserError: on every host: losses that are not finite, too often.
        """
        arrival = _arrival(metrics)
        idle = self.flush(waited)
        self._pending = _Pending(step, arrival, cursor, idle)

    def flush(self, waited: tuple[float, float] = (0.0, 0.0)) -> float:
        """Reports the step under way when it is done. Returns the seconds of the wait `waited`
        in which the devices had nothing to do."""
        begin, end = waited
        if (pending := self._pending) is None:
            return end - begin
        self._pending = None
        values, done = pending.arrival.result()
        idle = max(end - max(begin, done), 0.0)
        self._clock.move(end - begin - idle, "data", "step")
        self._account(step=pending.step)
        took, self._free = max(done - self._free, 1e-9), done
        self._report(pending, values, took)
        return idle

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """A row of eval.jsonl, which a checkpoint of its step must not overtake."""
        self._account(step=row["step"])
        self._free = time.monotonic()
        self._write("eval", row, "eval/")
        if self.leads:
            # Says which checkpoints are the best; a mounted bucket has files once they are closed.
            self._logs["eval"].close()
        if not self._quiet:
            found = [f"held-out loss {row['loss']:.4f}"] if "loss" in row else []
            tasks = (name for name in row if name.startswith("task/"))
            found += [f"{name.removeprefix('task/')} {row[name]:.1f}" for name in tasks]
            print(f"after step {row['step']}: {', '.join(found)}", file=sys.stderr)

    def saved(self) -> None:
        """What was done until now is not done again, whatever happens."""
        self._account()
        self._free = time.monotonic()

    def close(self) -> None:
        """The end of a run, for now or for good."""
        self.flush()
        self._account()
        if self._goodput is not None:
            self._goodput.close()
        self._close()

    def _close(self) -> None:
        for log in self._logs.values():
            log.close()
        for sink in self._sinks:
            sink.close()

    def _report(self, pending: _Pending, values: dict[str, Any], took: float) -> None:
        step = pending.step
        row = {"step": step} | by_name(values, self._run.pipeline.names)
        row |= {"step_seconds": took, "data_wait_seconds": pending.data_wait}
        row |= {f"{what}_per_second": values[what] / took for what in ("tokens", "tiles")}
        row |= {name: flops / took for name, flops in self._flops.items()}
        row["bad_samples"] = int(self._run.pipeline.read[1])
        if used := _memory():
            row["hbm_peak_bytes"] = used
        self._write("metrics", row)
        self._losses.append((step, row["loss"]))
        self.last = row
        if not self._quiet:
            text = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
            self._progress.update(step, text)
        if reason := self._guard.look(row["loss"], row["grad_norm"]):
            self._warn(step, reason, pending.cursor)
            if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
                self.spike = step, reason
        self._guard.check(step, self._run.workdir / "bad_batches.jsonl")

    def _account(self, **row: int) -> None:
        """A row of goodput.jsonl: the seconds since the last one."""
        seconds = self._clock.lap()
        if self._goodput is not None:
            self._goodput.write(**row, seconds=seconds)

    def _warn(self, step: int, reason: str, cursor: Cursor) -> None:
        if self.leads:
            rows = self._run.pipeline.origins(cursor)
            self._write("bad_batches", {"step": step, "reason": reason, "rows": rows})
            path = self._run.workdir / "bad_batches.jsonl"
            print(f"warning: step {step}: {reason}; {path} lists the records", file=sys.stderr)

    def _write(self, name: str, row: Mapping[str, Any], prefix: str = "") -> None:
        if self.leads:
            self._logs[name].write(row)
            for sink in self._sinks if name != "bad_batches" else ():
                sink.write(row, prefix)


def by_name(values: Mapping[str, Any], sources: Sequence[str]) -> dict[str, Any]:
    """Per-source vectors "source/WHAT" as "source/NAME/WHAT", of the sources in this batch."""
    row = {k: v for k, v in values.items() if not k.startswith("source/")}
    vectors = values.keys() - row.keys()
    for number, name in enumerate(sources):
        if values["source/samples"][number]:
            for key in sorted(vectors):
                row[key.replace("source/", f"source/{name}/")] = values[key][number]
    return row


def _arrival(metrics: Any) -> concurrent.futures.Future[tuple[dict[str, Any], float]]:
    """The values of a step and when they were there.

    In a thread, as the main one is by then waiting for the next batch: how long the devices had
    nothing to do follows from that moment.
    """
    future: concurrent.futures.Future[tuple[dict[str, Any], float]] = concurrent.futures.Future()

    def wait() -> None:
        try:
            values = jax.device_get(metrics)
            future.set_result(({k: v.tolist() for k, v in values.items()}, time.monotonic()))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=wait, daemon=True).start()
    return future


def peak_shares(config: RunConfig, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """{name of the MFU: useful FLOPs of a step / peak FLOPs per second}; {} on unknown chips.

    `mfu` counts all useful work, as `hovle plan` does, `mfu_without_teacher` what trains.
    """
    chip = chips.of_kind(mesh.devices.flat[0].device_kind)
    if chip is None:
        return {}
    peak, useful = chip.peak_flops * mesh.size, aot.model_flops(config)
    shares = {"mfu": useful / peak}
    if get_stage(config.stage).teacher:
        forward = config.data.rows * aot.teacher_flops(config)
        shares["mfu_without_teacher"] = (useful - forward) / peak
    return shares


def _memory() -> int:
    """Most bytes that one of this host's devices has used; 0 where it does not say."""
    stats = (device.memory_stats() or {} for device in jax.local_devices())
    return max((s.get("peak_bytes_in_use", 0) for s in stats), default=0)
