"""A HoVLE small enough to compile in seconds: 4 tokens (16 patches) per tile, 97 words."""

from hovle_jax.config import LayersConfig, ModelConfig

LAYERS = LayersConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=512,
)
PRE = ModelConfig(
    name="small",
    vocab_size=97,
    embedding=LAYERS,
    decoder=LAYERS,
    image_size=28,
    patch_size=7,
    im_end_id=86,
    img_start_id=88,
    img_end_id=89,
    img_context_id=90,
    dtype="float32",
    remat="none",
    loss_chunk=16,
)
