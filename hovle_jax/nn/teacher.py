"""Stage I's vision teachers as pure functions: any tower of the registry, by `config.kind`.

... leading axes   P patches   T tokens per tile   C tower width   E width of the features
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
from hovle_jax.errors import UserError
from hovle_jax.nn import dinov3, internvit, siglip  # noqa: F401  (they register themselves)
from hovle_jax.nn.layers import axis_names
from hovle_jax.nn.vit import TEACHERS


def init(rng: jax.Array, config: TeacherConfig) -> dict[str, Any]:
    """Random parameters, float32, as a nested dict."""
    return nn.unbox(_boxed_init(rng, config))


def abstract_params(config: TeacherConfig) -> dict[str, Any]:
    return jax.eval_shape(functools.partial(init, config=config), jax.random.key(0))


def param_axes(config: TeacherConfig) -> dict[str, Any]:
    """Axis names of every parameter, as `sharding.RULES` knows them."""
    boxed = jax.eval_shape(functools.partial(_boxed_init, config=config), jax.random.key(0))
    return axis_names(boxed)


def _module(config: TeacherConfig, keep_hidden: bool = False) -> nn.Module:
    return TEACHERS.find(config.kind)(config, keep_hidden)  # type: ignore[call-arg]


def _boxed_init(rng: jax.Array, config: TeacherConfig) -> dict[str, Any]:
    tile = jnp.zeros((1, config.image_size, config.image_size, 3), jnp.uint8)
    whole = dataclasses.replace(config, select_layer=-1)
    # A teacher may have no parameters.
    return dict(_module(whole).init(rng, tile).get("params", {}))


def apply(
    params: dict[str, Any], pixels: jax.Array, config: TeacherConfig, *, keep_hidden: bool = False
) -> dict[str, jax.Array]:
    """pixels [..., H, W, 3] uint8 -> {"hidden" [..., K + P, C], "features" [..., T, E]}.

    K prefix tokens (class, registers) come first. Only the layers up to `select_layer` run (-1: all
    of them, -2: all but the last, 1: the first). keep_hidden: and {"layers" [L, ..., P, C]}, what
    each of them gives.
    """
    lead = pixels.shape[:-3]
    if "layers" in params:
        used = config.used_layers
        params = params | {"layers": jax.tree.map(lambda x: x[:used], params["layers"])}
    flat = pixels.reshape(-1, *pixels.shape[-3:])
    out: Any = _module(config, keep_hidden).apply({"params": params}, flat)
    layers = out.pop("layers", None)
    out = {k: v.reshape(*lead, *v.shape[1:]) for k, v in out.items()}
    if layers is not None:
        out["layers"] = layers.reshape(len(layers), *lead, *layers.shape[2:])
    return out


def targets(
    params: dict[str, Any],
    pixels: jax.Array,
    config: TeacherConfig,
    tokens: int,
    *,
    layer_places: int = 0,
) -> dict[str, jax.Array]:
    """What a student of `tokens` per tile is held against, float32, without gradient.

    The student's tiles [..., H, W, 3] are resized to the teacher's own size, its features to the
    student's grid; both only where they differ. -> {"features" [..., tokens, E]} and, with
    layer_places, {"layers" [L, ..., layer_places, C]}.
    """
    side = config.image_size
    if pixels.shape[-3:-1] != (side, side):
        pixels = resize_pixels(pixels, side)
    out = apply(params, pixels, config, keep_hidden=layer_places > 0)
    if layer_places and "layers" not in out:
        raise UserError(f"config.distill.layers: teacher {config.kind!r} keeps no hidden states")
    sizes = {"features": tokens} | ({"layers": layer_places} if layer_places else {})
    found = {name: jax.lax.stop_gradient(out[name]).astype(jnp.float32) for name in sizes}
    return {name: resize_grid(x, sizes[name]) for name, x in found.items()}


def resize_pixels(pixels: jax.Array, side: int) -> jax.Array:
    """[..., H, W, C] -> [..., side, side, C]: bicubic with antialiasing, as Pillow's up to its
    intermediate rounding. uint8 stays uint8."""
    shape = (*pixels.shape[:-3], side, side, pixels.shape[-1])
    x = jax.image.resize(pixels.astype(jnp.float32), shape, "cubic", antialias=True)
    return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8) if pixels.dtype == jnp.uint8 else x


def resize_grid(x: jax.Array, tokens: int) -> jax.Array:
    """[..., g^2, C] -> [..., tokens, C]: linear between the centres of places, with antialiasing
    where they become fewer. Left alone where they are as many."""
    *lead, places, width = x.shape
    if places == tokens:
        return x
    side, grid = math.isqrt(places), math.isqrt(tokens)
    if (side**2, grid**2) != (places, tokens):
        raise UserError(
            f"config.teacher: {places} features cannot be laid over the {tokens} tokens of a tile; "
            "take a compressor whose tokens are a square"
        )
    x = x.reshape(*lead, side, side, width)
    x = jax.image.resize(x, (*lead, grid, grid, width), "linear", antialias=True)
    return x.reshape(*lead, tokens, width)
