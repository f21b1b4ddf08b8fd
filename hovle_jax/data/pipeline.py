"""Sources -> mixed stream -> packed rows -> batches, as a pure function of (seed, cursor).

    sample sources --mixture.Stream--> draws --pack.Plan over measured lengths--> rows
      --grain map, batch--> host batches

The cursor is the window, the row in it, the mixture's phases and a digest of each source's lengths:
a few numbers per source, the same for any number of hosts and workers.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from hovle_jax.config import RunConfig
from hovle_jax.data import files, image
from hovle_jax.data.index import Lengths, lengths_of
from hovle_jax.data.mixture import Draw, Phase, Stream, phases_from
from hovle_jax.data.pack import Plan, assemble
from hovle_jax.data.readers import TextLines
from hovle_jax.data.samples import (
    Conversations,
    Sample,
    SampleSource,
    UnpairedImages,
    check_tokenizer,
)
from hovle_jax.data.sources import MetaEntry, open_images, open_meta
from hovle_jax.data.token_shards import TokenShards
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.data.workers import follow_parent
from hovle_jax.errors import UserError, one_line

Cursor = dict[str, Any]
START: Cursor = {"window": 0, "row": 0, "mixture": []}
HostBatch = dict[str, np.ndarray]


def open_sources(
    config: RunConfig, kind: str, tokenizer: Tokenizer
) -> tuple[Sequence[SampleSource], list[MetaEntry]]:
    """The stage's sample sources and what each was made of."""
    data, model = config.data, config.model
    check_tokenizer(tokenizer, model)
    unpaired = kind == "unpaired"
    _check_keys(config, unpaired)
    if unpaired and data.images:
        entries = [open_images(path) for path in data.images]
    elif data.meta:
        entries = open_meta(data.meta, data.repeat_mode, images_only=unpaired)
    else:
        key = "images, or config.data.meta," if unpaired else "meta"
        raise UserError(f"config.data.{key}: stage {config.stage!r} has no data")
    if not unpaired:
        return [Conversations(e, tokenizer, model, data, config.seed) for e in entries], entries
    _check_unpaired(config, entries)
    text = _open_text(data.text, tokenizer)
    images = [UnpairedImages(e, text, tokenizer, model, data, config.seed) for e in entries]
    return images, entries


def _share(entry: MetaEntry, lengths: Lengths) -> float:
    """Draws of a source, relative to the others; a weight is of samples, and of records that are
    left out none come."""
    if entry.weight is None:
        return len(entry.source) * entry.repeat
    return entry.weight * (len(lengths) / (len(lengths) - lengths.summary.left_out))


def _check_unpaired(config: RunConfig, entries: Sequence[MetaEntry]) -> None:
    """Refuses what is asked for and only conversations have."""
    if config.data.too_long != "error":
        raise UserError(
            f"config.data.too_long={config.data.too_long!r}: stage {config.stage!r} has no turns "
            "to cut; its images take as many tiles as config.data.max_tiles says"
        )
    for entry in entries:
        if entry.augment:
            raise UserError(
                f"{config.data.meta}: {entry.name!r}: data_augment: stage {config.stage!r} takes "
                "images as they are; leave it out of its meta file"
            )


def _check_keys(config: RunConfig, unpaired: bool) -> None:
    """Refuses data that the stage would not look at."""
    data = config.data
    unread = ("meta",) if unpaired and data.images else () if unpaired else ("images", "text")
    for key in unread:
        if getattr(data, key):
            beside = " beside config.data.images" if unpaired else ""
            raise UserError(
                f"config.data.{key}: stage {config.stage!r} does not read it{beside}; leave it out"
            )


def _open_text(path: str, tokenizer: Tokenizer) -> TextLines | TokenShards | None:
    if os.path.isdir(path):
        return TokenShards(path, tokenizer)
    return TextLines(path) if path else None


class Split:
    """The part of a source's records that a run trains on, or that it holds out.

    Every `holdout`-th record is held out, whatever the seed, so that no run of the same data ever
    trains on it.
    """

    def __init__(self, size: int, holdout: int, held: bool = False):
        self._every, self._held = holdout, held
        out = size // holdout if holdout else 0
        self._size = out if held else size - out

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int) -> int:
        """Number of the part's i-th record in the source."""
        if self._held:
            return (i + 1) * self._every - 1
        return i + i // (self._every - 1) if self._every else i


