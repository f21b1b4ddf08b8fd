"""Attention over all of a tile's places on TPU, forward only: what the vision teacher needs.

All keys of a tile fit the chip's memory (VMEM), so a softmax is one pass: no running maximum, no
rescaling. Heads narrower than a vector register share one, side by side as the projections leave
them: the queries of the others are set to zero, so nothing is cut apart, moved or transposed. That
costs no more than apart: the matrix unit is as deep as the register is wide.

    N tiles   S places   H heads   D head size   LANES / D heads share a register
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # width of a vector register
ROWS = 16  # places come in multiples of it: the height of a bfloat16 register
BLOCK = 576  # queries at a time, at most
NAME = "tile_mha_fwd"


def supports(size: int) -> bool:
    """Whether heads of this size fill registers."""
    return LANES % size == 0


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, size: int, length: int, interpret: bool = False
) -> jax.Array:
    """[N, S, H D] three times -> [N, S, H D]: every query sees the first `length` keys."""
    tiles, places, width = q.shape
    blocks = math.ceil(places / BLOCK)
    rows = math.ceil(places / blocks / ROWS) * ROWS
    keys = math.ceil(length / LANES) * LANES
    queries = pl.BlockSpec((None, rows, LANES), lambda n, h, i: (n, i, h))
    whole = pl.BlockSpec((None, keys, LANES), lambda n, h, i: (n, 0, h))
    scores = tiles * width // size * blocks * rows * keys
    out: jax.Array = pl.pallas_call(
        functools.partial(_kernel, size=size, length=length),
        name=NAME,
        grid=(tiles, width // LANES, blocks),
        in_specs=[queries, whole, whole],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        # As executed: padded, and whole registers where a head fills a part of one.
        cost_estimate=pl.CostEstimate(
            flops=4 * scores * LANES,
            transcendentals=scores,
            bytes_accessed=4 * q.size * q.dtype.itemsize,
        ),
        interpret=interpret,
    )(q, k, v)
    return out


def _kernel(q: Any, k: Any, v: Any, out: Any, *, size: int, length: int) -> None:
    """A block of queries of the heads that share a register, against all keys."""
    keys = len(k)
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32)
    lane = iota((1, LANES), 1)
    # What lies beyond the last key is anything, NaN too.
    seen = iota((1, keys), 1) < length
    values = jnp.where(iota((keys, 1), 0) < length, v[...], 0)
    queries = q[...].astype(jnp.float32) * size**-0.5

    def product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
        axes = (((1,), (axis,)), ((), ()))
        return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)

    result = jnp.zeros(queries.shape, jnp.float32)
    for first in range(0, LANES, size):
        mine = (lane >= first) & (lane < first + size)
        scores = product(jnp.where(mine, queries, 0.0).astype(q.dtype), k[...], 1)
        scores = jnp.where(seen, scores, -jnp.inf)
        weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
        total = jnp.sum(weights, axis=1, keepdims=True)
        result = jnp.where(mine, product(weights.astype(v.dtype), values, 0) / total, result)
    out[...] = result.astype(out.dtype)
