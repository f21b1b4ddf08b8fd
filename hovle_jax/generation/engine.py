"""Continuous batching: a fixed batch of cache slots, refilled as soon as a request finishes.

The device's part is in `slots.py`. Here, on the host and between its calls, finished requests leave
their slots and waiting ones enter. Slots do not influence each other: a request gets the same
tokens alone and in any company.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from hovle_jax.config import ModelConfig
from hovle_jax.errors import UserError
from hovle_jax.generation import slots as device
from hovle_jax.generation.decode import STACKS, compute_params
from hovle_jax.generation.memory import check_memory
from hovle_jax.generation.prefix import PrefixStore, prefix_key, prefix_length
from hovle_jax.generation.sampling import MAX_TOP, Sampling, rows
from hovle_jax.sharding import batch_ways

BUCKET = 64  # unit of prompt lengths
PREFILL_TOKENS = 16_384  # most tokens of one prefill, where it has several prompts
# Most tokens of a prompt's second part: what continues a cache keeps all of its attention scores.
RESUME_TOKENS = 512
Best = list[tuple[int, float]]  # tokens and their log-probabilities, the likeliest first


@dataclasses.dataclass(frozen=True)
class Request:
    prompt: np.ndarray  # int32 [n]
    tiles: np.ndarray  # uint8 [t, H, W, 3] in order of appearance; float32 ones are normalised
    max_new: int
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = ()
    top: int = 0  # report so many of the likeliest tokens beside each; at most MAX_TOP


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a step made for one request; the stop token that ended it is left out.

    Log-probabilities are natural, of the model's scores before any sampling setting.
    """

    number: int
    tokens: list[int]
    logprobs: list[float]
    finish: str  # "" (more to come) | "stop" (a stop token) | "length" (max_new)
    best: list[Best] = dataclasses.field(default_factory=list)  # per token, if asked for


class _Shape(NamedTuple):
    """Prompts of one shape are prefilled together."""

    tokens: int  # of the prompt, or of its first part where that is kept
    rest: int  # tokens of the second part; 0: the prompt is prefilled whole
    tiles: int
    dtype: Any


