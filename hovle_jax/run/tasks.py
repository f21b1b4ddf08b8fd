"""Questions of benchmarks, answered and scored while a run trains: rows of WORKDIR/eval.jsonl."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hovle_jax import lora
from hovle_jax.errors import UserError
from hovle_jax.eval.examples import Example, ImageStore
from hovle_jax.eval.harness import Asked, answers
from hovle_jax.eval.prompts import with_images
from hovle_jax.eval.run import Run as Benchmark
from hovle_jax.eval.run import read_examples, room, scored
from hovle_jax.eval.tasks import check
from hovle_jax.generation.chat import Assistant, PerImageTiler
from hovle_jax.generation.engine import slot_groups
from hovle_jax.run.prepare import Run

SLOTS_PER_GROUP = 4  # questions at a time on the devices that share one


class Tasks:
    """The tasks of config.eval_tasks. All hosts ask the same questions of one engine, whose slots
    lie over the mesh as rows of a batch do."""

    def __init__(self, run: Run, frozen: dict[str, Any]):
        """Reads the questions on every host.

        Raises:
          UserError: on every host; a task, a dialect or a file that is not there.
        """
        self._run, self._frozen = run, frozen
        # Pictures of a TSV; each host its own.
        self._pictures = tempfile.TemporaryDirectory(prefix="hovle_tasks_")
        self._tasks: dict[str, tuple[Benchmark, list[Example]]] = {}
        with run.barrier.together():
            if run.config.eval_tasks and "decoder" not in run.stage.parts:
                raise UserError(
                    f"config.eval_tasks: stage {run.stage.name!r} has no LLM that could answer"
                )
            for entry in run.config.eval_tasks:
                self._add(entry)

    def _add(self, entry: str) -> None:
        name, equals, path = entry.partition("=")
        task, _, dialect = name.partition(":")
        if not (equals and path):
            raise UserError(f"config.eval_tasks: {entry!r} is not TASK=FILE or TASK:DIALECT=FILE")
        dialect = dialect or "vlmevalkit"
        try:
            check(task, dialect)
        except UserError as error:
            raise UserError(f"config.eval_tasks: {entry!r}: {error}") from None
        if name in self._tasks:
            raise UserError(
                f"config.eval_tasks: {name} is asked twice, and a row has one place for its score"
            )
        benchmark = Benchmark(task, dialect, (path,))
        if not benchmark.definition.readings:
            raise UserError(f"config.eval_tasks: {task} needs a judge")
        store = ImageStore(Path(self._pictures.name), benchmark.definition.upscale.get(dialect, 1))
        examples, _ = read_examples(benchmark, store)
        examples = benchmark.definition.first(examples, self._run.config.eval_questions)
        if any(example.fields.get("answer") is None for example in examples):
            raise UserError(f"config.eval_tasks: {path} has questions without an answer")
        self._tasks[name] = benchmark, examples

    def scores(self, params: dict[str, Any], after_step: Callable[[], None]) -> dict[str, Any]:
        """{"task/NAME": its metric, "task_failed": questions that could not be asked, which count
        as answered by nothing, "task_seconds"}; {} without tasks. `after_step` is called after
        every few tokens."""
        if not self._tasks:
            return {}
        begin, run, config = time.monotonic(), self._run, self._run.config
        whole = lora.whole(self._frozen, params, config.lora)
        assistant = Assistant(config.model, whole, run.tokenizer, config.data, mesh=run.mesh)
        row: dict[str, Any] = {}
        own, failed = assistant.tiler, 0
        for name, (benchmark, examples) in self._tasks.items():
            task = benchmark.definition
            assistant.tiler = PerImageTiler(config.model, own, task.max_tiles)
            tiles, tokens = room(assistant, examples, config.eval_tokens)
            groups = slot_groups(run.mesh)
            engine = assistant.engine(slots=SLOTS_PER_GROUP * groups, context=tokens, tiles=tiles)
            questions = self._questions(benchmark, examples)
            made, lost = answers(assistant, engine, questions, after_step, self._agree)
            failed += lost
            rows = scored(benchmark, examples, made)
            row[f"task/{name}"] = task.tally(rows, benchmark.dialect).score()[task.metric]
        return row | {"task_failed": failed, "task_seconds": time.monotonic() - begin}

    def _agree(self, reason: str) -> str:
        """The first reason that a host has: one whose disk lost a picture is not alone."""
        return next(filter(None, self._run.barrier.gather(reason)), "")

    def _questions(self, benchmark: Benchmark, examples: list[Example]) -> Iterator[Asked]:
        task, pictures = benchmark.definition, self._pictures.name
        new = min(task.new_tokens[benchmark.dialect], self._run.config.eval_tokens)
        for example in examples:
            text = with_images(task.prompt(example, benchmark.dialect), example)
            yield text, [os.path.join(pictures, image) for image in example.images], new
