"""Parameters before the first step: from other runs, from imported models, or random.

    random (stage I's embedding module; anything with scratch) < init.llm < init.previous

Every parameter is read or made directly in its shards of the mesh.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hovle_jax import distill, heads, lora, model, sharding
from hovle_jax.checkpoint import Stored, open_stored
from hovle_jax.config import ModelConfig, RunConfig, TeacherConfig
from hovle_jax.errors import UserError
from hovle_jax.nn import teacher
from hovle_jax.stages import Stage, get_stage
from hovle_jax.train_step import param_shardings, trainable_regex
from hovle_jax.tree import flatten, unflatten

Params = dict[str, Any]


def placed(config: RunConfig, shapes: Params, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """{path: shape with its sharding} for any subtree of the model."""
    where = flatten(param_shardings(config, shapes, mesh))
    return {k: sharding.abstract(x, where[k]) for k, x in flatten(shapes).items()}


def check_order(config: RunConfig, stage: Stage) -> None:
    """Refuses to start a stage from anything but the result of the stage before it, or a model."""
    previous = config.init.previous
    if config.init.scratch or not stage.after:
        return
    if not previous:
        raise UserError(
            f"config.init.previous: stage {stage.name!r} starts from the work directory of stage "
            f"{stage.after!r}; set it, or set config.init.scratch=True to start without"
        )
    stored = open_stored(previous).config
    if isinstance(stored, ModelConfig):
        return  # whole: `initial_params` refuses one that lacks parameters or has other settings
    if not isinstance(stored, RunConfig) or (
        stored.stage != stage.after and stage.name not in get_stage(stored.stage).before
    ):
        found = f"stage {stored.stage!r}" if isinstance(stored, RunConfig) else "no model"
        raise UserError(
            f"config.init.previous: {previous} is {found}, but stage {stage.name!r} starts from "
            f"{stage.after!r} (config.init.scratch=True skips this check)"
        )


def initial_params(config: RunConfig, stage: Stage, mesh: jax.sharding.Mesh) -> Params:
    """Parameters the stage reads, from the sources of config.init, each in its own shards."""
    source = config.init
    shapes = model.abstract_params(config.model)
    shapes = {part: shapes[part] for part in stage.parts} | heads.shapes(config)
    wanted = placed(config, shapes, mesh)
    found: dict[str, Any] = {}
    if source.llm:
        llm = open_stored(source.llm)
        found |= _language_model(llm, config, wanted)
    if source.previous:
        stored = open_stored(source.previous)
        if not source.scratch:
            check_model(stored, config, wanted)
        _say_which(stored)
        before = stored.read(wanted)
        if source.llm and not source.scratch:
            check_same_table(llm, stored, found, before)
        found |= before
    missing = {k: v for k, v in wanted.items() if k not in found}
    # The embedding module is what HoVLE adds: a stage without a predecessor makes it up.
    fresh = {k for k in missing if not stage.after and not k.startswith("embedding/text/")}
    fresh |= {k for k in missing if k.startswith(heads.PREFIX)}
    lost = sorted(set(missing) - fresh)
    if lost and not source.scratch:
        raise UserError(
            f"config.init: no source has {lost[0]} ({len(lost)} parameters are missing); set "
            "config.init.llm or config.init.scratch=True"
        )
    if missing:
        found |= _random(config, missing)
    return unflatten(found | _adapters(config, mesh))


def _say_which(stored: Stored) -> None:
    """The checkpoint a stage starts from; that of a run which has not ended may be an accident."""
    if isinstance(stored.config, RunConfig) and jax.process_index() == 0:
        steps = stored.config.steps
        note = "warning: " if stored.step != steps else ""
        print(
            f"{note}starting from step {stored.step} of {steps} in {stored.directory}",
            file=sys.stderr,
        )


def _adapters(config: RunConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    where = {k: x.sharding for k, x in placed(config, lora.shapes(config), mesh).items()}
    make = jax.jit(lambda rng: lora.init(rng, config), out_shardings=where)
    return make(jax.random.key(config.seed)) if where else {}


# Growing axis of what has a row per token.
_VOCAB_AXES = {"embedding/text/table": 0, "decoder/head/kernel": 1}


def _language_model(stored: Stored, config: RunConfig, wanted: dict[str, Any]) -> dict[str, Any]:
    _check_agreement(stored, stored.model.decoder, config.model.decoder, "model.decoder", _STACK)
    shapes = flatten(model.abstract_params(stored.model))
    llm = {k: v for k, v in wanted.items() if k.startswith(("decoder/", "embedding/text/"))}
    short = {
        k: axis
        for k, axis in _VOCAB_AXES.items()
        if k in llm and k in stored.paths and shapes[k].shape[axis] < llm[k].shape[axis]
    }
    for name, axis in short.items():
        old, new = shapes[name].shape[axis], llm[name].shape[axis]
        if not config.init.grow_vocab:
            raise UserError(
                f"config.init.llm: {config.init.llm} has {old} tokens, config.model {new}; set "
                f"config.init.grow_vocab=True to add {new - old}"
            )
    at_stored_shape = {
        k: jax.ShapeDtypeStruct(
            shapes[k].shape, v.dtype, sharding=sharding.replicated(v.sharding.mesh)
        )
        if k in short
        else v
        for k, v in llm.items()
    }
    found = stored.read(at_stored_shape)
    for seed, (name, axis) in enumerate(short.items()):
        rng = jax.random.fold_in(jax.random.key(config.seed), seed)
        found[name] = _grow(found[name], llm[name], axis, rng)
    return found


def _grow(x: jax.Array, want: Any, axis: int, rng: jax.Array) -> jax.Array:
    """Appends rows: the mean of the old ones with a tenth of their spread as noise.

    Rows far from all others would win or lose every softmax before they have learned anything.
    """

    def grow(x: jax.Array) -> jax.Array:
        mean, std = x.mean(axis, keepdims=True), x.std(axis, keepdims=True)
        shape = list(x.shape)
        shape[axis] = want.shape[axis] - x.shape[axis]
        return jnp.concatenate([x, mean + 0.1 * std * jax.random.normal(rng, shape)], axis)

    return jax.jit(grow, out_shardings=want.sharding)(x)


# What is learned with one is wrong with another, and no parameter tells: of a stack, ...
_STACK = ("mlp", "rope_theta", "rms_norm_eps", "qkv_bias", "out_bias", "qk_norm")
_EMBEDDING = ("shuffle_loc", "shuffle", "compressor", "projector", "normalize_embeddings")
_TEACHER = (
    *("kind", "rope_theta", "norm", "norm_eps", "qkv_bias", "key_bias", "qk_norm", "activation"),
    *("gated", "shuffle_version", "mean", "std"),
)


def _check_agreement(
    stored: Stored, theirs: Any, ours: Any, where: str, names: Sequence[str], hint: str = ""
) -> None:
    """Shapes show most differences between configs; these would only show as bad results."""
    if "linear" in (getattr(ours, "rope_scaling", ""), getattr(theirs, "rope_scaling", "")):
        names = (*names, "rope_scaling", "rope_factor")  # dynamic: only past the trained length
    for name in names:
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(
                f"config.{where}.{name} is {getattr(ours, name)!r}, but {stored.directory} has "
                f"{getattr(theirs, name)!r}{hint}"
            )


def check_model(stored: Stored, config: RunConfig, wanted: Mapping[str, Any]) -> None:
    """Refuses a stage that would go on with another model than the one before it trained.

    wanted: by path, the parameters that the stage reads. Only parts that `stored` has are compared.

    Raises:
      UserError: settings that have no parameters differ, or stored parameters would be left out.
    """
    hint, ours, theirs = " (config.init.scratch=True skips this check)", config.model, stored.model

    def is_taken(part: str) -> bool:
        of_both = (any(path.startswith(part) for path in paths) for paths in (stored.paths, wanted))
        return all(of_both)

    for stack in ("embedding", "decoder"):
        if is_taken(f"{stack}/layers/"):
            one, other = (
                dataclasses.replace(layers, layer_types=layers.period)
                for layers in (getattr(theirs, stack), getattr(ours, stack))
            )
            names = ("layer_types", "mask", "positions", *_STACK)
            _check_agreement(stored, one, other, f"model.{stack}", names, hint)
    if is_taken("embedding/layers/"):
        _check_agreement(stored, theirs, ours, "model", _EMBEDDING, hint)
    parts = {path.partition("/")[0] for path in wanted}
    lost = sorted(p for p in stored.paths - wanted.keys() if p.partition("/")[0] in parts)
    if lost:
        raise UserError(f"{stored.directory} has {lost[0]}, but config.model has no such{hint}")


_TABLE = "embedding/text/table"


def check_same_table(
    llm: Stored, stored: Stored, of_llm: Mapping[str, Any], of_stored: Mapping[str, Any]
) -> None:
    """A decoder above the text table of another LLM, of the same shapes, would read nonsense.

    Raises:
      UserError: the LLM is not the one that `stored`, whose table never trained, began with.
    """
    run = stored.config
    decoder = any(path.startswith("decoder/") for path in of_llm.keys() - of_stored.keys())
    if not decoder or not isinstance(run, RunConfig) or _TABLE not in of_stored:
        return
    if _TABLE not in of_llm or re.fullmatch(trainable_regex(run), _TABLE):
        return
    tables = of_llm[_TABLE], of_stored[_TABLE]
    rows = llm.model.text_rows  # grow_vocab made the rest
    where = sharding.replicated(tables[0].sharding.mesh)
    same = jax.jit(lambda a, b: jnp.all((a == b)[:rows]), out_shardings=where)
    if not bool(same(*tables)):
        raise UserError(
            f"config.init.llm: {llm.directory} has another text table than the LLM that "
            f"{stored.directory} began with; name that one (config.init.scratch=True skips this "
            "check)"
        )


def _random(config: RunConfig, missing: dict[str, Any]) -> dict[str, Any]:
    """Random values of the missing parameters only, made in their shards."""
    where = {k: v.sharding for k, v in missing.items()}

    def make(rng: jax.Array) -> dict[str, Any]:
        flat = flatten(model.init(rng, config.model)) | heads.init(rng, config)
        return {k: flat[k] for k in missing}

    return jax.jit(make, out_shardings=where)(jax.random.key(config.seed))


def teacher_params(config: RunConfig, mesh: jax.sharding.Mesh) -> Params:
    """All teachers of a run, each in its shards (`distill.teacher_tree`)."""
    teachers = distill.run_teachers(config)
    names = [("init.teacher", "teacher")]
    names += [
        (f"teachers[{i}].path", f"teachers[{i}].teacher") for i in range(len(config.teachers))
    ]
    trees = [
        _teacher(target, f"config.{key}", where, config.stage, mesh)
        for target, (key, where) in zip(teachers, names, strict=True)
    ]
    return distill.teacher_tree(trees)


def _teacher(
    target: distill.Target, key: str, where: str, stage: str, mesh: jax.sharding.Mesh
) -> Params:
    """key: of its directory, where: of its settings in the config."""
    shapes = flatten(teacher.abstract_params(target.config))
    if not shapes:
        return {}
    if not target.path:
        raise UserError(f"{key}: stage {stage!r} needs a teacher directory")
    stored = open_stored(target.path, "teacher")
    if not isinstance(stored.config, TeacherConfig):
        raise UserError(f"{key}: {target.path} holds no vision teacher")
    _check_agreement(stored, stored.config, target.config, where, _TEACHER)
    axes = teacher.param_axes(target.config)
    shardings = flatten(sharding.tree_shardings(axes, unflatten(shapes), mesh))
    found = stored.read({k: sharding.abstract(x, shardings[k]) for k, x in shapes.items()})
    missing = sorted(set(shapes) - set(found))
    if missing:
        raise UserError(f"{key}: {target.path} has no {missing[0]}")
    return unflatten(found)
