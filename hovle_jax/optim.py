"""Schedules, parameter groups and the optimizer, all from optax."""

from __future__ import annotations

import re
from typing import Any

import optax

from hovle_jax.config import GroupConfig, OptimConfig
from hovle_jax.errors import UserError
from hovle_jax.tree import flatten, unflatten


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


def make_optimizer(
    config: OptimConfig, steps: int, params: dict[str, Any]
) -> optax.GradientTransformation:
    """AdamW over `params` (arrays or shapes): the trainable ones, nothing else."""
    per_group = {
        str(i): optax.chain(optax.add_decayed_weights(g.weight_decay), optax.scale(g.lr_scale))
        for i, g in enumerate(config.groups)
    }
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.partition(per_group, group_labels(config.groups, params)),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )
