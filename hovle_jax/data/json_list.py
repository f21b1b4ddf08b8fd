"""LLaVA's JSON list [{id, image, conversations}, ...], read one element at a time."""

from __future__ import annotations

import array
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator

import numpy as np

from hovle_jax.data import files
from hovle_jax.data.records import Record, position
from hovle_jax.data.rows import PROMPT, load_json, make_record
from hovle_jax.errors import UserError, one_line

_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_MAX_ELEMENT = 1 << 26  # bytes of one JSON row; beyond it a bracket is missing somewhere
_WINDOW = 1 << 20  # bytes of a JSON list looked at in one go
_DECODER = json.JSONDecoder()


class LlavaJson:
    """LLaVA's JSON list [{id, image, conversations}, ...], with image paths relative to `root`.

    Opening parses the file once, element by element, to learn where each one is; nothing but two
    integers per element stays in memory. `where` counts elements from 1.
    """

    def __init__(
        self,
        name: str,
        path: str,
        root: str,
        max_tiles: int | None = None,
        *,
        prompt: str = PROMPT,
        images_only: bool = False,
    ):
        """UserError if the file is missing, no JSON list, empty, or broken off in the middle."""
        self.name, self.max_tiles = name, max_tiles
        self._record = functools.partial(
            make_record, root=root, prompt=prompt, images_only=images_only
        )
        self._files = files.Ranges([path])
        self._starts, self._sizes = _list_elements(path)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Record:
        i = position(i, len(self))
        where = f"{self._files.paths[0]}:{i + 1}"
        data = self._files.read(0, int(self._starts[i]), int(self._sizes[i]), where)
        return self._record(load_json(data, where), where)


def _list_elements(path: str) -> tuple[np.ndarray, np.ndarray]:
    """(starts, sizes) in bytes, int64 [elements], of the elements of a JSON list."""
    starts, sizes = array.array("q"), array.array("q")
    state, file = files.state_of(path), files.Ranges([path])
    size = state.size if state else 0

    def window(start: int, length: int) -> str:
        length = max(0, min(length, size - start))
        return file.read(0, start, length, path).decode("latin-1")

    if size:
        for start, end in _scan_list(window, size, path):
            starts.append(start)
            sizes.append(end - start)
    if not starts:
        raise UserError(f"{path}: the file has no rows")
    return np.asarray(starts), np.asarray(sizes)


def _scan_list(text: Callable[[int, int], str], size: int, path: str) -> Iterator[tuple[int, int]]:
    """(start, end) of every element; `text` gives (start, length) of the file's `size` bytes.

    The json module finds the ends, at C speed. Read as Latin-1 a character is a byte, and all that
    JSON's grammar looks at is ASCII, so its positions are the file's.
    """
    head = text(0, 4096)
    at = _space(head, 3 if head.startswith("\xef\xbb\xbf") else 0)  # after a byte order mark
    if head[at : at + 1] != "[":
        raise UserError(f"{path}: expected a JSON list of rows")
    begin, window = at + 1, ""
    at = 0  # in the window, as all positions below
    for number in itertools.count(1):
        while (found := _element(window, at, final=begin + len(window) >= size)) is None:
            unread = len(window) - at
            begin, at = begin + at, 0
            window = text(begin, max(_WINDOW, 2 * unread))
        start, end, delimiter, problem = found
        if problem == "Expecting value" and number == 1 and window[start : start + 1] == "]":
            return
        if problem:
            raise UserError(
                f"{path}:{number}: the list cannot be read from byte {begin + start} on ({problem})"
            )
        yield begin + start, begin + end
        at = delimiter + 1
        if window[delimiter] == "]":
            if text(begin + at, 4096).strip():
                raise UserError(f"{path}:{number}: the list ends here, but the file goes on")
            return


def _element(window: str, at: int, *, final: bool) -> tuple[int, int, int, str] | None:
    """(start, end, position of ',' or ']' behind it, problem); None if it takes more text."""
    start = end = _space(window, at)
    try:
        end = _DECODER.raw_decode(window, start)[1]
        delimiter = _space(window, end)
        # Without a delimiter in sight, '12' may be the start of '123'.
        if delimiter < len(window):
            return start, end, delimiter, "" if window[delimiter] in ",]" else "no ',' or ']'"
        problem = "the list has no end"
    except json.JSONDecodeError as e:
        problem = e.msg
    except (ValueError, RecursionError) as e:
        problem = one_line(e)
    return (start, end, end, problem) if final or len(window) - at > _MAX_ELEMENT else None


def _space(text: str, at: int) -> int:
    match = _JSON_SPACE.match(text, at)
    return match.end() if match else at
