"""The text of a question, by benchmark and dialect.

A dialect is the recipe of one evaluation code base: 'vlmevalkit' (as for its InternVLChat models),
'lmms-eval' (its default model) and 'internvl' (InternVL's own scripts). Scores depend on the prompt
as much as on the metric, so the name covers both.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from hovle_jax.data.records import IMAGE_PLACEHOLDER
from hovle_jax.errors import UserError
from hovle_jax.eval.examples import Example

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"

Prompt = Callable[[Example, str], str]  # (example, dialect) -> text without placeholders
_CHINESE = re.compile("[\u4e00-\u9fff]")


def with_images(text: str, example: Example) -> str:
    """The text with a placeholder for each image: where the text has them, else before it."""
    count, marks = len(example.images), text.count(IMAGE_PLACEHOLDER)
    if marks:
        if marks != count:
            raise UserError(f"{example.where}: {marks} {IMAGE_PLACEHOLDER!r} for {count} images")
        return text
    if count <= 1:
        return f"{IMAGE_PLACEHOLDER}\n" * count + text
    heads = (f"Image-{i}: {IMAGE_PLACEHOLDER}\n" for i in range(1, count + 1))
    return "".join(heads) + text


def as_is(example: Example, dialect: str) -> str:
    return example.field("question")


def short(example: Example, dialect: str) -> str:
    return example.field("question") + (" " if dialect == "internvl" else "\n") + SHORT


def textvqa(example: Example, dialect: str) -> str:
    question = example.field("question")
    return (
        f"{question.capitalize()}\n{SHORT}" if dialect == "lmms-eval" else short(example, dialect)
    )


def chartqa(example: Example, dialect: str) -> str:
    if dialect == "lmms-eval":
        return example.field("question") + "\nAnswer the question with a single word."
    return short(example, dialect)


def ocrbench(example: Example, dialect: str) -> str:
    if dialect == "lmms-eval":
        return example.field("question").strip()
    return short(example, dialect)


def mme(example: Example, dialect: str) -> str:
    question = example.field("question")
    if dialect == "lmms-eval":
        return question.strip().replace(" Please answer yes or no.", "") + f"\n{SHORT}"
    return f"{question} {SHORT}"


def pope(example: Example, dialect: str) -> str:
    question = example.field("question")
    if dialect == "vlmevalkit":
        return question
    if dialect == "lmms-eval":
        return f"{question.strip()}\n{SHORT}"
    return question if SHORT in question else f"{question}\n{SHORT}"  # LLaVA's file has it


def hallusion(example: Example, dialect: str) -> str:
    question = example.field("question")
    return question if dialect == "lmms-eval" else f"{question} Please answer yes or no. {SHORT}"


def _choices(example: Example) -> str:
    return "".join(f"\n{letter}. {text}" for letter, text in example.options.items())


def choice(example: Example, dialect: str) -> str:
    """Multiple choice; without options the question is open."""
    hint = example.fields.get("hint")
    if dialect == "lmms-eval":
        context = f"Context: {hint}\n" if hint else ""
        return f"{context}{example.field('question')}{_choices(example)}\n{LETTER}"
    text = (f"{hint}\n" if hint else "") + example.field("question") + _choices(example)
    if dialect == "internvl":
        return f"{text}\n{LETTER if example.options else SHORT}".strip()
    chinese = _CHINESE.search(text) is not None
    if not example.options:
        return text + ("\n请直接回答问题。" if chinese else "\nAnswer the question directly.")
    return f"{text}\n{LETTER_CN if chinese else LETTER}"


def seed(example: Example, dialect: str) -> str:
    """InternVL's file, and LLaVA's, have options and instruction in the question."""
    return choice(example, dialect) if example.options else example.field("question")


def mmbench(example: Example, dialect: str) -> str:
    return _mmbench(example, dialect, LETTER, LETTER)


def mmbench_cn(example: Example, dialect: str) -> str:
    """Also CCBench's."""
    return _mmbench(example, dialect, LETTER_CN, "请直接使用所提供的选项字母作为答案回答。")


def _mmbench(example: Example, dialect: str, internvl: str, lmms: str) -> str:
    if dialect == "vlmevalkit":
        return choice(example, dialect)
    question, hint = example.field("question"), example.fields.get("hint")
    if dialect == "internvl":
        return (f"{hint}\n" if hint else "") + f"{question}{_choices(example)}\n{internvl}"
    head = f"{hint} {question}" if hint else question
    return f"{head} There are several options:{_choices(example)}\n\n{lmms}"


def mmmu(example: Example, dialect: str) -> str:
    if dialect == "lmms-eval":
        instruction = LETTER if example.options else SHORT
        return f"{example.field('question')}{_choices(example)}\n\n{instruction}"
    return choice(example, dialect)
