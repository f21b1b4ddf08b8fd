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
import importlib
import importlib.abc
import importlib.util
import os
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from hovle_jax.errors import UserError, one_line

T = TypeVar("T")


class Registry(dict[str, T]):
    """Values by name; `key` is the config key that holds such a name, for errors."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def add(self, name: str) -> Callable[[T], T]:
        """A decorator (or `add(name)(value)`); a name is given once."""

        def register(value: T) -> T:
            if name in self:
                raise UserError(f"{self.key}: {name!r} is registered already; take another name")
            self[name] = value
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


def load_plugins(names: Iterable[str]) -> None:
    """Imports modules by dotted name, or files by a path that ends in .py; each of them once."""
    for name in names:
        _load(str(Path(name).resolve()) if name.endswith(".py") else name)


_FILES = "HOVLE_PLUGIN_FILES"  # of this process and of those that it starts


def _module_name(path: str) -> str:
    return f"hovle_plugin_{Path(path).stem}_{zlib.crc32(path.encode()):08x}"


class _Files(importlib.abc.MetaPathFinder):
    """Finds plug-in files by module name: data workers unpickle what such files define."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not name.startswith("hovle_plugin_"):
            return None
        files = os.environ.get(_FILES, "").split(os.pathsep)
        file = next((f for f in files if _module_name(f) == name), None)
        return file and importlib.util.spec_from_file_location(name, file)


sys.meta_path.append(_Files())


@functools.cache
def _load(name: str) -> None:
    try:
        if name.endswith(".py"):
            known = os.environ.get(_FILES, "").split(os.pathsep)
            os.environ[_FILES] = os.pathsep.join(dict.fromkeys([*filter(None, known), name]))
        importlib.import_module(_module_name(name) if name.endswith(".py") else name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model.plugins: {name}: {one_line(error)}") from error
