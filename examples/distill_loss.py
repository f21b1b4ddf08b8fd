"""A distillation loss of one's own: the cosine distance, and how far the lengths are apart.

Cosine leaves the norm free: the LLM's first norm hides it, but its residual stream keeps it. What a
loss gives is one float32 number per place; which places count, and how much, is not its business.

    hovle train --config=configs/stage1_distill.py:tiny --workdir=runs/cosine_norm \\
        --config.model.plugins="('examples/distill_loss.py',)" \\
        --config.distill.loss=cosine_norm ...
"""

import jax.numpy as jnp

from hovle_jax.losses import DISTANCES, cosine_distance


@DISTANCES.add("cosine_norm")
def cosine_norm(pred, target):
    """(prediction [..., E], target [..., E]) -> [...]."""
    pred, target = pred.astype(jnp.float32), target.astype(jnp.float32)
    lengths = (jnp.log(jnp.mean(x**2, axis=-1) + 1e-6) / 2 for x in (pred, target))
    return cosine_distance(pred, target) + 0.1 * jnp.square(next(lengths) - next(lengths))
