"""Data sets which TFDS has prepared."""

from __future__ import annotations

import functools
from typing import Any

from hovle_jax.data.records import Record, position
from hovle_jax.data.rows import PROMPT, make_record
from hovle_jax.errors import UserError, one_line


class TfdsSource:
    """A prepared TFDS data set in a random-access format, through `tfds.data_source`.

    'image' is taken as encoded; 'caption' or 'text' is the answer, else the name of 'label'.
    Needs no TensorFlow. `where` is 'data set#split:row'.
    """

    def __init__(
        self,
        name: str,
        data: str,
        split: str,
        max_tiles: int | None = None,
        *,
        prompt: str = PROMPT,
        images_only: bool = False,
    ):
        """Opens a directory or 'tfds:NAME'; UserError if not prepared, or without images."""
        self.name, self.max_tiles = name, max_tiles
        self._record = functools.partial(make_record, prompt=prompt, images_only=images_only)
        self._data, self._split = data, split
        self._source = self._open()
        if not len(self):
            raise UserError(f"{data}#{split}: no rows")

    def _open(self) -> Any:
        import tensorflow_datasets as tfds

        is_name = self._data.startswith("tfds:")
        find = tfds.builder if is_name else tfds.builder_from_directory
        # Decoding would lose the bytes, and needs OpenCV to be fast.
        decoders = {"image": tfds.decode.SkipDecoding()}
        try:
            builder = find(self._data.removeprefix("tfds:"))
            features = dict(builder.info.features.items())
            source = builder.as_data_source(split=self._split, decoders=decoders)
        except Exception as e:  # TFDS raises many kinds
            raise UserError(f"{self._data}#{self._split}: {one_line(e)}") from e
        if not isinstance(features.get("image"), tfds.features.Image):
            raise UserError(f"{self._data}: no image under 'image', only {list(features)}")
        self._labels = getattr(features.get("label"), "names", None)
        return source

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._source = self._open()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> Record:
        i = position(i, len(self))
        where = f"{self._data}#{self._split}:{i + 1}"
        try:
            example = self._source[i]
            row = {"image": example["image"]}
            for key in ("caption", "text"):
                if isinstance(text := example.get(key), bytes):
                    row[key] = text.decode()
            if len(row) == 1 and self._labels and example.get("label") is not None:
                row["caption"] = self._labels[int(example["label"])]
        except Exception as e:  # of TFDS and of the file format below it
            raise UserError(f"{where}: cannot be read ({one_line(e)})") from e
        return self._record(row, where)
