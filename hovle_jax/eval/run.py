"""One benchmark from its file to its score: questions, answers, results.

OUT/TASK/images/                   pictures out of a TSV, by their contents
OUT/TASK/DIALECT/questions.jsonl   what is asked, an input of `hovle generate`
                 settings.json     by which model, with which tiles
                 answers.jsonl     grows as answers come; a run that is killed goes on there
                 predictions.tsv   the same beside the columns of the data, as VLMEvalKit's
                 scores.jsonl      what was read out of each answer, and its score
                 results.json      values, intervals, published numbers
OUT/results.md                     a row for every results.json
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.eval.examples import Example, ImageStore
from hovle_jax.eval.jsonl import read_answers, read_jsonl
from hovle_jax.eval.predictions import read_predictions, write_vlmevalkit
from hovle_jax.eval.prompts import with_images
from hovle_jax.eval.report import results, write_table
from hovle_jax.eval.tally import Scored
from hovle_jax.eval.tasks import TASKS, Task
from hovle_jax.eval.tsv import read_tsv
from hovle_jax.generation.batch import Settings, answer_file, fingerprint, same_settings
from hovle_jax.generation.chat import Assistant, PerImageTiler

TEXT_TOKENS = 1024  # left for question and template in the default context


@dataclasses.dataclass(frozen=True)
class Run:
    """A benchmark in a dialect, its files and where the results go."""

    task: str
    dialect: str
    data: tuple[str, ...]
    answers: str = ""  # annotations that the data lack
    images: str = ""  # root of image paths; default: the directory of the data
    out: str = "runs/eval"
    resamples: int = 1000
    seed: int = 0

    @property
    def definition(self) -> Task:
        return TASKS[self.task]

    @property
    def directory(self) -> Path:
        return Path(self.out) / self.task / self.dialect


def read_examples(run: Run, store: ImageStore) -> tuple[list[Example], int]:
    """(the examples that count, rows left out because they have no image)."""
    examples: list[Example] = []
    empty = 0
    for path in run.data:
        if not Path(path).is_file():
            raise UserError(f"--data: no such file {path}")
        root = run.images or os.path.dirname(path)
        if path.endswith(".tsv"):
            more, skipped = read_tsv(path, store, root)
            examples, empty = examples + more, empty + skipped
        else:
            examples += read_jsonl(path, store, root)
    if run.answers:
        known = read_answers(run.answers)
        examples = [_answered(example, known, run.answers) for example in examples]
    examples = [example for example in examples if run.definition.keep(example)]
    if not examples:
        raise UserError(f"--data {run.data[0]}: no rows of {run.definition.title}")
    return examples, empty


def _answered(example: Example, known: dict[str, dict[str, Any]], path: str) -> Example:
    if example.id not in known:
        raise UserError(f"{example.where}: {path} has no answer to question {example.id!r}")
    return dataclasses.replace(example, fields={**example.fields, **known[example.id]})


def write_questions(run: Run, examples: Sequence[Example]) -> Path:
    """Prompts and images, a line for each example; always the same bytes for the same data."""
    run.directory.mkdir(parents=True, exist_ok=True)
    path = run.directory / "questions.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for example in examples:
            text = with_images(run.definition.prompt(example, run.dialect), example)
            row: dict[str, Any] = {
                "id": example.id,
                "messages": [{"role": "user", "content": text}],
                "max_new_tokens": run.definition.new_tokens[run.dialect],
            }
            if example.images:
                row["image"] = [os.path.join("..", "images", name) for name in example.images]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def answer(
    run: Run,
    model: str,
    assistant: Assistant,
    examples: Sequence[Example],
    *,
    slots: int,
    context: int,
    **options: Any,
) -> tuple[Path, int]:
    """(the file of answers, how many of them are new): `hovle generate` with the task's tiles. What
    failed before is asked again: pictures may be there now, or the context be longer.

    assistant: of the directory `model`; its tile limit becomes the task's. context: most tokens of
    a prompt and its answer; 0 for what these examples can need. options: as of `Engine`.
    """
    questions = write_questions(run, examples)
    assistant.tiler = PerImageTiler(assistant.config, assistant.tiler, run.definition.max_tiles)
    target = run.directory / "answers.jsonl"
    settings = {
        "model": str(Path(model).absolute()),
        "weights": fingerprint(assistant.params),
        "max_tiles": run.definition.max_tiles,
    }
    if options.get("int8_cache"):
        settings["int8_kv"] = True
    same_settings(run.directory / "settings.json", settings, target.exists(), "--out")
    new = run.definition.new_tokens[run.dialect]
    tiles, need = room(assistant, examples, new)
    engine = assistant.engine(slots=slots, context=context or need, tiles=tiles, **options)
    _, done, _ = answer_file(
        assistant, engine, str(questions), str(target), Settings(new), retry=True
    )
    return target, done


def room(assistant: Assistant, examples: Sequence[Example], new: int) -> tuple[int, int]:
    """(tiles, tokens) of the largest question with its answer of `new` tokens."""
    tiler, counts = assistant.tiler, {len(example.images) for example in examples}
    tiles = max(n * (tiler.limits(n)[1] + int(tiler.thumbnail)) for n in counts)
    return tiles, tiles * assistant.config.tokens_per_tile + TEXT_TOKENS + new


def scored(run: Run, examples: Sequence[Example], answers: Iterable[str]) -> list[Scored]:
    """What the dialect reads out of each answer, and its score."""
    reading = run.definition.readings[run.dialect]
    return [
        Scored(example, text, *reading(example, text))
        for example, text in zip(examples, answers, strict=True)
    ]


def score(run: Run, examples: Sequence[Example], predictions: str) -> dict[str, Any] | None:
    """Writes and returns the results; None, after writing predictions.tsv, where only a judge or a
    server can score: there are no answers in the data, or no rule reads them."""
    task = run.definition
    answers, failed = read_predictions(predictions, examples)
    run.directory.mkdir(parents=True, exist_ok=True)
    write_vlmevalkit(run.directory / "predictions.tsv", examples, answers)
    known = [example for example in examples if example.fields.get("answer") is not None]
    if not task.readings or not known:
        return None
    if len(known) < len(examples):
        first = next(example for example in examples if example.fields.get("answer") is None)
        raise UserError(f"{first.where}: no answer, and {len(known)} other rows have one")
    rows = scored(run, examples, answers)
    with open(run.directory / "scores.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            line = {"id": row.example.id, "answer": row.answer, "read": row.read}
            file.write(json.dumps(line | {"score": row.score}, ensure_ascii=False) + "\n")
    tally = task.tally(rows, run.dialect)
    found = results(
        run.task,
        run.dialect,
        rows,
        tally,
        failed=failed,
        resamples=run.resamples,
        seed=run.seed,
    )
    found |= {"data": list(run.data), "predictions": predictions, "max_tiles": task.max_tiles}
    (run.directory / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    write_table(Path(run.out))
    return found
