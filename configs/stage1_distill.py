"""Stage I: distil the holistic embedding module from a vision teacher and the LLM's text table.

    hovle train --config=configs/stage1_distill.py:hovle_2b --workdir=/bucket/stage1 \\
        --config.data.images="('/bucket/images',)" --config.data.tokenizer=TOKENIZER_DIR \\
        --config.init.llm=LLM_DIR --config.init.teacher=TEACHER_DIR

Expected: loss/text falls below 0.05 within the first thousand steps (a near-identity task),
loss/image keeps falling to the end. The recipe is our proposal (docs/stages.md): the paper's
learning rate, batch and steps are not public. Never run at this size.
"""

import dataclasses

from models import MODELS, TEACHERS, check

from hovle_jax.config import DataConfig, GroupConfig, OptimConfig, RunConfig


def get_config(variant="hovle_2b"):
    check(variant)
    model = MODELS[variant]
    if model.remat == "mixed":  # without the LLM's layers there is memory to recompute less
        model = dataclasses.replace(model, remat="products")
    return RunConfig(
        stage="distill",
        steps=122_000,  # 500M single-tile images in batches of 4,096
        save_every=1000,
        model=model,
        teacher=TEACHERS[variant],
        data=DataConfig(
            rows=512,
            tokens=8 * (2 * model.tokens_per_tile + 3),  # eight images and as much text per row
            tiles=8,
            max_tiles=1,
            thumbnail=False,
        ),
        optim=OptimConfig(
            lr=5e-4,
            end_lr=5e-6,
            warmup=0.01,
            groups=(
                GroupConfig(r".*/(kernel|\w*table|position)", 1.0, 0.05, "matrices"),
                GroupConfig(r".*/(scale|bias)", 1.0, 0.0, "vectors"),
            ),
        ),
    ).to_config_dict()
