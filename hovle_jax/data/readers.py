"""Random-access sources over the files users have: no conversion, an index of offsets at most.

Every source has `len()`, `[i]` and a name, and pickles (for data workers).
"""

import array
import json
import os
from typing import Any, BinaryIO

import numpy as np

from hovle_jax.data.records import IMAGE_PLACEHOLDER, Record, Role, Turn, validate
from hovle_jax.errors import UserError

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class _Lines:
    """The non-blank lines of a text file, in any order, without the file in memory."""

    def __init__(self, path: str):
        starts, sizes, numbers = (array.array("q") for _ in range(3))
        start = 0
        try:
            with open(path, "rb") as f:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        starts.append(start)
                        sizes.append(len(line))
                        numbers.append(number)
                    start += len(line)
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({e.strerror})") from e
        if not starts:
            raise UserError(f"{path}: the file has no rows")
        self._path = path
        self._starts, self._sizes, self._numbers = map(np.asarray, (starts, sizes, numbers))
        self._file: BinaryIO | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, i: int) -> str:
        return f"{self._path}:{self._numbers[i]}"

    def __getitem__(self, i: int) -> bytes:
        start, size = int(self._starts[i]), int(self._sizes[i])
        if self._file is None:
            self._file = open(self._path, "rb")  # noqa: SIM115 - stays open for the next row
        # Unlike seek and read, pread is safe when threads share the file.
        return os.pread(self._file.fileno(), size, start)

    def json(self, i: int) -> dict[str, Any]:
        try:
            row = json.loads(self[i])
        except (ValueError, RecursionError) as e:
            raise UserError(f"{self.where(i)}: not valid JSON ({e}); fix or delete the line") from e
        if not isinstance(row, dict):
            raise UserError(f"{self.where(i)}: expected a JSON object, got {type(row).__name__}")
        return row


class JsonlConversations:
    """Conversations in InternVL's jsonl.

    A row has 'conversations', a list of {'from': human | gpt | system, 'value' or 'text'}, and
    'image', a path or a list of paths, unless it is text only. OpenAI's 'messages' of 'role' and
    'content' are read too, with the paths in 'image' or 'images'.
    """

    def __init__(self, name: str, annotation: str, root: str, max_tiles: int | None = None):
        """Indexes the file.

        Args:
          name: Name of the source.
          annotation: Path of the jsonl file.
          root: Directory of its relative image paths.
          max_tiles: Tile limit of its images, None for the run's default.

        Raises:
          UserError: the file is missing or empty.
        """
        self.name = name
        self.root = root
        self.max_tiles = max_tiles
        self._lines = _Lines(annotation)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> Record:
        """Reads and validates row `i`; UserError with file and line if it is malformed.

        Where there is one image but no '<image>', '<image>\\n' is put before the first user turn.
        """
        row = self._lines.json(i)
        where = self._lines.where(i)
        if "video" in row:
            raise UserError(f"{where}: video is not supported; delete the row")
        images = _images(row, where)
        turns = _turns(row, where)
        users = [n for n, turn in enumerate(turns) if turn.role == "user"]
        if (
            len(images) == 1
            and users
            and not any(IMAGE_PLACEHOLDER in turns[n].text for n in users)
        ):
            first = turns[users[0]]
            turns[users[0]] = Turn("user", f"{IMAGE_PLACEHOLDER}\n{first.text}")
        paths = tuple(os.path.join(self.root, image) for image in images)
        record = Record(tuple(turns), paths, where)
        validate(record)
        return record


def _images(row: dict[str, Any], where: str) -> list[str]:
    images = row.get("image") or row.get("images") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UserError(f"{where}: 'image' must be a path or a list of paths, got {images!r}")
    return images


def _turns(row: dict[str, Any], where: str) -> list[Turn]:
    messages = row.get("conversations", row.get("messages"))
    if not isinstance(messages, list):
        raise UserError(f"{where}: no list 'conversations'; its keys are {sorted(row)}")
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise UserError(f"{where}: a turn must be a JSON object, got {message!r}")
        role = message.get("from", message.get("role"))
        if not isinstance(role, str) or role not in _ROLES:
            raise UserError(f"{where}: unknown role {role!r}; use one of {', '.join(_ROLES)}")
        text = next((message[k] for k in ("value", "text", "content") if k in message), None)
        if isinstance(text, list):
            text = _join_parts(text, where)
        if not isinstance(text, str):
            raise UserError(f"{where}: a {role} turn has no text under 'value'")
        turns.append(Turn(_ROLES[role], text))
    return turns


def _join_parts(parts: list[Any], where: str) -> str:
    """OpenAI's list of content parts as InternVL's text with placeholders."""
    text = ""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            text += f"{IMAGE_PLACEHOLDER}\n"
        elif kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        else:
            raise UserError(f"{where}: content part {part!r} is neither a text nor an image")
    return text


class ImageFolder:
    """Unpaired images: every PNG, JPEG, WebP and BMP file below a directory, sorted by path."""

    def __init__(self, name: str, directory: str, max_tiles: int | None = None):
        """Lists the files.

        Raises:
          UserError: the directory is missing or has no images.
        """
        if not os.path.isdir(directory):
            raise UserError(f"{name}: image directory not found: {directory}")
        self.name = name
        self.max_tiles = max_tiles
        self._paths = sorted(
            os.path.join(folder, file)
            for folder, _, files in os.walk(directory)
            for file in files
            if file.lower().endswith(_SUFFIXES)
        )
        if not self._paths:
            raise UserError(f"{name}: no {'/'.join(_SUFFIXES)} files below {directory}")

    def __len__(self) -> int:
        return len(self._paths)

    def fingerprint(self) -> tuple[str, ...]:
        """The paths; a picture that was exchanged shows when it is read."""
        return tuple(map(os.path.abspath, self._paths))

    def __getitem__(self, i: int) -> Record:
        path = self._paths[i]
        return Record(turns=(), images=(path,), where=path)


class TextLines:
    """Plain text: the non-blank lines of a file, or 'text' of the rows of a .jsonl file."""

    def __init__(self, name: str, path: str):
        """Indexes the file; UserError if it is missing or empty."""
        self.name = name
        self._lines = _Lines(path)
        self._is_json = path.endswith(".jsonl")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> str:
        """Document `i`; UserError with file and line if it is malformed."""
        if self._is_json:
            text = self._lines.json(i).get("text")
            if not isinstance(text, str):
                raise UserError(f"{self._lines.where(i)}: no string under 'text'")
            return text
        try:
            return self._lines[i].decode().strip("\r\n")
        except UnicodeDecodeError as e:
            raise UserError(f"{self._lines.where(i)}: not UTF-8 ({e}); convert the file") from e
