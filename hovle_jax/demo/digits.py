"""Digit question answering: 32x32 canvases of 2x2 handwritten digits, written as user files.

The digits are scikit-learn's 1,797 scanned 8x8 ones. That file is grouped by writer, so its last
500 (held out here) come from other people than the first 1,297, which is harder and more honest
than a random split. Answers are balanced: a blind model scores whatever the answer prior allows.
"""

import dataclasses
import functools
import glob
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from hovle_jax.errors import UserError
from hovle_jax.modules import require

CELLS = ("top-left", "top-right", "bottom-left", "bottom-right")
QUESTION_TYPES = ("position", "comparison", "yes_no")
SPLITS = ("train", "unpaired", "test")
CANVAS = 32
DESCRIBE = "Describe."

_QUAD = CANVAS // 2
_TRAIN_BITMAPS = 1297
_SIZES = (14, 15, 16)
# Exponents below one thicken a stroke (they lift its grey edge); above one they thin it. As with
# slants, the first is the scan as it is and the only one held-out canvases use.
_STROKES = np.stack([np.linspace(0, 1, 256) ** g for g in (1.0, 0.8, 1.3, 1.6)]).astype(np.float32)
# (rotation in degrees, shear) of a scan. The training writers are too few to learn other
# writers' slant from.
_SLANTS = ((0, 0.0), (-12, 0.0), (12, 0.0), (0, -0.25), (0, 0.25), (-7, 0.15), (7, -0.15))


@functools.cache
def load_bitmaps() -> tuple[np.ndarray, np.ndarray]:
    """Returns the scans, uint8 [1797, 8, 8], and the digit each one shows, int64 [1797]."""
    data = require("sklearn.datasets", "demo", "the handwritten digits").load_digits()
    return np.round(data.images * (255 / 16)).astype(np.uint8), np.asarray(data.target, np.int64)


@functools.cache
def _glyphs(width: int, height: int, slant: int) -> np.ndarray:
    """Every scan at one size and slant, uint8 [1797, height, width]: warped once, drawn often."""
    angle, shear = _SLANTS[slant]
    cubic = Image.Resampling.BICUBIC
    shift = (1.0, shear, -shear * height / 2, 0.0, 1.0, 0.0)

    def glyph(bitmap: np.ndarray) -> np.ndarray:
        image = Image.fromarray(bitmap).resize((width, height), cubic)
        if slant:
            image = image.transform(image.size, Image.Transform.AFFINE, shift, cubic)
            image = image.rotate(angle, cubic)
        return np.asarray(image)

    return np.stack([glyph(bitmap) for bitmap in load_bitmaps()[0]])


@functools.cache
def _pool(test: bool) -> tuple[np.ndarray, ...]:
    """Indices of the scans of each digit 0..9 in one half of the writers."""
    target = load_bitmaps()[1]
    half = (np.arange(len(target)) >= _TRAIN_BITMAPS) == test
    return tuple(np.flatnonzero(half & (target == d)) for d in range(10))


def choose_bitmaps(digits: Sequence[int], rng: np.random.Generator, *, test: bool) -> np.ndarray:
    """Picks a scan of each digit, int64 [4], from the held-out writers if `test`."""
    return np.array([rng.choice(_pool(test)[int(d)]) for d in digits])


def render(
    bitmaps: Sequence[int] | np.ndarray, rng: np.random.Generator, *, augment: bool = False
) -> np.ndarray:
    """Draws four scans (indices, in `CELLS` order) as a canvas, uint8 [32, 32, 3]."""
    u = rng.random((4, 7))
    ink = np.zeros((CANVAS, CANVAS), np.float32)
    for cell, bitmap in enumerate(bitmaps):
        width = height = _SIZES[int(u[cell, 0] * len(_SIZES))]
        if augment:
            height = _SIZES[int(u[cell, 6] * len(_SIZES))]
        stroke = _STROKES[int(u[cell, 1] * len(_STROKES)) if augment else 0]
        y = cell // 2 * _QUAD + int(u[cell, 2] * (_QUAD - height + 1))
        x = cell % 2 * _QUAD + int(u[cell, 3] * (_QUAD - width + 1))
        strength = np.float32(0.8 + 0.2 * u[cell, 4])
        slant = int(u[cell, 5] * len(_SLANTS)) if augment else 0
        glyph = _glyphs(width, height, slant)[bitmap]
        ink[y : y + height, x : x + width] = strength * stroke[glyph]
    background = rng.uniform(0, 50) + rng.uniform(0, 25, 3)
    light = rng.uniform(190, 230) + rng.uniform(0, 25, 3)
    return (background + ink[..., None] * (light - background)).astype(np.uint8)


