"""Greedy decoding: prefill, then one compiled loop over a batch of prompts of different lengths."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax import model
from hovle_jax.config import ModelConfig
from hovle_jax.errors import UserError

BUCKET = 64  # prompt lengths are rounded up to multiples of this: few shapes, few compilations


@functools.partial(jax.jit, static_argnames=("config", "cache_len", "max_new"))
def _decode(
    params: Any, batch: Any, stop_ids: jax.Array, config: ModelConfig, cache_len: int, max_new: int
) -> jax.Array:
    """Batch of prompts -> int32 [B, max_new]; pad_id after the first stop token."""
    scores, cache = model.prefill(params, batch, config, cache_len)
    rows = scores.shape[0]

    def pick(scores: jax.Array, done: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        token = jnp.where(done, config.pad_id, token)
        return token, done | jnp.any(token[:, None] == stop_ids, axis=-1)

    def unfinished(carry: Any) -> jax.Array:
        i, _, done, _, _ = carry
        return (i < max_new) & ~jnp.all(done)

    def step(carry: Any) -> Any:
        i, token, done, out, cache = carry
        scores, cache = model.decode_step(params, token, cache, config)
        token, done = pick(scores, done)
        return i + 1, token, done, out.at[:, i].set(token), cache

    token, done = pick(scores, jnp.zeros(rows, bool))
    out = jnp.full((rows, max_new), config.pad_id, jnp.int32).at[:, 0].set(token)
    return jax.lax.while_loop(unfinished, step, (1, token, done, out, cache))[3]


def generate(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[np.ndarray],
    tiles: Sequence[np.ndarray],
    *,
    max_new: int,
    stop_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """Greedy answers, without the stop token that ended them.

    prompts: int32 [n_i] each. tiles: uint8 [t_i, H, W, 3] each, in order of appearance (float32
    ones count as normalised). stop_ids: default `<|im_end|>` and the end of text. Rows do not
    influence each other.
    """
    stop = list(stop_ids if stop_ids is not None else (config.im_end_id, config.eos_id))
    for i, (prompt, pixels) in enumerate(zip(prompts, tiles, strict=True)):
        if pixels.dtype != tiles[0].dtype or pixels.dtype not in (np.uint8, np.float32):
            raise UserError(f"prompt {i}: tiles must be uint8 or all float32, not {pixels.dtype}")
        places = int(np.sum(prompt == config.img_context_id))
        if places != len(pixels) * config.tokens_per_tile:
            raise UserError(
                f"prompt {i}: {places} image tokens for {len(pixels)} tiles of "
                f"{config.tokens_per_tile}"
            )
    longest = max(len(p) for p in prompts)
    length = -(-longest // BUCKET) * BUCKET
    count = max(len(t) for t in tiles)
    size = config.image_size
    ids = np.full((len(prompts), length), config.pad_id, np.int32)
    batch: dict[str, Any] = {"input_ids": ids, "segment_ids": np.zeros_like(ids)}
    if count:
        batch["pixels"] = np.zeros((len(prompts), count, size, size, 3), tiles[0].dtype)
    for i, (prompt, pixels) in enumerate(zip(prompts, tiles, strict=True)):
        ids[i, : len(prompt)] = prompt
        batch["segment_ids"][i, : len(prompt)] = 1
        if count:
            batch["pixels"][i, : len(pixels)] = pixels
    stops = jnp.array(stop, jnp.int32)
    out = np.asarray(_decode(params, batch, stops, config, length + max_new, max_new))
    return [_until_stop(row, stop) for row in out.tolist()]


def _until_stop(row: list[int], stop: Sequence[int]) -> list[int]:
    ends = [i for i, token in enumerate(row) if token in stop]
    return row[: ends[0]] if ends else row
