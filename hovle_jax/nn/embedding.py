"""The holistic embedding module: pixels and token ids -> vectors the LLM reads as its own.

    tiles -> patch embedding + position -> ['pre': compressor] -----------+
    ids   -> text table --------------------------------------------------+-> causal layers
          -> ['post': compressor on image positions] -> LLM input

    B rows   S tokens   N tiles per row   P patches per tile   T tokens per tile   E width
    R patches become one token (P = R T)   Z = S + N (P - T), the long stream

'post' (HoVLE-HD) runs the layers over the *long stream*, in which a tile takes P places instead of
T. The long stream is computed here from the short one, so data, packing and labels know one stream.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.config import IMAGE_MEAN, IMAGE_STD, ModelConfig
from hovle_jax.nn.compressors import COMPRESSORS
from hovle_jax.nn.layers import Cache, LayerInputs, Linear, named
from hovle_jax.nn.stack import layer_stack, run_stack
from hovle_jax.nn.text_table import TextTable
from hovle_jax.sharding import constrain


def normalize_pixels(
    pixels: jax.Array,
    dtype: Any,
    mean: Sequence[float] = IMAGE_MEAN,
    std: Sequence[float] = IMAGE_STD,
) -> jax.Array:
    """uint8 [..., 3] -> normalised `dtype`; floating input counts as normalised already."""
    if pixels.dtype == jnp.uint8:
        pixels = (pixels.astype(jnp.float32) / 255.0 - jnp.array(mean)) / jnp.array(std)
    return pixels.astype(dtype)


def patchify(pixels: jax.Array, patch: int) -> jax.Array:
    """[..., H, W, C] -> [..., (H/patch)(W/patch), patch, patch, C], patches row-major."""
    *lead, h, w, c = pixels.shape
    x = pixels.reshape(*lead, h // patch, patch, w // patch, patch, c)
    x = jnp.swapaxes(x, -4, -3)
    return x.reshape(*lead, (h // patch) * (w // patch), patch, patch, c)


def resize_positions(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """[g*g, E] -> [rows*columns, E] as torch's bicubic (a = -0.75, no antialias, half-pixel)."""
    size = math.isqrt(table.shape[0])
    if grid == (size, size):
        return table
    rows, columns = (_bicubic_matrix(size, n) for n in grid)
    x = table.astype(jnp.float32).reshape(size, size, -1)
    x = jnp.einsum("ij,kl,jle->ike", rows, columns, x)
    return x.reshape(grid[0] * grid[1], -1).astype(table.dtype)


def _bicubic_matrix(size: int, out: int) -> np.ndarray:
    """float32 [out, size]: cubic convolution weights, neighbours clamped at the border."""
    a = -0.75
    matrix = np.zeros((out, size), np.float32)
    for i in range(out):
        x = (i + 0.5) * size / out - 0.5
        left = int(np.floor(x))
        for j in range(left - 1, left + 3):
            d = abs(x - j)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(j, 0), size - 1)] += near if d <= 1 else far if d < 2 else 0.0
    return matrix


