"""Sources -> mixed stream -> packed rows -> batches, as a pure function of (seed, cursor).

    sample sources --grain shuffle, repeat, mix--> stream of (source, record)
      --pack.Plan over measured lengths--> rows --grain map, batch--> host batches

The cursor is two integers, the same for any number of hosts and workers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from hovle_jax.config import RunConfig
from hovle_jax.data.index import lengths_of
from hovle_jax.data.pack import Plan, assemble
from hovle_jax.data.readers import ImageFolder, TextLines
from hovle_jax.data.samples import (
    Conversations,
    Sample,
    SampleSource,
    UnpairedImages,
    check_tokenizer,
)
from hovle_jax.data.sources import open_meta
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.errors import UserError

Cursor = dict[str, int]
START: Cursor = {"window": 0, "row": 0}
HostBatch = dict[str, np.ndarray]


def open_sources(
    config: RunConfig, kind: str, tokenizer: Tokenizer
) -> tuple[list[SampleSource], list[float]]:
    """The stage's sample sources and how often each is drawn, relative to the others."""
    data, model = config.data, config.model
    check_tokenizer(tokenizer, model)
    if kind == "unpaired":
        if not data.images:
            raise UserError(f"config.data.images: stage {config.stage!r} needs image folders")
        text = TextLines("text", data.text) if data.text else None
        folders = [ImageFolder(path, path) for path in data.images]
        sources: list[SampleSource] = [
            UnpairedImages(f, text, tokenizer, model, data, config.seed) for f in folders
        ]
        return sources, [float(len(s)) for s in sources]
    if not data.meta:
        raise UserError(f"config.data.meta: stage {config.stage!r} needs a meta.json")
    entries = open_meta(data.meta)
    sources = [Conversations(e, tokenizer, model, data, config.seed) for e in entries]
    return sources, [len(e.source) * e.repeat for e in entries]


class Stream:
    """The endless mixed stream: n -> (source, record). A fresh permutation in every epoch."""

    def __init__(self, sizes: list[int], weights: list[float], seed: int):
        parts = [
            grain.MapDataset.range(size)
            .seed(seed + 7919 * k)
            .shuffle()
            .repeat()
            .map(functools.partial(_tag, k))
            for k, size in enumerate(sizes)
        ]
        total = sum(weights)
        self._mixed = grain.MapDataset.mix(parts, [w / total for w in weights])

    def __getitem__(self, n: int) -> tuple[int, int]:
        return self._mixed[n]


def _tag(source: int, record: Any) -> tuple[int, int]:
    return source, int(record)


class Rows:
    """Row number -> assembled row; what grain's workers run."""

    def __init__(self, config: RunConfig, pipeline: Pipeline, start: Cursor, weights: str):
        data = config.data
        self._sources, self._stream = pipeline.sources, pipeline.stream
        self._lengths, self._rejects = pipeline.lengths, pipeline.rejects
        self._max_bad = data.max_bad
        self._plan = pipeline.plan(start)
        self._assemble = functools.partial(
            assemble,
            tokens=data.tokens,
            tiles=data.tiles,
            image_size=config.model.image_size,
            weights=weights,
            pad_id=config.model.pad_id,
        )

    def __call__(self, row: int) -> HostBatch:
        """The row, and under "read" how many samples it was to hold and how many were bad."""
        places = self._plan[int(row)]
        samples = [s for draw in places if (s := self._sample(draw)) is not None]
        read = np.array([len(places), len(places) - len(samples)], np.int32)
        return self._assemble(samples) | {"read": read}

    def _sample(self, draw: int) -> Sample | None:
        """None for a record that cannot be read; what it leaves free stays padding.

        So the order of the others does not depend on which files are broken today.
        """
        source, record = self._stream[draw]
        planned = self._lengths[source][record]
        if planned == (0, 0):
            return None
        name = self._sources[source].name
        try:
            sample = self._sources[source].sample(record, draw)
        except UserError as reason:
            if not self._max_bad:
                raise
            self._reject(name, record, str(reason))
            return None
        found = len(sample.ids), len(sample.tiles)
        if found != planned:
            raise UserError(
                f"{name}: record {record + 1} has {found} tokens and tiles, but had {planned} "
                "when it was measured: an image was exchanged; delete the index "
                "(config.data.index, or WORKDIR/index)"
            )
        return sample

    def _reject(self, source: str, record: int, reason: str) -> None:
        if self._rejects is not None:
            row = {"source": source, "record": record, "reason": reason}
            with self._rejects.open("a") as file:  # one short write: worker processes share it
                file.write(json.dumps(row) + "\n")


class Pipeline:
    """The data of one stage: measured once, then read from any cursor on."""

    def __init__(
        self,
        config: RunConfig,
        kind: str,
        token_weights: str,
        tokenizer: Tokenizer,
        *,
        index: Path | None = None,
        quiet: bool = False,
    ):
        """`index`: directory that keeps measured lengths and lists bad records."""
        self._config, self._weights = config, token_weights
        self.rejects = None if index is None else index / "rejects.jsonl"
        self.read = np.zeros(2, np.int64)  # samples drawn by this host so far, bad ones among them
        self.sources, weights = open_sources(config, kind, tokenizer)
        data = config.data
        self.lengths = [lengths_of(source, data, index, quiet=quiet) for source in self.sources]
        self.stream = Stream([len(s) for s in self.sources], weights, config.seed)

    def _length(self, n: int) -> tuple[int, int]:
        source, record = self.stream[n]
        return self.lengths[source][record]

    def plan(self, start: Cursor) -> Plan:
        data = self._config.data
        return Plan(
            self._length,
            window=data.window,
            tokens=data.tokens,
            tiles=data.tiles,
            start=(start["window"], start["row"]),
        )

    def batches(
        self, start: Cursor | None = None, *, host: int = 0, hosts: int = 1
    ) -> Iterator[tuple[HostBatch, Cursor]]:
        """This host's part of every global batch from `start` on, with the cursor after it."""
        start = START if start is None else start
        data = self._config.data
        if data.rows % hosts:
            raise UserError(f"config.data.rows {data.rows} is not a multiple of {hosts} hosts")
        here = data.rows // hosts

        def global_row(i: int) -> int:
            return i // here * data.rows + host * here + i % here

        # Batched as a MapDataset: workers then share out whole batches, and change nothing.
        batches = (
            grain.MapDataset.range(2**62)
            .map(global_row)
            .map(Rows(self._config, self, start, self._weights))
            .batch(here)
        )
        dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
        if data.workers:
            if not flags.FLAGS.is_parsed():  # grain's workers read absl flags
                flags.FLAGS(["hovle"], known_only=True)
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.workers))
        plan = self.plan(start)
        for step, batch in enumerate(dataset, start=1):
            self._count(batch.pop("read").sum(axis=0))
            window, row = plan.locate(step * data.rows)
            yield batch, {"window": window, "row": row}

    def _count(self, read: np.ndarray) -> None:
        self.read += read
        drawn, bad = self.read
        # A few in a row mean little; a broken disk or a moved folder is many.
        if bad > max(self._config.data.max_bad * drawn, 10):
            where = f"; see {self.rejects}" if self.rejects else ""
            raise UserError(
                f"{bad} of {drawn} samples could not be read, more than config.data.max_bad="
                f"{self._config.data.max_bad}{where}"
            )
