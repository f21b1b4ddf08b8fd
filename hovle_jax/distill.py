"""Stage I's loss: the embedding module's output against vision teachers and the text table.

    term          places   prediction                              target
    text          text     output                                  the LLM's text table
    image         image    output, through the adaptor if any      features of config.teacher
    image_NAME    image    output, through its adaptor             features of a further teacher
    layers        image    hidden states, through linear maps      hidden states of config.teacher

Adaptors lead from the student to the teacher, so that targets stay where they are: a trained map of
the teacher's features could make them all alike. They are `heads`: they train with the run, lie in
its checkpoints, and belong to no model.

B rows   S tokens   Z places of the holistic layers (S for 'pre')   E width
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from hovle_jax import losses, model
from hovle_jax.config import ModelConfig, RunConfig, TeacherConfig
from hovle_jax.errors import UserError
from hovle_jax.nn import teacher
from hovle_jax.nn.embedding import image_order, take

Params = dict[str, Any]
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Target:
    """A teacher of the run and how the student is held against it."""

    term: str
    config: TeacherConfig
    path: str  # its directory
    adaptor: str
    weight: float


def run_teachers(config: RunConfig) -> tuple[Target, ...]:
    """All of them, config.teacher first.

    Raises:
      UserError: two of one name, or features of another width than the student's and no adaptor.
    """
    d = config.distill
    found = [Target("image", config.teacher, config.init.teacher, d.adaptor, d.image)]
    found += [
        Target(f"image_{t.name}", t.teacher, t.path, t.adaptor, d.image * t.weight)
        for t in config.teachers
    ]
    if len({t.term for t in found}) < len(found):
        raise UserError("config.teachers: two of them are named alike")
    width = config.model.hidden_size
    for t in found:
        if t.adaptor == "none" and t.config.out_size != width:
            key = "distill" if t.term == "image" else "teachers"
            raise UserError(
                f"config.{key}.adaptor: the teacher's features have {t.config.out_size} numbers "
                f"(out_size), the student's {width}; set it to 'linear'"
            )
    return tuple(found)


def teacher_tree(trees: list[Any]) -> Any:
    """Trees of all teachers as one; that of a single teacher is its own."""
    first, *others = trees
    return {**first, "more": {str(i): tree for i, tree in enumerate(others)}} if others else first


def _of_teacher(params: Params, number: int) -> Params:
    if number:
        return params["more"][str(number - 1)]  # type: ignore[no-any-return]
    return {k: v for k, v in params.items() if k != "more"}


def layer_pairs(config: RunConfig) -> tuple[tuple[int, int], ...]:
    """(student's layers, teacher's layers) that have run where hidden states are compared."""
    spec, t = config.distill.layers, config.teacher
    students = config.model.embedding.num_layers
    if spec == "last":
        return ()
    if spec == "all":  # but the last, whose output has the features for a target
        pairs = [(n, max(1, round(n * t.used_layers / students))) for n in range(1, students)]
    else:
        found = [re.fullmatch(r"(\d+):(\d+)", part.strip()) for part in spec.split(",")]
        pairs = [(int(m[1]), int(m[2])) for m in found if m]
        if len(pairs) < len(found):
            raise UserError(f"config.distill.layers: {spec!r} is not last, all or '2:6,4:12'")
    for student, of_teacher in pairs:
        if not (1 <= student <= students and 1 <= of_teacher <= t.used_layers):
            raise UserError(
                f"config.distill.layers: {student}:{of_teacher} is not within the {students} "
                f"layers of model.embedding and the {t.used_layers} of the teacher"
            )
    if len({student for student, _ in pairs}) < len(pairs):
        raise UserError(f"config.distill.layers: {spec!r} names a layer of the student twice")
    return tuple(pairs)


def heads(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """{path below heads/: shape} of the linear maps that the settings ask for."""
    losses.DISTANCES.find(config.distill.loss)
    width = config.model.hidden_size
    sizes = {t.term: t.config.out_size for t in run_teachers(config) if t.adaptor == "linear"}
    sizes |= {f"layer_{n}": config.teacher.hidden_size for n, _ in layer_pairs(config)}
    shapes = {f"{name}/kernel": (width, size) for name, size in sizes.items()}
    return shapes | {f"{name}/bias": (size,) for name, size in sizes.items()}


def _head(params: Params, name: str, x: jax.Array) -> jax.Array:
    head = params["heads"][name]
    return x @ head["kernel"].astype(x.dtype) + head["bias"].astype(x.dtype)


def masks(batch: Batch, config: ModelConfig) -> dict[str, jax.Array]:
    """bool [B, S]: image and text places; no brackets, no padding."""
    c, ids = config, batch["input_ids"]
    valid = batch["segment_ids"] > 0
    image = valid & (ids == c.img_context_id)
    brackets = (ids == c.img_start_id) | (ids == c.img_end_id)
    return {"image": image, "text": valid & ~image & ~brackets}


def weights(batch: Batch, config: RunConfig) -> dict[str, jax.Array]:
    """{term: float32 [B, S]}."""
    found = {k: mask.astype(jnp.float32) for k, mask in masks(batch, config.model).items()}
    more = [t.term for t in run_teachers(config)[1:]] + ["layers"] * bool(layer_pairs(config))
    return found | {term: found["image"] for term in more}


def terms(
    params: Params, teacher_params: Params, batch: Batch, config: RunConfig
) -> dict[str, jax.Array]:
    """{term: float32 [B, S]}: the weighted distance of every place from its target."""
    c, d, ids = config.model, config.distill, batch["input_ids"]
    distance, pairs = losses.DISTANCES.find(d.loss), layer_pairs(config)
    if pairs:
        output, hidden, long_ids = model.embed_layers(params, batch, c)
    else:
        output = model.embed(params, batch, c)
    table = jax.lax.stop_gradient(model.text_vectors(params, ids, c))
    places = c.grid**2 if c.shuffle_loc == "post" else c.tokens_per_tile
    out: dict[str, jax.Array] = {}
    for number, t in enumerate(run_teachers(config)):
        layer_places = places if pairs and not number else 0
        found = teacher.targets(
            _of_teacher(teacher_params, number),
            batch["pixels"],
            t.config,
            c.tokens_per_tile,
            layer_places=layer_places,
        )
        if not number:
            is_image, rank = image_order(ids, c)
        features = _in_rows(found["features"])
        if t.adaptor == "linear":
            out[t.term] = _weighted(
                distance(_head(params, t.term, output), take(features, rank)), t.weight
            )
        elif number:
            out[t.term] = _weighted(distance(output, take(features, rank)), t.weight)
        else:  # one distance for both modalities
            target = jnp.where(is_image[..., None], take(features, rank), table)
            both = distance(output, target)
            out |= {"image": _weighted(both, t.weight), "text": _weighted(both, d.text)}
        if layer_places:
            _, long_rank = image_order(long_ids, c)
            of_layers = [
                distance(
                    _head(params, f"layer_{n}", hidden[n - 1]),
                    take(_in_rows(found["layers"][m - 1]), long_rank),
                )
                for n, m in pairs
            ]
            mean = jnp.mean(jnp.stack(of_layers), axis=0)
            out["layers"] = _weighted(_per_token(mean, ids, c), d.layer_weight)
    if "text" not in out:
        out["text"] = _weighted(distance(output, table), d.text)
    return out


def _weighted(x: jax.Array, weight: float) -> jax.Array:
    return x if weight == 1 else weight * x


def _in_rows(features: jax.Array) -> jax.Array:
    """[B, N, T, E] -> [B, N T, E]: by the rank of an image token in its row."""
    return features.reshape(features.shape[0], -1, features.shape[-1])


def _per_token(values: jax.Array, ids: jax.Array, config: ModelConfig) -> jax.Array:
    """[B, Z] -> [B, S]: an image token's mean over the places it takes in the layers' stream."""
    if config.shuffle_loc == "pre":
        return values
    places = config.patches_per_token
    width = jnp.where(ids == config.img_context_id, places, 1)
    starts = jnp.cumsum(width, axis=1) - width
    parts = [jnp.take_along_axis(values, starts + i, 1, mode="clip") for i in range(places)]
    return jnp.mean(jnp.stack(parts), axis=0)
