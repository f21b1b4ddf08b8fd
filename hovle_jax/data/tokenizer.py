"""SentencePiece plus added tokens, with the semantics of the released InternLM2 tokenizer."""

import functools
import hashlib
import io
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sentencepiece

from hovle_jax.data.files import check_local
from hovle_jax.errors import UserError

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
IMG_START = "<img>"
IMG_END = "</img>"
IMG_CONTEXT = "<IMG_CONTEXT>"

# In the order of their ids in the released model.
ADDED_TOKENS = (
    *(IM_END, IM_START, IMG_START, IMG_END, IMG_CONTEXT),
    *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
)

# Fields of `ModelConfig` that are ids of added tokens.
TOKEN_FIELDS = {
    "img_start_id": IMG_START,
    "img_end_id": IMG_END,
    "img_context_id": IMG_CONTEXT,
    "im_end_id": IM_END,
}

_MODEL_FILE = "tokenizer.model"
_ADDED_FILE = "added_tokens.json"
_CONFIG_FILE = "tokenizer_config.json"


class Tokenizer:
    """Text to ids and back.

    `encode` splits text at added tokens and control tokens ('<s>'), longest match first, and gives
    the pieces between them to SentencePiece one by one, as the slow Hugging Face tokenizer does.
    It is for trusted text; `encode_ordinary` is for everything a user or a data set wrote.

    Pickles as the bytes of its files (for data workers); SentencePiece is loaded on first use.
    """

    def __init__(self, files: Mapping[str, bytes], where: str):
        """Use `Tokenizer.load`. `files` maps file names to contents, `where` names them in errors.

        Raises:
          UserError: a malformed file, or a token that has two ids.
        """
        self._files = dict(files)
        self._where = where
        self._added = _added_tokens(self._files, where)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[dict[str, bytes], str]]:
        return Tokenizer, (self._files, self._where)

    @classmethod
    def load(cls, directory: str | pathlib.Path) -> "Tokenizer":
        """Reads a checkpoint's `tokenizer.model` and added tokens.

        Added tokens are those of `added_tokens.json` and, where present, `added_tokens_decoder`
        of `tokenizer_config.json`: released InternVL checkpoints name `<|im_start|>` only there.

        Raises:
          UserError: a missing or malformed file.
        """
        check_local(directory, "a tokenizer's directory")
        directory = pathlib.Path(directory)
        names = (_MODEL_FILE, _ADDED_FILE, _CONFIG_FILE)
        files = {n: (directory / n).read_bytes() for n in names if (directory / n).is_file()}
        for name in (_MODEL_FILE, _ADDED_FILE):
            if name not in files:
                raise UserError(
                    f"tokenizer file not found: {directory / name}; copy it from the checkpoint "
                    "the language model comes from"
                )
        return cls(files, str(directory))

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes byte copies of the files it was loaded from."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (directory / name).write_bytes(content)

    @functools.cached_property
    def _sp(self) -> sentencepiece.SentencePieceProcessor:
        sp = sentencepiece.SentencePieceProcessor()
        try:
            sp.LoadFromSerializedProto(self._files[_MODEL_FILE])
        except RuntimeError as e:
            raise UserError(f"{self._where}: {_MODEL_FILE} is not a SentencePiece model") from e
        return sp

    @functools.cached_property
    def _special(self) -> dict[str, int]:
        """Token -> id of control and added tokens."""
        sp = self._sp
        control = {sp.IdToPiece(i): i for i in range(sp.GetPieceSize()) if sp.IsControl(i)}
        return {**control, **self._added}

    @functools.cached_property
    def _special_re(self) -> re.Pattern[str]:
        longest_first = sorted(self._special, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @functools.cached_property
    def _alias_re(self) -> re.Pattern[str]:
        """What special tokens are called in the SentencePiece model."""
        size = self._sp.GetPieceSize()
        pieces = [self._sp.IdToPiece(i) for i in self.special_ids if i < size]
        # SentencePiece writes a space as U+2581.
        return re.compile("|".join(re.escape(piece.replace("\u2581", " ")) for piece in pieces))

    @functools.cached_property
    def _name_of(self) -> dict[int, str]:
        return {i: token for token, i in self._special.items()}

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all control and added tokens."""
        return frozenset(self._special.values())

    @functools.cached_property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        return max(self._sp.GetPieceSize(), *(i + 1 for i in self.special_ids))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the files."""
        digest = hashlib.sha256()
        for name in sorted(self._files):
            digest.update(f"{name} {len(self._files[name])} ".encode() + self._files[name])
        return digest.hexdigest()

    @property
    def bos_id(self) -> int:
        return self._sp.bos_id()

    @property
    def eos_id(self) -> int:
        return self._sp.eos_id()

    @property
    def pad_id(self) -> int:
        """InternLM2 pads with the end-of-sequence token."""
        return self._sp.eos_id()

    def model_fields(self) -> dict[str, Any]:
        """The fields of `ModelConfig` that a tokenizer decides."""
        ids = {field: self.id_of(token) for field, token in TOKEN_FIELDS.items()}
        named = {"bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id}
        return {"vocab_size": self.vocab_size} | named | ids

    def id_of(self, token: str) -> int:
        """The id of an added or control token; UserError if there is none."""
        if token not in self._special:
            raise UserError(
                f"{self._where}: the tokenizer has no token {token!r}; add it to {_ADDED_FILE}"
            )
        return self._special[token]

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of trusted text, in which added and control tokens are recognised."""
        ids = [self.bos_id] if bos else []
        # The capturing group makes every second part a special token.
        for n, part in enumerate(self._special_re.split(text)):
            ids += [self._special[part]] if n % 2 else self._sp.EncodeAsIds(part)
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of untrusted text; never the id of an added or control token.

        Leaving added tokens out of the matching is not enough: they may also be pieces of the
        SentencePiece model under another name, as `<|im_start|>` is '[UNUSED_TOKEN_146]' in
        InternLM2. Such a piece is cut after its first character.
        """
        ids = self._sp.EncodeAsIds(text)
        unk = self._sp.unk_id()
        forbidden = self.special_ids - {unk}
        if forbidden.isdisjoint(ids):
            return ids
        cuts = [match.start() + 1 for match in self._alias_re.finditer(text)]
        parts = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        ids = [i for part in parts for i in self._sp.EncodeAsIds(part)]
        return [unk if i in forbidden else i for i in ids]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids; ids that no token has (vocabulary padding) decode to nothing."""
        text, run = "", list[int]()
        for i in map(int, ids):
            if i in self._name_of:
                text += self._sp.DecodeIds(run) + ("" if skip_special else self._name_of[i])
                run = []
            elif 0 <= i < self._sp.GetPieceSize():
                run.append(i)
        return text + self._sp.DecodeIds(run)

    def piece_bytes(self, i: int) -> bytes:
        """What one token stands for, its space included: the bytes of a text are those of its
        tokens. Of added and control tokens their names; b'' of ids that no token has."""
        if i in self._name_of:
            return self._name_of[i].encode()
        if not 0 <= i < self._sp.GetPieceSize():
            return b""
        piece: str = self._sp.IdToPiece(i)
        if self._sp.IsByte(i):
            return bytes([int(piece[3:-1], 16)])  # <0xE4>
        return piece.replace("\u2581", " ").encode()


def _added_tokens(files: Mapping[str, bytes], where: str) -> dict[str, int]:
    """Merges the added tokens of both JSON files."""
    name = _ADDED_FILE
    try:
        added = {str(token): int(i) for token, i in json.loads(files[name]).items()}
        name = _CONFIG_FILE
        decoder = json.loads(files.get(name, b"{}")).get("added_tokens_decoder", {})
        config = {str(entry["content"]): int(i) for i, entry in decoder.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        raise UserError(f"{where}: {name} is malformed ({e})") from e
    for token in added.keys() & config.keys():
        if added[token] != config[token]:
            raise UserError(
                f"{where}: {token!r} is {added[token]} in {_ADDED_FILE} but {config[token]} in "
                f"{_CONFIG_FILE}; make them agree"
            )
    return config | added


def train_tokenizer(
    lines: Iterable[str], directory: str | pathlib.Path, vocab_size: int
) -> Tokenizer:
    """Trains a small BPE tokenizer and writes it to `directory`.

    Unknown 0, BOS 1, EOS 2 and no padding piece; every digit and the newline is a token of its
    own; `ADDED_TOKENS` follow the SentencePiece vocabulary. Deterministic.

    Args:
      lines: The text; a line may hold newlines.
      directory: Receives `tokenizer.model` and `added_tokens.json`.
      vocab_size: Size of the SentencePiece vocabulary, an upper bound if the text is small.

    Raises:
      UserError: no text, or more different characters than the vocabulary has room for.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=(part for line in lines for part in line.split("\n") if part),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            # Lets 'top-left' become one token: hyphens would split it otherwise.
            split_by_unicode_script=False,
            user_defined_symbols=[*"0123456789", "\n"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as e:
        raise UserError(
            f"cannot train a tokenizer of vocab_size={vocab_size} on this text ({e}); "
            "use more text or a larger vocabulary"
        ) from e
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    added = {token: sp.GetPieceSize() + n for n, token in enumerate(ADDED_TOKENS)}
    files = {_MODEL_FILE: model.getvalue(), _ADDED_FILE: json.dumps(added, indent=2).encode()}
    tokenizer = Tokenizer(files, str(directory))
    tokenizer.save(directory)
    return tokenizer
