"""The parts of the causal layer that the holistic embedding module and the LLM share.

    B rows   S length   M cache length   E width   H query heads   K kv heads   D head size   F MLP

Parameters are kept in float32 and cast at use. Projections are separate (q, k, v, gate, up): sliced
fused products cost the TPU compiler copies.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from hovle_jax.config import LayersConfig
from hovle_jax.nn.attention import Mask, attend
from hovle_jax.nn.masks import MASKS
from hovle_jax.nn.quantize import dequantize_heads, quantize_heads
from hovle_jax.registry import Registry
from hovle_jax.sharding import constrain, platform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Named(meta.AxisMetadata):
    """A freshly initialised parameter with the names of its axes (`sharding.RULES`).

    Flax's own box (nn.Partitioned) takes the names for mesh axes and applies them at once.
    """

    value: Any
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    outputs: int = dataclasses.field(default=0, metadata={"static": True})  # of a `Linear`'s kernel

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Named:
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Named:
        axes = (*self.axes[:index], params["name"], *self.axes[index:])
        return dataclasses.replace(self, axes=axes)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Named:
        return dataclasses.replace(self, axes=self.axes[:index] + self.axes[index + 1 :])


def named(init: Any, *axes: str, outputs: int = 0) -> Any:
    """An initialiser that makes `Named` parameters; `outputs`: how many of the last axes of a
    matrix are its result's."""
    return lambda *args: Named(init(*args), axes, outputs)


def axis_names(boxed: Any) -> Any:
    """Tree of `Named` -> tree of axis-name tuples."""
    return jax.tree.map(lambda x: x.axes, boxed, is_leaf=lambda x: isinstance(x, Named))


def output_axes(boxed: Any) -> Any:
    """Tree of `Named` -> tree of how many of the last axes are a matrix's outputs; 0: no matrix."""
    return jax.tree.map(lambda x: x.outputs, boxed, is_leaf=lambda x: isinstance(x, Named))


class Linear(nn.Module):
    """y = x @ kernel (+ bias); `axes` names the kernel's axes, input axes first.

    The input axes are the last of x and contract with the first of the kernel; the kernel is cast
    to x's dtype. One in int8 comes with its scales (`quantize.py`), a frozen one may have a
    low-rank adapter beside it (`lora.py`).
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    std: float
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        num_in = len(self.axes) - len(self.features)
        shape = x.shape[-num_in:] + self.features
        normal = nn.initializers.normal(self.std)
        init = named(normal, *self.axes, outputs=len(self.features))
        kernel = self.param("kernel", init, shape, jnp.float32)
        kernel = kernel.astype(x.dtype)
        if platform() == "cpu":
            # As matrices: XLA's CPU backend needs 1.3x the time otherwise, its TPU backend copies.
            width = math.prod(shape[:num_in])
            y = x.reshape(-1, width) @ kernel.reshape(width, -1)
            y = y.reshape(*x.shape[: x.ndim - num_in], *self.features)
        else:
            y = jnp.tensordot(x, kernel, num_in)
        if self.has_variable("params", "kernel_scale"):
            scale: jax.Array = self.get_variable("params", "kernel_scale")
            y = (y.astype(jnp.float32) * scale).astype(y.dtype)
        if self.has_variable("params", "lora_a"):
            rank: tuple[int, ...] = self.get_variable("params", "lora_a")["kernel"].shape[-1:]
            a = Linear(rank, (*self.axes[:num_in], "rank"), self.std, name="lora_a")
            b = Linear(self.features, ("rank", *self.axes[num_in:]), self.std, name="lora_b")
            y = y + b(a(x))
        if self.bias:
            zeros = named(nn.initializers.zeros, *self.axes[num_in:])
            y = y + self.param("bias", zeros, self.features, jnp.float32).astype(x.dtype)
        return y


class RMSNorm(nn.Module):
    """Normalises in float32, casts back, then multiplies by the weight."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = named(nn.initializers.ones, "norm")
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * scale.astype(x.dtype)


