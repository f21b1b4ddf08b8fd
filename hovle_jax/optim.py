"""Schedules, parameter groups and optimizers: optax's, with Adam's moments small if asked.

An entry of OPTIMIZERS turns gradients into steps of unit size; clipping before it and weight decay,
learning rates and groups after it are the same for all. State that lies in trees like the
parameters' is laid out over devices as they are (`train_step.state_shardings`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hovle_jax.config import GroupConfig, OptimConfig
from hovle_jax.errors import UserError
from hovle_jax.registry import Registry
from hovle_jax.tree import flatten, unflatten

OPTIMIZERS: Registry[Callable[[OptimConfig], optax.GradientTransformation]] = Registry(
    "config.optim.name"
)


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then cosine, constant, or wsd (constant, decay)."""
    warmup = round(config.warmup * steps)
    rest = max(steps - warmup, 1)
    end = config.end_lr / config.lr if config.lr else 0.0
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(config.lr, rest, alpha=end)
    elif config.schedule == "wsd":
        decay = max(round(config.decay * steps), 1)
        main = optax.linear_schedule(config.lr, config.end_lr, decay, rest - decay)
    else:
        main = optax.constant_schedule(config.lr)
    # Step 0 already moves: a warm-up that starts from exactly zero wastes it.
    ramp = optax.linear_schedule(config.lr / (warmup + 1), config.lr, warmup)
    return optax.join_schedules([ramp, main], [warmup])


def group_labels(groups: tuple[GroupConfig, ...], params: dict[str, Any]) -> dict[str, Any]:
    """Tree of group numbers; every parameter must match exactly one group's regex."""
    labels = {}
    for path in flatten(params):
        hits = [i for i, g in enumerate(groups) if re.fullmatch(g.regex, path)]
        if len(hits) != 1:
            found = ", ".join(repr(groups[i].regex) for i in hits) or "none"
            raise UserError(
                f"config.optim.groups: parameter {path} must match exactly one group, "
                f"matches {found}"
            )
        labels[path] = str(hits[0])
    return unflatten(labels)


def group_norms(config: OptimConfig, gradient: dict[str, Any]) -> dict[str, jax.Array]:
    """{name of the group: norm of its part of the gradient}; groups without parameters are left
    out."""
    parts: dict[str, list[jax.Array]] = {}
    labels = flatten(group_labels(config.groups, gradient))
    for path, x in flatten(gradient).items():
        parts.setdefault(config.group_names[int(labels[path])], []).append(x)
    return {name: optax.tree.norm(part) for name, part in parts.items()}


def make_optimizer(
    config: OptimConfig, steps: int, params: dict[str, Any]
) -> optax.GradientTransformation:
    """config.name over `params` (arrays or shapes): the trainable ones, nothing else.

    Its state is a tuple, of which the last is the schedule's count of steps.
    """
    per_group = {
        str(i): optax.chain(optax.add_decayed_weights(g.weight_decay), optax.scale(g.lr_scale))
        for i, g in enumerate(config.groups)
    }
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        OPTIMIZERS.find(config.name)(config),
        optax.partition(per_group, group_labels(config.groups, params)),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )


class ShortMoments(NamedTuple):
    """Adam's state with `moments: int8`; trees like the parameters."""

    step: jax.Array
    mu: Any  # int8: `encode`
    mu_scale: Any  # float32, size 1 along the axis that shares a scale
    nu: Any  # bfloat16


@OPTIMIZERS.add("adamw")
def scale_by_adam(config: OptimConfig) -> optax.GradientTransformation:
    """optax's, whose arithmetic stays in float32; between steps moments lie in `config.moments`.

    An update is made from moments that were not rounded yet.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.moments == "float32":
        return adam

    def pack(state: Any) -> Any:
        nu = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.nu)
        if config.moments == "bfloat16":
            mu = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.mu)
            return optax.ScaleByAdamState(state.count, mu, nu)
        coded = jax.tree.map(encode, state.mu)
        mu, scale = jax.tree.transpose(jax.tree.structure(state.mu), None, coded)
        return ShortMoments(state.count, mu, scale, nu)

    def unpack(state: Any) -> Any:
        nu = jax.tree.map(lambda x: x.astype(jnp.float32), state.nu)
        if isinstance(state, ShortMoments):
            mu = jax.tree.map(decode, state.mu, state.mu_scale)
            return optax.ScaleByAdamState(state.step, mu, nu)
        mu = jax.tree.map(lambda x: x.astype(jnp.float32), state.mu)
        return optax.ScaleByAdamState(state.count, mu, nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(updates, unpack(state), params)
        return updates, pack(state)

    return optax.GradientTransformation(lambda params: pack(adam.init(params)), update)


_TOP = 127
_PER_OCTAVE = 8  # levels from one power of two to the next


def encode(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 -> (int8 sign and level, float32 scale): within 4.5 %, down to 2^-15.7 of the scale.

    Levels are even in the logarithm, since moments of one row differ by orders of magnitude. The
    longest axis shares a scale: blocks of a shorter one would be cut by the mesh.
    """
    scale = jnp.max(jnp.abs(x), axis=x.shape.index(max(x.shape)), keepdims=True)
    level = jnp.round(_TOP + _PER_OCTAVE * jnp.log2(jnp.abs(x) / jnp.maximum(scale, 1e-38)))
    return (jnp.sign(x) * jnp.clip(level, 0, _TOP)).astype(jnp.int8), scale


def decode(code: jax.Array, scale: jax.Array) -> jax.Array:
    level = code.astype(jnp.float32)
    size = jnp.exp2((jnp.abs(level) - _TOP) / _PER_OCTAVE)
    return jnp.sign(level) * size * scale
