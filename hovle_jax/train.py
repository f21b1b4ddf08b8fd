"""The main loop: one stage, from its sources or its last checkpoint to its last step.

run.open_run: mesh, data, teacher -> program, state -> (batch -> step -> metrics -> save)*
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from hovle_jax import sharding
from hovle_jax.checkpoint import write_config
from hovle_jax.config import RunConfig
from hovle_jax.data.pipeline import Cursor, HostBatch
from hovle_jax.errors import UserError
from hovle_jax.run import preemption
from hovle_jax.run.goodput import Clock
from hovle_jax.run.heldout import HeldOut
from hovle_jax.run.hosts import PREEMPTIONS, SIGTERM
from hovle_jax.run.prepare import Run, open_run
from hovle_jax.run.profiler import Profile
from hovle_jax.run.reporter import Reporter
from hovle_jax.run.tasks import Tasks
from hovle_jax.run.watchdog import Watchdog
from hovle_jax.train_step import TrainState


class Preempted(Exception):
    """SIGTERM or a maintenance notice; nothing is lost, and the same command goes on."""


def train(
    config: RunConfig,
    workdir: str | Path,
    *,
    devices: Sequence[Any] | None = None,
    quiet: bool = False,
    profile: tuple[int, int] = (0, 0),
    after_step: Callable[[int, TrainState], None] | None = None,
) -> dict[str, Any]:
    """Runs the stage of `config` in `workdir`, resuming what is there; returns the last metrics.

    devices: default all of them; config.mesh must cover them exactly. profile: first step and
    number of steps that are traced. after_step: called with each step and its state, which the
    devices may not have finished and which the next step takes away.

    Raises:
      UserError: anything the caller can mend, before the first step wherever possible.
      Preempted: SIGTERM or a maintenance notice; every step that was done is saved.
    """
    clock, began = Clock(), time.time()
    run = open_run(config, workdir, devices, quiet=quiet)
    checkpoints, watched = run.checkpoints, config.guards
    with jax.set_mesh(run.mesh), preemption.listening() as terminated:
        state, frozen, cursor = run.start()
        done = int(state.step)
        if done >= config.steps:  # nothing to do, so nothing to compile
            checkpoints.close()
            return {}
        parameters = run.parameter_guard(frozen, resumed=done > 0)
        parameters.check(done, state.params)
        held_out, tasks = HeldOut(run, frozen), Tasks(run, frozen)
        reporter = Reporter(run, done, clock, began, quiet=quiet)
        if reporter.leads:
            _write_down(run, cursor, quiet)
        batches = run.pipeline.batches(cursor, **run.share)
        with clock.phase("compile"):
            step_fn = run.program()
        place = sharding.batch_sharding(run.mesh)
        reporter.ready()

        def save() -> None:
            with clock.phase("checkpoint"):
                parameters.check(int(state.step), state.params)  # nor are broken weights saved
                checkpoints.save(state, cursor)
            reporter.saved()

        with (
            Profile(profile, run.workdir) as profiler,
            Watchdog(watched.step_timeout, run.workdir, reporter.doing) as watchdog,
        ):
            step = done
            while step < config.steps:
                step += 1
                watchdog.beat()
                with clock.phase("data"):
                    begin = time.monotonic()
                    stop = checkpoints.failure() or (SIGTERM if terminated else "")
                    batch, following, stop = _next(batches, stop)
                    stop = run.barrier.wait(step, stop)
                    waited = begin, time.monotonic()
                if stop:  # no step that is done is lost
                    reporter.flush()
                    with clock.phase("checkpoint"):
                        parameters.check(step - 1, state.params)
                        where = checkpoints.stop(state, cursor, stop)
                    reporter.close()
                    if stop in PREEMPTIONS:
                        raise Preempted(f"{stop}, {where}")
                    raise UserError(stop)
                profiler.before(step, state)
                arrays = sharding.to_device(batch, place)
                state, metrics = step_fn(state, frozen, run.teacher, arrays)
                reporter.dispatched(step, metrics, cursor, waited)
                cursor = following
                evaluate = _due(step, config.eval_every)
                keep = _due(step, config.save_every) or step == config.steps
                if evaluate or keep:  # a saved step is never missing from the metrics
                    reporter.flush()
                if reporter.spike and watched.rewind:
                    with clock.phase("checkpoint"):
                        back = run.rewind(*reporter.spike, cursor)
                    reporter.spike = None if back is None else reporter.spike
                    if back is not None:
                        state, step = back, int(back.step)
                        parameters.check(step, state.params)
                        reporter.rewound(step)
                        continue
                if evaluate:
                    with clock.phase("evaluation"):
                        row = held_out.losses(step, state.params, watchdog.beat)
                        row |= tasks.scores(state.params, watchdog.beat)
                        reporter.evaluated({"step": step} | row)
                if keep:
                    save()
                elif _due(step, watched.every):
                    parameters.check(step, state.params)
                if after_step is not None:
                    after_step(step, state)
        with clock.phase("checkpoint"):
            checkpoints.close()
        reporter.close()
        return reporter.last


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _next(batches: Iterator[tuple[HostBatch, Cursor]], stop: str) -> tuple[HostBatch, Cursor, str]:
    """(batch, cursor after it, ''), or ({}, {}, why this host cannot go on)."""
    if stop:
        return {}, {}, stop
    try:
        return *next(batches), ""
    except UserError as error:
        return {}, {}, str(error)


def _write_down(run: Run, cursor: Cursor, quiet: bool) -> None:
    """One host writes what all share."""
    write_config(run.workdir, run.config)
    run.tokenizer.save(run.workdir / "tokenizer")
    if not quiet:
        print(*run.pipeline.summary(cursor), sep="\n", file=sys.stderr)
