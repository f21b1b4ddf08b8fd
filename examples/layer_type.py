"""A layer type: minGRU (arXiv 2410.01201) in place of attention. All it remembers is one vector.

    h_t = (1 - z_t) h_{t-1} + z_t c_t,  z = sigmoid(x W_z),  c = x W_c,  y = h W_o

    hovle train --config=configs/stage1_distill.py:hovle_2b --workdir=runs/stage1 \
        --config.model.plugins="('examples/layer_type.py',)" \
        --config.model.embedding.layer_types="('min_gru', 'attention')" ...
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hovle_jax.nn.layers import LAYER_TYPES, Linear, Mixer, StateArray
from hovle_jax.nn.linear_attention import sample_begins


def _then(a, b):
    return a[0] * b[0], b[0] * a[1] + b[1]


@LAYER_TYPES.add("min_gru")
class MinGRU(Mixer):
    params = staticmethod(lambda c: 3 * c.hidden_size**2)

    @staticmethod
    def state(c, places):
        return {"h": StateArray((c.hidden_size,), ("act_embed",), "float32")}

    @nn.compact
    def __call__(self, x, inputs, cache):
        size, axes, std = self.config.hidden_size, ("embed", "mlp"), self.config.initializer_range
        z, c = (Linear((size,), axes, std, name=n)(x).astype(jnp.float32) for n in ("z", "c"))
        z = jnp.where(inputs.segment_ids[..., None] > 0, jax.nn.sigmoid(z), 0)  # padding: h stays
        keep, new = jnp.where(sample_begins(inputs.segment_ids)[..., None], 0, 1 - z), z * c
        if cache is not None:
            new = new.at[:, 0].add(keep[:, 0] * cache["h"])
        _, h = jax.lax.associative_scan(_then, (keep, new), axis=1)
        y = Linear((size,), ("mlp", "embed"), std, name="o")(h.astype(x.dtype))
        return y, {"h": h[:, -1]}
