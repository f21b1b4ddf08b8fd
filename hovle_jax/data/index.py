"""How long every record is, measured once: (tokens, tiles), memory-mapped afterwards.

Packing plans need only these lengths. The file's name carries a fingerprint of everything they
depend on, so a changed annotation, tokenizer or tile limit is measured anew, and a restart of the
same run opens the file and goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hovle_jax.config import DataConfig
from hovle_jax.data.samples import Conversations, SampleSource
from hovle_jax.errors import UserError, one_line
from hovle_jax.run.metrics import Progress


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
    if directory is None:
        measured = _measure(source, quiet=quiet, most=data.max_bad, workers=workers)
        lengths, bad, cut = Lengths(measured.table), measured.rejects, measured.cut
    else:
        path = directory / _file_name(source)
        if not path.is_file():
            _save(path, _measure(source, quiet=quiet, most=data.max_bad, workers=workers))
        try:
            lengths, bad, cut = Lengths(path), *(_read_lines(path, kind) for kind in _LISTS)
        except (OSError, ValueError, KeyError) as e:
            raise UserError(f"{path}: damaged ({one_line(e)}); delete it to measure again") from e
    _check_bad(source, bad, data.max_bad)
    if bad and not quiet:
        print(f"{source.name}: {len(bad)} records cannot be read and are left out ({bad[0]})")
    if cut and not quiet:
        where = "" if directory is None else f"; all in {path.with_suffix('.cut.jsonl')}"
        print(f"{source.name}: {len(cut)} records are too long for a row ({cut[0]}{where})")
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


_VERSION = 3  # of the files and of what is measured
_LISTS = ("rejects", "cut")
_CHUNK = 4096  # records a worker measures at a time


def _measure(source: SampleSource, *, quiet: bool, most: float, workers: int) -> _Measured:
    """Stops as soon as there are too many bad ones. The same for any number of workers."""
    measured = _Measured(np.zeros((len(source) + 1, 2), np.int32), [], [])
    progress = Progress(f"measuring {source.name}", len(source), every=100_000)
    starts = range(0, len(source), _CHUNK)
    with contextlib.ExitStack() as stack:
        parts: Iterable[_Measured] = (_measure_part(source, start) for start in starts)
        if workers:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(
                context.Pool(workers, initializer=_set_source, initargs=(source,))
            )
            parts = pool.imap(_measure_in_worker, starts)
        for start, part in zip(starts, parts, strict=True):
            measured.table[start : start + len(part.table)] = part.table
            measured.rejects.extend(part.rejects)
            measured.cut.extend(part.cut)
            _check_bad(source, measured.rejects, most)
            if not quiet:
                progress.update(start + len(part.table))
    measured.table[-1] = measured.table.max(axis=0)
    return measured


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


_source: SampleSource  # of a worker process


def _set_source(source: SampleSource) -> None:
    global _source
    _source = source


def _measure_in_worker(start: int) -> _Measured:
    return _measure_part(_source, start)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    table = io.BytesIO()
    np.save(table, measured.table)
    contents = {path.with_suffix(f".{k}.jsonl"): _lines(getattr(measured, k)) for k in _LISTS}
    for target, content in (contents | {path: table.getvalue()}).items():
        # Not the process id: in containers that of every host may be 1.
        temporary = target.with_suffix(f".{uuid.uuid4().hex}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, target)


def _lines(reasons: Sequence[str]) -> bytes:
    return "".join(json.dumps({"reason": reason}) + "\n" for reason in reasons).encode()


def _read_lines(path: Path, kind: str) -> list[str]:
    lines = path.with_suffix(f".{kind}.jsonl").read_text().splitlines()
    return [json.loads(line)["reason"] for line in lines]
