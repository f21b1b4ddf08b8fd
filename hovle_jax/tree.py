"""Nested dicts of arrays as flat dicts keyed by path, and back: 'decoder/head/kernel'.

Parameter paths are the project's public names: regexes, checkpoints and conversion use them.
"""

from __future__ import annotations

import re
from typing import Any


def flatten(tree: dict[str, Any], separator: str = "/") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            inner = flatten(value, separator)
            flat |= {f"{key}{separator}{path}": leaf for path, leaf in inner.items()}
        else:
            flat[key] = value
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


def merge(*trees: dict[str, Any]) -> dict[str, Any]:
    """Later trees win."""
    flat: dict[str, Any] = {}
    for tree in trees:
        flat |= flatten(tree)
    return unflatten(flat)


def split(tree: dict[str, Any], regex: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(leaves whose whole path matches `regex`, the others)."""
    pattern = re.compile(regex)
    flat = flatten(tree)
    chosen = {k: v for k, v in flat.items() if pattern.fullmatch(k)}
    return unflatten(chosen), unflatten({k: v for k, v in flat.items() if k not in chosen})
