"""Names in a config and what they stand for, so that a fork adds its own without editing ours.

    LOSSES: Registry[Loss] = Registry("distill.loss")

    @LOSSES.add("huber")
    def huber(...): ...

A config names the modules that add to registries in `model.plugins`; they are imported before
anything else of it is looked at, wherever the config comes from.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.abc
import importlib.util
import os
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from hovle_jax.errors import UserError
from hovle_jax.modules import failure

T = TypeVar("T")

ORIGINS: dict[tuple[str, str], str] = {}  # (key of a registry, name) -> the file that added it


class Registry(dict[str, T]):
    """Values by name; `key` is the config key that holds such a name, for errors."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def add(self, name: str) -> Callable[[T], T]:
        """A decorator (or `add(name)(value)`); a name is given once."""

        def register(value: T) -> T:
            file = sys._getframe(1).f_code.co_filename
            if name in self:
                by = ORIGINS.get((self.key, name), "the package")
                raise UserError(
                    f"{self.key}: {name!r} is registered already, by {by}; {file} must take "
                    "another name"
                )
            self[name], ORIGINS[self.key, name] = value, file
            _digest(file)  # as it is now
            return value

        return register

    def find(self, name: str) -> T:
        if name not in self:
            close = difflib.get_close_matches(name, self, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(
                f"{self.key}: {name!r} is not one of {', '.join(self)}{hint} "
                "(what is not part of the package must be named in model.plugins)"
            )
        return self[name]


def load_plugins(names: Iterable[str], copies: Path | None = None) -> None:
    """Imports modules by dotted name, or files by a path that ends in .py; identical ones once.

    copies: what `copy_plugins` wrote; a copy stands for a file that is missing or another one now,
    unless this process has run that already, from there or under the same name from elsewhere.
    """
    for name in names:
        if not name.endswith(".py"):
            _import(name, name)
            continue
        path = Path(name).resolve()
        if copies is not None:
            _STANDS[path] = _or_copy(name, path, copies / _copy_name(name))
        file = _STANDS.setdefault(path, path)
        if file not in _SOURCES:
            _SOURCES[file] = _run(file)


def copy_plugins(names: Iterable[str], directory: Path) -> None:
    """Writes plug-in files as they ran."""
    names = [name for name in names if name.endswith(".py")]
    load_plugins(names)
    for name in names:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _copy_name(name)).write_bytes(_SOURCES[_STANDS[Path(name).resolve()]])


def code_digests(plugins: Iterable[str], text: str) -> list[str]:
    """Of code outside the package: plug-in files, and files that added a name `text` has in
    quotes."""
    load_plugins(plugins)
    files = {str(Path(name).resolve()) for name in plugins if name.endswith(".py")}
    files |= {file for (_, name), file in ORIGINS.items() if f'"{name}"' in text}
    return sorted({*filter(None, map(_digest, files))})


_SOURCES: dict[Path, bytes] = {}  # files that ran
_STANDS: dict[Path, Path] = {}  # a plug-in's path -> the file that ran for it
_FILES = "HOVLE_PLUGIN_FILES"  # MODULE=PATH:... of this process and of those that it starts


def _copy_name(name: str) -> str:
    return f"{Path(name).stem}-{zlib.crc32(name.encode()):08x}.py"


def _or_copy(name: str, path: Path, copy: Path) -> Path:
    if not copy.is_file():
        return path
    kept, where = copy.read_bytes(), copy.parent.parent
    moved = (file for file in _SOURCES if file.name == path.name)
    file = path if path in _SOURCES or path.is_file() else next(moved, path)
    if file in _SOURCES:
        if _SOURCES[file] != kept:
            _say(f"model.plugins: {file} runs, and has changed since {where} was written")
        return file
    if path.is_file():
        if path.read_bytes() == kept:
            return path
        _say(f"model.plugins: {name} is not the file that {where} was written with; {copy} runs")
    return copy


@functools.cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)


@functools.cache
def _digest(file: str) -> str:
    """As it was when first asked; '' of the package's own, and of what is no file."""
    path = Path(file)
    if path.is_relative_to(Path(__file__).parent) or not path.is_file():
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Files(importlib.abc.MetaPathFinder):
    """Finds plug-in files by module name: data workers unpickle what such files define."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not name.startswith("hovle_plugin_"):
            return None
        known = (f.partition("=") for f in os.environ.get(_FILES, "").split(os.pathsep))
        file = next((file for module, _, file in known if module == name), None)
        return file and importlib.util.spec_from_file_location(name, file)


sys.meta_path.append(_Files())


def _run(file: Path) -> bytes:
    """As a module named by its content."""
    if not file.is_file():
        raise UserError(f"model.plugins: no such file {file}")
    source = file.read_bytes()
    module = f"hovle_plugin_{hashlib.sha256(source).hexdigest()[:16]}"
    known = os.environ.get(_FILES, "").split(os.pathsep)
    os.environ[_FILES] = os.pathsep.join(dict.fromkeys([*filter(None, known), f"{module}={file}"]))
    _import(module, str(file))
    return source


def _import(module: str, name: str) -> None:
    try:
        importlib.import_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model.plugins: {failure(name, error)}") from error
