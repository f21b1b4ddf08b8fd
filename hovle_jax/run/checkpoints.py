"""The checkpoints of a run while it runs: saved behind the steps, found again, kept or deleted.

Orbax writes STEP.orbax-checkpoint-tmp and renames it to STEP when all hosts have written. Before
that, digests.json is added: each host reads back what it wrote, the first host the rest. So STEP is
whole or not there, and what happens to it later is noticed.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from hovle_jax.checkpoint import (
    add_rewind,
    cursor_after,
    finished_steps,
    read_meta,
    read_rewinds,
    storage_of,
)
from hovle_jax.config import RunConfig
from hovle_jax.data.pipeline import Cursor
from hovle_jax.errors import UserError, one_line
from hovle_jax.run import digests
from hovle_jax.run.hosts import DataBarrier
from hovle_jax.run.metrics import read_metrics
from hovle_jax.train_step import TrainState

_FAILED = "saving step"  # how the reason of a failed save begins
_UNFINISHED = re.compile(r"\.orbax-checkpoint-tmp[^/]*")
_DELETED = ".deleted"
_TIMEOUT = 1200  # seconds for all hosts to have written
DAMAGED = "damaged"  # where damaged checkpoints are put aside


def kept(
    steps: list[int],
    keep: int,
    keep_every: int,
    keep_best: int = 0,
    losses: Mapping[int, float] | None = None,
) -> dict[int, str]:
    """{step: why it is kept} of those of `steps` that the policy keeps; `losses`: held-out ones."""
    known = {step: loss for step, loss in (losses or {}).items() if step in steps}
    best = sorted(known, key=lambda step: (known[step], -step))[:keep_best]
    reasons = {step: f"best {keep_best} ({known[step]:.4f})" for step in best}
    reasons |= {
        step: f"every {keep_every}" for step in steps if keep_every and not step % keep_every
    }
    return reasons | {step: f"last {keep}" for step in sorted(steps)[-max(keep, 1) :]}


def held_out_losses(workdir: str | Path) -> dict[int, float]:
    """{step: loss} of a run's evaluations; without those that are not finite."""
    rows = read_metrics(Path(workdir) / "eval.jsonl")
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    return {step: loss for step, loss in losses.items() if math.isfinite(loss)}


def delete(root: epath.Path, step: int) -> None:
    """Renamed first: a deletion that is interrupted leaves nothing that looks like a checkpoint."""
    doomed = root / f"{step}{_DELETED}"
    (root / str(step)).rename(doomed)
    doomed.rmtree()


