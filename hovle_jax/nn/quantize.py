"""int8 for memory's sake: matrices while generating, keys and values in caches.

Symmetric, each number beside a scale it shares with its channel (matrices: all that makes one
output) or with its head of one token (keys, values):

    x = values * scale,  |values| <= 127,  error of x at most scale / 2 = max |x| / 254

Arithmetic stays in the model's dtype. A matrix "kernel" in int8 has its scales beside it, as
"kernel_scale"; an array "k" of a cache as "k_scale".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

WIDE = {"q", "k", "v"}  # matrices whose outputs are (head, place in the head)


def quantize(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(values int8, scale float32 without `axes`); numbers along `axes` share a scale."""
    wide = jnp.asarray(x, jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=axes, keepdims=True) / 127
    values = jnp.round(wide / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return values, jnp.squeeze(scale, axes)


def quantize_heads(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """{"k": [..., D]} -> {"k": int8 [..., D], "k_scale": float32 [...]}."""
    out = {}
    for name, x in arrays.items():
        out[name], out[f"{name}_scale"] = quantize(x, (x.ndim - 1,))
    return out


def dequantize_heads(cache: Mapping[str, jax.Array], name: str, dtype: Any) -> jax.Array:
    """The array `name` of a cache of either kind, in `dtype`."""
    x = cache[name]
    if f"{name}_scale" in cache:
        x = x.astype(jnp.float32) * cache[f"{name}_scale"][..., None]
    return x.astype(dtype)


def quantize_kernels(params: Any, name: str = "") -> Any:
    """Parameters of layers apart (`generation.decode`) with every matrix in int8.

    The text table stays: a step reads one row of it for each token.
    """
    if isinstance(params, tuple):
        return tuple(quantize_kernels(layer) for layer in params)
    if not isinstance(params, dict):
        return params
    out = {key: quantize_kernels(value, key) for key, value in params.items()}
    kernel = out.get("kernel")
    if kernel is not None and kernel.dtype != jnp.int8:
        inputs = tuple(range(kernel.ndim - (2 if name in WIDE else 1)))
        out["kernel"], out["kernel_scale"] = quantize(kernel, inputs)
    return out
