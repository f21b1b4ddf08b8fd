"""Stage I's vision teacher: InternViT, pixel shuffle and mlp1 into the LLM's input space.

The tensors and the arithmetic are InternVL2's (spec section 7): pre-norm layers with LayerScale and
full attention, no final norm, class token dropped, then LayerNorm - linear - GELU - linear.

Inside, the class token comes after the patches and padding after that: what is cut off lies at the
end, where it costs no copy, and attention does not ask for an order.

    ... leading axes   P patches   T tokens per tile   C teacher width   E LLM width
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hovle_jax.config import TeacherConfig
from hovle_jax.nn.attention import aligned, attend_all
from hovle_jax.nn.compressors import pixel_shuffle
from hovle_jax.nn.embedding import normalize_pixels, patchify, resize_positions
from hovle_jax.nn.layers import Linear, RMSNorm, axis_names, named
from hovle_jax.sharding import constrain

MLP1_EPS = 1e-5  # torch's LayerNorm default, whatever the tower's own epsilon is


def _layer_norm(eps: float, name: str) -> nn.LayerNorm:
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


class TeacherLayer(nn.Module):
    config: TeacherConfig
    length: int  # places that are no padding

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        c = self.config
        size = c.hidden_size // c.num_heads
        width, split = (c.hidden_size,), (c.num_heads, size)

        def norm(name: str) -> Any:
            return (
                RMSNorm(c.norm_eps, name=name) if c.norm == "rms" else _layer_norm(c.norm_eps, name)
            )

        def project(name: str) -> jax.Array:
            axes = ("embed", "heads", "head_dim")
            z = HeadLinear(width, split, axes, c.initializer_range, c.qkv_bias, name=name)(y)
            if c.qk_norm and name != "v":  # over the full width, not per head
                z = RMSNorm(c.norm_eps, name=f"{name}_norm")(z)
            return z

        y = norm("norm1")(x).astype(x.dtype)
        y = attend_all(project("q"), project("k"), project("v"), size, self.length)
        axes = ("heads", "head_dim", "embed")
        y = HeadLinear(split, width, axes, c.initializer_range, True, name="o")(y)
        x = x + LayerScale(name="ls1")(y)
        y = norm("norm2")(x).astype(x.dtype)
        y = Linear(
            (c.intermediate_size,), ("embed", "mlp"), c.initializer_range, bias=True, name="fc1"
        )(y)
        # The barrier leaves GELU with fc1; else it and both products become one, slower, fusion.
        y = jax.lax.optimization_barrier(gelu(constrain(y, "batch", "length", "mlp")))
        y = Linear((c.hidden_size,), ("mlp", "embed"), c.initializer_range, bias=True, name="fc2")(
            y
        )
        # Left alone, the compiler keeps the weights split and sums activations over all devices.
        return constrain(x + LayerScale(name="ls2")(y), "batch", "length", "act_embed"), None


class Teacher(nn.Module):
    config: TeacherConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> dict[str, jax.Array]:
        """[N, H, W, 3] -> {"hidden" [N, 1 + P, C], "features" [N, T, E]}."""
        c = self.config
        x = patchify(normalize_pixels(pixels, c.dtype, c.mean, c.std), c.patch_size)
        axes = ("patch", "patch", "patch", "embed")
        x = Linear((c.hidden_size,), axes, c.initializer_range, bias=True, name="patch")(x)
        init = named(nn.initializers.normal(c.initializer_range), "patch", "embed")
        class_token = self.param("class", init, (1, c.hidden_size), jnp.float32)
        table = self.param("position", init, (c.grid**2 + 1, c.hidden_size), jnp.float32)
        grid = (pixels.shape[-3] // c.patch_size, pixels.shape[-2] // c.patch_size)
        x = x + resize_positions(table[1:], grid).astype(x.dtype)
        last = (class_token + table[:1]).astype(x.dtype)
        patches, length = x.shape[1], x.shape[1] + 1
        last = jnp.pad(last, ((0, aligned(length) - length), (0, 0)))
        x = jnp.concatenate([x, jnp.broadcast_to(last, (len(x), *last.shape))], axis=1)
        x = constrain(x, "batch", "length", "act_embed")
        layers = nn.scan(
            TeacherLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
            metadata_params={"name": "layers"},
        )
        x, _ = layers(c, length, name="layers")(x, None)
        patch, last = x[:, :patches], x[:, patches:length]
        return {"hidden": jnp.concatenate([last, patch], axis=1), "features": self._mlp1(patch)}

    def _mlp1(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = pixel_shuffle(x, c.shuffle, c.shuffle_version)
        x = _layer_norm(MLP1_EPS, "mlp1_norm")(x).astype(x.dtype)
        x = Linear(
            (c.out_size,), ("embed", "mlp"), c.initializer_range, bias=True, name="mlp1_fc1"
        )(x)
        x = gelu(x)
        return Linear(
            (c.out_size,), ("mlp", "embed"), c.initializer_range, bias=True, name="mlp1_fc2"
        )(x)


def init(rng: jax.Array, config: TeacherConfig) -> dict[str, Any]:
    """Random parameters, float32, as a nested dict."""
    return nn.unbox(_boxed_init(rng, config))


def abstract_params(config: TeacherConfig) -> dict[str, Any]:
    return jax.eval_shape(functools.partial(init, config=config), jax.random.key(0))


def param_axes(config: TeacherConfig) -> dict[str, Any]:
    """Axis names of every parameter, as `sharding.RULES` knows them."""
    boxed = jax.eval_shape(functools.partial(_boxed_init, config=config), jax.random.key(0))
    return axis_names(boxed)


def _boxed_init(rng: jax.Array, config: TeacherConfig) -> dict[str, Any]:
    tile = jnp.zeros((1, config.image_size, config.image_size, 3), jnp.uint8)
    return Teacher(config).init(rng, tile)["params"]


def apply(params: dict[str, Any], pixels: jax.Array, config: TeacherConfig) -> dict[str, jax.Array]:
    """pixels [..., H, W, 3] uint8 -> {"hidden" [..., 1 + P, C], "features" [..., T, E]}.

    Only the layers up to `select_layer` run (-1: all of them, -2: all but the last, 1: the first).
    """
    lead = pixels.shape[:-3]
    used = config.select_layer + (config.num_layers + 1 if config.select_layer < 0 else 0)
    params = params | {"layers": jax.tree.map(lambda x: x[:used], params["layers"])}
    config = dataclasses.replace(config, num_layers=used)
    flat = pixels.reshape(-1, *pixels.shape[-3:])
    out: Any = Teacher(config).apply({"params": params}, flat)
    return {k: v.reshape(*lead, *v.shape[1:]) for k, v in out.items()}
