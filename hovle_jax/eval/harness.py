"""A model for programs that bring their own questions and metrics: contents in, texts out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

import jax

from hovle_jax.data.records import IMAGE_PLACEHOLDER, Turn
from hovle_jax.errors import UserError
from hovle_jax.generation.batch import AHEAD
from hovle_jax.generation.chat import Assistant, PerImageTiler, Question
from hovle_jax.generation.engine import Engine, Request

Image = str | bytes  # a path, or encoded
Asked = tuple[str, Sequence[Image], int]  # text with a placeholder per image, images, most tokens
MAX_TILES = 6  # VLMEvalKit's for everything that has no limit of its own


class Answerer:
    """Greedy answers from one engine, in the order of the questions.

    max_tiles may be set between questions; `context` bounds prompt and answer.
    """

    def __init__(self, model_dir: str, *, slots: int = 8, context: int = 8192):
        self._assistant = Assistant.load(model_dir)
        self._engine = self._assistant.engine(slots=slots, context=context, tiles=MAX_TILES * 4 + 1)
        self.set_tiles(MAX_TILES)

    def set_tiles(self, max_tiles: int) -> None:
        """The tile limit of an image, for the questions to come."""
        one = self._assistant
        one.tiler = PerImageTiler(one.config, one.tiler, max_tiles)

    def answers(self, questions: Iterable[Asked]) -> list[str]:
        """'' to a question that cannot be asked; stderr says why."""
        return answers(self._assistant, self._engine, questions)[0]


def answers(
    assistant: Assistant,
    engine: Engine,
    questions: Iterable[Asked],
    after_step: Callable[[], None] = lambda: None,
    agree: Callable[[str], str] = str,
) -> tuple[list[str], int]:
    """(greedy answers in the order of the questions, how many could not be asked). Calls
    `after_step` after every few tokens.

    A picture that cannot be read, or a prompt too long, costs its question and not the run: its
    answer is empty, and stderr names it. agree: what is against a question here ('' for nothing)
    -> what all hosts go by, where several share one engine and have to ask it the same.
    """
    waiting, more = iter(questions), True
    running: dict[int, list[int]] = {}  # tokens so far, by the engine's number
    made: list[list[int]] = []  # the same lists, in the order of the questions
    failed = 0
    while more or running:
        while more and len(running) < AHEAD * engine.slots:
            entry = next(waiting, None)
            more = entry is not None
            if entry is not None:
                request, reason = _prepare(assistant, engine, entry, f"question {len(made) + 1}")
                made.append([])
                if reason := agree(reason):
                    failed += 1
                    if jax.process_index() == 0:
                        print(f"error: {reason}", file=sys.stderr)
                else:
                    assert request is not None
                    running[engine.submit(request)] = made[-1]
        for progress in engine.step():
            running[progress.number] += progress.tokens
            if progress.finish:
                del running[progress.number]
        after_step()
    return [assistant.tokenizer.decode(ids).strip() for ids in made], failed


def _prepare(
    assistant: Assistant, engine: Engine, asked: Asked, where: str
) -> tuple[Request | None, str]:
    """(what the engine can answer, or what is against it)."""
    text, images, new = asked
    if text.count(IMAGE_PLACEHOLDER) != len(images):  # the mistake of a program
        raise UserError(f"{where}: {len(images)} images are not all in its text")
    try:
        request = assistant.request(
            Question((Turn("user", text),), tuple(images), where), max_new=new
        )
    except UserError as error:
        return None, str(error)
    try:
        engine.check(request)
    except UserError as error:
        return None, f"{where}: {error}"
    return request, ""
