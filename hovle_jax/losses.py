"""What loss terms are made of: the loss and the weight of every place, and their sums.

B rows   S length   E width   V vocabulary
"""

from __future__ import annotations

import functools

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


def token_nll(hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
    """-log p(target) per place, float32 [B, S]; 0 where the target is IGNORE.

    hidden [B, S, E], head [E, V]. Only `chunk` places per row have scores at any time, forward and
    backward: [B, S, V] is never made (92,553 words: 1.5 GB per 4,096 tokens).
    """
    rows = functools.partial(_nll_rows, chunk=chunk, vocab=head.shape[1])
    axes = (("batch", "length", "act_embed"), ("embed", "vocab"), ("batch", "length"))
    return per_shard(rows, axes, ("batch", "length"))(hidden, head.astype(hidden.dtype), targets)


def _nll_rows(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, chunk: int, vocab: int
) -> jax.Array:
    """`token_nll` of one device's rows.

    The head is gathered once and its gradient reduced once, whatever the number of chunks.
    """
    b, s, e = hidden.shape
    head = gathered(head, "embed", 0, e)
    first, over_words = part_of("vocab", head.shape[1], vocab)
    words = first + jnp.arange(head.shape[1])
    chunk = min(chunk, s)
    pad = -s % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=IGNORE)
    n = (s + pad) // chunk

    @jax.checkpoint
    def nll(x: jax.Array, t: jax.Array) -> jax.Array:
        scores = jnp.matmul(x.reshape(-1, e), head, preferred_element_type=jnp.float32)
        scores = scores.reshape(b, chunk, -1)
        # Compare-and-sum: a gather over the vocabulary is slow on TPU and its gradient a scatter.
        picked = jnp.sum(jnp.where(words == t[..., None], scores, 0.0), axis=-1)
        top = over_words(jax.lax.pmax, jax.lax.stop_gradient(jnp.max(scores, axis=-1)))
        total = over_words(jax.lax.psum, jnp.sum(jnp.exp(scores - top[..., None]), axis=-1))
        return jnp.where(t == IGNORE, 0.0, jnp.log(total) + top - over_words(jax.lax.psum, picked))

    if n == 1:
        return nll(hidden, targets)[:, :s]
    xs = hidden.reshape(b, n, chunk, e).swapaxes(0, 1), targets.reshape(b, n, chunk).swapaxes(0, 1)
    _, out = jax.lax.scan(lambda _, x: (None, nll(*x)), None, xs)
    return out.swapaxes(0, 1).reshape(b, -1)[:, :s]
