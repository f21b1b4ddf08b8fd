"""Any source -> canonical ArrayRecord shards with the images inside: `hovle data convert`.

A converted directory holds NAME-00000.array_record, NAME-00001.array_record, ... per source,
meta.json (a mixture of them, as the inputs' meta files had it), rejects.jsonl (source, row and
reason of every row left out) and manifest.json, which is written last: where it is missing, the
conversion is not finished. journal.json exists until then.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from hovle_jax.data import files, image
from hovle_jax.data.array_record import (
    MANIFEST,
    VERSION,
    encode_record,
    open_shard,
    read_manifest,
)
from hovle_jax.data.journal import JOURNAL, MANY, Rejects, begin, drop, seal
from hovle_jax.data.records import Record, Source
from hovle_jax.data.rows import PROMPT
from hovle_jax.data.sources import MetaEntry, open_meta, open_source
from hovle_jax.errors import UserError, one_line
from hovle_jax.output import replace_json
from hovle_jax.run.metrics import Progress
from hovle_jax.typed import check_fraction, one_of

META = "meta.json"
_CHECKS = ("none", "header", "full")


def run_convert(
    inputs: list[str], out: str, *, root: str | None = None, prompt: str = PROMPT, **options: Any
) -> dict[str, Any]:
    """`hovle data convert INPUT... OUT`.

    An input is what `open_source` opens, a meta.json, or NAME=INPUT to name the source; the other
    arguments, results and errors are those of `open_source` and `convert`.
    """
    files.allow_many_open()
    sources: list[Source] = []
    sizes: list[int] = []
    entries: dict[str, dict[str, Any]] = {}
    for given in inputs:
        named = not os.path.exists(given) and re.match(r"([\w.-]+)=", given)
        name, path = (named[1], given[named.end() :]) if named else (None, given)
        sizes.append(_size(path))
        if _is_meta(path):
            opened = open_meta(path)
            sources += [entry.source for entry in opened]
            entries |= {entry.name: _settings(entry) for entry in opened}
        else:
            sources.append(open_source(path, name, root=root, prompt=prompt))
    config = {"inputs": inputs, "input_bytes": sizes, "prompt": prompt, "root": root}
    # Kept for the mixture: every row is converted once, its pixels as they are.
    config |= {"repeat_time": {name: e["repeat_time"] for name, e in entries.items()}}
    config |= {"meta": entries}
    return convert(sources, out, config=config, **options)


def _settings(entry: MetaEntry) -> dict[str, Any]:
    """What meta.json says of a data set beside where it is and how many tiles an image takes."""
    settings: dict[str, Any] = {"repeat_time": entry.repeat}
    if entry.weight is not None:
        settings["weight"] = entry.weight
    if entry.augment:
        settings["data_augment"] = True
    return settings


def _is_meta(path: str) -> bool:
    if not path.endswith(".json") or not files.is_file(path):
        return False
    with files.reading(path), files.open_file(path) as f:
        return f.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{"


def _size(path: str) -> int:
    """Bytes of an input, to notice that it changed between two runs."""
    return sum(state.size for state in files.states_of(path))


def convert(
    sources: Sequence[Source],
    out_dir: str,
    *,
    shard_bytes: int = 512 * 2**20,
    max_rejects: float = 0.01,
    check: str = "header",
    config: dict[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes the sources as canonical ArrayRecord shards.

    Started again after a kill with the same arguments it keeps the finished shards. The same
    sources and settings give the same bytes.

    Args:
      sources: What to convert; their names name the shards.
      out_dir: A new directory, or one to continue.
      shard_bytes: A shard is closed before its records have more bytes than this.
      max_rejects: Largest fraction of rows that may be rejected.
      check: What images must pass: 'none', 'header' or 'full' (decoding, milliseconds each).
      config: Kept in the manifest and compared on continuation.
      quiet: No progress.

    Returns:
      The manifest: records, rejects, config, and per source its records, rejects, max_tiles and
      shards (file, records, bytes, sha256, first and end row).

    Raises:
      UserError: bad arguments, `out_dir` holds something else, or too many rejects: with a larger
        `max_rejects` it continues where it stopped.
    """
    files.check_local(out_dir, "OUT_DIR")
    _check_arguments([source.name for source in sources], shard_bytes, max_rejects, check)
    total = sum(map(len, sources))
    full = {**(config or {}), "check": check, "shard_bytes": shard_bytes}
    full["sources"] = [[s.name, len(s), s.max_tiles] for s in sources]
    full = json.loads(json.dumps(full))  # as it will be read back
    if (manifest := read_manifest(out_dir)) is not None:
        shards = [x for part in manifest["sources"].values() for x in part["shards"]]
        _check(out_dir, manifest["config"], full, shards)
        drop(out_dir)  # killed just before that
        return manifest
    job = _Job(out_dir, full, shard_bytes, check)
    progress = Progress("converting", total, every=10_000)
    done = 0
    try:
        for source in sources:
            while (first := job.end(source.name)) < len(source):
                for row in job.write_shard(source, first):
                    if job.rejects.count > max(max_rejects * total, MANY):
                        raise job.too_many(total, max_rejects)
                    if not quiet:
                        progress.update(done + row, f"{job.rejects.count} rejected")
            done += len(source)
        if job.rejects.count > max_rejects * total:
            raise job.too_many(total, max_rejects)
        return job.finish(sources)
    except (OSError, RuntimeError) as e:  # ArrayRecord's: a full disk
        raise UserError(f"{out_dir}: stopped ({one_line(e)}); the same command continues") from e


