"""From the patches of a tile to the tokens that stand for it.

    E width   P patches per tile, row by row   T tokens per tile

A compressor runs before the holistic layers ('pre') or after them ('post'), always on one tile.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from hovle_jax.config import ModelConfig
from hovle_jax.errors import UserError
from hovle_jax.nn.layers import Linear
from hovle_jax.registry import Registry


class Compressor(nn.Module):
    """The protocol of COMPRESSORS. Its parameters lie under `embedding/projector`."""

    config: ModelConfig

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., P, E] -> [..., T, E]."""
        raise NotImplementedError

    @staticmethod
    def tokens_per_tile(config: ModelConfig) -> int:
        """T of a tile of `image_size`; UserError: settings it cannot work with."""
        raise NotImplementedError

    @staticmethod
    def params(config: ModelConfig) -> int:
        """How many it has."""
        raise NotImplementedError


COMPRESSORS: Registry[type[Compressor]] = Registry("model.compressor")


def pixel_shuffle(x: jax.Array, factor: int, version: str = "v2") -> jax.Array:
    """[..., g*g, C] -> [..., (g/f)^2, f*f*C]: each f x f block of places becomes one.

    Channels are ordered (row offset, column offset, channel). InternVL's 'v1' leaves the places in
    column-major order.
    """
    *lead, places, c = x.shape
    g = math.isqrt(places)
    x = x.reshape(*lead, g // factor, factor, g // factor, factor, c)
    x = jnp.swapaxes(x, -4, -3)  # [..., row, column, row offset, column offset, C]
    if version == "v1":
        x = jnp.swapaxes(x, -5, -4)
    return x.reshape(*lead, (g // factor) ** 2, factor * factor * c)


@COMPRESSORS.add("pixel_shuffle")
class PixelShuffle(Compressor):
    """Pixel shuffle, then linear - GELU (erf) - linear; no norm, unlike InternVL's mlp1.

    `model.shuffle` is the side of a block, `model.projector` says whether the MLP is there.
    """

    @staticmethod
    def tokens_per_tile(c: ModelConfig) -> int:
        if c.grid % c.shuffle:
            raise UserError(
                f"model.image_size {c.image_size} is not a multiple of patch_size x shuffle "
                f"({c.patch_size} x {c.shuffle})"
            )
        if not c.projector and c.shuffle != 1:
            raise UserError("model.projector=False needs model.shuffle=1 (nothing restores width)")
        return (c.grid // c.shuffle) ** 2

    @staticmethod
    def params(c: ModelConfig) -> int:
        d = c.hidden_size
        return (c.shuffle**2 * d * d + d + d * d + d) if c.projector else 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = pixel_shuffle(x, c.shuffle)
        if not c.projector:
            return x
        std = c.initializer_range
        x = Linear((c.hidden_size,), ("embed", "mlp"), std, bias=True, name="fc1")(x)
        x = jax.nn.gelu(x, approximate=False)
        return Linear((c.hidden_size,), ("mlp", "embed"), std, bias=True, name="fc2")(x)
