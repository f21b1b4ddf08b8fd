"""What vision towers are made of: pre-norm layers with full attention, and the registry of towers.

A tower is a Linen module of `config: TeacherConfig` and `keep_hidden: bool`, called with pixels
[N, H, W, 3] of its own size:

    {"hidden" [N, K + P, C], "features" [N, T, E], "layers" [L, N, P, C] where asked for}

Inside, the K prefix tokens (class, registers) come after the patches and padding after that: what
is cut off lies at the end, where it costs no copy, and attention does not ask for an order.

    N tiles   P patches   T tokens per tile   C tower width   E width of the features
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hovle_jax.config import TeacherConfig
from hovle_jax.errors import UserError
from hovle_jax.nn.attention import aligned, attend_all
from hovle_jax.nn.compressors import pixel_shuffle
from hovle_jax.nn.embedding import normalize_pixels, patchify
from hovle_jax.nn.layers import Linear, RMSNorm, named
from hovle_jax.registry import Registry
from hovle_jax.sharding import constrain

TEACHERS: Registry[type[nn.Module]] = Registry("config.teacher.kind")
Angles = tuple[jax.Array, jax.Array]  # cos and sin [places, head size]


def layer_norm(eps: float, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=eps,
        name=name,
        scale_init=named(nn.initializers.ones, "norm"),
        bias_init=named(nn.initializers.zeros, "norm"),
    )


def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution function, in float32.

    jax.nn.gelu takes erfc, which has two branches: TPU stores which one each value takes, a pass
    over the widest activation of the layer. erf has one, and this form is PyTorch's.
    """
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


class HeadLinear(nn.Module):
    """`Linear` from or to heads, which are two axes of the kernel and one of the activations.

    As an axis of their own, heads of 64 would fill half a register; TPU turns the whole array
    around to avoid that.
    """

    inputs: tuple[int, ...]
    features: tuple[int, ...]
    axes: tuple[str, ...]
    std: float
    bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = named(nn.initializers.normal(self.std), *self.axes)
        kernel = self.param("kernel", init, self.inputs + self.features, jnp.float32)
        y = x @ kernel.astype(x.dtype).reshape(x.shape[-1], -1)
        if self.bias:
            zeros = named(nn.initializers.zeros, *self.axes[len(self.inputs) :])
            bias = self.param("bias", zeros, self.features, jnp.float32)
            y = y + bias.astype(x.dtype).reshape(-1)
        return y


class LayerScale(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = named(nn.initializers.constant(0.1), "norm")
        return x * self.param("scale", init, (x.shape[-1],), jnp.float32).astype(x.dtype)


def _activate(x: jax.Array, kind: str) -> jax.Array:
    if kind == "gelu":
        return gelu(x)
    wide = x.astype(jnp.float32)
    if kind == "quick_gelu":
        return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)
    return (jax.nn.silu(wide) if kind == "silu" else jax.nn.gelu(wide)).astype(x.dtype)


def _rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """x [N, S, H D]: the halves of every head turned against each other."""
    cos, sin = (a[:, None] for a in angles)
    wide = x.reshape(*x.shape[:2], -1, cos.shape[-1]).astype(jnp.float32)
    first, second = jnp.split(wide, 2, axis=-1)
    turned = wide * cos + jnp.concatenate([-second, first], axis=-1) * sin
    return turned.reshape(x.shape).astype(x.dtype)


