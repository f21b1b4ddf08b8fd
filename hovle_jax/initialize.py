"""Parameters before the first step: from other runs, from imported models, or random.

    random (only with config.init.scratch) < config.init.llm < config.init.previous

Every parameter is read or made directly in its shards of the mesh.
"""

from __future__ import annotations

from typing import Any

import jax

from hovle_jax import model, teacher
from hovle_jax.checkpoint import open_stored, read_params
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
        stored = open_stored(source.previous)
        if not isinstance(stored.config, RunConfig):
            raise UserError(f"config.init.previous: {source.previous} is not a work directory")
        if stored.config.stage != stage.after and not source.scratch:
            raise UserError(
                f"config.init.previous: {source.previous} is stage {stored.config.stage!r}, but "
                f"stage {stage.name!r} starts from {stage.after!r} (config.init.scratch=True skips "
                "this check)"
            )
        found |= read_params(stored, wanted)
    elif stage.after and not source.scratch:
        raise UserError(
            f"config.init.previous: stage {stage.name!r} starts from the work directory of stage "
            f"{stage.after!r}; set it, or set config.init.scratch=True to start without"
        )
    missing = {k: v for k, v in wanted.items() if k not in found}
    # The embedding module is what HoVLE adds: stage I always starts it from random values.
    fresh = {k for k in missing if stage.name == "distill" and not k.startswith("embedding/text/")}
    if set(missing) - fresh and not source.scratch:
        raise UserError(
            f"config.init: no source has {min(set(missing) - fresh)} ({len(set(missing) - fresh)} "
            "parameters are missing); set config.init.llm or config.init.scratch=True"
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
