"""Answers to a benchmark's questions, of ours or of another program, and their way back to them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from hovle_jax.errors import UserError
from hovle_jax.eval.examples import Example
from hovle_jax.eval.jsonl import ID_KEYS, first_of, read_objects
from hovle_jax.eval.tsv import read_rows

_ANSWER_KEYS = ("prediction", "text", "answer")  # InternVL's SEED has the truth under 'answer'
_IDS = ("id", *ID_KEYS, "data_id")


def read_predictions(path: str, examples: Sequence[Example]) -> tuple[list[str], int]:
    """(an answer for each example, how many of them are failures, which count as empty answers).

    A jsonl or JSON list (`hovle generate`, InternVL) or a TSV with 'index' and 'prediction'
    (VLMEvalKit). Rows belong together by their order if their ids agree in it, else by id.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    found = _from_tsv(path) if path.endswith(".tsv") else _from_json(path)
    if [key for key, _ in found] != [example.id for example in examples]:
        by_id = dict(found)
        missing = [example for example in examples if example.id not in by_id]
        if missing:
            raise UserError(
                f"{path}: no answer to {missing[0].id!r} ({missing[0].where}); "
                f"{len(missing)} of {len(examples)} are missing"
            )
        if len(by_id) < len(found) or len({e.id for e in examples}) < len(examples):
            raise UserError(f"{path}: ids are there twice, and the rows are in another order")
        found = [(example.id, by_id[example.id]) for example in examples]
    answers = [answer for _, answer in found]
    return [answer or "" for answer in answers], sum(answer is None for answer in answers)


def _from_tsv(path: str) -> list[tuple[str, str | None]]:
    out: list[tuple[str, str | None]] = []
    for where, cells in read_rows(path):
        if "index" not in cells:
            raise UserError(f"{where}: no 'index'; predictions need it and 'prediction'")
        out.append((cells["index"], cells.get("prediction", "")))
    return out


def _from_json(path: str) -> list[tuple[str, str | None]]:
    out: list[tuple[str, str | None]] = []
    for where, row in read_objects(path):
        key, answer = first_of(row, _IDS), first_of(row, _ANSWER_KEYS)
        if key is None or not ("error" in row or isinstance(answer, str)):
            raise UserError(f"{where}: needs an id and a text under 'prediction' or 'answer'")
        out.append((str(key), None if "error" in row else answer))
    return out


def write_vlmevalkit(path: Path, examples: Sequence[Example], answers: Sequence[str]) -> None:
    """The columns of the data and 'prediction', as VLMEvalKit's judges and servers expect."""
    names = dict.fromkeys(name for example in examples for name in example.fields if name != "file")
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, delimiter="\t")
        out.writerow(["index", *names, "prediction"])
        for example, answer in zip(examples, answers, strict=True):
            cells = (example.fields.get(name) for name in names)
            out.writerow([example.id, *(_cell(value) for value in cells), answer])


def _cell(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
