"""Where tokens stand for rotary embedding: schemes by name, one per stack
(`LayersConfig.positions`).

    1d   every token at its number in the segment
    2d   (row, column): half of a head turns with the one, half with the other
    3d   (index, row, column), a third of a head each, as Qwen2-VL's M-RoPE

A scheme gives every token one number per axis; frequencies of a head take the axes in turn, so each
axis has slow and fast ones. Text stands at the same index on all axes, which turns it exactly as
'1d' would: an LLM's weights keep their meaning.

The index counts text by one and a tile by what the scheme says (here its longer side, so that text
after a tile stands past all of it). Row and column are those in the tile: ids do not say how the
tiles of a picture lie.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.nn.images import Tokens
from hovle_jax.registry import Registry


@dataclasses.dataclass(frozen=True)
class Scheme:
    """`span`: how far the index moves over one tile, from its (rows, columns).

    `coordinates`: index [B, L] (of image tokens, that of their tile) and tokens -> one array [B, L]
    per axis, or one per frequency. That of text must depend on nothing but its index: generation
    adds text to images it no longer sees.
    """

    span: Callable[[tuple[int, int]], int]
    coordinates: Callable[[jax.Array, Tokens], Sequence[jax.Array]]


POSITIONS: Registry[Scheme | None] = Registry("positions of model.embedding or model.decoder")

POSITIONS.add("1d")(None)
POSITIONS.add("2d")(Scheme(max, lambda index, t: (index + t.row, index + t.column)))
POSITIONS.add("3d")(Scheme(max, lambda index, t: (index, index + t.row, index + t.column)))


def indices(scheme: Scheme, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    """(index of each token [B, L], that of text which would come after it [B, L])."""
    last = tokens.in_tile == tokens.tile - 1
    width = jnp.where(tokens.is_image, last * scheme.span(tokens.grid), 1)
    before = jnp.cumsum(width, axis=1) - width
    first = jnp.clip(tokens.place - tokens.position_ids, 0)  # of each one's segment
    index = before - jnp.take_along_axis(before, first, axis=1)
    return index, index + width


def per_frequency(scheme: Scheme, index: jax.Array, tokens: Tokens, half: int) -> jax.Array:
    """What each of `half` frequencies turns by: [B, L, half]."""
    axes = jnp.stack(jnp.broadcast_arrays(*scheme.coordinates(index, tokens)), axis=-1)
    return axes[..., np.arange(half) % axes.shape[-1]]
