"""Bytes of files, local or remote: gs:// and whatever else etils.epath knows.

Local paths go straight to the operating system. Whatever a remote store raises leaves this file as
an OSError of one line, so that a caller treats both alike: `with reading(where): ...`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import io
import os
import pathlib
import re
import resource
import stat
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from etils import epath

from hovle_jax.errors import UserError, one_line

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BUFFER = 1 << 20  # bytes per request where a remote file is read from front to back
_OPEN_FILES = 32


def is_remote(path: str) -> bool:
    return _SCHEME.match(path) is not None


def check_local(path: str | os.PathLike[str], what: str) -> None:
    """UserError, which opens with `what`, if a path is remote: pathlib would take gs://bucket for
    a directory named 'gs:' here."""
    if is_remote(os.fspath(path)):
        raise UserError(
            f"{what}: {os.fspath(path)} must be local or mounted; checkpoints go to gs:// by "
            "config.storage"
        )


def join(root: str, path: str) -> str:
    """`os.path.join`, to which 'gs://bucket/x' would be a relative path."""
    return path if is_remote(path) else os.path.join(root, path)


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turns an OSError into a UserError that opens with `where`."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{where}: cannot be read ({e.strerror or one_line(e)})") from e


@contextlib.contextmanager
def _remote(path: str) -> Iterator[epath.Path]:
    """The path for epath; errors of the store, of its client and of its login as OSError."""
    try:
        found = epath.Path(path)
        known = is_remote(os.fspath(found))  # or epath takes it for local
    except Exception:
        known = False
    if not known:
        raise OSError(errno.EINVAL, "no known kind of remote path; use gs:// or a local one", path)
    try:
        yield found
    except FileNotFoundError as e:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from e
    except ImportError as e:
        reason = f"{one_line(e)}; for gs:// pip install hovle-jax[gcs]"
        raise OSError(errno.ENOTSUP, reason, path) from e
    except Exception as e:
        reason = (isinstance(e, OSError) and e.strerror) or one_line(e)
        raise OSError(errno.EIO, reason, path) from e


def allow_many_open() -> None:
    """Lets this process, and those it starts, have as many files open as the system allows: each
    shard that is read stays open, and the usual limit is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS says infinity and allows less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def is_file(path: str) -> bool:
    if not is_remote(path):
        return os.path.isfile(path)
    with reading(path), _remote(path) as found:
        return bool(found.is_file())


def is_dir(path: str) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    with reading(path), _remote(path) as found:
        return bool(found.is_dir())


def exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.exists(path)
    with reading(path), _remote(path) as found:
        return bool(found.exists())


@dataclasses.dataclass(frozen=True)
class State:
    """What changes when a file does: its name, size in bytes, and time in units of the store."""

    path: str
    size: int
    time: int

    def __str__(self) -> str:
        return f"{self.path} {self.size} {self.time}"


def state_of(path: str) -> State | None:
    """The state of a file, None for a directory; UserError if nothing is there."""
    with reading(path):
        if not is_remote(path):
            found = os.stat(path)
            is_folder, size, time = stat.S_ISDIR(found.st_mode), found.st_size, found.st_mtime_ns
            path = os.path.abspath(path)
        else:
            with _remote(path) as remote:
                there = remote.stat()
                is_folder, size, time = there.is_directory, int(there.length or 0), there.mtime
    return None if is_folder else State(path, size, time)


def states_of(path: str) -> list[State]:
    """States of a file, of the files in a directory, or of what a glob finds."""
    if is_dir(path):
        found = [os.path.join(path, n) for n in names_in(path) if not n.startswith(".")]
    else:
        found = [path] if exists(path) else matches(path)
    return [state for file in found if (state := state_of(file)) is not None]


def names_in(directory: str) -> list[str]:
    """Names of what is in a directory, sorted."""
    with reading(directory):
        if not is_remote(directory):
            return sorted(os.listdir(directory))
        with _remote(directory) as found:
            return sorted(entry.name for entry in found.iterdir())


def expand(path: str, suffix: str) -> list[str]:
    """Files of a path: itself, a glob, or a directory's files of this suffix; sorted.

    UserError if there are none.
    """
    if is_dir(path):
        names = [n for n in names_in(path) if n.endswith(suffix) and not n.startswith(".")]
        files = [os.path.join(path, name) for name in names]
    else:
        files = [path] if exists(path) else matches(path)
    if not files:
        raise UserError(f"{path}: no such file, and no {suffix} files there")
    return files


