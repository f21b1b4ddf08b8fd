"""Parameters of a stage's own: what its loss needs and the model does not have (`Stage.heads`).

They lie below heads/, start at random whatever a run starts from, always train, and are saved with
its state. Nothing that opens the work directory as a model sees them.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from hovle_jax.config import RunConfig
from hovle_jax.stages import get_stage
from hovle_jax.tree import unflatten

PREFIX = "heads/"
_AXES = {1: ("norm",), 2: ("embed", "mlp")}


def shapes(config: RunConfig) -> dict[str, Any]:
    """Nested dict of shapes, {} for most stages."""
    found = get_stage(config.stage).heads(config)
    return unflatten({PREFIX + k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in found.items()})


def axes(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """{path: names of its axes}: of a matrix (inputs, outputs), of a vector none is split."""
    found = get_stage(config.stage).heads(config)
    return {PREFIX + k: _AXES[len(shape)] for k, shape in found.items()}


def init(rng: jax.Array, config: RunConfig) -> dict[str, jax.Array]:
    """{path: float32}: matrices of variance 1 / inputs, vectors zero."""
    out = {}
    for i, (path, shape) in enumerate(sorted(get_stage(config.stage).heads(config).items())):
        std = 1 / math.sqrt(shape[0]) if len(shape) > 1 else 0.0
        out[PREFIX + path] = std * jax.random.normal(jax.random.fold_in(rng, i), shape)
    return out
