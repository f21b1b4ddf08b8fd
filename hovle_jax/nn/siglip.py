"""SigLIP and SigLIP 2 (arXiv 2502.14786): a plain ViT with a learned position per patch.

No class token, no LayerScale, GELU by tanh, a final norm. Its pooling head is not used: features
are the patches after the norm.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from hovle_jax.config import TeacherConfig
from hovle_jax.nn.embedding import resize_positions
from hovle_jax.nn.layers import named
from hovle_jax.nn.vit import TEACHERS, encode, grid_of, own_features, patch_embedding


@TEACHERS.add("siglip")
class Siglip(nn.Module):
    config: TeacherConfig
    keep_hidden: bool = False

    @nn.compact
    def __call__(self, pixels: jax.Array) -> dict[str, jax.Array]:
        """[N, H, W, 3] -> {"hidden" [N, P, C], "features" [N, T, E]}; see `vit`."""
        c = self.config
        x = patch_embedding(pixels, c)
        init = named(nn.initializers.normal(c.initializer_range), "patch", "embed")
        table = self.param("position", init, (c.grid**2, c.hidden_size), jnp.float32)
        x = x + resize_positions(table, grid_of(pixels, c)).astype(x.dtype)
        x, out = encode(x, None, c, scaled=False, keep_hidden=self.keep_hidden)
        return out | {"features": own_features(x, c)}
