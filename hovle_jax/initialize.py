"""Parameters before the first step: from other runs, from imported models, or random.

    random (stage I's embedding module; anything with scratch) < init.llm < init.previous

Every parameter is read or made directly in its shards of the mesh.
"""

from __future__ import annotations

from typing import Any

import jax

from hovle_jax import model, teacher
from hovle_jax.checkpoint import open_stored, read_config, read_params
from hovle_jax.config import ModelConfig, RunConfig, TeacherConfig
from hovle_jax.errors import UserError
from hovle_jax.stages import Stage
from hovle_jax.train_step import param_shardings, teacher_shardings
from hovle_jax.tree import flatten, unflatten

Params = dict[str, Any]


def with_sharding(x: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def placed(config: RunConfig, shapes: Params, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """{path: shape with its sharding} for any subtree of the model."""
    where = flatten(param_shardings(config, shapes, mesh))
    return {k: with_sharding(x, where[k]) for k, x in flatten(shapes).items()}


def check_order(config: RunConfig, stage: Stage) -> None:
    """Refuses to start a stage from anything but the result of the stage before it."""
    previous = config.init.previous
    if config.init.scratch or not stage.after:
        return
    if not previous:
        raise UserError(
            f"config.init.previous: stage {stage.name!r} starts from the work directory of stage "
            f"{stage.after!r}; set it, or set config.init.scratch=True to start without"
        )
    stored = read_config(previous)
    if not isinstance(stored, RunConfig) or stored.stage != stage.after:
        found = f"stage {stored.stage!r}" if isinstance(stored, RunConfig) else "no work directory"
        raise UserError(
            f"config.init.previous: {previous} is {found}, but stage {stage.name!r} starts from "
            f"{stage.after!r} (config.init.scratch=True skips this check)"
        )


def initial_params(config: RunConfig, stage: Stage, mesh: jax.sharding.Mesh) -> Params:
    """Parameters the stage reads, from the sources of config.init, each in its own shards."""
    source = config.init
    shapes = model.abstract_params(config.model)
    wanted = placed(config, {part: shapes[part] for part in stage.parts}, mesh)
    found: dict[str, Any] = {}
    if source.llm:
        stored = open_stored(source.llm)
        if not isinstance(stored.config, ModelConfig):
            raise UserError(f"config.init.llm: {source.llm} is not a model directory")
        llm = {k: v for k, v in wanted.items() if k.startswith(("decoder/", "embedding/text/"))}
        found |= read_params(stored, llm)
    if source.previous:
        found |= read_params(open_stored(source.previous), wanted)
    missing = {k: v for k, v in wanted.items() if k not in found}
    # The embedding module is what HoVLE adds: a stage without a predecessor makes it up.
    fresh = {k for k in missing if not stage.after and not k.startswith("embedding/text/")}
    lost = sorted(set(missing) - fresh)
    if lost and not source.scratch:
        raise UserError(
            f"config.init: no source has {lost[0]} ({len(lost)} parameters are missing); set "
            "config.init.llm or config.init.scratch=True"
        )
    if missing:
        found |= _random(config, missing)
    return unflatten(found)


def _random(config: RunConfig, missing: dict[str, Any]) -> dict[str, Any]:
    """Random values of the missing parameters only, made in their shards."""
    where = {k: v.sharding for k, v in missing.items()}

    def make(rng: jax.Array) -> dict[str, Any]:
        flat = flatten(model.init(rng, config.model))
        return {k: flat[k] for k in missing}

    return jax.jit(make, out_shardings=where)(jax.random.key(config.seed))


def teacher_params(config: RunConfig, mesh: jax.sharding.Mesh) -> Params:
    if not config.init.teacher:
        raise UserError("config.init.teacher: stage 'distill' needs a teacher directory")
    stored = open_stored(config.init.teacher)
    if not isinstance(stored.config, TeacherConfig):
        raise UserError(f"config.init.teacher: {config.init.teacher} holds no vision teacher")
    where = flatten(teacher_shardings(config, mesh))
    shapes = flatten(teacher.abstract_params(config.teacher))
    found = read_params(stored, {k: with_sharding(x, where[k]) for k, x in shapes.items()})
    missing = sorted(set(shapes) - set(found))
    if missing:
        raise UserError(f"config.init.teacher: {config.init.teacher} has no {missing[0]}")
    return unflatten(found)