class Checkpoints:
    """The checkpoints of one run, for all its hosts: asynchronous, atomic, verified."""

    def __init__(self, workdir: str | Path, config: RunConfig, barrier: DataBarrier):
        """Finds the newest checkpoint that is whole, and names and puts aside newer ones.

        Raises:
          UserError: none is whole, or hosts see different directories.
        """
        self._storage = storage_of(workdir, config)
        self._root = self._storage / "checkpoints"
        self._policy = config.keep, config.keep_every, config.keep_best
        self._workdir = workdir
        self._barrier = barrier
        self._leads = jax.process_index() == 0
        self._handler = _Handler(barrier)
        self._checkpointer = ocp.AsyncCheckpointer(
            self._handler,
            async_options=ocp.options.AsyncOptions(
                timeout_secs=_TIMEOUT, barrier_sync_fn=self._handler.meet
            ),
        )
        with barrier.together():
            if self._leads:
                self._root.mkdir(parents=True, exist_ok=True)
                self._clean()
        self._latest = self._newest()
        self._begun = self._latest or 0  # the newest step that is saved or being saved
        self._failure = ""

    def latest(self) -> int | None:
        """The step a run goes on from."""
        return self._latest

    def save(self, state: TrainState, cursor: Cursor) -> None:
        """Saves after the step that `cursor` follows, while the next ones run.

        Raises:
          UserError: the save before failed, or this one cannot begin.
        """
        self._finish()
        step = int(state.step)
        self._begun = self._handler.step = step
        meta = {"cursor": cursor, "skipped": int(state.skipped)}
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave(state.opt_state),
            "meta": ocp.args.JsonSave(meta),
        }
        try:
            self._checkpointer.save(
                self._root / str(step), args=ocp.args.Composite(**items), force=True
            )
        except Exception as error:  # orbax raises nothing narrower
            raise UserError(self._failed(error)) from error

    def failure(self) -> str:
        """Why the save under way has failed, '' if it has not; waits for nothing."""
        try:
            self._checkpointer.check_for_errors()
        except Exception as error:
            self._failure = self._failed(error)
        return self._failure

    def stop(self, state: TrainState, cursor: Cursor, reason: str) -> str:
        """Leaves nothing unsaved before a run ends early for `reason`; says what is saved."""
        if reason.startswith(_FAILED):
            raise UserError(reason)
        step = int(state.step)
        if step > self._begun:
            self.save(state, cursor)
        self.close()
        return f"step {step} is saved in {self._root}" if step else "no step was done yet"

    def restore(self, step: int, shapes: TrainState) -> tuple[TrainState, Cursor]:
        """`shapes`: ShapeDtypeStructs with the shardings to restore onto, whatever was saved."""
        where = self._root / str(step)
        if self._leads:
            print(f"going on from step {step} ({where})", file=sys.stderr, flush=True)
        items = {
            "params": ocp.args.StandardRestore(shapes.params),
            "optimizer": ocp.args.StandardRestore(shapes.opt_state),
        }
        try:
            restored = self._checkpointer.restore(where, args=ocp.args.Composite(**items))
        except Exception as error:
            raise UserError(f"{where}: cannot be restored ({one_line(error)[:300]})") from error
        meta = read_meta(where)

        def counter(value: int, like: Any) -> jax.Array:
            return jax.device_put(np.int32(value), like.sharding)

        state = TrainState(
            counter(step, shapes.step),
            counter(meta["skipped"], shapes.skipped),
            restored["params"],
            restored["optimizer"],
        )
        return state, cursor_after(where)

    def rewind(
        self, step: int, reason: str, cursor: Cursor, shapes: TrainState, most: int
    ) -> TrainState | None:
        """Back to the newest checkpoint because of what is wrong with `step`; the data goes on from
        `cursor`, also when the run is started again. None: there is no checkpoint, or the run has
        gone back `most` times."""
        self._finish()
        if not self._begun or len(read_rewinds(self._storage)) >= most:
            return None
        self._barrier.gather("")  # all have counted
        where = self._root / str(self._begun)
        with self._barrier.together():
            if self._leads:
                row = {"step": step, "reason": reason, "to": self._begun, "cursor": cursor}
                row["instead_of"] = read_meta(where)["cursor"]
                add_rewind(self._storage, row)
        return self.restore(self._begun, shapes)[0]

    def close(self) -> None:
        """Waits for the last save and raises its error, if it had one."""
        self._finish()
        self._checkpointer.close()

    def _finish(self) -> None:
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:
            self._failure = self._failed(error)
        if self._failure:
            raise UserError(self._failure)
        if self._leads:
            steps = finished_steps(self._root)
            for step in (
                set(steps) - kept(steps, *self._policy, held_out_losses(self._workdir)).keys()
            ):
                delete(self._root, step)

    def _failed(self, error: Exception) -> str:
        return f"{_FAILED} {self._begun} in {self._root} failed: {one_line(error)[:300]}"

    def _clean(self) -> None:
        for path in self._root.iterdir():
            if _UNFINISHED.search(path.name):
                _say(f"{path}: was not written to its end; deleted")
                path.rmtree()
            elif path.name.endswith(_DELETED):
                path.rmtree()

    def _newest(self) -> int | None:
        steps = finished_steps(self._root)
        self._barrier.agree({f"the list of checkpoints in {self._root}": steps})
        share = (jax.process_index(), jax.process_count())
        bad: dict[int, str] = {}
        for step in reversed(steps):
            here = self._root / str(step)
            if not (lines := self._everywhere(digests.damage(here, share=share))):
                break
            bad[step] = lines[0]
        else:
            if bad:
                raise UserError(
                    f"no checkpoint in {self._root} is whole ({'; '.join(bad.values())}); bring "
                    "one back from a copy, or start anew in another --workdir"
                )
            return None
        frozen = self._storage / "frozen"
        if frozen.is_dir() and (lines := self._everywhere(digests.damage(frozen, share=share))):
            raise UserError(f"{lines[0]}; bring {frozen} back from a copy, it is written only once")
        with self._barrier.together():
            for number, line in bad.items() if self._leads else ():
                aside = self._aside(number)
                _say(f"{line}; checkpoint {number} is now {aside}, going on from {step}")
        return step

    def _aside(self, step: int) -> epath.Path:
        (self._root / DAMAGED).mkdir(exist_ok=True)
        names = itertools.chain([f"{step}"], (f"{step}-{i}" for i in itertools.count(2)))
        aside = next(p for n in names if not (p := self._root / DAMAGED / n).exists())
        return (self._root / str(step)).rename(aside)

    def _everywhere(self, lines: list[str]) -> list[str]:
        said = self._barrier.gather(json.dumps(lines[:3]))
        return [line for lines in said for line in json.loads(lines)]


