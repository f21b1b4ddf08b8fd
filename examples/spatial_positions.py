"""A position scheme of one's own: time for everything, row and column for image tokens alone.

What it shows: a scheme says how far a tile moves the index, and what each axis counts (here as NEO
does: text has no row and no column, so a third of each head tells it nothing).

    hovle train --config=configs/stage1_distill.py:tiny --workdir=runs/spatial \
        --config.model.plugins="('examples/spatial_positions.py',)" \
        --config.model.embedding.positions=spatial
"""

from hovle_jax.nn.positions import POSITIONS, Scheme

POSITIONS.add("spatial")(
    Scheme(
        span=lambda grid: 1,  # all tokens of a tile are of one time
        coordinates=lambda index, tokens: (index, tokens.row, tokens.column),
    )
)
