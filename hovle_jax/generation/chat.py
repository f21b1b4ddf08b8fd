"""Talking to a model directory: images and history in, an answer out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hovle_jax import checkpoint
from hovle_jax.config import DataConfig, ModelConfig
from hovle_jax.data.chat import encode_prompt, with_placeholders
from hovle_jax.data.image import open_image
from hovle_jax.data.records import Record, Turn
from hovle_jax.data.samples import Tiler, check_tokenizer, get_template
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.generation.decode import compute_params, stored_params
from hovle_jax.generation.engine import Engine, Request
from hovle_jax.generation.generate import generate
from hovle_jax.generation.sampling import Sampling
from hovle_jax.generation.text_stream import TextStream

GREEDY = Sampling()
TOTAL_TILES = 64  # of all images of a question, where each has a limit of its own


@dataclasses.dataclass(frozen=True)
class Question:
    """A conversation that waits for the assistant; '<image>' marks where each image goes."""

    turns: tuple[Turn, ...]
    images: tuple[str | bytes, ...] = ()
    where: str = "the question"  # opens error messages
    max_tiles: int | None = None  # of each image; None: the model's limit, which several share


class PerImageTiler(Tiler):
    """`max_tiles` holds for each image; several share `TOTAL_TILES`. (In training they share the
    limit of one.)"""

    def __init__(self, config: ModelConfig, own: Tiler, max_tiles: int):
        most = max(own.min_tiles, max_tiles)
        data = DataConfig(
            min_tiles=own.min_tiles, max_tiles=most, thumbnail=own.thumbnail, tiler=own.name
        )
        super().__init__(config, data, max_tiles)

    def limits(self, images: int) -> tuple[int, int]:
        most = max(1, min(self.max_tiles, TOTAL_TILES // max(images, 1)))
        return min(self.min_tiles, most), most


class Assistant:
    """A loaded model with its tokenizer, chat template and tile settings."""

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        tokenizer: Tokenizer,
        data: DataConfig,
        *,
        int8_weights: bool = False,
        mesh: Any = None,
    ):
        check_tokenizer(tokenizer, config)
        self.config, self.tokenizer = config, tokenizer
        self.params = compute_params(params, config, int8=int8_weights, mesh=mesh)
        self._mesh = mesh
        self.tiler = Tiler(config, data, None)
        self._template, self._system = get_template(data.template), data.system

    @classmethod
    def load(
        cls, directory: str | Path, *, int8_weights: bool = False, mesh: Any = None
    ) -> Assistant:
        """From a run's work directory, an imported model or a Hugging Face directory.

        All of them know their own template and tile limits. int8_weights: matrices take a byte a
        number. mesh: the devices that share the work (`engine.Engine`); default: one.
        """
        stored = checkpoint.open_stored(directory)
        stored.check()
        if "decoder/norm/scale" not in stored.paths or "embedding/vision/position" not in (
            stored.paths
        ):
            raise UserError(f"{directory}: holds no whole model (stage II and later do)")
        tokenizer = Tokenizer.load(stored.tokenizer)
        params = stored_params(stored, int8=int8_weights, mesh=mesh)
        return cls(stored.model, params, tokenizer, stored.data or DataConfig(), mesh=mesh)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.config.im_end_id, self.config.eos_id

    def tiler_of(self, question: Question) -> Tiler:
        if question.max_tiles is None:
            return self.tiler
        return PerImageTiler(self.config, self.tiler, question.max_tiles)

    @property
    def max_tiles(self) -> int:
        """Tiles of any one image, and of a few: several share the budget, thumbnails come extra."""
        return self.tiler.max_tiles + 4 * self.tiler.thumbnail

    def engine(
        self, *, slots: int, context: int, tiles: int = 0, chunk: int = 8, **options: Any
    ) -> Engine:
        """An engine for requests of at most `context` tokens and `tiles` tiles (default: the
        model's own limit); `options` as of `Engine`."""
        return Engine(
            self.params,
            self.config,
            slots=slots,
            capacity=context,
            tiles=tiles or self.max_tiles,
            chunk=chunk,
            mesh=self._mesh,
            **options,
        )

    def request(self, question: Question, *, max_new: int, sampling: Sampling = GREEDY) -> Request:
        """Images to tiles and text to ids; UserError names what cannot be read."""
        record = Record(question.turns, question.images, question.where)
        images = self.tiler_of(question).tiles(record)
        try:
            prompt = encode_prompt(
                question.turns,
                [len(t) for t in images],
                self.tokenizer,
                self._template,
                tokens_per_tile=self.config.tokens_per_tile,
                system=self._system,
            )
        except UserError as error:
            raise UserError(f"{question.where}: {error}") from None
        return Request(prompt, self.tiler.stack(images), max_new, sampling, self.stop_ids)

    def answer(
        self, questions: Sequence[Question], *, max_new: int = 64, sampling: Sampling = GREEDY
    ) -> list[str]:
        """Answers to a batch of questions; greedy unless `sampling` says otherwise."""
        requests = [self.request(q, max_new=max_new, sampling=sampling) for q in questions]
        prompts, tiles = [r.prompt for r in requests], [r.tiles for r in requests]
        options: Any = {"max_new": max_new, "sampling": sampling, "mesh": self._mesh}
        out = generate(self.params, self.config, prompts, tiles, **options)
        return [self.tokenizer.decode(ids).strip() for ids in out]

    def stream(
        self, engine: Engine, question: Question, *, max_new: int, sampling: Sampling = GREEDY
    ) -> Iterator[str]:
        """The pieces of one answer, as they come. Leaving the iterator early cancels the rest."""
        text = TextStream(self.tokenizer)
        request = self.request(question, max_new=max_new, sampling=sampling)
        try:
            number = engine.submit(request)
        except UserError as error:
            raise UserError(f"{question.where}: {error}") from None
        finish = ""
        try:
            while not finish:
                for progress in engine.step():
                    finish = progress.finish
                    yield text.push(progress.tokens)
            yield text.close()
        finally:
            engine.cancel(number)


def first_question(prompt: str, images: Sequence[str]) -> Question:
    return Question((Turn("user", with_placeholders(prompt, len(images))),), tuple(images))


HELP = "/image PATH adds an image to the next question, /reset starts over, an empty line ends"
CHAT_CONTEXT = 8192  # tokens of prompt and answer


class Chat:
    """One conversation in a terminal: lines in, text out.

    Images wait until the next question, which they are put before. `prefix_bytes` as of `Engine`.
    """

    def __init__(
        self,
        assistant: Assistant,
        images: Sequence[str],
        max_new: int,
        sampling: Sampling = GREEDY,
        prefix_bytes: int = 0,
        write: Callable[[str], Any] = lambda text: print(text, end="", flush=True),
    ):
        self._assistant, self._max_new, self._sampling = assistant, max_new, sampling
        # Every image of a conversation may be tiled by itself, so the limit is the context's.
        tiles = CHAT_CONTEXT // assistant.config.tokens_per_tile
        self._engine = assistant.engine(
            slots=1, context=CHAT_CONTEXT, tiles=tiles, chunk=4, prefix_bytes=prefix_bytes
        )
        self._write = write
        self._turns: tuple[Turn, ...] = ()
        self._images: tuple[str, ...] = ()
        self._waiting = tuple(images)

    def line(self, line: str) -> bool:
        """Takes one line; False if it ends the conversation."""
        command, _, rest = line.strip().partition(" ")
        if command in ("", "/quit", "/exit"):
            return False
        if command == "/reset":
            self._turns, self._images, self._waiting = (), (), ()
            self._write("(a new conversation)\n")
        elif command == "/image":
            self._add_image(rest.strip())
        elif command.startswith("/"):
            self._write(f"{HELP}\n")
        else:
            self._ask(line.strip())
        return True

    def _add_image(self, path: str) -> None:
        try:
            size = open_image(path, "/image").size
        except UserError as error:
            self._write(f"error: {error}\n")
            return
        self._waiting += (path,)
        self._write(f"({path}: {size[0]} x {size[1]} pixels, with your next question)\n")

    def _ask(self, text: str) -> None:
        images = (*self._images, *self._waiting)
        turn = Turn("user", with_placeholders(text, len(self._waiting)))
        question = Question((*self._turns, turn), images)
        reply = ""
        self._write("hovle> ")
        try:
            for piece in self._assistant.stream(
                self._engine, question, max_new=self._max_new, sampling=self._sampling
            ):
                self._write(piece)
                reply += piece
        except UserError as error:  # the conversation stays as it was before the question
            self._write(f"error: {error}\n")
            return
        except KeyboardInterrupt:  # ends the answer, not the conversation
            self._write(" ...")
        self._write("\n")
        self._turns = (*question.turns, Turn("assistant", reply))
        self._images, self._waiting = images, ()


def interactive(chat: Chat) -> None:
    """Reads lines until the end of input."""
    print(f"({HELP})")
    while True:
        try:
            if not chat.line(input("you> ")):
                break
        except (EOFError, KeyboardInterrupt):
            print()
            break
