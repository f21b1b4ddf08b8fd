"""Text of any size -> shards of token ids: `hovle data tokenize`.

Stage I reads spans from anywhere and compressed text has no random access, so text is tokenised
once. `token_shards` describes what is written, and reads it. rejects.jsonl has file, row and reason
of every row left out; journal.json is there until manifest.json is.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from hovle_jax.data import files, text_files
from hovle_jax.data.array_record import MANIFEST
from hovle_jax.data.journal import JOURNAL, MANY, Rejects, begin, drop, seal
from hovle_jax.data.text_files import Batch, File
from hovle_jax.data.token_shards import (
    ENDS,
    IDS,
    VERSION,
    check_shards,
    read_manifest,
    shard_files,
    shard_sizes,
)
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.data.workers import in_order
from hovle_jax.errors import UserError, one_line
from hovle_jax.output import replace_json
from hovle_jax.run.metrics import Progress
from hovle_jax.typed import check_fraction


def tokenize_text(
    inputs: list[str],
    out: str,
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = 2**27,
    workers: int = 0,
    max_rejects: float = 0.01,
    key: str = "text",
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes the text of files as token shards.

    Started again after a kill with the same arguments it keeps the finished shards. The same text,
    tokenizer and settings give the same bytes, with any number of workers. Memory does not grow
    with the text.

    Args:
      inputs: .txt (a document per non-blank line), .jsonl, either of them .gz or .zst, .parquet;
        globs, and directories with all below them, in sorted order; local or what epath opens.
      out: A new local directory, or one to continue.
      tokenizer: Its `encode_ordinary` is used: '<img>' in a text is five characters.
      shard_tokens: A shard is closed before it has more, unless one document alone has.
      workers: Processes that encode, 0 = none but this one. They are spawned, so a script that
        asks for them needs its `if __name__ == "__main__"`.
      max_rejects: Largest fraction of rows that may be rejected: malformed, without a string under
        `key`, or longer than 16 MiB. An empty text is neither rejected nor a document.
      key: Field (jsonl) or column (parquet) of the text.
      quiet: No progress.

    Returns:
      The manifest: tokens, documents, rows, rejects, vocab_size, dtype, config (inputs, files and
      their bytes, tokenizer fingerprint, key, shard_tokens) and shards.

    Raises:
      UserError: bad arguments; `out` holds something else; an input cannot be read or is damaged
        (put a good one in its place and continue); no text; too many rejects: with a larger
        `max_rejects` it continues where it stopped.
    """
    if shard_tokens < 1 or workers < 0:
        raise UserError("shard_tokens must be positive and workers not negative")
    check_fraction("max_rejects", max_rejects)
    files.check_local(out, "OUT_DIR")
    found = text_files.find(inputs, out)
    config = {"inputs": list(inputs), "key": key, "shard_tokens": shard_tokens}
    config |= {"tokenizer": tokenizer.fingerprint, "files": [list(file) for file in found]}
    if (manifest := read_manifest(out)) is not None:
        _check(out, manifest, config, len(found))
        drop(out)  # killed just before that
        return manifest
    try:
        with contextlib.closing(_Job(out, config)) as job:
            progress = _progress(found, job.file, quiet)
            batches = text_files.read(found, key, job.file, job.row)
            for batch, (rows, ids) in in_order(_encode, (key, tokenizer), batches, workers):
                job.add(batch.file, rows, ids)
                if job.rejects.count > max(max_rejects * job.rows, MANY):
                    raise job.too_many(max_rejects)
                progress(batch.done, job.rejects.count)
            job.seal()
            if job.rejects.count > max_rejects * job.rows:
                raise job.too_many(max_rejects)
            return job.finish(tokenizer.vocab_size)
    except OSError as e:  # a full disk
        raise UserError(f"{out}: stopped ({one_line(e)}); the same command continues") from e
    except concurrent.futures.BrokenExecutor as e:
        raise UserError(
            f"{out}: stopped (a worker died: too little memory?); the same command continues, also "
            "with fewer workers"
        ) from e


def _progress(texts: list[File], first: int, quiet: bool) -> Callable[[int, int], None]:
    """f(bytes of the files done, rejects): progress in megabytes."""
    shown = sum(file.size for file in texts[:first]) // 10**6
    total = math.ceil(sum(file.size for file in texts) / 10**6)
    progress = Progress("tokenizing", total, every=1000, start=shown)

    def update(done: int, rejects: int) -> None:
        nonlocal shown
        now = math.ceil(done / 10**6)
        for unit in range(shown + 1, now + 1):
            progress.update(unit, f"MB, {rejects} rejected")
        shown = max(shown, now)

    return (lambda done, rejects: None) if quiet else update


class _Row(NamedTuple):
    number: int
    tokens: int
    reason: str  # why it is rejected, '' if it is not


def _encode(shared: tuple[str, Tokenizer], batch: Batch) -> tuple[list[_Row], np.ndarray]:
    """What became of each row, and the ids of all, int32."""
    (key, tokenizer), rows, ids = shared, [], list[int]()
    for number, data in batch.rows:
        try:
            text = text_files.text_of(data, batch.kind, key)
        except (UserError, UnicodeError) as e:
            rows.append(_Row(number, 0, one_line(e).removeprefix("row: ")))
            continue
        found = tokenizer.encode_ordinary(text) if text.strip() else []
        rows.append(_Row(number, len(found), ""))
        ids += found
    return rows, np.array(ids, IDS)


