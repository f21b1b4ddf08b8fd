"""A model for programs that bring their own questions and metrics: contents in, texts out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from hovle_jax.data.records import IMAGE_PLACEHOLDER, Turn
from hovle_jax.errors import UserError
from hovle_jax.generation.batch import AHEAD
from hovle_jax.generation.chat import Assistant, PerImageTiler, Question
from hovle_jax.generation.engine import Engine

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
        return answers(self._assistant, self._engine, questions)


def answers(
    assistant: Assistant,
    engine: Engine,
    questions: Iterable[Asked],
    after_step: Callable[[], None] = lambda: None,
) -> list[str]:
    """Greedy answers in the order of the questions. Calls `after_step` after every few tokens."""
    waiting, more = iter(questions), True
    running: dict[int, list[int]] = {}  # tokens so far, by the engine's number
    made: list[list[int]] = []  # the same lists, in the order of the questions
    while more or running:
        while more and len(running) < AHEAD * engine.slots:
            entry = next(waiting, None)
            more = entry is not None
            if entry is not None:
                text, images, new = entry
                where = f"question {len(made) + 1}"
                question = Question((Turn("user", text),), tuple(images), where)
                if text.count(IMAGE_PLACEHOLDER) != len(images):
                    raise UserError(f"{where}: {len(images)} images are not all in its text")
                request = assistant.request(question, max_new=new)
                made.append([])
                running[engine.submit(request)] = made[-1]
        for progress in engine.step():
            running[progress.number] += progress.tokens
            if progress.finish:
                del running[progress.number]
        after_step()
    return [assistant.tokenizer.decode(ids).strip() for ids in made]
