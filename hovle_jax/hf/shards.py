"""Safetensors files as streams: one tensor in memory at a time, in and out.

    file = length of the header (8 bytes, little endian), JSON header, tensor data

The safetensors library maps whole files, and pages once touched count as resident memory until the
file is closed; a converter that promises a small peak has to seek instead.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from hovle_jax.errors import UserError

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: bytes `start` to `stop` of `file`."""

    file: Path
    code: str  # safetensors' name of the dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """None for a dtype no weight should have."""
        return DTYPES.get(self.code)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of the system while reading `path`, as one line that names it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if path.is_symlink() and not path.exists():
            reason = f"a broken link to {os.readlink(path)}"
        raise UserError(f"{path}: cannot be read ({reason})") from None


def open_shards(directory: str | Path) -> dict[str, Tensor]:
    """Every tensor of a directory's safetensors files by name, after checking that all are whole.

    Raises:
      UserError: no weights, a truncated or foreign file, or an index that disagrees with its files.
    """
    directory = Path(directory)
    index, single = directory / INDEX, directory / "model.safetensors"
    if index.is_file() and single.is_file():
        raise UserError(f"{directory}: holds both {single.name} and {INDEX}; delete the stale one")
    listed = _weight_map(index) if index.is_file() else None
    if listed is not None:
        files = [directory / name for name in sorted(set(listed.values()))]
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(f"{missing[0]}: missing, but {INDEX} lists it")
    else:
        files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
        if not files:
            raise UserError(f"{directory}: no *.safetensors files")
    found: dict[str, Tensor] = {}
    for file in files:
        here = read_header(file)
        if twice := sorted(set(here) & set(found)):
            other = found[twice[0]].file.name
            raise UserError(f"{file}: {twice[0]} is also in {other}; one may hold it")
        found |= here
    if listed is None:
        return found
    for name in sorted(set(listed) | set(found)):
        if name not in found:
            raise UserError(
                f"{directory / listed[name]}: has no tensor {name}, but {INDEX} says so"
            )
        if name not in listed:
            raise UserError(f"{index}: no entry for {name}, which {found[name].file.name} holds")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    """{tensor: file name} of an index."""
    try:
        return {str(k): str(v) for k, v in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a safetensors index ({error!r})") from None


def read_header(path: Path) -> dict[str, Tensor]:
    """Tensors of one file.

    Raises:
      UserError: a file that cannot be read, is cut short or is no safetensors file.
    """
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path}: truncated or no safetensors file ({size} bytes)")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            out = {name: _tensor(path, 8 + length, entry) for name, entry in header.items()}
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: malformed safetensors header ({error!r})") from None
    end = max((t.stop for t in out.values()), default=0)
    if end > size:
        raise UserError(f"{path}: truncated: {size:,} of {end:,} bytes; copy it again")
    return out


def _tensor(path: Path, base: int, entry: Mapping[str, Any]) -> Tensor:
    start, stop = entry["data_offsets"]
    shape = tuple(map(int, entry["shape"]))
    out = Tensor(path, str(entry["dtype"]), shape, base + start, base + stop)
    if out.dtype is not None and stop - start != out.dtype.itemsize * math.prod(shape):
        raise ValueError(f"{stop - start} bytes for {out.code} {shape}")
    return out


def read_tensor(tensor: Tensor) -> np.ndarray:
    """Raises UserError where the file cannot be read or has become shorter."""
    assert tensor.dtype is not None
    data = _read(tensor, tensor.start, tensor.stop)
    return data.view(tensor.dtype).reshape(tensor.shape)


def _read(tensor: Tensor, start: int, stop: int) -> np.ndarray:
    """uint8 [stop - start] of the tensor's file."""
    data = np.empty(stop - start, np.uint8)
    with reading(tensor.file), tensor.file.open("rb") as file:
        file.seek(start)
        if file.readinto(data.data) != data.size:
            raise UserError(f"{tensor.file}: truncated while reading; copy it again")
    return data


def same_bytes(a: Tensor, b: Tensor, chunk: int = 2**24) -> bool:
    """Whether two tensors have the same dtype, shape and numbers; read in pieces of `chunk`."""
    size = a.stop - a.start
    return (a.code, a.shape) == (b.code, b.shape) and all(
        np.array_equal(
            _read(a, a.start + i, min(a.start + i + chunk, a.stop)),
            _read(b, b.start + i, min(b.start + i + chunk, b.stop)),
        )
        for i in range(0, size, chunk)
    )


class ShardWriter:
    """Writes the tensors of `plan` ({name: (shape, dtype)}) in any order, one at a time.

    All files are laid out, and their space reserved, before the first tensor is written. More than
    one file (of at most `max_shard_bytes`, if a single tensor is not more) get an index.
    """

    def __init__(
        self,
        directory: Path,
        plan: Mapping[str, tuple[Sequence[int], np.dtype[Any]]],
        max_shard_bytes: int | None = None,
        file_name: str = "model.safetensors",
    ):
        self._plan = plan
        self._open: list[IO[bytes]] = []
        self._where: dict[str, tuple[IO[bytes], int]] = {}
        sizes = {k: dtype.itemsize * math.prod(shape) for k, (shape, dtype) in plan.items()}
        shards = _split(sizes, max_shard_bytes or sum(sizes.values()))
        index: dict[str, str] = {}
        stem = Path(file_name).stem
        for i, names in enumerate(shards, 1):
            if len(shards) > 1:
                file_name = f"{stem}-{i:05}-of-{len(shards):05}.safetensors"
            index |= dict.fromkeys(names, file_name)
            self._layout(directory / file_name, {k: sizes[k] for k in names})
        if len(shards) > 1:
            body = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
            (directory / INDEX).write_text(json.dumps(body, indent=2, sort_keys=True) + "\n")

    def _layout(self, path: Path, sizes: Mapping[str, int]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, size in sizes.items():
            shape, dtype = self._plan[name]
            header[name] = {
                "dtype": _CODES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("wb")
        self._open.append(file)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + offset)  # a full disk shows here
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sizes:
            start = header[name]["data_offsets"][0]
            self._where[name] = (file, 8 + len(text) + start)

    def write(self, name: str, x: np.ndarray) -> None:
        shape, dtype = self._plan[name]
        assert x.shape == tuple(shape) and x.dtype == dtype, name
        file, start = self._where.pop(name)
        file.seek(start)
        file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Call it after an error too; `finished` says whether everything was written."""
        for file in self._open:
            if self.finished:
                file.flush()
                os.fsync(file.fileno())
            file.close()

    @property
    def finished(self) -> bool:
        return not self._where


def _split(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in order, cut into groups of at most `most` bytes."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > most:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
