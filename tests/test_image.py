"""Tiling against what the reference computed (Pillow 12.1) and against the published grid table."""

import hashlib
import io
import json
import pathlib

import numpy as np
import PIL
import pytest
from PIL import Image

from hovle_jax.data import image as image_lib
from hovle_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parent / "golden" / "preproc"
IMAGES = json.loads((GOLDEN / "preproc.json").read_text())["images"]

# (width, height): grid for at most 6 tiles, for at most 12 tiles.
VECTORS = {
    (800, 1300): ((2, 3), (2, 3)),
    (448, 448): ((1, 1), (1, 1)),
    (640, 480): ((3, 2), (4, 3)),
    (1000, 1000): ((2, 2), (3, 3)),
    (1920, 1080): ((2, 1), (4, 2)),
    (1344, 896): ((3, 2), (3, 2)),
    (300, 200): ((3, 2), (3, 2)),
    (2000, 2000): ((2, 2), (3, 3)),
    (4000, 3000): ((3, 2), (4, 3)),
    (100, 1000): ((1, 6), (1, 10)),
}


def sha256(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def encoded(image: Image.Image, image_format: str) -> bytes:
    out = io.BytesIO()
    image.save(out, image_format)
    return out.getvalue()


@pytest.mark.parametrize("size", VECTORS)
def test_choose_grid_vectors(size):
    got = tuple(image_lib.choose_grid(*size, 448, 1, max_tiles) for max_tiles in (6, 12))
    assert got == VECTORS[size]


def test_choose_grid_exactly_half_full_is_not_enough():
    """24.5 is as near to 24 as to 25, and 980 * 40 is half the pixels of 25 tiles."""
    assert image_lib.choose_grid(980, 40, 56, 1, 25) == (24, 1)
    assert image_lib.choose_grid(1029, 42, 56, 1, 25) == (25, 1)


def test_choose_grid_full_table():
    table = np.load(GOLDEN / "grid_table.npz")
    for image_size in (448, 56):
        got = [
            [
                image_lib.choose_grid(w, h, image_size, lo, hi)
                for lo, hi in table["settings"].tolist()
            ]
            for w, h in table["wh"].tolist()
        ]
        np.testing.assert_array_equal(got, table[f"choice_{image_size}"])


def test_choose_grid_follows_the_rule_for_all_sizes_and_limits():
    """InternVL's rule as published, all sizes at once: candidates in the order of a Python set,
    then by area; the nearest ratio, and on a tie the later one if the image fills half of it."""
    sides = np.arange(1, 2000, 37)
    width, height = (a.ravel() for a in np.meshgrid(sides, sides))
    for most in range(1, 41):
        grids = {
            (i, j)
            for n in range(1, most + 1)
            for i in range(1, n + 1)
            for j in range(1, n + 1)
            if 1 <= i * j <= most
        }
        best = np.full((len(width), 2), 1)
        nearest = np.full(len(width), np.inf)
        for i, j in sorted(grids, key=lambda grid: grid[0] * grid[1]):
            distance = np.abs(i / j - width / height)
            tie = (distance == nearest) & (width * height > 0.5 * 448 * 448 * i * j)
            taken = (distance < nearest) | tie
            best[taken] = i, j
            nearest = np.where(taken, distance, nearest)
        found = [
            image_lib.choose_grid(w, h, 448, 1, most)
            for w, h in zip(width.tolist(), height.tolist(), strict=True)
        ]
        np.testing.assert_array_equal(found, best, err_msg=str(most))


@pytest.mark.parametrize("max_tiles, count", [(6, 14), (12, 35), (24, 84), (27, 95), (40, 158)])
def test_number_of_candidate_grids(max_tiles, count):
    assert len(image_lib._grids(1, max_tiles)) == count


def test_impossible_tile_limits():
    with pytest.raises(UserError, match="min_tiles=3, max_tiles=2"):
        image_lib.choose_grid(10, 10, 448, 3, 2)
    with pytest.raises(UserError, match="min_tiles=0"):
        image_lib.choose_grid(10, 10, 448, 0, 2)


@pytest.mark.parametrize("case", IMAGES, ids=lambda case: case["file"])
def test_tiles_equal_the_reference(case):
    path = str(GOLDEN / case["file"])
    image = image_lib.open_image(path, "row")
    assert image_lib.image_size_of(path, "row") == image.size == (case["width"], case["height"])
    assert sha256(np.asarray(image)) == case["rgb_sha256"]
    for run in case["runs"]:
        tiling = {
            "image_size": run["image_size"],
            "min_tiles": run["min_num"],
            "max_tiles": run["max_num"],
        }
        tiles = image_lib.tile_image(image, **tiling, thumbnail=True)
        assert tiles.dtype == np.uint8
        assert [sha256(tile) for tile in tiles] == run["u8_tile_sha256"]
        count = image_lib.count_tiles(*image.size, **tiling, thumbnail=True)
        assert count == len(tiles) == run["tiles_thumb"]
        bare = image_lib.tile_image(image, **tiling, thumbnail=False)
        np.testing.assert_array_equal(bare, tiles[: run["tiles_no_thumb"]])
        count = image_lib.count_tiles(*image.size, **tiling, thumbnail=False)
        assert count == len(bare) == run["cols"] * run["rows"]


def test_resize_passes_are_pillows_own():
    """Where one axis keeps its size no Pillow has an order to choose; before 13 none ever did."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 91, 3), np.uint8)
    image = Image.fromarray(pixels)
    both_axes = [(91, 5), (40, 20), (200, 7)] if int(PIL.__version__.split(".")[0]) < 13 else []
    for size in ((40, 37), (91, 64), *both_axes):
        expected = image.resize(size, Image.Resampling.BICUBIC)
        assert image_lib.resize(image, *size).tobytes() == expected.tobytes()


def test_transparency_is_dropped_not_blended():
    rgba = Image.new("RGBA", (4, 2), (10, 20, 30, 0))
    image = image_lib.open_image(encoded(rgba, "PNG"), "row")
    assert image.mode == "RGB"
    assert image.getpixel((3, 1)) == (10, 20, 30)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK"])
def test_every_mode_is_read_as_pillow_converts_it(mode, tmp_path):
    y, x = np.mgrid[:9, :11]
    colours = np.stack([x * 23, y * 28, 255 - x * 11], axis=-1).astype(np.uint8)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(colours).convert(mode).save(path)
    with Image.open(path) as stored:
        expected = np.asarray(stored.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(image_lib.open_image(str(path), "here")), expected)


def test_sixteen_bit_grey_keeps_its_upper_bits(tmp_path):
    """A scan of 16 bits would be a white page to `convert("RGB")`."""
    values = np.linspace(0, 65535, 99).reshape(9, 11).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        found = np.asarray(image_lib.open_image(str(tmp_path / name), "here"))
        np.testing.assert_array_equal(found, np.repeat((values >> 8)[..., None], 3, axis=2))


def test_exif_orientation_is_not_applied_as_in_the_reference(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert image_lib.open_image(str(tmp_path / "a.jpg"), "here").size == (8, 4)


def test_pixels_are_tested_before_a_run(monkeypatch):
    image_lib.self_test()

    def vertical_first(image, width, height):
        return image.resize((image.width, height), 3).resize((width, height), 3)

    monkeypatch.setattr(image_lib, "resize", vertical_first)
    with pytest.raises(UserError, match="makes other pixels"):
        image_lib.self_test()


def test_missing_image():
    for read in (image_lib.open_image, image_lib.image_size_of):
        with pytest.raises(UserError, match=r"^a.jsonl:3: image file not found: no/such.png$"):
            read("no/such.png", "a.jsonl:3")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_truncated_image_names_file_and_row(tmp_path, image_format):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(pixels), image_format)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"^a.jsonl:3: cannot read image .*cut.img \(.*truncated"):
        image_lib.open_image(str(path), "a.jsonl:3")
    # The header is intact, so the size is known: only decoding finds out.
    assert image_lib.image_size_of(str(path), "a.jsonl:3") == (64, 64)


@pytest.mark.parametrize("error", [NotImplementedError("flags 3"), TypeError("t"), MemoryError()])
def test_whatever_a_decoder_raises_names_the_row(monkeypatch, error):
    """Pillow's DDS and TIFF decoders raise the first two for some damaged files."""

    def broken(_):
        raise error

    monkeypatch.setattr(Image, "open", broken)
    for read in (image_lib.open_image, image_lib.image_size_of):
        with pytest.raises(UserError, match="^rows:7: cannot read image a.dds"):
            read("a.dds", "rows:7")


def test_a_picture_of_absurd_height_is_refused_before_its_pixels():
    data = io.BytesIO()
    Image.new("1", (1, 65_536)).save(data, format="PNG")
    for read in (image_lib.open_image, image_lib.image_size_of):
        with pytest.raises(UserError, match="^rows:7: .*65536 pixels high"):
            read(data.getvalue(), "rows:7")


def test_not_an_image():
    for read in (image_lib.open_image, image_lib.image_size_of):
        with pytest.raises(UserError, match=r"^a.jsonl:3: .* 5 embedded bytes .*not an image"):
            read(b"hello", "a.jsonl:3")


def test_what_jpeg_cannot_hold_is_not_recompressed():
    for side in (65_500, 65_501):
        image = Image.effect_noise((side, 8), 90).convert("RGB")
        assert (image_lib.recompress(image, 75) is image) == (side == 65_501)
        tall = image.transpose(Image.Transpose.ROTATE_90)
        assert (image_lib.recompress(tall, 75) is tall) == (side == 65_501)
