"""Looking at data before it is trained on: tiles, prompts, packed rows, lengths and fills.

Every subcommand of `hovle data` here is a `run_*` function that takes plain arguments, writes the
files it is given names for and returns a dict of JSON types; `*_text` is the dict for a terminal.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hovle_jax import output
from hovle_jax.config import IGNORE, DataConfig, ModelConfig, RunConfig
from hovle_jax.data import draw, image
from hovle_jax.data.chat import encode_prompt, with_placeholders
from hovle_jax.data.draw import Chunk, SegmentView
from hovle_jax.data.pipeline import START, Cursor, HostBatch, Pipeline
from hovle_jax.data.records import Record, Turn
from hovle_jax.data.samples import Tiler, check_tokenizer, get_template
from hovle_jax.data.tokenizer import IMG_CONTEXT, Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.output import write_json, writing
from hovle_jax.stages import open_pipeline

Report = dict[str, Any]
Origins = Sequence[Report] | None  # of the segments of a row, one each


def write(
    report: Report, json_file: str, png: str = "", picture: Callable[[], Image.Image] | None = None
) -> Report:
    """Writes what there are file names for; a PNG whatever its name ends in."""
    if json_file:
        write_json(json_file, report)
    if png and picture:
        with writing(png):
            picture().save(png, "PNG")
    return report


def draw_tiles(report: Report, picture: Image.Image, tiles: np.ndarray) -> Image.Image:
    """The picture with its grid, beside it the numbered tiles; arguments as `cut_tiles` returns."""
    return draw.draw_tiles(picture, tiles, report["cols"], report["rows"], _tile_title(report))


def cut_tiles(
    path: str, image_size: int, max_tiles: int, min_tiles: int = 1, thumbnail: bool = True
) -> tuple[Report, Image.Image, np.ndarray]:
    """What tiling makes of an image.

    Returns:
      (report, picture, tiles); the report has cols, rows, sha256 (of every uint8 [H, W, 3] tile,
      row-major, thumbnail last), what the file is (path, width, height, mode, format), image_size,
      min_tiles, max_tiles, thumbnail.

    Raises:
      UserError: the image cannot be read, or impossible limits.
    """
    if image_size < 1:
        raise UserError(f"image_size={image_size}: a tile has at least one pixel")
    picture = image.open_image(path, path)
    cols, rows = image.choose_grid(*picture.size, image_size, min_tiles, max_tiles)
    limits = {"image_size": image_size, "min_tiles": min_tiles, "max_tiles": max_tiles}
    tiles = image.tile_image(picture, **limits, thumbnail=thumbnail)
    digests = [hashlib.sha256(tile.tobytes()).hexdigest() for tile in tiles]
    with Image.open(path) as file:
        about: Report = {"path": path, "mode": file.mode, "format": file.format}
    about |= {"width": picture.width, "height": picture.height, **limits}
    about["thumbnail"] = len(tiles) > cols * rows
    return {"cols": cols, "rows": rows, "sha256": digests, **about}, picture, tiles


def _tile_title(r: Report) -> str:
    extra = " + thumbnail" if r["thumbnail"] else ""
    return (
        f"{Path(r['path']).name}: {r['width']} x {r['height']} {r['mode']} -> "
        f"{r['cols']} x {r['rows']} tiles{extra} of {r['image_size']} (at most {r['max_tiles']})"
    )


def tile_text(report: Report) -> str:
    cols, grid = report["cols"], report["cols"] * report["rows"]
    rows = [
        (n + 1, f"row {n // cols + 1}, column {n % cols + 1}" if n < grid else "thumbnail", digest)
        for n, digest in enumerate(report["sha256"])
    ]
    return _tile_title(report) + "\n" + output.table(("tile", "place", "sha256"), rows)


def run_tile(
    path: str, image_size: int, max_tiles: int, json_file: str = "", png: str = ""
) -> Report:
    """`hovle data tile`; see `cut_tiles`."""
    report, picture, tiles = cut_tiles(path, image_size, max_tiles)
    return write(report, json_file, png, lambda: draw_tiles(report, picture, tiles))


def chunks_of(
    ids: np.ndarray, labels: np.ndarray, tokenizer: Tokenizer, tokens_per_tile: int
) -> list[Chunk]:
    """Tokens as pieces of text, usually one each, with runs of image tokens folded into one.

    The texts of neighbours concatenate to what the tokenizer decodes them to together: a word's
    space belongs to the word, and bytes of one character stay together.

    Args:
      ids: int [n].
      labels: int [n], negative where nothing is predicted.
    """
    context = tokenizer.id_of(IMG_CONTEXT)

    def kind_of(place: int) -> tuple[str, bool]:
        special = int(ids[place]) in tokenizer.special_ids
        kind = "image" if ids[place] == context else "special" if special else "text"
        return kind, bool(labels[place] >= 0)

    chunks: list[Chunk] = []
    for (kind, predicted), group in itertools.groupby(range(len(ids)), kind_of):
        run = [int(ids[place]) for place in group]
        if kind == "image":
            tiles, rest = divmod(len(run), tokens_per_tile)
            text = f"[image: {tokens_per_tile} x {tiles}{f' + {rest}' if rest else ''}]"
            pieces = [(text, len(run))]
        elif kind == "special":
            pieces = [(tokenizer.decode([i], skip_special=False), 1) for i in run]
        else:
            pieces = _pieces(run, tokenizer)
        chunks += [Chunk(text, kind, predicted, count) for text, count in pieces]
    return chunks


def _pieces(ids: list[int], tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """(text, tokens) of ordinary tokens, split as finely as text allows."""
    pieces: list[tuple[str, int]] = []
    before: list[int] = []  # the piece before, which decides whether a space is dropped
    piece: list[int] = []
    for n, token in enumerate(ids, start=1):
        piece.append(token)
        known, text = tokenizer.decode(before), tokenizer.decode([*before, *piece])
        # A character of several byte tokens is not whole yet; it has four at most.
        if text.endswith("\ufffd") and len(piece) < 4 and n < len(ids):
            continue
        own = text[len(known) :] if text.startswith(known) else tokenizer.decode(piece)
        pieces.append((own or "".join(f"<{i}>" for i in piece), len(piece)))
        before, piece = piece, []
    return pieces


def prompt_report(
    turns: Sequence[Turn] | str,
    images: Sequence[str | bytes],
    tokenizer: Tokenizer,
    model: ModelConfig,
    data: DataConfig,
) -> Report:
    """What the model sees before it answers.

    Args:
      turns: A conversation that ends with the user, or a question; '<image>\\n' is put before a
        question for every image that it does not place itself.
      images: Paths or encoded bytes, in the order of their placeholders.
      model: For image_size and tokens_per_tile.
      data: For template, system and tile limits.

    Returns:
      prompt (added tokens as text, image runs folded), ids, tokens, images (per image tiles and
      tokens), template.

    Raises:
      UserError: an unreadable image, placeholders that do not match, or no user turn at the end.
    """
    if isinstance(turns, str):
        turns = (Turn("user", with_placeholders(turns, len(images))),)
    tiles = Tiler(model, data, None).counts(Record(tuple(turns), tuple(images), "the prompt"))
    template, size = get_template(data.template), model.tokens_per_tile
    ids = encode_prompt(turns, tiles, tokenizer, template, tokens_per_tile=size, system=data.system)
    chunks = chunks_of(ids, np.full_like(ids, IGNORE), tokenizer, size)
    folded = [f"{IMG_CONTEXT} x {c.tokens}" if c.kind == "image" else c.text for c in chunks]
    report: Report = {"template": data.template, "tokens": len(ids), "prompt": "".join(folded)}
    report["images"] = [{"tiles": n, "tokens": n * size} for n in tiles]
    return report | {"ids": ids.tolist()}


def prompt_text(report: Report) -> str:
    images = [(n, i["tiles"], i["tokens"]) for n, i in enumerate(report["images"], start=1)]
    table = output.table(("image", "tiles", "tokens"), images) + "\n" if images else ""
    head = f"{report['template']}: {report['tokens']} tokens\n"
    return head + table + "\n" + output.plain(report["prompt"])


def run_prompt(
    question: str,
    images: Sequence[str],
    config: RunConfig | None = None,
    tokenizer: str = "",
    json_file: str = "",
) -> Report:
    """`hovle data prompt`: see `prompt_report`. Without a config, the released model's settings."""
    if config is None and not tokenizer:
        raise UserError("hovle data prompt needs --config or --tokenizer")
    model, data = (config.model, config.data) if config else (ModelConfig(), DataConfig())
    loaded = Tokenizer.load(tokenizer or data.tokenizer)
    if config is not None:
        check_tokenizer(loaded, model)
    return write(prompt_report(question, images, loaded, model, data), json_file)