class VisionLayer(nn.Module):
    config: TeacherConfig
    length: int  # places that are no padding
    scaled: bool  # LayerScale
    keep: int  # patches of its output that are kept

    @nn.compact
    def __call__(self, x: jax.Array, angles: Angles | None) -> tuple[jax.Array, jax.Array | None]:
        c = self.config
        size = c.hidden_size // c.num_heads
        width, split = (c.hidden_size,), (c.num_heads, size)

        def norm(name: str) -> Any:
            return (
                RMSNorm(c.norm_eps, name=name) if c.norm == "rms" else layer_norm(c.norm_eps, name)
            )

        def project(name: str) -> jax.Array:
            axes = ("embed", "heads", "head_dim")
            bias = c.qkv_bias and (c.key_bias or name != "k")
            z = HeadLinear(width, split, axes, c.initializer_range, bias, name=name)(y)
            if c.qk_norm and name != "v":  # over the full width, not per head
                z = RMSNorm(c.norm_eps, name=f"{name}_norm")(z)
            return z if angles is None or name == "v" else _rotate(z, angles)

        def scale(name: str, y: jax.Array) -> jax.Array:
            return LayerScale(name=name)(y) if self.scaled else y

        def widen(name: str) -> jax.Array:
            axes = ("embed", "mlp")
            return Linear((c.intermediate_size,), axes, c.initializer_range, bias=True, name=name)(
                y
            )

        y = norm("norm1")(x).astype(x.dtype)
        qkv = project("q"), project("k"), project("v")
        y = attend_all(*qkv, size, self.length, c.attention)
        axes = ("heads", "head_dim", "embed")
        y = HeadLinear(split, width, axes, c.initializer_range, True, name="o")(y)
        x = x + scale("ls1", y)
        y = norm("norm2")(x).astype(x.dtype)
        y, gate = widen("fc1"), widen("gate") if c.gated else None
        y = constrain(y, "batch", "length", "mlp")
        y = _activate(y, c.activation) if gate is None else y * _activate(gate, c.activation)
        # The barrier leaves GELU with fc1; else it and both products become one, slower, fusion.
        y = jax.lax.optimization_barrier(y)
        y = Linear((c.hidden_size,), ("mlp", "embed"), c.initializer_range, bias=True, name="fc2")(
            y
        )
        # Left alone, the compiler keeps the weights split and sums activations over all devices.
        x = constrain(x + scale("ls2", y), "batch", "length", "act_embed")
        return x, x[:, : self.keep] if self.keep else None


def patch_embedding(pixels: jax.Array, c: TeacherConfig) -> jax.Array:
    """[N, H, W, 3] -> [N, P, C]: normalised, projected; what fills no patch is cut off."""
    rows, columns = (n * c.patch_size for n in grid_of(pixels, c))
    if pixels.shape[1:3] != (rows, columns):
        pixels = pixels[:, :rows, :columns]
    x = normalize_pixels(pixels, c.dtype, c.mean, c.std)
    axes = ("patch", "patch", "patch", "embed")
    x = patchify(x, c.patch_size)
    return Linear((c.hidden_size,), axes, c.initializer_range, bias=True, name="patch")(x)


def grid_of(pixels: jax.Array, c: TeacherConfig) -> tuple[int, int]:
    """Patches in a column and in a row."""
    return pixels.shape[-3] // c.patch_size, pixels.shape[-2] // c.patch_size


def encode(
    x: jax.Array,
    prefix: jax.Array | None,
    c: TeacherConfig,
    *,
    scaled: bool = True,
    angles: Angles | None = None,
    keep_hidden: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The layers over patches [N, P, C] and prefix tokens [K, C], inside a module's call.

    angles: of the patches; prefix tokens are not rotated. -> (patches [N, P, C], {"hidden" and,
    if kept, "layers"}).
    """
    patches = x.shape[1]
    length = patches + (0 if prefix is None else len(prefix))
    if length > patches or aligned(length) > length:
        last = jnp.zeros((0, x.shape[-1]), x.dtype) if prefix is None else prefix
        last = jnp.pad(last, ((0, aligned(length) - patches - len(last)), (0, 0)))
        x = jnp.concatenate([x, jnp.broadcast_to(last, (len(x), *last.shape))], axis=1)
    if angles is not None:
        still = x.shape[1] - patches
        cos, sin = (
            jnp.pad(a, ((0, still), (0, 0)), constant_values=v)
            for a, v in zip(angles, (1.0, 0.0), strict=True)
        )
        angles = cos, sin
    x = constrain(x, "batch", "length", "act_embed")
    layers = nn.scan(
        VisionLayer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=c.used_layers,
        metadata_params={"name": "layers"},
    )
    x, kept = layers(c, length, scaled, patches if keep_hidden else 0, name="layers")(x, angles)
    patch, last = x[:, :patches], x[:, patches:length]
    out = {"hidden": jnp.concatenate([last, patch], axis=1)}
    return patch, out if kept is None else out | {"layers": kept}


def own_features(x: jax.Array, c: TeacherConfig) -> jax.Array:
    """[N, P, C] -> [N, T, E] of a tower without a projector: the final norm, then the shuffle.

    The norm belongs to the last layer: an earlier hidden state is given as it is.
    """
    if c.out_size != c.shuffle**2 * c.hidden_size:
        raise UserError(
            f"config.teacher.out_size {c.out_size} must be shuffle^2 x hidden_size, "
            f"{c.shuffle**2 * c.hidden_size}: {c.kind} has no projector"
        )
    if c.used_layers == c.num_layers:
        x = layer_norm(c.norm_eps, "norm")(x).astype(x.dtype)
    return pixel_shuffle(x, c.shuffle, c.shuffle_version)
