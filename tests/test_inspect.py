"""What `hovle data` shows of tiles, prompts, packed rows and lengths is what training reads."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from hovle_jax import output
from hovle_jax.config import IGNORE
from hovle_jax.data import draw, inspect, stats
from hovle_jax.data.pack import assemble
from hovle_jax.data.pipeline import Pipeline
from hovle_jax.data.records import Turn
from hovle_jax.data.samples import Sample
from hovle_jax.data.sources import open_meta
from hovle_jax.data.tokenizer import IMG_CONTEXT, IMG_END, IMG_START, Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.stages import open_pipeline

GOLDEN = pathlib.Path(__file__).parent / "golden" / "preproc"
IMAGES = json.loads((GOLDEN / "preproc.json").read_text())["images"]


@pytest.fixture(scope="module")
def tokenizer(world) -> Tokenizer:
    return Tokenizer.load(world.root / "tokenizer")


@pytest.fixture(scope="module")
def pipeline(world, tokenizer) -> Pipeline:
    return open_pipeline(world.config("instruct"), tokenizer, quiet=True)


@pytest.fixture(scope="module")
def batch(world, pipeline) -> list:
    return inspect.batch_at(world.config("instruct"), pipeline, 3)


def pack(world, *samples: Sample, tokens: int = 40, tiles: int = 3) -> dict[str, np.ndarray]:
    limits = {"tokens": tokens, "tiles": tiles, "image_size": world.model.image_size}
    return assemble(samples, **limits, weights="token", pad_id=world.model.pad_id)


def sample(world, ids: list[int], predicted: int = 0, tiles: int = 0) -> Sample:
    """The last `predicted` tokens have a label."""
    labels = [IGNORE] * (len(ids) - predicted) + ids[len(ids) - predicted :]
    side = world.model.image_size
    pixels = np.full((tiles, side, side, 3), 99, np.uint8)
    return Sample(np.array(ids, np.int32), np.array(labels, np.int32), pixels)


def report_of(*row):
    return inspect.row_report(*row)[0]


def picture_of(row, *more):
    return inspect.draw_row(row, *inspect.row_report(row, *more), "packed row")


def colours(image: Image.Image) -> dict[tuple[int, ...], int]:
    """{colour: pixels}."""
    found, counts = np.unique(np.asarray(image).reshape(-1, 3), axis=0, return_counts=True)
    return {tuple(map(int, c)): int(n) for c, n in zip(found, counts, strict=True)}


@pytest.mark.parametrize("case", IMAGES, ids=lambda case: case["file"])
def test_tiles_are_the_recorded_ones(case):
    for run in case["runs"]:
        limits = (run["image_size"], run["max_num"], run["min_num"])
        report = inspect.cut_tiles(str(GOLDEN / case["file"]), *limits)[0]
        assert (report["cols"], report["rows"]) == (run["cols"], run["rows"])
        assert report["sha256"] == run["u8_tile_sha256"]
        assert (report["width"], report["height"]) == (case["width"], case["height"])
        assert report["mode"] == case["file"].split("_")[2].removesuffix(".png")


def test_tile_command_writes_the_contract_and_a_picture(tmp_path):
    path = str(GOLDEN / "04_640x480_RGB.png")
    files = {"json_file": str(tmp_path / "new" / "tiles.json"), "png": str(tmp_path / "tiles.x")}
    report = inspect.run_tile(path, 56, 6, **files)
    assert json.loads(pathlib.Path(files["json_file"]).read_text()) == report
    assert (report["cols"], report["rows"], len(report["sha256"])) == (3, 2, 7)
    text = inspect.tile_text(report).splitlines()
    assert (
        text[0] == "04_640x480_RGB.png: 640 x 480 RGB -> 3 x 2 tiles + thumbnail of 56 (at most 6)"
    )
    assert "thumbnail" in text[-1] and len(text) == 9
    with Image.open(files["png"]) as picture:
        assert picture.format == "PNG" and picture.width == draw.WIDTH
        assert picture.height > 480
        assert draw.SEGMENTS[4] in colours(picture.convert("RGB")), "grid lines"


@pytest.mark.parametrize("file", ["14_1x1_RGB.png", "16_50x1_RGB.png", "18_10x1000_RGB.png"])
@pytest.mark.parametrize("max_tiles", [1, 40])
def test_tiles_of_any_shape_are_drawn(file, max_tiles):
    picture = inspect.draw_tiles(*inspect.cut_tiles(str(GOLDEN / file), 28, max_tiles))
    assert picture.width == draw.WIDTH and picture.height < 1300


def test_tile_errors(tmp_path):
    with pytest.raises(UserError, match="image file not found"):
        inspect.cut_tiles(str(tmp_path / "no.png"), 56, 6)
    with pytest.raises(UserError, match="image_size=0"):
        inspect.cut_tiles(str(GOLDEN / "14_1x1_RGB.png"), 0, 6)


def test_prompt_is_what_the_model_sees(world, tokenizer, tmp_path):
    config = world.config("instruct")
    images = [str(world.root / "images" / name) for name in ("00.png", "01.jpg")]
    report = inspect.run_prompt(
        "Which colour?", images, config=config, json_file=str(tmp_path / "prompt.json")
    )
    assert json.loads((tmp_path / "prompt.json").read_text()) == report
    size = world.model.tokens_per_tile
    # Two images share the budget of two tiles: one each.
    assert report["images"] == [{"tiles": 1, "tokens": size}] * 2
    run = f"{IMG_START}{IMG_CONTEXT} x {size}{IMG_END}\n"
    expected = f"<s><|im_start|>user\n{run}{run}Which colour?<|im_end|><|im_start|>assistant\n"
    assert report["prompt"] == expected
    assert report["tokens"] == len(report["ids"])
    ids = np.array(report["ids"])
    assert (ids == world.model.img_context_id).sum() == 2 * size
    assert tokenizer.decode(ids, skip_special=False) == expected.replace(
        f"{IMG_CONTEXT} x {size}", IMG_CONTEXT * size
    )
    assert expected in inspect.prompt_text(report)
    with pytest.raises(UserError, match="must end with a user turn"):
        turns = [Turn("user", "a"), Turn("assistant", "b")]
        inspect.prompt_report(turns, [], tokenizer, config.model, config.data)
    with pytest.raises(UserError, match="needs --config or --tokenizer"):
        inspect.run_prompt("a", [])


def test_rows_are_those_of_the_batches(world, pipeline, batch):
    batches = pipeline.batches()
    expected = [next(batches)[0] for _ in range(3)][2]
    assert len(batch) == len(expected["input_ids"])
    for r, (row, _) in enumerate(batch):
        assert all(np.array_equal(row[k], expected[k][r]) for k in expected)
    config = world.config("instruct")
    [(row, origins)] = inspect.batch_at(config, pipeline, 3, 5)
    assert np.array_equal(row["input_ids"], batch[5][0]["input_ids"]) and origins == batch[5][1]
    with pytest.raises(UserError, match="steps count from 1"):
        inspect.batch_at(config, pipeline, 0)
    with pytest.raises(UserError, match="rows 0 to 7"):
        inspect.batch_at(config, pipeline, 1, 8)


def test_a_row_says_what_is_in_it(world, tokenizer, batch):
    records = open_meta(str(world.root / "meta.json"))[0].source
    size = world.model.tokens_per_tile
    for row, origins in batch:
        report = report_of(row, tokenizer, size, origins)
        assert report["problems"] == []
        used = int((row["segment_ids"] > 0).sum())
        assert report["tokens"] == {"used": used, "limit": 96, "fill": used / 96}
        tiles = int((row["input_ids"] == world.model.img_context_id).sum()) // size
        assert report["tiles"] == {"used": tiles, "limit": 4, "fill": tiles / 4}
        assert report["padding"] == 96 - used
        assert len(report["segments"]) == row["segment_ids"].max() == len(origins)
        for s, origin in zip(report["segments"], origins, strict=True):
            record = records[origin["record"] - 1]
            assert (s["source"], s["draw"]) == ("colours", origin["draw"])
            answer = [p["text"] for p in s["parts"] if p["predicted"]]
            assert answer == [record.turns[-1].text + "<|im_end|>"]
            assert "".join(p["text"] for p in s["parts"]) == s["text"]
            assert sum(p["tokens"] for p in s["parts"]) == s["tokens"]
            folded = f"{IMG_START}[image: {size} x {sum(s['tiles'])}]{IMG_END}"
            assert (folded in s["text"]) == bool(record.images) == bool(s["tiles"])
            at = row["segment_ids"] == s["segment"]
            text = tokenizer.decode(row["input_ids"][at], skip_special=False)
            if s["tiles"]:
                text = text.replace(IMG_CONTEXT * (size * sum(s["tiles"])), folded[5:-6])
            assert s["text"] == text
            assert s["weight"] == pytest.approx(s["predicted"] ** 0.5)
        assert "\u27e6" + answer[0] + "\u27e7" in inspect.row_text(report)


def test_a_row_is_drawn_in_the_colours_of_its_segments(tokenizer, world, batch):
    row, origins = batch[0]
    picture = picture_of(row, tokenizer, world.model.tokens_per_tile, origins)
    assert picture.width == draw.WIDTH
    found = colours(picture)
    for segment in range(1, row["segment_ids"].max() + 1):
        colour = draw.segment_colour(segment)
        assert {colour, draw.tint(colour, 0.1), draw.tint(colour, 0.4)} <= found.keys()
    assert draw.segment_colour(1) != draw.segment_colour(2)
    assert draw.segment_colour(row["segment_ids"].max() + 1) not in found
    assert draw.segment_colour(0) in found, "padding"


def test_predicted_tokens_look_different(tokenizer, world):
    ids = tokenizer.encode_ordinary("Which colour? please")
    highlight = draw.tint(draw.segment_colour(1), 0.4)
    counts = []
    for predicted in (0, 2, len(ids)):
        row = pack(world, sample(world, ids, predicted), tokens=len(ids))
        counts.append(colours(picture_of(row, tokenizer, 4)).get(highlight, 0))
    # The edges of drawn letters may happen to have any colour.
    assert 20 * counts[0] < counts[1] < counts[2]


def test_empty_full_and_long_rows(tokenizer, world):
    size, context = world.model.tokens_per_tile, world.model.img_context_id
    empty = pack(world)
    report = report_of(empty, tokenizer, size)
    assert (report["tokens"]["fill"], report["tiles"]["fill"], report["padding"]) == (0, 0, 40)
    assert report["segments"] == report["problems"] == []
    picture_of(empty, tokenizer, size)
    assert inspect.row_text(report)
    full = pack(world, sample(world, [context] * size * 3, tiles=3), tokens=3 * size)
    report = report_of(full, tokenizer, size)
    assert (report["tokens"]["fill"], report["tiles"]["fill"], report["padding"]) == (1, 1, 0)
    assert report["segments"][0]["tiles"] == [3]
    assert report["segments"][0]["text"] == f"[image: {size} x 3]"
    picture_of(full, tokenizer, size)
    ids = tokenizer.encode_ordinary("a\n" * 2000)
    long = pack(world, sample(world, ids), tokens=len(ids), tiles=0)
    assert picture_of(long, tokenizer, size).height < 40_000
    assert report_of(long, tokenizer, size)["segments"][0]["text"] == "a\n" * 2000


def test_broken_rows_are_called_so(tokenizer, world):
    size, context = world.model.tokens_per_tile, world.model.img_context_id
    ids = tokenizer.encode_ordinary("Hello white")
    assert report_of(pack(world, sample(world, ids, 1)), tokenizer, size)["problems"] == []
    cut = pack(world, sample(world, [context] * (size + 1), tiles=1))
    report = report_of(cut, tokenizer, size)
    assert "no multiple" in report["problems"][0]
    assert report["segments"][0]["text"] == f"[image: {size} x 1 + 1]"
    assert "PROBLEM" in inspect.row_text(report)
    wrong = pack(world, sample(world, ids, 2))
    wrong["labels"][len(ids) - 1] += 1
    wrong["loss_weight"][0] = 1
    wrong["position_ids"][:] = 0
    problems = " / ".join(report_of(wrong, tokenizer, size)["problems"])
    for words in ("labels that are not the tokens", "loss weights", "positions of segment 1"):
        assert words in problems
    picture_of(wrong, tokenizer, size)


def test_any_text_is_drawn(tokenizer):
    """No font has them all: those without a glyph are written as escapes."""
    texts = [
        "\u8bf7\u63cf\u8ff0",
        "\U0001f600 \U0001f468\u200d\U0001f469",
        "\x00\x1b[31m\t\r",
        "\ud800",
    ]
    for text in [*texts, "e\u0301 \u0627\u0644", "\U0010ffff", "\u2028", ""]:
        chunk = draw.Chunk(text * 30, "text", True, 1)
        view = draw.SegmentView(1, text, [chunk])
        no_tiles = np.zeros((0, 4, 4, 3), np.uint8)
        picture = draw.draw_row(text, [text], [(text, [1], 2)], no_tiles, [], [view])
        assert picture.width == draw.WIDTH
        assert "\x1b" not in output.plain(text)
        output.plain(text).encode()
    ids = [*range(tokenizer.vocab_size + 5)]
    labels = np.full(len(ids), IGNORE)
    drawn = inspect.chunks_of(np.array(ids), labels, tokenizer, 4)
    assert sum(c.tokens for c in drawn) == len(ids)
    assert all(c.text for c in drawn), "ids that no token has are shown as numbers"


def test_inspect_command(world, tmp_path):
    config = world.config("instruct")
    files = {"png": str(tmp_path / "row.png"), "json_file": str(tmp_path / "row.json")}
    report = inspect.run_inspect(config, 2, row=1, **files)
    assert json.loads((tmp_path / "row.json").read_text()) == report
    assert (report["stage"], report["step"], report["row"]) == ("instruct", 2, 1)
    with Image.open(files["png"]) as picture:
        assert (picture.format, picture.width) == ("PNG", draw.WIDTH)


def test_stage_1_rows_predict_nothing(world):
    report = inspect.run_inspect(world.config("distill"), 1)
    assert report["predicted"] == 0 and report["problems"] == [] and report["segments"]


def test_stats_are_those_of_the_lengths_and_of_the_plan(world, pipeline, tmp_path):
    config = world.config("instruct")
    report = stats.stats_report(pipeline, config.data, windows=3)
    lengths = np.array([pipeline.lengths[0][i] for i in range(25)])
    [source] = report["sources"]
    assert (source["name"], source["records"], source["looked_at"]) == ("colours", 25, 25)
    for k, what in enumerate(("tokens", "tiles")):
        numbers, values = source[what], lengths[:, k]
        assert (numbers["min"], numbers["max"]) == (values.min(), values.max())
        assert numbers["mean"] == pytest.approx(values.mean())
        assert numbers["median"] == np.median(values)
        assert numbers["counts"] == np.histogram(values, numbers["edges"])[0].tolist()
        assert sum(numbers["counts"]) == 25
    reader = pipeline.reader()[0]
    planned = reader.plan()
    rows = [row for window in range(3) for row in planned.rows(window)]
    used = np.array([np.sum([reader.length(n) for n in row], axis=0) for row in rows])
    plan = report["plan"]
    assert (plan["rows"], plan["samples"], plan["draws"]) == (len(rows), 96, {"colours": 96})
    assert plan["row_token_fill"] == pytest.approx((used[:, 0] / 96).tolist())
    assert plan["token_fill"] == pytest.approx(used[:, 0].sum() / 96 / len(rows))
    assert plan["tile_fill"] == pytest.approx(used[:, 1].sum() / 4 / len(rows))
    assert plan["balanced_tiles"] == pytest.approx(96 * used[:, 1].sum() / used[:, 0].sum())
    text = stats.stats_text(report)
    assert f"token fill {plan['token_fill']:.1%}" in text and "colours" in text
    files = {"png": str(tmp_path / "stats.png"), "json_file": str(tmp_path / "stats.json")}
    assert stats.run_stats(config, windows=3, **files) == report
    assert json.loads((tmp_path / "stats.json").read_text()) == report
    with Image.open(files["png"]) as picture:
        assert picture.width == draw.WIDTH
        assert {draw.segment_colour(1), draw.INK} <= colours(picture.convert("RGB")).keys()


def test_wide_histograms_have_bins_of_equal_width():
    values = np.array([3, 3, 90, 1000])
    spread = stats._spread(values)
    assert len(spread["counts"]) == len(spread["edges"]) - 1 <= 40
    assert len(set(np.diff(spread["edges"]))) == 1
    assert spread["counts"] == np.histogram(values, spread["edges"])[0].tolist()
