"""What lets a directory of shards go on after a kill: sealed files, and rejects that are cut back.

A shard is sealed before it gets its name, and has it before the journal names it; the journal's
last entry says how much of rejects.jsonl to keep.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from hovle_jax.data.rows import load_json
from hovle_jax.errors import UserError

JOURNAL = "journal.json"  # there until the manifest is
REJECTS = "rejects.jsonl"
MANY = 1000  # rejects that end the work early, once they are also more than is allowed


def begin(directory: str) -> dict[str, Any] | None:
    """The journal of work that was begun there, None in an empty directory; UserError otherwise."""
    path = os.path.join(directory, JOURNAL)
    if os.path.isfile(path):
        return load_json(pathlib.Path(path).read_bytes(), path)
    if strays := [name for name in os.listdir(directory) if name != f"{JOURNAL}.tmp"]:
        raise UserError(f"{directory}: not empty ({strays[0]}); name a new directory")
    return None


def drop(directory: str) -> None:
    """All is done: the manifest is there."""
    for name in (JOURNAL, f"{JOURNAL}.tmp"):
        pathlib.Path(directory, name).unlink(missing_ok=True)


def seal(path: str) -> tuple[int, str]:
    """(bytes, sha256) of a file, which is on the disk when this returns."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        return os.fstat(f.fileno()).st_size, hashlib.file_digest(f, "sha256").hexdigest()


class Rejects:
    """rejects.jsonl: a line for every row that is left out, with the reason."""

    def __init__(self, directory: str, state: Mapping[str, Any]):
        """`state`: what `self.state()` was when the last shard was finished, or {}.

        Raises:
          UserError: the file has less than it had then.
        """
        self.count: int = state.get("rejects", 0)
        size = state.get("rejects_bytes", 0)
        self.path = os.path.join(directory, REJECTS)
        self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close
        if os.path.getsize(self.path) < size:
            raise UserError(f"{self.path}: missing or changed; delete {directory} and begin again")
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)

    def add(self, **row: Any) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self.count += 1

    def state(self) -> dict[str, int]:
        """For the journal; the lines are on the disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"rejects": self.count, "rejects_bytes": self._file.tell()}

    def first(self) -> dict[str, Any]:
        """The first line."""
        self._file.flush()
        with open(self.path, "rb") as f:
            return dict(json.loads(f.readline()))

    def close(self) -> None:
        self._file.close()
