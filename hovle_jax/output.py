"""Files that are written: where a user names one, and where a crash must not leave half of one."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hovle_jax.errors import UserError


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Makes the directory of a file; an OSError becomes a UserError that names the file."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def check_place(path: str | Path) -> None:
    """UserError where a report could not be written that takes hours to make."""
    with writing(path):
        if Path(path).is_dir():
            raise UserError(f"{path}: cannot be written (it is a directory)")
        if not os.access(path if Path(path).exists() else Path(path).parent, os.W_OK):
            raise UserError(f"{path}: cannot be written (no permission)")


def write_json(path: str | Path, body: Any) -> None:
    """A report, where a user wants it: a file, /dev/stdout, a pipe."""
    with writing(path):
        Path(path).write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", "utf-8")


def replace_json(path: str | Path, body: Any) -> None:
    """See `replace_bytes`."""
    replace_bytes(path, (json.dumps(body, indent=1) + "\n").encode())


def replace_bytes(path: str | Path, content: bytes) -> None:
    """By one process, and on the disk when this returns: whoever looks, also after a crash, finds
    the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
