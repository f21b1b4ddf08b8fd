"""The demo's configs: a HoVLE small enough for two CPU cores, one RunConfig per stage."""

from __future__ import annotations

from hovle_jax.config import (
    DataConfig,
    GroupConfig,
    InitConfig,
    LayersConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TeacherConfig,
)
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.demo.digits import CANVAS

WIDTH = 64
INIT = 0.1
PATCH = 4  # 8 x 8 patches per canvas, shuffled into 4 x 4 tokens
TEACHER_PATCH = 8  # 4 x 4 tokens at once: a quarter of the cost on a CPU


def _layers(num_layers: int) -> LayersConfig:
    return LayersConfig(
        num_layers=num_layers,
        hidden_size=WIDTH,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=3 * WIDTH,
        rope_theta=10_000.0,
        initializer_range=INIT,
        max_positions=1024,
    )


def model_config(tokenizer: Tokenizer) -> ModelConfig:
    """2 holistic + 4 LLM layers with the tokenizer's vocabulary and ids."""
    return ModelConfig(
        name="digits",
        embedding=_layers(2),
        decoder=_layers(4),
        image_size=CANVAS,
        patch_size=PATCH,
        **tokenizer.model_fields(),
        initializer_range=INIT,
        dtype="float32",
        remat="none",
    )


def teacher_config() -> TeacherConfig:
    return TeacherConfig(
        num_layers=3,
        hidden_size=WIDTH,
        num_heads=4,
        intermediate_size=3 * WIDTH,
        image_size=CANVAS,
        patch_size=TEACHER_PATCH,
        shuffle=1,
        out_size=WIDTH,
        initializer_range=INIT,
        dtype="float32",
    )


STEPS = {"distill": 1000, "align": 120, "instruct": 850}
LEARNING_RATES = {"distill": 3e-3, "align": 3e-3, "instruct": 1e-3}


def stage_config(
    stage: str,
    model: ModelConfig,
    *,
    seed: int,
    tokenizer: str,
    init: InitConfig,
    meta: str = "",
    images: tuple[str, ...] = (),
) -> RunConfig:
    """One stage of the demo."""
    return RunConfig(
        stage=stage,
        steps=STEPS[stage],
        seed=seed,
        log_every=100,
        save_every=0,
        keep=1,
        model=model,
        teacher=teacher_config(),
        data=DataConfig(
            meta=meta,
            images=images,
            tokenizer=tokenizer,
            system="",
            rows=32,
            tokens=72,
            tiles=2,
            max_tiles=1,
            window=256,
        ),
        optim=OptimConfig(
            lr=LEARNING_RATES[stage],
            end_lr=1e-5,
            warmup=0.05,
            groups=(
                GroupConfig(r".*/(kernel|\w*table|position)", 1.0, 0.01, "matrices"),
                GroupConfig(r".*/(scale|bias)", 1.0, 0.0, "vectors"),
            ),
        ),
        init=init,
    )
