"""InternVL's and LLaVA's question files: jsonl or a JSON list, with image paths."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hovle_jax.data.rows import load_json
from hovle_jax.errors import UserError, one_line
from hovle_jax.eval.examples import LETTERS, Example, ImageStore

ID_KEYS = ("question_id", "questionId", "index", "id")
_QUESTION_KEYS = ("question", "text", "query")
_ANSWER_KEYS = ("answer", "answers", "label")
_LISTS = ("annotations", "data", "questions")


def read_objects(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """('file:row', object) of a jsonl file, or of one JSON list."""
    data = _bytes(path)
    if data.lstrip()[:1] == b"[":
        rows = _parsed(data, path)
        for n, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise UserError(f"{path}:{n}: expected a JSON object, got {type(row).__name__}")
            yield f"{path}:{n}", row
    else:
        for n, line in enumerate(data.splitlines(), 1):
            if line.strip():
                yield f"{path}:{n}", load_json(line, f"{path}:{n}")


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _parsed(data: bytes, path: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({one_line(error)})") from None


def first_of(row: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def read_jsonl(path: str, store: ImageStore, root: str) -> list[Example]:
    """The examples; images are relative to `root`. A list of choices becomes columns A, B, ... and
    the number of the right one its letter."""
    out: list[Example] = []
    for where, row in read_objects(path):
        question = first_of(row, _QUESTION_KEYS)
        if not isinstance(question, str):
            raise UserError(f"{where}: no question under one of {', '.join(_QUESTION_KEYS)}")
        fields = {k: v for k, v in row.items() if v is not None and k not in ("image", "images")}
        fields |= {"file": Path(path).stem, "question": question}
        answer, choices = first_of(row, _ANSWER_KEYS), first_of(row, ("choices", "options"))
        if isinstance(choices, list):
            fields |= dict(zip(LETTERS, map(str, choices), strict=False))
            if isinstance(answer, int) and 0 <= answer < len(choices):
                answer = LETTERS[answer]
        if answer is not None:
            fields["answer"] = answer
        images = first_of(row, ("image", "images"))
        refs = images if isinstance(images, list) else [images] if images else []
        if not all(isinstance(ref, str) for ref in refs):
            raise UserError(f"{where}: 'image' must be a path or a list of paths")
        names = [store.link(os.path.join(root, r), where, not i) for i, r in enumerate(refs)]
        key = first_of(row, ID_KEYS)
        out.append(Example(str(len(out) if key is None else key), fields, tuple(names), where))
    return out


def read_answers(path: str) -> dict[str, dict[str, Any]]:
    """Fields by question id of an annotation file: VQA's 'annotations', DocVQA's 'data' or SEED's
    'questions'. 'answers' of {'answer': text} become texts."""
    found = _parsed(_bytes(path), path)
    rows = first_of(found, _LISTS) if isinstance(found, dict) else found
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: no list of objects under one of {', '.join(_LISTS)}")
    out: dict[str, dict[str, Any]] = {}
    for n, row in enumerate(rows, 1):
        key, answers = first_of(row, ID_KEYS), first_of(row, ("answers", "answer"))
        if key is None or answers is None or str(key) in out:
            raise UserError(f"{path}:{n}: needs an answer and a question id of its own")
        if isinstance(answers, list):
            answers = [x.get("answer", "") if isinstance(x, dict) else x for x in answers]
        kept = {k: v for k, v in row.items() if k in ("question_type_id", "data_type")}
        out[str(key)] = kept | {"answer": answers}
    return out
