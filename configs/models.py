"""Model sizes that the stage configs share, by the name after the colon.

hovle_2b   HoVLE: 256 tokens per tile in all 32 layers      (released: 2,606,327,808 parameters)
hovle_hd   HoVLE-HD: 1,024 per tile in the 8 holistic layers
tiny       the same shape in miniature, for trying a pipeline on a laptop

Beyond the paper, as overrides in all three stages (docs/masks.md):

    --config.model.embedding.mask=bidirectional    tokens of one image see each other
    --config.model.embedding.positions=2d          and stand at rows and columns
"""

import dataclasses

from hovle_jax.config import LayersConfig, ModelConfig, TeacherConfig
from hovle_jax.errors import UserError

RELEASED = LayersConfig(rope_scaling="dynamic", rope_factor=2.0)
SMALL = LayersConfig(
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=192,
    initializer_range=0.1,
)

# remat and loss_chunk: what fits 16 GB chips with a row of 8,192 tokens each. Rows of 4,096, or
# more memory, take remat="products" and the loss in one piece: `hovle plan --search` finds out.
HOVLE_2B = ModelConfig(
    embedding=RELEASED,
    decoder=dataclasses.replace(RELEASED, num_layers=24),
    remat="mixed",
    loss_chunk=4096,
)
HOVLE_HD = dataclasses.replace(HOVLE_2B, name="hovle_hd", shuffle_loc="post")
TINY = dataclasses.replace(
    HOVLE_2B,
    name="tiny",
    embedding=SMALL,
    decoder=dataclasses.replace(SMALL, num_layers=4),
    image_size=56,
    initializer_range=0.1,
    dtype="float32",
    remat="none",
    loss_chunk=512,
)

MODELS = {"hovle_2b": HOVLE_2B, "hovle_hd": HOVLE_HD, "tiny": TINY}
TEACHERS = {
    "hovle_2b": TeacherConfig(),
    "hovle_hd": TeacherConfig(),
    "tiny": TeacherConfig(
        num_layers=3,
        hidden_size=64,
        num_heads=4,
        intermediate_size=192,
        image_size=56,
        out_size=64,
        initializer_range=0.1,
        dtype="float32",
    ),
}


def check(variant: str) -> None:
    if variant not in MODELS:
        raise UserError(f"--config: variant {variant!r} is not one of {', '.join(MODELS)}")
