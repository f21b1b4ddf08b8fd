"""How long every record is, measured once: (tokens, tiles), memory-mapped afterwards.

Packing plans need only these lengths. The file's name carries a fingerprint of everything they
depend on, so a changed annotation, tokenizer or tile limit is measured anew, and a restart of the
same run opens the file and goes on.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import numpy as np

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
    source: SampleSource, tokens: int, tiles: int, directory: Path | None, *, quiet: bool = False
) -> Lengths:
    """(tokens, tiles) of every record.

    `directory` keeps what was measured (None: measured at every start). Row limits are no part of
    the fingerprint: changing config.data.tokens measures nothing again.

    Raises:
      UserError: a record that cannot be read, or that no row of `tokens` and `tiles` can hold.
    """
    path = None if directory is None else directory / _file_name(source)
    if path is None:
        lengths = Lengths(_measure(source, quiet=quiet))
    else:
        if not path.is_file():
            _save(path, _measure(source, quiet=quiet))
        lengths = Lengths(path)
    over = lengths.first_over(tokens, tiles)
    if over is not None:
        raise UserError(
            f"{source.name}: record {over + 1} has {lengths[over][0]} tokens and "
            f"{lengths[over][1]} tiles; a row holds {tokens} and {tiles} (config.data.tokens, "
            "config.data.tiles)"
        )
    return lengths


def _measure(source: SampleSource, *, quiet: bool) -> np.ndarray:
    table = np.zeros((len(source) + 1, 2), np.int32)
    progress = Progress(f"measuring {source.name}", len(source), every=100_000)
    for i in range(len(source)):
        table[i] = source.measure(i)
        if not quiet:
            progress.update(i + 1)
    table[-1] = table.max(axis=0)
    return table


def _file_name(source: SampleSource) -> str:
    digest = hashlib.sha256("\0".join((str(len(source)), *source.fingerprint())).encode())
    readable = re.sub(r"[^\w.-]+", "-", source.name).strip("-")[-60:]
    return f"{readable}-{digest.hexdigest()[:16]}.npy"


def _save(path: Path, table: np.ndarray) -> None:
    """In one piece: hosts that share the directory may all write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, table)
    os.replace(temporary, path)
