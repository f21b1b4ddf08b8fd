"""Gated linear attention: a layer whose memory of a row does not grow with it.

    S_t = a_t S_{t-1} + k_t v_t^T        y_t = RMSNorm(q_t S_t)        (GLA, arXiv 2312.06635)

with one decay a_t in (0, 1) per kv head and token. Query heads are grouped as attention's are.
There are no rotary positions: the decay says how long ago something was. Images are read like text,
from first to last, whatever mask attention has.

Tokens are read CHUNK at a time: inside a chunk by a product of all pairs, between chunks through S.

    B rows   S length   C chunk   K kv heads   G query heads per kv head   D head size
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from hovle_jax.config import LayersConfig
from hovle_jax.nn.layers import (
    LAYER_TYPES,
    Cache,
    LayerInputs,
    Linear,
    Mixer,
    RMSNorm,
    StateArray,
    output_std,
)
from hovle_jax.sharding import constrain

CHUNK = 64
TEMPERATURE = 16.0  # a = sigmoid(gate)^(1/16): about 0.96 before training


@LAYER_TYPES.add("linear_attention")
class LinearAttention(Mixer):
    ignores = ("positions", "qk_norm", "qkv_bias", "out_bias")

    @staticmethod
    def params(c: LayersConfig) -> int:
        d, h, kv, dh = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        return d * dh * (h + 2 * kv) + h * dh * d + (d + 1) * kv + dh

    @staticmethod
    def state(c: LayersConfig, places: int) -> dict[str, StateArray]:
        shape = (c.num_kv_heads, c.head_dim, c.head_dim)
        return {"memory": StateArray(shape, ("kv_heads", "head_dim", "head_dim"), "float32")}

    @staticmethod
    def mixing_flops(c: LayersConfig, context: int) -> float:
        inside = 2.0 * c.num_heads * c.head_dim * min(CHUNK, context)  # causal: half of the pairs
        return inside + 2.0 * (c.num_heads + c.num_kv_heads) * c.head_dim**2

    @nn.compact
    def __call__(
        self, x: jax.Array, inputs: LayerInputs, cache: Cache | None
    ) -> tuple[jax.Array, Cache]:
        c = self.config
        assert inputs.segment_ids is not None

        def project(name: str, heads: int, axis: str) -> jax.Array:
            axes = ("embed", axis, "head_dim")
            y = Linear((heads, c.head_dim), axes, c.initializer_range, name=name)(x)
            return constrain(y, "batch", "row", axis, "head_dim").astype(jnp.float32)

        q = project("q", c.num_heads, "heads") * c.head_dim**-0.5
        k = project("k", c.num_kv_heads, "kv_heads")
        v = project("v", c.num_kv_heads, "kv_heads")
        gate = Linear(
            (c.num_kv_heads,), ("embed", "kv_heads"), c.initializer_range, bias=True, name="gate"
        )(x)
        gate = constrain(gate, "batch", "row", "kv_heads").astype(jnp.float32)
        log_decay = jax.nn.log_sigmoid(gate) / TEMPERATURE
        # Padding is passed over: what the row holds stays as it was before.
        real = (inputs.segment_ids > 0)[..., None]
        k, log_decay = jnp.where(real[..., None], k, 0), jnp.where(real, log_decay, 0)
        groups = jnp.cumsum(sample_begins(inputs.segment_ids), axis=1)
        rows, length = x.shape[:2]
        memory = jnp.zeros((rows, *self.state(c, 0)["memory"].shape), jnp.float32)
        memory = memory if cache is None else cache["memory"]
        q = q.reshape(rows, length, c.num_kv_heads, -1, c.head_dim)
        y, memory = _scan(q, k, v, log_decay, groups, memory)
        y = RMSNorm(c.rms_norm_eps, name="norm")(y.astype(x.dtype))
        y = y.reshape(rows, length, c.num_heads, c.head_dim)
        o = Linear((c.hidden_size,), ("heads", "head_dim", "embed"), output_std(c), name="o")
        return o(y), {"memory": memory}


def sample_begins(segment_ids: jax.Array) -> jax.Array:
    """bool [B, S]: where another sample begins than the one before; not at the first place, which
    may continue a cache, nor at padding."""
    before = jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)
    return (segment_ids != before) & (segment_ids > 0)


def _scan(
    q: jax.Array,  # [B, S, K, G, D]
    k: jax.Array,  # [B, S, K, D], zero at padding
    v: jax.Array,
    log_decay: jax.Array,  # [B, S, K], zero at padding
    groups: jax.Array,  # int [B, S]: who may see whom
    memory: jax.Array,  # [B, K, D, D], of group 0
) -> tuple[jax.Array, jax.Array]:
    """(y [B, S, K, G, D], the memory after the last place)."""
    length = q.shape[1]
    chunk = min(CHUNK, length)
    short = -length % chunk

    def chunks(x: jax.Array) -> jax.Array:
        """[B, S, ...] -> [S / C, B, C, ...]; what fills up is padding of the last sample."""
        mode = "edge" if x is groups else "constant"
        x = jnp.pad(x, [(0, 0), (0, short), *[(0, 0)] * (x.ndim - 2)], mode=mode)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    causal = jnp.tril(jnp.ones((chunk, chunk), bool))

    def step(
        carry: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        memory, group = carry  # [B, K, D, D], of which group [B]
        q, k, v, log_decay, groups = part
        total = jnp.cumsum(log_decay, axis=1)  # [B, C, K]
        sees = causal & (groups[:, :, None] == groups[:, None, :])
        apart = total[:, :, None] - total[:, None]  # [B, C, C, K]
        weight = jnp.exp(jnp.where(sees[..., None], apart, -jnp.inf))
        y = jnp.einsum("bikgd,bjkd,bijk,bjkv->bikgv", q, k, weight, v)
        old = jnp.exp(total) * (groups == group[:, None])[..., None]
        y += jnp.einsum("bikgd,bkdv,bik->bikgv", q, memory, old)
        last = groups[:, -1]
        kept = jnp.exp(total[:, -1:] - total) * (groups == last[:, None])[..., None]
        memory = memory * old[:, -1, :, None, None]
        memory += jnp.einsum("bjkd,bjk,bjkv->bkdv", k, kept, v)
        return (memory, last), y

    parts = tuple(chunks(x) for x in (q, k, v, log_decay, groups))
    (memory, _), y = jax.lax.scan(step, (memory, jnp.zeros_like(groups[:, 0])), parts)
    y = jnp.moveaxis(y, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])
    return y[:, :length], memory
