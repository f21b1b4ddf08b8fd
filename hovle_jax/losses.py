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
from hovle_jax.registry import Registry
from hovle_jax.sharding import constrain, gathered, part_of, per_shard, split

COSINE_EPS = 1e-6

# Distances of stage I: (prediction [..., E], target [..., E]) -> float32 [...].
DISTANCES: Registry[Callable[[jax.Array, jax.Array], jax.Array]] = Registry("config.distill.loss")


@DISTANCES.add("cosine")
def cosine_distance(pred: jax.Array, target: jax.Array) -> jax.Array:
    """1 - cos over the last axis, in float32: [...]."""
    pred, target = pred.astype(jnp.float32), target.astype(jnp.float32)
    dot = jnp.sum(pred * target, axis=-1)
    # rsqrt of the sum, not a norm: the gradient stays finite for a zero vector (padding).
    norms = jnp.sum(pred**2, axis=-1) * jnp.sum(target**2, axis=-1)
    return 1.0 - dot * jax.lax.rsqrt(norms + COSINE_EPS**2)


@DISTANCES.add("mse")
def squared_error(pred: jax.Array, target: jax.Array) -> jax.Array:
    """Mean of the squares over the last axis, in float32: [...]."""
    return jnp.mean((pred.astype(jnp.float32) - target.astype(jnp.float32)) ** 2, axis=-1)


@DISTANCES.add("smooth_l1")
def smooth_l1(pred: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over the last axis of x^2 / 2 up to 1 and of |x| - 1/2 beyond: [...]."""
    error = jnp.abs(pred.astype(jnp.float32) - target.astype(jnp.float32))
    return jnp.mean(jnp.where(error < 1, 0.5 * error**2, error - 0.5), axis=-1)


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
    return _nll(hidden, head.astype(hidden.dtype), targets, weights, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _nll(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> jax.Array:
    return _on_all_devices(hidden, head, targets, weights, chunk, False)[0]


def _nll_forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> Any:
    weights = jnp.where(targets == IGNORE, 0.0, weights)
    nll, *gradients = _on_all_devices(hidden, head, targets, weights, chunk, True)
    return nll, (gradients, targets, weights)


def _nll_backward(_: int, saved: Any, dnll: jax.Array) -> Any:
    gradients, targets, weights = saved
    dnll = jnp.where(targets == IGNORE, 0.0, dnll)
    factor = jnp.sum(dnll * weights) / jnp.maximum(jnp.sum(weights * weights), 1e-30)
    error = jnp.max(jnp.abs(dnll - factor * weights))
    factor = jnp.where(error <= 1e-3 * jnp.max(jnp.abs(factor * weights)), factor, jnp.nan)
    dhidden, dhead = ((g * factor).astype(g.dtype) for g in gradients)
    return dhidden, dhead, None, None


_nll.defvjp(_nll_forward, _nll_backward)


def _on_all_devices(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
    gradient: bool,
) -> tuple[jax.Array, ...]:
    """(nll,) and, if asked for, the weighted sum's gradients by hidden and head.

    The head is gathered once and its gradient reduced once, whatever the number of chunks.
    """
    places = ("batch", "length")
    axes = ((*places, "act_embed"), ("embed", "vocab"), places, places)
    parts = tuple(map(split, places, targets.shape))
    outs = [
        (places, targets.shape),
        (axes[0], hidden.shape),
        ((*places, "act_embed", "vocab"), (*parts, *head.shape)),
    ]
    run = functools.partial(_on_one_device, chunk=chunk, whole=(hidden.shape, head.shape))
    one = functools.partial(run, gradient=gradient)
    run_all = per_shard(one, axes, outs if gradient else outs[:1])
    nll, *gradients = run_all(hidden, head, targets, weights)
    if not gradient:
        return (nll,)
    dhidden, dheads = gradients
    dhead = constrain(jnp.sum(dheads, axis=(0, 1)), *axes[1])
    # The layers' backward pass waits for the sum over devices. Else the compiler leaves it for the
    # end of the step, with nothing to compute beside; so it hides behind the product of dhidden.
    return nll, *jax.lax.optimization_barrier((dhidden, dhead))


def _on_one_device(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int,
    whole: tuple[tuple[int, ...], tuple[int, ...]],
    gradient: bool,
) -> tuple[jax.Array, ...]:
    """(nll [b, s],) and gradients by hidden [b, s, E] and, of these places, head [1, 1, E, v]."""
    (_, _, width), (_, vocab) = whole
    b, s = targets.shape
    head = gathered(head, "embed", 0, width)
    chunk = min(chunk, s)
    pad = -s % chunk

    def chunked(x: jax.Array, fill: float = 0) -> jax.Array:
        """[B, S, ...] -> [chunks, B * chunk, ...]"""
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        x = x.reshape(b, -1, chunk, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(x.shape[0], b * chunk, *x.shape[3:])

    def unchunked(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, b, chunk, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(b, -1, *x.shape[3:])[:, :s]

    def step(dhead: jax.Array | None, part: Any) -> Any:
        x, t, w = part
        nll, dscores = _scores(x, head, t, vocab)
        if not gradient:
            return None, (nll,)
        d = (dscores() * w[:, None]).astype(x.dtype)
        dx = jnp.matmul(d, head.T, preferred_element_type=jnp.float32).astype(x.dtype)
        product = jnp.matmul(x.T, d, preferred_element_type=jnp.float32)
        return (product if dhead is None else dhead + product), (nll, dx)

    parts = chunked(hidden), chunked(targets, IGNORE), chunked(weights)
    if len(parts[0]) == 1:
        dhead, out = step(None, jax.tree.map(lambda x: x[0], parts))
        out = jax.tree.map(lambda x: x[None], out)
    else:
        zero = jnp.zeros(head.shape, jnp.float32) if gradient else None
        dhead, out = jax.lax.scan(step, zero, parts)
    nll, *dhidden = (unchunked(x) for x in out)
    if not gradient:
        return (nll,)
    _, over_words = part_of("vocab", head.shape[1], vocab)
    return nll, over_words(jax.lax.psum, dhidden[0]), dhead.astype(head.dtype)[None, None]


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
