"""The slots of continuous batching on the device, and the compiled functions that change them.

    B slots   M tokens a slot holds   n prompts at once   S, N their tokens and tiles   V vocabulary

`prefill` writes whole prompts into slots. `prefill_prefix` and `resume` do it in two parts, so that
the first, with the images, can be kept for the next question about them. `decode` extends all slots
by up to `chunk` tokens in one loop. Under a mesh, slots lie along its batch axes and heads along
`tensor`; without one, everything lies on one device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hovle_jax import model
from hovle_jax.config import ModelConfig
from hovle_jax.generation.decode import STACKS, decode_step, restack
from hovle_jax.generation.sampling import MAX_TOP, Array, Rows, Sampling, choose, rows
from hovle_jax.nn.stack import (
    StateArray,
    as_kept,
    empty_cache,
    map_states,
    pad_places,
    places_of,
    take_apart,
)
from hovle_jax.sharding import constrain

NO_TOKEN = -1


class State(NamedTuple):
    """Everything about the slots that lives on the device."""

    cache: model.Cache  # of layers apart (`decode`); int8 with scales if asked for
    token: Array  # int32 [B], the last of each answer, not yet in the cache
    made: jax.Array  # int32 [B], tokens of each answer
    limit: Array  # int32 [B]
    active: Array  # bool [B]
    seen: jax.Array  # bool [B, V]
    stop_ids: Array  # int32 [B, K], NO_TOKEN where a request has fewer
    settings: Rows


class Made(NamedTuple):
    """New tokens of slots, [..., T] over what is made at once."""

    token: Array  # int32; NO_TOKEN where a slot is done
    logprob: Array  # float32, natural, of the model's scores before any sampling setting
    best: Array  # int32 [..., T, top], the likeliest tokens of those scores
    best_logprob: Array


class Start(NamedTuple):
    """n requests that enter slots."""

    slots: Array  # int32 [n]
    ids: Array  # int32 [n, S] whole prompts, V where there is none (padding)
    limit: Array  # int32 [n]
    stop_ids: Array  # int32 [n, K]
    settings: Rows


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty(
    config: ModelConfig,
    slots: int,
    stops: int,
    capacity: tuple[tuple[str, int], ...],
    int8: bool,
) -> State:
    cache: dict[str, Any] = {}
    for name, size in capacity:
        cache[name] = empty_cache(config.stacks[name], slots, size, config.dtype, int8=int8)
    cache["lengths"] = {name: jnp.zeros(slots, jnp.int32) for name in model.length_names(config)}
    return _pinned(
        config,
        State(
            cache,
            token=jnp.zeros(slots, jnp.int32),
            made=jnp.zeros(slots, jnp.int32),
            limit=jnp.zeros(slots, jnp.int32),
            active=jnp.zeros(slots, bool),
            seen=jnp.zeros((slots, config.vocab_size), bool),
            stop_ids=jnp.full((slots, stops), NO_TOKEN, jnp.int32),
            settings=Rows(*(jnp.asarray(x) for x in rows([Sampling()] * slots, config.vocab_size))),
        ),
    )


@functools.partial(
    jax.jit, static_argnames=("config", "room", "drawn", "top"), donate_argnames="state"
)
def prefill(
    params: Any,
    state: State,
    batch: Any,
    start: Start,
    *,
    config: ModelConfig,
    room: int,
    drawn: bool,
    top: bool,
) -> tuple[State, Made]:
    """n prompts into their slots; their first tokens, [n, 1]."""
    scores, new = model.prefill(restack(params, config), batch, config, room)
    return _enter(config, state, start, scores, new, drawn, top)


@functools.partial(jax.jit, static_argnames=("config", "room"))
def prefill_prefix(params: Any, batch: Any, *, config: ModelConfig, room: int) -> model.Cache:
    """The cache of the first part of a prompt, [L, 1, ...]."""
    cache = model.prefill(restack(params, config), batch, config, room)[1]

    def pin(array: StateArray, x: jax.Array) -> jax.Array:
        return constrain(x, "layers", "batch", *array.axes)

    return cache | {name: map_states(c, pin, cache[name]) for name, c in config.stacks.items()}


@functools.partial(jax.jit, static_argnames=("config", "drawn", "top"), donate_argnames="state")
def resume(
    params: Any,
    state: State,
    prefixes: tuple[model.Cache, ...],
    ids: jax.Array,
    counts: jax.Array,
    start: Start,
    *,
    config: ModelConfig,
    drawn: bool,
    top: bool,
) -> tuple[State, Made]:
    """As `prefill`, of prompts whose first parts are computed: `ids` [n, S] are the rest, of which
    `counts` [n] count."""
    cache: dict[str, Any] = {}
    for name, c in config.stacks.items():
        parts = [p[name] for p in prefixes]
        whole = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
        cache[name] = pad_places(c, whole, places_of(c, whole) + ids.shape[1])
    lengths = [p["lengths"] for p in prefixes]
    cache["lengths"] = jax.tree.map(lambda *x: jnp.concatenate(x), *lengths)
    scores, new = model.extend(restack(params, config), ids, counts, cache, config)
    return _enter(config, state, start, scores, new, drawn, top)


def _enter(
    config: ModelConfig,
    state: State,
    start: Start,
    scores: jax.Array,
    new: Any,
    drawn: bool,
    top: bool,
) -> tuple[State, Made]:
    """Puts the caches [L, n, ...] of prompts into slots and chooses their first tokens."""
    seen = jnp.zeros(scores.shape, bool)
    seen = seen.at[jnp.arange(len(start.ids))[:, None], start.ids].set(True, mode="drop")
    none = jnp.zeros_like(start.limit)
    fresh = State(
        {}, none, none, start.limit, start.limit > 0, seen, start.stop_ids, start.settings
    )
    fresh, made = _advance(fresh, scores, drawn, top)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[start.slots].set(new)

    def put_state(array: StateArray, old: jax.Array, new: jax.Array) -> jax.Array:
        if not array.grows:
            return put(old, new)
        # Places past the slot's end are padding. What the slot held beyond the new places comes
        # later than any token that could look there.
        new = new[:, : old.shape[1]]
        return old.at[start.slots, : new.shape[1]].set(new)

    cache: dict[str, Any] = {"lengths": jax.tree.map(put, state.cache["lengths"], new["lengths"])}
    for name, c in config.stacks.items():
        old = state.cache[name]
        entering = tuple(
            as_kept(before, layer) for before, layer in zip(old, take_apart(new[name]), strict=True)
        )
        cache[name] = map_states(c, put_state, old, entering)
    merged = jax.tree.map(put, state._replace(cache={}), fresh)
    made = jax.tree.map(lambda x: x[:, None], made)
    return _pinned(config, merged._replace(cache=cache)), _everywhere(made)


@functools.partial(
    jax.jit, static_argnames=("config", "chunk", "windows", "drawn", "top"), donate_argnames="state"
)
def decode(
    params: Any,
    state: State,
    keep: jax.Array,
    *,
    config: ModelConfig,
    chunk: int,
    windows: tuple[int, int],
    drawn: bool,
    top: bool,
) -> tuple[State, Made]:
    """Up to `chunk` tokens for the slots in `keep` [B]: [B, chunk]. Only the first `windows` places
    of the caches are read."""
    whole = state.cache
    part = {
        name: map_states(c, lambda s, x, w=w: x[:, :w] if s.grows else x, whole[name])
        for (name, c), w in zip(config.stacks.items(), windows, strict=True)
    }
    state = state._replace(cache=part | {"lengths": whole["lengths"]}, active=state.active & keep)
    blank = _blank(len(state.token), config.vocab_size, top)
    blank = jax.tree.map(lambda x: jnp.repeat(x[:, None], chunk, axis=1), blank)

    def unfinished(carry: Any) -> jax.Array:
        i, state, _ = carry
        return (i < chunk) & jnp.any(state.active)

    def step(carry: Any) -> Any:
        i, state, made = carry
        scores, cache = decode_step(params, state.token, state.cache, config)
        lengths = {  # a slot that is done stays as long as it is
            name: jnp.where(state.active, cache["lengths"][name], old)
            for name, old in state.cache["lengths"].items()
        }
        state = state._replace(cache=cache | {"lengths": lengths})
        state, new = _advance(state, scores, drawn, top)
        return i + 1, state, jax.tree.map(lambda old, x: old.at[:, i].set(x), made, new)

    _, state, made = jax.lax.while_loop(unfinished, step, (0, state, blank))
    cache = {"lengths": state.cache["lengths"]}
    for name in STACKS:
        cache[name] = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim),
            whole[name],
            state.cache[name],
        )
    return _pinned(config, state._replace(cache=cache)), _everywhere(made)


def _advance(state: State, scores: jax.Array, drawn: bool, top: bool) -> tuple[State, Made]:
    """Chooses the next token of every active slot; NO_TOKEN for the others."""
    token = choose(scores, state.seen, state.settings, state.made, drawn)
    chosen = jnp.take_along_axis(scores, token[:, None], axis=1)[:, 0]
    total = jax.nn.logsumexp(scores, axis=-1)
    new = _blank(len(token), scores.shape[1], top)._replace(
        token=jnp.where(state.active, token, NO_TOKEN), logprob=_negative(chosen - total)
    )
    if top:
        best, index = jax.lax.top_k(scores, new.best.shape[1])
        new = new._replace(best=index, best_logprob=_negative(best - total[:, None]))
    made = state.made + state.active
    ended = jnp.any(token[:, None] == state.stop_ids, axis=1) | (made >= state.limit)
    seen = state.seen.at[jnp.arange(len(token)), token].max(state.active)
    state = state._replace(token=token, made=made, active=state.active & ~ended, seen=seen)
    return state, new


def _negative(logprob: jax.Array) -> jax.Array:
    """A certain token's could be over 0 by rounding."""
    return jnp.minimum(logprob, 0.0)


def _blank(slots: int, vocab_size: int, top: bool) -> Made:
    shape = slots, min(MAX_TOP, vocab_size) if top else 0
    return Made(
        jnp.full(slots, NO_TOKEN, jnp.int32),
        jnp.zeros(slots, jnp.float32),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, jnp.float32),
    )


def _pinned(config: ModelConfig, state: State) -> State:
    """The one layout of the slots over a mesh, whatever the compiler would choose."""

    def pin(array: StateArray, x: jax.Array) -> jax.Array:
        return constrain(x, "batch", *array.axes)

    cache = {name: map_states(c, pin, state.cache[name]) for name, c in config.stacks.items()}
    cache["lengths"] = state.cache["lengths"]
    rest = jax.tree.map(
        lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)),
        (cache["lengths"], state._replace(cache={})),
    )
    return rest[1]._replace(cache=cache | {"lengths": rest[0]})


def _everywhere(made: Made) -> Made:
    """Whole on every device: the host reads it."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), made)
