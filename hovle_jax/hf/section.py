"""Objects of config.json whose values are checked as they are read.

JSON has null, lists, strings, booleans and NaN where a number belongs; each is an error that names
the key, not a traceback from the first line that computes with it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from hovle_jax.errors import UserError

_REQUIRED = object()


class Section(Mapping[str, Any]):
    """A JSON object and its place in the file; as a mapping, the values as they are.

    Every method raises UserError for a key that is missing (where it has no default) or whose value
    is of another kind. A null is no number: keys that may be null are asked for by `has`.
    """

    def __init__(self, raw: Any, where: str = ""):
        if not isinstance(raw, Mapping):
            raise UserError(f"{where or 'the file'}: expected an object, got {_shown(raw)}")
        self._raw, self.where = raw, where

    def __getitem__(self, key: str) -> Any:
        return self._raw[key]

    def __iter__(self) -> Any:
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._raw.get(key) is not None

    def name(self, key: str) -> str:
        """The key with the objects it lies in."""
        return f"{self.where}.{key}" if self.where else key

    def section(self, key: str) -> Section:
        return Section(self._get(key, _REQUIRED), self.name(key))

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        """A positive integer."""
        return self._integer(key, default, 1, "a positive integer")

    def token(self, key: str, default: Any = _REQUIRED) -> int:
        """A token id."""
        return self._integer(key, default, 0, "a token id (0 or more)")

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        return self._integer(key, default, None, "an integer")

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive, finite number."""
        x = self._get(key, default)
        good = isinstance(x, int | float) and not isinstance(x, bool)
        if not good or not 0 < x <= sys.float_info.max:  # False for NaN
            raise self.expected(key, "a positive number")
        return float(x)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        x = self._get(key, default)
        if not isinstance(x, bool):
            raise self.expected(key, "true or false")
        return x

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        x = self._get(key, default)
        if not isinstance(x, str):
            raise self.expected(key, "a text")
        return x

    def one_of(self, key: str, known: tuple[str, ...], default: Any = _REQUIRED) -> str:
        x = self.text(key, default)
        if x not in known:
            raise UserError(f"{self.name(key)} {x!r} is not {' or '.join(map(repr, known))}")
        return x

    def expected(self, key: str, kind: str) -> UserError:
        return UserError(f"{self.name(key)}: expected {kind}, got {_shown(self._raw.get(key))}")

    def _integer(self, key: str, default: Any, least: int | None, kind: str) -> int:
        x = self._get(key, default)
        if not isinstance(x, int) or isinstance(x, bool) or (least is not None and x < least):
            raise self.expected(key, kind)
        return x

    def _get(self, key: str, default: Any) -> Any:
        if key in self._raw:
            return self._raw[key]
        if default is _REQUIRED:
            raise UserError(f"{self.where or 'the file'}: has no key {key!r}")
        return default


def _shown(x: Any) -> str:
    """A value in one short line."""
    text = repr(x)
    return text if len(text) <= 60 else text[:57] + "..."
