"""Records -> samples: token ids, labels and image tiles of one training example.

A sample source is what packing and mixing see: how many records, how long each is, and the sample
itself. `seen` is how many samples the source gave before (`mixture.Draw`): all randomness comes
from (seed, source, seen), so it does not depend on what else is in the mixture.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from hovle_jax.config import IGNORE, DataConfig, ModelConfig
from hovle_jax.data import image
from hovle_jax.data.chat import TEMPLATES, Encoded, Template, encode_conversation
from hovle_jax.data.readers import TextLines
from hovle_jax.data.records import IMAGE_PLACEHOLDER, Record, Turn
from hovle_jax.data.sources import MetaEntry
from hovle_jax.data.tilers import TILERS, TileLimits
from hovle_jax.data.token_shards import TokenShards
from hovle_jax.data.tokenizer import IMG_CONTEXT, IMG_END, IMG_START, TOKEN_FIELDS, Tokenizer
from hovle_jax.errors import UserError

KINDS = ("unpaired", "conversations")  # of data: `UnpairedImages`, `Conversations`


@dataclasses.dataclass(frozen=True)
class Sample:
    ids: np.ndarray  # int32 [n]
    labels: np.ndarray  # int32 [n], IGNORE where nothing is predicted
    tiles: np.ndarray  # uint8 [tiles, H, W, 3], in order of appearance


class Length(NamedTuple):
    """What a sample takes of a row; (0, 0) is a record that is left out."""

    tokens: int
    tiles: int
    cut: str = ""  # what config.data.too_long made of the record


class SampleSource(Protocol):
    name: str

    def __len__(self) -> int: ...

    def measure(self, i: int) -> Length:
        """The length of record i's sample, without decoding pixels."""
        ...

    def fingerprint(self) -> tuple[str, ...]:
        """All that `measure` depends on: files, tokenizer, settings."""

    def sample(self, i: int, seen: int) -> Sample: ...


def get_template(name: str) -> Template:
    return TEMPLATES.find(name)


def check_tokenizer(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """A tokenizer whose ids are not the model's would train on nonsense without a sound."""
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"config.model.vocab_size {model.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size} ids"
        )
    if tokenizer.vocab_size > model.text_rows + model.special_tokens:
        raise UserError(
            f"config.model.table_rows {model.text_rows} + special_tokens {model.special_tokens} "
            f"are fewer than the tokenizer's {tokenizer.vocab_size} ids"
        )
    for key in ("bos_id", "eos_id"):
        found, wanted = getattr(tokenizer, key), getattr(model, key)
        if found < 0:
            raise UserError(
                f"the tokenizer has no {key}, which config.model gives as {wanted}; use a "
                "SentencePiece model that has one"
            )
        if found != wanted:
            raise UserError(f"config.model.{key} is {wanted} but the tokenizer's is {found}")
    for key, token in TOKEN_FIELDS.items():
        if tokenizer.id_of(token) != getattr(model, key):
            raise UserError(
                f"config.model.{key} is {getattr(model, key)} but the tokenizer's {token} is "
                f"{tokenizer.id_of(token)}"
            )