def _say(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


class _Handler(ocp.CompositeCheckpointHandler):
    """Adds digests.json to a checkpoint, and tells all hosts when one of them cannot write."""

    def __init__(self, barrier: DataBarrier):
        super().__init__()
        self.step = 0
        self._barrier = barrier
        self._several = jax.process_count() > 1
        self._meet: Any = ocp.multihost.get_barrier_sync_fn()

    async def async_save(self, directory: epath.Path, args: Any) -> Any:
        writes = await super().async_save(directory, args) or []
        return [_Written(writes, lambda: self._written(directory), self._tell)]

    def finalize(self, directory: epath.Path) -> None:
        """On the first host, when all have written; the directory is renamed afterwards."""
        super().finalize(directory)
        said = self._barrier.posted(f"digests/{self.step}")
        known = {k: v for table in said for k, v in json.loads(table).items()}
        digests.write(directory, known)

    def _written(self, directory: epath.Path) -> None:
        if not self._several:
            return  # `finalize` reads all
        here = f"ocdbt.process_{jax.process_index()}/"
        mine = [name for name in digests.files(directory) if here in name]
        found = digests.digest(directory, mine)  # in directories that are yet to be renamed
        table = {_UNFINISHED.sub("", name): v for name, v in found.items()}
        self._barrier.post(f"digests/{self.step}", json.dumps(table))

    def _tell(self, error: Exception) -> None:
        if not self._several:
            raise error
        self._barrier.post(f"failed/{self.step}", one_line(error)[:300])

    def meet(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier; a host that could not write is there, too, and all of them raise."""
        self._meet(key=key, timeout_ms=timeout_ms)
        if reason := next(iter(self._barrier.posted(f"failed/{self.step}")), ""):
            raise OSError(reason)


class _Written:
    """Orbax's future of all writes of this host, and of what follows on them."""

    def __init__(self, writes: list[Any], then: Any, failed: Any):
        self._writes, self._failed = ocp.future.ChainedFuture(writes, then), failed

    def result(self, timeout: float | None = None) -> None:
        try:
            self._writes.result(timeout)
        except Exception as error:
            self._failed(error)

    def cancel(self) -> None:
        self._writes.cancel()


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
class _Items(ocp.args.Composite):
    """Tells orbax that the handler is known; arguments are passed as `Composite`."""
