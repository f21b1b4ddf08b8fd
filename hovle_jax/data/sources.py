"""Opening whatever users have: one source by its path, or the data sets of a meta.json."""

from __future__ import annotations

import dataclasses
import glob
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from hovle_jax.data import files
from hovle_jax.data.array_record import MANIFEST, ArrayRecordSource
from hovle_jax.data.journal import JOURNAL
from hovle_jax.data.json_list import LlavaJson
from hovle_jax.data.parquet import Parquet
from hovle_jax.data.readers import (
    IMAGE_SUFFIXES,
    ImageFolder,
    JsonlConversations,
    TextRecords,
)
from hovle_jax.data.records import Record, Source, position
from hovle_jax.data.rows import PROMPT, load_json
from hovle_jax.data.tfds_source import TfdsSource
from hovle_jax.data.webdataset import Webdataset
from hovle_jax.errors import UserError
from hovle_jax.registry import Registry

_META_KEYS = {
    *("root", "annotation", "data_augment", "max_dynamic_patch", "repeat_time", "length", "weight"),
    "text",
}

_HUGGING_FACE = (
    "{}: a Hugging Face data set as save_to_disk writes it; save it as parquet (to_parquet)"
)
REPEAT_MODES = ("exact", "internvl")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a path is to be read; see `open_source`."""

    root: str  # directory of relative image paths
    max_tiles: int | None = None
    prompt: str = PROMPT
    images_only: bool = False

    @property
    def of_rows(self) -> dict[str, Any]:
        """Those that `make_record` has a use for."""
        return {"prompt": self.prompt, "images_only": self.images_only}


# By suffix: (name of the source, path, options) -> the source.
FORMATS: Registry[Callable[[str, str, Options], Source]] = Registry("a path that ends in")


@FORMATS.add(".jsonl")
def _jsonl(name: str, path: str, o: Options) -> Source:
    return JsonlConversations(name, path, o.root, o.max_tiles, **o.of_rows)


@FORMATS.add(".json")
def _json(name: str, path: str, o: Options) -> Source:
    return LlavaJson(name, path, o.root, o.max_tiles, **o.of_rows)


@FORMATS.add(".tar")
def _tar(name: str, path: str, o: Options) -> Source:
    return Webdataset(name, path, o.max_tiles, **o.of_rows)


@FORMATS.add(".parquet")
def _parquet(name: str, path: str, o: Options) -> Source:
    return Parquet(name, path, o.root, o.max_tiles, **o.of_rows)


@FORMATS.add(".array_record")
def _array_record(name: str, path: str, o: Options) -> Source:
    return ArrayRecordSource(name, path, max_tiles=o.max_tiles, images_only=o.images_only)


BUILT_IN = frozenset(FORMATS)  # files: a directory that is called so holds some, or images


def open_source(
    path: str,
    name: str | None = None,
    *,
    root: str | None = None,
    max_tiles: int | None = None,
    prompt: str = PROMPT,
    images_only: bool = False,
) -> Source:
    """Opens whatever `path` is, by suffix and content.

    A .jsonl, a .json list, .tar, .parquet, .array_record, a glob or a directory of one of the last
    three, a file or directory with the suffix of another registered format, 'DIRECTORY#PART' of a
    converted one, a directory of images, 'tfds:NAME#SPLIT', or 'DIRECTORY#SPLIT' of a prepared TFDS
    data set; local, or on gs:// and whatever else etils.epath knows.

    Args:
      path: What to open.
      name: Name of the source, by default the path's last part without suffixes.
      root: Directory of relative image paths, by default the file's.
      max_tiles: Tile limit of its images, None for the run's default.
      prompt: The user turn of a caption.
      images_only: Records have all images of their rows and no turns; a row needs no caption, but
        one without an image is an error.

    Raises:
      UserError: nothing is there or it has no known format, and whatever the source raises.
    """
    suffix = os.path.splitext(path)[1].lower()
    base, _, split = path.partition("#")
    if split and files.is_file(os.path.join(base, MANIFEST)):
        return ArrayRecordSource(name or split, base, split, max_tiles, images_only=images_only)
    name = name or default_name(path)
    if path.startswith("tfds:") or (
        suffix not in FORMATS and files.is_file(os.path.join(base, "dataset_info.json"))
    ):
        if files.is_file(os.path.join(base, "state.json")):
            raise UserError(_HUGGING_FACE.format(path))
        split = split or "train"
        return TfdsSource(name, base, split, max_tiles, prompt=prompt, images_only=images_only)
    if files.is_dir(path) and (suffix not in FORMATS or suffix in BUILT_IN):
        names = files.names_in(path)
        if "dataset_dict.json" in names:
            raise UserError(_HUGGING_FACE.format(path))
        if JOURNAL in names:
            raise UserError(f"{path}: an unfinished conversion; finish it with the same command")
        kinds = {os.path.splitext(file)[1] for file in names}
        found: list[str] = [k for k in (".array_record", ".tar", ".parquet") if k in kinds]
        found += sorted(kinds & set(IMAGE_SUFFIXES)) if found else []
        if len(found) > 1:
            two = " and ".join(found[:2])
            raise UserError(f"{path}: holds {two} files; keep one kind, or name a glob")
        if not found and MANIFEST not in names:
            return ImageFolder(name, path, max_tiles)
        suffix = found[0] if found else ".array_record"  # of which every row was rejected
    options = Options(
        os.path.dirname(path) if root is None else root, max_tiles, prompt, images_only
    )
    if suffix not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"{path}: no known format; use {known}, a directory or tfds:NAME#SPLIT")
    return FORMATS[suffix](name, path, options)


def default_name(path: str) -> str:
    """'a/b.tar' -> 'b', with what is no letter, digit, '.', '_' or '-' as '_'."""
    base = os.path.basename(path.partition("#")[0].removeprefix("tfds:").rstrip("/"))
    stem, suffix = os.path.splitext(base)
    base = stem if suffix in FORMATS else base
    return re.sub(r"[^\w.-]+", "_", base).strip("_.") or "data"


class Head:
    """The first `count` records of a source."""

    def __init__(self, source: Source, count: int):
        self.name, self.max_tiles = source.name, source.max_tiles
        self._source, self._count = source, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Record:
        return self._source[position(i, self._count)]


@dataclasses.dataclass(frozen=True)
class MetaEntry:
    """One data set of a meta file.

    Attributes:
      name: Its key.
      source: Its conversations, with their tile limit.
      repeat: How often an epoch has it; a fraction is meant as such, unless the meta file was
        opened with `repeat_mode='internvl'`, which leaves whole numbers here.
      weight: Its share of the samples relative to the other entries, whatever its size; None
        where the meta file gives no weights.
      augment: Its images are recompressed at random quality when trained on.
      fingerprint: Names, sizes and times of its annotation files, and where the images are.
        Images are not looked at: a picture that was exchanged shows when it is read.
    """

    name: str
    source: Source
    repeat: float
    weight: float | None
    augment: bool
    fingerprint: tuple[str, ...]


def open_images(path: str) -> MetaEntry:
    """Opens the images of whatever `open_source` opens, for a mixture; named by the path."""
    source = open_source(path, path, images_only=True)
    return MetaEntry(path, source, 1.0, None, False, _state(source, path))


def open_meta(
    path: str, repeat_mode: str = "exact", *, images_only: bool = False
) -> list[MetaEntry]:
    """Opens InternVL's meta.json: {name: {root, annotation, repeat_time, max_dynamic_patch, ...}}.

    An annotation is InternVL's jsonl or anything else that `open_source` opens. 'weight' is not
    InternVL's: all entries have it or none.

    Relative paths that do not exist from the working directory are taken from the meta file's.
    'length' is ignored: the rows are counted. 'text' says that the annotation is plain text (a .txt
    of a document per line, or a .jsonl with 'text'), all of which is predicted.

    Args:
      path: The file.
      repeat_mode: 'exact' means `repeat_time` as it says; 'internvl' as InternVL's code does: below
        1 the first `int(rows * repeat_time)` rows are all there is, above it is rounded down.
      images_only: As for `open_source`.

    Raises:
      UserError: a missing or malformed file or entry, or an unknown key.
    """
    if repeat_mode not in REPEAT_MODES:
        known = ", ".join(REPEAT_MODES)
        raise UserError(f"repeat_mode must be one of {known}, got {repeat_mode!r}")
    with files.reading(path), files.open_file(path) as f:
        data = f.read()
    meta = load_json(data, path)
    if not meta:
        raise UserError(f"{path}: expected a JSON object of data sets")
    entries = [_meta_entry(path, *item, repeat_mode, images_only) for item in meta.items()]
    missing = [entry.name for entry in entries if entry.weight is None]
    if 0 < len(missing) < len(entries):
        raise UserError(f"{path}: {missing[0]!r} has no weight; give one to all entries or to none")
    return entries


def _meta_entry(path: str, name: str, entry: Any, repeat_mode: str, images_only: bool) -> MetaEntry:
    where = f"{path}: {name!r}"
    if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
        raise UserError(f"{where}: expected an object with a path under 'annotation'")
    if unknown := sorted(entry.keys() - _META_KEYS):
        raise UserError(f"{where}: unknown keys {unknown}; known are {sorted(_META_KEYS)}")
    augment = _flag(entry, "data_augment", where)
    weight = entry.get("weight")
    weight = None if weight is None else _positive(weight, "weight", where)
    max_tiles = entry.get("max_dynamic_patch")
    if max_tiles is not None and (type(max_tiles) is not int or max_tiles < 1):
        raise UserError(f"{where}: max_dynamic_patch must be a positive integer, got {max_tiles!r}")
    root = entry.get("root", "")
    if not isinstance(root, str):
        raise UserError(f"{where}: root must be a directory, got {root!r}")
    annotation, root = _resolve(entry["annotation"], path), _resolve(root, path)
    source: Source
    if _flag(entry, "text", where):
        if images_only:
            raise UserError(f"{where}: text has no images, which is all that this stage reads")
        source = TextRecords(name, annotation)
    else:
        source = open_source(
            annotation, name, root=root, max_tiles=max_tiles, images_only=images_only
        )
    repeat = entry["repeat_time"] if "repeat_time" in entry else _repeat_of(source, where)
    repeat = _positive(repeat, "repeat_time", where)
    state = (*_state(source, annotation), root, *(["text"] if entry.get("text") else []))
    if repeat_mode == "internvl" and repeat < 1:
        count = int(len(source) * repeat)
        if not count:
            raise UserError(f"{where}: repeat_time {repeat} of {len(source)} rows leaves none")
        source, repeat = Head(source, count), 1.0
    elif repeat_mode == "internvl":
        repeat = float(int(repeat))
    return MetaEntry(name, source, repeat, weight, augment, state)


def _repeat_of(source: Source, where: str) -> float:
    """What a converted source was to be repeated.

    Raises:
      UserError: its parts differ, so that one entry cannot say it.
    """
    repeats = source.repeats if isinstance(source, ArrayRecordSource) else set()
    if len(repeats) > 1:
        raise UserError(
            f"{where}: its parts have different repeat_time; take the meta.json in it, give each "
            "an entry of its own with 'annotation': 'DIRECTORY#PART', or this one a repeat_time"
        )
    return next(iter(repeats), 1.0)


def _flag(entry: dict[str, Any], key: str, where: str) -> bool:
    value = entry.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} must be true or false, got {value!r}")
    return value


def _positive(value: Any, key: str, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:
        raise UserError(f"{where}: {key} must be a positive number, got {value!r}")
    return float(value)


def _state(source: Source, path: str) -> tuple[str, ...]:
    return source.fingerprint() if isinstance(source, ImageFolder) else states_of(path)


def states_of(path: str) -> tuple[str, ...]:
    """What changes when a source does: names, sizes and times of its file or files.

    `path` is as for `open_source`.
    """
    base, _, split = path.partition("#")
    if path.startswith("tfds:"):
        return (path,)
    if files.exists(path):
        base, split = path, ""
    return (*map(str, files.states_of(base)), *([f"#{split}"] if split else []))


def _resolve(path: str, meta: str) -> str:
    """From the working directory if it is there, else from the meta file's directory."""
    base = path.partition("#")[0]  # of a split
    there = os.path.exists(base) or any(glob.iglob(path))
    if path.startswith("tfds:") or files.is_remote(path) or there:
        return path
    return os.path.join(os.path.dirname(meta), path)
