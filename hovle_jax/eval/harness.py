"""A model for programs that bring their own questions and metrics: contents in, texts out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hovle_jax.data.records import IMAGE_PLACEHOLDER, Turn
from hovle_jax.errors import UserError
from hovle_jax.generation.batch import AHEAD
from hovle_jax.generation.chat import Assistant, PerImageTiler, Question

Image = str | bytes  # a path, or encoded
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

    def answers(self, questions: Iterable[tuple[str, Sequence[Image], int]]) -> list[str]:
        """Answers to (text with a placeholder for each image, images, most new tokens)."""
        waiting, more = iter(questions), True
        running: dict[int, list[int]] = {}  # tokens so far, by the engine's number
        made: list[list[int]] = []  # the same lists, in the order of the questions
        while more or running:
            while more and len(running) < AHEAD * self._engine.slots:
                entry = next(waiting, None)
                more = entry is not None
                if entry is not None:
                    text, images, new = entry
                    where = f"question {len(made) + 1}"
                    question = Question((Turn("user", text),), tuple(images), where)
                    if text.count(IMAGE_PLACEHOLDER) != len(images):
                        raise UserError(f"{where}: {len(images)} images are not all in its text")
                    request = self._assistant.request(question, max_new=new)
                    made.append([])
                    running[self._engine.submit(request)] = made[-1]
            for progress in self._engine.step():
                running[progress.number] += progress.tokens
                if progress.finish:
                    del running[progress.number]
        return [self._assistant.tokenizer.decode(ids).strip() for ids in made]
