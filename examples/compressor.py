"""A token compressor: the mean of each block of `model.shuffle` x `model.shuffle` patches.

Tokens per tile follow in data, packing and generation from what it declares:

    hovle train --config=configs/stage1_distill.py:hovle_2b --workdir=runs/stage1 \
        --config.model.plugins="('examples/compressor.py',)" \
        --config.model.compressor=average_pool --config.model.shuffle=4 ...
"""

import flax.linen as nn

from hovle_jax.errors import UserError
from hovle_jax.nn.compressors import COMPRESSORS, Compressor, pixel_shuffle
from hovle_jax.nn.layers import Linear


@COMPRESSORS.add("average_pool")
class AveragePool(Compressor):
    @staticmethod
    def tokens_per_tile(c):
        if c.grid % c.shuffle:
            raise UserError(f"model.shuffle {c.shuffle} does not divide {c.grid} patches of a side")
        return (c.grid // c.shuffle) ** 2

    @staticmethod
    def params(c):
        return c.hidden_size**2

    @nn.compact
    def __call__(self, x):
        c = self.config
        blocks = pixel_shuffle(x, c.shuffle)  # [..., T, block * E]
        mean = blocks.reshape(*blocks.shape[:-1], -1, c.hidden_size).mean(axis=-2)
        return Linear((c.hidden_size,), ("mlp", "embed"), c.initializer_range, name="out")(mean)
