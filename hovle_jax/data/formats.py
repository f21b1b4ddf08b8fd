"""More random-access sources: LLaVA lists, webdataset tars, parquet, ArrayRecord and TFDS.

Each has the interface of `readers.JsonlConversations`: `name`, `max_tiles`, `len()`, `[i]`, and
pickles. Each keeps an index of offsets at most. A malformed row is a UserError of one line which
opens with 'file:row'; errors of a whole file are raised when the source is opened.

Local paths only. A row is a conversation ('conversations' or 'messages', as in jsonl) or a caption
('caption', else 'text') of one image, which becomes one turn each way: see `make_record`.
"""

from __future__ import annotations

import array
import contextlib
import glob
import itertools
import json
import mmap
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Protocol

import numpy as np

from hovle_jax.data import readers
from hovle_jax.data.records import IMAGE_PLACEHOLDER, Record, Turn, validate
from hovle_jax.errors import UserError

# What a user turn asks for where the data has captions only.
PROMPT = "Describe the image."

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_ROW_KEYS = ("image", "images", "conversations", "messages", "caption", "text", "status", "video")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_MAX_ELEMENT = 1 << 26  # bytes of one JSON row; beyond it a bracket is missing somewhere
_WINDOW = 1 << 20  # bytes of a JSON list looked at in one go
_TWICE = -2  # as the size of a member that exists twice
_DECODER = json.JSONDecoder()


