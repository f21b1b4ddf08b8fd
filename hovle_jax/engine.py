"""Continuous batching: a fixed batch of cache slots, refilled as soon as a request finishes.

    B slots   M tokens a slot holds   n prompts of one prefill   S, N their tokens and tiles

Two compiled functions per shape: `_prefill` writes a group of prompts into free slots and chooses
their first tokens; `_decode` extends all slots by up to `chunk` tokens in one loop on the device.
Between the two, on the host, finished requests leave and waiting ones enter. Slots do not
influence each other: a request gets the same tokens alone and in any company.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax import model
from hovle_jax.config import ModelConfig
from hovle_jax.decode import STACKS, decode_step, restack, stacks, unstack
from hovle_jax.errors import UserError
from hovle_jax.sampling import Rows, Sampling, choose, rows

BUCKET = 64  # unit of prompt lengths
PREFILL_TOKENS = 16_384  # most tokens of one prefill, where it has several prompts
NO_TOKEN = -1


@dataclasses.dataclass(frozen=True)
class Request:
    prompt: np.ndarray  # int32 [n]
    tiles: np.ndarray  # uint8 [t, H, W, 3] in order of appearance; float32 ones are normalised
    max_new: int
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a step made for one request; the stop token that ended it is left out."""

    number: int
    tokens: list[int]
    logprobs: list[float]  # natural, of the model's scores before any sampling setting
    finish: str  # "" (more to come) | "stop" (a stop token) | "length" (max_new)


class State(NamedTuple):
    """Everything about the slots that lives on the device."""

    cache: model.Cache
    token: jax.Array  # int32 [B], the last of each answer, not yet in the cache
    made: jax.Array  # int32 [B], tokens of each answer
    limit: jax.Array  # int32 [B]
    active: jax.Array  # bool [B]
    seen: jax.Array  # bool [B, V]
    stop_ids: jax.Array  # int32 [B, K], NO_TOKEN where a request has fewer
    settings: Rows


