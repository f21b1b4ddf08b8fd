"""What the readers of benchmark files yield, and where their images go."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from hovle_jax.data.image import open_image
from hovle_jax.errors import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MAGIC = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"))


@dataclasses.dataclass(frozen=True)
class Example:
    """One question of a benchmark.

    Attributes:
      id: What the file calls it; need not be unique (AI2D has the image's path).
      fields: The other columns, those of its images left out; what is missing is not there.
      images: Names in the `ImageStore`, or absolute paths.
      where: 'file:row'; it opens every error message about this example.
    """

    id: str
    fields: Mapping[str, Any]
    images: tuple[str, ...]
    where: str

    def field(self, name: str) -> str:
        """A column that the benchmark needs; UserError if the row lacks it."""
        value = self.fields.get(name)
        if value is None:
            raise UserError(f"{self.where}: no {name!r}; the columns are {', '.join(self.fields)}")
        return str(value)

    @property
    def options(self) -> dict[str, str]:
        """The texts of the choices by their letters."""
        return {c: str(self.fields[c]) for c in LETTERS if self.fields.get(c) is not None}

    @property
    def answers(self) -> list[str]:
        """All accepted answers: a list, the Python spelling of one (VLMEvalKit), or a text."""
        texts = self.answers_as_written
        return listed(texts[0]) if len(texts) == 1 else texts

    @property
    def answers_as_written(self) -> list[str]:
        """The same, but a text that spells a list is a text."""
        self.field("answer")
        value = self.fields["answer"]
        return [str(x) for x in value] if isinstance(value, list) else [str(value)]


def listed(text: str) -> list[str]:
    """The items of "['a', 'b']", or the text itself if it does not spell a list."""
    if text[:1] == "[" and text[-1:] == "]":
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [text]
        if isinstance(value, list):
            return [str(x) for x in value]
    return [text]


class ImageStore:
    """Images by their contents: each is written once, however many questions ask about it.

    Without a directory nothing is written and only the names are made, which tell images apart.
    """

    def __init__(self, directory: Path | None, scale: int = 1):
        self.directory, self._scale = directory, scale
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes, where: str, first: bool) -> str:
        """The name of an encoded image; the `first` of a question is enlarged by `scale`."""
        name = hashlib.sha1(data).hexdigest()[:20]
        if self.directory is None:
            return name
        if first and self._scale > 1:
            return self._write(f"{name}.x{self._scale}.png", enlarged(data, where, self._scale))
        kind = next((kind for magic, kind in _MAGIC if data.startswith(magic)), "img")
        return self._write(f"{name}.{kind}", data)

    def link(self, path: str, where: str, first: bool) -> str:
        """The same for an image in a file: its path, if it is used as it is."""
        path = str(Path(path).absolute())
        if self.directory is None:
            return path
        if first and self._scale > 1:
            name = hashlib.sha1(path.encode()).hexdigest()[:20]
            return self._write(f"{name}.x{self._scale}.png", enlarged(path, where, self._scale))
        return path

    def _write(self, name: str, data: bytes) -> str:
        assert self.directory is not None
        path = self.directory / name
        if not path.exists():
            part = path.with_name(f"{name}.part")  # a kill leaves no half image behind
            part.write_bytes(data)
            part.rename(path)
        return name


def enlarged(ref: str | bytes, where: str, scale: int) -> bytes:
    """An image with `scale` times the width and height, as PNG."""
    picture, out = open_image(ref, where), io.BytesIO()
    size = (picture.width * scale, picture.height * scale)
    picture.resize(size, Image.Resampling.BILINEAR).save(out, "PNG")
    return out.getvalue()
