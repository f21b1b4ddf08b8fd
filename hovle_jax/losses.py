"""What loss terms are made of: the loss and the weight of every place, and their sums.

B rows   S length   E width   V vocabulary
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hovle_jax.config import IGNORE
from hovle_jax.sharding import gathered, part_of, per_shard

COSINE_EPS = 1e-6


def cosine_distance(pred: jax.Array, target: jax.Array) -> jax.Array:
    """1 - cos over the last axis, in float32: [...]."""
    pred, target = pred.astype(jnp.float32), target.astype(jnp.float32)
    dot = jnp.sum(pred * target, axis=-1)
    # rsqrt of the sum, not a norm: the gradient stays finite for a zero vector (padding).
    norms = jnp.sum(pred**2, axis=-1) * jnp.sum(target**2, axis=-1)
    return 1.0 - dot * jax.lax.rsqrt(norms + COSINE_EPS**2)


def sum_by_source(values: jax.Array, source_ids: jax.Array, sources: int) -> jax.Array:
    """Sums of `values` [B, S] over the places of each data source: float32 [sources]."""
    # Compare-and-sum fuses; a scatter-add does not on TPU.
    of_source = source_ids[..., None] == jnp.arange(sources)
    return jnp.sum(jnp.where(of_source, values.astype(jnp.float32)[..., None], 0.0), axis=(0, 1))


def next_token_weights(
    labels: jax.Array, loss_weight: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(targets, weights) [B, S] of predicting token i + 1 at place i.

    The last place and the last token of each segment predict nothing.
    """

    def shift(x: jax.Array, fill: float) -> jax.Array:
        return jnp.pad(x[:, 1:], ((0, 0), (0, 1)), constant_values=fill)

    targets = shift(labels, IGNORE)
    inside = (shift(segment_ids, 0) == segment_ids) & (segment_ids > 0)
    weights = jnp.where(inside & (targets != IGNORE), shift(loss_weight, 0.0), 0.0)
    return targets, weights.astype(jnp.float32)


def token_nll(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> jax.Array:
    """-log p(target) per place, float32 [B, S]; 0 where the target is IGNORE.

    hidden [B, S, E], head [E, V]. `weights` [B, S] says how the loss will weigh the places, up to
    one factor: the gradient is computed along with the loss, from the same scores, so how much each
    place matters must be known by then. A loss that weighs them otherwise has NaN for a gradient.

    Only `chunk` places per row have scores at any time: [B, S, V] is never made (92,553 words:
    1.5 GB per 4,096 tokens).
    """
    rows = functools.partial(_nll_rows, chunk=chunk, vocab=head.shape[1])
    places = ("batch", "length")
    axes = ((*places, "act_embed"), ("embed", "vocab"), places, places)
    return per_shard(rows, axes, places)(hidden, head.astype(hidden.dtype), targets, weights)


def _nll_rows(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int,
    vocab: int,
) -> jax.Array:
    """`token_nll` of one device's rows.

    The head is gathered once and its gradient reduced once, whatever the number of chunks.
    """
    b, s, e = hidden.shape
    head = gathered(head, "embed", 0, e)
    chunk = min(chunk, s)
    pad = -s % chunk
    weights = jnp.where(targets == IGNORE, 0.0, weights)

    def chunked(x: jax.Array, fill: float = 0) -> jax.Array:
        """[B, S, ...] -> [chunks, B * chunk, ...]"""
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        x = x.reshape(b, -1, chunk, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(x.shape[0], b * chunk, *x.shape[3:])

    nll = _nll(chunked(hidden), head, chunked(targets, IGNORE), chunked(weights), vocab)
    return nll.reshape(-1, b, chunk).swapaxes(0, 1).reshape(b, -1)[:, :s]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _nll(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, vocab: int
) -> jax.Array:
    """hidden [chunks, places, E], targets and weights [chunks, places] -> [chunks, places]."""
    return jax.lax.map(lambda x: _scores(x[0], head, x[1], vocab)[0], (hidden, targets))


def _scores(
    x: jax.Array, head: jax.Array, targets: jax.Array, vocab: int
) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """(nll [places], its gradient by the scores [places, V], when asked for)."""
    first, over_words = part_of("vocab", head.shape[1], vocab)
    # Compare-and-sum: a gather over the vocabulary is slow on TPU and its gradient a scatter.
    is_target = (first + jnp.arange(head.shape[1])) == targets[:, None]
    scores = jnp.matmul(x, head, preferred_element_type=jnp.float32)
    picked = over_words(jax.lax.psum, jnp.sum(jnp.where(is_target, scores, 0.0), axis=-1))
    top = over_words(jax.lax.pmax, jnp.max(scores, axis=-1))
    total = over_words(jax.lax.psum, jnp.sum(jnp.exp(scores - top[:, None]), axis=-1))
    log_total = top + jnp.log(total)
    nll = jnp.where(targets == IGNORE, 0.0, log_total - picked)
    return nll, lambda: jnp.exp(scores - log_total[:, None]) - is_target


def _nll_forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, vocab: int
) -> Any:
    def step(dhead: jax.Array, chunk: Any) -> Any:
        x, t, w = chunk
        nll, dscores = _scores(x, head, t, vocab)
        d = (dscores() * w[:, None]).astype(x.dtype)
        dx = jnp.matmul(d, head.T, preferred_element_type=jnp.float32)
        dhead += jnp.matmul(x.T, d, preferred_element_type=jnp.float32)
        return dhead, (nll, dx.astype(x.dtype))

    chunks = hidden, targets, weights
    zero = jnp.zeros(head.shape, jnp.float32)
    if hidden.shape[0] == 1:
        dhead, (nll, dx) = step(zero, jax.tree.map(lambda a: a[0], chunks))
        nll, dx = nll[None], dx[None]
    else:
        dhead, (nll, dx) = jax.lax.scan(step, zero, chunks)
    return nll, (dx, dhead.astype(head.dtype), targets, weights)


def _nll_backward(vocab: int, saved: Any, dnll: jax.Array) -> Any:
    dx, dhead, targets, weights = saved
    # What was split over the vocabulary gets a part of the gradient each; the parts make it whole.
    dnll = part_of("vocab", dhead.shape[1], vocab)[1](jax.lax.psum, dnll)
    dnll = jnp.where(targets == IGNORE, 0.0, dnll)
    factor = jnp.sum(dnll * weights) / jnp.maximum(jnp.sum(weights * weights), 1e-30)
    error = jnp.max(jnp.abs(dnll - factor * weights))
    factor = jnp.where(error <= 1e-3 * jnp.max(jnp.abs(factor * weights)), factor, jnp.nan)
    return (dx * factor).astype(dx.dtype), (dhead * factor).astype(dhead.dtype), None, None


_nll.defvjp(_nll_forward, _nll_backward)
