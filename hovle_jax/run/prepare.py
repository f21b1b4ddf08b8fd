"""What the steps of a run need, found and checked: what can be wrong first, what takes long last.

`train` repeats these steps to the end, `replay` does some of them again.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from hovle_jax import sharding
from hovle_jax.checkpoint import latest_step, open_stored, read_config, storage_of, write_tree
from hovle_jax.config import RunConfig, to_dict
from hovle_jax.data import files
from hovle_jax.data.pipeline import START, Cursor, Pipeline
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.initialize import check_order, initial_params, placed, teacher_params
from hovle_jax.optim import make_optimizer
from hovle_jax.run.checkpoints import Checkpoints
from hovle_jax.run.guards import ParameterGuard
from hovle_jax.run.hosts import PATIENCE, DataBarrier, make_mesh
from hovle_jax.stages import Stage, get_stage, open_pipeline
from hovle_jax.tpu import aot
from hovle_jax.train_step import (
    TrainState,
    check_batch,
    new_state,
    stage_shapes,
    state_shapes,
    state_shardings,
    trainable_regex,
)
from hovle_jax.tree import flatten, split, unflatten

Params = dict[str, Any]


@dataclasses.dataclass
class Run:
    """One stage on the devices that are here. Its methods are called under `jax.set_mesh(mesh)`."""

    config: RunConfig
    workdir: Path
    stage: Stage
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    barrier: DataBarrier
    checkpoints: Checkpoints
    pipeline: Pipeline
    teacher: Params

    def program(self) -> Callable[..., Any]:
        """The training step, compiled; UserError names hosts that would run another one."""
        lowered = aot.lower(self.config, self.mesh)
        compiled = lowered.compile()
        if jax.process_count() > 1:  # afterwards, so that nobody waits for a compiler at step 1
            self.barrier.agree({"the program of the training step": aot.fingerprint(lowered)})
        return compiled

    @property
    def share(self) -> dict[str, int]:
        """Which part of each batch this host reads, and of how many."""
        host, hosts = sharding.share_of_rows(self.mesh)
        return {"host": host, "hosts": hosts}

    def parameter_guard(self, frozen: Params, *, resumed: bool) -> ParameterGuard:
        timeout = max(self.config.data.timeout, PATIENCE)  # one may restore or save that long
        return ParameterGuard(
            self.mesh, frozen, self.teacher, self.workdir, timeout, resumed=resumed
        )

    def start(self) -> tuple[TrainState, Params, Cursor]:
        """(state, frozen parameters, data cursor) from the last checkpoint, or config.init."""
        step = self.checkpoints.latest()
        return self.fresh() if step is None else self.restore(step)

    def restore(self, step: int) -> tuple[TrainState, Params, Cursor]:
        _, frozen_shapes = stage_shapes(self.config)
        state, cursor = self.checkpoints.restore(step, self._placed_state())
        wanted = placed(self.config, frozen_shapes, self.mesh)
        stored = open_stored(self.workdir, verified=True, merged=False)  # by `Checkpoints`
        return state, unflatten(stored.read(wanted)), cursor

    def rewind(self, step: int, reason: str, cursor: Cursor) -> TrainState | None:
        """The state of the last checkpoint, because of what is wrong with `step`; `cursor`: where
        the data goes on. None: not again, or there is no checkpoint."""
        shapes, most = self._placed_state(), self.config.guards.rewind
        return self.checkpoints.rewind(step, reason, cursor, shapes, most)

    def _placed_state(self) -> TrainState:
        where = state_shardings(self.config, self.mesh)
        return jax.tree.map(sharding.abstract, state_shapes(self.config), where)

    def fresh(self, *, write: bool = True) -> tuple[TrainState, Params, Cursor]:
        """From config.init; `write`: keep the frozen parameters in the work directory."""
        config, where = self.config, state_shardings(self.config, self.mesh)
        params = initial_params(config, self.stage, self.mesh)
        trainable, frozen = split(params, trainable_regex(config))
        trainable_shapes, frozen_shapes = stage_shapes(config)
        if frozen and write:
            storage = storage_of(self.workdir, config)
            write_tree(storage / "frozen", frozen)  # as given; in memory as computed with
        frozen = jax.tree.map(lambda x, want: x.astype(want.dtype), frozen, frozen_shapes)
        tx = make_optimizer(config.optim, config.steps, trainable_shapes)
        make = jax.jit(lambda p: new_state(p, tx), out_shardings=where, donate_argnums=0)
        return make(trainable), frozen, START


def open_run(
    config: RunConfig,
    workdir: str | Path,
    devices: Sequence[Any] | None = None,
    *,
    quiet: bool = False,
) -> Run:
    """A run in its work directory, new or to be continued.

    Raises:
      UserError: anything the caller can mend.
    """
    stage = get_stage(config.stage)
    _check_local(config, workdir)
    workdir = Path(workdir)
    barrier = DataBarrier(config.data.timeout)
    with barrier.together():
        _check_same_run(config, workdir)
        if not config.data.tokenizer:
            raise UserError("config.data.tokenizer: needs a tokenizer directory")
        tokenizer = Tokenizer.load(config.data.tokenizer)
        _check_same_tokenizer(tokenizer, workdir)
        mesh = make_mesh(config.mesh, devices)
        check_batch(config, mesh)
        sharding.share_of_rows(mesh)
    barrier.agree(
        flatten({"config": to_dict(config)}, ".")
        | {"--workdir": str(workdir), "the tokenizer": tokenizer.fingerprint}
    )
    checkpoints = Checkpoints(workdir, config, barrier)
    with jax.set_mesh(mesh):
        with barrier.together():
            if checkpoints.latest() is None:
                check_order(config, stage)
            state_shapes(config)  # complains of config.optim.groups and config.trainable
            pipeline = open_pipeline(
                config,
                tokenizer,
                index=Path(config.data.index or workdir / "index"),
                rejects=workdir / "rejects.jsonl",
                quiet=quiet,
                workers=config.data.workers,
            )
        lengths = {
            f"measured lengths (config.data.index) of {name!r}": digest
            for name, digest in pipeline.digests.items()
        }
        barrier.agree({"the data": pipeline.summary()} | lengths)
        teacher = teacher_params(config, mesh) if stage.teacher else {}
    return Run(config, workdir, stage, tokenizer, mesh, barrier, checkpoints, pipeline, teacher)


def _check_local(config: RunConfig, workdir: str | Path) -> None:
    files.check_local(workdir, "--workdir")
    for name in ("data.tokenizer", "data.index", "init.llm", "init.teacher", "init.previous"):
        files.check_local(operator.attrgetter(name)(config), f"config.{name}")
    for i, more in enumerate(config.teachers):
        files.check_local(more.path, f"config.teachers[{i}].path")


def _check_same_tokenizer(tokenizer: Tokenizer, workdir: Path) -> None:
    """By its content: it may have moved."""
    saved = workdir / "tokenizer"
    if not saved.is_dir() or latest_step(workdir) is None:
        return
    if Tokenizer.load(saved).fingerprint != tokenizer.fingerprint:
        raise UserError(f"config.data.tokenizer: is not the one this run began with ({saved})")


def _check_same_run(config: RunConfig, workdir: Path) -> None:
    """A work directory belongs to one run: the same stage and model, and data its cursor fits."""
    if not (workdir / "config.json").is_file():
        return
    stored = read_config(workdir)
    if not isinstance(stored, RunConfig):
        raise UserError(f"{workdir}: is a model directory, not the work directory of a run")
    if latest_step(workdir) is None:
        return  # nothing to go on from: a start that failed is begun anew, whatever has changed
    if len(stored.optim.groups) != len(config.optim.groups):
        raise UserError(
            f"{workdir}: belongs to a run with {len(stored.optim.groups)} config.optim.groups, by "
            "which the optimizer's state is laid out; use as many, or a new --workdir"
        )
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
        "teacher.attention",
        "model.plugins",  # read_config says what has changed
    }
    for name in (
        "stage",
        "model",
        "trainable",
        "lora",
        "seed",
        "storage",
        "data",
        "optim.name",
        "optim.moments",
        "distill",
        "teacher",
        "teachers",
    ):
        look = operator.attrgetter(name)
        old, new = (flatten({name: to_dict(look(c))}, ".") for c in (stored, config))
        changed = sorted(k for k in new if old[k] != new[k] and k not in free)
        if changed:
            raise UserError(
                f"{workdir}: belongs to a run with config.{changed[0]}={old[changed[0]]!r}; use "
                "that, or a new --workdir"
            )
