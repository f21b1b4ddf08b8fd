"""Token ids of text in memory-mapped shards, as `hovle data tokenize` writes them.

A directory holds text-00000.tokens (ids: little-endian int32 and nothing else), text-00000.ends
(where each document ends in them: little-endian int64, in tokens), and so on; rejects.jsonl; and
manifest.json, which is written last: where it is missing, the work is not finished.

Documents follow each other without a separator. Stage I distils embeddings of ordinary tokens and
an end-of-sequence id is none. A reader that wants separators can put them in at the ends; taking
them out again would cost a search of every span.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np

from hovle_jax.data.array_record import MANIFEST
from hovle_jax.data.journal import JOURNAL
from hovle_jax.data.records import position
from hovle_jax.data.rows import load_json
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.errors import UserError, one_line

VERSION = 1
IDS, ENDS = np.dtype("<i4"), np.dtype("<i8")


def shard_files(shard: int) -> tuple[str, str]:
    return f"text-{shard:05}.tokens", f"text-{shard:05}.ends"


def shard_sizes(shard: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the files of a shard."""
    return shard["tokens"] * IDS.itemsize, shard["documents"] * ENDS.itemsize


def check_shards(out: str, shards: list[dict[str, Any]]) -> None:
    for number, shard in enumerate(shards):
        for name, size in zip(shard_files(number), shard_sizes(shard), strict=True):
            path = os.path.join(out, name)
            if not (os.path.isfile(path) and os.path.getsize(path) == size):
                raise UserError(f"{path}: missing or changed; delete {out} and tokenize again")


def read_manifest(directory: str) -> dict[str, Any] | None:
    """None if `directory` has none; UserError if it is another kind of manifest, or broken."""
    path = os.path.join(directory, MANIFEST)
    if not os.path.isfile(path):
        return None
    manifest = load_json(pathlib.Path(path).read_bytes(), path)
    try:
        shards, config = manifest["shards"], manifest["config"]
        ok = manifest["version"] == VERSION and manifest["dtype"] == IDS.str and len(shards) > 0
        ok = ok and isinstance(config["tokenizer"], str)
        ok = ok and all(isinstance(name, str) for name, _ in config["files"])
        for shard in shards:
            counts = [shard[key] for key in ("tokens", "documents", "max_id")]
            ok = ok and all(type(n) is int for n in counts) and 0 < counts[1] <= counts[0]
    except (LookupError, TypeError, ValueError):
        ok = False
    if not ok:
        raise UserError(f"{path}: not a manifest of token shards; tokenize the text again")
    return manifest


class TokenShards:
    """What `tokenize_text` wrote: one long array of ids, memory-mapped.

    Pickles as paths and counts; each process maps the shards that it reads.
    """

    def __init__(self, directory: str, tokenizer: Tokenizer):
        """Opens a directory by its manifest and the sizes of its files; reads no ids.

        Raises:
          UserError: no token shards, unfinished ones, files that are missing or changed, or ids of
            another tokenizer than `tokenizer`.
        """
        manifest = read_manifest(directory)
        if manifest is None:
            if os.path.isfile(os.path.join(directory, JOURNAL)):
                raise UserError(f"{directory}: unfinished; finish it with the same command")
            raise UserError(f"{directory}: no {MANIFEST}; make one with `hovle data tokenize`")
        shards = manifest["shards"]
        check_shards(directory, shards)
        largest = max(shard["max_id"] for shard in shards)
        if manifest["config"]["tokenizer"] != tokenizer.fingerprint:
            raise UserError(f"{directory}: ids of another tokenizer; tokenize the text again")
        if largest >= tokenizer.vocab_size:
            raise UserError(
                f"{directory}: has ids up to {largest}, the tokenizer {tokenizer.vocab_size}; "
                "tokenize the text again"
            )
        self._directory, self._vocab_size = directory, tokenizer.vocab_size
        self._starts = np.cumsum([0, *(shard["tokens"] for shard in shards)], dtype=np.int64)
        self._documents = np.cumsum([0, *(s["documents"] for s in shards)], dtype=np.int64)
        self._maps: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __len__(self) -> int:
        """Tokens."""
        return int(self._starts[-1])

    @property
    def num_documents(self) -> int:
        return int(self._documents[-1])

    def span(self, start: int, count: int) -> np.ndarray:
        """int32 [count] from token `start` on, across documents; the first follows the last.

        Raises:
          IndexError: `start` is not in [-len, len).
          UserError: a shard has changed and holds ids that the tokenizer has not.
        """
        at = position(start, len(self))
        out = np.empty(count, np.int32)
        done = 0
        while done < count:
            shard = int(np.searchsorted(self._starts, at, side="right")) - 1
            first = at - int(self._starts[shard])
            part = self._map(shard)[first : first + count - done]
            out[done : done + len(part)] = part
            done, at = done + len(part), (at + len(part)) % len(self)
            if part.min() < 0 or part.max() >= self._vocab_size:
                path = os.path.join(self._directory, shard_files(shard)[0])
                raise UserError(f"{path}: damaged; delete {self._directory} and tokenize again")
        return out

    def document(self, i: int) -> np.ndarray:
        """int32 [tokens] of document `i`; IndexError if there is none."""
        i = position(i, self.num_documents)
        shard = int(np.searchsorted(self._documents, i, side="right")) - 1
        ends, n = self._map(shard, ends=True), i - int(self._documents[shard])
        start = int(ends[n - 1]) if n else 0
        return self.span(int(self._starts[shard]) + start, int(ends[n]) - start)

    def _map(self, shard: int, *, ends: bool = False) -> np.ndarray:
        name = shard_files(shard)[ends]
        if name not in self._maps:
            path = os.path.join(self._directory, name)
            try:
                self._maps[name] = np.memmap(path, ENDS if ends else IDS, "r")
            except (OSError, ValueError) as e:
                raise UserError(f"{path}: cannot be read ({one_line(e)})") from e
        return self._maps[name]