class _Job:
    """The directory being written: journal, rejects and shards.

    Safe to kill at any time, by order (journal.py).
    """

    def __init__(self, out: str, config: dict[str, Any]):
        self._dir, self._config = out, config
        os.makedirs(out, exist_ok=True)
        self._shards = self._read_journal()
        done = ("file", "row", "rows")
        last = self._shards[-1] if self._shards else dict.fromkeys(done, 0)
        self.file, self.row, self.rows = (last[name] for name in done)
        self.rejects = Rejects(out, last)
        self._open: list[BinaryIO] = []  # ids and ends of the shard being written
        self._tokens = self._documents = self._max_id = 0  # of it

    def _read_journal(self) -> list[dict[str, Any]]:
        """The shards to keep."""
        shards: list[dict[str, Any]] = []
        if (journal := begin(self._dir)) is not None:
            shards = journal["shards"]
            last = shards[-1]["file"] if shards else 0
            _check(self._dir, journal, self._config, last)
            if journal["config"]["files"][last] != self._config["files"][last]:
                # It was found damaged and has been replaced.
                shards = [shard for shard in shards if shard["file"] < last]
        self._write_journal(shards)
        kept = {name for number in range(len(shards)) for name in shard_files(number)}
        for stray in pathlib.Path(self._dir).glob("text-*"):
            if stray.name not in kept:
                stray.unlink()
        return shards

    def _write_journal(self, shards: list[dict[str, Any]]) -> None:
        replace_json(os.path.join(self._dir, JOURNAL), {"config": self._config, "shards": shards})

    def add(self, file: int, rows: list[_Row], ids: np.ndarray) -> None:
        """Rows of file number `file`, the next ones, with the ids of all of them."""
        at = 0
        for row in rows:
            after = self._tokens + row.tokens
            if row.tokens and self._tokens and after > self._config["shard_tokens"]:
                self.seal()
            if row.reason:
                path = self._config["files"][file][0]
                self.rejects.add(file=path, row=row.number, reason=row.reason)
            elif row.tokens:
                self._write_document(ids[at : at + row.tokens])
                at += row.tokens
            self.file, self.row, self.rows = file, row.number, self.rows + 1

    def _write_document(self, ids: np.ndarray) -> None:
        if not self._open:
            self._open = [open(f"{path}.tmp", "wb") for path in self._paths()]  # noqa: SIM115
        self._tokens += len(ids)
        self._documents += 1
        self._max_id = max(self._max_id, int(ids.max()))
        self._open[0].write(ids.tobytes())
        self._open[1].write(np.array(self._tokens, ENDS).tobytes())

    def _paths(self) -> list[str]:
        return [os.path.join(self._dir, name) for name in shard_files(len(self._shards))]

    def seal(self) -> None:
        """Ends the shard being written, if there is one."""
        if not self._open:
            return
        shard: dict[str, Any] = {"tokens": self._tokens, "documents": self._documents}
        shard |= {"max_id": self._max_id, "sha256": []}
        paths = self._paths()
        for file, path, size in zip(self._open, paths, shard_sizes(shard), strict=True):
            file.close()
            written, digest = seal(f"{path}.tmp")
            if written != size:
                raise UserError(f"{path}.tmp: not all was written; is the disk full?")
            shard["sha256"].append(digest)
        for path in paths:
            os.replace(f"{path}.tmp", path)
        shard |= {"file": self.file, "row": self.row, "rows": self.rows} | self.rejects.state()
        self._write_journal([*self._shards, shard])
        self._shards.append(shard)
        self._open, self._tokens, self._documents, self._max_id = [], 0, 0, 0

    def too_many(self, max_rejects: float) -> UserError:
        first = self.rejects.first()
        return UserError(
            f"{self.rejects.count} of {self.rows} rows were rejected, more than "
            f"max_rejects={max_rejects:g} allows; {self.rejects.path} has the reasons, the first "
            f"is: {first['file']}:{first['row']}: {first['reason']}"
        )

    def finish(self, vocab_size: int) -> dict[str, Any]:
        """Writes the manifest and drops the journal."""
        if not self._shards:
            raise UserError(f"{', '.join(self._config['inputs'])}: no text")
        manifest: dict[str, Any] = {"version": VERSION, "dtype": IDS.str}
        for key in ("tokens", "documents"):
            manifest[key] = sum(shard[key] for shard in self._shards)
        manifest |= {"rows": self.rows, "rejects": self.rejects.count, "vocab_size": vocab_size}
        keys = ("tokens", "documents", "max_id", "sha256")
        shards = [{key: shard[key] for key in keys} for shard in self._shards]
        manifest |= {"config": self._config, "shards": shards}
        self.close()
        replace_json(os.path.join(self._dir, MANIFEST), manifest)
        drop(self._dir)
        return manifest

    def close(self) -> None:
        self.rejects.close()
        for file in self._open:
            file.close()


def _check(out: str, found: dict[str, Any], config: dict[str, Any], read: int) -> None:
    """UserError unless what is in `out` can be continued, or is what is asked for.

    Of the files only the first `read` must be as they were.
    """
    old, new = found["config"], config
    names = [[name for name, _ in config["files"]] for config in (old, new)]
    if {**old, "files": names[0]} != {**new, "files": names[1]}:
        raise UserError(f"{out}: tokens of other inputs or settings; name another directory")
    for before, now in zip(old["files"][:read], new["files"], strict=False):
        if before != now:
            raise UserError(f"{now[0]}: changed after {out} was begun; name another directory")
    check_shards(out, found["shards"])
