"""The canonical ArrayRecord of the project: what `hovle data convert` writes, and its reader.

A record is the magic 'HVR1', the header's size as a little-endian uint32, the header (JSON:
{"images": [bytes of each], "turns": [[role, text], ...]}, keys sorted, no spaces, UTF-8), and the
encoded images one after the other, unchanged.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from hovle_jax.data import files
from hovle_jax.data.records import Record, Role, Turn, position, validate
from hovle_jax.data.rows import load_json
from hovle_jax.errors import UserError, one_line

MANIFEST = "manifest.json"
VERSION = 1
_MAGIC = b"HVR1"
_ROLES = get_args(Role)


def encode_record(turns: Sequence[Turn], images: Sequence[bytes]) -> bytes:
    """The canonical bytes of a record; equal content gives equal bytes."""
    header = {"images": [len(x) for x in images], "turns": [[t.role, t.text] for t in turns]}
    text = json.dumps(header, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    return b"".join([_MAGIC, struct.pack("<I", len(text)), text, *images])


def decode_record(data: bytes, where: str) -> Record:
    """The inverse of `encode_record`, validated; UserError opening with `where` if it is none."""
    if data[:4] != _MAGIC:
        what = "of a newer version" if data[:3] == _MAGIC[:3] else "not one of `hovle data convert`"
        raise UserError(f"{where}: the record is {what}; convert the data again")
    end = 8 + int.from_bytes(data[4:8], "little")
    try:
        header = json.loads(data[8:end])
        turns = tuple(Turn(role, text) for role, text in header["turns"])
        sizes = header["images"]
        ok = all(t.role in _ROLES and isinstance(t.text, str) for t in turns)
        ok = ok and all(type(n) is int and n >= 0 for n in sizes) and end + sum(sizes) == len(data)
    except (ValueError, TypeError, KeyError, RecursionError):
        ok = False
    if not ok:
        raise UserError(f"{where}: the record is damaged; convert the data again")
    ends = np.cumsum([end, *sizes], dtype=np.int64).tolist()
    images = tuple(data[a:b] for a, b in zip(ends, ends[1:], strict=False))
    record = Record(turns, images, where)
    if turns or not images:  # unpaired images have no conversation
        validate(record)
    return record


class ArrayRecordSource:
    """What `convert` wrote: a directory of shards, one shard, or a glob of them."""

    def __init__(
        self,
        name: str,
        path: str,
        part: str | None = None,
        max_tiles: int | None = None,
        *,
        images_only: bool = False,
    ):
        """Counts the records, in a converted directory from its manifest alone.

        `part` is the source in the directory to read, None for all of them in order; `max_tiles`
        is the manifest's unless given. UserError if a shard is unreadable, nothing is there, or
        parts have different limits and none is given.
        """
        self.name, self._images_only = name, images_only
        manifest = read_manifest(path)
        if manifest is None:
            if part is not None:
                raise UserError(f"{path}: no {MANIFEST}, so no part {part!r}")
            self._paths = files.expand(path, ".array_record")
            counts = [open_shard(shard).num_records() for shard in self._paths]
            given: dict[str, tuple[int | None, float]] = {}
            for directory in sorted({os.path.dirname(shard) for shard in self._paths}):
                given |= _given(directory, read_manifest(directory))
        else:
            parts, given = manifest["sources"], _given(path, manifest)
            if part is not None and part not in parts:
                raise UserError(f"{path}: no part {part!r}; there are {', '.join(parts)}")
            chosen = list(parts.values()) if part is None else [parts[part]]
            shards = [shard for p in chosen for shard in p["shards"]]
            self._paths = [os.path.join(path, shard["file"]) for shard in shards]
            counts = [shard["records"] for shard in shards]
        found = {given.get(shard, (None, 1.0)) for shard in self._paths}
        limits = {limit for limit, _ in found}
        if max_tiles is None and len(limits) > 1:
            raise UserError(
                f"{path}: its parts have different tile limits (max_dynamic_patch); take the "
                "meta.json in it, name each as DIRECTORY#PART, or give one for all"
            )
        self.max_tiles = limits.pop() if max_tiles is None and limits else max_tiles
        self.repeats = {repeat for _, repeat in found}  # how often the parts were to come
        self._starts = np.cumsum([0, *counts], dtype=np.int64)
        if not len(self):
            raise UserError(f"{path}: no records")
        self._open: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> Record:
        i = position(i, len(self))
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        row = i - int(self._starts[shard])
        where = f"{self._paths[shard]}:{row + 1}"
        try:
            if shard not in self._open:
                self._open[shard] = open_shard(self._paths[shard])
            data = self._open[shard].read([row])[0]
        except (RuntimeError, IndexError, ValueError) as e:
            raise UserError(f"{where}: cannot be read ({one_line(e)})") from e
        record = decode_record(data, where)
        if not self._images_only:
            return record
        if not record.images:
            raise UserError(f"{where}: no image")
        return dataclasses.replace(record, turns=())


def _given(directory: str, manifest: dict[str, Any] | None) -> dict[str, tuple[int | None, float]]:
    """{path of a shard: (tile limit, repeat_time) of what it was converted from}."""
    if manifest is None:
        return {}
    repeats = manifest["config"].get("repeat_time", {})
    return {
        os.path.join(directory, shard["file"]): (part["max_tiles"], repeats.get(name, 1.0))
        for name, part in manifest["sources"].items()
        for shard in part["shards"]
    }


def open_shard(path: str) -> Any:
    from array_record.python import array_record_module

    options = "readahead_buffer_size:0,max_parallelism:0"  # for random access
    try:
        reader = array_record_module.ArrayRecordReader(path, options, file_reader_buffer_size=32768)
        if reader.ok():
            return reader
        if files.is_remote(path):
            reason = "its reader has no access; mount the bucket with gcsfuse or copy the shards"
        elif not os.path.isfile(path):
            reason = "no such file"
        else:
            open(path, "rb").close()  # noqa: SIM115 - says why: no permission, too many open files
            reason = "damaged or cut short"
    except (RuntimeError, ValueError, OSError) as e:
        reason = one_line(e)
    raise UserError(f"{path}: not readable as ArrayRecord ({reason})")


def read_manifest(directory: str) -> dict[str, Any] | None:
    """The manifest of a converted directory, None if `directory` has none; UserError if broken."""
    path = os.path.join(directory, MANIFEST)
    if not files.is_file(path):
        return None
    try:
        manifest = load_json(files.read_bytes(path, path), path)
        parts = manifest["sources"].values()
        shards = [shard for part in parts for shard in part["shards"]]
        ok = manifest["version"] == VERSION and isinstance(manifest["config"], dict)
        repeats = manifest["config"].get("repeat_time", {})
        ok = ok and all(isinstance(repeat, int | float) for repeat in repeats.values())
        ok = ok and all(isinstance(part["max_tiles"], int | None) for part in parts)
        ok = ok and all(
            isinstance(s["file"], str) and s["records"] > 0 <= s["bytes"] for s in shards
        )
        np.cumsum([shard["records"] for shard in shards], dtype=np.int64)
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError):
        ok = False
    if not ok:
        raise UserError(f"{path}: not a manifest of version {VERSION}; convert the data again")
    return manifest
