"""The training stages. A stage is a row of STAGES, not a trainer.

    stage     data              loss                       trains                       starts from
    distill   unpaired images   cosine to the teacher's    embedding module without     LLM, teacher
              + random tokens   features / to the table    its text table
    align     image-text pairs  next token, LLM frozen     embedding module, table      distill
    instruct  conversations     next token                 everything                   align

(paper section 3.3, spec 4.1; what the paper leaves open is marked in docs/design.md)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from hovle_jax import losses, model
from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.nn import teacher
from hovle_jax.nn.embedding import image_order, take

Params = dict[str, Any]
Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class Stage:
    name: str
    data: str  # 'unpaired' or 'conversations' (data/pipeline.py)
    token_weights: str  # loss weight of an answer token: token | sample | square (data/pack.py)
    trainable: str  # regex over whole parameter paths
    parts: tuple[str, ...]  # top-level parameter subtrees the loss reads; no other is loaded
    teacher: bool
    after: str  # the stage whose result it starts from; '' = none
    # (params, teacher params, batch, config) -> {term: float32 [B, S], the loss of every place}
    terms: Callable[[Params, Params, Batch, RunConfig], dict[str, jax.Array]]
    # (batch, config) -> {term: float32 [B, S]}; the loss is the sum of the terms' weighted means
    weights: Callable[[Batch, RunConfig], dict[str, jax.Array]]


def distill_masks(batch: Batch, config: RunConfig) -> dict[str, jax.Array]:
    """bool [B, S]: the places each distillation term looks at; no brackets, no padding."""
    c, ids = config.model, batch["input_ids"]
    valid = batch["segment_ids"] > 0
    image = valid & (ids == c.img_context_id)
    brackets = (ids == c.img_start_id) | (ids == c.img_end_id)
    return {"image": image, "text": valid & ~image & ~brackets}


def distill_distances(
    params: Params, teacher_params: Params, batch: Batch, config: RunConfig
) -> jax.Array:
    """1 - cos between the embedding module's output and its target, float32 [B, S]."""
    c, ids = config.model, batch["input_ids"]
    output = model.embed(params, batch, c)
    target = jax.lax.stop_gradient(model.text_vectors(params, ids, c))
    features = teacher.apply(teacher_params, batch["pixels"], config.teacher)["features"]
    features = jax.lax.stop_gradient(features).astype(jnp.float32)
    is_image, rank = image_order(ids, c)
    features = features.reshape(features.shape[0], -1, features.shape[-1])
    target = jnp.where(is_image[..., None], take(features, rank), target)
    return losses.cosine_distance(output, target)


def _distill(
    params: Params, teacher_params: Params, batch: Batch, config: RunConfig
) -> dict[str, jax.Array]:
    distance = distill_distances(params, teacher_params, batch, config)
    return {"image": distance, "text": distance}


def _distill_weights(batch: Batch, config: RunConfig) -> dict[str, jax.Array]:
    masks = distill_masks(batch, config)
    return {name: mask.astype(jnp.float32) for name, mask in masks.items()}


def _shifted(batch: Batch) -> tuple[jax.Array, jax.Array]:
    names = ("labels", "loss_weight", "segment_ids")
    return losses.next_token_weights(*(batch[n] for n in names))


def _next_token(params: Params, _: Params, batch: Batch, config: RunConfig) -> dict[str, jax.Array]:
    c = config.model
    targets, weights = _shifted(batch)
    hidden, head = model.hidden(params, batch, c), model.head_kernel(params)
    return {"next_token": losses.token_nll(hidden, head, targets, weights, c.loss_chunk)}


def _next_token_weights(batch: Batch, _: RunConfig) -> dict[str, jax.Array]:
    return {"next_token": _shifted(batch)[1]}


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="distill",
            data="unpaired",
            token_weights="token",
            trainable=r"embedding/(vision|projector|layers)/.*",
            parts=("embedding",),
            teacher=True,
            after="",
            terms=_distill,
            weights=_distill_weights,
        ),
        Stage(
            name="align",
            data="conversations",
            token_weights="token",
            trainable=r"embedding/.*",
            parts=("embedding", "decoder"),
            teacher=False,
            after="distill",
            terms=_next_token,
            weights=_next_token_weights,
        ),
        Stage(
            name="instruct",
            data="conversations",
            token_weights="square",
            trainable=r".*",
            parts=("embedding", "decoder"),
            teacher=False,
            after="align",
            terms=_next_token,
            weights=_next_token_weights,
        ),
    )
}


def get_stage(name: str) -> Stage:
    if name not in STAGES:
        raise UserError(f"config.stage: {name!r} is not one of {', '.join(STAGES)}")
    return STAGES[name]
