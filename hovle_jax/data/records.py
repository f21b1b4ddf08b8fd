"""What every reader yields: a conversation with its images, or a lone image."""

import dataclasses
from typing import Literal, Protocol

from hovle_jax.errors import UserError

IMAGE_PLACEHOLDER = "<image>"

Role = Literal["system", "user", "assistant", "text"]  # text: a document, no conversation


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message of a conversation, as written in the data (not stripped), or a document."""

    role: Role
    text: str


@dataclasses.dataclass(frozen=True)
class Record:
    """One example as read from disk.

    Attributes:
      turns: The conversation, or a document alone; empty for an unpaired image.
      images: Paths or encoded bytes, in the order of their placeholders.
      where: 'file:line' or the image's path; it opens every error message about this record.
    """

    turns: tuple[Turn, ...]
    images: tuple[str | bytes, ...]
    where: str


class Source(Protocol):
    """Records at random access, which is what every format becomes. Pickles, for data workers."""

    name: str
    max_tiles: int | None  # of an image; None for the run's default

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Record: ...


def position(i: int, size: int) -> int:
    """Index as for a list: negative ones count from the end; IndexError beyond."""
    if not -size <= i < size:
        raise IndexError(f"row {i} of {size}")
    return int(i) % size


def validate(record: Record) -> None:
    """Checks that a conversation or a document can be trained on.

    Raises:
      UserError: no turns, a system turn that is not the first, a last turn that is not the
        assistant's, an empty answer, or a count of '<image>' in user turns other than the number
        of images.
    """
    where, turns = record.where, record.turns
    if not turns:
        raise UserError(f"{where}: the conversation has no turns; delete the row")
    if any(turn.role == "text" for turn in turns):
        if len(turns) > 1 or record.images or not turns[0].text.strip():
            raise UserError(f"{where}: a document has text, and neither turns nor images beside it")
        return
    if any(turn.role == "system" for turn in turns[1:]):
        raise UserError(f"{where}: only the first turn may be a system turn")
    if turns[-1].role != "assistant":
        raise UserError(
            f"{where}: the last turn is from {turns[-1].role!r}, but nothing is learnt after the "
            "last assistant turn; delete it"
        )
    if any(turn.role == "assistant" and not turn.text.strip() for turn in turns):
        raise UserError(f"{where}: an assistant turn is empty; fill it in or delete the row")
    placeholders = sum(t.text.count(IMAGE_PLACEHOLDER) for t in turns if t.role == "user")
    if placeholders != len(record.images):
        raise UserError(
            f"{where}: {placeholders} {IMAGE_PLACEHOLDER!r} in user turns but "
            f"{len(record.images)} images; they must match one to one"
        )
