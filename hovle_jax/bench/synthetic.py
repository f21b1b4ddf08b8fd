"""A made-up data set on disk, for benchmarks: real photos, invented words.

images/*.jpg     scikit-learn's two photos, reflected to 640x480, 1280x960 and 2048x1536
captions         one tile and a sentence
documents        up to max_tiles tiles and a thumbnail, some hundred words
several          two to four images in one conversation
text             conversations without images
meta.json        the four, in InternVL's format; tokenizer/ is trained on their words
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hovle_jax.bench.packing import KINDS
from hovle_jax.config import DataConfig, ModelConfig, RunConfig
from hovle_jax.data.tokenizer import Tokenizer, train_tokenizer
from hovle_jax.modules import require

SIZES = ((640, 480), (1280, 960), (2048, 1536))
_VOCABULARY = (
    "a the of and to in is on with for at by from that this it as photo building tower roof sky "
    "flower petal leaf garden colour yellow blue green light shadow stone water tree people walks "
    "under table page number total column report figure shows answer question which where how many"
)
_WORDS = _VOCABULARY.split()


def photos() -> list[np.ndarray]:
    """uint8 [427, 640, 3] each. UserError without scikit-learn."""
    datasets = require("sklearn.datasets", "demo", "made-up data (or give --config)")
    return list(datasets.load_sample_images().images)


def write_photos(directory: Path, sizes: Sequence[tuple[int, int]], each: int) -> list[str]:
    """JPEGs of quality 90, `each` of every (width, height); returns their names.

    Photos are cropped and reflected, not enlarged, so that large ones have as much detail.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    sources, names = photos(), []
    for width, height in sizes:
        for n in range(each):
            pixels = sources[n % len(sources)]
            top, left = (int(rng.integers(0, side // 3)) for side in pixels.shape[:2])
            pixels = pixels[top:, left:]
            below = max(height - pixels.shape[0], 0)
            right = max(width - pixels.shape[1], 0)
            pixels = np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="symmetric")
            names.append(f"{width}x{height}_{n}.jpg")
            Image.fromarray(pixels[:height, :width]).save(directory / names[-1], quality=90)
    return names


def _rows(kind: str, count: int, names: Sequence[str], rng: np.random.Generator) -> list[Any]:
    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(_WORDS, int(rng.integers(low, high))))

    def turns(question: str, answer: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    rows: list[Any] = []
    for i in range(count):
        images = [str(name) for name in rng.choice(names, int(rng.integers(2, 5)))]
        match kind:
            case "caption":
                row = {"image": images[0], "conversations": turns("<image>", words(20, 90))}
            case "document":
                talk = turns(f"<image>\n{words(5, 20)}", words(60, 500))
                row = {
                    "image": images[0],
                    "conversations": talk + turns(words(5, 20), words(5, 90)),
                }
            case "several":
                talk = turns("<image>\n" * len(images) + words(5, 20), words(40, 300))
                row = {"image": images, "conversations": talk}
            case _:
                pairs = [
                    turns(words(5, 40), words(20, 300)) for _ in range(int(rng.integers(1, 6)))
                ]
                row = {"conversations": sum(pairs, [])}
        rows.append({"id": i, **row})
    return rows


def write_data(
    root: Path,
    *,
    rows: int = 1000,
    each: int = 24,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> None:
    """Writes the data set; `rows` over all kinds, `each` photos of every size."""
    rng = np.random.default_rng(0)
    names = write_photos(root / "images", sizes, each)
    meta: dict[str, dict[str, Any]] = {}
    texts: list[str] = []
    for kind, share in KINDS.items():
        made = _rows(kind, max(round(rows * share), 1), names, rng)
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        meta[kind] = {"root": "images", "annotation": f"{kind}.jsonl"}
        texts += [turn["value"] for row in made for turn in row["conversations"]]
    meta["caption"]["max_dynamic_patch"] = 1
    (root / "meta.json").write_text(json.dumps(meta))
    train_tokenizer([*texts[:500], _VOCABULARY, "user system assistant\n"], root / "tokenizer", 600)


def bench_config(root: Path, stage: str, *, unpaired: bool, model: ModelConfig) -> RunConfig:
    """A run of `stage` on the data set: the row limits of configs/stage*.py, four rows a batch."""
    tokenizer = Tokenizer.load(root / "tokenizer")
    model = dataclasses.replace(model, **tokenizer.model_fields())
    data = DataConfig(
        meta="" if unpaired else str(root / "meta.json"),
        images=(str(root / "images"),) if unpaired else (),
        tokenizer=str(root / "tokenizer"),
        system="",
        rows=4,
    )
    if unpaired:
        tokens = 8 * (2 * model.tokens_per_tile + 3)
        limits: dict[str, Any] = {"tokens": tokens, "tiles": 8, "max_tiles": 1, "thumbnail": False}
    else:
        limits = {"tokens": 32 * model.tokens_per_tile, "tiles": 26}
    return RunConfig(stage=stage, model=model, data=dataclasses.replace(data, **limits))