class PatchEmbedding(nn.Module):
    """Patch projection + learned position (row 0 of the table belongs to a class token: unused)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[..., H, W, 3] -> [..., patches, E]; H and W any multiples of the patch size."""
        c = self.config
        x = patchify(normalize_pixels(pixels, c.dtype), c.patch_size)
        axes = ("patch", "patch", "patch", "embed")
        x = Linear((c.hidden_size,), axes, c.initializer_range, bias=True, name="patch")(x)
        init = named(nn.initializers.normal(c.initializer_range), "patch", "embed")
        table = self.param("position", init, (c.grid**2 + 1, c.hidden_size), jnp.float32)
        grid = (pixels.shape[-3] // c.patch_size, pixels.shape[-2] // c.patch_size)
        return x + resize_positions(table[1:], grid).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """A token sequence as one of the two stacks sees it; every array is [B, length]."""

    ids: jax.Array
    segment_ids: jax.Array
    position_ids: jax.Array
    places: jax.Array  # [B, S]: where each token of the short stream (first) lies in this one


def short_stream(ids: jax.Array, segment_ids: jax.Array, position_ids: jax.Array) -> Stream:
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return Stream(ids, segment_ids, position_ids, places)


def long_stream(short: Stream, num_tiles: int, config: ModelConfig) -> Stream:
    """The stream with a place for every patch of a tile, tile by tile, in patch order.

    Needs positions that count up by one inside each segment, which is what a segment is.
    """
    ratio = config.patches_per_token
    length = short.ids.shape[1] + num_tiles * config.extra_places_per_tile
    width = jnp.where(short.ids == config.img_context_id, ratio, 1)
    ends = jnp.cumsum(width, axis=1)
    starts = ends - width
    index = jnp.arange(length)

    def row(
        ids: jax.Array, segments: jax.Array, positions: jax.Array, starts: jax.Array, end: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        source = jnp.clip(jnp.searchsorted(end, index, side="right"), 0, ids.shape[0] - 1)
        first = jnp.clip(source - positions[source], 0)  # where this token's segment begins
        inside = index < end[-1]
        return (
            jnp.where(inside, ids[source], config.pad_id),
            jnp.where(inside, segments[source], 0),
            jnp.clip(index - starts[first], 0),
        )

    ids, segments, positions = jax.vmap(row)(
        short.ids, short.segment_ids, short.position_ids, starts, ends
    )
    return Stream(ids, segments, positions, starts)


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, L, E], index [B, S] -> [B, S, E]; out-of-range places give some row, to be masked."""
    return jnp.take_along_axis(x, index[..., None], axis=1, mode="clip")


def image_order(ids: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """(is an image token [B, L], its rank among the row's image tokens [B, L])."""
    is_image = ids == config.img_context_id
    return is_image, jnp.cumsum(is_image, axis=1) - 1


class HolisticEmbedding(nn.Module):
    config: ModelConfig
    keep_cache: bool = False
    keep_hidden: bool = False
    cached: bool = False

    def setup(self) -> None:
        c = self.config
        self.vision = PatchEmbedding(c)
        self.projector = COMPRESSORS.find(c.compressor)(c)
        self.text = TextTable(c)
        self.layers = layer_stack(
            c.embedding,
            c.attention,
            c.remat,
            keep_cache=self.keep_cache,
            keep_hidden=self.keep_hidden,
            cached=self.cached,
        )

    def __call__(
        self,
        short: Stream,
        stream: Stream,
        inputs: LayerInputs,
        pixels: jax.Array | None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """-> (LLM input [B, S, E], extras).

        `stream` is what the layers run over: `short` itself for 'pre', its long form for 'post'.
        pixels: [B, N, H, W, 3] uint8 (or normalised floats), tiles in order of appearance; None
        for text alone. Tiles without tokens (padding) are computed and never read.
        """
        c = self.config
        extras: dict[str, Any] = {}
        x = self.text(stream.ids)
        if pixels is not None:
            image = self.vision(pixels)  # [B, N, P, E]
            extras["vision_embeddings"] = image
            if c.shuffle_loc == "pre":
                extras["projected"] = image = self.projector(image)  # [B, N, T, E]
            is_image, rank = image_order(stream.ids, c)
            image = image.reshape(image.shape[0], -1, image.shape[-1])
            x = jnp.where(is_image[..., None], take(image, rank), x)
        x = constrain(x, "batch", "length", "act_embed")
        extras["embed_input"] = x
        x, layer_extras = run_stack(self.layers, x, inputs, cache)
        extras |= layer_extras
        if c.shuffle_loc == "post":
            x, projected = self._to_short(x, short, stream, pixels)
            if projected is not None:
                extras["projected"] = projected
        if c.normalize_embeddings:
            x = x / jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True).astype(x.dtype)
        return x, extras

    def _to_short(
        self, x: jax.Array, short: Stream, stream: Stream, pixels: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Long outputs [B, Z, E] -> [B, S, E]: text copied, image positions compressed.

        Also returns the projected tiles, [B, N, T, E].
        """
        c = self.config
        text = take(x, stream.places)
        if pixels is None:
            return text, None
        tiles, patches = pixels.shape[1], (pixels.shape[-2] // c.patch_size) ** 2
        counts = jnp.cumsum(stream.ids == c.img_context_id, axis=1)
        ranks = jnp.arange(tiles * patches)
        places = jax.vmap(lambda row: jnp.searchsorted(row, ranks + 1))(counts)
        image = take(x, places).reshape(x.shape[0], tiles, patches, -1)
        projected = self.projector(image)
        image = projected.reshape(x.shape[0], -1, x.shape[-1])
        is_image, rank = image_order(short.ids, c)
        return jnp.where(is_image[..., None], take(image, rank), text), projected
