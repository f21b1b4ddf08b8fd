"""What an engine holds on each device, summed up before it takes it."""

from __future__ import annotations

import math
from typing import Any

import jax

from hovle_jax import sharding
from hovle_jax.config import ModelConfig
from hovle_jax.errors import UserError
from hovle_jax.generation import slots as device
from hovle_jax.generation.decode import STACKS
from hovle_jax.nn.layers import StateArray
from hovle_jax.nn.stack import map_states

GIB = 2.0**30


def check_memory(params: Any, config: ModelConfig, state: device.State, prefix_bytes: int) -> None:
    """Refuses what cannot fit: a server would otherwise start, and end with its first long prompt.

    What prefill and decoding need besides is not counted. Where a device does not say how much
    memory it has (CPU), nothing is checked. Call under the engine's mesh.

    params: as `decode.compute_params` gives them. state: shapes of the slots (`slots.empty`).
    """
    limit = limit_of(jax.tree.leaves(params)[0])
    whole, own = cache_bytes(config, state)
    # A kept image is one row, which all groups of devices have that share the slots.
    share = own * sharding.split("batch", len(state.token)) / max(whole, 1)
    parts = {
        "weights": _held(params),
        "their layers again while prompts are prefilled": _held(
            [params[name]["layers"] for name in STACKS]
        ),
        f"{len(state.token)} slots": own,
        "images read before": prefix_bytes * share,
    }
    total = sum(parts.values())
    if limit and total > limit:
        listed = ", ".join(f"{what} {size / GIB:.2f}" for what, size in parts.items())
        raise UserError(
            f"answering takes {total / GIB:.2f} GiB of each device, which has {limit / GIB:.2f}: "
            f"{listed}; give fewer --slots, a shorter --context, --int8-weights, --int8-kv, a "
            "smaller --prefix-mib or more devices by --mesh"
        )


def limit_of(array: jax.Array) -> int:
    """Bytes that a device of an array lets programs use; 0 where it does not say."""
    first: Any = next(iter(array.sharding.addressable_devices))
    return int((first.memory_stats() or {}).get("bytes_limit", 0))


def cache_bytes(config: ModelConfig, state: device.State) -> tuple[int, float]:
    """(of all slots, of those that a device holds)."""
    sizes: list[tuple[int, float]] = []

    def look(array: StateArray, x: Any) -> Any:
        size = math.prod(x.shape) * x.dtype.itemsize
        axes = zip(("batch", *array.axes), x.shape, strict=True)
        sizes.append((size, size / math.prod(sharding.split(axis, n) for axis, n in axes)))
        return x

    for name, c in config.stacks.items():
        map_states(c, look, state.cache[name])
    return sum(whole for whole, _ in sizes), sum(own for _, own in sizes)


def _held(params: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(params)
    )
