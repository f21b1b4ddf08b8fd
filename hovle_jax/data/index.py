"""How long every record is, measured once: (tokens, tiles), memory-mapped afterwards.

Packing plans need only these lengths. The file's name carries a fingerprint of everything they
depend on, so a changed annotation, tokenizer or tile limit is measured anew, and a restart of the
same run opens the file and goes on. Until a source is done, its blocks are kept in NAME.parts.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from hovle_jax.config import DataConfig
from hovle_jax.data.samples import Conversations, SampleSource
from hovle_jax.data.workers import in_order
from hovle_jax.errors import UserError, one_line
from hovle_jax.run.metrics import Progress


class Summary(NamedTuple):
    """What is kept of a table beside it: the table of a large source is not read to know this."""

    digest: str  # other lengths, another digest
    left_out: int  # records of length (0, 0)


class Lengths:
    """[i] -> (tokens, tiles) of record i. Pickles as a path where there is a file."""

    def __init__(self, table: np.ndarray | Path):
        """`table`: int32 [records + 1, 2], or its .npy file; the last row holds the maxima."""
        self._path = table if isinstance(table, Path) else None
        self._table = table if isinstance(table, np.ndarray) else np.load(table, mmap_mode="r")

    def __getstate__(self) -> np.ndarray | Path:
        return self._table if self._path is None else self._path

    def __setstate__(self, state: np.ndarray | Path) -> None:
        self.__init__(state)  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._table) - 1

    def __getitem__(self, i: int) -> tuple[int, int]:
        tokens, tiles = self._table[i]
        return int(tokens), int(tiles)

    @functools.cached_property
    def summary(self) -> Summary:
        if self._path is not None:
            return Summary(**json.loads(_summary_file(self._path).read_bytes()))
        digest = hashlib.sha256(np.ascontiguousarray(self._table).data).hexdigest()[:16]
        return Summary(digest, int(np.count_nonzero(~self._table[:-1].any(axis=1))))

    def first_over(self, tokens: int, tiles: int) -> int | None:
        """The first record that a row of `tokens` and `tiles` cannot hold."""
        most = np.array([tokens, tiles])
        if np.all(self._table[-1] <= most):
            return None
        step = 1 << 20  # a memory map is not read into memory whole
        for start in range(0, len(self), step):
            over = np.any(self._table[start : min(start + step, len(self))] > most, axis=1)
            if over.any():
                return start + int(np.argmax(over))
        return None


def lengths_of(
    source: SampleSource,
    data: DataConfig,
    directory: Path | None,
    *,
    quiet: bool = False,
    workers: int = 0,
) -> Lengths:
    """(tokens, tiles) of every record; (0, 0) of one that is left out.

    `directory` keeps what was measured (None: measured at every start), by `workers` processes
    (0: this one). Row limits are no part of the fingerprint unless records are fitted to them
    (config.data.too_long): changing config.data.tokens measures nothing again.

    Raises:
      UserError: more records than config.data.max_bad that cannot be read, or one that no row can
        hold.
    """
    measure = functools.partial(_measure, source, quiet=quiet, most=data.max_bad, workers=workers)
    bad_in = cut_in = ""
    if directory is None:
        measured = measure(None)
        lengths, bad, cut = Lengths(measured.table), measured.rejects, measured.cut
    else:
        path = directory / _file_name(source)
        bad_in, cut_in = (f"; all in {path.with_suffix(f'.{kind}.jsonl')}" for kind in _LISTS)
        bad_in += f"; once they are repaired, delete {path} to measure again"
        if not path.is_file():
            parts = path.with_suffix(".parts")
            measured = measure(parts)
            with _replacing(_summary_file(path)) as file:
                file.write(json.dumps(Lengths(measured.table).summary._asdict()).encode())
            _save(path, measured)
            shutil.rmtree(parts, ignore_errors=True)
        try:
            lengths, bad, cut = Lengths(path), *_read_lists(path)
            _ = lengths.summary
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path}: damaged ({one_line(e)}); delete it to measure again") from e
    _check_bad(source, bad, data.max_bad)
    if bad and not quiet:
        print(
            f"{source.name}: {len(bad)} records cannot be read and are left out ({bad[0]}{bad_in})"
        )
    if cut and not quiet:
        print(f"{source.name}: {len(cut)} records are too long for a row ({cut[0]}{cut_in})")
    if (left_out := lengths.summary.left_out) == len(source):
        raise UserError(f"{source.name}: all of its {left_out} records are left out")
    over = lengths.first_over(data.tokens, data.tiles)
    if over is not None:
        keys = "config.data.tokens, config.data.tiles"
        if isinstance(source, Conversations):
            keys += "; or see config.data.too_long"
        raise UserError(
            f"{source.name}: record {over + 1} has {lengths[over][0]} tokens and "
            f"{lengths[over][1]} tiles; a row holds {data.tokens} and {data.tiles} "
            f"({keys})"
        )
    return lengths


class _Measured(NamedTuple):
    table: np.ndarray  # of `Lengths`
    rejects: list[str]  # why records were rejected
    cut: list[str]  # what was left out of records longer than a row


_VERSION = 4  # of the files and of what is measured
_LISTS = ("rejects", "cut")
_CHUNK = 4096  # records a worker measures at a time
_BLOCK = 256 * _CHUNK  # records after which what was measured is kept


def _measure(
    source: SampleSource, parts: Path | None, *, quiet: bool, most: float, workers: int
) -> _Measured:
    """Stops as soon as there are too many bad ones. The same for any number of workers.

    `parts`: directory that keeps blocks of what is measured, so that a kill costs one of them.
    """
    size = len(source)
    kept = {start: _kept(parts, start) for start in range(0, size, _BLOCK)}
    missing = [start for start, block in kept.items() if block is None]
    blocks = {start: block for start, block in kept.items() if block is not None}
    bad = [reason for block in blocks.values() for reason in block.rejects]
    done = sum(len(block.table) for block in blocks.values())
    progress = Progress(f"measuring {source.name}", size, every=25 * _CHUNK, start=done)
    chunks = (c for start in missing for c in _chunks(start, size))
    try:
        with contextlib.closing(in_order(_measure_part, source, chunks, workers)) as results:
            for start in missing:
                pieces = []
                for _, piece in itertools.islice(results, len(_chunks(start, size))):
                    pieces.append(piece)
                    bad += piece.rejects
                    _check_bad(source, bad, most)
                    done += len(piece.table)
                    if not quiet:
                        progress.update(done)
                blocks[start] = _joined(pieces)
                if parts is not None and len(kept) > 1:
                    # Another host that shares the directory may be done and delete the parts.
                    with contextlib.suppress(FileNotFoundError):
                        _save(_part_file(parts, start), blocks[start])
    except concurrent.futures.BrokenExecutor as e:
        raise UserError(
            f"measuring {source.name}: stopped (a worker died: too little memory?); the same "
            "command continues, also with fewer workers"
        ) from e
    ordered = [blocks[start] for start in kept]
    maxima = np.max([block.table.max(axis=0) for block in ordered], axis=0, keepdims=True)
    return _joined([*ordered, _Measured(maxima, [], [])])


def _chunks(start: int, size: int) -> range:
    """Where the chunks of a block begin."""
    return range(start, min(start + _BLOCK, size), _CHUNK)


def _joined(pieces: Sequence[_Measured]) -> _Measured:
    rejects, cut = ([x for p in pieces for x in getattr(p, kind)] for kind in _LISTS)
    return _Measured(np.concatenate([p.table for p in pieces]), rejects, cut)


def _part_file(parts: Path, start: int) -> Path:
    return parts / f"{start // _BLOCK:05}.npy"


def _kept(parts: Path | None, start: int) -> _Measured | None:
    """The block of an earlier try that was killed."""
    if parts is None:
        return None
    path = _part_file(parts, start)
    with contextlib.suppress(OSError, ValueError, KeyError):
        return _Measured(np.load(path), *_read_lists(path))
    return None


def _measure_part(source: SampleSource, start: int) -> _Measured:
    stop = min(start + _CHUNK, len(source))
    part = _Measured(np.zeros((stop - start, 2), np.int32), [], [])
    for i in range(start, stop):
        try:
            length = source.measure(i)
        except UserError as reason:
            part.rejects.append(str(reason))
            continue
        part.table[i - start] = length.tokens, length.tiles
        if length.cut:
            part.cut.append(length.cut)
    return part


def _check_bad(source: SampleSource, bad: Sequence[str], most: float) -> None:
    if len(bad) <= most * len(source):
        return
    if not most:
        raise UserError(bad[0])
    shown = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
    raise UserError(
        f"{source.name}: {len(bad)} of {len(source)} records cannot be read, more than "
        f"config.data.max_bad={most}: {shown}"
    )


def _file_name(source: SampleSource) -> str:
    parts = (str(_VERSION), str(len(source)), *source.fingerprint())
    digest = hashlib.sha256("\0".join(parts).encode())
    readable = re.sub(r"[^\w.-]+", "-", source.name).strip("-")[-60:]
    return f"{readable}-{digest.hexdigest()[:16]}.npy"


def _save(path: Path, measured: _Measured) -> None:
    """In one piece, the table last: hosts that share the directory may all write it."""
    for kind in _LISTS:
        with _replacing(path.with_suffix(f".{kind}.jsonl")) as file:
            lines = (json.dumps({"reason": reason}) + "\n" for reason in getattr(measured, kind))
            file.writelines(line.encode() for line in lines)
    with _replacing(path) as file:
        np.save(file, measured.table)


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: in containers that of every host may be 1.
    temporary = target.with_suffix(f".{uuid.uuid4().hex}.tmp")
    with temporary.open("wb") as file:
        yield file
    os.replace(temporary, target)


def _summary_file(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_lists(path: Path) -> list[list[str]]:
    """The reasons of each of `_LISTS`."""
    files = (path.with_suffix(f".{kind}.jsonl") for kind in _LISTS)
    return [[json.loads(x)["reason"] for x in f.read_text().splitlines()] for f in files]
