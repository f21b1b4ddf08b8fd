"""Files of text, of any size and number, read once from the first row to the last."""

from __future__ import annotations

import collections
import concurrent.futures
import gzip
import io
import os
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from hovle_jax.data import files
from hovle_jax.data.parquet import import_pyarrow
from hovle_jax.data.rows import SURROGATE, load_json
from hovle_jax.errors import UserError, one_line
from hovle_jax.modules import require

SUFFIXES = (
    *(f".{kind}{packed}" for kind in ("txt", "jsonl") for packed in ("", ".gz", ".zst")),
    ".parquet",
)
MAX_ROW = 1 << 24  # bytes; SentencePiece takes some 50 bytes of memory for each
_BATCH = 1 << 20  # bytes of rows in one batch, or a row more
_CHUNK = 1 << 17  # bytes of a compressed file read at once


class File(NamedTuple):
    path: str
    size: int  # bytes


class Batch(NamedTuple):
    """Consecutive rows of a file."""

    file: int  # its number among the files
    kind: str  # 'txt', 'jsonl' or 'parquet'
    rows: list[tuple[int, bytes | None]]  # (row or line from 1, content)
    done: int  # bytes of all files up to here


def find(inputs: list[str], out: str) -> list[File]:
    """The files of text that the inputs name, in order.

    Args:
      inputs: Files, globs, and directories with all below them, both sorted; gs:// and what else
        epath opens included.
      out: A directory whose files are left out: the one to write to.

    Raises:
      UserError: an input without such files, a file named twice, or a package that is missing.
    """
    names: list[str] = []
    for given in inputs:
        found = [name for name in _below(given) if not _is_inside(name, out)]
        if not found:
            raise UserError(f"{given}: no {', '.join(SUFFIXES)} file there")
        names += sorted(found)
    if not names:
        raise UserError("no text is named")
    if twice := [name for name, n in collections.Counter(names).items() if n > 1]:
        raise UserError(f"{twice[0]}: named twice; name every file once")
    # Fail for want of a package now, not hours later.
    for suffix, load in ((".zst", _zstandard), (".parquet", import_pyarrow)):
        if any(name.endswith(suffix) for name in names):
            load()
    with concurrent.futures.ThreadPoolExecutor(32) as pool:  # a bucket takes its time for each
        return [
            File(name, state.size)
            for name, state in zip(names, pool.map(_state, names), strict=True)
        ]


def _below(given: str) -> list[str]:
    # For each of many objects in a bucket, is_dir would take too long.
    roots = [given] if files.exists(given) else files.matches(given)
    found: list[str] = []
    for root in roots:
        whole = root.endswith(SUFFIXES) and not os.path.isdir(root)
        found += [root] if whole else files.files_below(root) if files.is_dir(root) else []
    broken = (name for name in found if os.path.islink(name) and not os.path.exists(name))
    return sorted(set(name for name in found if name.endswith(SUFFIXES)) - set(broken))


def _is_inside(name: str, directory: str) -> bool:
    return not files.is_remote(name) and pathlib.Path(os.path.abspath(name)).is_relative_to(
        os.path.abspath(directory)
    )


def _state(name: str) -> files.State:
    state = files.state_of(name)
    if state is None:
        raise UserError(f"{name}: a directory, not a file of text")
    return state


def read(texts: list[File], key: str, first: int = 0, after: int = 0) -> Iterator[Batch]:
    """The rows of all files behind row `after` of file number `first`, in order.

    A row is a line that is not blank, or the column `key` of a parquet row: its bytes, None for
    null. One of more than `MAX_ROW` bytes may be cut off behind them.

    Raises:
      UserError: a file that is damaged, cut short or cannot be read, or has no such column.
    """
    before = sum(file.size for file in texts[:first])
    for n, (name, size) in enumerate(texts[first:], first):
        rows: list[tuple[int, bytes | None]] = []
        number = weight = 0
        kind = name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
        try:
            with files.open_file(name) as raw:
                content = _column(raw, key, name) if kind == "parquet" else _lines(raw, name)
                for number, row in content:
                    if number <= after:
                        continue
                    rows.append((number, row))
                    weight += 64 + len(row or b"")
                    if weight > _BATCH:
                        yield Batch(n, kind, rows, before + min(raw.tell(), size))
                        rows, weight = [], 0
        except UserError:
            raise
        except Exception as e:  # each format has kinds of its own for a damaged file
            where = f"{name}, behind row {number}" if number else name
            reason = getattr(e, "strerror", None) or one_line(e)
            raise UserError(
                f"{where}: cannot be read ({reason}); put a good file in its place and continue"
            ) from e
        before, after = before + size, 0
        yield Batch(n, kind, rows, before)


def _lines(raw: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    file: Any = raw
    if name.endswith(".gz"):
        file = gzip.GzipFile(fileobj=raw)
    elif name.endswith(".zst"):
        file = io.BufferedReader(_Zstd(raw), _CHUNK)
    number = 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        rest = line
        while len(rest) > MAX_ROW and not rest.endswith(b"\n"):
            rest = file.readline(MAX_ROW + 1)
        if not line.isspace():
            yield number, line


def _column(raw: BinaryIO, key: str, name: str) -> Iterator[tuple[int, bytes | None]]:
    import pyarrow

    file = import_pyarrow().ParquetFile(raw)
    if key not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise UserError(f"{name}: no column {key!r}; the key must be one of {names}")
    kind = file.schema_arrow.field(key).type
    if kind not in (pyarrow.string(), pyarrow.large_string()):
        raise UserError(f"{name}: column {key!r} is {kind}, not string")
    number = 0
    for batch in file.iter_batches(batch_size=256, columns=[key]):
        # As bytes: as strings, one that is not UTF-8 would cost the whole file.
        for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
            number += 1
            yield number, value


def text_of(data: bytes | None, kind: str, key: str) -> str:
    """The text of a row of `read`; UserError or UnicodeError with the reason if it has none."""
    if data is not None and len(data) > MAX_ROW:
        raise UserError(f"longer than {MAX_ROW >> 20} MiB; divide it")
    if data is not None and kind == "jsonl":
        text = load_json(data, "row").get(key)
    else:
        text = None if data is None else data.decode()
    if not isinstance(text, str):
        raise UserError(f"no string under {key!r}")
    if SURROGATE.search(text):  # JSON can spell it, nothing can encode it
        raise UserError("half a surrogate pair is not valid Unicode")
    return text.strip("\r\n") if kind == "txt" else text


def _zstandard() -> Any:
    return require("zstandard", "text", ".zst")


class _Zstd(io.RawIOBase):
    """The content of all frames of a .zst.

    zstandard's own reader takes the place where a file was cut off for its end.
    """

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        # `zstd --long=31` needs a window of 2 GiB.
        self._decompressor = _zstandard().ZstdDecompressor(max_window_size=2**31)
        self._frame: Any = None
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            if self._frame is None or self._frame.eof:
                left = self._frame.unused_data if self._frame else b""
                data = left or self._raw.read(_CHUNK)
                if not data:
                    return 0
                self._frame = self._decompressor.decompressobj()
            else:
                data = self._raw.read(_CHUNK)
                if not data:
                    raise EOFError("it ends in the middle of a frame")
            self._content = memoryview(self._frame.decompress(data))
        size = min(len(buffer), len(self._content))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        return size