def _check_arguments(names: list[str], shard_bytes: int, max_rejects: float, check: str) -> None:
    if not names:
        raise UserError("nothing to convert")
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise UserError(f"source name {name!r} is no file name; give one as NAME=INPUT")
        if names.count(name) > 1:
            raise UserError(f"two sources are named {name!r}; give names as NAME=INPUT")
    if shard_bytes < 1:
        raise UserError(f"shard_bytes must be positive, got {shard_bytes}")
    check_fraction("max_rejects", max_rejects)
    one_of("check", check, _CHECKS)


def _check(
    out_dir: str, found: dict[str, Any], config: dict[str, Any], shards: list[dict[str, Any]]
) -> None:
    """UserError unless what is in the directory can be continued, or is what is asked for."""
    if found != config:
        raise UserError(f"{out_dir}: a conversion of other inputs or settings; name another")
    for shard in shards:
        path = os.path.join(out_dir, shard["file"] or "")
        if shard["file"] and not (os.path.isfile(path) and os.path.getsize(path) == shard["bytes"]):
            raise UserError(f"{path}: missing or changed; delete {out_dir} and convert again")


class _Job:
    """The directory being written: journal, rejects and shards. Safe to kill at any time."""

    def __init__(self, out_dir: str, config: dict[str, Any], shard_bytes: int, check: str):
        self._dir, self._config = out_dir, config
        self._shard_bytes, self._check = shard_bytes, check
        os.makedirs(out_dir, exist_ok=True)
        self._shards = self._read_journal()
        self.rejects = Rejects(out_dir, self._shards[-1] if self._shards else {})

    def _read_journal(self) -> list[dict[str, Any]]:
        if (journal := begin(self._dir)) is not None:
            _check(self._dir, journal["config"], self._config, journal["shards"])
            return list(journal["shards"])
        self._write_journal([])
        return []

    def _write_journal(self, shards: list[dict[str, Any]]) -> None:
        replace_json(os.path.join(self._dir, JOURNAL), {"config": self._config, "shards": shards})

    def end(self, name: str) -> int:
        """The first row of a source that no finished shard covers."""
        return max((s["end"] for s in self._shards if s["source"] == name), default=0)

    def write_shard(self, source: Source, first: int) -> Iterator[int]:
        """Writes the shard that begins at row `first`; yields the number of rows done."""
        from array_record.python import array_record_module

        number = sum(s["source"] == source.name and bool(s["file"]) for s in self._shards)
        file = f"{source.name}-{number:05}.array_record"
        path = os.path.join(self._dir, file)
        writer, records, payload, row = None, 0, 0, first
        while row < len(source):
            try:
                record = source[row]
                data = encode_record(record.turns, _image_bytes(record, self._check))
            except (UserError, TypeError, UnicodeError, RecursionError) as e:  # of odd JSON, too
                self.rejects.add(source=source.name, row=row + 1, reason=one_line(e))
            else:
                if records and payload + len(data) > self._shard_bytes:
                    break
                if writer is None:
                    writer = array_record_module.ArrayRecordWriter(f"{path}.tmp", "group_size:1")
                writer.write(data)
                records, payload = records + 1, payload + len(data)
            row += 1
            yield row
        shard: dict[str, Any] = {"source": source.name, "file": None, "records": 0}
        if writer is not None:
            writer.close()
            if open_shard(f"{path}.tmp").num_records() != records:
                raise UserError(f"{path}.tmp: not all was written; is the disk full?")
            size, digest = seal(f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
            shard |= {"file": file, "records": records, "bytes": size, "sha256": digest}
        shard |= {"first": first, "end": row} | self.rejects.state()
        self._write_journal([*self._shards, shard])
        self._shards.append(shard)

    def too_many(self, total: int, max_rejects: float) -> UserError:
        return UserError(
            f"{self.rejects.count} of {total} rows were rejected, more than "
            f"max_rejects={max_rejects:g} allows; {self.rejects.path} has the reasons, the first "
            f"is: {self.rejects.first()['reason']}"
        )

    def finish(self, sources: Sequence[Source]) -> dict[str, Any]:
        """Writes meta.json and the manifest and drops the journal."""
        parts: dict[str, Any] = {}
        meta: dict[str, Any] = {}
        before = 0
        for source in sources:
            mine = [s for s in self._shards if s["source"] == source.name]
            after = mine[-1]["rejects"] if mine else before
            keys = ("file", "records", "bytes", "sha256", "first", "end")
            parts[source.name] = {
                "records": sum(s["records"] for s in mine),
                "rejects": after - before,
                "max_tiles": source.max_tiles,
                "shards": [{k: s[k] for k in keys} for s in mine if s["file"]],
            }
            before = after
            if any(s["file"] for s in mine):
                limit = {"max_dynamic_patch": source.max_tiles} if source.max_tiles else {}
                settings = self._config.get("meta", {}).get(source.name, {})
                meta[source.name] = {"annotation": f"#{source.name}", **limit, **settings}
        records = sum(part["records"] for part in parts.values())
        manifest = {"version": VERSION, "records": records, "rejects": self.rejects.count}
        manifest |= {"config": self._config, "sources": parts}
        self.rejects.close()
        replace_json(os.path.join(self._dir, META), meta)
        replace_json(os.path.join(self._dir, MANIFEST), manifest)
        drop(self._dir)
        return manifest


def _image_bytes(record: Record, check: str) -> list[bytes]:
    """The encoded images of a record; UserError if one is missing or fails the check."""
    images = []
    for ref in record.images:
        data = files.read_bytes(ref, record.where) if isinstance(ref, str) else ref
        try:
            if check == "header":
                image.image_size_of(data, record.where)
            elif check == "full":
                image.open_image(data, record.where)
        except Exception as e:  # hostile bytes find every kind in the decoders
            name = repr(ref) if isinstance(ref, str) else "inside"
            reason = one_line(e).removeprefix(f"{record.where}: ")
            raise UserError(f"{record.where}: image {name}: {reason}") from e
        images.append(data)
    return images
