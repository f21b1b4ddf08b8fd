"""VLMEvalKit's TSV: a row per question, images as base64 or as the index of the row that has it."""

from __future__ import annotations

import base64
import binascii
import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.eval.examples import LETTERS, Example, ImageStore, listed

# A cell of at most this many characters is no picture but the index of another row.
REFERENCE = 64
# What pandas, which VLMEvalKit reads with, takes for an empty cell. An option 'None' is none there.
MISSING = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN")
    + ("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")
)


def read_rows(path: str) -> Iterator[tuple[str, dict[str, str]]]:
    """('file:row', cells by column) of every row; empty cells are left out."""
    csv.field_size_limit(2**31 - 1)  # pictures
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, delimiter="\t")
        try:
            header = next(rows, [])
            names = [name if name in LETTERS else name.lower() for name in header]
            if len(set(names)) < len(names):
                raise UserError(f"{path}: a column is there twice: {', '.join(header)}")
            for n, cells in enumerate(rows, 1):
                where = f"{path}:{n}"
                if len(cells) != len(names):
                    raise UserError(f"{where}: {len(cells)} cells, {len(names)} columns")
                yield where, _present(dict(zip(names, cells, strict=True)))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: no TSV in UTF-8 ({error})") from None


def _present(cells: dict[str, str]) -> dict[str, str]:
    # An answer may well be 'None'; only an empty one is none.
    keep = ("answer", "prediction", "index")
    return {k: v for k, v in cells.items() if v and (v not in MISSING or k in keep)}


def read_tsv(path: str, store: ImageStore, root: str) -> tuple[list[Example], int]:
    """(the examples, how many rows were left out because they have no image).

    Images of `image_path` are relative to `root`, where there is no `image`.
    """
    rows: list[tuple[str, dict[str, str]]] = []
    owned: dict[str, tuple[str, ...]] = {}  # by index: images in the row itself
    lookups: dict[int, str] = {}  # by position: the index of the row that has them
    images: dict[int, tuple[str, ...]] = {}
    empty = 0
    for where, cells in read_rows(path):
        for need in ("index", "question"):
            if need not in cells:
                raise UserError(f"{where}: no {need!r}; not a TSV of VLMEvalKit")
        index, picture = cells["index"], cells.get("image", "")
        if len(picture) > REFERENCE:
            owned[index] = images[len(rows)] = _stored(picture, where, store)
        elif picture:
            lookups[len(rows)] = picture
        elif "image_path" in cells:
            names = enumerate(listed(cells["image_path"]))
            found = (store.link(os.path.join(root, x), where, not i) for i, x in names)
            images[len(rows)] = tuple(found)
        else:
            empty += 1
            continue
        rows.append((where, {k: v for k, v in cells.items() if k != "image"}))
    for position, index in lookups.items():
        if index not in owned:
            where = rows[position][0]
            raise UserError(f"{where}: its image is that of row {index!r}, which has none")
        images[position] = owned[index]
    out = [
        _example(where, cells, images[i], Path(path).stem) for i, (where, cells) in enumerate(rows)
    ]
    return out, empty


def _example(where: str, cells: dict[str, str], images: tuple[str, ...], stem: str) -> Example:
    fields: dict[str, Any] = {"file": stem, **cells}
    return Example(fields.pop("index"), fields, images, where)


def _stored(cell: str, where: str, store: ImageStore) -> tuple[str, ...]:
    pictures = []
    for text in listed(cell):
        try:
            pictures.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError):
            raise UserError(f"{where}: its image is not base64") from None
    return tuple(store.put(data, where, not i) for i, data in enumerate(pictures))
