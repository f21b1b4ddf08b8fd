"""The tasks of a study: labelled canvases, questions about them, and files a run can read.

    digits   four handwritten digits; "Which digit is top-left?"; held out are other writers
    words    a word in Pillow's scalable font; "read"; held out are words never seen in training

A canvas has four regions with one symbol each, which the stand-in teacher learns to see.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hovle_jax.data.tokenizer import Tokenizer, train_tokenizer
from hovle_jax.demo import digits, standins
from hovle_jax.errors import UserError
from hovle_jax.registry import Registry
from hovle_jax.study.plan import Sizes

SPLITS = ("train", "unpaired", "test")
QUESTIONS = 2  # of each training canvas
Symbols = Sequence[int]  # of the four regions


@dataclass(frozen=True)
class Task:
    symbols: str  # of which a region shows one
    draw: Callable[[np.random.Generator, bool], list[int]]  # (rng, held out?) -> numbers of symbols
    render: Callable[[Symbols, np.random.Generator, bool], np.ndarray]  # uint8 [32, 32, 3]
    caption: Callable[[Symbols], str]
    ask: Callable[[Symbols, int], tuple[str, str]]  # (symbols, number) -> (question, answer)
    describe: str  # asks for the caption
    lines: Callable[[], Iterable[str]]  # what the tokenizer is trained on
    vocab: int  # pieces it may have
    pool: Callable[[jax.Array], jax.Array]  # features [N, T, E] -> regions [N, 4, E]

    def text(self, rng: np.random.Generator, i: int, test: bool) -> tuple[str, str]:
        """A question about a canvas that is its caption: (user, answer)."""
        symbols = self.draw(rng, False)
        question, answer = self.ask(symbols, int(rng.integers(4)))
        if not test and i % 4 == 3:
            question, answer = self.describe, self.caption(symbols)
        return f"{self.caption(symbols)}\n{question}", answer


TASKS: Registry[Task] = Registry("study.tasks")

_CONSONANTS, _VOWELS = "BDFGKLMNPRST", "AEIU"
_LETTERS = _CONSONANTS + _VOWELS
_PITCH = digits.CANVAS // 4


def _draw_word(rng: np.random.Generator, test: bool) -> list[int]:
    """Consonant, vowel, consonant, vowel; every fifth such word is held out."""
    while True:
        c, v = rng.integers(len(_CONSONANTS), size=2), rng.integers(len(_VOWELS), size=2)
        if (int(c[0] * 7 + v[0] * 3 + c[1] * 11 + v[1]) % 5 == 0) == test:
            n = len(_CONSONANTS)
            return [int(c[0]), n + int(v[0]), int(c[1]), n + int(v[1])]


def _word(symbols: Symbols) -> str:
    return "".join(_LETTERS[i] for i in symbols)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _render_word(symbols: Symbols, rng: np.random.Generator, test: bool) -> np.ndarray:
    ink, light = int(rng.integers(0, 70)), int(rng.integers(180, 256))
    image = Image.new("L", (digits.CANVAS, digits.CANVAS), light)
    draw, font = ImageDraw.Draw(image), _font(int(rng.integers(9, 12)))
    left, middle = rng.uniform(-0.7, 0.7), rng.uniform(9, digits.CANVAS - 9)
    for i, letter in enumerate(_word(symbols)):
        place = (left + _PITCH * (i + 0.5), middle + rng.uniform(-1, 1))
        draw.text(place, letter, fill=ink, font=font, anchor="mm")
    noisy = np.asarray(image, np.float32)[..., None] + rng.normal(0, 6, (1, 1, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _columns(features: jax.Array) -> jax.Array:
    n, tokens, e = features.shape
    side = round(tokens**0.5)
    return features.reshape(n, side, 4, side // 4, e).mean((1, 3))


TASKS.add("words")(
    Task(
        symbols=_LETTERS,
        draw=_draw_word,
        render=_render_word,
        caption=lambda symbols: " ".join(_word(symbols)),
        ask=lambda symbols, _: ("read", _word(symbols)),
        describe="spell",
        # Letters apart, so that no two of them become one piece.
        lines=lambda: [*_LETTERS, " ", "read", "spell", "system\nuser\nassistant"],
        vocab=80,
        pool=_columns,
    )
)


def _render_digits(symbols: Symbols, rng: np.random.Generator, test: bool) -> np.ndarray:
    scans = digits.choose_bitmaps(symbols, rng, test=test)
    return digits.render(scans, rng, augment=not test)


def _position(symbols: Symbols, number: int) -> tuple[str, str]:
    return f"Which digit is {digits.CELLS[number % 4]}?", str(symbols[number % 4])


TASKS.add("digits")(
    Task(
        symbols="0123456789",
        draw=lambda rng, _: rng.integers(10, size=4).tolist(),
        render=_render_digits,
        caption=digits.caption,
        ask=_position,
        describe=digits.DESCRIBE,
        lines=digits.tokenizer_lines,
        vocab=160,
        pool=standins.quadrants,
    )
)


@dataclass(frozen=True)
class Files:
    """What a task is on disk; `places` are the paths that changes of an arm may name."""

    root: Path

    @property
    def places(self) -> dict[str, str]:
        names = ("align", "instruct", "align_text", "instruct_text")
        return {f"{{{name}}}": str(self.root / f"{name}.json") for name in names}

    @property
    def tokenizer(self) -> str:
        return str(self.root / "tokenizer")

    @property
    def test(self) -> Path:
        return self.root / "test.jsonl"

    def unpaired(self, images: int) -> str:
        """The folder of stage I's canvases, or one with the first few of them."""
        whole = self.root / "unpaired"
        if not images:
            return str(whole)
        names = sorted(path.name for path in whole.iterdir())
        if images > len(names):
            raise UserError(f"study: an arm asks for {images} of {len(names)} unpaired images")
        part = self.root / f"unpaired-{images}"
        part.mkdir(exist_ok=True)
        for name in names[:images]:
            if not (part / name).exists():
                (part / name).hardlink_to(whole / name)
        return str(part)

    def labelled(self, *splits: str) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 [n, 32, 32, 3], numbers of symbols [n, 4])."""
        with np.load(self.root / "labels.npz") as found:
            labels = np.concatenate([found[split] for split in splits])
        paths = [path for split in splits for path in sorted((self.root / split).iterdir())]
        return np.stack([np.asarray(Image.open(path)) for path in paths]), labels


def write(task: Task, root: Path, seed: int, sizes: Sizes) -> tuple[Files, Tokenizer]:
    """The files of a task, the same for the same seed."""
    files, labels = Files(root), {}
    for i, split in enumerate(SPLITS):
        rng = np.random.default_rng((seed, i))
        held_out = split == "test"
        (root / split).mkdir(parents=True, exist_ok=True)
        labels[split] = [task.draw(rng, held_out) for _ in range(getattr(sizes, split))]
        for n, symbols in enumerate(labels[split]):
            image = Image.fromarray(task.render(symbols, rng, held_out))
            image.save(root / split / f"{n:05d}.png", compress_level=1)
    np.savez(root / "labels.npz", **{k: np.array(v) for k, v in labels.items()})  # type: ignore[arg-type]
    train, test = labels["train"], labels["test"]
    captions = [(f"train/{n:05d}.png", task.describe, task.caption(s)) for n, s in enumerate(train)]
    asked = [
        (f"train/{n:05d}.png", *task.ask(s, QUESTIONS * n + q))
        for n, s in enumerate(train)
        for q in range(QUESTIONS)
    ]
    rng = np.random.default_rng((seed, len(SPLITS)))
    spoken = [("", *task.text(rng, n, False)) for n in range(len(train))]
    _write_rows(root / "captions.jsonl", captions)
    _write_rows(root / "questions.jsonl", asked)
    _write_rows(root / "text.jsonl", spoken)
    _write_rows(files.test, [(f"test/{n:05d}.png", *task.ask(s, n)) for n, s in enumerate(test)])
    text = {"text": 0.25}
    for name, parts in (("align", {"captions": 1.0}), ("instruct", {"questions": 1.0})):
        _write_meta(root / f"{name}.json", parts)
        _write_meta(root / f"{name}_text.json", parts | text)
    return files, train_tokenizer(task.lines(), root / "tokenizer", task.vocab)


def _write_rows(path: Path, rows: Sequence[tuple[str, str, str]]) -> None:
    """(image or '', question, answer) as InternVL's jsonl."""
    with path.open("w") as out:
        for i, (image, question, answer) in enumerate(rows):
            human = f"<image>\n{question}" if image else question
            turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
            row = {"id": i, "conversations": turns} | ({"image": image} if image else {})
            out.write(json.dumps(row) + "\n")


def _write_meta(path: Path, shares: dict[str, float]) -> None:
    root = path.parent.resolve()
    meta = {
        name: {
            "root": str(root),
            "annotation": str(root / f"{name}.jsonl"),
            "data_augment": False,
            "weight": share,
        }
        for name, share in shares.items()
    }
    path.write_text(json.dumps(meta, indent=2) + "\n")
