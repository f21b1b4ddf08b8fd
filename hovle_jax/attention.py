"""One function, `attend`, and the implementations behind its name.

    B rows   S query length   M key length   K kv heads   G query heads per kv head   D head size

A query sees a key when both belong to the same segment and the key's position is not later.
Positions restart in every segment, so one rule serves packed rows, padding (segment 0) and caches.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hovle_jax.errors import UserError

MASKED = -1e30  # finite: a fully masked (padding) query averages values instead of giving NaN


def causal_mask(
    q_segments: jax.Array, kv_segments: jax.Array, q_positions: jax.Array, kv_positions: jax.Array
) -> jax.Array:
    """bool [B, S, M]: which keys each query may see."""
    same = q_segments[:, :, None] == kv_segments[:, None, :]
    return same & (q_positions[:, :, None] >= kv_positions[:, None, :])


def attend(
    q: jax.Array,  # [B, S, K * G, D]
    k: jax.Array,  # [B, M, K, D]
    v: jax.Array,  # [B, M, K, D]
    mask: jax.Array,  # bool [B, S, M]
    implementation: str = "xla",
) -> jax.Array:
    """Grouped-query softmax attention, scaled by 1/sqrt(D): [B, S, K * G, D] in q's dtype.

    Query heads are ordered (kv head, group), as InternLM2's `wqkv` packs them.
    """
    try:
        fn = IMPLEMENTATIONS[implementation]
    except KeyError:
        known = ", ".join(IMPLEMENTATIONS)
        raise UserError(f"model.attention: {implementation!r} is not one of {known}") from None
    return checkpoint_name(fn(q, k, v, mask), "attention_out")


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    b, s, heads, d = q.shape
    grouped = q.reshape(b, s, k.shape[2], heads // k.shape[2], d)
    scores = jnp.einsum("bskgd,bmkd->bkgsm", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * d**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bkgsm,bmkd->bskgd", weights, v).reshape(b, s, heads, d)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {"xla": _xla}
