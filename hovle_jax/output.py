"""What is written: files where a user names one, files that a crash must not halve, a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
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


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """For a terminal: columns as wide as needed, numbers to the right."""
    cells = [list(head), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(head))]
    right = [all(not isinstance(row[k], str) for row in rows) for k in range(len(head))]
    lines = []
    for row in cells:
        columns = zip(row, widths, right, strict=True)
        lines.append("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in columns).rstrip())
    return "\n".join(lines)


def plain(text: str) -> str:
    """Text of unknown origin for a terminal: no escape sequence in it does anything."""
    odd = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
    return re.sub(odd, lambda m: m[0].encode("unicode_escape").decode(), text)
