"""SentencePiece and added tokens -> a tokenizer.json that gives the same ids.

What transformers loads as a fast tokenizer needs neither SentencePiece nor our code. Its steps:
split at special tokens, normalise, split at user-defined symbols, BPE, prepend BOS.

Ids are those of `Tokenizer.encode`, except that a special token's other name in the SentencePiece
model ('[UNUSED_TOKEN_146]' is '<|im_start|>' in InternLM2) is ordinary text here. What could differ
in rare cases is refused:

* A character map (nmt_nfkc and so on; InternLM2 has none) would be applied to user-perceived
  characters of less than six bytes as a whole and to single code points otherwise, not to the
  longest match: a full-width character with a combining mark would come out differently.
* Unigram scores would be summed in float64 and not in float32: of equally likely ways to cut a
  text, another could win.

Decoding differs for byte tokens that are no UTF-8. For models with a dummy prefix or that strip
spaces it also differs where special tokens that are skipped stand in the middle (their next space
is kept here) and for unknown tokens at the start.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import sentencepiece

from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.hf.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    USER_DEFINED,
    Model,
    parse_model,
    unsupported,
)

# How SentencePiece writes a space.
_SPACE = "\u2581"


def _special_tokens(tokenizer: Tokenizer, model: Model) -> dict[int, str]:
    """Id -> name of added and control tokens, by id.

    Raises:
      UserError: ids or names that a tokenizer.json has no room for.
    """
    names = collections.defaultdict[int, list[str]](list)
    for name, i in tokenizer._special.items():
        names[i].append(name)
    special = {}
    for i, found in sorted(names.items()):
        if len(found) > 1 and i < len(model.pieces):
            found = [name for name in found if name != model.pieces[i].text]
        if len(found) > 1:
            raise UserError(f"tokens {found} share the id {i}; leave one of them")
        special[i] = found[0]
    added = [i for i in special if i >= len(model.pieces)]
    if added != list(range(len(model.pieces), len(model.pieces) + len(added))):
        raise UserError(
            f"added tokens have the ids {added}; tokenizer.json needs them to follow the "
            f"SentencePiece vocabulary ({len(model.pieces)} pieces) without a gap"
        )
    where = {piece.text: i for i, piece in enumerate(model.pieces)}
    for i, name in special.items():
        if where.get(name, i) != i:
            raise UserError(f"{name!r} is the added token {i} and also piece {where[name]}")
    return special


# --- tokenizer.json ----------------------------------------------------------------------------


def _names(model: Model, special: Mapping[int, str]) -> list[str]:
    """What each id of the SentencePiece vocabulary is called; special names come first."""
    return [special.get(i, piece.text) for i, piece in enumerate(model.pieces)]


def _merges(model: Model, special: Mapping[int, str]) -> list[tuple[str, str]]:
    """The pairs SentencePiece joins, best first.

    It joins any two neighbours that make a piece, by the piece's score and then from left to
    right. All splits of a piece are equally good, so the order among them is free; a longer left
    part is what reading from left to right leaves.

    Raises:
      UserError: equal scores (only their place in the text would decide), or a piece with a
        character that is no piece itself.
    """
    scores = {
        piece.text: piece.score
        for i, piece in enumerate(model.pieces)
        if piece.kind == NORMAL and i not in special
    }
    merges, last = [], None
    for text, score in sorted(scores.items(), key=lambda item: -item[1]):
        for char in text if len(text) > 1 else "":
            if char not in scores and char not in model.symbols:
                raise unsupported(f"the piece {text!r} but no piece {char!r}")
        pairs = [(text[:n], text[n:]) for n in range(len(text) - 1, 0, -1)]
        pairs = [(a, b) for a, b in pairs if a in scores and b in scores]
        if pairs and score == last:
            raise unsupported(f"several pieces of the score {score}")
        if pairs:
            merges += pairs
            last = score
    return merges


def _encoder(model: Model) -> sentencepiece.SentencePieceProcessor:
    """Encodes text that is normalised already."""
    # Protobuf merges a field that comes twice: no character map, no prefix, no stripping.
    override = b"\x12\x00\x18\x00\x20\x00"
    sp = sentencepiece.SentencePieceProcessor()
    sp.LoadFromSerializedProto(model.proto + bytes([3 << 3 | 2, len(override)]) + override)
    return sp


def _whole_pieces_stay_whole(model: Model, special: Mapping[int, str]) -> bool:
    """Whether text that is a piece always becomes that piece, as `ignore_merges` has it."""
    sp = _encoder(model)
    return all(
        sp.EncodeAsIds(piece.text) == [i]
        for i, piece in enumerate(model.pieces)
        if piece.kind in (NORMAL, USER_DEFINED) and i not in special
    )


def _crossing(symbols: Iterable[str], special: Iterable[str]) -> tuple[str, str] | None:
    """A user-defined symbol that could take text from a special token, which goes first."""
    for symbol in symbols:
        for token in special:
            starts = range(len(symbol))
            if any(symbol[n:].startswith(token) for n in starts) or any(
                token.startswith(symbol[n:]) for n in starts[1:]
            ):
                return symbol, token
    return None


def _replace(pattern: str, content: str, *, regex: bool = False) -> dict[str, Any]:
    kind = "Regex" if regex else "String"
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def _normalizer(model: Model) -> dict[str, Any]:
    """Steps in SentencePiece's order, on one stretch of text between special tokens."""
    steps: list[dict[str, Any]] = []
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if model.dummy_prefix else []
    if not model.strip_spaces:
        steps += prefix
    if model.strip_spaces:
        steps += [_replace(r"\A +", "", regex=True), _replace(" {2,}", " ", regex=True), *prefix]
    steps.append(_replace(" ", _SPACE))
    if model.strip_spaces:
        # After spaces are written, so U+2581 in the text goes too, as in SentencePiece.
        steps.append(_replace(_SPACE + r"+\z", "", regex=True))
    return {"type": "Sequence", "normalizers": steps}