class Tiler:
    """The tile settings of one source, applied to the images of a record."""

    def __init__(self, model: ModelConfig, data: DataConfig, max_tiles: int | None):
        self.image_size = model.image_size
        self.min_tiles = data.min_tiles
        self.max_tiles = data.max_tiles if max_tiles is None else max_tiles
        self.thumbnail = data.thumbnail
        self.name = data.tiler
        self.policy = TILERS.find(data.tiler)

    @property
    def settings(self) -> tuple[object, ...]:
        """What the number of tiles depends on."""
        own = (self.image_size, self.min_tiles, self.max_tiles, self.thumbnail)
        return own if self.name == "dynamic" else (*own, self.name)

    def limits(self, images: int) -> tuple[int, int]:
        """(min, max) tiles of each image: several images share the budget (InternVL)."""
        most = max(1, self.max_tiles // max(images, 1))
        return min(self.min_tiles, most), most

    def limits_of(self, record: Record) -> TileLimits:
        return TileLimits(self.image_size, *self.limits(len(record.images)), self.thumbnail)

    def counts(self, record: Record) -> list[int]:
        """Tiles of each image, from its header alone."""
        limits = self.limits_of(record)
        if limits.most == 1:  # whatever its size; half a billion headers need not be read
            return [1] * len(record.images)
        sizes = [image.image_size_of(ref, record.where) for ref in record.images]
        return [self.policy.count(*size, limits) for size in sizes]

    def tiles(self, record: Record, rng: np.random.Generator | None = None) -> list[np.ndarray]:
        """uint8 [tiles, H, W, 3] per image; with `rng`, after a JPEG round trip of random quality
        (75 to 100, as InternVL's `data_augment`)."""
        limits = self.limits_of(record)

        def opened(ref: str | bytes) -> Image.Image:
            picture = image.open_image(ref, record.where)
            return picture if rng is None else image.recompress(picture, int(rng.integers(75, 101)))

        return [self.policy.cut(opened(ref), limits) for ref in record.images]

    def stack(self, tiles: list[np.ndarray]) -> np.ndarray:
        empty = np.zeros((0, self.image_size, self.image_size, 3), np.uint8)
        return np.concatenate([empty, *tiles])


class Conversations:
    """Stages II and III: chat with images; answers are predicted."""

    def __init__(
        self,
        entry: MetaEntry,
        tokenizer: Tokenizer,
        model: ModelConfig,
        data: DataConfig,
        seed: int,
    ):
        self.name = entry.name
        self._source, self._augment = entry.source, entry.augment
        self._fingerprint = entry.fingerprint
        self._seed = _seed(seed, self.name)
        self._row = data.tokens, data.tiles
        self._too_long = data.too_long
        self._tokenizer = tokenizer
        self._template = get_template(data.template)
        self._system = data.system
        self._tokens_per_tile = model.tokens_per_tile
        self._tiler = Tiler(model, data, entry.source.max_tiles)

    def __len__(self) -> int:
        return len(self._source)

    def fingerprint(self) -> tuple[str, ...]:
        settings = (self._template, self._system, self._tokens_per_tile, self._tiler.settings)
        limits = () if self._too_long == "error" else (self._too_long, *self._row)
        return (*self._fingerprint, self._tokenizer.fingerprint, repr((*settings, *limits)))

    def measure(self, i: int) -> Length:
        record = self._source[i]
        counts = self._tiler.counts(record)
        encoded, images, cut = self._fit(record, counts)
        if encoded is None:
            return Length(0, 0, cut)
        return Length(len(encoded.ids), sum(counts[:images]), cut)

    def sample(self, i: int, seen: int) -> Sample:
        record = self._source[i]
        # The number, not a generator that lives on: a resumed run makes the same picture.
        rng = np.random.default_rng((*self._seed, seen)) if self._augment else None
        tiles = self._tiler.tiles(record, rng)
        encoded, images, cut = self._fit(record, [len(t) for t in tiles])
        if encoded is None:
            raise UserError(cut)
        return Sample(encoded.ids, encoded.labels, self._tiler.stack(tiles[:images]))

    def _fit(self, record: Record, tiles: list[int]) -> tuple[Encoded | None, int, str]:
        """(what a row can hold, how many images of it, what was cut); see config.data.too_long.

        Whole exchanges are cut from the end, with their images; the answer of a first exchange
        that is too long by itself loses its end. So no image is ever cut.
        """
        encoded = self._encode(record, record.turns, tiles)
        if self._too_long == "error" or self._fits(encoded, tiles):
            return encoded, len(tiles), ""
        size = f"{record.where}: {len(encoded.ids)} tokens and {sum(tiles)} tiles"
        if self._too_long == "drop":
            return None, 0, f"{size}: left out"
        turns, images = record.turns, len(tiles)

        @functools.cache
        def prefix(end: int) -> tuple[Encoded, int]:
            count = sum(t.text.count(IMAGE_PLACEHOLDER) for t in turns[:end] if t.role == "user")
            return self._encode(record, turns[:end], tiles[:count]), count

        def is_over(end: int) -> bool:
            encoded, count = prefix(end)
            return not self._fits(encoded, tiles[:count])

        ends = [end for end, turn in enumerate(turns, 1) if turn.role == "assistant"]
        # Tokens and tiles grow with the end: of a thousand exchanges ten are encoded.
        if fitting := bisect.bisect_left(ends, True, key=is_over):
            end = ends[fitting - 1]
            return *prefix(end), f"{size}: {end} of {len(turns)} turns kept"
        if ends:
            encoded, images = prefix(ends[0])
        answer = int(np.argmax(encoded.labels != IGNORE))
        row_tokens, row_tiles = self._row
        if answer >= row_tokens or sum(tiles[:images]) > row_tiles:
            return None, 0, f"{size}: left out, a row ends before the first answer"
        encoded = Encoded(encoded.ids[:row_tokens], encoded.labels[:row_tokens])
        return encoded, images, f"{size}: the first answer kept in part"

    def _fits(self, encoded: Encoded, tiles: list[int]) -> bool:
        return len(encoded.ids) <= self._row[0] and sum(tiles) <= self._row[1]

    def _encode(self, record: Record, turns: Sequence[Turn], tiles: list[int]) -> Encoded:
        try:
            return encode_conversation(
                turns,
                tiles,
                self._tokenizer,
                self._template,
                tokens_per_tile=self._tokens_per_tile,
                system=self._system,
            )
        except UserError as error:
            raise UserError(f"{record.where}: {error}") from None


def _seed(seed: int, name: str) -> tuple[int, int]:
    """Names, not numbers, tell sources apart: a new one changes nothing for the others."""
    return seed, zlib.crc32(name.encode())


class UnpairedImages:
    """Stage I: images of a record and unrelated text in one causal sequence, in random order
    (docs/design.md). Turns of the record are not read.

    The text is a run of `text_ratio` tokens per image token: uniformly random ordinary ids, a span
    of token shards from a random token on, or lines of a text file from a random line on.
    """

    def __init__(
        self,
        entry: MetaEntry,
        text: TextLines | TokenShards | None,
        tokenizer: Tokenizer,
        model: ModelConfig,
        data: DataConfig,
        seed: int,
    ):
        self.name = entry.name
        self._source, self._fingerprint = entry.source, entry.fingerprint
        self._text = text
        self._tokenizer = tokenizer
        self._tokens_per_tile = model.tokens_per_tile
        self._ratio = data.text_ratio
        self._tiler = Tiler(model, data, entry.source.max_tiles)
        self._seed = _seed(seed, self.name)
        special = tokenizer.special_ids | {0}
        self._ordinary = np.array([i for i in range(tokenizer.vocab_size) if i not in special])

    def __len__(self) -> int:
        return len(self._source)

    def fingerprint(self) -> tuple[str, ...]:
        settings = (self._ratio, self._tokens_per_tile, self._tiler.settings)
        return (*self._fingerprint, repr(settings))

    def measure(self, i: int) -> Length:
        tiles = self._tiler.counts(self._source[i])
        image_tokens = sum(tiles) * self._tokens_per_tile
        tokens = 1 + 2 * len(tiles) + image_tokens + self._text_tokens(image_tokens)
        return Length(tokens, sum(tiles))

    def sample(self, i: int, seen: int) -> Sample:
        rng = np.random.default_rng((*self._seed, seen))
        tiles = self._tiler.tiles(self._source[i])
        start, context, end = map(self._tokenizer.id_of, (IMG_START, IMG_CONTEXT, IMG_END))
        runs = [[start, *[context] * (len(t) * self._tokens_per_tile), end] for t in tiles]
        images = [token for run in runs for token in run]
        text = self._random_text(self._text_tokens(len(images) - 2 * len(tiles)), rng)
        halves = [images, text] if rng.random() < 0.5 else [text, images]
        ids = np.array([self._tokenizer.bos_id, *halves[0], *halves[1]], np.int32)
        return Sample(ids, np.full_like(ids, IGNORE), self._tiler.stack(tiles))

    def _text_tokens(self, image_tokens: int) -> int:
        return round(image_tokens * self._ratio)

    def _random_text(self, count: int, rng: np.random.Generator) -> list[int]:
        if self._text is None:
            return rng.choice(self._ordinary, count).tolist()
        if isinstance(self._text, TokenShards):
            return self._text.span(int(rng.integers(len(self._text))), count).tolist()
        ids: list[int] = []
        first = line = int(rng.integers(len(self._text)))
        while len(ids) < count:
            ids += self._tokenizer.encode_ordinary(self._text[line])
            line = (line + 1) % len(self._text)
            if line == first and not ids:
                raise UserError("config.data.text: no line of it has a token")
        return ids[:count]
