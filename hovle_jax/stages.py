"""The training stages. A stage is an entry of STAGES, not a trainer.

    stage     data              loss                       trains                       starts from
    distill   unpaired images   cosine to the teacher's    embedding module without     LLM, teacher
              + random tokens   features / to the table    its text table
    align     image-text pairs  next token, LLM frozen     embedding module, table      distill
    instruct  conversations     next token                 everything                   align

(paper section 3.3; what the paper leaves open is marked in docs/design.md)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from hovle_jax import distill, losses, model
from hovle_jax.config import RunConfig
from hovle_jax.data.pack import TOKEN_WEIGHTS
from hovle_jax.data.pipeline import Pipeline
from hovle_jax.data.samples import KINDS
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.registry import Registry
from hovle_jax.typed import one_of

Params = dict[str, Any]
Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class Stage:
    name: str
    data: str  # data.samples.KINDS
    token_weights: str  # loss weight of an answer token: token | sample | square (data/pack.py)
    trainable: str  # regex over whole parameter paths
    parts: tuple[str, ...]  # top-level parameter subtrees the loss reads; no other is loaded
    teacher: bool
    after: str  # the stage whose result it starts from; '' = none
    # (params, teacher params, batch, config) -> {term: float32 [B, S], the loss of every place}
    terms: Callable[[Params, Params, Batch, RunConfig], dict[str, jax.Array]]
    # (batch, config) -> {term: float32 [B, S]}; the loss is the sum of the terms' weighted means
    weights: Callable[[Batch, RunConfig], dict[str, jax.Array]]
    before: tuple[str, ...] = ()  # stages that may start from its result, though not `after` it
    # config -> {path: shape} of what the loss needs and the model does not have (heads.py)
    heads: Callable[[RunConfig], dict[str, tuple[int, ...]]] = lambda config: {}

    def __post_init__(self) -> None:
        one_of(f"stage {self.name!r}: data", self.data, KINDS)
        one_of(f"stage {self.name!r}: token_weights", self.token_weights, tuple(TOKEN_WEIGHTS))


STAGES: Registry[Stage] = Registry("config.stage")


def _shifted(batch: Batch) -> tuple[jax.Array, jax.Array]:
    names = ("labels", "loss_weight", "segment_ids")
    return losses.next_token_weights(*(batch[n] for n in names))


def next_token(params: Params, _: Params, batch: Batch, config: RunConfig) -> dict[str, jax.Array]:
    """{"next_token": -log p of the token after every place}."""
    c = config.model
    targets, weights = _shifted(batch)
    hidden, head = model.hidden(params, batch, c), model.head_kernel(params)
    return {"next_token": losses.token_nll(hidden, head, targets, weights, c.loss_chunk)}


def next_token_weights(batch: Batch, _: RunConfig) -> dict[str, jax.Array]:
    return {"next_token": _shifted(batch)[1]}


for _stage in (
    Stage(
        name="distill",
        data="unpaired",
        token_weights="token",
        trainable=r"embedding/(vision|projector|layers)/.*",
        parts=("embedding",),
        teacher=True,
        after="",
        terms=distill.terms,
        weights=distill.weights,
        heads=distill.heads,
    ),
    Stage(
        name="align",
        data="conversations",
        token_weights="token",
        trainable=r"embedding/.*",
        parts=("embedding", "decoder"),
        teacher=False,
        after="distill",
        terms=next_token,
        weights=next_token_weights,
    ),
    Stage(
        name="instruct",
        data="conversations",
        token_weights="square",
        trainable=r".*",
        parts=("embedding", "decoder"),
        teacher=False,
        after="align",
        terms=next_token,
        weights=next_token_weights,
    ),
):
    STAGES.add(_stage.name)(_stage)


def get_stage(name: str) -> Stage:
    return STAGES.find(name)


def open_pipeline(
    config: RunConfig,
    tokenizer: Tokenizer | None = None,
    *,
    index: Path | None = None,
    **options: Any,
) -> Pipeline:
    """The data of the config's stage; tokenizer and index default to config.data's.

    Args:
      options: As `Pipeline` takes them.
    """
    stage, data = get_stage(config.stage), config.data
    tokenizer = tokenizer or Tokenizer.load(data.tokenizer)
    index = index or (Path(data.index) if data.index else None)
    return Pipeline(config, stage.data, stage.token_weights, tokenizer, index=index, **options)