class OnePass:
    """[n] -> `Draw`: every record of every source once, in order."""

    def __init__(self, sizes: list[int]):
        self._ends = np.cumsum(sizes).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, n: int) -> Draw:
        source = bisect.bisect_right(self._ends, n)
        record = n - (self._ends[source - 1] if source else 0)
        return Draw(source, record, record)


@dataclasses.dataclass
class Reader:
    """A stream of draws with all that it takes to plan and read its rows."""

    config: RunConfig
    weights: str  # of answer tokens (pack.TOKEN_WEIGHTS)
    sources: Sequence[SampleSource]
    lengths: list[Lengths]
    splits: list[Split]
    stream: Stream | OnePass
    rejects: Path | None
    news: str = ""  # how the mixture differs from the cursor's

    def origin(self, n: int) -> tuple[int, int]:
        """(source, record in it) of a place in the stream."""
        draw = self.stream[n]
        return draw.source, self.splits[draw.source][draw.record]

    def origins(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Of the segments of a row: {source, record (from 1), draw (place in the stream)}."""
        found = []
        for place in places:
            source, record = self.origin(place)
            name = self.sources[source].name
            found.append({"source": name, "record": record + 1, "draw": place})
        return found

    def length(self, n: int) -> tuple[int, int]:
        source, record = self.origin(n)
        return self.lengths[source][record]

    def plan(self, start: Cursor = START) -> Plan:
        data = self.config.data
        return Plan(
            self.length,
            window=data.window,
            tokens=data.tokens,
            tiles=data.tiles,
            start=(start["window"], start["row"]),
            stop=len(self.stream) if isinstance(self.stream, OnePass) else None,
        )

    def row(self, places: Sequence[int]) -> HostBatch:
        """Samples at `places` as a row, and under "read" how many there were and how many bad."""
        data = self.config.data
        # Of (0, 0) the index already says that it is left out: neither drawn nor bad.
        places = [n for n in places if self.length(n) != (0, 0)]
        samples = {n: s for n in places if (s := self._sample(n)) is not None}
        row = assemble(
            list(samples.values()),
            [self.stream[n].source for n in samples],
            tokens=data.tokens,
            tiles=data.tiles,
            image_size=self.config.model.image_size,
            weights=self.weights,
            pad_id=self.config.model.pad_id,
        )
        return row | {"read": np.array([len(places), len(places) - len(samples)], np.int32)}

    def _sample(self, n: int) -> Sample | None:
        """None for a record that cannot be read; what it leaves free stays padding.

        So the order of the others does not depend on which files are broken today.
        """
        number, record = self.origin(n)
        source, planned = self.sources[number], self.lengths[number][record]
        try:
            sample = source.sample(record, self.stream[n].seen)
        except UserError as reason:
            if not self.config.data.max_bad:
                raise
            self._reject(source.name, record, str(reason))
            return None
        found = len(sample.ids), len(sample.tiles)
        if found != planned:
            raise UserError(
                f"{source.name}: record {record + 1} has {found} tokens and tiles, but had "
                f"{planned} when it was measured: an image was exchanged; delete the index "
                "(config.data.index, or WORKDIR/index)"
            )
        return sample

    def _reject(self, source: str, record: int, reason: str) -> None:
        if self.rejects is not None:
            row = {"source": source, "record": record, "reason": reason}
            with self.rejects.open("a") as file:  # one short write: worker processes share it
                file.write(json.dumps(row) + "\n")


class Rows:
    """Row number -> assembled row; what grain's workers run."""

    def __init__(self, reader: Reader, start: Cursor = START):
        self._reader, self._plan = reader, reader.plan(start)

    def __call__(self, row: int) -> HostBatch:
        return self._reader.row(self._plan[int(row)])


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
        rejects: Path | None = None,
        quiet: bool = False,
        workers: int = 0,
    ):
        """`index`: directory that keeps lengths, measured by `workers` processes (0: this one);
        `rejects`: file that lists samples which cannot be read."""
        image.self_test()
        files.allow_many_open()
        self._config, data = config, config.data
        self.read = np.zeros(2, np.int64)  # samples drawn by this host so far, bad ones among them
        self._recent = np.zeros(2)  # of the last thousand or so, older ones counting less
        self.sources, entries = open_sources(config, kind, tokenizer)
        self.names = [source.name for source in self.sources]
        _check_names(self.names, data.max_sources)
        measure = functools.partial(
            lengths_of, data=data, directory=index, quiet=quiet, workers=workers
        )
        self.lengths = [measure(source) for source in self.sources]
        self._shares = [_share(*pair) for pair in zip(entries, self.lengths, strict=True)]
        # By name: what hosts must have alike, and a cursor is good for.
        self.digests = {
            name: lengths.summary.digest
            for name, lengths in zip(self.names, self.lengths, strict=True)
        }
        self.rejects = rejects
        self._reader = functools.partial(
            Reader, config, token_weights, self.sources, self.lengths, rejects=self.rejects
        )

    def reader(self, start: Cursor = START) -> tuple[Reader, Cursor]:
        """What is read from a cursor on, and the cursor to begin at.

        Where the mixture is another than the cursor's, it holds from the next window on. Should
        the current one need a source that is gone, or be packed otherwise because records have
        other lengths, what is left of it is given up: some would be read twice, others never.
        """
        data = self._config.data
        splits = [Split(len(source), data.holdout) for source in self.sources]
        sizes = {name: len(split) for name, split in zip(self.names, splits, strict=True)}
        weights = dict(zip(self.names, self._shares, strict=True))
        window, row = start["window"], start["row"]
        following = (window + bool(row)) * data.window
        phases = phases_from(start["mixture"], sizes, weights, following)
        news = []
        if start["mixture"] and dataclasses.asdict(phases[-1]) != start["mixture"][-1]:
            news.append(_change(start["mixture"][-1]["sizes"], phases[-1]))
        before = start.get("lengths", {})  # older cursors have none
        if other := [n for n, digest in self.digests.items() if before.get(n, digest) != digest]:
            news.append(f"records of other lengths than before: {', '.join(other)}")
        if other or any(set(phase.sizes) - set(sizes) for phase in phases[:-1]):
            if row:
                news.append(f"the rest of a window of {data.window} samples is not read")
            window, row, phases = window + bool(row), 0, phases[-1:]
        stream = Stream(self.names, phases, self._config.seed)
        cursor = self._cursor(window, row, phases)
        return self._reader(splits=splits, stream=stream, news="; ".join(news)), cursor

    def _cursor(self, window: int, row: int, phases: Sequence[Phase]) -> Cursor:
        """Only the phases that the window and those after it need."""
        starts = [phase.start for phase in phases]
        first = max(bisect.bisect_right(starts, window * self._config.data.window) - 1, 0)
        mixture = [dataclasses.asdict(phase) for phase in phases[first:]]
        return {"window": window, "row": row, "mixture": mixture, "lengths": self.digests}

    def summary(self, start: Cursor = START) -> list[str]:
        """A line per source (its share, its records, how often they were read), and on changes."""
        reader, start = self.reader(start)
        assert isinstance(reader.stream, Stream)
        drawn = reader.stream.drawn(start["window"] * self._config.data.window)
        kept = [1 - x.summary.left_out / len(x) for x in self.lengths]
        given = [share * part for share, part in zip(self._shares, kept, strict=True)]
        lines = [reader.news] if reader.news else []
        for name, split, lengths, samples in zip(
            self.names, reader.splits, self.lengths, given, strict=True
        ):
            left_out = lengths.summary.left_out
            lines.append(
                f"{name}: {samples / sum(given):.2%} of the samples, {len(split):,} records, "
                f"read {drawn.get(name, 0) / len(split):.2f} times so far"
                + (f"; {left_out:,} of {len(lengths):,} are left out" if left_out else "")
            )
        return lines

    def batches(
        self, start: Cursor = START, *, host: int = 0, hosts: int = 1
    ) -> Iterator[tuple[HostBatch, Cursor]]:
        """This host's part of every global batch from `start` on, with the cursor after it."""
        reader, start = self.reader(start)
        rows, plan = self._config.data.rows, reader.plan(start)
        assert isinstance(reader.stream, Stream)
        dataset = self._host_batches(Rows(reader, start), 2**62, host, hosts)
        for step, batch in enumerate(dataset, start=1):
            self._count(batch.pop("read").sum(axis=0))
            place = plan.locate(step * rows)
            yield batch, self._cursor(*place, reader.stream.phases)

    def origins(self, start: Cursor) -> list[list[dict[str, Any]]]:
        """What is in each row of the first global batch after a cursor (`Reader.origins`)."""
        reader, start = self.reader(start)
        plan = reader.plan(start)
        return [reader.origins(plan[row]) for row in range(self._config.data.rows)]

    def held_out(self, *, host: int = 0, hosts: int = 1) -> Iterator[HostBatch]:
        """This host's part of one pass over the held-out records, in order.

        Every host gets the same number of batches: the last ones are filled up with empty rows.
        """
        data = self._config.data
        if not data.holdout:
            raise UserError("config.data.holdout: is 0, no records are held out")
        splits = [Split(len(source), data.holdout, held=True) for source in self.sources]
        stream = OnePass([len(split) for split in splits])
        reader = self._reader(splits=splits, stream=stream)
        here = data.rows // hosts
        if not len(stream):
            raise UserError(f"config.data.holdout: no source has {data.holdout} records")
        batches = -(-reader.plan().count() // data.rows)
        for batch in self._host_batches(Rows(reader), batches * here, host, hosts):
            self._count(batch.pop("read").sum(axis=0))
            yield batch

    def _host_batches(self, rows: Rows, count: int, host: int, hosts: int) -> Any:
        """`count` rows of this host, batched, from threads or worker processes."""
        data = self._config.data
        if data.rows % hosts:
            raise UserError(f"config.data.rows {data.rows} is not a multiple of {hosts} hosts")
        number = functools.partial(global_row, rows=data.rows, host=host, hosts=hosts)
        # Batched as a MapDataset: workers then share out whole batches, and change nothing.
        batches = grain.MapDataset.range(count).map(number).map(rows).batch(data.rows // hosts)
        dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
        if data.workers:
            if not flags.FLAGS.is_parsed():  # grain's workers read absl flags
                flags.FLAGS(["hovle"], known_only=True)
            options = grain.MultiprocessingOptions(num_workers=data.workers)
            return _of_workers(dataset.mp_prefetch(options, worker_init_fn=_start_worker))
        return dataset

    def _count(self, read: np.ndarray) -> None:
        most = self._config.data.max_bad
        self.read += read
        self._recent = self._recent * 0.999 ** read[0] + read
        # A few in a row mean little; a broken disk or a moved folder is many, and a long run must
        # not wait until they are many of all it has read.
        counts = [("", self.read, most), ("the last ", self._recent, most + 0.1)]
        for which, (drawn, bad), limit in counts:
            if bad > max(limit * drawn, 10):
                raise UserError(
                    f"{bad:.0f} of {which}{drawn:.0f} samples could not be read, more than "
                    f"config.data.max_bad={most}{self._last_rejects()}"
                )

    def _last_rejects(self) -> str:
        """The newest reasons, from whichever worker or host wrote them."""
        if self.rejects is None or not self.rejects.is_file():
            return ""
        lines = self.rejects.read_text().splitlines()[-3:]
        return f"; see {self.rejects}: " + "; ".join(json.loads(x)["reason"] for x in lines)


def _start_worker(*_: int) -> None:
    """The end of a worker is its parent's affair: not of a signal to all processes of a job, whose
    last step it would cost, but with the parent, however that ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent()


def _of_workers(batches: Any) -> Iterator[HostBatch]:
    try:
        yield from batches
    except RuntimeError as error:
        if "Worker process" not in str(error):
            raise
        raise UserError(
            f"config.data.workers: {one_line(error)} -9 is most often memory: fewer workers, or "
            "more memory"
        ) from error


def global_row(i: int, *, rows: int, host: int, hosts: int) -> int:
    """Number in the stream of rows of a host's i-th row; batches have `rows` over all hosts."""
    here = rows // hosts
    return i // here * rows + host * here + i % here


def _change(before: Mapping[str, int], now: Phase) -> str:
    """One line on a new mixture: a source of another name begins anew, which may be a mistake."""
    came = [name for name in now.sizes if name not in before]
    changes = [f"{n} {'goes on' if now.drawn.get(n) else 'begins'}" for n in came]
    changes += [f"{name} is gone" for name in before if name not in now.sizes]
    return (
        f"another mixture from sample {now.start + 1} on: {', '.join(changes) or 'other weights'}"
    )


def _check_names(names: Sequence[str], most: int) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two data sources are named {name!r}")
    if len(names) > most:
        raise UserError(f"{len(names)} data sources; raise config.data.max_sources={most}")