def _split(pattern: str, behavior: Literal["Isolated", "MergedWithPrevious"]) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": behavior,
        "invert": False,
    }


# Special in Oniguruma's syntax outside of brackets; re.escape would also escape newlines and
# spaces, into something else there.
_ESCAPED_RE = re.compile(r"[\\^$.|?*+()\[\]{}#]")


def _quoted(text: str) -> str:
    return _ESCAPED_RE.sub(lambda match: "\\" + match[0], text)


def _reserved(model: Model, special: Mapping[int, str]) -> list[str]:
    """What the vocabulary calls ids that ordinary text must not get."""
    return [
        name
        for i, name in enumerate(_names(model, special))
        if i in special or model.pieces[i].kind in (UNKNOWN, CONTROL, BYTE)
    ]


def _whole_words_apart(model: Model, special: Mapping[int, str]) -> dict[str, Any]:
    """Cuts words that are the name of a reserved id where SentencePiece cuts them.

    With `ignore_merges` a word that is in the vocabulary, for whatever reason, becomes that id.
    """
    sp = _encoder(model)
    patterns = []
    for name in _reserved(model, special):
        # A run of unknown characters is one piece, as the text it stands for; a byte is '<0x3C>'.
        is_byte = model.pieces[sp.EncodeAsIds(name)[0]].kind == BYTE
        first = name[0] if is_byte else sp.EncodeAsPieces(name)[0]
        if len(first) < len(name):
            patterns.append(f"{_quoted(first)}(?={_quoted(name[len(first) :])}\\z)")
    return _split(rf"\A(?:{'|'.join(patterns)})", "MergedWithPrevious")


def _bpe(model: Model, special: Mapping[int, str]) -> dict[str, Any]:
    """The model, its pre-tokenizer and the symbols that have to be added tokens."""
    symbols = model.symbols
    long = any(len(symbol) > 1 for symbol in symbols)
    added: tuple[str, ...] = ()
    splitter = None
    if symbols and (not long or _whole_pieces_stay_whole(model, special)):
        splitter = _split("|".join(map(_quoted, symbols)), "Isolated")
        if long:
            splitter = {
                "type": "Sequence",
                "pretokenizers": [splitter, _whole_words_apart(model, special)],
            }
    elif symbols:
        # `ignore_merges` would change other text. Added tokens are found before normalising.
        if not model.keeps_text or any(_SPACE in symbol for symbol in symbols):
            raise unsupported("user-defined symbols together with normalisation of spaces")
        if crossing := _crossing(symbols, special.values()):
            raise unsupported(f"the user-defined symbol {crossing[0]!r} next to {crossing[1]!r}")
        added, long = symbols, False
    names = _names(model, special)
    return {
        "pre_tokenizer": splitter,
        "added": added,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": names[model.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            # Long user-defined symbols, each a word of its own, have no merges to make them.
            "ignore_merges": long,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": _merges(model, special),
        },
    }


