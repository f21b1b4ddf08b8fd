"""Tokens of an answer to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from hovle_jax.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what a character decodes to while some of its bytes are missing


class TextStream:
    """The text of an answer as its tokens come: stripped, and cut before the first stop string.

    The pieces given out concatenate to the text that all tokens decode to at once.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._given = 0
        self.text = ""  # so far, what is held back included
        self.stopped = False  # at a stop string; more tokens change nothing
        self.tokens = 0  # so far; of the text with its stop string where it is stopped

    def push(self, ids: Sequence[int]) -> str:
        """More tokens: the text that is certain now and was not before."""
        if self.stopped:
            return ""
        self._ids += ids
        raw = self._tokenizer.decode(self._ids)
        if any(s in raw for s in self._stop):
            return self._end()
        self.tokens = len(self._ids)
        self.text = raw.strip()
        # A stop string may have begun, a character may be incomplete, space may be the last.
        certain = raw.rstrip(REPLACEMENT)
        certain = certain[: len(certain) - max((_begun(certain, s) for s in self._stop), default=0)]
        return self._give(len(certain.strip()))

    def _end(self) -> str:
        """At the first token that completes a stop string, however many came with it."""
        ends: list[int] = []
        while not ends:
            self.tokens += 1
            raw = self._tokenizer.decode(self._ids[: self.tokens])
            ends = [i for i in (raw.find(s) for s in self._stop) if i >= 0]
        self.stopped, self.text = True, raw[: min(ends)].strip()
        return self._give(len(self.text))

    def close(self) -> str:
        """What was held back; there are no more tokens."""
        return self._give(len(self.text))

    def _give(self, end: int) -> str:
        piece = self.text[self._given : end]
        self._given += len(piece)
        return piece


def _begun(text: str, stop: str) -> int:
    """Characters at the end of `text` that may be the beginning of `stop`."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