def batch_at(
    config: RunConfig,
    pipeline: Pipeline,
    step: int,
    row: int | None = None,
    start: tuple[int, Cursor] = (0, START),
) -> list[tuple[HostBatch, list[Report]]]:
    """(arrays, origins) of every row of a global batch; only of its `row`-th (from 0) if given.

    Origins say what is in each segment (`Reader.origins`).

    Steps count from 1, as in the metrics. The plan of every window between `start` and the step is
    made again, which reads lengths but no image.

    Args:
      start: Steps done and the data cursor after them. From the beginning, the mixture and
        config.data.rows are taken for those of the whole run.

    Raises:
      UserError: no such step or row, or a record that cannot be read.
    """
    per_step, (done, cursor) = config.data.rows, start
    if step <= done:
        raise UserError(f"--step {step}: steps count from {done + 1} here")
    if row is not None and not 0 <= row < per_step:
        raise UserError(f"--row {row}: a batch has rows 0 to {per_step - 1} (config.data.rows)")
    wanted = range(per_step) if row is None else [row]
    reader, cursor = pipeline.reader(cursor)
    plan = reader.plan(cursor)
    found = []
    for number in wanted:
        at = (step - 1 - done) * per_step + number
        found.append((reader.row(plan[at]), reader.origins(plan[at])))
    return found


