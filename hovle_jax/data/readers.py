"""Random-access sources over the files users have: no conversion, an index of offsets at most.

Every source has `len()`, `[i]` and a name, and pickles (for data workers).
"""

import array
import functools
import os
from typing import Any

import numpy as np

from hovle_jax.data import files
from hovle_jax.data.records import Record, Turn, validate
from hovle_jax.data.rows import PROMPT, load_json, make_record
from hovle_jax.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class _Lines:
    """The non-blank lines of a text file, in any order, without the file in memory."""

    def __init__(self, path: str):
        starts, sizes, numbers = (array.array("q") for _ in range(3))
        start = 0
        with files.reading(path), files.open_file(path) as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    starts.append(start)
                    sizes.append(len(line))
                    numbers.append(number)
                start += len(line)
        if not starts:
            raise UserError(f"{path}: the file has no rows")
        self._path = path
        self._starts, self._sizes, self._numbers = map(np.asarray, (starts, sizes, numbers))
        self._file = files.Ranges([path])

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, i: int) -> str:
        return f"{self._path}:{self._numbers[i]}"

    def __getitem__(self, i: int) -> bytes:
        start, size = int(self._starts[i]), int(self._sizes[i])
        return self._file.read(0, start, size, self.where(i))

    def json(self, i: int) -> dict[str, Any]:
        return load_json(self[i], self.where(i))


class JsonlConversations:
    """InternVL's jsonl, or OpenAI's and Qwen's: one row per line, with `root` for its images."""

    def __init__(
        self,
        name: str,
        annotation: str,
        root: str,
        max_tiles: int | None = None,
        *,
        prompt: str = PROMPT,
        images_only: bool = False,
    ):
        """Indexes the file.

        Args:
          name: Name of the source.
          annotation: Path of the jsonl file.
          root: Directory of its relative image paths.
          max_tiles: Tile limit of its images, None for the run's default.
          prompt: The user turn of a row that has a caption only.
          images_only: Records have the images of their rows and no turns.

        Raises:
          UserError: the file is missing or empty.
        """
        self.name = name
        self.max_tiles = max_tiles
        self._record = functools.partial(
            make_record, root=root, prompt=prompt, images_only=images_only
        )
        self._lines = _Lines(annotation)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> Record:
        """Reads and validates row `i`; UserError with file and line if it is malformed."""
        return self._record(self._lines.json(i), self._lines.where(i))


class ImageFolder:
    """Unpaired images: every PNG, JPEG, WebP and BMP file below a directory, sorted by path.

    Names that begin with a dot are ignored, such as the ._ files of a Mac.
    """

    def __init__(self, name: str, directory: str, max_tiles: int | None = None):
        """Lists the files.

        Raises:
          UserError: the directory is missing or has no images.
        """
        if not files.is_dir(directory):
            raise UserError(f"{name}: image directory not found: {directory}")
        self.name = name
        self.max_tiles = max_tiles
        found = files.files_below(directory)
        self._paths = [
            path
            for path in found
            if path.lower().endswith(IMAGE_SUFFIXES) and not os.path.basename(path).startswith(".")
        ]
        if not self._paths:
            raise UserError(f"{name}: no {'/'.join(IMAGE_SUFFIXES)} files below {directory}")

    def __len__(self) -> int:
        return len(self._paths)

    def fingerprint(self) -> tuple[str, ...]:
        """The paths; a picture that was exchanged shows when it is read."""
        return tuple(p if files.is_remote(p) else os.path.abspath(p) for p in self._paths)

    def __getitem__(self, i: int) -> Record:
        path = self._paths[i]
        return Record(turns=(), images=(path,), where=path)


class TextRecords:
    """Documents for the next-token stages: what `TextLines` reads, as records."""

    def __init__(self, name: str, path: str):
        self.name = name
        self.max_tiles: int | None = None
        self._path = path
        self._lines = TextLines(path)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> Record:
        record = Record((Turn("text", self._lines[i]),), (), f"{self._path}: document {i + 1}")
        validate(record)
        return record


class TextLines:
    """Plain text: the non-blank lines of a file, or 'text' of the rows of a .jsonl file."""

    def __init__(self, path: str):
        """Indexes the file; UserError if it is missing, empty, or neither .txt nor .jsonl."""
        suffix = os.path.splitext(path)[1].lower()
        if suffix not in (".txt", ".jsonl"):  # of others, markup would be read as text
            raise UserError(f"{path}: text is a .txt of a document per line, or a .jsonl of 'text'")
        self._lines = _Lines(path)
        self._is_json = suffix == ".jsonl"

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
