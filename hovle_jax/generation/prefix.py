"""Caches of the beginnings of prompts, up to their last image: computed once for all questions.

What is kept is bounded in bytes; the least recently used goes first.
"""

from __future__ import annotations

import collections
import hashlib
from typing import Any

import jax
import numpy as np


def prefix_length(prompt: np.ndarray, img_context_id: int) -> int:
    """Tokens up to and including the last of an image; 0 without one, or with nothing after it:
    the scores of a prompt's last token are what an answer begins with."""
    places = np.flatnonzero(prompt == img_context_id)
    length = int(places[-1]) + 1 if len(places) else 0
    return length if length < len(prompt) else 0


def prefix_key(ids: np.ndarray, tiles: np.ndarray) -> bytes:
    """A name of the content: the same for the same tokens with the same pixels, and no others."""
    digest = hashlib.sha256(f"{len(ids)} {tiles.dtype} {tiles.shape} ".encode())
    digest.update(np.ascontiguousarray(ids, np.int32).data)
    digest.update(np.ascontiguousarray(tiles).data)
    return digest.digest()


class PrefixStore:
    """Caches by `prefix_key`, of `limit` bytes at most."""

    def __init__(self, limit: int):
        self._limit = limit
        self._caches: collections.OrderedDict[bytes, Any] = collections.OrderedDict()
        self.bytes = self.hits = self.misses = 0

    def get(self, key: bytes) -> Any | None:
        cache = self._caches.get(key)
        if cache is None:
            self.misses += 1
        else:
            self.hits += 1
            self._caches.move_to_end(key)
        return cache

    def put(self, key: bytes, cache: Any) -> None:
        """Keeps a cache that `get` did not find, unless it is larger than all may be together."""
        size = _bytes(cache)
        if size > self._limit:
            return
        self._caches[key] = cache
        self.bytes += size
        while self.bytes > self._limit:
            self.bytes -= _bytes(self._caches.popitem(last=False)[1])


def _bytes(cache: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(cache))
