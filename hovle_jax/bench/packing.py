"""`hovle bench packing`: how full rows get, by three ways to pack one stream of samples.

    plan         data.pack.best_fit, window by window: what training uses
    first fit    the same windows, in stream order
    buffer       the running buffer of InternVL 2.5 (internvl/train/dataset_packed.py)

Only lengths are looked at, so a million samples take seconds and no images. *Attention* is the
share of a causal row's blocks that TPU's kernels visit: samples in one row do not see each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from hovle_jax.data.pack import best_fit
from hovle_jax.errors import UserError
from hovle_jax.nn import flash
from hovle_jax.typed import one_of

Lengths = Sequence[tuple[int, int]]
Rows = list[list[int]]

# How often a kind is drawn: captions, documents of many tiles, several images, text alone.
KINDS = {"caption": 0.35, "document": 0.30, "several": 0.10, "text": 0.25}


def synthetic_lengths(count: int, seed: int, *, only: str = "") -> list[tuple[int, int]]:
    """(tokens, tiles) of a made-up instruction mixture, or of one of its `KINDS`.

    Captions have one tile and a sentence, documents 5 to 12 tiles and a thumbnail and some hundred
    tokens of text, rows of several images share the tile limit, text-only conversations have 30 to
    4,000 tokens. Text lengths are log-normal; a chat template takes 31.
    """
    rng = np.random.default_rng(seed)

    def text(median: float, spread: float, most: int) -> int:
        return int(np.clip(rng.lognormal(math.log(median), spread), 30, most))

    def sample(kind: str) -> tuple[int, int]:
        images = {"caption": 1, "document": 1, "several": int(rng.integers(2, 7)), "text": 0}[kind]
        if kind == "document":
            tiles = int(rng.integers(5, 13)) + 1
        elif kind == "several":
            share = rng.integers(1, 12 // images + 1, images)
            tiles = int(np.sum(share + (share > 1)))
        else:
            tiles = images
        words = {"caption": (50, 0.5, 200), "text": (400, 0.9, 4000)}.get(kind, (220, 0.7, 1500))
        # Two brackets per image.
        return 31 + tiles * 256 + 2 * images + text(*words), tiles

    kinds = [only] * count if only else rng.choice(list(KINDS), count, p=list(KINDS.values()))
    return [sample(kind) for kind in kinds]


def suggest_tiles(lengths: Lengths, tokens: int, margin: float = 0.03) -> int:
    """The tile limit for rows of `tokens`: both limits fill together, tiles `margin` less.

    With no margin rows close on either limit and neither fills; with much, tile places stay empty.
    """
    total = np.sum(np.asarray(lengths, np.int64), axis=0)
    needed = math.ceil(tokens * total[1] / total[0] * (1 + margin))
    return max(needed, max(tiles for _, tiles in lengths))


def windows(lengths: Lengths, window: int, pack: Callable[[Lengths], Rows]) -> Rows:
    """Rows of every window, packed by itself."""
    rows = []
    for start in range(0, len(lengths), window):
        rows += [[start + i for i in row] for row in pack(lengths[start : start + window])]
    return rows


def first_fit(lengths: Lengths, tokens: int, tiles: int) -> Rows:
    """Every sample into the first row that has room for it."""
    rows: Rows = []
    free: list[tuple[int, int]] = []
    for i, (t, k) in enumerate(lengths):
        row = next((r for r, (a, b) in enumerate(free) if a >= t and b >= k), len(rows))
        if row == len(rows):
            rows.append([])
            free.append((tokens, tiles))
        rows[row].append(i)
        free[row] = (free[row][0] - t, free[row][1] - k)
    return rows


def greedy_buffer(lengths: Lengths, tokens: int, tiles: int, size: int = 20) -> Rows:
    """InternVL's packing: open rows wait in a buffer, those with most tiles first.

    A sample joins the first open row that holds it. A row leaves when one of its limits is met, or
    as the buffer's first once more than `size` wait. A sample without images takes a blank tile.
    `size` and no splitting of samples are as in the published training scripts.
    """
    done: Rows = []
    waiting: list[tuple[int, int, list[int]]] = []  # (tokens, tiles, samples), most tiles first
    for i, (t, k) in enumerate(lengths):
        k, members = max(k, 1), [i]
        for at, (a, b, row) in enumerate(waiting):
            if a + t <= tokens and b + k <= tiles:
                t, k, members = a + t, b + k, [*row, i]
                del waiting[at]
                break
        if t == tokens or k == tiles:
            done.append(members)
            continue
        at = next((n for n, (_, b, _) in enumerate(waiting) if b < k), len(waiting))
        waiting.insert(at, (t, k, members))
        if len(waiting) > size:
            done.append(waiting.pop(0)[2])
    return done + [row for _, _, row in waiting]


def attention_share(lengths: Lengths, rows: Rows, tokens: int) -> float:
    """Blocks that attention visits in these rows, of those it would visit were each one sample."""
    block = flash.block_of(tokens)
    length = tokens + -tokens % block
    segments = np.zeros((len(rows), length), np.int32)
    for ids, row in zip(segments, rows, strict=True):
        inside = np.repeat(np.arange(1, len(row) + 1), [lengths[i][0] for i in row])
        ids[: len(inside)] = inside
    places = jnp.broadcast_to(jnp.arange(length), segments.shape)
    visited = flash.visits(jnp.asarray(segments), places, block)
    blocks = visited.shape[1]
    return float(visited.sum()) / (len(rows) * blocks * (blocks + 1) / 2)


def compare(
    lengths: Lengths, tokens: int, tiles: int, window: int, buffer: int = 20
) -> dict[str, dict[str, float]]:
    """{packer: {"token_fill", "tile_fill", "attention", "rows", "samples_per_second"}}."""
    packers: dict[str, Callable[[], Rows]] = {
        "plan": lambda: windows(lengths, window, lambda part: best_fit(part, tokens, tiles)),
        "first_fit": lambda: windows(lengths, window, lambda part: first_fit(part, tokens, tiles)),
        "buffer": lambda: greedy_buffer(lengths, tokens, tiles, buffer),
    }
    total = np.sum(np.asarray(lengths, np.int64), axis=0)
    report = {}
    for name, pack in packers.items():
        start = time.perf_counter()
        rows = pack()
        seconds = time.perf_counter() - start
        report[name] = {
            "token_fill": float(total[0] / (len(rows) * tokens)),
            "tile_fill": float(total[1] / (len(rows) * tiles)) if tiles else 1.0,
            "attention": attention_share(lengths, rows[:1000], tokens),
            "rows": len(rows),
            "samples_per_second": len(lengths) / seconds,
        }
    return report


def run_packing(
    samples: int, tokens: int, tiles: int, window: int, seed: int, buffer: int, only: str = ""
) -> dict[str, Any]:
    """The report of `hovle bench packing`; `tiles` 0 takes `suggest_tiles`."""
    for name, value in (("samples", samples), ("tokens", tokens), ("window", window)):
        if value < 1:
            raise UserError(f"--{name}: must be at least 1")
    if only:
        one_of("--only", only, tuple(KINDS))
    lengths = synthetic_lengths(samples, seed, only=only)
    suggested = suggest_tiles(lengths, tokens)
    tiles = tiles or suggested
    if max(t for t, _ in lengths) > tokens or max(k for _, k in lengths) > tiles:
        longest, most = (max(length[n] for length in lengths) for n in (0, 1))
        raise UserError(
            f"--tokens={tokens}, --tiles={tiles}: the longest sample has {longest} tokens, "
            f"the one with most tiles {most}"
        )
    mean_tokens, mean_tiles = np.mean(np.asarray(lengths), axis=0)
    return {
        "samples": samples,
        "seed": seed,
        "tokens": tokens,
        "tiles": tiles,
        "window": window,
        "suggested_tiles": suggested,
        "mean_tokens": float(mean_tokens),
        "mean_tiles": float(mean_tiles),
        "packers": compare(lengths, tokens, tiles, window, buffer),
    }


def packing_text(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines = [
        f"{report['samples']:,} samples, on average {report['mean_tokens']:.0f} tokens and "
        f"{report['mean_tiles']:.2f} tiles; rows of {report['tokens']:,} tokens and "
        f"{report['tiles']} tiles (suggested: {report['suggested_tiles']})",
        f"{'':10} {'token fill':>11} {'tile fill':>10} {'attention':>10} {'rows':>8} "
        f"{'samples/s':>11}",
    ]
    for name, r in report["packers"].items():
        lines.append(
            f"{name:10} {r['token_fill']:11.3f} {r['tile_fill']:10.3f} {r['attention']:10.3f} "
            f"{r['rows']:8,} {r['samples_per_second']:11,.0f}"
        )
    return "\n".join(lines)
