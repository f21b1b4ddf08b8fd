"""Directories that exist whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hovle_jax.data import files
from hovle_jax.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def new_directory(out: str | Path, need: int) -> Iterator[Path]:
    """Gives `OUT.partial` to write into and renames it to OUT at the end.

    need: bytes that will be written. On an error nothing is left; after a kill, only the partial
    directory, which the next attempt replaces.

    Raises:
      UserError: OUT is not empty, cannot be written, or the disk is too small.
    """
    files.check_local(out, "the new directory")
    out = Path(os.path.realpath(out))
    if os.path.ismount(out):  # could be neither replaced nor removed
        raise UserError(f"{out}: is where a disk is mounted; choose a directory below it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; remove it or choose another directory")
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(partial.parent).free
        if free < need:
            raise UserError(f"{out}: needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
        partial.mkdir()
        yield partial
        if out.exists():
            out.rmdir()
        os.rename(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        full = isinstance(error, OSError) and error.errno in _FULL
        if full or "No space left" in str(error) or "File too large" in str(error):
            raise UserError(f"{out}: no space left on the disk; nothing was kept") from None
        if isinstance(error, OSError):
            raise UserError(f"{out}: cannot be written ({error})") from None
        raise
