"""The main loop: one stage, from its sources or its last checkpoint to its last step.

mesh -> shapes -> shardings -> restore or initialise -> (batch -> step -> metrics -> save)*
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hovle_jax import preemption, sharding
from hovle_jax.checkpoint import (
    open_stored,
    read_config,
    storage_of,
    write_config,
    write_tree,
)
from hovle_jax.config import RunConfig, to_dict
from hovle_jax.data.pipeline import START, Cursor, HostBatch, Pipeline
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.hosts import PREEMPTIONS, SIGTERM, DataBarrier, data_share, make_mesh
from hovle_jax.initialize import check_order, initial_params, placed, teacher_params, with_sharding
from hovle_jax.metrics import MetricLog, Progress
from hovle_jax.optim import make_optimizer
from hovle_jax.run_checkpoints import Checkpoints
from hovle_jax.stages import Stage, get_stage
from hovle_jax.train_step import (
    TrainState,
    jit_step,
    new_state,
    stage_shapes,
    state_shapes,
    state_shardings,
    trainable_regex,
)
from hovle_jax.tree import flatten, split, unflatten

Params = dict[str, Any]


class Preempted(Exception):
    """SIGTERM or a maintenance notice; nothing is lost, and the same command goes on."""


def train(
    config: RunConfig,
    workdir: str | Path,
    *,
    devices: Sequence[Any] | None = None,
    quiet: bool = False,
) -> dict[str, float]:
    """Runs the stage of `config` in `workdir`, resuming what is there; returns the last metrics.

    devices: default all of them; config.mesh must cover them exactly.

    Raises:
      UserError: anything the caller can mend, before the first step wherever possible.
      Preempted: SIGTERM or a maintenance notice; every step that was done is saved.
    """
    stage = get_stage(config.stage)
    workdir = Path(workdir)
    barrier = DataBarrier(config.data.timeout)
    with barrier.together():
        _check_same_run(config, workdir)
        if not config.data.tokenizer:
            raise UserError("config.data.tokenizer: needs a tokenizer directory")
        tokenizer = Tokenizer.load(config.data.tokenizer)
        _check_same_tokenizer(tokenizer, workdir / "tokenizer")
        mesh = make_mesh(config.mesh, devices)
        host, hosts = data_share(mesh)
        sharding.check_rows(config.data.rows, config.optim.accumulate, mesh)
    barrier.agree(
        flatten({"config": to_dict(config)}, ".")
        | {"--workdir": str(workdir), "the tokenizer": tokenizer.fingerprint}
    )
    checkpoints = Checkpoints(workdir, config, barrier)
    with jax.set_mesh(mesh), preemption.listening() as terminated:
        with barrier.together():
            # What can be wrong is looked at first, what takes long last.
            if checkpoints.latest() is None:
                check_order(config, stage)
            step_fn = jit_step(config, mesh)
            index = Path(config.data.index or workdir / "index")
            pipeline = Pipeline(
                config,
                stage.data,
                stage.token_weights,
                tokenizer,
                index=index,
                rejects=workdir / "rejects.jsonl",
                quiet=quiet,
                workers=config.data.workers,
            )
        barrier.agree({"the data": pipeline.summary()})
        teach = teacher_params(config, mesh) if stage.teacher else {}
        state, frozen, cursor = _start(config, stage, mesh, checkpoints, workdir)
        leads = jax.process_index() == 0  # one host writes what all share
        if leads:
            write_config(workdir, config)
            tokenizer.save(workdir / "tokenizer")
        batches = pipeline.batches(cursor, host=host, hosts=hosts)
        log = MetricLog(workdir / "metrics.jsonl", int(state.step)) if leads else None
        progress = Progress(stage.name, config.steps, config.log_every, int(state.step))
        if leads and not quiet:
            print(*pipeline.summary(cursor), sep="\n", file=sys.stderr)
        place = sharding.batch_sharding(mesh)
        reporter = _Reporter(log, progress if leads and not quiet else None, pipeline.names)
        for step in range(int(state.step) + 1, config.steps + 1):
            begin = time.monotonic()
            stop = checkpoints.failure() or (SIGTERM if terminated else "")
            try:
                if not stop:
                    host_batch, following = next(batches)
            except UserError as error:
                stop = str(error)
            if stop := barrier.wait(step, stop):  # no step that is done is lost
                reporter.flush()
                where = checkpoints.stop(state, cursor, stop)
                if stop in PREEMPTIONS:
                    raise Preempted(f"{stop}, {where}")
                raise UserError(stop)
            cursor = following
            waited = time.monotonic() - begin
            batch = _to_device(host_batch, place)
            state, metrics = step_fn(state, frozen, teach, batch)
            reporter.dispatched(step, metrics, waited, int(pipeline.read[1]))
            due = config.save_every and step % config.save_every == 0
            if due or step == config.steps:
                reporter.flush()  # a saved step is never missing from the metrics
                checkpoints.save(state, cursor)
        last = reporter.finish()
        checkpoints.close()
        return last


def _check_same_tokenizer(tokenizer: Tokenizer, saved: Path) -> None:
    """By its content: it may have moved."""
    if saved.is_dir() and Tokenizer.load(saved).fingerprint != tokenizer.fingerprint:
        raise UserError(f"config.data.tokenizer: is not the one this run began with ({saved})")


def _check_same_run(config: RunConfig, workdir: Path) -> None:
    """A work directory belongs to one run: the same stage and model, and data its cursor fits."""
    if not (workdir / "config.json").is_file():
        return
    stored = read_config(workdir)
    if not isinstance(stored, RunConfig):
        raise UserError(f"{workdir}: is a model directory, not the work directory of a run")
    free = {
        "data.rows",
        "data.tokenizer",  # checked by its content
        "data.workers",
        "data.index",
        "data.meta",  # the cursor knows its sources by name: another mixture goes on from it
        "data.images",
        "data.repeat_mode",
        "data.max_bad",
        "data.timeout",
        "data.max_sources",
        "model.remat",
        "model.attention",
        "model.loss_chunk",
    }
    for name in ("stage", "model", "trainable", "seed", "storage", "data"):
        old, new = (flatten({name: to_dict(getattr(c, name))}, ".") for c in (stored, config))
        changed = sorted(k for k in new if old[k] != new[k] and k not in free)
        if changed:
            raise UserError(
                f"{workdir}: belongs to a run with config.{changed[0]}={old[changed[0]]!r}; use "
                "that, or a new --workdir"
            )


def _start(
    config: RunConfig,
    stage: Stage,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    workdir: Path,
) -> tuple[TrainState, Params, Cursor]:
    """(state, frozen parameters, data cursor) from the last checkpoint, or from config.init."""
    shardings = state_shardings(config, mesh)
    trainable_shapes, frozen_shapes = stage_shapes(config)
    step = checkpoints.latest()
    if step is not None:
        shapes = jax.tree.map(with_sharding, state_shapes(config), shardings)
        state, cursor = checkpoints.restore(step, shapes)
        stored = open_stored(workdir, verified=True)  # by `Checkpoints`
        frozen = stored.read(placed(config, frozen_shapes, mesh))
        return state, unflatten(frozen), cursor
    params = initial_params(config, stage, mesh)
    trainable, frozen = split(params, trainable_regex(config))
    if frozen:
        write_tree(storage_of(workdir, config) / "frozen", frozen)
    tx = make_optimizer(config.optim, config.steps, trainable_shapes)
    state = jax.jit(lambda p: new_state(p, tx), out_shardings=shardings, donate_argnums=0)(
        trainable
    )
    return state, frozen, START


def _to_device(batch: HostBatch, where: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
    make = jax.make_array_from_process_local_data
    return {k: make(where, np.asarray(v)) for k, v in batch.items()}


class _Reporter:
    """Reads the metrics of a step only after the next one is under way."""

    def __init__(self, log: MetricLog | None, progress: Progress | None, sources: Sequence[str]):
        self._log, self._progress, self._sources = log, progress, sources
        self._pending: tuple[int, Any, float, int] | None = None
        self._last: dict[str, float] = {}
        self._clock = time.monotonic()

    def dispatched(self, step: int, metrics: Any, waited: float, bad: int) -> None:
        """`bad`: samples this process could not read, since it started."""
        self.flush()
        self._pending = (step, metrics, waited, bad)

    def finish(self) -> dict[str, float]:
        self.flush()
        if self._log is not None:
            self._log.close()
        return self._last

    def flush(self) -> None:
        if self._pending is None:
            return
        step, metrics, waited, bad = self._pending
        values = {k: v.tolist() for k, v in jax.device_get(metrics).items()}
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        row = {"step": step} | self._named(values)
        row |= {"step_seconds": seconds, "data_wait_seconds": waited}
        row["tokens_per_second"] = values["tokens"] / seconds
        row["bad_samples"] = bad
        if self._log is not None:
            self._log.write(row)
        self._last, self._pending = row, None
        if self._progress is not None:
            text = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
            self._progress.update(step, text)

    def _named(self, values: dict[str, Any]) -> dict[str, float]:
        """Per-source vectors "source/WHAT" as "source/NAME/WHAT"; of sources in this batch."""
        row = {k: v for k, v in values.items() if not k.startswith("source/")}
        for number, name in enumerate(self._sources):
            if values["source/samples"][number]:
                for key in values.keys() - row.keys():
                    row[key.replace("source/", f"source/{name}/")] = values[key][number]
        return row
