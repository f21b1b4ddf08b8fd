"""From scores to the next token: greedy or drawn, with every row's own settings.

    B rows   V vocabulary

Settings act in the order of Hugging Face transformers: repetition penalty, temperature, top-k,
top-p, min-p. A row's draws depend on its seed and on how many tokens it has, on nothing else, so
they are the same in any slot of any batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.errors import UserError

Array = jax.Array | np.ndarray
REMOVED = -1e30  # finite: a row's scores stay comparable whatever was removed
MAX_SEED = 2**32 - 1
MAX_TOP = 20  # likeliest tokens that can be reported beside the one that was chosen


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen; the defaults are greedy."""

    temperature: float = 0.0  # 0 = the best token, whatever the fields below say of drawing
    top_k: int = 0  # draw from so many best tokens; 0 = all
    top_p: float = 1.0  # draw from the fewest best tokens that hold this probability
    min_p: float = 0.0  # leave out tokens less likely than this share of the best
    repetition_penalty: float = 1.0  # over 1: tokens of the prompt and the answer score lower
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, must in (
            ("temperature", 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "over 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "in 0.01 to 100"),
            ("seed", 0 <= self.seed <= MAX_SEED, f"between 0 and {MAX_SEED}"),
        ):
            if not ok:
                raise UserError(f"{name} must be {must}, not {getattr(self, name)}")


class Rows(NamedTuple):
    """The settings of B requests as arrays, [B] each."""

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array
    seed: Array


def rows(settings: Sequence[Sampling], vocab_size: int) -> Rows:
    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(s, name) for s in settings], dtype)

    top_k = np.array([min(s.top_k or vocab_size, vocab_size) for s in settings], np.int32)
    floats = ("temperature", "top_p", "min_p", "repetition_penalty")
    found = {name: column(name, np.float32) for name in floats}
    return Rows(top_k=top_k, seed=column("seed", np.uint32), **found)


def choose(
    scores: jax.Array, seen: jax.Array, settings: Rows, made: jax.Array, drawn: bool
) -> jax.Array:
    """Scores float32 [B, V] -> the next token of each row, int32 [B].

    seen: bool [B, V], the tokens of prompt and answer so far. made: int32 [B], tokens of the
    answer so far, which number the row's draws. drawn: False if no row draws.
    """
    penalty = settings.repetition_penalty[:, None]
    lower = jnp.where(scores > 0, scores / penalty, scores * penalty)
    scores = jnp.where(seen, lower, scores)
    best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    if not drawn:  # sorting a vocabulary costs more than a small model's whole step
        return best
    draws = settings.temperature > 0
    # Rows that do not draw pass through all the same: any finite temperature will do for them.
    kept = keep_likely(scores / jnp.where(draws, settings.temperature, 1.0)[:, None], settings)
    return jnp.where(draws, jax.vmap(_draw)(kept, settings.seed, made), best)


def keep_likely(scores: jax.Array, settings: Rows) -> jax.Array:
    """Scores [B, V] with all tokens outside top-k, top-p and min-p set to REMOVED."""
    ranked = jnp.sort(scores, axis=-1, descending=True)
    inside = jnp.arange(scores.shape[1]) < settings.top_k[:, None]
    likely = jax.nn.softmax(jnp.where(inside, ranked, REMOVED), axis=-1)
    before = jnp.cumsum(likely, axis=-1) - likely
    inside &= before < settings.top_p[:, None]  # always true of the best
    inside &= likely >= settings.min_p[:, None] * likely[:, :1]
    lowest = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores >= lowest, scores, REMOVED)


def _draw(scores: jax.Array, seed: Array, made: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), made)
    return jax.random.categorical(key, scores).astype(jnp.int32)
