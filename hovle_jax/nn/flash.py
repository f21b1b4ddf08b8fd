"""Causal attention on TPU as two Pallas kernels, forward and backward, that skip what nobody sees.

Scores stay on the chip. A block of queries visits the blocks of keys that hold one of its segments
and begin no later than its last query sees: in packed rows of short samples few, and which ones is
a table that the kernels read, so rows of any packing run the same program. JAX's splash attention,
whose name these kernels carry, knows only what is fixed when the program is made, goes backward in
two kernels that each compute the scores again (seven matrix products; here five, with dq of one kv
head in VMEM until the last block of keys), and writes the log-sum-exp 128 times.

    B rows   H query heads   K kv heads   G = H / K   S length   D head size   N blocks of a row
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # blocks are multiples of the chip's vector width
BLOCK = 512
VMEM_FOR_DQ = 48 * 2**20  # dq of all heads of one kv head, in float32
MASKED = -1e30  # finite: what sees nothing in one block must not become NaN in the next


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    reach: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """[B, H, S, D], [B, K, S, D] twice, [B, S] -> [B, H, S, D]; q is scaled already.

    A query sees the keys of its segment up to its own place, or up to place `reach` [B, S]. Forward
    output and log-sum-exp are named 'attention_out': kept together, or the forward kernel would run
    again for the latter.
    """
    length = q.shape[2]
    places = jnp.arange(length, dtype=jnp.int32)
    reach = jnp.broadcast_to(places, segment_ids.shape) if reach is None else reach
    pad = -length % block_of(length)
    if pad:  # after the last query: no other sees so far
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (q, k, v))
        segment_ids, reach = (jnp.pad(x, ((0, 0), (0, pad))) for x in (segment_ids, reach))
    return _attend(q, k, v, segment_ids, reach, interpret)[:, :, :length]


def block_of(length: int) -> int:
    """The block a row is cut into, padded if it must be: 512 for all but short rows.

    The one whose visits take least time: as the compiler schedules them, that of its pairs and of
    97,000 more (docs/performance_log.md).
    """

    def cost(block: int) -> int:
        blocks = -(-length // block)
        return blocks * (blocks + 1) * (block * block + 97_000)

    return min(range(LANES, BLOCK + 1, LANES), key=cost)


def visits(segment_ids: jax.Array, reach: jax.Array, block: int) -> jax.Array:
    """bool [B, N, N]: which blocks of keys (last) a block of queries has to see.

    Segments count up along a row, so blocks share one where their ranges meet.
    """
    ids = jnp.where(segment_ids == 0, jnp.iinfo(jnp.int32).max, segment_ids)  # padding is last
    ids = ids.reshape(len(ids), -1, block)
    low, high = ids.min(-1), ids.max(-1)
    shared = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
    furthest = reach.reshape(ids.shape).max(-1)
    return shared & (furthest[:, :, None] >= jnp.arange(ids.shape[1]) * block)


def _held(visits: jax.Array) -> jax.Array:
    """int32 [B, N, N]: which block is in VMEM at each step of the last axis; its own is a visit.

    Elsewhere it is the last one visited, or the first to come, so that nothing is fetched in vain.
    """
    steps = jnp.arange(visits.shape[-1], dtype=jnp.int32)
    last = jax.lax.cummax(jnp.where(visits, steps, -1), axis=2)
    first = jnp.argmax(visits, axis=-1, keepdims=True).astype(jnp.int32)
    return jnp.where(last < 0, first, last)


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    reach: jax.Array,
    interpret: bool,
) -> Any:
    rows, heads, length, size = q.shape
    groups, block = heads // k.shape[1], block_of(length)

    def queries(b: Any, h: Any, i: Any, j: Any, held: Any) -> Any:
        return b, h, i, 0

    def query_row(b: Any, h: Any, i: Any, j: Any, held: Any) -> Any:
        return b, h, 0, i

    def token_row(b: Any, h: Any, i: Any, j: Any, held: Any) -> Any:
        return b, 0, i

    def keys(b: Any, h: Any, i: Any, j: Any, held: Any) -> Any:
        return b, jax.lax.div(h, groups), held[b, i, j], 0

    def token_column(b: Any, h: Any, i: Any, j: Any, held: Any) -> Any:
        return b, held[b, i, j], 0

    tile, row = (None, None, block, size), (None, 1, block)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, block=block),
        name="splash_mha_fwd",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, heads, length // block, length // block),
            in_specs=[
                pl.BlockSpec(tile, queries),
                pl.BlockSpec(tile, keys),
                pl.BlockSpec(tile, keys),
                pl.BlockSpec(row, token_row),
                pl.BlockSpec((None, block, 1), token_column),
                pl.BlockSpec(row, token_row),
            ],
            out_specs=[pl.BlockSpec(tile, queries), pl.BlockSpec((None, *row), query_row)],
            scratch_shapes=[
                pltpu.VMEM((1, block), jnp.float32),
                pltpu.VMEM((1, block), jnp.float32),
                pltpu.VMEM((size, block), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((rows, heads, 1, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        ),
        cost_estimate=_cost(q, k, products=2),
        interpret=interpret,
    )(
        _held(visits(segment_ids, reach, block)),
        q,
        k,
        v,
        segment_ids[:, None],
        segment_ids[:, :, None],
        reach[:, None],
    )
    out, lse = (checkpoint_name(x, "attention_out") for x in (out, lse))
    return out, (q, k, v, segment_ids, reach, out, lse)


def _cost(q: jax.Array, k: jax.Array, products: int) -> pl.CostEstimate:
    """Of causal attention; the scheduler reads it. How much packing leaves of it is not known."""
    rows, heads, length, size = q.shape
    scores = rows * heads * length * length // 2
    return pl.CostEstimate(
        flops=2 * products * scores * size,
        transcendentals=scores,
        bytes_accessed=products * (q.size + k.size) * q.dtype.itemsize,
    )


def _product(a: jax.Array, b: jax.Array, *contract: int) -> jax.Array:
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _seen(q_segments: Any, k_segments: Any, reach: Any, first: Any) -> jax.Array:
    """bool [keys, queries]; `first` is the place of the first key."""
    shape = k_segments.shape[0], q_segments.shape[1]
    place = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (k_segments[...] == q_segments[...]) & (place <= reach[...])


def _forward_kernel(
    held: Any,
    q: Any,
    k: Any,
    v: Any,
    q_segments: Any,
    k_segments: Any,
    reach: Any,
    out: Any,
    lse: Any,
    highest: Any,
    total: Any,
    weighted: Any,
    *,
    block: int,
) -> None:
    """One block of queries against one of keys. Scores are held [keys, queries].

    That way what belongs to a query (maximum, sum, log-sum-exp) is a row, which the chip broadcasts
    for free and reduces to without crossing lanes.
    """
    b, i, j = (pl.program_id(axis) for axis in (0, 2, 3))

    @pl.when(j == 0)
    def _() -> None:
        highest[...] = jnp.full_like(highest, MASKED)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    @pl.when(held[b, i, j] == j)
    def _() -> None:
        seen = _seen(q_segments, k_segments, reach, j * block)
        scores = jnp.where(seen, _product(k[...], q[...], 1, 1), MASKED)
        before = highest[...]
        highest[...] = jnp.maximum(before, scores.max(0, keepdims=True))
        p = jnp.exp(scores - highest[...])
        shrink = jnp.exp(before - highest[...])
        total[...] = shrink * total[...] + p.sum(0, keepdims=True)
        weighted[...] = shrink * weighted[...] + _product(v[...], p.astype(v.dtype), 0, 0)

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        out[...] = (weighted[...] / total[...]).T.astype(out.dtype)
        lse[...] = highest[...] + jnp.log(total[...])


def _backward(interpret: bool, saved: Any, dout: jax.Array) -> Any:
    q, k, v, segment_ids, reach, out, lse = saved
    # sum(p * dp) over keys, without p: it is the output times its gradient.
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)[:, :, None]
    rows, heads, length, size = q.shape
    groups = heads // k.shape[1]
    if 4 * groups * length * size <= VMEM_FOR_DQ:
        dq, dk, dv = _gradients(q, k, v, dout, lse, delta, segment_ids, reach, interpret)
    else:  # a head at a time
        k, v = (jnp.repeat(x, groups, axis=1) for x in (k, v))
        dq, *each = _gradients(q, k, v, dout, lse, delta, segment_ids, reach, interpret)
        shape = rows, heads // groups, groups, length, size
        dk, dv = (x.reshape(shape).sum(2, dtype=jnp.float32).astype(x.dtype) for x in each)
    return dq, dk, dv, None, None


_attend = jax.custom_vjp(lambda *operands: _forward(*operands)[0], nondiff_argnums=(5,))
_attend.defvjp(_forward, _backward)


def _gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    segment_ids: jax.Array,
    reach: jax.Array,
    interpret: bool,
) -> Any:
    """(dq, dk, dv). Grid: row, kv head, key block j, head g of the group, query block i."""
    rows, heads, length, size = q.shape
    kv_heads, block = k.shape[1], block_of(length)
    groups, last = heads // kv_heads, length // block - 1

    def queries(b: Any, h: Any, j: Any, g: Any, i: Any, held: Any) -> Any:
        return b, h * groups + g, held[b, j, i], 0

    def query_row(b: Any, h: Any, j: Any, g: Any, i: Any, held: Any) -> Any:
        return b, h * groups + g, 0, held[b, j, i]

    def token_row(b: Any, h: Any, j: Any, g: Any, i: Any, held: Any) -> Any:
        return b, 0, held[b, j, i]

    def keys(b: Any, h: Any, j: Any, g: Any, i: Any, held: Any) -> Any:
        return b, h, j, 0

    def token_column(b: Any, h: Any, j: Any, g: Any, i: Any, held: Any) -> Any:
        return b, j, 0

    def complete(b: Any, h: Any, j: Any, g: Any, i: Any, held: Any) -> Any:
        """dq is written while the last block of keys is seen, and nothing before."""
        return b, h * groups + jnp.where(j == last, g, 0), jnp.where(j == last, i, 0), 0

    tile, row = (None, None, block, size), (None, 1, block)
    return pl.pallas_call(
        functools.partial(_backward_kernel, block=block),
        name="splash_mha_dkv_one_kernel",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, kv_heads, last + 1, groups, last + 1),
            in_specs=[
                pl.BlockSpec(tile, queries),
                pl.BlockSpec(tile, keys),
                pl.BlockSpec(tile, keys),
                pl.BlockSpec(tile, queries),
                pl.BlockSpec((None, *row), query_row),
                pl.BlockSpec((None, *row), query_row),
                pl.BlockSpec(row, token_row),
                pl.BlockSpec((None, block, 1), token_column),
                pl.BlockSpec(row, token_row),
            ],
            out_specs=[
                pl.BlockSpec(tile, complete),
                pl.BlockSpec(tile, keys),
                pl.BlockSpec(tile, keys),
            ],
            scratch_shapes=[
                pltpu.VMEM((groups, length, size), jnp.float32),
                pltpu.VMEM((block, size), jnp.float32),
                pltpu.VMEM((block, size), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=4 * groups * length * size + 16 * 2**20,
        ),
        cost_estimate=_cost(q, k, products=5),
        interpret=interpret,
    )(
        _held(visits(segment_ids, reach, block).swapaxes(1, 2)),
        q,
        k,
        v,
        dout,
        lse,
        delta,
        segment_ids[:, None],
        segment_ids[:, :, None],
        reach[:, None],
    )


def _backward_kernel(
    held: Any,
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    lse: Any,
    delta: Any,
    q_segments: Any,
    k_segments: Any,
    reach: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    dq_sum: Any,
    dk_sum: Any,
    dv_sum: Any,
    *,
    block: int,
) -> None:
    """One block of keys against one of queries; scores as in `_forward_kernel`."""
    b, j, g, i = (pl.program_id(axis) for axis in (0, 2, 3, 4))
    last_group, last_block = pl.num_programs(3) - 1, pl.num_programs(4) - 1
    here = pl.ds(i * block, block)

    @pl.when((g == 0) & (i == 0))
    def _() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(j == 0)
    def _() -> None:
        dq_sum[g, here] = jnp.zeros((block, dq_sum.shape[-1]), jnp.float32)

    @pl.when(held[b, j, i] == i)
    def _() -> None:
        seen = _seen(q_segments, k_segments, reach, j * block)
        p = jnp.where(seen, jnp.exp(_product(k[...], q[...], 1, 1) - lse[...]), 0.0)
        dv_sum[...] += _product(p.astype(dout.dtype), dout[...], 1, 0)
        ds = p * (_product(v[...], dout[...], 1, 1) - delta[...])
        ds = ds.astype(q.dtype)
        dk_sum[...] += _product(ds, q[...], 1, 0)
        dq_sum[g, here] += _product(ds, k[...], 0, 0)

    @pl.when(j == last_block)
    def _() -> None:
        dq[...] = dq_sum[g, here].astype(dq.dtype)

    @pl.when((g == last_group) & (i == last_block))
    def _() -> None:
        dk[...] = dk_sum[...].astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)
