"""DINOv3's ViTs (arXiv 2508.10104): class and register tokens, rotary positions of the patches.

Positions are angles, not parameters: any image size that is a multiple of the patch size is its
own. LayerScale, no bias in k, a plain or a gated MLP, a final norm.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.config import TeacherConfig
from hovle_jax.nn.layers import named
from hovle_jax.nn.vit import TEACHERS, encode, grid_of, own_features, patch_embedding


def rotary_angles(grid: tuple[int, int], size: int, theta: float) -> np.ndarray:
    """float32 [rows * columns, size]: a quarter of a head turns by the row, the next by the column.

    Coordinates are those of patch centres, from -1 to 1 over the image whatever its size.
    """
    centres = [2 * (np.arange(n) + 0.5) / n - 1 for n in grid]
    places = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    frequencies = theta ** -(np.arange(size // 4) * 4 / size)
    quarter = (2 * np.pi * places * frequencies).reshape(len(places), -1)
    return np.concatenate([quarter, quarter], axis=-1).astype(np.float32)


@TEACHERS.add("dinov3")
class DinoV3(nn.Module):
    config: TeacherConfig
    keep_hidden: bool = False

    @nn.compact
    def __call__(self, pixels: jax.Array) -> dict[str, jax.Array]:
        """[N, H, W, 3] -> {"hidden" [N, 1 + registers + P, C], "features" [N, T, E]}; see `vit`."""
        c = self.config
        x = patch_embedding(pixels, c)
        init = named(nn.initializers.normal(c.initializer_range), "patch", "embed")
        prefix = self.param("class", init, (1, c.hidden_size), jnp.float32)
        if c.registers:
            registers = self.param("registers", init, (c.registers, c.hidden_size), jnp.float32)
            prefix = jnp.concatenate([prefix, registers])
        angles = rotary_angles(grid_of(pixels, c), c.hidden_size // c.num_heads, c.rope_theta)
        x, out = encode(
            x,
            prefix.astype(x.dtype),
            c,
            angles=(jnp.cos(angles), jnp.sin(angles)),
            keep_hidden=self.keep_hidden,
        )
        return out | {"features": own_features(x, c)}
