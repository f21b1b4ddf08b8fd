"""InternViT, pixel shuffle and mlp1 into the LLM's input space: InternVL's vision half.

The tensors and the arithmetic are InternVL2's: pre-norm layers with LayerScale and full
attention, no final norm, class token dropped, then LayerNorm - linear - GELU - linear.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from hovle_jax.config import TeacherConfig
from hovle_jax.nn.compressors import pixel_shuffle
from hovle_jax.nn.embedding import resize_positions
from hovle_jax.nn.layers import Linear, named
from hovle_jax.nn.vit import TEACHERS, encode, gelu, grid_of, layer_norm, patch_embedding

MLP1_EPS = 1e-5  # torch's LayerNorm default, whatever the tower's own epsilon is


@TEACHERS.add("internvit")
class InternViT(nn.Module):
    config: TeacherConfig
    keep_hidden: bool = False

    @nn.compact
    def __call__(self, pixels: jax.Array) -> dict[str, jax.Array]:
        """[N, H, W, 3] -> {"hidden" [N, 1 + P, C], "features" [N, T, E]}; see `vit`."""
        c = self.config
        x = patch_embedding(pixels, c)
        init = named(nn.initializers.normal(c.initializer_range), "patch", "embed")
        class_token = self.param("class", init, (1, c.hidden_size), jnp.float32)
        table = self.param("position", init, (c.grid**2 + 1, c.hidden_size), jnp.float32)
        x = x + resize_positions(table[1:], grid_of(pixels, c)).astype(x.dtype)
        prefix = (class_token + table[:1]).astype(x.dtype)
        x, out = encode(x, prefix, c, keep_hidden=self.keep_hidden)
        return out | {"features": self._mlp1(x)}

    def _mlp1(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = pixel_shuffle(x, c.shuffle, c.shuffle_version)
        x = layer_norm(MLP1_EPS, "mlp1_norm")(x).astype(x.dtype)
        x = Linear(
            (c.out_size,), ("embed", "mlp"), c.initializer_range, bias=True, name="mlp1_fc1"
        )(x)
        x = gelu(x)
        return Linear(
            (c.out_size,), ("mlp", "embed"), c.initializer_range, bias=True, name="mlp1_fc2"
        )(x)