class Source(Protocol):
    """What the pipeline and the converter see of any format."""

    name: str
    max_tiles: int | None

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Record: ...


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def load_json(data: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not valid JSON ({one_line(e)}); fix or delete the row") from e
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def make_record(
    row: dict[str, Any], images: Iterable[str | bytes], where: str, prompt: str = PROMPT
) -> Record:
    """A validated record from the fields of a row, whichever container held it.

    The row has 'conversations' or 'messages', else 'caption', else 'text'. A caption becomes the
    user turn '<image>\\n' + prompt and the assistant turn caption. `images` are paths or encoded
    bytes; `where` is 'file:row'. UserError if the row cannot be trained on.
    """
    images = tuple(images)
    # img2dataset keeps the rows of failed downloads, caption included.
    if row.get("status", "success") != "success":
        reason = row.get("error_message")
        raise UserError(f"{where}: status is {row['status']!r}, not 'success' ({reason!r})")
    if row.get("video"):
        raise UserError(f"{where}: video is not supported; delete the row")
    if "conversations" in row or "messages" in row:
        try:
            turns = readers._turns(row, where)
        except TypeError as e:  # a role that is a list or an object
            raise UserError(f"{where}: a turn's role must be a string ({one_line(e)})") from e
        users = [n for n, turn in enumerate(turns) if turn.role == "user"]
        marked = any(IMAGE_PLACEHOLDER in turns[n].text for n in users)
        if len(images) == 1 and users and not marked:
            first = turns[users[0]].text
            turns[users[0]] = Turn("user", f"{IMAGE_PLACEHOLDER}\n{first}")
    else:
        caption = next((row[k] for k in ("caption", "text") if row.get(k) is not None), None)
        if not isinstance(caption, str):
            raise UserError(
                f"{where}: no caption (a string under 'caption' or 'text') and no 'conversations'; "
                f"its keys are {sorted(map(str, row))}"
            )
        if len(images) != 1:
            raise UserError(f"{where}: a caption needs one image, the row has {len(images)}")
        turns = [Turn("user", f"{IMAGE_PLACEHOLDER}\n{prompt}"), Turn("assistant", caption)]
    texts = [turn.text for turn in turns] + [x for x in images if isinstance(x, str)]
    if any(_SURROGATE.search(text) for text in texts):  # JSON can spell it, nothing can encode it
        raise UserError(f"{where}: half a surrogate pair is not valid Unicode")
    record = Record(tuple(turns), images, where)
    validate(record)
    return record


def position(i: int, size: int) -> int:
    """Index as for a list: negative ones count from the end."""
    if not -size <= i < size:
        raise IndexError(f"row {i} of {size}")
    return int(i) % size


def expand(path: str, suffix: str) -> list[str]:
    """Files of a path: itself, a glob, or a directory's files of this suffix; sorted."""
    if os.path.isdir(path):
        files = glob.glob(os.path.join(glob.escape(path), f"*{suffix}"))
    elif os.path.exists(path):
        files = [path]
    else:
        files = glob.glob(path)
    if not files:
        raise UserError(f"{path}: no such file, and no {suffix} files there")
    return sorted(files)


class _Files:
    """Byte ranges of many files, the last few of them open; for threads and across pickling."""

    def __init__(self, paths: list[str]):
        self.paths = paths
        self._open: dict[int, BinaryIO] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def read(self, file: int, start: int, size: int, where: str) -> bytes:
        try:
            f = self._open.get(file)
            if f is None:
                f = open(self.paths[file], "rb")  # noqa: SIM115 - stays open for the next row
                # Dropped files close when the last thread that reads them is done.
                self._open = dict([*self._open.items()][-31:]) | {file: f}
            data = os.pread(f.fileno(), size, start)
        except OSError as e:
            raise UserError(f"{where}: cannot be read ({e.strerror})") from e
        if len(data) != size:
            raise UserError(f"{where}: the file ends early; it changed since it was opened")
        return data


class LlavaJson:
    """LLaVA's JSON list [{id, image, conversations}, ...], with image paths relative to `root`.

    Opening parses the file once, element by element, to learn where each one is; nothing but two
    integers per element stays in memory. `where` counts elements from 1.
    """

    def __init__(
        self, name: str, path: str, root: str, max_tiles: int | None = None, prompt: str = PROMPT
    ):
        """UserError if the file is missing, no JSON list, empty, or broken off in the middle."""
        self.name, self.root, self.max_tiles, self._prompt = name, root, max_tiles, prompt
        self._starts, self._sizes = _list_elements(path)
        self._files = _Files([path])

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Record:
        i = position(i, len(self))
        where = f"{self._files.paths[0]}:{i + 1}"
        row = load_json(
            self._files.read(0, int(self._starts[i]), int(self._sizes[i]), where), where
        )
        images = (os.path.join(self.root, image) for image in readers._images(row, where))
        return make_record(row, images, where, self._prompt)


def _list_elements(path: str) -> tuple[np.ndarray, np.ndarray]:
    """(starts, sizes) in bytes, int64 [elements], of the elements of a JSON list."""
    starts, sizes = array.array("q"), array.array("q")
    try:
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for start, end in _scan_list(data, path):
                starts.append(start)
                sizes.append(end - start)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    except ValueError:  # mmap of an empty file
        pass
    if not starts:
        raise UserError(f"{path}: the file has no rows")
    return np.asarray(starts), np.asarray(sizes)


def _scan_list(data: mmap.mmap, path: str) -> Iterator[tuple[int, int]]:
    """(start, end) of every element.

    The json module finds the ends, at C speed. Read as Latin-1 a character is a byte, and all that
    JSON's grammar looks at is ASCII, so its positions are the file's.
    """
    head = data[:4096].decode("latin-1")
    at = _space(head, 3 if head.startswith("\xef\xbb\xbf") else 0)  # after a byte order mark
    if head[at : at + 1] != "[":
        raise UserError(f"{path}: expected a JSON list of rows")
    begin, window = at + 1, ""
    at = 0  # in the window, as all positions below
    for number in itertools.count(1):
        while (found := _element(window, at, final=begin + len(window) >= len(data))) is None:
            unread = len(window) - at
            begin, at = begin + at, 0
            window = data[begin : begin + max(_WINDOW, 2 * unread)].decode("latin-1")
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
            if data[begin + at : begin + at + 4096].strip():
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


class Webdataset:
    """Tars of KEY.jpg (jpeg, png, webp) with KEY.txt or KEY.json: a caption or a conversation.

    Opening reads the headers of the tars once, in order. A .json holds 'conversations' or
    'messages', else 'caption' or 'text'; where there is a .txt too, the .txt is the caption.
    `where` is 'tar:key'. Other members are ignored, as are names that begin with a dot.
    """

    def __init__(self, name: str, path: str, max_tiles: int | None = None, prompt: str = PROMPT):
        """Indexes a tar, a directory or a glob; UserError for one compressed, damaged or empty."""
        self.name, self.max_tiles, self._prompt = name, max_tiles, prompt
        self._files = _Files(expand(path, ".tar"))
        tars, keys, key_ends = array.array("l"), bytearray(), array.array("q")
        ranges = array.array("q")
        for n, tar in enumerate(self._files.paths):
            for key, members in _groups(tar).items():
                tars.append(n)
                keys += key.encode(errors="surrogateescape")
                key_ends.append(len(keys))
                for kind in ("image", "txt", "json"):
                    ranges.extend(members.get(kind, (-1, -1)))
        if not tars:
            raise UserError(f"{path}: the tars have no members")
        self._tars, self._ranges = np.asarray(tars), np.asarray(ranges).reshape(-1, 3, 2)
        self._keys, self._key_ends = bytes(keys), np.asarray(key_ends)

    def __len__(self) -> int:
        return len(self._tars)

    def __getitem__(self, i: int) -> Record:
        i = position(i, len(self))
        tar = int(self._tars[i])
        start = int(self._key_ends[i - 1]) if i else 0
        key = self._keys[start : self._key_ends[i]].decode(errors="backslashreplace")
        key = key if key.isprintable() else repr(key)[1:-1]  # errors have one line
        where = f"{self._files.paths[tar]}:{key}"
        image, txt, sidecar = (self._member(i, kind, where) for kind in range(3))
        row = {} if sidecar is None else load_json(sidecar, where)
        talks = "conversations" in row or "messages" in row
        if txt is not None and not talks:
            try:
                row["caption"] = txt.decode().strip()
            except UnicodeDecodeError as e:
                raise UserError(f"{where}: the .txt is not UTF-8 ({one_line(e)})") from e
        failed = row.get("status", "success") != "success"  # make_record says why
        if image is None and not failed and (not talks or row.get("image") or row.get("images")):
            raise UserError(f"{where}: no {'/'.join(_IMAGE_SUFFIXES)} member of this key")
        if txt is None and sidecar is None:
            raise UserError(f"{where}: no txt or json member of this key")
        return make_record(row, [] if image is None else [image], where, self._prompt)

    def _member(self, i: int, kind: int, where: str) -> bytes | None:
        start, size = (int(x) for x in self._ranges[i, kind])
        if size == _TWICE:
            raise UserError(f"{where}: several members of this key are its image, txt or json")
        return None if size < 0 else self._files.read(int(self._tars[i]), start, size, where)


def _groups(tar: str) -> dict[str, dict[str, tuple[int, int]]]:
    """{key: {'image' | 'txt' | 'json': (offset, size)}}, in the order of the tar."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with open(tar, "rb") as f, tarfile.open(fileobj=f, mode="r:") as archive:
            while (member := archive.next()) is not None:
                setattr(archive, "members", [])  # noqa: B010 - it keeps all, and is untyped
                if member.size < 0:  # tarfile would go round in circles
                    raise tarfile.ReadError("a member of negative size")
                folder, base = os.path.split(member.name)
                if not member.isreg() or member.issparse() or base.startswith("."):
                    continue
                stem, _, suffix = base.partition(".")
                kind = "image" if suffix.lower() in _IMAGE_SUFFIXES else suffix.lower()
                group = groups.setdefault(os.path.join(folder, stem), {})
                if kind in ("image", "txt", "json"):
                    span = (member.offset_data, member.size)
                    group[kind] = (0, _TWICE) if kind in group else span
            # To tarfile a damaged header is the end: what follows would be lost without a word.
            if os.pread(f.fileno(), 512, archive.offset) != bytes(512):
                raise tarfile.ReadError(f"no header and no end marker at byte {archive.offset}")
    except OSError as e:
        raise UserError(f"{tar}: cannot be read ({e.strerror or one_line(e)})") from e
    except Exception as e:  # damaged headers find every kind in tarfile
        raise UserError(
            f"{tar}: not a readable tar ({one_line(e)}); is it whole, and plain?"
        ) from e
    return groups


class Parquet:
    """Parquet with 'image' (Hugging Face's {bytes, path}, bytes, or a path) or a list 'images'.

    Opening reads the footers. Random access costs a row group, the last two of which are kept:
    fine for a look or a conversion, slow for training where row groups are large.
    """

    def __init__(
        self, name: str, path: str, root: str, max_tiles: int | None = None, prompt: str = PROMPT
    ):
        """Indexes a file, a directory or a glob; UserError without rows, columns or pyarrow."""
        self.name, self.root, self.max_tiles, self._prompt = name, root, max_tiles, prompt
        self._paths = expand(path, ".parquet")
        groups, counts = [], []
        for n, file in enumerate(self._paths):
            with _parquet_errors(file), _pyarrow().ParquetFile(file) as opened:
                if not set(opened.schema_arrow.names) & set(_ROW_KEYS):
                    names = ", ".join(opened.schema_arrow.names)
                    raise UserError(f"{file}: no column of {', '.join(_ROW_KEYS)}, only {names}")
                for group in range(opened.num_row_groups):
                    groups.append((n, group))
                    counts.append(max(0, opened.metadata.row_group(group).num_rows))
        self._groups = np.asarray(groups).reshape(-1, 2)
        self._starts = np.cumsum([0, *counts], dtype=np.int64)
        if not len(self):
            raise UserError(f"{path}: the file has no rows")
        self._cache: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> Record:
        i = position(i, len(self))
        k = int(np.searchsorted(self._starts, i, side="right")) - 1
        file = self._groups[k, 0]
        first = np.searchsorted(self._groups[:, 0], file)  # of the file's groups
        where = f"{self._paths[file]}:{i - self._starts[first] + 1}"
        with _parquet_errors(where):
            values = self._group(k).slice(i - int(self._starts[k]), 1).to_pylist()[0]
        row = {key: _without_none(value) for key, value in values.items() if value is not None}
        return make_record(row, self._images(row, where), where, self._prompt)

    def _group(self, k: int) -> Any:
        table = self._cache.get(k)
        if table is None:
            file, group = (int(x) for x in self._groups[k])
            # The file is opened anew: its handle is neither for threads nor for pickling.
            with _pyarrow().ParquetFile(self._paths[file]) as opened:
                columns = [c for c in opened.schema_arrow.names if c in _ROW_KEYS]
                table = opened.read_row_group(group, columns=columns)
            # A new dict: other threads may be reading the old one.
            self._cache = dict([*self._cache.items()][-1:]) | {k: table}
        return table

    def _images(self, row: dict[str, Any], where: str) -> list[str | bytes]:
        images: Any = next((row[k] for k in ("image", "images") if row.get(k) is not None), [])
        refs: list[str | bytes] = []
        for image in images if isinstance(images, list) else [images]:
            ref = (image.get("bytes") or image.get("path")) if isinstance(image, dict) else image
            if not isinstance(ref, str | bytes) or not ref:
                raise UserError(f"{where}: an image has neither bytes nor a path")
            refs.append(os.path.join(self.root, ref) if isinstance(ref, str) else ref)
        return refs


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise UserError("parquet needs pyarrow: pip install hovle-jax[parquet]") from e
    return pyarrow.parquet


@contextlib.contextmanager
def _parquet_errors(where: str) -> Iterator[None]:
    """pyarrow has many kinds of errors, of many lines; IndexError: fewer rows than promised."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{where}: not readable as parquet ({one_line(e)})") from e


def _without_none(value: Any) -> Any:
    """Parquet's structs have all keys in all rows, None where JSON would have no key."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


class TfdsSource:
    """A prepared TFDS data set in a random-access format, through `tfds.data_source`.

    'image' is taken as encoded; 'caption' or 'text' is the answer, else the name of 'label'.
    Needs no TensorFlow. `where` is 'data set#split:row'.
    """

    def __init__(
        self, name: str, data: str, split: str, max_tiles: int | None = None, prompt: str = PROMPT
    ):
        """Opens a directory or 'tfds:NAME'; UserError if not prepared, or without images."""
        self.name, self.max_tiles, self._prompt = name, max_tiles, prompt
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
            row = {}
            for key in ("caption", "text"):
                if isinstance(text := example.get(key), bytes):
                    row[key] = text.decode()
            if not row and self._labels and example.get("label") is not None:
                row["caption"] = self._labels[int(example["label"])]
        except Exception as e:  # of TFDS and of the file format below it
            raise UserError(f"{where}: cannot be read ({one_line(e)})") from e
        return make_record(row, [example["image"]], where, self._prompt)