def caption(digits: Sequence[int] | np.ndarray) -> str:
    return " ".join(f"{cell}:{int(d)}" for cell, d in zip(CELLS, digits, strict=True))


def _position(digits: Sequence[int], cell: int) -> tuple[str, str]:
    return f"Which digit is {CELLS[cell]}?", str(int(digits[cell]))


def _comparison(first: int, second: int, winner: int) -> tuple[str, str]:
    return f"Which is larger, {CELLS[first]} or {CELLS[second]}?", CELLS[winner]


def _yes_no(digit: int, present: bool) -> tuple[str, str]:
    return f"Is there a {digit}?", "yes" if present else "no"


def _unequal_pairs(digits: Sequence[int]) -> list[tuple[int, int, int]]:
    """All (first mentioned, second mentioned, winner) that have an answer."""
    pairs = itertools.permutations(range(4), 2)
    return [(a, b, a if digits[a] > digits[b] else b) for a, b in pairs if digits[a] != digits[b]]


def text_example(digits: Sequence[int], kind: str, rng: np.random.Generator) -> tuple[str, str]:
    """Returns (user text, answer) with the caption in place of the image, for a text-only model.

    `kind` is a question type or "caption", which asks for a copy. Four equal digits have no larger
    one, so there a comparison becomes a position question.
    """
    digits = [int(d) for d in digits]
    pairs = _unequal_pairs(digits)
    if kind == "caption":
        question, answer = DESCRIBE, caption(digits)
    elif kind == "comparison" and pairs:
        question, answer = _comparison(*pairs[rng.integers(len(pairs))])
    elif kind in ("position", "comparison"):
        question, answer = _position(digits, int(rng.integers(4)))
    elif kind == "yes_no":
        present = bool(rng.random() < 0.5)
        question, answer = _yes_no(
            int(rng.choice([d for d in range(10) if (d in digits) == present])), present
        )
    else:
        raise ValueError(f"kind {kind!r} is not one of {(*QUESTION_TYPES, 'caption')}")
    return f"{caption(digits)}\n{question}", answer


def tokenizer_lines() -> Iterator[str]:
    """Yields lines that hold every word, digit, role name and newline the demo ever uses."""
    for role in ("system", "user", "assistant"):
        yield f"{role}\n"
    for d in range(10):
        yield caption([(d + i) % 10 for i in range(4)])
        for present in (True, False):
            yield "\n".join(_yes_no(d, present))
    for a, b in itertools.permutations(range(4), 2):
        yield "\n".join(_comparison(a, b, a))
        yield "\n".join(_position(range(4), a))
    yield f"{caption(range(4))}\n{DESCRIBE}\n"


@dataclasses.dataclass(frozen=True)
class Paths:
    """Where everything is. `image` in every jsonl row is relative to `images`."""

    root: str
    images: str
    unpaired: str
    align: str
    instruct_qa: str
    instruct_yes_no: str
    meta_align: str
    meta_instruct: str
    test_position: str
    test_comparison: str
    test_yes_no: str
    text: str
    labels_npz: str

    @property
    def tests(self) -> dict[str, str]:
        return {kind: getattr(self, f"test_{kind}") for kind in QUESTION_TYPES}

    def labels(self, split: str) -> tuple[list[str], np.ndarray]:
        """Image names (relative to `images`) and their digits, int64 [n, 4], for the teacher."""
        with np.load(self.labels_npz) as f:
            return f[f"{split}_images"].tolist(), f[f"{split}_digits"]


