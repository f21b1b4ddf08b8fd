"""Parquet as Hugging Face data sets have it, images inside."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from hovle_jax.data import files
from hovle_jax.data.records import Record, position
from hovle_jax.data.rows import PROMPT, ROW_KEYS, make_record
from hovle_jax.errors import UserError, one_line
from hovle_jax.modules import require


class Parquet:
    """Parquet with 'image' (Hugging Face's {bytes, path}, bytes, or a path) or a list 'images'.

    Opening reads the footers. Random access costs a row group, the last two of which are kept:
    fine for a look or a conversion, slow for training where row groups are large.
    """

    def __init__(
        self,
        name: str,
        path: str,
        root: str,
        max_tiles: int | None = None,
        *,
        prompt: str = PROMPT,
        images_only: bool = False,
    ):
        """Indexes a file, a directory or a glob; UserError without rows, columns or pyarrow."""
        self.name, self.max_tiles = name, max_tiles
        self._record = functools.partial(
            make_record, root=root, prompt=prompt, images_only=images_only
        )
        self._paths = files.expand(path, ".parquet")
        groups, counts = [], []
        for n, file in enumerate(self._paths):
            with _errors(file), _opened(file) as opened:
                names = opened.schema_arrow.names
                if not set(names) & set(ROW_KEYS):
                    known, found = ", ".join(ROW_KEYS), ", ".join(names)
                    raise UserError(f"{file}: no column of {known}, only {found}")
                if twice := {key for key in ROW_KEYS if names.count(key) > 1}:
                    raise UserError(f"{file}: two columns {min(twice)!r}; keep one")
                for group in range(opened.num_row_groups):
                    groups.append((n, group))
                    counts.append(max(0, opened.metadata.row_group(group).num_rows))
        self._groups = np.asarray(groups).reshape(-1, 2)
        self._starts = np.cumsum([0, *counts], dtype=np.int64)
        if not len(self):
            raise UserError(f"{path}: the file has no rows")
        self._cache: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> Record:
        i = position(i, len(self))
        k = int(np.searchsorted(self._starts, i, side="right")) - 1
        file = self._groups[k, 0]
        first = np.searchsorted(self._groups[:, 0], file)  # of the file's groups
        where = f"{self._paths[file]}:{i - self._starts[first] + 1}"
        with _errors(where):
            values = self._group(k).slice(i - int(self._starts[k]), 1).to_pylist()[0]
        row = {key: _without_none(value) for key, value in values.items() if value is not None}
        return self._record(row, where)

    def _group(self, k: int) -> Any:
        table = self._cache.get(k)
        if table is None:
            file, group = (int(x) for x in self._groups[k])
            # The file is opened anew: its handle is neither for threads nor for pickling.
            with _opened(self._paths[file]) as opened:
                columns = [c for c in opened.schema_arrow.names if c in ROW_KEYS]
                table = opened.read_row_group(group, columns=columns)
            # A new dict: other threads may be reading the old one.
            self._cache = dict([*self._cache.items()][-1:]) | {k: table}
        return table


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    parquet = import_pyarrow()
    with contextlib.ExitStack() as stack:
        source: Any = path
        if files.is_remote(path):
            source = stack.enter_context(files.open_file(path))
        yield stack.enter_context(parquet.ParquetFile(source))


def import_pyarrow() -> Any:
    return require("pyarrow.parquet", "parquet", "parquet")


@contextlib.contextmanager
def _errors(where: str) -> Iterator[None]:
    """pyarrow has many kinds of errors, of many lines; IndexError: fewer rows than promised."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{where}: not readable as parquet ({one_line(e)})") from e


def _without_none(value: Any) -> Any:
    """Parquet's structs have all keys in all rows, None where JSON would have no key."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value
