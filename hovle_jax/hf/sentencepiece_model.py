"""sentencepiece_model.proto, read by field number: its Python classes need the protobuf package."""

from __future__ import annotations

import dataclasses
import functools
import struct
from collections.abc import Iterator
from typing import Any

from hovle_jax.errors import UserError

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclasses.dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclasses.dataclass(frozen=True)
class Model:
    """The parts of a SentencePiece model that say how text is encoded."""

    proto: bytes
    pieces: tuple[Piece, ...]
    kind: int
    byte_fallback: bool
    unk_surface: str
    charsmap: bytes
    dummy_prefix: bool
    strip_spaces: bool  # remove_extra_whitespaces

    @property
    def keeps_text(self) -> bool:
        """Whether normalising does nothing but write spaces as U+2581."""
        return not (self.charsmap or self.dummy_prefix or self.strip_spaces)

    @functools.cached_property
    def unk_id(self) -> int:
        return next(i for i, piece in enumerate(self.pieces) if piece.kind == UNKNOWN)

    @functools.cached_property
    def symbols(self) -> tuple[str, ...]:
        """User-defined symbols, longest first."""
        found = (piece.text for piece in self.pieces if piece.kind == USER_DEFINED)
        return tuple(sorted(found, key=len, reverse=True))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, position after it)."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message: int, float (32 bit) or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
        elif wire == 2:
            size, at = _varint(data, at)
            yield number, data[at : at + size]
            at += size
        elif wire == 5:
            yield number, struct.unpack_from("<f", data, at)[0]
            at += 4
        elif wire == 1:
            at += 8
        else:
            raise ValueError(f"protobuf wire type {wire}")


def parse_model(proto: bytes) -> Model:
    """Reads sentencepiece_model.proto: its Python classes would need the protobuf package.

    Raises:
      UserError: a setting that a tokenizer.json cannot express.
    """
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    denormalizer: dict[int, Any] = {}
    for number, value in _fields(proto):
        if number == 1:
            # Numbers of the three fields that are used; a later value of a field counts.
            piece: dict[int, Any] = {1: b"", 2: 0.0, 3: NORMAL, **dict(_fields(value))}
            pieces.append(Piece(piece[1].decode(), piece[2], piece[3]))
        elif number == 2:
            trainer.update(_fields(value))
        elif number == 3:
            normalizer.update(_fields(value))
        elif number == 5:
            denormalizer.update(_fields(value))

    kind = trainer.get(3, UNIGRAM)
    refused = {
        "model_type (neither bpe nor unigram)": kind not in (UNIGRAM, BPE),
        "treat_whitespace_as_suffix": trainer.get(24, 0),
        "escape_whitespaces=false": not normalizer.get(5, 1),
        "denormalizer_spec": denormalizer.get(2, b""),
        "unused pieces": any(piece.kind == UNUSED for piece in pieces),
    }
    for name, found in refused.items():
        if found:
            raise unsupported(name)
    return Model(
        proto=proto,
        pieces=tuple(pieces),
        kind=kind,
        byte_fallback=bool(trainer.get(35, 0)),
        unk_surface=trainer.get(44, b" \xe2\x81\x87 ").decode(),
        charsmap=normalizer.get(2, b""),
        dummy_prefix=bool(normalizer.get(3, 1)),
        strip_spaces=bool(normalizer.get(4, 1)),
    )


def unsupported(what: str) -> UserError:
    return UserError(
        f"the SentencePiece model has {what}, which tokenizer.json cannot reproduce; export "
        "without a fast tokenizer"
    )
