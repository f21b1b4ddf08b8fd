"""Orbax parameter trees written and read piece by piece, for arrays too large to hold twice.

An ordinary save holds each array and its encoded copy; a checkpoint of 10 GB would need several.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import type_handlers

from hovle_jax.data.files import is_remote
from hovle_jax.errors import UserError
from hovle_jax.run import digests
from hovle_jax.tree import unflatten

CHUNK_BYTES = 64 * 2**20  # of storage, about: what a reader has to fetch at least


@dataclass(frozen=True)
class Pieces:
    """An array that comes in pieces along its first axis; calling `pieces` starts again."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pieces: Callable[[], Iterator[np.ndarray]]  # each [n, *shape[1:]], in order
    stacked: bool  # the first axis are layers, and each piece is one of them

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


class _Handler(type_handlers.NumpyHandler):
    """Saves `Pieces` as ordinary arrays, one piece of one array at a time."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def _open_and_write(self, value: Pieces, tspec: Any, ts_context: Any) -> None:  # type: ignore[override]
        # Nothing is awaited on purpose: the handler starts all arrays at once, and each has to be
        # finished before the next takes memory.
        row = value.size // value.shape[0] * value.dtype.itemsize
        # A chunk written in parts would be read back each time: one layer is one chunk.
        step = 1 if value.stacked else max(1, min(value.shape[0], CHUNK_BYTES // row))
        tspec["metadata"]["chunks"] = [step, *value.shape[1:]]
        store = ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context).result()
        start = 0
        for piece in value.pieces():
            for i in range(0, len(piece), step):
                part = np.ascontiguousarray(piece[i : i + step])
                store[start : start + len(part)].write(part).result()
                start += len(part)
        assert start == value.shape[0], "pieces do not add up"


def write_pieces(path: Path, arrays: dict[str, Pieces]) -> None:
    """Writes the tree {parameter path: Pieces}; readable like any other saved tree."""
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False,  # trained weights are noise to a compressor
        type_handler_registry=type_handlers.create_type_handler_registry((Pieces, _Handler())),
    )
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(unflatten(arrays)))
    digests.write(epath.Path(path))


def open_arrays(path: Path) -> dict[str, ts.TensorStore]:
    """The arrays of a saved tree by parameter path, to be read by `read_array`.

    Raises:
      UserError: files that are missing or cut short.
    """
    with _reading(path, "its list of arrays"):
        keys = ts.KvStore.open(_store(path)).result().list().result()
    names = (key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray"))
    out = {}
    for name in sorted(names):
        spec = {"driver": "zarr", "kvstore": {**_store(path), "path": f"{name}/"}}
        # Trees are written whole: a chunk that is not there is lost, and not zero.
        options = {"recheck_cached_data": False, "fill_missing_data_reads": False}
        out[name.replace(".", "/")] = _opened(path, name.replace(".", "/"), spec | options)
    if not out:
        raise UserError(f"{path}: holds no arrays; copy it again")
    return out


def _store(path: Path) -> dict[str, Any]:
    remote = is_remote(str(path))
    return {"driver": "ocdbt", "base": f"{path}/" if remote else f"file://{os.path.abspath(path)}/"}


def _opened(path: Path, name: str, spec: dict[str, Any]) -> ts.TensorStore:
    with _reading(path, name):
        return ts.open(spec, open=True, read=True).result()


def read_array(path: Path, name: str, array: ts.TensorStore, index: Any = ...) -> np.ndarray:
    """A part of the array `name` of the tree at `path`, by `index` as in numpy.

    Raises:
      UserError: files that are missing or cut short.
    """
    with _reading(path, name):
        return array[index].read().result()


@contextlib.contextmanager
def _reading(path: Path, name: str) -> Iterator[None]:
    """TensorStore's errors, pages of specifications, as one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        reason = str(error).partition(" [")[0].partition("\n")[0][-160:]
        raise UserError(f"{path}: cannot read {name}; copy it again ({reason})") from None
