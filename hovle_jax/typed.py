"""Frozen dataclasses from nested mappings and back, each value of the type its field has."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from hovle_jax.errors import UserError
from hovle_jax.registry import load_plugins

T = TypeVar("T")


def to_dict(value: Any) -> Any:
    """Dataclass -> nested dicts, tuples and scalars (JSON-ready but for the tuples)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return tuple(to_dict(v) for v in value)
    return value


def from_dict(
    cls: type[T], raw: typing.Mapping[str, Any], where: str, copies: Path | None = None
) -> T:
    """Nested mapping -> dataclass `cls`; names the key that is unknown or of the wrong type.

    copies: as `registry.load_plugins` has it.
    """
    if not isinstance(raw, typing.Mapping):
        raise UserError(f"{where}: expected a section of keys and values, got {raw!r}")
    for part in (raw, raw.get("model")):  # first: what follows may name what they register
        if isinstance(part, typing.Mapping):
            named = _convert(part.get("plugins", ()), tuple[str, ...], "config.model.plugins")
            load_plugins(named, copies)
    hints = typing.get_type_hints(cls)
    unknown = [k for k in raw if k not in hints]
    if unknown:
        close = difflib.get_close_matches(unknown[0], hints, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(hints))
        raise UserError(f"{where}.{unknown[0]}: unknown config key; {hint}")
    for name in _required(cls):
        if name not in raw:
            raise UserError(f"{where}.{name}: is missing")
    return cls(**{k: _convert(v, hints[k], f"{where}.{k}") for k, v in raw.items()})


def changed(config: T, changes: typing.Mapping[str, Any], where: str) -> T:
    """`config` with other values, by dotted keys; UserError opens with `where` and names one that
    it has not."""
    raw = to_dict(config)
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = raw
        for name in parents:
            node = node.get(name)
            if not isinstance(node, dict):
                raise UserError(f"{where}: {key!r}: {name!r} is no section of a config")
        if leaf not in node:
            raise UserError(f"{where}: {key!r} is no key of a config")
        node[leaf] = to_dict(value)
    return from_dict(type(config), raw, "config")


def _required(cls: Any) -> list[str]:
    """Fields without a default."""
    none = (dataclasses.MISSING, dataclasses.MISSING)
    return [f.name for f in dataclasses.fields(cls) if (f.default, f.default_factory) == none]


def _convert(value: Any, hint: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, got {value!r}")
        return tuple(_convert(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
    if origin is types.UnionType:  # only `X | None` is used
        return None if value is None else _convert(value, args[0], where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def one_of(where: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{where}: {value!r} is not one of {', '.join(known)}")


def check_fraction(where: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{where} must be a fraction from 0 to 1, got {value:g}")


def check_regex(where: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is no regular expression ({error})") from None


def ask(registry: str, name: str) -> Any:
    """What `name` stands for in the registry at "module:NAME".

    Its module lies below this one, because what it registers is made of these settings: it is
    looked for when a config is made, and not imported with this file.
    """
    module, _, attribute = registry.partition(":")
    return getattr(importlib.import_module(module), attribute).find(name)
