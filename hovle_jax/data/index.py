"""How long every record is, measured once: (tokens, tiles), memory-mapped afterwards.

Packing plans need only these lengths. The file's name carries a fingerprint of everything they
depend on, so a changed annotation, tokenizer or tile limit is measured anew, and a restart of the
same run opens the file and goes on.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hovle_jax.config import DataConfig
from hovle_jax.data.samples import SampleSource
from hovle_jax.errors import UserError
from hovle_jax.metrics import Progress


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
    source: SampleSource, data: DataConfig, directory: Path | None, *, quiet: bool = False
) -> Lengths:
    """(tokens, tiles) of every record; (0, 0) of one that cannot be read and is left out.

    `directory` keeps what was measured (None: measured at every start). Row limits are no part of
    the fingerprint: changing config.data.tokens measures nothing again.

    Raises:
      UserError: more records than config.data.max_bad that cannot be read, or one that no row can
        hold.
    """
    path = None if directory is None else directory / _file_name(source)
    if path is None:
        table, bad = _measure(source, quiet=quiet, most=data.max_bad)
        lengths = Lengths(table)
    else:
        rejects = path.with_suffix(".rejects.jsonl")
        if path.is_file():
            bad = [json.loads(line)["reason"] for line in rejects.read_text().splitlines()]
        else:
            table, bad = _measure(source, quiet=quiet, most=data.max_bad)
            _save(path, rejects, table, bad)
        lengths = Lengths(path)
    _check_bad(source, bad, data.max_bad)
    over = lengths.first_over(data.tokens, data.tiles)
    if over is not None:
        raise UserError(
            f"{source.name}: record {over + 1} has {lengths[over][0]} tokens and "
            f"{lengths[over][1]} tiles; a row holds {data.tokens} and {data.tiles} "
            "(config.data.tokens, config.data.tiles)"
        )
    return lengths


def _measure(source: SampleSource, *, quiet: bool, most: float) -> tuple[np.ndarray, list[str]]:
    """(table of `Lengths`, why records were rejected). Stops as soon as there are too many."""
    table = np.zeros((len(source) + 1, 2), np.int32)
    bad: list[str] = []
    progress = Progress(f"measuring {source.name}", len(source), every=100_000)
    for i in range(len(source)):
        try:
            table[i] = source.measure(i)
        except UserError as reason:
            bad.append(str(reason))
            _check_bad(source, bad, most)
        if not quiet:
            progress.update(i + 1)
    table[-1] = table.max(axis=0)
    return table, bad


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
    digest = hashlib.sha256("\0".join((str(len(source)), *source.fingerprint())).encode())
    readable = re.sub(r"[^\w.-]+", "-", source.name).strip("-")[-60:]
    return f"{readable}-{digest.hexdigest()[:16]}.npy"


def _save(path: Path, rejects: Path, table: np.ndarray, bad: Sequence[str]) -> None:
    """In one piece: hosts that share the directory may all write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"reason": reason}) + "\n" for reason in bad)
    for target, content in ((rejects, lines.encode()), (path, _npy(table))):
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, target)


def _npy(table: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, table)
    return buffer.getvalue()
