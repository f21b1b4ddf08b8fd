"""Steps of a run done again, bit for bit: `hovle train --replay-step=K`.

The same program on the same data gives the same bits, so a step that does not was computed wrong:
then, or now, by a chip that must go. Run it again, on these hosts and on others, to know which.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from hovle_jax import sharding
from hovle_jax.checkpoint import cursor_before, finished_steps, storage_of
from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.run.array_digests import digests
from hovle_jax.run.metrics import read_metrics
from hovle_jax.run.prepare import open_run
from hovle_jax.run.reporter import by_name
from hovle_jax.train_step import TrainState


def replay(
    config: RunConfig, workdir: str | Path, step: int, *, devices: Sequence[Any] | None = None
) -> list[int]:
    """Does the steps from the last checkpoint before `step` to `step` again; writes nothing.

    Compares every metric that devices compute, and the state if `step` has a checkpoint. The mesh
    has to be the one the run had. Returns the steps that were done.

    Raises:
      UserError: the first thing that differs; or no record of that step.
    """
    rows = {r["step"]: r for r in read_metrics(Path(workdir) / "metrics.jsonl")}
    reads = jax.process_index() == 0  # others may not see the work directory
    if reads and step not in rows:
        raise UserError(f"--replay-step={step}: {workdir}/metrics.jsonl has no such step")
    run = open_run(config, workdir, devices, quiet=True)
    start, _ = cursor_before(workdir, step)
    with jax.set_mesh(run.mesh):
        state, frozen, cursor = run.restore(start) if start else run.fresh(write=False)
        step_fn, place = run.program(), sharding.batch_sharding(run.mesh)
        batches = run.pipeline.batches(cursor, **run.share)
        for now in range(start + 1, step + 1):
            arrays = sharding.to_device(next(batches)[0], place)
            state, metrics = step_fn(state, frozen, run.teacher, arrays)
            values = {k: v.tolist() for k, v in jax.device_get(metrics).items()}
            if reads:
                compare(now, rows[now], by_name(values, run.pipeline.names))
                print(f"step {now}: as recorded, loss {rows[now]['loss']!r}", file=sys.stderr)
        if step in finished_steps(storage_of(workdir, config) / "checkpoints"):
            find = digests(run.mesh)
            found, saved = find(_arrays(state)), find(_arrays(run.restore(step)[0]))
            if differ := [path for path in found if found[path] != saved[path]]:
                raise UserError(
                    f"step {step}: {differ[0]} is not that of the checkpoint, nor are "
                    f"{len(differ) - 1} others; {_ADVICE}"
                )
            if reads:
                print(f"state after step {step}: as in its checkpoint", file=sys.stderr)
    return list(range(start + 1, step + 1))


_ADVICE = "it was computed wrong then or now (or the mesh or versions are others): replay it again"


def compare(step: int, recorded: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """UserError names the first metric that has other bits than its record."""
    for name, value in values.items():
        then = recorded.get(name)
        both_nan = isinstance(then, float) and math.isnan(then) and math.isnan(value)
        if name in recorded and then != value and not both_nan:
            raise UserError(f"step {step}: {name} was {then!r}, now is {value!r}; {_ADVICE}")


def _arrays(state: TrainState) -> dict[str, jax.Array]:
    pairs = jax.tree_util.tree_flatten_with_path((state.params, state.opt_state))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in pairs}
