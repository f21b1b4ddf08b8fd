"""Conversations to token ids and labels."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from hovle_jax.config import IGNORE
from hovle_jax.data.records import IMAGE_PLACEHOLDER, Turn
from hovle_jax.data.tokenizer import ADDED_TOKENS, IMG_CONTEXT, IMG_END, IMG_START, Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.registry import Registry

_ADDED_RE = re.compile("(" + "|".join(map(re.escape, ADDED_TOKENS)) + ")")


@dataclasses.dataclass(frozen=True)
class Template:
    """How turns become one string.

    A turn is its prefix, its text and the separator. Added tokens are recognised in prefixes and
    separator only. An empty system message means no system turn.
    """

    name: str
    system_message: str
    system_prefix: str
    user_prefix: str
    assistant_prefix: str
    separator: str


def _chatml(name: str, system_message: str, separator: str) -> Template:
    return Template(
        name=name,
        system_message=system_message,
        system_prefix="<|im_start|>system\n",
        user_prefix="<|im_start|>user\n",
        assistant_prefix="<|im_start|>assistant\n",
        separator=separator,
    )


TEMPLATES: Registry[Template] = Registry("config.data.template")
for _template in (
    # The released HoVLE: no newline after <|im_end|>.
    _chatml(
        "internlm2-chat",
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
        "是一个有用无害的人工智能助手。",
        "<|im_end|>",
    ),
    _chatml(
        "internvl2_5",
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
        "联合开发的多模态大语言模型。",
        "<|im_end|>\n",
    ),
    _chatml("chatml-plain", "", "<|im_end|>\n"),
):
    TEMPLATES.add(_template.name)(_template)


def with_placeholders(text: str, images: int) -> str:
    """A placeholder per image before the text, unless the text places them itself."""
    return f"{IMAGE_PLACEHOLDER}\n" * max(images - text.count(IMAGE_PLACEHOLDER), 0) + text


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation to train on.

    Attributes:
      ids: int32 [n].
      labels: int32 [n], not shifted: `ids[i]` where position i is to be predicted, else `IGNORE`.
    """

    ids: np.ndarray
    labels: np.ndarray


def encode_conversation(
    turns: Sequence[Turn],
    tiles_per_image: Sequence[int],
    tokenizer: Tokenizer,
    template: Template,
    *,
    tokens_per_tile: int,
    system: str | None = None,
) -> Encoded:
    """Encodes a conversation with loss on its answers: InternVL `preprocess_internlm`.

    The loss is on the tokens of every answer and the added tokens of the separator after it
    (`<|im_end|>`), not on anything else. Every message is stripped. Answers are encoded apart from
    their header, so that labels cannot come out misaligned (the reference encodes the two in one
    go and drops the loss of the whole example when the lengths then disagree).

    A document (a turn of role 'text') is BOS and its tokens, all of them predicted; it knows no
    template and no end.

    Args:
      turns: As in `Record`. Added tokens that occur in their text are ordinary characters.
      tiles_per_image: Tiles of every image, in the order of '<image>' in user turns.
      tokenizer: The tokenizer.
      template: The chat template.
      tokens_per_tile: Image tokens of a tile.
      system: In place of the template's default; '' for none. A system turn of the conversation's
        own comes first.

    Returns:
      `Encoded`, which starts with BOS.

    Raises:
      UserError: a number of '<image>' in user turns other than that of images, or a system turn
        that is not the first.
    """
    turns = [dataclasses.replace(turn, text=turn.text.strip()) for turn in turns]
    return _encode(turns, tiles_per_image, tokenizer, template, tokens_per_tile, system).encoded()


def encode_prompt(
    turns: Sequence[Turn],
    tiles_per_image: Sequence[int],
    tokenizer: Tokenizer,
    template: Template,
    *,
    tokens_per_tile: int,
    system: str | None = None,
) -> np.ndarray:
    """Encodes a conversation up to the header of the answer to generate: InternVL `chat`.

    As `encode_conversation`, except that messages are not stripped (nor does `chat`).

    Returns:
      int32 [n].

    Raises:
      UserError: as `encode_conversation`, or the last turn is not the user's.
    """
    if not turns or turns[-1].role != "user":
        raise UserError("a prompt must end with a user turn, which the model is to answer")
    builder = _encode(turns, tiles_per_image, tokenizer, template, tokens_per_tile, system)
    builder.markup(template.assistant_prefix)
    return builder.encoded().ids


class _Builder:
    """Collects text until the next token that SentencePiece must not see."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids = [tokenizer.bos_id]
        self._labels = [IGNORE]
        self._text = ""

    def text(self, text: str) -> None:
        """Appends untrusted text; it is encoded together with the text before it."""
        self._text += text

    def flush(self, *, loss: bool = False) -> None:
        """Encodes the text collected so far."""
        self._append(self._tokenizer.encode_ordinary(self._text), loss)
        self._text = ""

    def token(self, token: str, *, count: int = 1, loss: bool = False) -> None:
        """Appends an added token."""
        self.flush()
        self._append([self._tokenizer.id_of(token)] * count, loss)

    def markup(self, text: str, *, loss: bool = False) -> None:
        """Appends a part of the template; `loss` is for its added tokens."""
        # The capturing group makes every second part an added token.
        for n, part in enumerate(_ADDED_RE.split(text)):
            if n % 2:
                self.token(part, loss=loss)
            else:
                self.text(part)

    def encoded(self) -> Encoded:
        self.flush()
        return Encoded(np.asarray(self._ids, np.int32), np.asarray(self._labels, np.int32))

    def _append(self, ids: list[int], loss: bool) -> None:
        self._ids += ids
        self._labels += ids if loss else [IGNORE] * len(ids)


def _encode(
    turns: Sequence[Turn],
    tiles_per_image: Sequence[int],
    tokenizer: Tokenizer,
    template: Template,
    tokens_per_tile: int,
    system: str | None,
) -> _Builder:
    placeholders = sum(t.text.count(IMAGE_PLACEHOLDER) for t in turns if t.role == "user")
    if placeholders != len(tiles_per_image):
        raise UserError(
            f"{placeholders} {IMAGE_PLACEHOLDER!r} in user turns but {len(tiles_per_image)} "
            "images; they must match one to one"
        )
    if turns and turns[0].role == "system":
        system, turns = turns[0].text, turns[1:]
    if any(turn.role == "system" for turn in turns):
        raise UserError("only the first turn may be a system turn")
    builder = _Builder(tokenizer)
    if turns and turns[0].role == "text":
        builder.text(turns[0].text)
        builder.flush(loss=True)
        return builder
    system = template.system_message if system is None else system
    if system:
        builder.markup(template.system_prefix)
        builder.text(system)
        builder.markup(template.separator)
    tiles = iter(tiles_per_image)
    for turn in turns:
        if turn.role == "user":
            builder.markup(template.user_prefix)
            first, *rest = turn.text.split(IMAGE_PLACEHOLDER)
            builder.text(first)
            for text in rest:
                builder.token(IMG_START)
                builder.token(IMG_CONTEXT, count=tokens_per_tile * next(tiles))
                builder.token(IMG_END)
                builder.text(text)
            builder.markup(template.separator)
        else:
            builder.markup(template.assistant_prefix)
            builder.flush()
            builder.text(turn.text)
            builder.flush(loss=True)
            builder.markup(template.separator, loss=True)
    return builder
