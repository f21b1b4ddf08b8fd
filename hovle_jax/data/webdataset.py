"""webdataset tars, at random access: what img2dataset writes."""

from __future__ import annotations

import array
import functools
import os
import tarfile

import numpy as np

from hovle_jax.data import files
from hovle_jax.data.records import Record, position
from hovle_jax.data.rows import PROMPT, load_json, make_record
from hovle_jax.errors import UserError, one_line

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_KINDS = ("image", "txt", "json")
_TWICE = -2  # as the size of a member that exists twice


class Webdataset:
    """Tars of KEY.jpg (jpeg, png, webp) with KEY.txt or KEY.json: a caption or a conversation.

    Opening reads the headers of the tars once, in order. A .json holds 'conversations' or
    'messages', else 'caption' or 'text'; where there is a .txt too, the .txt is the caption.
    `where` is 'tar:key'. Other members are ignored, as are names that begin with a dot.
    """

    def __init__(
        self,
        name: str,
        path: str,
        max_tiles: int | None = None,
        *,
        prompt: str = PROMPT,
        images_only: bool = False,
    ):
        """Indexes a tar, a directory or a glob; UserError for one compressed, damaged or empty."""
        self.name, self.max_tiles = name, max_tiles
        self._record = functools.partial(make_record, prompt=prompt, images_only=images_only)
        self._images_only = images_only
        self._files = files.Ranges(files.expand(path, ".tar"))
        tars, keys, key_ends = array.array("l"), bytearray(), array.array("q")
        ranges = array.array("q")
        for n, tar in enumerate(self._files.paths):
            for key, members in _groups(tar).items():
                tars.append(n)
                keys += key.encode(errors="surrogateescape")
                key_ends.append(len(keys))
                for kind in _KINDS:
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
        image = self._member(i, 0, where)
        if self._images_only and image is not None:  # nothing else is worth a read
            return Record((), (image,), where)
        txt, sidecar = self._member(i, 1, where), self._member(i, 2, where)
        row = {} if sidecar is None else load_json(sidecar, where)
        talks = any(row.get(key) is not None for key in ("conversations", "messages"))
        if txt is not None and not talks:
            try:
                row["caption"] = txt.decode().strip()
            except UnicodeDecodeError as e:
                raise UserError(f"{where}: the .txt is not UTF-8 ({one_line(e)})") from e
        failed = row.get("status") not in (None, "success")  # make_record says why
        if image is None and not failed and (not talks or row.get("image") or row.get("images")):
            raise UserError(f"{where}: no {'/'.join(_IMAGE_SUFFIXES)} member of this key")
        if txt is None and sidecar is None:
            raise UserError(f"{where}: no txt or json member of this key")
        beside = [] if image is None else [image]
        return self._record(row, where, beside=beside)

    def _member(self, i: int, kind: int, where: str) -> bytes | None:
        start, size = (int(x) for x in self._ranges[i, kind])
        if size == _TWICE:
            raise UserError(f"{where}: several members of this key are its image, txt or json")
        return None if size < 0 else self._files.read(int(self._tars[i]), start, size, where)


def _groups(tar: str) -> dict[str, dict[str, tuple[int, int]]]:
    """{key: {'image' | 'txt' | 'json': (offset, size)}}, in the order of the tar."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with files.open_file(tar) as f, tarfile.open(fileobj=f, mode="r:") as archive:
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
                if kind in _KINDS:
                    span = (member.offset_data, member.size)
                    group[kind] = (0, _TWICE) if kind in group else span
            # To tarfile a damaged header is the end: what follows would be lost without a word.
            f.seek(archive.offset)
            if f.read(512) != bytes(512):
                raise tarfile.ReadError(f"no header and no end marker at byte {archive.offset}")
            while rest := f.read(1 << 20):
                if rest.count(0) != len(rest):
                    raise tarfile.ReadError(
                        f"more follows the end marker at byte {archive.offset}: tars are joined by "
                        "`tar --concatenate`, not by cat"
                    )
    except OSError as e:
        raise UserError(f"{tar}: cannot be read ({e.strerror or one_line(e)})") from e
    except Exception as e:  # damaged headers find every kind in tarfile
        raise UserError(
            f"{tar}: not a readable tar ({one_line(e)}); is it whole, and plain?"
        ) from e
    return groups
