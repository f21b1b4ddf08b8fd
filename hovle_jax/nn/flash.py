"""Causal attention on TPU: JAX's splash kernel forward, one kernel of our own backward.

JAX's splash attention goes backward in two kernels, each of which computes the scores again (seven
matrix products), or in one that writes a partial dq per block of keys and leaves the sum to XLA.
The kernel here keeps dq of one head in VMEM until its last block of keys has been seen: five
products, nothing partial in HBM, and blocks that share no segment are skipped.

    B rows   H query heads   K kv heads   G = H / K   S length   D head size
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

LANES = 128  # lengths and blocks are multiples of the chip's vector width
BLOCK = 512
VMEM_FOR_DQ = 48 * 2**20  # beyond this length dq of a head does not fit: splash's own two kernels


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
    pad = -length % LANES
    if pad:  # after the last query: no other sees so far
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
        reach = reach if reach is None else jnp.pad(reach, ((0, 0), (0, pad)))
    if reach is not None:
        return _reaching(q, k, v, segment_ids, reach, interpret)[:, :, :length]
    groups = q.shape[1] // k.shape[1]
    one_kernel = 4 * groups * q.shape[2] * q.shape[3] <= VMEM_FOR_DQ
    run = _one_kernel if one_kernel else _splash
    return run(q, k, v, segment_ids, interpret)[:, :, :length]


def block_of(length: int) -> int:
    return max(b for b in range(LANES, BLOCK + 1, LANES) if length % b == 0)


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    interpret: bool,
    residuals: bool = False,
) -> Any:
    """With `residuals`: (output, log-sum-exp [B, H, S]), without a gradient."""
    length = q.shape[2]
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * q.shape[1]),
        # Forward, then dk and dv, then dq: queries, keys, keys at a time.
        block_sizes=splash.BlockSizes(*(block_of(length),) * 8),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=residuals,
        residual_checkpoint_name="attention_out",
        interpret=interpret,
    )

    def row(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> Any:
        return kernel(q, k, v, segment_ids=splash.SegmentIds(segments, segments))

    out = jax.vmap(row)(q, k, v, segment_ids)
    return (out[0], out[1][0]) if residuals else out


def _not_later(last_seen: jax.Array, key: jax.Array) -> jax.Array:
    return last_seen >= key


def _reaching(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    reach: jax.Array,
    interpret: bool,
) -> jax.Array:
    """Splash's kernels with each query's reach where causality has its place.

    What a block of keys holds for a block of queries is not known when the program is made, so all
    are visited: twice the work of causality, and splash's own two kernels backward.
    """
    length = q.shape[2]

    def row(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, reach: jax.Array) -> Any:
        info = mask_info.MaskInfo(None, None, None, None, reach)  # type: ignore[arg-type]
        kernel = splash.SplashAttentionKernel(
            info,
            info,
            info,
            block_sizes=splash.BlockSizes(*(block_of(length),) * 8),
            is_mqa=False,
            save_residuals=False,
            mask_value=splash.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name="attention_out",
            mask_function=_not_later,
            interpret=interpret,
        )
        return kernel(q, k, v, segment_ids=splash.SegmentIds(segments, segments))

    out: jax.Array = jax.vmap(row)(q, k, v, segment_ids, reach)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _one_kernel(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, interpret: bool
) -> jax.Array:
    out: jax.Array = _splash(q, k, v, segment_ids, interpret, residuals=True)[0]
    return out


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, interpret: bool
) -> Any:
    out, lse = _splash(q, k, v, segment_ids, interpret, residuals=True)
    out, lse = (checkpoint_name(x, "attention_out") for x in (out, lse))
    return out, (q, k, v, segment_ids, out, lse)


def _backward(interpret: bool, saved: Any, dout: jax.Array) -> Any:
    q, k, v, segment_ids, out, lse = saved
    rows, heads, length, size = q.shape
    kv_heads, block = k.shape[1], block_of(length)
    groups = heads // kv_heads
    # sum(p * dp) over keys, without p: it is the output times its gradient.
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)

    # Grid (row, kv head, key block j, head in group g, query block i). Blocks i < j see nothing:
    # they are mapped to block j, so that nothing is fetched for them.
    def queries(b: Any, h: Any, j: Any, g: Any, i: Any) -> Any:
        return b, h * groups + g, jnp.maximum(i, j), 0

    def query_rows(b: Any, h: Any, j: Any, g: Any, i: Any) -> Any:
        return b, h * groups + g, 0, jnp.maximum(i, j)

    def keys(b: Any, h: Any, j: Any, g: Any, i: Any) -> Any:
        return b, h, j, 0

    def complete(b: Any, h: Any, j: Any, g: Any, i: Any) -> Any:
        return b, h * groups + g, j, 0  # query block j is complete once key block j was seen

    def spec(shape: tuple[int, int], index: Any, lead: int = 2) -> pl.BlockSpec:
        return pl.BlockSpec((*(None,) * lead, *shape), index)

    tile, column = (block, size), (1, block)
    pairs = length * length / 2
    dq, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, block=block),
        name="splash_mha_dkv_one_kernel",
        grid=(rows, kv_heads, length // block, groups, length // block),
        in_specs=[
            spec(tile, queries),
            spec(tile, keys),
            spec(tile, keys),
            spec(tile, queries),
            spec(column, query_rows),
            spec(column, query_rows),
            spec(column, lambda b, h, j, g, i: (b, 0, jnp.maximum(i, j)), 1),
            spec((block, 1), lambda b, h, j, g, i: (b, j, 0), 1),
        ],
        out_specs=[spec(tile, complete), spec(tile, keys), spec(tile, keys)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        scratch_shapes=[
            pltpu.VMEM((groups, length, size), jnp.float32),
            pltpu.VMEM(tile, jnp.float32),
            pltpu.VMEM(tile, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=4 * groups * length * size + 16 * 2**20,
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(10 * rows * heads * pairs * size),
            transcendentals=int(rows * heads * pairs),
            bytes_accessed=int(4 * rows * length * size * (2 * heads + 2 * kv_heads)),
        ),
        interpret=interpret,
    )(
        q,
        k,
        v,
        dout,
        lse[:, :, None],
        delta[:, :, None],
        segment_ids[:, None],
        segment_ids[:, :, None],
    )
    return dq, dk, dv, None


_one_kernel.defvjp(_forward, _backward)


def _backward_kernel(
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    lse: Any,
    delta: Any,
    q_segments: Any,
    k_segments: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    dq_sum: Any,
    dk_sum: Any,
    dv_sum: Any,
    *,
    block: int,
) -> None:
    """One block of queries against one of keys. Scores are held [keys, queries].

    That way what belongs to a query (log-sum-exp, delta) is a row, which the chip broadcasts for
    free.
    """
    j, g, i = (pl.program_id(axis) for axis in (2, 3, 4))
    last_group, last_block = pl.num_programs(3) - 1, pl.num_programs(4) - 1
    here = pl.ds(i * block, block)

    @pl.when((g == 0) & (i == 0))
    def _() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(j == 0)
    def _() -> None:
        dq_sum[g, here] = jnp.zeros((block, dq_sum.shape[-1]), jnp.float32)

    def product(a: jax.Array, b: jax.Array, *contract: int) -> jax.Array:
        axes = (((contract[0],), (contract[1],)), ((), ()))
        return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)

    @pl.when(i >= j)
    def _() -> None:
        place = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (block, block))
        seen = k_segments[...] == q_segments[...]
        seen &= j * block + place(0) <= i * block + place(1)
        scores = product(k[...], q[...], 1, 1)
        p = jnp.where(seen, jnp.exp(scores - lse[...]), 0.0)
        dv_sum[...] += product(p.astype(dout.dtype), dout[...], 1, 0)
        ds = p * (product(v[...], dout[...], 1, 1) - delta[...])
        ds = ds.astype(q.dtype)
        dk_sum[...] += product(ds, q[...], 1, 0)
        dq_sum[g, here] += product(ds, k[...], 0, 0)

    @pl.when(i == j)
    def _() -> None:
        dq[...] = dq_sum[g, here].astype(dq.dtype)

    @pl.when((g == last_group) & (i == last_block))
    def _() -> None:
        dk[...] = dk_sum[...].astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)
