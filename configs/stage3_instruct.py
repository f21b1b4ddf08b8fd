"""Stage III: instruction tuning of everything.

    hovle train --config=configs/stage3_instruct.py:hovle_2b --workdir=/bucket/stage3 \\
        --config.data.meta=META.json --config.data.tokenizer=TOKENIZER_DIR \\
        --config.init.previous=/bucket/stage2

Answer tokens weigh 1/sqrt(tokens of the answer), as in InternVL-2.5. The recipe is our proposal
(docs/stages.md). Never run at this size.
"""

from models import MODELS, TEACHERS, check

from hovle_jax.config import DataConfig, GroupConfig, OptimConfig, RunConfig


def get_config(variant="hovle_2b"):
    check(variant)
    return RunConfig(
        stage="instruct",
        steps=7_000,  # 7M samples, 1,024 per batch
        save_every=500,
        model=MODELS[variant],
        teacher=TEACHERS[variant],
        data=DataConfig(rows=256, tokens=8192, tiles=26),
        optim=OptimConfig(
            lr=4e-5,
            warmup=0.03,
            groups=(
                GroupConfig(r".*/(kernel|\w*table|position)", 1.0, 0.01, "matrices"),
                GroupConfig(r".*/(scale|bias)", 1.0, 0.0, "vectors"),
            ),
        ),
    ).to_config_dict()
