"""Two functions, `attend` and `attend_all`, and the implementations behind their names.

    B rows   S query length   M key length   K kv heads   G query heads per kv head   D head size

A query sees a key when both belong to the same segment and the key's position is not later.
Positions restart in every segment, so one rule serves packed rows, padding (segment 0) and caches.
Masks over images (`masks.py`) put the place of the last token that a query sees in the place of its
own: its *reach*.

    xla      softmax over every key; the reference, and what caches use
    blocks   the same a block of queries at a time over the keys up to its end (over all of them
             where some are seen before their turn); whole rows only
    splash   Pallas flash attention on TPU (`flash.py`): scores stay on the chip; whole rows only,
             where a place in the row says as much as a position does
    auto     splash where the program is for TPU, blocks for CPU, else xla

`attend_all` is the vision teacher's: every query sees every key, and nothing is differentiated.

    xla      as above
    tile     Pallas on TPU: a tile's scores stay on the chip
    auto     tile where the program is for TPU and heads fill its registers, else xla
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hovle_jax.errors import UserError
from hovle_jax.nn import flash, tile_attention
from hovle_jax.sharding import per_shard, platform
from hovle_jax.typed import one_of

MASKED = -1e30  # finite: a fully masked (padding) query averages values instead of giving NaN


def causal_mask(
    q_segments: jax.Array, kv_segments: jax.Array, q_positions: jax.Array, kv_positions: jax.Array
) -> jax.Array:
    """bool [B, S, M]: which keys each query may see."""
    same = q_segments[:, :, None] == kv_segments[:, None, :]
    return same & (q_positions[:, :, None] >= kv_positions[:, None, :])


# bool [B, S, M], or for splash segment ids [B, S], with the reach where it is not causal
Mask = jax.Array | tuple[jax.Array, jax.Array]


def visible(
    segment_ids: jax.Array,
    position_ids: jax.Array,
    implementation: str,
    reach: jax.Array | None = None,
) -> Mask:
    """What `attend` takes as `mask` for whole rows [B, S]; `reach` [B, S] if it is not causal."""
    if _resolve(implementation).startswith("splash"):
        return segment_ids if reach is None else (segment_ids, reach)
    if reach is None:
        return causal_mask(segment_ids, segment_ids, position_ids, position_ids)
    places = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    return causal_mask(segment_ids, segment_ids, reach, places)


def attend(
    q: jax.Array,  # [B, S, K * G, D]
    k: jax.Array,  # [B, M, K, D]
    v: jax.Array,  # [B, M, K, D]
    mask: Mask,  # `visible`
    implementation: str = "xla",
    causal: bool = True,  # False: the mask may let a query see later keys
) -> jax.Array:
    """Grouped-query softmax attention, scaled by 1/sqrt(D): [B, S, K * G, D] in q's dtype.

    Query heads are ordered (kv head, group), as InternLM2's `wqkv` packs them.
    """
    return IMPLEMENTATIONS[_resolve(implementation)](q, k, v, mask, causal)


def _resolve(implementation: str) -> str:
    if implementation == "auto":
        return {"tpu": "splash", "cpu": "blocks"}.get(platform(), "xla")
    one_of("model.attention", implementation, ("auto", *IMPLEMENTATIONS))
    return implementation


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, causal: bool) -> jax.Array:
    q, k, v = (checkpoint_name(x, "qkv") for x in (q, k, v))
    return checkpoint_name(_softmax(q, k, v, mask), "attention_out")


def _blocks(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, causal: bool) -> jax.Array:
    """Half the scores are never made, and those of a block fit a CPU's cache."""
    q, k, v = (checkpoint_name(x, "qkv") for x in (q, k, v))
    length = q.shape[1]
    block = max(128, -(-length // 8))  # each is compiled: eight at most
    ends = [(i, min(i + block, length)) for i in range(0, length, block)]
    parts = [
        _softmax(q[:, i:j], k[:, :m], v[:, :m], mask[:, i:j, :m])
        for i, j in ends
        for m in [j if causal else length]
    ]
    return checkpoint_name(jnp.concatenate(parts, axis=1), "attention_out")


def _softmax(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    b, s, heads, d = q.shape
    grouped = q.reshape(b, s, k.shape[2], heads // k.shape[2], d)
    scores = jnp.einsum("bskgd,bmkd->bkgsm", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * d**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bkgsm,bmkd->bskgd", weights, v).reshape(b, s, heads, d)


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, causal: bool, *, interpret: bool = False
) -> jax.Array:
    """Each device runs the kernel on whole rows of its own heads.

    Nothing is exchanged, but where places were split (mesh axis `context`): q, k, v and the result
    then change between a part of the row for all heads and the whole row for some.
    """
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    # Named as the kernel reads them: what is kept for the backward pass needs no more work there.
    q, k, v = (checkpoint_name(x.swapaxes(1, 2), "qkv") for x in (q, k, v))
    heads = ("batch", "row_heads", "row", "head_dim")
    kv_heads = ("batch", "row_kv_heads", "row", "head_dim")

    groups = q.shape[1] // k.shape[1]

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, *mask: jax.Array) -> tuple[jax.Array]:
        if q.shape[1] != groups * k.shape[1]:  # query heads are split, their kv heads are not
            raise UserError("config.mesh: tensor x context must divide the number of kv heads")
        return (flash.attention(q, k, v, *mask, interpret=interpret),)

    per_token = mask if isinstance(mask, tuple) else (mask,)
    assert causal == (len(per_token) == 1)
    ins = heads, kv_heads, kv_heads, *[("batch", "row")] * len(per_token)
    (out,) = per_shard(kernel, ins, [(heads, q.shape)])(q, k, v, *per_token)
    return out.swapaxes(1, 2)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "xla": _xla,
    "blocks": _blocks,
    "splash": _splash,
    "splash_interpret": functools.partial(_splash, interpret=True),  # on CPU, for tests
}


def aligned(length: int) -> int:
    """Places to make for so many: TPU computes whole registers, elsewhere padding only costs."""
    return length + (-length % tile_attention.ROWS if platform() == "tpu" else 0)


def attend_all(
    q: jax.Array,  # [N, S, H * D]
    k: jax.Array,
    v: jax.Array,
    size: int,  # D
    length: int,  # keys from here on are padding, seen by no query
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention over the first `length` places, scaled by 1/sqrt(D): [N, S, H * D]."""
    if implementation == "auto":
        fits = tile_attention.supports(size) and q.shape[-1] % tile_attention.LANES == 0
        implementation = "tile" if platform() == "tpu" and fits else "xla"
    if implementation == "xla":
        mask = jnp.broadcast_to(jnp.arange(q.shape[1]) < length, (1, q.shape[1], q.shape[1]))
        shape = q.shape
        q, k, v = (x.reshape(*x.shape[:2], -1, size) for x in (q, k, v))
        return _softmax(q, k, v, mask).reshape(shape)
    return _tile(q, k, v, size, length, implementation == "tile_interpret")


def _tile(
    q: jax.Array, k: jax.Array, v: jax.Array, size: int, length: int, interpret: bool
) -> jax.Array:
    """Whole rows, heads over devices by whole registers: the axes say registers, not heads."""
    axes = ("batch", "row", "row_heads", "head_dim")

    def registers(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, tile_attention.LANES)

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array]:
        q, k, v = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
        return (registers(tile_attention.attention(q, k, v, size, length, interpret)),)

    q, k, v = (registers(x) for x in (q, k, v))
    (out,) = per_shard(kernel, [axes] * 3, [(axes, q.shape)])(q, k, v)
    return out.reshape(*out.shape[:2], -1)
