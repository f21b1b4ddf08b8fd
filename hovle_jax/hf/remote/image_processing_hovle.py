# SPDX-License-Identifier: Apache-2.0
"""Images to normalised tiles for HoVLE: InternVL's dynamic tiling, bit for bit."""

import functools
import os
from typing import TypedDict

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image


@functools.cache
def _grids(min_tiles, max_tiles):
    """All (cols, rows) with min_tiles <= cols * rows <= max_tiles, by area, then by columns."""
    grids = [
        (cols, rows)
        for cols in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // cols + 1)
        if cols * rows >= min_tiles
    ]
    return sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0]))


def choose_grid(width, height, image_size, min_tiles, max_tiles):
    """The (cols, rows) nearest to the image's aspect ratio.

    On an exact tie the larger grid wins if the image fills more than half of it.
    """
    aspect = width / height
    best, best_distance = (1, 1), float("inf")
    for cols, rows in _grids(min_tiles, max_tiles):
        distance = abs(aspect - cols / rows)
        if distance < best_distance or (
            distance == best_distance and width * height > 0.5 * image_size**2 * cols * rows
        ):
            best, best_distance = (cols, rows), distance
    return best


def resize(image, width, height):
    """Bicubic resize of a PIL image, equal to Pillow <= 12.3 under any Pillow.

    Pillow rounds to uint8 between its two passes, so their order shows in the pixels. Up to 12.3
    the horizontal pass came first, as when the model was trained; Pillow 13 swaps them for some
    sizes. One call per axis fixes the order.
    """
    bicubic = Image.Resampling.BICUBIC
    return image.resize((width, image.height), bicubic).resize((width, height), bicubic)


def tile_image(image, image_size, min_tiles, max_tiles, thumbnail):
    """Cuts an RGB image into tiles.

    Returns uint8 [tiles, S, S, 3], row-major; the whole image, squeezed into one tile, comes last
    if `thumbnail` is set and there is more than one tile.
    """
    cols, rows = choose_grid(image.width, image.height, image_size, min_tiles, max_tiles)
    pixels = np.asarray(resize(image, cols * image_size, rows * image_size))
    tiles = pixels.reshape(rows, image_size, cols, image_size, 3).swapaxes(1, 2)
    tiles = tiles.reshape(rows * cols, image_size, image_size, 3)
    if thumbnail and len(tiles) > 1:
        whole = np.asarray(resize(image, image_size, image_size))
        tiles = np.concatenate([tiles, whole[None]])
    return tiles


def open_rgb(image):
    """A PIL image, path, URL, base64 text, array or tensor as an RGB PIL image.

    EXIF orientation of PIL images and files is not applied, as in training.
    """
    if isinstance(image, os.PathLike) or (isinstance(image, str) and os.path.isfile(image)):
        with Image.open(image) as opened:
            return opened.convert("RGB")
    image = load_image(image) if isinstance(image, str) else to_pil_image(image)
    return image.convert("RGB")


def as_samples(images):
    """One image, a list of images (one sample) or a list of lists -> a list of lists."""
    if not isinstance(images, list | tuple):
        return [[images]]
    if images and all(isinstance(sample, list | tuple) for sample in images):
        return [list(sample) for sample in images]
    return [list(images)]


class TilingKwargs(TypedDict, total=False):
    """What a call may set differently."""

    min_dynamic_patch: int
    max_dynamic_patch: int
    use_thumbnail: bool


class HoVLEImageProcessor(BaseImageProcessor):
    """Cuts images into tiles of S x S pixels and normalises them.

    Args:
      image_size: S.
      min_dynamic_patch: fewest tiles of an image.
      max_dynamic_patch: most tiles of an image, thumbnail not included; the images of a sample
        share it.
      use_thumbnail: add the whole image as a tile where there is more than one.
      image_mean, image_std: per channel, of pixels in [0, 1].
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = TilingKwargs

    def __init__(
        self,
        image_size=448,
        min_dynamic_patch=1,
        max_dynamic_patch=12,
        use_thumbnail=True,
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.image_size = image_size
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        self.use_thumbnail = use_thumbnail
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(self, images, return_tensors=None, **kwargs):
        """Tiles of one or more samples.

        Args:
          images: an image (PIL, path, URL, base64 text, array or tensor), a list of them, which
            is one sample, or a list of lists, one per sample.
          return_tensors: "pt", "np" or None.
          **kwargs: as `TilingKwargs`.

        Returns:
          `BatchFeature` of pixel_values, float32 [total tiles, 3, S, S], and num_patches, the
          tiles of every image.
        """
        tiles = []
        for sample in as_samples(images):
            limits = self._limits(len(sample), **kwargs)
            tiles += [tile_image(open_rgb(image), self.image_size, *limits) for image in sample]
        empty = np.zeros((0, self.image_size, self.image_size, 3), np.uint8)
        data = {
            "pixel_values": self._normalize(np.concatenate([empty, *tiles])),
            "num_patches": [len(t) for t in tiles],
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def count_patches(self, image_sizes, **kwargs):
        """Tiles of every image of one sample: [tiles], from [(height, width)]."""
        low, high, thumbnail = self._limits(len(image_sizes), **kwargs)
        counts = []
        for height, width in image_sizes:
            cols, rows = choose_grid(width, height, self.image_size, low, high)
            counts.append(cols * rows + (thumbnail and cols * rows > 1))
        return counts

    def get_number_of_image_patches(self, height, width, images_kwargs=None):
        """Tiles of an image that is alone in its sample; the name serving backends call."""
        kwargs = {
            k: v for k, v in (images_kwargs or {}).items() if k in TilingKwargs.__annotations__
        }
        return self.count_patches([(height, width)], **kwargs)[0]

    def _limits(self, images, min_dynamic_patch=None, max_dynamic_patch=None, use_thumbnail=None):
        """(min, max, thumbnail) of each of the images of a sample, which share the budget."""
        low = self.min_dynamic_patch if min_dynamic_patch is None else min_dynamic_patch
        high = self.max_dynamic_patch if max_dynamic_patch is None else max_dynamic_patch
        thumbnail = self.use_thumbnail if use_thumbnail is None else use_thumbnail
        if not 1 <= low <= high:
            raise ValueError(
                f"min_dynamic_patch={low}, max_dynamic_patch={high}: need 1 <= min <= max"
            )
        high = max(1, high // max(images, 1))
        return min(low, high), high, bool(thumbnail)

    def _normalize(self, tiles):
        """uint8 [tiles, S, S, 3] -> float32 [tiles, 3, S, S]."""
        mean, std = (np.float32(v) for v in (self.image_mean, self.image_std))
        pixels = (tiles.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
