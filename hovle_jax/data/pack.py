"""Packing as a plan: which samples share a row is decided from their lengths alone.

The mixed stream of samples is cut into windows of `window` samples; each window is packed by itself
(best fit, largest first, under both limits). So a window's rows are a pure function of the stream,
any window can be planned without the ones before it, and hosts and workers agree without talking.
"""

from __future__ import annotations

import bisect
import collections
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hovle_jax.config import IGNORE
from hovle_jax.data.samples import Sample
from hovle_jax.errors import UserError

TOKEN_WEIGHTS: dict[str, Callable[[int], float]] = {
    "token": lambda n: 1.0,  # every answer token counts the same
    "sample": lambda n: 1.0 / n,  # every sample counts the same
    "square": lambda n: n**-0.5,  # between the two (InternVL-2.5)
}


def best_fit(lengths: Sequence[tuple[int, int]], tokens: int, tiles: int) -> list[list[int]]:
    """Rows of sample numbers; each row holds at most `tokens` and `tiles`, and keeps their order.

    lengths: (tokens, tiles) per sample. The size of a sample is what it takes of both limits
    together (by tokens alone, rows of many small pictures fill badly); the largest is placed first,
    each where it leaves the least. Rows come in the stream order of their largest samples, so a
    window does not begin with all its long documents.

    Raises:
      UserError: a sample that fits no row.
    """
    # In units of 1 / (tokens * tiles), so that sizes are whole numbers, the same on every machine.
    sizes = [t * max(tiles, 1) + k * tokens for t, k in lengths]
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    # (size left, row), ascending: what a sample leaves is least in the first row that holds it.
    room: list[tuple[int, int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-sizes[i], i)):
        t, k = lengths[i]
        if t > tokens or k > tiles:
            raise UserError(f"a sample of {t} tokens and {k} tiles fits no row")
        at = bisect.bisect_left(room, (sizes[i], 0))
        while at < len(room) and (free[room[at][1]][0] < t or free[room[at][1]][1] < k):
            at += 1
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = tokens * (max(tiles, 1) + tiles), len(rows)
            rows.append([])
            free.append((tokens, tiles))
        rows[row].append(i)
        free[row] = (free[row][0] - t, free[row][1] - k)
        bisect.insort(room, (left - sizes[i], row))
    return [sorted(row) for row in sorted(rows)]


class Plan:
    """Rows of the packed stream, numbered from a starting place on.

    A place is (window, row inside the window): the whole data cursor.
    """

    def __init__(
        self,
        length: Callable[[int], tuple[int, int]],
        *,
        window: int,
        tokens: int,
        tiles: int,
        start: tuple[int, int] = (0, 0),
        stop: int | None = None,
    ):
        """`length` gives (tokens, tiles) of the n-th sample of the stream, which ends at `stop`."""
        self._stop = stop
        self._length, self._window = length, window
        self._tokens, self._tiles = tokens, tiles
        # First row number of each window known so far; windows are visited in order.
        self._window0, skipped = start
        self._firsts = [-skipped]
        self._cache: collections.OrderedDict[int, list[list[int]]] = collections.OrderedDict()
        self._lock = threading.RLock()  # grain reads rows from several threads

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._lock = threading.RLock()

    def rows(self, window: int) -> list[list[int]]:
        """The window's rows, each a list of places in the stream."""
        with self._lock:
            rows = self._cache.get(window)
            if rows is None:
                base = window * self._window
                end = base + self._window
                end = end if self._stop is None else min(end, self._stop)
                lengths = [self._length(n) for n in range(base, end)]
                packed = best_fit(lengths, self._tokens, self._tiles)
                rows = [[base + i for i in row] for row in packed]
                self._cache[window] = rows
                while len(self._cache) > 8:
                    self._cache.popitem(last=False)
            return rows

    def locate(self, row: int) -> tuple[int, int]:
        """Place of the row-th row after the start."""
        with self._lock:
            while True:
                k = bisect.bisect_right(self._firsts, row) - 1
                offset = row - self._firsts[k]
                rows = self.rows(self._window0 + k)
                if offset < len(rows):
                    return self._window0 + k, offset
                self._firsts.append(self._firsts[k] + len(rows))

    def count(self) -> int:
        """Rows of a stream that ends."""
        assert self._stop is not None
        with self._lock:
            while (known := len(self._firsts) - 1) < -(-self._stop // self._window):
                self._firsts.append(self._firsts[-1] + len(self.rows(self._window0 + known)))
            return self._firsts[-1]

    def __getitem__(self, row: int) -> list[int]:
        """Places of a row's samples; none past the end of the stream."""
        if self._stop is not None and row >= self.count():
            return []
        window, offset = self.locate(row)
        return self.rows(window)[offset]


def assemble(
    samples: Sequence[Sample],
    sources: Sequence[int] | None = None,
    *,
    tokens: int,
    tiles: int,
    image_size: int,
    weights: str,
    pad_id: int,
) -> dict[str, np.ndarray]:
    """Samples -> one static row (the batch of hovle_jax.model, without its leading axis).

    Segments count from 1, positions restart in each, padding is segment 0. `sources`: the number
    of the data source of each sample (0 by default).
    """
    sources = [0] * len(samples) if sources is None else sources
    row: dict[str, np.ndarray] = {
        "input_ids": np.full(tokens, pad_id, np.int32),
        "segment_ids": np.zeros(tokens, np.int32),
        "position_ids": np.zeros(tokens, np.int32),
        "source_ids": np.zeros(tokens, np.int32),
        "labels": np.full(tokens, IGNORE, np.int32),
        "loss_weight": np.zeros(tokens, np.float32),
        "pixels": np.zeros((tiles, image_size, image_size, 3), np.uint8),
    }
    token = tile = 0
    for segment, (sample, source) in enumerate(zip(samples, sources, strict=True), start=1):
        n, predicted = len(sample.ids), sample.labels >= 0
        place = slice(token, token + n)
        row["input_ids"][place] = sample.ids
        row["segment_ids"][place] = segment
        row["position_ids"][place] = np.arange(n)
        row["source_ids"][place] = source
        row["labels"][place] = sample.labels
        if predicted.any():
            weight = TOKEN_WEIGHTS[weights](int(predicted.sum()))
            row["loss_weight"][place] = np.where(predicted, weight, 0.0)
        row["pixels"][tile : tile + len(sample.tiles)] = sample.tiles
        token, tile = token + n, tile + len(sample.tiles)
    return row