def rope_tables(
    positions: jax.Array, config: LayersConfig, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, S, D/2], for half-split ("rotate_half") rotary embedding.

    positions: [B, S], or [B, S, D/2] where frequencies have their own (`positions.py`).
    `lengths` int [B, S] is the length of the sequence each token belongs to; only dynamic NTK
    scaling reads it, and only past `max_positions`.
    """
    half = config.head_dim // 2
    exponent = jnp.arange(half, dtype=jnp.float32) / half
    pos = positions.astype(jnp.float32)
    pos = pos[..., None] if pos.ndim == 2 else pos
    if config.rope_scaling == "linear":
        pos = pos / config.rope_factor
    base = jnp.asarray(config.rope_theta, jnp.float32)
    if config.rope_scaling == "dynamic" and lengths is not None:
        factor, d = config.rope_factor, config.head_dim
        ratio = factor * lengths.astype(jnp.float32) / config.max_positions - (factor - 1)
        scaled = base * jnp.maximum(ratio, 1.0) ** (d / (d - 2))
        base = jnp.where(lengths > config.max_positions, scaled, base)[..., None]
    angle = pos / base**exponent
    return jnp.cos(angle), jnp.sin(angle)


@jax.custom_vjp
def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates [B, S, heads, D] in float32: the first half of D with the second.

    The halves change places in a product with a signed permutation, which is exact: slicing a head
    in two and joining it again costs the TPU several passes over memory, the product none.
    """
    half = x.shape[-1] // 2
    eye = np.eye(half, dtype=np.float32)
    zero = np.zeros_like(eye)
    turn = jnp.asarray(np.block([[zero, eye], [-eye, zero]]), x.dtype)
    turned = jnp.matmul(x, turn, precision="highest", preferred_element_type=jnp.float32)
    cos, sin = (jnp.concatenate([t, t], axis=-1)[:, :, None] for t in (cos, sin))
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


