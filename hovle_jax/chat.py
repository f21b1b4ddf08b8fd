"""Talking to a model directory: images and history in, an answer out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hovle_jax import checkpoint
from hovle_jax.config import DataConfig, ModelConfig
from hovle_jax.data.chat import encode_prompt
from hovle_jax.data.records import IMAGE_PLACEHOLDER, Record, Turn
from hovle_jax.data.samples import Tiler, check_tokenizer, get_template
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.generate import generate


@dataclasses.dataclass(frozen=True)
class Question:
    """A conversation that waits for the assistant; '<image>' marks where each image goes."""

    turns: tuple[Turn, ...]
    images: tuple[str | bytes, ...] = ()


class Assistant:
    """A loaded model with its tokenizer, chat template and tile settings."""

    def __init__(self, config: ModelConfig, params: Any, tokenizer: Tokenizer, data: DataConfig):
        check_tokenizer(tokenizer, config)
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self._template, self._system = get_template(data.template), data.system
        self._tiler = Tiler(config, data, None)

    @classmethod
    def load(cls, directory: str | Path) -> Assistant:
        """From a run's work directory, an imported model or a Hugging Face directory.

        All of them know their own template and tile limits.
        """
        stored, params = checkpoint.load(directory)
        if "decoder/norm/scale" not in stored.paths or "embedding/vision/position" not in (
            stored.paths
        ):
            raise UserError(f"{directory}: holds no whole model (stage II and later do)")
        tokenizer = Tokenizer.load(stored.tokenizer)
        return cls(stored.model, params, tokenizer, stored.data or DataConfig())

    def answer(self, questions: Sequence[Question], *, max_new: int = 64) -> list[str]:
        """Greedy answers to a batch of questions."""
        prompts, tiles = [], []
        for question in questions:
            record = Record(question.turns, question.images, "the question")
            images = self._tiler.tiles(record)
            prompts.append(
                encode_prompt(
                    question.turns,
                    [len(t) for t in images],
                    self.tokenizer,
                    self._template,
                    tokens_per_tile=self.config.tokens_per_tile,
                    system=self._system,
                )
            )
            tiles.append(self._tiler.stack(images))
        out = generate(self.params, self.config, prompts, tiles, max_new=max_new)
        return [self.tokenizer.decode(ids).strip() for ids in out]


def first_question(prompt: str, images: Sequence[str]) -> Question:
    """Puts a placeholder per image before the text, unless the text places them itself."""
    missing = len(images) - prompt.count(IMAGE_PLACEHOLDER)
    text = f"{IMAGE_PLACEHOLDER}\n" * max(missing, 0) + prompt
    return Question((Turn("user", text),), tuple(images))


def interactive(assistant: Assistant, images: Sequence[str], max_new: int) -> None:
    """A plain terminal chat: each line continues the conversation, an empty line ends it."""
    turns: list[Turn] = []
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            break
        if not line:
            break
        if not turns:
            question = first_question(line, images)
        else:
            question = Question((*turns, Turn("user", line)), tuple(images))
        reply = assistant.answer([question], max_new=max_new)[0]
        print(f"hovle> {reply}", flush=True)
        turns = [*question.turns, Turn("assistant", reply)]
