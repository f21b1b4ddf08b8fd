"""Rows and messages that ask something, as questions and settings: shared by files and server."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from hovle_jax.data.chat import with_placeholders
from hovle_jax.data.rows import make_record
from hovle_jax.errors import UserError
from hovle_jax.generation.chat import Question
from hovle_jax.generation.sampling import Sampling

PROMPT_KEYS = ("prompt", "question")
TALK_KEYS = ("messages", "conversations")
ANSWERS = ("assistant", "gpt")
MAX_STOPS = 16
LENGTH_KEYS = ("max_new_tokens", "max_tokens", "max_completion_tokens")  # ours, and OpenAI's
SETTINGS = (*LENGTH_KEYS, "stop", *(field.name for field in dataclasses.fields(Sampling)))


def question_of(row: Mapping[str, Any], where: str, root: str = "") -> Question:
    """The question of a row: 'prompt' or 'question', or 'messages' or 'conversations' as training
    data has them (their last turn, if the assistant's, is what was answered then: left out).

    Images as in training data. Raises UserError, opening with `where`.
    """
    row = dict(row)
    key = next((k for k in TALK_KEYS if row.get(k) is not None), None)
    if key is None:
        prompt = next((row[k] for k in PROMPT_KEYS if row.get(k) is not None), None)
        if not isinstance(prompt, str) or not prompt.strip():
            known = ", ".join(map(repr, (*PROMPT_KEYS, *TALK_KEYS)))
            raise UserError(f"{where}: no question; put one under one of {known}")
        image = row.get("image") if row.get("image") is not None else row.get("images")
        count = len(image) if isinstance(image, list) else int(bool(image))
        key, row["messages"] = (
            "messages",
            [{"role": "user", "content": with_placeholders(prompt, count)}],
        )
    turns = row[key]
    if isinstance(turns, list):
        last = turns[-1] if turns else None
        answered = isinstance(last, dict) and (last.get("role") or last.get("from")) in ANSWERS
        # What makes a record complete is the answer to come: any will do.
        row[key] = [*(turns[:-1] if answered else turns), {"role": "assistant", "content": "-"}]
    record = make_record(row, where, root=root)
    question = record.turns[:-1]
    if not question or question[-1].role != "user":
        raise UserError(f"{where}: the last message must be the user's")
    return Question(question, record.images, where)


def sampling_of(fields: Mapping[str, Any], default: Sampling, where: str) -> Sampling:
    """`default` with the settings that a row or a request names; null counts as not named."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(Sampling):
        value = fields.get(field.name)
        if value is not None:
            whole = isinstance(getattr(default, field.name), int)
            changes[field.name] = number(value, whole, f"{where}: {field.name}")
    try:
        return dataclasses.replace(default, **changes)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def check_keys(fields: Mapping[str, Any], where: str) -> None:
    """Rows may have keys of their own, but one that is nearly a setting's was meant to be it.

    Raises:
      UserError: such a key; 'temprature' would leave the default without a word.
    """
    for key in fields.keys() - set(SETTINGS):
        plain = key.lower().replace("-", "_")
        close = difflib.get_close_matches(plain, SETTINGS, n=1, cutoff=0.85)
        if close:
            raise UserError(f"{where}: {key!r}: did you mean {close[0]!r}? Else rename it")


def length_of(fields: Mapping[str, Any], default: int, where: str) -> int:
    """Most tokens of the answer; UserError if two keys name different ones."""
    given = [key for key in LENGTH_KEYS if fields.get(key) is not None]
    found = {key: number(fields[key], True, f"{where}: {key}") for key in given}
    if len(set(found.values())) > 1:
        raise UserError(f"{where}: {' and '.join(found)} differ; give one")
    return next(iter(found.values()), default)


def number(value: Any, whole: bool, where: str) -> Any:
    """A JSON number of the kind that is wanted; UserError otherwise."""
    kinds: Any = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise UserError(f"{where} must be {'an integer' if whole else 'a number'}")
    try:
        return value if whole else float(value)
    except OverflowError:
        raise UserError(f"{where} is too large") from None


def stop_of(value: Any, where: str) -> tuple[str, ...]:
    """Stop strings: null, a string or a list of at most MAX_STOPS."""
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(s, str) and s for s in found):
        raise UserError(f"{where}: stop must be a string or a list of strings, none of them empty")
    if len(found) > MAX_STOPS:
        raise UserError(f"{where}: {len(found)} stop strings are more than {MAX_STOPS}")
    return tuple(found)
