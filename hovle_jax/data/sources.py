"""Opening whatever users have: one source by its path, or the data sets of a meta.json."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import pathlib
import re
from typing import Any

from hovle_jax.data import formats, readers
from hovle_jax.data.array_record import MANIFEST, ArrayRecordSource
from hovle_jax.data.formats import PROMPT, Source
from hovle_jax.errors import UserError

JOURNAL = "journal.json"  # in a directory whose conversion is not finished
_META_KEYS = {*("root", "annotation", "data_augment", "max_dynamic_patch", "repeat_time", "length")}


def open_source(
    path: str,
    name: str | None = None,
    *,
    root: str | None = None,
    max_tiles: int | None = None,
    prompt: str = PROMPT,
) -> Source:
    """Opens whatever `path` is, by suffix and content.

    A .jsonl, a .json list, .tar, .parquet, .array_record, a glob or a directory of one of the last
    three, a directory of images, 'tfds:NAME#SPLIT', or 'DIRECTORY#SPLIT' of a prepared TFDS data
    set. `name` is the path's last part without suffixes by default, `root` (of relative image
    paths) the file's directory; `prompt` is the user turn of a caption. UserError if nothing is
    there or has no known format, and whatever the source raises.
    """
    name = name or default_name(path)
    base, _, split = path.partition("#")
    if path.startswith("tfds:") or os.path.isfile(os.path.join(base, "dataset_info.json")):
        return formats.TfdsSource(name, base, split or "train", max_tiles, prompt)
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, JOURNAL)):
            raise UserError(f"{path}: an unfinished conversion; finish it with the same command")
        kinds = {os.path.splitext(file)[1] for file in os.listdir(path)}
        found = [kind for kind in (".array_record", ".tar", ".parquet") if kind in kinds]
        if not found and not os.path.isfile(os.path.join(path, MANIFEST)):
            return readers.ImageFolder(name, path, max_tiles)
        if len(found) > 1:
            raise UserError(f"{path}: holds {' and '.join(found)} files; name one kind by a glob")
        suffix = found[0] if found else ".array_record"  # of which every row was rejected
    root = os.path.dirname(path) if root is None else root
    match suffix:
        case ".array_record":
            return ArrayRecordSource(name, path, max_tiles=max_tiles)
        case ".tar":
            return formats.Webdataset(name, path, max_tiles, prompt)
        case ".parquet":
            return formats.Parquet(name, path, root, max_tiles, prompt)
        case ".jsonl":
            return readers.JsonlConversations(name, path, root, max_tiles)
        case ".json":
            return formats.LlavaJson(name, path, root, max_tiles, prompt)
    known = ".jsonl, .json, .tar, .parquet, .array_record, a directory or tfds:NAME#SPLIT"
    raise UserError(f"{path}: no known format; use {known}")


def default_name(path: str) -> str:
    """'a/b.tar' -> 'b', with what is no letter, digit, '.', '_' or '-' as '_'."""
    base = os.path.basename(path.partition("#")[0].removeprefix("tfds:").rstrip("/"))
    base = re.sub(r"\.(jsonl?|tar|parquet|array_record)$", "", base)
    return re.sub(r"[^\w.-]+", "_", base).strip("_.") or "data"


@dataclasses.dataclass(frozen=True)
class MetaEntry:
    """One data set of a meta file.

    Attributes:
      name: Its key.
      source: Its conversations, with their tile limit.
      repeat: How often an epoch has it; a fraction is meant as such, where InternVL rounds down.
      augment: Its images are recompressed at random quality when trained on.
      fingerprint: Names, sizes and times of its annotation files, and where the images are.
        Images are not looked at: a picture that was exchanged shows when it is read.
    """

    name: str
    source: Source
    repeat: float
    augment: bool
    fingerprint: tuple[str, ...]


def open_meta(path: str) -> list[MetaEntry]:
    """Opens InternVL's meta.json: {name: {root, annotation, repeat_time, max_dynamic_patch, ...}}.

    An annotation is InternVL's jsonl or anything else that `open_source` opens.

    Relative paths that do not exist from the working directory are taken from the meta file's.
    'length' is ignored: the rows are counted.

    Raises:
      UserError: a missing or malformed file or entry, or an unknown key.
    """
    try:
        meta = json.loads(pathlib.Path(path).read_bytes())
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON ({e})") from e
    if not isinstance(meta, dict) or not meta:
        raise UserError(f"{path}: expected a JSON object of data sets")
    return [_meta_entry(path, name, entry) for name, entry in meta.items()]


def _meta_entry(path: str, name: str, entry: Any) -> MetaEntry:
    where = f"{path}: {name!r}"
    if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
        raise UserError(f"{where}: expected an object with a path under 'annotation'")
    if unknown := sorted(entry.keys() - _META_KEYS):
        raise UserError(f"{where}: unknown keys {unknown}; known are {sorted(_META_KEYS)}")
    augment = entry.get("data_augment", False)
    if not isinstance(augment, bool):
        raise UserError(f"{where}: data_augment must be true or false, got {augment!r}")
    repeat = entry.get("repeat_time", 1)
    if isinstance(repeat, bool) or not isinstance(repeat, int | float) or not repeat > 0:
        raise UserError(f"{where}: repeat_time must be a positive number, got {repeat!r}")
    max_tiles = entry.get("max_dynamic_patch")
    if max_tiles is not None and (type(max_tiles) is not int or max_tiles < 1):
        raise UserError(f"{where}: max_dynamic_patch must be a positive integer, got {max_tiles!r}")
    root = entry.get("root", "")
    if not isinstance(root, str):
        raise UserError(f"{where}: root must be a directory, got {root!r}")
    annotation, root = _resolve(entry["annotation"], path), _resolve(root, path)
    if annotation.endswith(".jsonl"):
        source: Source = readers.JsonlConversations(name, annotation, root, max_tiles)
    else:
        source = open_source(annotation, name, root=root, max_tiles=max_tiles)
    return MetaEntry(name, source, float(repeat), augment, (*_state_of(annotation), root))


def _state_of(path: str) -> tuple[str, ...]:
    """(name, size, time) of a file, or of all files of a directory or glob."""
    inside = glob.glob(os.path.join(glob.escape(path), "*"))
    found = sorted({f for f in (path, *glob.glob(path), *inside) if os.path.isfile(f)})
    stats = [(os.path.abspath(f), os.stat(f)) for f in found]
    return tuple(f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats)


def _resolve(path: str, meta: str) -> str:
    """`os.path.join` keeps absolute paths as they are."""
    return path if os.path.exists(path) else os.path.join(os.path.dirname(meta), path)
