"""`hovle generate`: questions of a jsonl file to a jsonl file of answers.

One line out per line in, in the same order, written as soon as all before it are. A line of output
names its line of input by number and checksum, so that a run that was killed goes on after the last
complete line, and one whose input has changed since is refused. OUT.settings.json says how answers
were made: a file has those of one model and one set of settings.

Of several hosts each answers its share of the rows on its own devices, into OUT.PART-of-HOSTS; when
all are through, the parts become OUT. Hosts say nothing to each other in between.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import heapq
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.data.rows import load_json
from hovle_jax.errors import UserError
from hovle_jax.generation.chat import Assistant
from hovle_jax.generation.engine import Engine
from hovle_jax.generation.questions import (
    check_keys,
    length_of,
    question_of,
    sampling_of,
    stop_of,
)
from hovle_jax.generation.sampling import MAX_SEED, Sampling
from hovle_jax.generation.text_stream import TextStream
from hovle_jax.output import replace_json

AHEAD = 4  # rows prepared or finished out of order, per slot


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of all rows; a row's own keys of the same names come first."""

    max_new_tokens: int = 64
    sampling: Sampling = Sampling()  # the seed of row n is this one's plus n
    stop: tuple[str, ...] = ()


@dataclasses.dataclass
class _Row:
    """A row of input on its way: `out` is set when it is finished."""

    text: TextStream
    out: dict[str, Any]
    finished: bool = False
    kept: bool = False  # from before


def part_of(target: str, host: int, hosts: int) -> str:
    """Where a host writes its share; `target` itself where it is alone.

    Raises:
      UserError: there are parts of another number of hosts, which nothing would go on with.
    """
    if hosts == 1 or Path(target).exists():  # finished, and to be looked at by the first host
        return target
    beside = Path(target).absolute().parent.glob(f"{Path(target).name}.*-of-*")
    for path in beside:
        found = re.fullmatch(r".*-of-(\d+)", path.name)
        if found and int(found[1]) != hosts and path.stat().st_size:
            raise UserError(
                f"{path}: is of another number of hosts than {hosts}; start as many as then, or "
                "delete it"
            )
    return f"{target}.{host}-of-{hosts}"


def make_part(part: str) -> None:
    """An empty one, if there is none: for `check_parts`."""
    Path(part).absolute().parent.mkdir(parents=True, exist_ok=True)
    Path(part).touch()


def check_parts(target: str, hosts: int) -> None:
    """UserError: not every host's part (`make_part`) is here, so that nobody could join them."""
    for part in _parts(target, hosts):
        if not Path(part).exists():
            raise UserError(f"--output must be seen by all hosts: {part} is not, here")


def _parts(target: str, hosts: int) -> list[str]:
    return [f"{target}.{host}-of-{hosts}" for host in range(hosts)]


def check_settings(target: str, hosts: int, settings: dict[str, Any]) -> None:
    """Settings of a file of answers or its parts, written down beside it.

    Raises:
      UserError: there are answers made with other ones.
    """
    files = map(Path, (target, *(_parts(target, hosts) if hosts > 1 else ())))
    answered = any(file.exists() and file.stat().st_size for file in files)
    same_settings(Path(f"{target}.settings.json"), settings, answered, "--output")


def same_settings(path: Path, settings: dict[str, Any], answered: bool, flag: str) -> None:
    """`settings` as JSON at `path`; where there are answers, what is there has to be the same.

    Raises:
      UserError: it is not; names the key, and `flag` as the way to another place.
    """
    if not (answered and path.exists()):
        replace_json(path, settings)
        return
    was = load_json(path.read_bytes(), str(path))
    mine = json.loads(json.dumps(settings))
    for key in sorted(was.keys() | mine.keys()):
        if was.get(key) != mine.get(key):
            raise UserError(
                f"{path}: the answers there were made with {key} {was.get(key)!r}, not "
                f"{mine.get(key)!r}; give the same, or a new {flag}"
            )


def fingerprint(params: Any) -> str:
    """A checksum of the first thousand numbers of every array."""
    crc = 0
    for leaf in map(jnp.atleast_1d, jax.tree.leaves(params)):
        rows = -(-1000 // math.prod(leaf.shape[1:]))  # no array is copied whole
        crc = zlib.crc32(np.asarray(leaf[:rows].reshape(-1)[:1000]).tobytes(), crc)
    return f"{crc:08x}"


def join(target: str, hosts: int) -> None:
    """The parts of all hosts, in the order of the rows, become `target`."""
    parts = _parts(target, hosts)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(part, "rb")) for part in parts]
        out = stack.enter_context(open(f"{target}.joined", "wb"))
        out.writelines(heapq.merge(*files, key=lambda line: json.loads(bytes(line))["row"]))
    os.replace(f"{target}.joined", target)
    for part in parts:
        os.remove(part)


