"""One function, `attend`, and the implementations behind its name.

    B rows   S query length   M key length   K kv heads   G query heads per kv head   D head size

A query sees a key when both belong to the same segment and the key's position is not later.
Positions restart in every segment, so one rule serves packed rows, padding (segment 0) and caches.

    xla      softmax over every key; the reference, and what caches use
    splash   Pallas flash attention on TPU: scores stay on the chip; whole rows only, where a place
             in the row says as much as a position does
    auto     splash where the step is compiled for TPU (train_step.jit_step), else xla
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from hovle_jax.errors import UserError
from hovle_jax.sharding import per_shard

MASKED = -1e30  # finite: a fully masked (padding) query averages values instead of giving NaN


def causal_mask(
    q_segments: jax.Array, kv_segments: jax.Array, q_positions: jax.Array, kv_positions: jax.Array
) -> jax.Array:
    """bool [B, S, M]: which keys each query may see."""
    same = q_segments[:, :, None] == kv_segments[:, None, :]
    return same & (q_positions[:, :, None] >= kv_positions[:, None, :])


def visible(
    segment_ids: jax.Array, position_ids: jax.Array, implementation: str
) -> jax.Array:
    """What `attend` takes as `mask` for whole rows [B, S]: segment ids for splash, else a mask."""
    if _known(implementation).startswith("splash"):
        return segment_ids
    return causal_mask(segment_ids, segment_ids, position_ids, position_ids)


def attend(
    q: jax.Array,  # [B, S, K * G, D]
    k: jax.Array,  # [B, M, K, D]
    v: jax.Array,  # [B, M, K, D]
    mask: jax.Array,  # bool [B, S, M], or segment ids [B, S] for splash: `visible`
    implementation: str = "xla",
) -> jax.Array:
    """Grouped-query softmax attention, scaled by 1/sqrt(D): [B, S, K * G, D] in q's dtype.

    Query heads are ordered (kv head, group), as InternLM2's `wqkv` packs them.
    """
    return IMPLEMENTATIONS[_known(implementation)](q, k, v, mask)


def _known(implementation: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise UserError(f"model.attention: {implementation!r} is not one of {known}")
    return implementation


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    b, s, heads, d = q.shape
    grouped = q.reshape(b, s, k.shape[2], heads // k.shape[2], d)
    scores = jnp.einsum("bskgd,bmkd->bkgsm", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * d**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("bkgsm,bmkd->bskgd", weights, v).reshape(b, s, heads, d)
    return checkpoint_name(out, "attention_out")


LANES = 128  # the kernel's blocks are multiples of the chip's vector width
BLOCK = 512


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Each device runs the kernel on its own rows and heads; nothing is exchanged."""
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # heads first
    heads = ("batch", "heads", "length", "head_dim")
    kv_heads = ("batch", "kv_heads", "length", "head_dim")
    kernel = functools.partial(_splash_rows, interpret=interpret)
    out = per_shard(kernel, (heads, kv_heads, kv_heads, ("batch", "length")), heads)(
        q, k, v, segment_ids
    )
    return out.swapaxes(1, 2)


def _splash_rows(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, interpret: bool
) -> jax.Array:
    """[B, H, S, D], [B, K, S, D] twice, [B, S] -> [B, H, S, D]."""
    length = q.shape[2]
    pad = -length % LANES
    if pad:  # after the last query: causality hides it from all others
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
    padded = length + pad
    block = max(b for b in range(LANES, BLOCK + 1, LANES) if padded % b == 0)
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([splash_mask.CausalMask((padded, padded))] * q.shape[1]),
        block_sizes=splash.BlockSizes(
            *(block,) * 8  # forward, then dk and dv, then dq: queries, keys, keys at a time
        ),
        head_shards=1,
        q_seq_shards=1,
        # The log-sum-exp is kept with the output, or the kernel would run again for it.
        residual_checkpoint_name="attention_out",
        interpret=interpret,
    )

    def row(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        out: jax.Array = kernel(q, k, v, segment_ids=splash.SegmentIds(segments, segments))
        return out

    return jax.vmap(row)(q, k, v, segment_ids)[:, :, :length]


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "auto": _xla,
    "xla": _xla,
    "splash": _splash,
    "splash_interpret": functools.partial(_splash, interpret=True),  # on CPU, for tests
}