def paths(out_dir: str) -> Paths:
    """The layout `write_dataset` fills."""
    j = functools.partial(os.path.join, out_dir)
    return Paths(
        root=out_dir,
        images=j("images"),
        unpaired=j("images", "unpaired"),
        align=j("align.jsonl"),
        instruct_qa=j("instruct_qa.jsonl"),
        instruct_yes_no=j("instruct_yes_no.jsonl"),
        meta_align=j("meta_align.json"),
        meta_instruct=j("meta_instruct.json"),
        test_position=j("test", "position.jsonl"),
        test_comparison=j("test", "comparison.jsonl"),
        test_yes_no=j("test", "yes_no.jsonl"),
        text=j("text.txt"),
        labels_npz=j("labels.npz"),
    )


def _draw_digits(need: dict[int, bool], rng: np.random.Generator) -> list[int]:
    """Four digits that hold (True) or lack (False) the ones in `need`, and are not all equal."""
    wanted = [d for d, present in need.items() if present]
    allowed = [d for d in range(10) if need.get(d, True)]
    while True:
        digits = [*wanted, *rng.choice(allowed, 4 - len(wanted)).tolist()]
        if len(set(digits)) > 1:
            return [digits[i] for i in rng.permutation(4)]


def _plan(
    canvases: int, per_canvas: int, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, list[tuple[int, str, str]]]]:
    """Chooses balanced questions first and then digits to fit: int64 [canvases, 4], and rows
    (canvas, question, answer) by type. Fitting questions to given digits cannot balance exactly.
    """
    # A multiple of 20 per type: ten digits, asked equally often, each with as many yes as no.
    n = canvases * per_canvas // 60 * 20
    answers = {d: rng.permutation([True, False] * (n // 20)) for d in range(10)}
    slots: list[list[tuple[str, int]]] = [[] for _ in range(canvases)]
    needs: list[dict[int, bool]] = [{} for _ in range(canvases)]
    for row in range(3 * n):
        canvas, i, kind = row // per_canvas, row // 3, QUESTION_TYPES[row % 3]
        slots[canvas].append((kind, i))
        if kind == "yes_no":
            # Cycling through the digits never asks one canvas about the same digit twice.
            needs[canvas][i % 10] = bool(answers[i % 10][i // 10])
    digits = [_draw_digits(need, rng) for need in needs]
    rows: dict[str, list[tuple[int, str, str]]] = {kind: [] for kind in QUESTION_TYPES}
    asked: Counter[tuple[int, ...]] = Counter()
    for canvas, slot in enumerate(slots):
        for kind, i in slot:
            if kind == "position":
                qa = _position(digits[canvas], i % 4)
            elif kind == "yes_no":
                qa = _yes_no(i % 10, needs[canvas][i % 10])
            else:
                # The rarest winner, then its rarest question, levels answers and mention order.
                pairs = rng.permutation(_unequal_pairs(digits[canvas])).tolist()
                first, second, winner = min(pairs, key=lambda p: (asked[(p[2],)], asked[tuple(p)]))
                asked.update([(winner,), (first, second, winner)])
                qa = _comparison(first, second, winner)
            rows[kind].append((canvas, *qa))
    return np.array(digits, np.int64), rows


def _write_images(
    folder: str, digits: np.ndarray, rng: np.random.Generator, *, test: bool
) -> tuple[list[str], np.ndarray]:
    """Renders digits [n, 4] to files; returns their names and the scans used, int64 [n, 4]."""
    os.makedirs(folder, exist_ok=True)
    # Stage I reads whatever is in its folder, so an earlier, larger run must not linger in it.
    for stale in glob.glob(os.path.join(glob.escape(folder), "[0-9]" * 5 + ".???")):
        os.remove(stale)
    names, sources = [], []
    for i, row in enumerate(digits):
        sources.append(choose_bitmaps(row, rng, test=test))
        # A user's folder mixes formats, and JPEG takes another decode path than PNG.
        name = f"{i:05d}.jpg" if i % 4 == 3 else f"{i:05d}.png"
        image = Image.fromarray(render(sources[-1], rng, augment=not test))
        image.save(os.path.join(folder, name), quality=95, compress_level=1)
        names.append(f"{os.path.basename(folder)}/{name}")
    return names, np.stack(sources)


def _write_rows(path: str, images: Sequence[str], rows: Sequence[tuple[int, str, str]]) -> None:
    with open(path, "w", encoding="utf-8") as f:
        for i, (canvas, question, answer) in enumerate(rows):
            turns = [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ]
            row = {"id": i, "image": images[canvas], "width": CANVAS, "height": CANVAS}
            f.write(json.dumps(row | {"conversations": turns}) + "\n")


def _write_meta(path: str, entries: dict[str, tuple[str, int, int]]) -> None:
    """Writes InternVL's meta file from {name: (annotation, length, repeat_time)}."""
    base = {"root": "images", "data_augment": False, "max_dynamic_patch": 1}
    meta = {
        name: base | {"annotation": annotation, "repeat_time": repeat, "length": length}
        for name, (annotation, length, repeat) in entries.items()
    }
    with open(path, "w", encoding="utf-8") as f:
        json.dump(meta, f, indent=2)


def write_dataset(
    out_dir: str, *, seed: int, train_canvases: int, qa_per_canvas: int, test_per_type: int
) -> Paths:
    """Writes images, InternVL jsonl and meta files, text and labels; the same bytes for a seed.

    Stage I gets two thirds as many unpaired canvases as there are training ones; every test canvas
    carries one question of each type.
    """
    if not 1 <= qa_per_canvas <= 12:
        raise UserError(f"qa_per_canvas {qa_per_canvas}: give 1 to 12 questions per canvas")
    if train_canvases * qa_per_canvas < 60:
        raise UserError(f"{train_canvases} x {qa_per_canvas} questions: at least 60 are needed")
    if test_per_type < 20 or test_per_type % 20:
        raise UserError(f"test_per_type {test_per_type}: give a multiple of 20, to balance yes/no")
    p = paths(out_dir)
    os.makedirs(os.path.join(out_dir, "test"), exist_ok=True)
    # One stream per split, so that the size of one never changes what is in another.
    rngs = {split: np.random.default_rng([seed, i]) for i, split in enumerate((*SPLITS, "text"))}

    def free(n: int, rng: np.random.Generator) -> np.ndarray:
        return np.array([_draw_digits({}, rng) for _ in range(n)], np.int64)

    train, qa = _plan(train_canvases, qa_per_canvas, rngs["train"])
    test, test_qa = _plan(test_per_type, 3, rngs["test"])
    unpaired = free(max(1, train_canvases * 2 // 3), rngs["unpaired"])
    digits = {"train": train, "unpaired": unpaired, "test": test}
    names: dict[str, list[str]] = {}
    arrays: dict[str, np.ndarray] = {}
    for split in SPLITS:
        names[split], arrays[f"{split}_bitmaps"] = _write_images(
            os.path.join(p.images, split), digits[split], rngs[split], test=split == "test"
        )
        arrays |= {f"{split}_images": np.array(names[split]), f"{split}_digits": digits[split]}
    np.savez(p.labels_npz, **arrays)  # type: ignore[arg-type]

    captions = [(i, DESCRIBE, caption(row)) for i, row in enumerate(train)]
    mixed = [*qa["position"], *qa["comparison"]]
    mixed = [mixed[i] for i in rngs["train"].permutation(len(mixed))]
    _write_rows(p.align, names["train"], captions)
    _write_rows(p.instruct_qa, names["train"], mixed)
    _write_rows(p.instruct_yes_no, names["train"], qa["yes_no"])
    for kind, path in p.tests.items():
        _write_rows(path, names["test"], test_qa[kind])
    _write_meta(p.meta_align, {"digits_captions": ("align.jsonl", len(captions), 1)})
    instruct = {
        "digits_qa": ("instruct_qa.jsonl", len(mixed), 1),
        # Yes or no needs all four digits read right and compared: it takes the most practice.
        "digits_yes_no": ("instruct_yes_no.jsonl", len(qa["yes_no"]), 2),
        "digits_captions": ("align.jsonl", len(captions), 2),
    }
    _write_meta(p.meta_instruct, instruct)

    kinds = itertools.cycle((*QUESTION_TYPES, "caption"))
    with open(p.text, "w", encoding="utf-8") as f:
        for row in free(2 * train_canvases, rngs["text"]):
            user, answer = text_example(row, next(kinds), rngs["text"])
            # A document is a line.
            f.write(f"{user}\n{answer}".replace("\n", " ") + "\n")
    return p