def answer_file(
    assistant: Assistant,
    engine: Engine,
    source: str,
    target: str,
    settings: Settings,
    share: tuple[int, int] = (0, 1),
    retry: bool = False,
) -> tuple[int, int, int]:
    """Answers the rows of `source` that `target` has no line for.

    share: (which host this is, how many there are); its rows are every so manyth. retry: rows whose
    lines are errors are answered again, each in its place. Meanwhile the old lines are in
    TARGET.before; after a kill the next call goes on with them, `retry` or not.

    Returns (lines that were there, answered now, errors among all).
    """
    if not Path(source).is_file():
        raise UserError(f"--input: no such file {source}")
    if Path(target).exists() and Path(target).samefile(source):
        raise UserError(f"--output {target} is the input")
    Path(target).absolute().parent.mkdir(parents=True, exist_ok=True)
    lines, aside = _lines(source, *share), Path(f"{target}.before")
    before, errors = _resume(target, lines, source)
    if retry and errors and not aside.exists():
        os.replace(target, aside)
        lines, before, errors = _lines(source, *share), 0, 0
    rows = _with_answers(aside, lines)
    order: collections.deque[_Row] = collections.deque()
    running: dict[int, _Row] = {}
    done = 0
    more = True
    with open(target, "ab") as out:
        while more or order:
            while more and len(order) < AHEAD * engine.slots:
                entry = next(rows, None)
                more = entry is not None
                if entry is not None and entry[2]:
                    text = TextStream(assistant.tokenizer)
                    order.append(_Row(text, entry[2], finished=True, kept=True))
                elif entry is not None:
                    order.append(_start(assistant, engine, running, source, entry[:2], settings))
            for progress in engine.step():
                row = running[progress.number]
                row.text.push(progress.tokens)
                if row.text.stopped or progress.finish:
                    engine.cancel(progress.number)
                    finish = "stop" if row.text.stopped else progress.finish
                    row.out |= {"answer": row.text.text, "finish_reason": finish}
                    row.out["completion_tokens"] = row.text.tokens
                    row.finished = True
                    del running[progress.number]
            while order and order[0].finished:
                row = order.popleft()
                before, done = before + row.kept, done + (not row.kept)
                errors += "error" in row.out
                _write(out, row.out)
    aside.unlink(missing_ok=True)
    return before, done, errors


def _start(
    assistant: Assistant,
    engine: Engine,
    running: dict[int, _Row],
    source: str,
    entry: tuple[int, bytes],
    settings: Settings,
) -> _Row:
    """Submits one row; a row that cannot be read is finished at once."""
    n, line = entry
    where = f"{source}:{n}"
    row = _Row(TextStream(assistant.tokenizer), {"row": n, "input": _checksum(line)})
    try:
        fields = load_json(line, where)
        if "id" in fields:
            row.out["id"] = fields["id"]
        own = dataclasses.replace(
            settings.sampling, seed=(settings.sampling.seed + n) % (MAX_SEED + 1)
        )
        check_keys(fields, where)
        new = length_of(fields, settings.max_new_tokens, where)
        stop = stop_of(fields.get("stop"), where) or settings.stop
        row.text = TextStream(assistant.tokenizer, stop)
        question = question_of(fields, where, os.path.dirname(source))
        request = assistant.request(question, max_new=new, sampling=sampling_of(fields, own, where))
        row.out["prompt_tokens"] = len(request.prompt)
        running[_submit(engine, request, where)] = row
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        row.out |= {"error": str(error)}
        row.finished = True
    return row


def _submit(engine: Engine, request: Any, where: str) -> int:
    try:
        return engine.submit(request)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _lines(source: str, host: int, hosts: int) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a host's lines that are not blank."""
    with open(source, "rb") as file:
        for n, line in enumerate(file, 1):
            if line.strip() and n % hosts == host:
                yield n, line.strip()


def _with_answers(
    aside: Path, lines: Iterator[tuple[int, bytes]]
) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """Each line with its output in `aside`, {} where that has none or an error."""
    with open(aside, "rb") if aside.exists() else contextlib.nullcontext(()) as file:
        known = (load_json(line, str(aside)) for line in file)
        out = next(known, None)
        for n, line in lines:
            while out is not None and out["row"] < n:
                out = next(known, None)
            kept = out is not None and (out["row"], out["input"]) == (n, _checksum(line))
            yield n, line, out if out is not None and kept and "error" not in out else {}


def _checksum(line: bytes) -> str:
    return f"{zlib.crc32(line):08x}"


def _resume(target: str, lines: Iterator[tuple[int, bytes]], source: str) -> tuple[int, int]:
    """Skips the rows that `target` has lines for, and cuts a line that was not finished: (how many,
    errors among them)."""
    if not Path(target).exists():
        return 0, 0
    count, errors, end = 0, 0, 0
    with open(target, "r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            where = f"{target}:{count + 1}"
            out, entry = load_json(line, where), next(lines, None)
            if entry is None or (out.get("row"), out.get("input")) != (
                entry[0],
                _checksum(entry[1]),
            ):
                raise UserError(
                    f"{where}: answers another row than {source} has there; give a new --output"
                )
            count, errors, end = count + 1, errors + ("error" in out), end + len(line)
        file.truncate(end)
    return count, errors


def _write(out: IO[bytes], body: dict[str, Any]) -> None:
    out.write(json.dumps(body, ensure_ascii=False).encode() + b"\n")
    out.flush()
