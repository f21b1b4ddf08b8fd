"""Images to tiles by name (`config.data.tiler`): how many tiles an image takes, and their pixels.

    dynamic   InternVL's: the grid nearest to the image's shape, stretched to fill it (image.py)
    native    the image's own size and shape: it is never enlarged or stretched, what it leaves of
              its tiles is grey; too large for the tiles there are, it shrinks until it fits

All tiles are squares of `image_size` pixels, since a batch is of static shape.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from hovle_jax.data import image
from hovle_jax.errors import UserError
from hovle_jax.registry import Registry

GREY = (124, 116, 104)  # ImageNet's mean: nearly zero to the model


class TileLimits(NamedTuple):
    image_size: int  # side of a tile in pixels
    least: int  # tiles of an image
    most: int  # the thumbnail not included
    thumbnail: bool  # the whole image once more where it has several tiles


class TilePolicy(Protocol):
    """Pure functions. With `most` of 1 there is one tile, whatever the image (nobody asks then)."""

    def count(self, width: int, height: int, limits: TileLimits) -> int:
        """Tiles of an image of this size, the thumbnail included; from its header alone."""
        ...

    def cut(self, picture: Image.Image, limits: TileLimits) -> np.ndarray:
        """RGB -> uint8 [count, image_size, image_size, 3], the thumbnail last."""
        ...


TILERS: Registry[TilePolicy] = Registry("config.data.tiler")


class Dynamic:
    def count(self, width: int, height: int, limits: TileLimits) -> int:
        size, least, most, thumbnail = limits
        return image.count_tiles(
            width, height, image_size=size, min_tiles=least, max_tiles=most, thumbnail=thumbnail
        )

    def cut(self, picture: Image.Image, limits: TileLimits) -> np.ndarray:
        size, least, most, thumbnail = limits
        return image.tile_image(
            picture, image_size=size, min_tiles=least, max_tiles=most, thumbnail=thumbnail
        )


class Native:
    def count(self, width: int, height: int, limits: TileLimits) -> int:
        _, columns, rows = _fit(width, height, limits)
        return columns * rows + (limits.thumbnail and columns * rows > 1)

    def cut(self, picture: Image.Image, limits: TileLimits) -> np.ndarray:
        size = limits.image_size
        scale, columns, rows = _fit(picture.width, picture.height, limits)
        canvas = _padded(picture, scale, columns * size, rows * size)
        tiles = canvas.reshape(rows, size, columns, size, 3).swapaxes(1, 2)
        tiles = tiles.reshape(-1, size, size, 3)
        if limits.thumbnail and columns * rows > 1:
            whole = min(size / picture.width, size / picture.height)
            tiles = np.concatenate([tiles, _padded(picture, whole, size, size)[None]])
        return tiles


def _fit(width: int, height: int, limits: TileLimits) -> tuple[float, int, int]:
    """(scale, columns, rows): the fewest tiles among those that shrink the image least."""
    size, least, most, _ = limits
    if not 1 <= least <= most:
        raise UserError(f"min_tiles={least}, max_tiles={most}: need 1 <= min_tiles <= max_tiles")
    grids = [
        (min(1.0, columns * size / width, rows * size / height), -columns * rows, columns, rows)
        for columns in range(1, most + 1)
        for rows in range(math.ceil(least / columns), most // columns + 1)
    ]
    scale, _, columns, rows = max(grids)
    return scale, columns, rows


def _padded(picture: Image.Image, scale: float, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: the scaled picture at the top left, grey elsewhere."""
    shape = [
        min(max(round(side * scale), 1), most)
        for side, most in ((picture.width, width), (picture.height, height))
    ]
    canvas = np.full((height, width, 3), GREY, np.uint8)
    same = shape == [picture.width, picture.height]
    canvas[: shape[1], : shape[0]] = np.asarray(picture if same else image.resize(picture, *shape))
    return canvas


TILERS.add("dynamic")(Dynamic())
TILERS.add("native")(Native())
