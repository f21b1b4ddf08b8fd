"""MMMU's open questions, as the benchmark's own code and InternVL's copy of it read answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,000
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1e-3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)

Normal = str | float


def normalised(text: str) -> list[Normal]:
    """A number with two decimals, or lower case; a single character is padded, on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_answer(answer: str) -> list[Normal]:
    """What an answer may mean: its key phrases, and the numbers in them."""
    phrases = _key_phrases(answer)
    numbers = [n for phrase in phrases for pattern in _NUMBERS for n in pattern.findall(phrase)]
    return [value for text in (*phrases, *numbers) for value in normalised(text)]


def _key_phrases(answer: str) -> list[str]:
    """Of each line the shortest text after a word as 'is' or, in the last line, after '='."""
    answer = answer.strip().strip(".").lower()
    # The original also splits at a dot before a capital, but there are none in lower case.
    lines = answer.split("\n")
    out = []
    for i, line in enumerate(lines):
        keys = (*_KEYS, "=") if i == len(lines) - 1 else _KEYS
        shortest = ""
        for key in keys:
            if key in line:
                tail = line.split(key)[-1].strip()
                shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest not in _TRIVIAL:
            out.append(shortest)
    return out or [answer]


def open_match(answer: str, accepted: Sequence[str]) -> bool:
    """An accepted text is in one of the meanings, or an accepted number is one of them."""
    wanted = [value for text in accepted for value in normalised(text)]
    for meaning in open_answer(answer):
        if isinstance(meaning, str):
            if any(isinstance(x, str) and x in meaning for x in wanted):
                return True
        elif meaning in wanted:
            return True
    return False
