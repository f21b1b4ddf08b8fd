"""An optimizer of one's own: Lion (arXiv 2302.06675), one moment and half of AdamW's memory.

An entry turns gradients into steps; clipping, weight decay, groups and schedule stay as they are.
Its steps are signs, so learning rates are three to ten times lower, weight decay higher by that.

    hovle train --config=configs/stage1_distill.py:tiny --workdir=runs/lion \\
        --config.model.plugins="('examples/optimizer.py',)" --config.optim.name=lion \\
        --config.optim.lr=1e-4 --config.optim.b2=0.99 ...
"""

import optax

from hovle_jax.optim import OPTIMIZERS


@OPTIMIZERS.add("lion")
def lion(config):
    return optax.scale_by_lion(config.b1, config.b2)
