"""A vision teacher of one's own: histograms of edge directions, as MaskFeat predicts (2112.09133).

A teacher is a Linen module of a config that gives features per patch; this one has no parameters,
so no directory either. The student's grid may differ (features are resized to it), and so may its
width (the adaptor, a linear map that is trained along and thrown away).

    hovle train --config=configs/stage1_distill.py:hovle_2b --workdir=runs/edges \\
        --config.model.plugins="('examples/teacher.py',)" --config.teacher.kind=edges \\
        --config.teacher.shuffle=1 --config.teacher.out_size=11 --config.distill.adaptor=linear ...
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from hovle_jax.config import TeacherConfig
from hovle_jax.nn.embedding import normalize_pixels, patchify
from hovle_jax.nn.vit import TEACHERS

TURNS = np.arange(8) * np.pi / 4


@TEACHERS.add("edges")
class Edges(nn.Module):
    config: TeacherConfig
    keep_hidden: bool = False  # there are no layers whose states could be kept

    def __call__(self, pixels):
        """[N, H, W, 3] -> {"hidden" [N, P, 11], "features" [N, P, 11]}."""
        c = self.config
        x = patchify(normalize_pixels(pixels, c.dtype, c.mean, c.std), c.patch_size)
        grey = x.mean(-1)
        down, right = jnp.diff(grey, axis=-2)[..., :-1], jnp.diff(grey, axis=-1)[..., :-1, :]
        along = [jnp.maximum(down * np.sin(t) + right * np.cos(t), 0) for t in TURNS]
        histogram = jnp.stack(along, -1).mean((-3, -2))
        features = jnp.concatenate([histogram, x.mean((-3, -2))], axis=-1)
        return {"hidden": features, "features": features}