def bucket(n: int, unit: int) -> int:
    """n rounded up to `unit` times a number of three significant bits: few shapes, and at most a
    quarter more than n."""
    units = -(-n // unit)
    shift = max(units.bit_length() - 3, 0)
    return unit * (-(-units >> shift) << shift)


def compute_params(params: Any, config: ModelConfig) -> Any:
    """Parameters as the engine wants them, from the model's or from its own (which stay as they
    are): layers apart, matrices in the dtype they are computed in. Decoding is as fast as memory
    delivers them."""

    def cast(path: Any, x: Any) -> Any:
        # The other parameters are small, and some are used in float32 first.
        matrix = str(path[-1].key).endswith(("kernel", "table"))
        return x.astype(config.dtype) if matrix and config.dtype != "float32" else x

    return jax.tree_util.tree_map_with_path(cast, unstack(params))


class Engine:
    """Answers requests with at most `slots` at a time, each of at most `capacity` tokens (prompt
    and answer) and, for 'post' models, `tiles` tiles.

    Prompts are padded to buckets of lengths, and to `floor` (tokens, tiles) at least: more padding,
    fewer compilations. Where dynamic NTK scaling reaches past `max_positions`, `capacity` is the
    length it is computed for.
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
    ):
        self._params, self._config = compute_params(params, config), config
        self._slots: list[_Slot | None] = [None] * slots
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._next = 0
        self._chunk, self._stops = chunk, stops
        extra = 0
        if config.shuffle_loc == "post":
            extra = config.tokens_per_tile * (config.shuffle**2 - 1)
        self._longer = extra  # places a tile takes in the embedding's cache beyond the decoder's
        self._tiles = tiles
        self._capacity = {"embedding": capacity + tiles * extra, "decoder": capacity}
        self._scaled = any(
            c.rope_scaling == "dynamic" and self._capacity[name] > c.max_positions
            for name, c in stacks(config).items()
        )
        # Rotations that depend on the capacity have to be those of decoding, in any prefill.
        self._floor = (floor[0], max(floor[1], tiles) if self._scaled else floor[1])
        self._state = _empty(config, slots, stops, tuple(self._capacity.items()))

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
            group = alike[: self._rows(min(len(alike), len(free)), shape[0])]
            numbers = {number for number, _ in group}
            self._waiting = collections.deque(e for e in self._waiting if e[0] not in numbers)
            out += self._fill(free[: len(group)], group, shape)
        return out

    def _rows(self, most: int, tokens: int) -> int:
        """Prompts of one prefill: all slots, or a power of two (few shapes)."""
        most = min(most, max(PREFILL_TOKENS // tokens, 1))
        return most if most == len(self._slots) else 1 << (most.bit_length() - 1)

    def _shape(self, request: Request) -> tuple[int, int, Any]:
        """Tokens, tiles and pixel type of the prefill that can hold a request."""
        tokens = max(bucket(len(request.prompt), BUCKET), self._floor[0])
        tiles = max(bucket(len(request.tiles), 1), self._floor[1])
        if self._longer:
            tiles = min(tiles, self._tiles)
        return min(tokens, self._capacity["decoder"]), tiles, request.tiles.dtype

    def _fill(
        self, slots: list[int], group: list[tuple[int, Request]], shape: tuple[int, int, Any]
    ) -> list[Progress]:
        c, requests, (tokens, tiles, dtype) = self._config, [r for _, r in group], shape
        ids = np.full((len(group), tokens), c.pad_id, np.int32)
        batch: dict[str, Any] = {"input_ids": ids, "segment_ids": np.zeros_like(ids)}
        if tiles:
            batch["pixels"] = np.zeros((len(group), tiles, c.image_size, c.image_size, 3), dtype)
        stop_ids = np.full((len(group), self._stops), NO_TOKEN, np.int32)
        for i, request in enumerate(requests):
            ids[i, : len(request.prompt)] = request.prompt
            batch["segment_ids"][i, : len(request.prompt)] = 1
            if len(request.tiles):
                batch["pixels"][i, : len(request.tiles)] = request.tiles
            stop_ids[i, : len(request.stop_ids)] = request.stop_ids
        limits = np.array([r.max_new for r in requests], np.int32)
        settings = rows([r.sampling for r in requests], c.vocab_size)
        room = self._capacity["decoder"] if self._scaled else tokens
        self._state, token, logprob = _prefill(
            self._params,
            self._state,
            batch,
            np.array(slots, np.int32),
            limits,
            stop_ids,
            settings,
            config=c,
            room=room,
            drawn=any(r.sampling.temperature for r in requests),
        )
        for slot, (number, request) in zip(slots, group, strict=True):
            self._slots[slot] = _Slot(number, request)
        made = np.asarray(token)[:, None], np.asarray(logprob)[:, None]
        return [self._report(s, *(x[i] for x in made)) for i, s in enumerate(slots)]

    def extend(self) -> list[Progress]:
        """Up to `chunk` more tokens for every running request."""
        if not self.running:
            return []
        keep = np.array([slot is not None for slot in self._slots])
        self._state, token, logprob = _decode(
            self._params,
            self._state,
            keep,
            config=self._config,
            chunk=self._chunk,
            windows=tuple(self._window(name) for name in STACKS),
            drawn=any(s.request.sampling.temperature for s in self._slots if s),
        )
        made = np.asarray(token), np.asarray(logprob)
        return [self._report(i, made[0][i], made[1][i]) for i in np.flatnonzero(keep).tolist()]

    def _window(self, stack: str) -> int:
        """Cache places that the next tokens may read: a power of two that holds the longest."""
        capacity = self._capacity[stack]
        if self._scaled:
            return capacity
        extra = self._longer if stack == "embedding" else 0
        longest = max(s.length + len(s.request.tiles) * extra for s in self._slots if s)
        return min(1 << (longest + self._chunk - 1).bit_length(), capacity)

    def _report(self, i: int, tokens: np.ndarray, logprobs: np.ndarray) -> Progress:
        """Takes the tokens that slot i made (NO_TOKEN after its last) and frees it at the end."""
        slot = self._slots[i]
        assert slot is not None
        count = int(np.sum(tokens != NO_TOKEN))
        slot.made += count
        ids, finish = tokens[:count].tolist(), ""
        if ids and ids[-1] in slot.request.stop_ids:
            ids, finish = ids[:-1], "stop"
        elif slot.made == slot.request.max_new:
            finish = "length"
        if finish:
            self._slots[i] = None
        return Progress(slot.number, ids, logprobs[: len(ids)].tolist(), finish)


@dataclasses.dataclass
class _Slot:
    number: int
    request: Request
    made: int = 0

    @property
    def length(self) -> int:
        return len(self.request.prompt) + self.made


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(
    config: ModelConfig, slots: int, stops: int, capacity: tuple[tuple[str, int], ...]
) -> State:
    cache: dict[str, Any] = {}
    for name, size in capacity:
        c = stacks(config)[name]
        shape = (slots, size, c.num_kv_heads, c.head_dim)
        cache[name] = tuple(
            {k: jnp.zeros(shape, config.dtype) for k in ("k", "v")} for _ in range(c.num_layers)
        )
    cache["lengths"] = {name: jnp.zeros(slots, jnp.int32) for name in STACKS}
    return State(
        cache,
        token=jnp.zeros(slots, jnp.int32),
        made=jnp.zeros(slots, jnp.int32),
        limit=jnp.zeros(slots, jnp.int32),
        active=jnp.zeros(slots, bool),
        seen=jnp.zeros((slots, config.vocab_size), bool),
        stop_ids=jnp.full((slots, stops), NO_TOKEN, jnp.int32),
        settings=Rows(*(jnp.asarray(x) for x in rows([Sampling()] * slots, config.vocab_size))),
    )


@functools.partial(jax.jit, static_argnames=("config", "room", "drawn"), donate_argnames="state")
def _prefill(
    params: Any,
    state: State,
    batch: Any,
    slots: jax.Array,
    limit: jax.Array,
    stop_ids: jax.Array,
    settings: Rows,
    *,
    config: ModelConfig,
    room: int,
    drawn: bool,
) -> tuple[State, jax.Array, jax.Array]:
    """n prompts into `slots` [n]: (state, their first tokens [n], log-probabilities [n])."""
    scores, new = model.prefill(restack(params), batch, config, room)
    ids = jnp.where(batch["segment_ids"] > 0, batch["input_ids"], config.vocab_size)
    seen = jnp.zeros(scores.shape, bool)
    seen = seen.at[jnp.arange(len(ids))[:, None], ids].set(True, mode="drop")
    made = jnp.zeros_like(limit)
    fresh = State({}, made, made, limit, limit > 0, seen, stop_ids, settings)
    fresh, token, logprob = _advance(fresh, scores, drawn)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[slots].set(new)

    cache: dict[str, Any] = {"lengths": jax.tree.map(put, state.cache["lengths"], new["lengths"])}
    for name in STACKS:
        # What the slot held beyond these places comes later than any token that could look there.
        cache[name] = tuple(
            {k: x.at[slots, : new[name][k].shape[2]].set(new[name][k][i]) for k, x in own.items()}
            for i, own in enumerate(state.cache[name])
        )
    merged = jax.tree.map(put, state._replace(cache={}), fresh)
    return merged._replace(cache=cache), token, logprob


@functools.partial(
    jax.jit, static_argnames=("config", "chunk", "windows", "drawn"), donate_argnames="state"
)
def _decode(
    params: Any,
    state: State,
    keep: jax.Array,
    *,
    config: ModelConfig,
    chunk: int,
    windows: tuple[int, int],
    drawn: bool,
) -> tuple[State, jax.Array, jax.Array]:
    """Up to `chunk` tokens for the slots in `keep` [B]: (state, tokens, log-probabilities), both
    [B, chunk]. Only the first `windows` places of the caches are read."""
    whole = state.cache
    part = {
        name: jax.tree.map(lambda x, w=w: x[:, :w], whole[name])
        for name, w in zip(STACKS, windows, strict=True)
    }
    state = state._replace(cache=part | {"lengths": whole["lengths"]}, active=state.active & keep)
    shape = (len(state.token), chunk)

    def unfinished(carry: Any) -> jax.Array:
        i, state, _, _ = carry
        return (i < chunk) & jnp.any(state.active)

    def step(carry: Any) -> Any:
        i, state, tokens, logprobs = carry
        scores, cache = decode_step(params, state.token, state.cache, config)
        lengths = {  # a slot that is done stays as long as it is
            name: jnp.where(state.active, cache["lengths"][name], old)
            for name, old in state.cache["lengths"].items()
        }
        state, token, logprob = _advance(
            state._replace(cache=cache | {"lengths": lengths}), scores, drawn
        )
        return i + 1, state, tokens.at[:, i].set(token), logprobs.at[:, i].set(logprob)

    start = (0, state, jnp.full(shape, NO_TOKEN, jnp.int32), jnp.zeros(shape, jnp.float32))
    _, state, tokens, logprobs = jax.lax.while_loop(unfinished, step, start)
    cache = {"lengths": state.cache["lengths"]}
    for name in STACKS:
        cache[name] = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim),
            whole[name],
            state.cache[name],
        )
    return state._replace(cache=cache), tokens, logprobs


def _advance(state: State, scores: jax.Array, drawn: bool) -> tuple[State, jax.Array, jax.Array]:
    """Chooses the next token of every active slot; NO_TOKEN for the others."""
    token = choose(scores, state.seen, state.settings, state.made, drawn)
    chosen = jnp.take_along_axis(scores, token[:, None], axis=1)[:, 0]
    logprob = chosen - jax.nn.logsumexp(scores, axis=-1)
    made = state.made + state.active
    ended = jnp.any(token[:, None] == state.stop_ids, axis=1) | (made >= state.limit)
    shown = jnp.where(state.active, token, NO_TOKEN)
    seen = state.seen.at[jnp.arange(len(token)), token].max(state.active)
    state = state._replace(token=token, made=made, active=state.active & ~ended, seen=seen)
    return state, shown, logprob