def matches(pattern: str) -> list[str]:
    """What a glob finds, sorted."""
    if not is_remote(pattern):
        return sorted(glob.glob(pattern))
    scheme, rest = pattern.split("://", 1)
    bucket, _, inside = rest.partition("/")
    if not glob.has_magic(inside):
        return []
    with reading(pattern), _remote(f"{scheme}://{bucket}") as root:
        return sorted(os.fspath(found) for found in root.glob(inside))


def files_below(directory: str) -> list[str]:
    """All files below a directory, sorted by path; UserError where a part cannot be listed.

    Links to folders elsewhere are followed, not back up, and each folder once.
    """

    def failed(error: OSError) -> NoReturn:
        raise error

    with reading(directory):
        if not is_remote(directory):
            found = _walk(directory)
        else:
            scheme = directory.split("://", 1)[0]
            with _remote(directory) as root:
                found = []
                for folder, _, files in root.walk(on_error=failed):
                    name = os.fspath(folder)  # without the scheme where fsspec found it
                    name = name if is_remote(name) else f"{scheme}://{name.lstrip('/')}"
                    found.append((name, files))
    return sorted(os.path.join(folder, file) for folder, files in found for file in files)


def _walk(directory: str) -> list[tuple[str, list[str]]]:
    """(folder, names of its files) of a local directory and all below it."""
    root, found = os.path.realpath(directory), []
    real = {directory: root}  # folder: where it is, without links
    seen = {root}

    def is_new(folder: str, name: str) -> bool:
        path = os.path.join(folder, name)
        linked = os.path.islink(path)
        real[path] = os.path.realpath(path) if linked else os.path.join(real[folder], name)
        if linked:
            target = pathlib.Path(real[path])
            above = any(pathlib.Path(x).is_relative_to(target) for x in (root, real[folder]))
            if above or target.is_relative_to(root):  # that comes anyway
                return False
        new = real[path] not in seen
        seen.add(real[path])
        return new

    for folder, folders, names in os.walk(directory, followlinks=True):
        found.append((folder, names))
        folders[:] = [name for name in sorted(folders) if is_new(folder, name)]
    return found


def read_bytes(path: str, where: str) -> bytes:
    """A whole file, such as an image of a row; UserError which opens with `where` if it cannot."""
    try:
        if not is_remote(path):
            # A device or a pipe would never end.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise UserError(f"{where}: {path!r} is no regular file")
            return pathlib.Path(path).read_bytes()
        with _remote(path) as found, found.open("rb") as f:
            return bytes(f.read())
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the path
        reason = getattr(e, "strerror", None) or one_line(e)
        raise UserError(f"{where}: cannot read {path!r} ({reason})") from e


def open_file(path: str) -> BinaryIO:
    """Opens a file that is read from front to back; OSError if it cannot."""
    if not is_remote(path):
        return open(path, "rb")
    return io.BufferedReader(_Stream(path), _BUFFER)  # type: ignore[return-value]


class _Stream(io.RawIOBase):
    """A remote file as Python's io knows it; what epath opens may lack half of that."""

    def __init__(self, path: str):
        self._path, self._at = path, 0
        with _remote(path) as found:
            self._size = int(found.stat().length)
            self._file: Any = found.open("rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        with _remote(self._path):
            self._file.seek(self._at)
            data = self._file.read(min(len(buffer), max(0, self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _LocalRanges:
    def __init__(self, path: str):
        self._file = open(path, "rb")  # noqa: SIM115 - stays open for the next range

    def read(self, start: int, size: int) -> bytes:
        # Unlike seek and read, pread is safe when threads share the file.
        return os.pread(self._file.fileno(), size, start)


class _RemoteRanges:
    def __init__(self, path: str):
        self._path, self._lock = path, threading.Lock()
        with _remote(path) as found:
            self._file: Any = found.open("rb")

    def read(self, start: int, size: int) -> bytes:
        with self._lock, _remote(self._path):
            self._file.seek(start)
            return bytes(self._file.read(size))


class Ranges:
    """Byte ranges of many files, the last few of them open; for threads and across pickling."""

    def __init__(self, paths: list[str]):
        self.paths = paths
        self._open: dict[int, _LocalRanges | _RemoteRanges] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def read(self, file: int, start: int, size: int, where: str) -> bytes:
        """Bytes of file number `file`; UserError which opens with `where` if it has fewer."""
        with reading(where):
            opened = self._open.get(file)
            if opened is None:
                path = self.paths[file]
                opened = _RemoteRanges(path) if is_remote(path) else _LocalRanges(path)
                # A new dict: other threads may be reading the old one. Dropped files close when
                # the last of them is done.
                self._open = dict([*self._open.items()][1 - _OPEN_FILES :]) | {file: opened}
            data = opened.read(start, size)
        if len(data) != size:
            raise UserError(f"{where}: the file ends early; it changed since it was opened")
        return data