def row_report(
    row: HostBatch, tokenizer: Tokenizer, tokens_per_tile: int, origins: Origins = None
) -> tuple[Report, list[list[Chunk]]]:
    """What is in a packed row, and the chunks of every segment.

    Args:
      row: input_ids, segment_ids, position_ids, labels, loss_weight [tokens] and pixels
        [tiles, H, W, 3], as `pack.assemble` makes them.
      origins: Added to the segments, one each.

    Returns:
      The report: tokens and tiles ({used, limit, fill}), predicted (tokens with a loss), padding,
      problems (sentences; empty in a sound row), segments: each segment, tokens, tiles (per
      image), predicted, weight (sum of its loss weights), text, parts ([{text, predicted,
      tokens}], the same text cut where prediction begins and ends), and its origin.
    """
    segments: list[Report] = []
    all_chunks = []
    for segment in range(1, int(row["segment_ids"].max(initial=0)) + 1):
        at = row["segment_ids"] == segment
        labels = row["labels"][at]
        chunks = chunks_of(row["input_ids"][at], labels, tokenizer, tokens_per_tile)
        parts = []
        for predicted, group in itertools.groupby(chunks, lambda c: c.predicted):
            text, tokens = zip(*((c.text, c.tokens) for c in group), strict=True)
            parts.append({"predicted": predicted, "tokens": sum(tokens), "text": "".join(text)})
        tiles = [c.tokens // tokens_per_tile for c in chunks if c.kind == "image"]
        about = origins[segment - 1] if origins else {}
        about = {"segment": segment, **about, "tokens": int(at.sum()), "tiles": tiles}
        weight = float(row["loss_weight"][at].sum())
        about |= {"predicted": int((labels >= 0).sum()), "weight": weight}
        segments.append({**about, "text": "".join(c.text for c in chunks), "parts": parts})
        all_chunks.append(chunks)
    used = int((row["segment_ids"] > 0).sum())
    report = {
        "tokens": _fill(used, len(row["input_ids"])),
        "tiles": _fill(sum(sum(s["tiles"]) for s in segments), len(row["pixels"])),
        "predicted": sum(s["predicted"] for s in segments),
        "padding": len(row["input_ids"]) - used,
        "problems": _problems(row, all_chunks, tokens_per_tile),
        "segments": segments,
    }
    return report, all_chunks


def _fill(used: int, limit: int) -> Report:
    return {"used": used, "limit": limit, "fill": used / limit if limit else 0.0}


def _problems(row: HostBatch, chunks: list[list[Chunk]], tokens_per_tile: int) -> list[str]:
    """What must not be in a row: training on it would go wrong without a sound."""
    ids, labels, weight = row["input_ids"], row["labels"], row["loss_weight"]
    found = []
    images = [c.tokens for segment in chunks for c in segment if c.kind == "image"]
    if any(n % tokens_per_tile for n in images):
        found.append(f"an image run is no multiple of {tokens_per_tile} tokens")
    if sum(images) > len(row["pixels"]) * tokens_per_tile:
        found.append("more image tokens than the row's tiles give")
    if np.any((labels >= 0) & (labels != ids)):
        found.append("labels that are not the tokens at their places")
    if np.any((labels >= 0) & (row["segment_ids"] == 0)):
        found.append("padding is predicted")
    if np.any((labels >= 0) != (weight > 0)):
        found.append("loss weights that do not cover exactly the predicted tokens")
    for segment, _ in enumerate(chunks, start=1):
        at = np.flatnonzero(row["segment_ids"] == segment)
        if not np.array_equal(row["position_ids"][at], np.arange(len(at))):
            found.append(f"positions of segment {segment} do not count from 0")
        if len(at) and at[-1] - at[0] + 1 != len(at):
            found.append(f"segment {segment} is not in one piece")
    return found


def draw_row(row: HostBatch, report: Report, chunks: list[list[Chunk]], title: str) -> Image.Image:
    """The row as a picture: tiles framed in their segment's colour, and the tokens below, those
    that are predicted underlined. `report` and `chunks` as `row_report` returns them."""
    owners, views = [], []
    for s, pieces in zip(report["segments"], chunks, strict=True):
        for picture, count in enumerate(s["tiles"], start=1):
            name = f"seg {s['segment']}" + (f".{picture}" if len(s["tiles"]) > 1 else "")
            owners += [(s["segment"], f"{name}: {n + 1} of {count}") for n in range(count)]
        source = f"{s['source']}, record {s['record']}: " if "source" in s else ""
        words = f"segment {s['segment']}, {source}{s['tokens']} tokens, {sum(s['tiles'])} tiles, "
        words += f"{s['predicted']} predicted with weight {s['weight']:.4g}"
        views.append(SegmentView(s["segment"], words, pieces))
    if report["padding"]:
        box = Chunk(f"[padding: {report['padding']}]", "text", False, report["padding"])
        views.append(SegmentView(0, f"padding, {report['padding']} tokens", [box]))
    bars = []
    for name in ("tokens", "tiles"):
        amounts = [int(np.sum(s[name])) for s in report["segments"]]  # tiles are per image
        bars.append((f"{name} {_fill_words(report[name])}", amounts, report[name]["limit"]))
    return draw.draw_row(title, report["problems"], bars, row["pixels"], owners, views)


def _fill_words(fill: Report) -> str:
    return f"{fill['used']:,} of {fill['limit']:,} ({fill['fill']:.1%})"


def row_text(report: Report) -> str:
    """Every segment's text; what is predicted stands between \u27e6 and \u27e7."""
    lines = [
        f"tokens {_fill_words(report['tokens'])}, tiles {_fill_words(report['tiles'])}, "
        f"{report['predicted']} predicted"
    ]
    lines += [f"PROBLEM: {problem}" for problem in report["problems"]]
    segments = report["segments"]
    rows = [
        (*(s.get(k, "") for k in ("segment", "source", "record", "tokens")), sum(s["tiles"]))
        + (s["predicted"], round(s["weight"], 4))
        for s in segments
    ]
    head = ("segment", "source", "record", "tokens", "tiles", "predicted", "weight")
    lines += [output.table(head, rows)] if rows else []
    for s in segments:
        text = "".join(
            f"\u27e6{p['text']}\u27e7" if p["predicted"] else p["text"] for p in s["parts"]
        )
        lines.append(f"\n--- segment {s['segment']}\n{output.plain(text)}")
    return "\n".join(lines)


def run_inspect(
    config: RunConfig,
    step: int,
    row: int = 0,
    json_file: str = "",
    png: str = "",
    start: tuple[int, Cursor] = (0, START),
) -> Report:
    """`hovle data inspect`: row `row` of global step `step`; see `row_report` and `batch_at`."""
    tokenizer = Tokenizer.load(config.data.tokenizer)
    pipeline = open_pipeline(config, tokenizer)
    arrays, origins = batch_at(config, pipeline, step, row, start)[0]
    report, chunks = row_report(arrays, tokenizer, config.model.tokens_per_tile, origins)
    report = {"stage": config.stage, "step": step, "row": row, **report}
    title = f"{config.stage}: step {step}, row {row} of 0 to {config.data.rows - 1}"
    return write(report, json_file, png, lambda: draw_row(arrays, report, chunks, title))
