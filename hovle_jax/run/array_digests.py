"""A number per array that changes with every bit of it, whatever devices the array lies on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _mix(x: jax.Array) -> jax.Array:
    """A permutation of 32-bit words in which every bit moves about half of them (MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def digest(x: jax.Array) -> jax.Array:
    """uint32 []. Each element's bits are mixed with its place; the sum of integers is exact, so
    neither the order of summation nor the layout matters. One changed element always shows."""
    bits = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        here = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = place * jnp.uint32(size) + here
    return jnp.sum(_mix(bits ^ _mix(place)), dtype=jnp.uint32)


def digests(mesh: jax.sharding.Mesh) -> Callable[[Mapping[str, Any]], dict[str, dict[str, str]]]:
    """{path: array} -> {path: {device of this host: hexadecimal digits}}.

    A device makes its number from its own copy of what is replicated, so copies that differ give
    numbers that differ; parts of an array are summed over the devices that hold them.
    """
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    @functools.partial(jax.jit, out_shardings=whole)
    def compute(leaves: list[jax.Array]) -> jax.Array:
        return jnp.stack([digest(x) for x in leaves])

    def call(flat: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        found = compute(list(flat.values())).addressable_shards
        columns = {str(shard.device): np.asarray(shard.data) for shard in found}
        return {
            path: {device: f"{numbers[i]:08x}" for device, numbers in columns.items()}
            for i, path in enumerate(flat)
        }

    return call
