"""An MLP of one's own: experts per modality, as in Mono-InternVL (arXiv 2410.08202) and EVEv2.

Image tokens go through one SwiGLU, text through another. In training both are computed for every
token and one is taken, at twice the MLP's cost; generated text has only its own.

    hovle train --config=configs/stage1_distill.py:hovle_2b --workdir=runs/stage1 \
        --config.model.plugins="('examples/modality_experts.py',)" \
        --config.model.embedding.mlp=modality_experts ...
"""

import flax.linen as nn
import jax.numpy as jnp

from hovle_jax.nn.layers import MLP, MLPS, SwiGLU


@MLPS.add("modality_experts")
class ModalityExperts(MLP):
    images = True  # inputs.is_image is there
    params = staticmethod(lambda c: 2 * SwiGLU.params(c))

    @nn.compact
    def __call__(self, x, inputs):
        names = ("text_expert", "image_expert")
        text, image = (SwiGLU(self.config, name=name)(x, inputs) for name in names)
        return jnp.where(inputs.is_image[..., None], image, text)