def bucket(n: int, unit: int) -> int:
    """n rounded up to `unit` times a number of three significant bits: few shapes, and at most a
    quarter more than n."""
    units = -(-n // unit)
    shift = max(units.bit_length() - 3, 0)
    return unit * (-(-units >> shift) << shift)


def slot_groups(mesh: Any) -> int:
    """Parts that a mesh (None: one device) splits slots into."""
    return batch_ways(mesh) if mesh else 1


class Engine:
    """Answers requests with at most `slots` at a time, each of at most `capacity` tokens (prompt
    and answer) and, for 'post' models, `tiles` tiles.

    Prompts are padded to buckets of lengths, and to `floor` (tokens, tiles) at least: more padding,
    fewer compilations. Where dynamic NTK scaling reaches past `max_positions`, `capacity` is the
    length it is computed for.

    int8_cache: keys and values in slots take a byte each. prefix_bytes: memory for the caches of
    prompts up to their last image, so that the next question about it prefills the question only;
    not where that has more than RESUME_TOKENS, nor where dynamic NTK scaling applies. mesh: slots
    are split over its batch axes, layers over `tensor`.

    Raises:
      UserError: slots that devices do not divide; more than a device's memory.
    """

    def __init__(
        self,
        params: Any,
        config: ModelConfig,
        *,
        slots: int = 8,
        capacity: int = 4096,
        tiles: int = 0,
        chunk: int = 8,
        stops: int = 4,
        floor: tuple[int, int] = (BUCKET, 0),
        int8_cache: bool = False,
        prefix_bytes: int = 0,
        mesh: Any = None,
    ):
        if slots % slot_groups(mesh):
            raise UserError(f"{slots} slots cannot be split over {slot_groups(mesh)} devices")
        self._params, self._config = compute_params(params, config, mesh=mesh), config
        self._mesh = mesh
        self._slots: list[_Slot | None] = [None] * slots
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._next = 0
        self._chunk, self._stops = chunk, stops
        self._longer = config.extra_places_per_tile  # in the embedding's cache
        self._tiles = tiles
        self._capacity = {"embedding": capacity + tiles * self._longer, "decoder": capacity}
        self._scaled = any(
            c.rope_scaling == "dynamic" and self._capacity[name] > c.max_positions
            for name, c in config.stacks.items()
        )
        # Rotations that depend on the capacity have to be those of decoding, in any prefill.
        self._floor = (floor[0], max(floor[1], tiles) if self._scaled else floor[1])
        self._prefix = prefix_bytes > 0 and not self._scaled
        self.prefixes = PrefixStore(prefix_bytes)
        places = tuple(self._capacity.items())
        with self._scope():
            shapes = jax.eval_shape(lambda: device.empty(config, slots, stops, places, int8_cache))
            check_memory(self._params, config, shapes, prefix_bytes if self._prefix else 0)
            self._state = device.empty(config, slots, stops, places, int8_cache)

    def _scope(self) -> Any:
        return jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()

    @property
    def slots(self) -> int:
        return len(self._slots)

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer at most."""
        return self._capacity["decoder"]

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return sum(slot is not None for slot in self._slots)

    def check(self, request: Request) -> None:
        """UserError: a request that this engine cannot answer."""
        c, (prompt, tiles) = self._config, (request.prompt, request.tiles)
        if tiles.dtype not in (np.uint8, np.float32):
            raise UserError(f"tiles must be uint8 or float32, not {tiles.dtype}")
        places = int(np.sum(prompt == c.img_context_id))
        if places != len(tiles) * c.tokens_per_tile:
            raise UserError(f"{places} image tokens for {len(tiles)} tiles of {c.tokens_per_tile}")
        if not len(prompt) or request.max_new < 1:
            raise UserError("a request needs a prompt and at least one new token")
        most = self._capacity["decoder"]
        if len(prompt) + request.max_new > most:
            raise UserError(
                f"{len(prompt)} prompt tokens and {request.max_new} new ones are more than the "
                f"context of {most}"
            )
        if self._longer and len(tiles) > self._tiles:
            raise UserError(f"{len(tiles)} tiles are more than {self._tiles}")
        if not 0 <= request.top <= MAX_TOP:
            raise UserError(f"{request.top} likeliest tokens are not 0 to {MAX_TOP}")
        if len(request.stop_ids) > self._stops:
            raise UserError(f"{len(request.stop_ids)} stop tokens are more than {self._stops}")

    def submit(self, request: Request) -> int:
        """Queues a request and returns its number."""
        self.check(request)
        self._next += 1
        self._waiting.append((self._next, request))
        return self._next

    def cancel(self, number: int) -> None:
        """Nothing more will be reported of this request."""
        waiting = [entry for entry in self._waiting if entry[0] != number]
        self._waiting = collections.deque(waiting)
        for i, slot in enumerate(self._slots):
            if slot is not None and slot.number == number:
                self._slots[i] = None

    def step(self) -> list[Progress]:
        """Fills free slots and extends all; [] when there is nothing to do."""
        return self.admit() + self.extend()

    def admit(self) -> list[Progress]:
        """Prefills waiting requests while there are free slots: each one's first token."""
        out: list[Progress] = []
        while self._waiting and self.running < len(self._slots):
            free = [i for i, slot in enumerate(self._slots) if slot is None]
            shape = self._shape(self._waiting[0][1])
            alike = [entry for entry in self._waiting if self._shape(entry[1]) == shape]
            most = self._rows(min(len(alike), len(free)), shape.tokens + shape.rest)
            group = alike[:most]
            numbers = {number for number, _ in group}
            self._waiting = collections.deque(e for e in self._waiting if e[0] not in numbers)
            with self._scope():
                out += self._fill(free[: len(group)], group, shape)
        return out

    def _rows(self, most: int, tokens: int) -> int:
        """Prompts of one prefill: all slots, or a power of two (few shapes)."""
        most = min(most, max(PREFILL_TOKENS // tokens, 1))
        return most if most == len(self._slots) else 1 << (most.bit_length() - 1)

    def _shape(self, request: Request) -> _Shape:
        """The prefill that can hold a request. It depends on the prompt alone, and not on what is
        kept: an answer is the same to the last bit, found or not."""
        first, rest = len(request.prompt), 0
        if self._prefix and (kept := prefix_length(request.prompt, self._config.img_context_id)):
            left = bucket(first - kept, BUCKET)
            first, rest = (kept, left) if left <= RESUME_TOKENS else (first, 0)
        tokens = min(max(bucket(first, BUCKET), self._floor[0]), self._capacity["decoder"])
        tiles = max(bucket(len(request.tiles), 1), self._floor[1])
        if self._longer:
            tiles = min(tiles, self._tiles)
        return _Shape(tokens, rest, tiles, request.tiles.dtype)

    def _fill(
        self, slots: list[int], group: list[tuple[int, Request]], shape: _Shape
    ) -> list[Progress]:
        c, requests = self._config, [r for _, r in group]
        stop_ids = np.full((len(group), self._stops), device.NO_TOKEN, np.int32)
        for row, request in zip(stop_ids, requests, strict=True):
            row[: len(request.stop_ids)] = request.stop_ids
        start = device.Start(
            np.array(slots, np.int32),
            _padded([r.prompt for r in requests], shape.tokens + shape.rest, c.vocab_size),
            np.array([r.max_new for r in requests], np.int32),
            stop_ids,
            rows([r.sampling for r in requests], c.vocab_size),
        )
        static: dict[str, Any] = {
            "config": c,
            "drawn": any(r.sampling.temperature for r in requests),
            "top": any(r.top for r in requests),
        }
        if shape.rest:
            prefixes = tuple(self._prefix_cache(r, shape) for r in requests)
            rest = [r.prompt[prefix_length(r.prompt, c.img_context_id) :] for r in requests]
            counts = np.array([len(x) for x in rest], np.int32)
            ids = _padded(rest, shape.rest, c.pad_id)
            self._state, made = device.resume(
                self._params, self._state, prefixes, ids, counts, start, **static
            )
        else:
            batch = self._batch([r.prompt for r in requests], [r.tiles for r in requests], shape)
            room = self._capacity["decoder"] if self._scaled else shape.tokens
            self._state, made = device.prefill(
                self._params, self._state, batch, start, room=room, **static
            )
        for slot, (number, request) in zip(slots, group, strict=True):
            self._slots[slot] = _Slot(number, request)
        return self._reports(dict(zip(slots, range(len(group)), strict=True)), made)

    def _prefix_cache(self, request: Request, shape: _Shape) -> Any:
        """The cache of a prompt's first part: kept from before, or computed now."""
        ids = request.prompt[: prefix_length(request.prompt, self._config.img_context_id)]
        key = prefix_key(ids, request.tiles)
        cache = self.prefixes.get(key)
        if cache is None:
            batch = self._batch([ids], [request.tiles], shape)
            cache = device.prefill_prefix(
                self._params, batch, config=self._config, room=shape.tokens
            )
            self.prefixes.put(key, cache)
        return cache

    def _batch(
        self, prompts: list[np.ndarray], tiles: list[np.ndarray], shape: _Shape
    ) -> dict[str, np.ndarray]:
        c = self._config
        size = (len(prompts), shape.tiles, c.image_size, c.image_size, 3)
        pixels = np.zeros(size, shape.dtype)
        for i, own in enumerate(tiles):
            pixels[i, : len(own)] = own
        batch = {
            "input_ids": _padded(prompts, shape.tokens, c.pad_id),
            "segment_ids": _padded([np.ones_like(p) for p in prompts], shape.tokens, 0),
        }
        return batch | {"pixels": pixels} if shape.tiles else batch

    def extend(self) -> list[Progress]:
        """Up to `chunk` more tokens for every running request."""
        if not self.running:
            return []
        keep = np.array([slot is not None for slot in self._slots])
        requests = [slot.request for slot in self._slots if slot]
        with self._scope():
            self._state, made = device.decode(
                self._params,
                self._state,
                keep,
                config=self._config,
                chunk=self._chunk,
                windows=tuple(self._window(name) for name in STACKS),
                drawn=any(r.sampling.temperature for r in requests),
                top=any(r.top for r in requests),
            )
        return self._reports({i: i for i in np.flatnonzero(keep).tolist()}, made)

    def _window(self, stack: str) -> int:
        """Cache places that the next tokens may read: a power of two that holds the longest."""
        capacity = self._capacity[stack]
        if self._scaled:
            return capacity
        extra = self._longer if stack == "embedding" else 0
        longest = max(s.length + len(s.request.tiles) * extra for s in self._slots if s)
        return min(1 << (longest + self._chunk - 1).bit_length(), capacity)

    def _reports(self, row_of: dict[int, int], made: device.Made) -> list[Progress]:
        """What slots made, `row_of` telling where; slots that are done become free."""
        host = device.Made(*map(np.asarray, made))
        return [
            self._report(slot, device.Made(*(x[row] for x in host))) for slot, row in row_of.items()
        ]

    def _report(self, i: int, made: device.Made) -> Progress:
        slot = self._slots[i]
        assert slot is not None
        count = int(np.sum(made.token != device.NO_TOKEN))
        slot.made += count
        ids, finish = made.token[:count].tolist(), ""
        if ids and ids[-1] in slot.request.stop_ids:
            ids, finish = ids[:-1], "stop"
        elif slot.made == slot.request.max_new:
            finish = "length"
        if finish:
            self._slots[i] = None
        best: list[Best] = []
        if top := slot.request.top:
            pairs = zip(made.best.tolist(), made.best_logprob.tolist(), strict=True)
            best = [list(zip(*pair, strict=True))[:top] for pair in pairs][: len(ids)]
        return Progress(slot.number, ids, made.logprob[: len(ids)].tolist(), finish, best)


@dataclasses.dataclass
class _Slot:
    number: int
    request: Request
    made: int = 0

    @property
    def length(self) -> int:
        return len(self.request.prompt) + self.made


def _padded(rows: list[np.ndarray], length: int, fill: int) -> np.ndarray:
    """int32 [n, length], filled on the right."""
    out = np.full((len(rows), length), fill, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
