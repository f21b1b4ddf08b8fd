"""Pictures and tables of what is read: tiles, packed rows, histograms. Pillow only.

Nothing here knows a tokenizer or a pipeline: `data.inspect` says what to draw.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

WIDTH = 1200  # of every picture, in pixels
MARGIN = 16
INK, GREY, LIGHT, PAPER = (32, 33, 36), (110, 112, 118), (226, 227, 230), (255, 255, 255)
# Neighbours differ in hue and in lightness, so that they also differ for colour-blind readers.
SEGMENTS: tuple[Colour, ...] = (
    *((31, 119, 180), (214, 92, 20), (44, 140, 60), (148, 84, 190), (190, 30, 60)),
    *((20, 145, 150), (150, 110, 20), (200, 70, 150)),
)
# Where Pillow's own font has no glyph. HOVLE_FONT names one more, tried first.
_FALLBACKS = (
    *("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-microhei.ttc"),
    *("wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "Arial Unicode.ttf", "PingFang.ttc"),
    *("msyh.ttc", "NotoEmoji-Regular.ttf", "Symbola.ttf"),
)
_MISSING = "\U0010fffe"  # a noncharacter: no font has it
_MOST_LINES = 1500  # of a row's text; a taller picture is one that viewers refuse


def segment_colour(segment: int) -> Colour:
    """Of segment 1, 2, ...; grey for padding, which is segment 0."""
    return SEGMENTS[(segment - 1) % len(SEGMENTS)] if segment > 0 else GREY


def tint(colour: Colour, strength: float) -> Colour:
    """A mix of white and `strength` of the colour."""
    r, g, b = (round(255 - (255 - c) * strength) for c in colour)
    return r, g, b


@functools.cache
def _fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    default = ImageFont.load_default(size)
    assert isinstance(default, ImageFont.FreeTypeFont)
    return (default, *(font.font_variant(size=size) for font in _fallbacks()))


@functools.cache
def _fallbacks() -> tuple[ImageFont.FreeTypeFont, ...]:
    found = []
    for name in (os.environ.get("HOVLE_FONT", ""), *_FALLBACKS):
        try:
            if name:
                found.append(ImageFont.truetype(name, layout_engine=ImageFont.Layout.BASIC))
        except OSError:  # not on this machine, or no font
            continue
    return tuple(found)


@functools.cache
def _glyph(font: ImageFont.FreeTypeFont, char: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(char)
    return mask.size, bytes(mask)


@functools.cache
def _font_of(char: str, size: int) -> ImageFont.FreeTypeFont | None:
    """The first font that has the character; None if it is to be written as an escape."""
    if " " <= char <= "~":
        return _fonts(size)[0]
    if unicodedata.category(char)[0] == "C":  # control, format, surrogate, unassigned
        return None
    fonts = (f for f in _fonts(size) if _glyph(f, char) != _glyph(f, _MISSING))
    return next(fonts, None)


def _spans(text: str, size: int) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """The text in pieces of one font each; what no font has becomes `\\u4f60`."""
    spans: list[tuple[ImageFont.FreeTypeFont, str]] = []
    for char in text:
        font = _font_of(char, size)
        if font is None:
            font, char = _fonts(size)[0], char.encode("unicode_escape").decode()
        if spans and spans[-1][0] is font:
            spans[-1] = (font, spans[-1][1] + char)
        else:
            spans.append((font, char))
    return spans


def text_width(text: str, size: int) -> int:
    return round(sum(font.getlength(part) for font, part in _spans(text, size)))


def put_text(
    draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int, fill: Colour = INK
) -> None:
    """Writes one line whose top left corner is (x, y). No character makes it fail."""
    for font, part in _spans(text, size):
        # By baseline: fonts differ in how far they reach above it.
        draw.text((x, y + size), part, fill=fill, font=font, anchor="ls")
        x += font.getlength(part)


def _clip(text: str, size: int, width: int) -> str:
    """The text, cut with dots to fit."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "...", size) > width:
        text = text[: len(text) * 7 // 8]
    return text + "..."


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens drawn as one box."""

    text: str
    kind: str  # 'text', 'special' (a control or added token) or 'image' (a folded run)
    predicted: bool  # whether the loss is on them
    tokens: int  # how many they are


@dataclasses.dataclass(frozen=True)
class SegmentView:
    """One segment of a row: a line of words about it, and what it holds."""

    segment: int
    heading: str
    chunks: Sequence[Chunk]


@dataclasses.dataclass(frozen=True)
class _Box:
    x: int
    y: int
    width: int
    text: str
    chunk: Chunk
    segment: int


_TEXT, _LINE, _TILE = 14, 23, 84


def draw_row(
    title: str,
    notes: Sequence[str],
    bars: Sequence[tuple[str, Sequence[int], int]],
    tiles: np.ndarray,
    owners: Sequence[tuple[int, str]],
    segments: Sequence[SegmentView],
) -> Image.Image:
    """Draws one packed row.

    Args:
      title: The headline.
      notes: Lines in red below it: what is wrong with the row.
      bars: (words, amount per segment, limit) of a stacked bar each.
      tiles: uint8 [n, H, W, 3], all slots of the row.
      owners: (segment, caption) of the first tiles; the others are free slots.
      segments: In order; segment 0 is padding.
    """
    strip = MARGIN + 34 + 20 * len(notes) + 24 * len(bars) + 8
    per_line = (WIDTH - 2 * MARGIN) // (_TILE + 10)
    body = strip + -(-len(tiles) // per_line) * (_TILE + 24) + 8
    boxes, headings, end = _lay_out(segments, body)
    image = Image.new("RGB", (WIDTH, end + MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    put_text(draw, MARGIN, MARGIN - 4, _clip(title, 20, WIDTH - 2 * MARGIN), 20)
    for n, note in enumerate(notes):
        text = _clip(note, _TEXT, WIDTH - 2 * MARGIN)
        put_text(draw, MARGIN, MARGIN + 28 + 20 * n, text, _TEXT, (190, 0, 0))
    for n, (words, amounts, limit) in enumerate(bars):
        _bar(draw, MARGIN + 34 + 20 * len(notes) + 24 * n, words, amounts, limit)
    for n, tile in enumerate(tiles):
        x = MARGIN + n % per_line * (_TILE + 10)
        y = strip + n // per_line * (_TILE + 24)
        segment, caption = owners[n] if n < len(owners) else (0, "")
        _framed(image, tile if caption else None, x, y, _TILE, segment_colour(segment))
        put_text(draw, x, y + _TILE + 3, _clip(caption or "free", 11, _TILE), 11, GREY)
    for y, segment, words in headings:
        colour = segment_colour(segment)
        draw.rectangle((MARGIN, y + 3, MARGIN + 12, y + 15), fill=colour)
        put_text(draw, MARGIN + 20, y, _clip(words, 13, WIDTH - 2 * MARGIN - 20), 13, colour)
    for box in boxes:
        _draw_box(draw, box)
    return image


def _lay_out(
    segments: Sequence[SegmentView], top: int
) -> tuple[list[_Box], list[tuple[int, int, str]], int]:
    """Boxes of all chunks, (y, segment, words) of the headings, and where the text ends."""
    boxes: list[_Box] = []
    headings: list[tuple[int, int, str]] = []
    y, lowest, right = top, top + _MOST_LINES * _LINE, WIDTH - MARGIN
    for view in segments:
        headings.append((y, view.segment, view.heading))
        y += 22
        x = left = MARGIN + 20
        for chunk in view.chunks:
            if y > lowest:
                headings.append((y, 0, "the rest is not drawn"))
                return boxes, headings, y + 22
            # A picture of a line end, or what ends a line would be invisible.
            for text in _wrap(chunk.text.replace("\n", "\u21b5"), right - left):
                width = text_width(text, _TEXT) + (12 if chunk.kind == "image" else 2)
                if x + width > right:
                    x, y = left, y + _LINE
                boxes.append(_Box(x, y, width, text, chunk, view.segment))
                x += width + 1
            if "\n" in chunk.text:
                x, y = left, y + _LINE
        y += _LINE + 8 if x > left else 8
    return boxes, headings, y


def _wrap(text: str, width: int) -> list[str]:
    """Parts no wider than `width`; nearly always the text itself."""
    if text_width(text, _TEXT) <= width - 12:
        return [text]
    parts, part = [], ""
    for char in text:
        if part and text_width(part + char, _TEXT) > width - 12:
            parts.append(part)
            part = ""
        part += char
    return [*parts, part]


def _draw_box(draw: ImageDraw.ImageDraw, box: _Box) -> None:
    colour = segment_colour(box.segment)
    place = (box.x, box.y, box.x + box.width - 1, box.y + _LINE - 4)
    if box.chunk.kind == "image":
        draw.rectangle(place, fill=colour)
        put_text(draw, box.x + 6, box.y, box.text, _TEXT, PAPER)
        return
    draw.rectangle(place, fill=tint(colour, 0.40 if box.chunk.predicted else 0.10))
    special = box.chunk.kind == "special" or box.segment == 0
    ink = GREY if special and not box.chunk.predicted else INK
    put_text(draw, box.x + 1, box.y, box.text, _TEXT, ink)
    if box.chunk.predicted:
        draw.rectangle((place[0], place[3] - 1, place[2], place[3] + 1), fill=colour)


def _bar(draw: ImageDraw.ImageDraw, y: int, words: str, amounts: Sequence[int], limit: int) -> None:
    left, right = MARGIN + 260, WIDTH - MARGIN
    put_text(draw, MARGIN, y, words, _TEXT)
    draw.rectangle((left, y + 2, right, y + 17), fill=LIGHT)
    done = 0
    for segment, amount in enumerate(amounts, start=1):
        x0, x1 = (left + (right - left) * n // max(limit, 1) for n in (done, done + amount))
        if amount:
            draw.rectangle(
                (x0, y + 2, max(x0, min(x1, right) - 2), y + 17), fill=segment_colour(segment)
            )
        done += amount


def _framed(
    image: Image.Image, tile: np.ndarray | None, x: int, y: int, side: int, colour: Colour
) -> None:
    draw = ImageDraw.Draw(image)
    if tile is None:
        draw.rectangle((x, y, x + side - 1, y + side - 1), fill=(246, 246, 247), outline=LIGHT)
        return
    draw.rectangle((x, y, x + side - 1, y + side - 1), fill=colour)
    image.paste(_scaled(Image.fromarray(tile), side - 6, side - 6), (x + 3, y + 3))


def _scaled(image: Image.Image, width: int, height: int) -> Image.Image:
    """Small pictures are enlarged in whole blocks: one should see the pixels there are."""
    up = width >= image.width
    return image.resize(
        (width, height), Image.Resampling.NEAREST if up else Image.Resampling.LANCZOS
    )


def draw_tiles(
    picture: Image.Image, tiles: np.ndarray, cols: int, rows: int, title: str
) -> Image.Image:
    """The picture with its grid, and beside it the tiles as the model sees them, numbered.

    Args:
      picture: RGB, of any size.
      tiles: uint8 [cols * rows or one more, H, W, 3], row-major, the thumbnail last.
    """
    half = (WIDTH - 3 * MARGIN) // 2
    top, most = MARGIN + 58, 900
    scale = min(half / picture.width, most / picture.height)
    width, height = (max(1, round(n * scale)) for n in picture.size)
    has_thumbnail = len(tiles) > cols * rows
    # The thumbnail has a column of its own beside the grid.
    side = (half - 4 * (cols + has_thumbnail)) // (cols + has_thumbnail)
    side = max(min(side, (most - 4 * rows) // rows, 360), 24)
    thumbnail = max(side, min(120, half - cols * (side + 4) - 12))
    image = Image.new("RGB", (WIDTH, top + max(height, rows * (side + 4), thumbnail) + 34), PAPER)
    draw = ImageDraw.Draw(image)
    put_text(draw, MARGIN, MARGIN - 4, _clip(title, 20, WIDTH - 2 * MARGIN), 20)
    put_text(draw, MARGIN, top - 24, f"the picture, {picture.width} x {picture.height}", 14, GREY)
    image.paste(_scaled(picture, width, height), (MARGIN, top))
    for col in range(cols + 1):
        _line(draw, MARGIN + col * (width - 1) / cols, top, 0, height - 1)
    for row in range(rows + 1):
        _line(draw, MARGIN, top + row * (height - 1) / rows, width - 1, 0)
    left = 2 * MARGIN + half
    size = tiles.shape[1]
    put_text(draw, left, top - 24, f"what the model sees, tiles of {size} x {size}", 14, GREY)
    for n, tile in enumerate(tiles[: cols * rows]):
        x, y = left + n % cols * (side + 4), top + n // cols * (side + 4)
        image.paste(_scaled(Image.fromarray(tile), side, side), (x, y))
        _number(draw, x, y, str(n + 1))
        at = n % cols * width // cols, n // cols * height // rows
        if min(width // cols, height // rows) >= 24:  # or the numbers hide the picture
            _number(draw, MARGIN + at[0] + 1, top + at[1] + 1, str(n + 1))
    if has_thumbnail:
        x = left + cols * (side + 4) + 8
        image.paste(_scaled(Image.fromarray(tiles[-1]), thumbnail, thumbnail), (x, top))
        _number(draw, x, top, str(len(tiles)))
        put_text(draw, x, top + thumbnail + 3, "thumbnail", 13, GREY)
    return image


def _line(draw: ImageDraw.ImageDraw, x: float, y: float, dx: int, dy: int) -> None:
    """A line that shows on white and on black."""
    draw.line((x, y, x + dx, y + dy), fill=PAPER, width=4)
    draw.line((x, y, x + dx, y + dy), fill=SEGMENTS[4], width=2)


def _number(draw: ImageDraw.ImageDraw, x: int, y: int, text: str) -> None:
    draw.rectangle((x, y, x + text_width(text, 13) + 7, y + 17), fill=SEGMENTS[4])
    put_text(draw, x + 4, y, text, 13, PAPER)


@dataclasses.dataclass(frozen=True)
class Panel:
    """A histogram: `counts[i]` things lie between `edges[i]` and `edges[i + 1]`."""

    title: str
    edges: Sequence[float]
    counts: Sequence[int]
    colour: Colour


def draw_panels(title: str, lines: Sequence[str], panels: Sequence[Panel]) -> Image.Image:
    """Histograms, two in a line, below lines of words."""
    half, height = (WIDTH - 3 * MARGIN) // 2, 190
    top = MARGIN + 34 + 20 * len(lines) + 8
    image = Image.new("RGB", (WIDTH, top + -(-len(panels) // 2) * height + MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    put_text(draw, MARGIN, MARGIN - 4, _clip(title, 20, WIDTH - 2 * MARGIN), 20)
    for n, line in enumerate(lines):
        text = _clip(line, _TEXT, WIDTH - 2 * MARGIN)
        put_text(draw, MARGIN, MARGIN + 30 + 20 * n, text, _TEXT)
    for n, panel in enumerate(panels):
        x, y = MARGIN + n % 2 * (half + MARGIN), top + n // 2 * height
        _draw_panel(draw, panel, x, y, half, height - 50)
    return image


def _draw_panel(
    draw: ImageDraw.ImageDraw, panel: Panel, x: int, y: int, width: int, height: int
) -> None:
    put_text(draw, x, y, _clip(panel.title, 13, width), 13, panel.colour)
    base, count, peak = y + height, len(panel.counts), max([*panel.counts, 1])
    draw.line((x, base, x + width, base), fill=GREY)
    for n, amount in enumerate(panel.counts):
        x0, x1 = x + width * n // count, x + width * (n + 1) // count
        # A bar of one record among millions must not vanish.
        tall = max(2, round((height - 36) * amount / peak)) if amount else 0
        if tall:
            draw.rectangle((x0, base - tall, max(x0, x1 - 2), base - 1), fill=panel.colour)
    label = f"{peak:,}"
    put_text(draw, x + width - text_width(label, 11), y + 3, label, 11, GREY)
    for n in sorted({0, count // 4, count // 2, 3 * count // 4, count}):
        text = f"{panel.edges[n]:g}"
        centre = x + width * n // count - text_width(text, 11) // 2
        put_text(draw, min(max(centre, x), x + width - text_width(text, 11)), base + 3, text, 11)
