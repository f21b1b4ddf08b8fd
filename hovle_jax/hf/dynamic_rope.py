"""Where the reference's dynamic rope scaling follows more than a sequence's own length."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax import model
from hovle_jax.config import ModelConfig


def stretched_rows(config: ModelConfig, mask: np.ndarray, extra: int = 0) -> np.ndarray:
    """bool [B]: rows whose padding changes the reference's dynamic rope."""
    trained = [s.max_positions for s in config.stacks.values() if s.rope_scaling == "dynamic"]
    if not trained or mask.shape[1] + extra <= min(trained):
        return np.zeros(len(mask), bool)
    return np.asarray(~mask.all(axis=1))


def rescales(
    config: ModelConfig, prompts: Sequence[np.ndarray], tiles: Sequence[np.ndarray], new: int
) -> bool:
    """Whether dynamic rope scaling sets in before the last token."""

    def reaches(stack: Any, extra: Sequence[int]) -> bool:
        longest = max(len(p) + x for p, x in zip(prompts, extra, strict=True)) + new
        return stack.rope_scaling == "dynamic" and longest > stack.max_positions

    extra = [len(t) * config.extra_places_per_tile for t in tiles]
    return reaches(config.embedding, extra) or reaches(config.decoder, [0] * len(prompts))


def recompute(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[np.ndarray],
    tiles: Sequence[np.ndarray],
    new: int,
) -> list[list[int]]:
    """Greedy decoding without a cache, row by row.

    Past the trained length dynamic rope scaling turns every key anew with each token, which the
    reference does and no cache can.
    """
    run: Callable[..., Any] = jax.jit(functools.partial(model.apply, config=config))
    out = []
    for prompt, own in zip(prompts, tiles, strict=True):
        ids = [int(i) for i in prompt]
        for _ in range(new):
            batch = {"input_ids": jnp.asarray([ids], jnp.int32)}
            if len(own):
                batch["pixels"] = jnp.asarray(own[None])
            ids.append(int(run(params, batch)["logits"][0, -1].argmax()))
        out.append(ids[len(prompt) :])
    return out