# The gradient of a rotation is the rotation back; derived, it would multiply in float32.
apply_rope.defvjp(
    lambda x, cos, sin: (apply_rope(x, cos, sin), (cos, sin)),
    lambda saved, d: (apply_rope(d, saved[0], -saved[1]), None, None),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """What every layer of a stack needs beside its input; the same for all of them."""

    cos: jax.Array  # [B, S, D/2]
    sin: jax.Array
    mask: Mask  # attention.visible; bool [B, S, M] with a cache
    starts: jax.Array | None = None  # int [B]: cache slot of the first query; None = no cache
    # int [B, S], 0 = padding; only where a layer is of another type than attention:
    segment_ids: jax.Array | None = None
    is_image: jax.Array | None = None  # bool [B, S]; only where a part of a layer has `images`


# What a layer keeps between tokens, by name (`Mixer.state`), [B, ...]; attention's is
# {"k": [B, M, K, D], "v": same}, in int8 with "k_scale" [B, M, K], "v_scale".
# A stack's has an axis of layers in front, where they are of one type.
Cache = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StateArray:
    """An array that a layer keeps between tokens, as it is for one row."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # names in sharding.RULES; "row" in front: a place for every token
    dtype: str = ""  # '' = the model's

    @property
    def grows(self) -> bool:
        return self.axes[0] == "row"


class Mixer(nn.Module):
    """What lets tokens of a row see each other in a layer: the protocol of LAYER_TYPES.

    Rows are packed: nothing may pass from one segment of a row to the next, nor from padding.
    """

    config: LayersConfig
    implementation: str  # of softmax attention
    masked: ClassVar[bool] = False  # sees the later tokens that `LayersConfig.mask` allows
    images: ClassVar[bool] = False  # reads `LayerInputs.is_image`
    ignores: ClassVar[tuple[str, ...]] = ()  # further settings of LayersConfig it has no use for

    def __call__(
        self, x: jax.Array, inputs: LayerInputs, cache: Cache | None
    ) -> tuple[jax.Array, Cache]:
        """x [B, S, E] -> (y [B, S, E], what the next tokens of its rows need).

        cache: what an earlier call returned for the tokens before; None: x is whole rows.
        """
        raise NotImplementedError

    @staticmethod
    def params(config: LayersConfig) -> int:
        """How many one layer has."""
        raise NotImplementedError

    @staticmethod
    def state(config: LayersConfig, places: int) -> dict[str, StateArray]:
        """What a layer keeps, with room for so many tokens; all zeros before the first."""
        raise NotImplementedError

    @staticmethod
    def mixing_flops(config: LayersConfig, context: int) -> float:
        """Forward FLOPs per token that take no weights, in a sequence of `context` tokens."""
        return 0.0


LAYER_TYPES: Registry[type[Mixer]] = Registry("model.*.layer_types")


def output_std(config: LayersConfig) -> float:
    """Residual outputs start smaller the deeper the stack: near identity (docs/design.md)."""
    return config.initializer_range / math.sqrt(2 * config.num_layers)


@LAYER_TYPES.add("attention")
class Attention(Mixer):
    """Grouped-query softmax attention with rotary positions."""

    masked: ClassVar[bool] = True

    @staticmethod
    def params(c: LayersConfig) -> int:
        d, h, kv, dh = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        bias = c.qkv_bias * dh * (h + 2 * kv) + c.out_bias * d
        return d * dh * (h + 2 * kv) + h * dh * d + bias + 2 * dh * c.qk_norm

    @staticmethod
    def state(c: LayersConfig, places: int) -> dict[str, StateArray]:
        heads = StateArray((places, c.num_kv_heads, c.head_dim), ("row", "kv_heads", "head_dim"))
        return {"k": heads, "v": heads}

    @staticmethod
    def mixing_flops(c: LayersConfig, context: int) -> float:
        return 2.0 * c.num_heads * c.head_dim * context  # q k^T and A v, halved by causality

    @nn.compact
    def __call__(
        self, x: jax.Array, inputs: LayerInputs, cache: Cache | None
    ) -> tuple[jax.Array, Cache]:
        """Returns the output and this layer's keys and values (the cache, extended)."""
        c = self.config

        def project(name: str, heads: int, axis: str) -> jax.Array:
            size = (heads, c.head_dim)
            y = Linear(
                size, ("embed", axis, "head_dim"), c.initializer_range, c.qkv_bias, name=name
            )(x)
            return constrain(y, "batch", "length", axis, "head_dim")

        def rotated(name: str, heads: int, axis: str) -> jax.Array:
            x = project(name, heads, axis)
            if c.qk_norm:
                x = RMSNorm(c.rms_norm_eps, name=f"{name}_norm")(x)
            return apply_rope(x, inputs.cos, inputs.sin)

        q = rotated("q", c.num_heads, "heads")
        k = rotated("k", c.num_kv_heads, "kv_heads")
        v = project("v", c.num_kv_heads, "kv_heads")
        kv = {"k": k, "v": v}
        if cache is not None:
            assert inputs.starts is not None
            new = quantize_heads(kv) if "k_scale" in cache else kv
            kv = {name: _write(cache[name], x, inputs.starts) for name, x in new.items()}
        how = self.implementation if cache is None else "xla"
        k, v = (dequantize_heads(kv, name, q.dtype) for name in ("k", "v"))
        y = attend(q, k, v, inputs.mask, how, causal=MASKS.find(c.mask) is None)
        o = Linear(
            (c.hidden_size,),
            ("heads", "head_dim", "embed"),
            output_std(c),
            bias=c.out_bias,
            name="o",
        )
        return o(y), kv


def _write(cache: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
    """Puts [B, S, ...] into slots starts[b].. of [B, M, ...]."""
    update = jax.lax.dynamic_update_slice_in_dim
    return jax.vmap(lambda c, n, s: update(c, n.astype(c.dtype), s, axis=0))(cache, new, starts)


@jax.custom_vjp
def silu_times(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, with a gradient the TPU computes where that of the result is made.

    The barrier keeps the two gradients together; else the compiler makes them from the gradient of
    the result in passes of their own, one of them once per product that reads it.
    """
    return jax.nn.silu(gate) * up


def _silu_times_forward(gate: jax.Array, up: jax.Array) -> Any:
    return silu_times(gate, up), (gate, up)


def _silu_times_backward(saved: Any, d: jax.Array) -> Any:
    gate, up, wide = (x.astype(jnp.float32) for x in (*saved, d))
    sigmoid = jax.nn.sigmoid(gate)
    dgate = wide * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    gradients = dgate.astype(d.dtype), (wide * gate * sigmoid).astype(d.dtype)
    return jax.lax.optimization_barrier(gradients)


silu_times.defvjp(_silu_times_forward, _silu_times_backward)


class MLP(nn.Module):
    """What every token of a layer goes through by itself: the protocol of MLPS."""

    config: LayersConfig
    images: ClassVar[bool] = False  # reads `LayerInputs.is_image`

    def __call__(self, x: jax.Array, inputs: LayerInputs) -> jax.Array:
        """x [B, S, E] -> [B, S, E]."""
        raise NotImplementedError

    @staticmethod
    def params(config: LayersConfig) -> int:
        """How many one layer has."""
        raise NotImplementedError


MLPS: Registry[type[MLP]] = Registry("model.*.mlp")


@MLPS.add("swiglu")
class SwiGLU(MLP):
    @staticmethod
    def params(c: LayersConfig) -> int:
        return 3 * c.hidden_size * c.intermediate_size

    @nn.compact
    def __call__(self, x: jax.Array, inputs: LayerInputs) -> jax.Array:
        c = self.config

        def project(name: str) -> jax.Array:
            y = Linear((c.intermediate_size,), ("embed", "mlp"), c.initializer_range, name=name)(x)
            return checkpoint_name(constrain(y, "batch", "length", "mlp"), "mlp_in")

        h = checkpoint_name(silu_times(project("gate"), project("up")), "mlp_hidden")
        return Linear((c.hidden_size,), ("mlp", "embed"), output_std(c), name="down")(h)
