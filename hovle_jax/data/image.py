"""Images to tiles: InternVL's `dynamic_preprocess`, bit for bit, on the host.

Tiles stay uint8 here: four times fewer bytes to the device, which does the normalisation
(`embedding.normalize_pixels`).
"""

import functools
import hashlib
import io

import numpy as np
import PIL
from PIL import Image

from hovle_jax.data import files
from hovle_jax.errors import UserError, one_line


def open_image(ref: str | bytes, where: str) -> Image.Image:
    """Decodes an image (a path or encoded bytes) to RGB, completely.

    As the reference does by Pillow's `convert("RGB")`: transparency is dropped, not blended;
    palettes, grey, two levels and CMYK become colours; the first frame of several; EXIF orientation
    is not applied. Other than there, 16-bit grey keeps its upper eight bits: Pillow makes
    everything above 255 white.

    Raises:
      UserError: missing, unreadable, corrupt or truncated; the message starts with `where`.
    """
    try:
        with Image.open(_source(ref, where)) as image:
            _check_height(image)
            if image.mode.startswith("I"):
                upper = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
                return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
            if image.mode != "RGB":
                return image.convert("RGB")
            image.load()  # `convert` would copy the pixels
            return image
    except Exception as e:  # the decoders of damaged files raise every kind
        raise _image_error(ref, where, e) from e


def image_size_of(ref: str | bytes, where: str) -> tuple[int, int]:
    """(width, height) from the header alone; errors as `open_image`, except for truncated data."""
    try:
        with Image.open(_source(ref, where)) as image:
            _check_height(image)
            return image.size
    except Exception as e:
        raise _image_error(ref, where, e) from e


def _check_height(image: Image.Image) -> None:
    """The first pass of a resize keeps the height: a line of two kilobytes would take a minute and
    gigabytes. JPEG and WebP have no such pictures."""
    if image.height > 65_535:
        raise ValueError(f"{image.height} pixels high")


def _source(ref: str | bytes, where: str) -> str | io.BytesIO:
    if isinstance(ref, str) and files.is_remote(ref):
        ref = files.read_bytes(ref, where)
    return io.BytesIO(ref) if isinstance(ref, bytes) else ref


def _image_error(ref: str | bytes, where: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    if isinstance(error, FileNotFoundError):
        return UserError(f"{where}: image file not found: {ref!s}")
    name = f"{len(ref)} embedded bytes" if isinstance(ref, bytes) else ref
    if isinstance(error, Image.UnidentifiedImageError):
        reason = "not an image, or of an unknown format"
    else:
        reason = one_line(error)
    return UserError(f"{where}: cannot read image {name} ({reason}); replace or remove it")


@functools.cache
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (cols, rows) with min_tiles <= cols * rows <= max_tiles, by area, then by columns.

    The reference leaves equal areas in the order of a Python set; it picks the same grid.
    """
    if not 1 <= min_tiles <= max_tiles:
        raise UserError(
            f"min_tiles={min_tiles}, max_tiles={max_tiles}: need 1 <= min_tiles <= max_tiles"
        )
    grids = [
        (cols, rows)
        for cols in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // cols + 1)
        if cols * rows >= min_tiles
    ]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])))


def choose_grid(
    width: int, height: int, image_size: int, min_tiles: int, max_tiles: int
) -> tuple[int, int]:
    """The (cols, rows) nearest to the image's aspect ratio: InternVL `find_closest_aspect_ratio`.

    On an exact tie the larger grid wins if the image fills more than half of it.

    Raises:
      UserError: not 1 <= min_tiles <= max_tiles.
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


def count_tiles(
    width: int, height: int, *, image_size: int, min_tiles: int, max_tiles: int, thumbnail: bool
) -> int:
    """How many tiles `tile_image` returns for an image of this size, thumbnail included."""
    cols, rows = choose_grid(width, height, image_size, min_tiles, max_tiles)
    return cols * rows + (thumbnail and cols * rows > 1)


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic resize, equal to Pillow <= 12.3 under any Pillow.

    Pillow rounds to uint8 between its two passes, so their order shows in the pixels. Up to 12.3
    the horizontal pass came first, as when the released models were trained; Pillow 13 swaps them
    for some sizes. One call per axis fixes the order.
    """
    bicubic = Image.Resampling.BICUBIC
    return image.resize((width, image.height), bicubic).resize((width, height), bicubic)


def recompress(image: Image.Image, quality: int) -> Image.Image:
    """The image after a JPEG round trip: InternVL's only training augmentation.

    One that JPEG cannot hold, of a side beyond 65,500 pixels, stays as it is.
    """
    if max(image.size) > 65_500:
        return image
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def tile_image(
    image: Image.Image, *, image_size: int, min_tiles: int, max_tiles: int, thumbnail: bool
) -> np.ndarray:
    """Cuts an image into square tiles: InternVL `dynamic_preprocess`.

    Args:
      image: RGB image of any size.
      image_size: Side of a tile in pixels.
      min_tiles: Fewest tiles of the grid.
      max_tiles: Most tiles of the grid, thumbnail not included.
      thumbnail: Append the whole image, squeezed into one tile, if there is more than one tile.

    Returns:
      uint8 [tiles, image_size, image_size, 3], row-major, the thumbnail last.

    Raises:
      UserError: not 1 <= min_tiles <= max_tiles.
    """
    cols, rows = choose_grid(image.width, image.height, image_size, min_tiles, max_tiles)
    extra = int(thumbnail and cols * rows > 1)
    tiles = np.empty((cols * rows + extra, image_size, image_size, 3), np.uint8)
    pixels = np.asarray(resize(image, cols * image_size, rows * image_size))
    pixels = pixels.reshape(rows, image_size, cols, image_size, 3).swapaxes(1, 2)
    tiles[: cols * rows].reshape(pixels.shape)[...] = pixels
    if extra:
        tiles[-1] = np.asarray(resize(image, image_size, image_size))
    return tiles


# sha256 of what `self_test` computes, under Pillow 11.0, 12.3 and 13.0.
_SELF_TEST = "f4622aed17b2e3a7549362c273f558a6ad78cfaf7477ea66e829359dd6a19a98"


def self_test() -> None:
    """Decodes, resizes and encodes a made-up picture and compares the bytes with recorded ones.

    Hosts with different image libraries would train on different pixels without a sound.

    Raises:
      UserError: the pixels are not those of the released model's preprocessing.
    """
    y, x = np.mgrid[:400, :120]
    pattern = np.stack([x * 7 + y * 3, x * y // 5, ((x - 90) ** 2 + (y - 70) ** 2) // 9], axis=-1)
    picture = recompress(Image.fromarray((pattern % 256).astype(np.uint8)), 90)
    # A shape whose passes Pillow 13 swaps by itself.
    found = hashlib.sha256(picture.tobytes() + resize(picture, 112, 56).tobytes()).hexdigest()
    if found != _SELF_TEST:
        raise UserError(
            f"Pillow {PIL.__version__} on this host makes other pixels than the one the data rules "
            "were recorded with (11.0 to 13.0); install one of those"
        )