def _decoder(model: Model, special: Mapping[int, str]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if model.unk_id not in special:
        steps.append(_replace(model.pieces[model.unk_id].text, model.unk_surface))
    steps.append(_replace(_SPACE, " "))
    if model.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if model.dummy_prefix or model.strip_spaces:
        # More than one only where pieces of spaces alone come first.
        start = 1 << 16 if model.strip_spaces else 1
        steps.append({"type": "Strip", "content": " ", "start": start, "stop": 0})
        # Every stretch of text between special tokens, if they are written, starts like that.
        after = "|".join(_quoted(name) for name in special.values())
        spaces = " +" if model.strip_spaces else " "
        steps.append(_replace(f"(?<={after}){spaces}", "", regex=True))
    return {"type": "Sequence", "decoders": steps}


def _post_processor(bos: str, i: int) -> dict[str, Any]:
    def sequence(name: str) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": 0}}

    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, sequence("A")],
        "pair": [first, sequence("A"), sequence("B")],
        "special_tokens": {bos: {"id": bos, "ids": [i], "tokens": [bos]}},
    }


def _added_token(name: str, *, special: bool) -> dict[str, Any]:
    return {
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def tokenizer_files(
    tokenizer: Tokenizer,
    chat_template: str | None = None,
    *,
    bos: bool = True,
    model_max_length: int | None = None,
    processor_class: str | None = "HoVLEProcessor",
) -> dict[str, bytes]:
    """A fast tokenizer that encodes as `tokenizer.encode(text, bos=bos)` does.

    Text is trusted, as there: special tokens that a user typed are recognised.

    Args:
      tokenizer: With `bos` it needs a beginning-of-sequence piece.
      chat_template: Jinja text (`chat_template`) for the tokenizer's own apply_chat_template.
      bos: Begin encoded text with the beginning-of-sequence token.
      model_max_length: Longest input in tokens, for a warning.
      processor_class: The processor of the same directory; None if there is none.

    Returns:
      Contents of tokenizer.json, tokenizer_config.json and special_tokens_map.json. With
      `tokenizer.model` and `added_tokens.json` next to them, `Tokenizer.load` reads the directory.

    Raises:
      UserError: something about the SentencePiece model that cannot be reproduced, by name.
    """
    model = parse_model(tokenizer._files["tokenizer.model"])
    special = _special_tokens(tokenizer, model)
    if any(" " in symbol for symbol in model.symbols):
        raise unsupported("a user-defined symbol with a space")
    if model.kind == UNIGRAM:
        raise unsupported("model_type=unigram (scores that tie are rounded differently)")
    if model.charsmap:
        raise unsupported("a character map such as nmt_nfkc (combining marks come out differently)")
    parts = _bpe(model, special)
    named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    named = {key: i for key, i in named.items() if i in special}
    if bos and "bos_token" not in named:
        raise UserError("the SentencePiece model has no beginning-of-sequence piece")
    if "eos_token" in named:
        named["pad_token"] = tokenizer.pad_id
    if model.unk_id in special:
        named["unk_token"] = model.unk_id
    roles = {key: special[i] for key, i in named.items()}
    others = [name for i, name in special.items() if i not in named.values()]

    symbols = {_piece_id(model, symbol): symbol for symbol in parts["added"]}
    added = [
        {"id": i, **_added_token(name, special=i in special)}
        for i, name in sorted({**symbols, **special}.items())
    ]
    first = _post_processor(roles["bos_token"], named["bos_token"]) if bos else None
    tokenizer_json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normalizer(model),
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": first,
        "decoder": _decoder(model, special),
        "model": parts["model"],
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # Special ones only: `Tokenizer.load` takes all that are listed here as added tokens.
        "added_tokens_decoder": {
            str(i): _added_token(name, special=True) for i, name in special.items()
        },
        **roles,
        "additional_special_tokens": others,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
    }
    optional = {
        "model_max_length": model_max_length,
        "processor_class": processor_class,
        "chat_template": chat_template,
    }
    config |= {key: value for key, value in optional.items() if value is not None}
    return {
        "tokenizer.json": _json(tokenizer_json),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json({**roles, "additional_special_tokens": others}),
    }


def _piece_id(model: Model, text: str) -> int:
    """The id of a piece."""
    return next(i for i, piece in enumerate(model.pieces) if piece.text == text)


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
