"""Modules that are looked for at run time: files a user names, packages that may be missing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from hovle_jax.errors import UserError, one_line


def load_module(path: str | Path, what: str) -> ModuleType:
    """Runs a .py file; it may import the files beside it.

    Raises:
      UserError: which opens with `what`: it is not there, no .py file, or fails.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what}: no such file {path}")
    if path.suffix != ".py":
        raise UserError(f"{what}: {path} is no .py file")
    spec = importlib.util.spec_from_file_location(f"hovle_file_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    beside = str(path.resolve().parent)
    sys.path.insert(0, beside)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {failure(path, error)}") from error
    finally:
        sys.path.remove(beside)
    return module


def failure(path: str | Path, error: Exception) -> str:
    """One line: the file, its last line that was running, and what went wrong."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    where = f"{path}, line {lines[-1]}" if lines else f"{path}"
    return f"{where}: {type(error).__name__}: {one_line(error)}"


def require(name: str, extra: str, why: str) -> Any:
    """Imports what only an extra of the package installs; UserError which opens with `why`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = error.name or name
        raise UserError(f"{why}: {missing} is missing: pip install 'hovle-jax[{extra}]'") from error
