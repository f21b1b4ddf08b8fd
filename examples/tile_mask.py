"""A mask of one's own: image tokens see all of their own tile, and other tiles only before it.

What it shows: a mask says of each token how far it sees. `Tokens` has what the ids tell of images,
and `until` the place of the next token of some kind.

    hovle train --config=configs/stage1_distill.py:tiny --workdir=runs/tile_mask \
        --config.model.plugins="('examples/tile_mask.py',)" --config.model.embedding.mask=tile
"""

import jax.numpy as jnp

from hovle_jax.nn.masks import MASKS


@MASKS.add("tile")
def tile(tokens):
    last = tokens.in_tile == tokens.tile - 1
    return jnp.where(tokens.is_image, tokens.until(last), tokens.place)
