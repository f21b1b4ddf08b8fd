"""Scoring the demo's questions, with the controls that tell seeing from guessing.

accuracy   the model with the image
blind      the same model, image removed from the prompt
shuffled   the same model, shown another question's image
majority   always the commonest answer
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import jax
import numpy as np

from hovle_jax import distill
from hovle_jax.config import IGNORE, RunConfig
from hovle_jax.data.image import open_image
from hovle_jax.data.pack import assemble
from hovle_jax.data.readers import JsonlConversations
from hovle_jax.data.records import IMAGE_PLACEHOLDER, Turn
from hovle_jax.data.samples import Sample
from hovle_jax.data.tokenizer import IMG_CONTEXT, IMG_END, IMG_START, Tokenizer
from hovle_jax.generation.chat import Assistant, Question

BATCH = 150


def score_questions(
    assistant: Assistant, annotation: str, images: str
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """(scores, answered questions) of one jsonl of single-turn questions with one image each."""
    records = JsonlConversations("test", annotation, images)
    rows = [records[i] for i in range(len(records))]
    questions = [Question(r.turns[:1], r.images) for r in rows]
    truths = [r.turns[1].text for r in rows]
    # Half the file away: never the same image, and no structure of neighbours.
    moved = [rows[(i + len(rows) // 2) % len(rows)].images for i in range(len(rows))]
    shuffled = [dataclasses.replace(q, images=m) for q, m in zip(questions, moved, strict=True)]
    answers = answer_all(assistant, questions)
    scores = {
        "accuracy": _accuracy(answers, truths),
        "blind": _accuracy(answer_all(assistant, [_without_image(q) for q in questions]), truths),
        "shuffled": _accuracy(answer_all(assistant, shuffled), truths),
        "majority": collections.Counter(truths).most_common(1)[0][1] / len(truths),
        "n": len(truths),
    }
    examples = [
        {
            "image": str(r.images[0]),
            "question": r.turns[0].text.replace(IMAGE_PLACEHOLDER, "").strip(),
            "answer": answer,
            "truth": truth,
        }
        for r, answer, truth in zip(rows, answers, truths, strict=True)
    ]
    return scores, examples


def answer_all(assistant: Assistant, questions: list[Question]) -> list[str]:
    """Greedy answers of at most eight tokens."""
    out: list[str] = []
    for i in range(0, len(questions), BATCH):
        out += assistant.answer(questions[i : i + BATCH], max_new=8)
    return out


def _without_image(question: Question) -> Question:
    text = question.turns[0].text.replace(f"{IMAGE_PLACEHOLDER}\n", "")
    return Question((Turn("user", text),))


def _accuracy(answers: list[str], truths: list[str]) -> float:
    return float(np.mean([a == t for a, t in zip(answers, truths, strict=True)]))


def cosine_map(
    config: RunConfig, params: Any, teacher: Any, tokenizer: Tokenizer, images: list[str]
) -> np.ndarray:
    """Cosine of each image token to the teacher's feature: float32 [images, grid, grid]."""
    model = config.model
    run = [tokenizer.id_of(IMG_CONTEXT)] * model.tokens_per_tile
    ids = [tokenizer.bos_id, tokenizer.id_of(IMG_START), *run, tokenizer.id_of(IMG_END)]
    rows = []
    for path in images:
        pixels = np.asarray(open_image(path, path))[None]
        sample = Sample(np.array(ids, np.int32), np.full(len(ids), IGNORE, np.int32), pixels)
        rows.append(
            assemble(
                [sample],
                tokens=len(ids),
                tiles=1,
                image_size=model.image_size,
                weights="token",
                pad_id=model.pad_id,
            )
        )
    batch = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
    distances = jax.jit(lambda p, t, b: distill.terms(p, t, b, config)["image"])(
        params, teacher, batch
    )
    grid = model.token_grid
    return 1 - np.asarray(distances)[:, 2 : 2 + model.tokens_per_tile].reshape(-1, grid, grid)
