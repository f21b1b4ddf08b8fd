"""Stage II: next-token prediction on image-text pairs through the frozen LLM.

    hovle train --config=configs/stage2_align.py:hovle_2b --workdir=/bucket/stage2 \\
        --config.data.meta=META.json --config.data.tokenizer=TOKENIZER_DIR \\
        --config.init.llm=LLM_DIR --config.init.previous=/bucket/stage1

Expected: every decoder leaf stays bit-identical to the LLM's; loss/next_token falls. The recipe is
our proposal (docs/stages.md). Never run at this size.
"""

from models import MODELS, TEACHERS, check

from hovle_jax.config import DataConfig, OptimConfig, RunConfig


def get_config(variant="hovle_2b"):
    check(variant)
    return RunConfig(
        stage="align",
        steps=24_000,  # 50M samples, 2,048 per batch
        save_every=1000,
        model=MODELS[variant],
        teacher=TEACHERS[variant],
        data=DataConfig(rows=512, tokens=8192, tiles=26),
        optim=OptimConfig(lr=1e-4, end_lr=1e-6, warmup=0.01),
    ).to_config_dict()
