"""Token vectors, and how devices that share the columns of a table look rows up in it.

V rows of the table   E columns   B rows of a batch   S tokens
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from hovle_jax.config import ModelConfig
from hovle_jax.nn.layers import named
from hovle_jax.sharding import exchanged, gathered, groups, per_shard, split

LANES = 128  # of a TPU register: a row of fewer columns costs as much to look up


class TextTable(nn.Module):
    """Token vectors; ids past the table read the special-token table or, without one, row 0.

    (Row 0 is what the reference reads there; `data.samples.check_tokenizer` refuses such ids.)
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        c = self.config
        rows, width = c.text_rows, c.hidden_size
        init = named(nn.initializers.normal(c.initializer_range), "vocab", "embed")
        table = self.param("table", init, (rows, width), jnp.float32)
        x = look_up(table, jnp.where(ids < rows, ids, 0), c.dtype)
        if c.special_tokens:
            special = self.param("special_table", init, (c.special_tokens, width), jnp.float32)
            extra = look_up(special, jnp.clip(ids - rows, 0, c.special_tokens - 1), c.dtype)
            x = jnp.where((ids >= rows)[..., None], extra, x)
        return x


def look_up(table: jax.Array, ids: jax.Array, dtype: str) -> jax.Array:
    """Rows `ids` [B, S] of a table [V, E]: [B, S, E].

    Left to the compiler, each device looks up the tokens of all devices in the columns it has: on
    256 devices a million rows of 8 columns, and adds as many up for the gradient. Here as many
    neighbours as fill a register put their columns together; of every such group one device
    answers for a token. The gradient is summed in float32 on a device, in `dtype` over devices.
    """
    (rows, width), places = table.shape, ("batch", "length")
    ways = split("embed", width)
    near, across = groups(ways, at_least=ways * min(LANES, width) / width)
    parts = math.prod(map(split, places, ids.shape))
    if len(near[0]) == 1 or parts % ways:  # wide enough; ids that are whole everywhere
        return jnp.take(table, ids, axis=0).astype(dtype)

    def on_one_device(table: jax.Array, ids: jax.Array) -> tuple[jax.Array]:
        table = gathered(table, "embed", 1, width // len(near), near)
        table = gathered(table, "vocab", 0, rows).astype(jnp.float32)  # so is its gradient
        ids = gathered(ids[None], "embed", 0, len(near), across)
        x = jnp.take(table, ids, axis=0).astype(dtype)  # of many devices, in some columns
        return (exchanged(x, "embed", 0, 3, across)[0],)

    outs = [((*places, "act_embed"), (*ids.shape, width))]
    return per_shard(on_one_device, (("vocab", "embed"), places), outs)(table.astype(dtype), ids)[0]
