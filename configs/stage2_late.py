"""Between stages II and III: all of the model on stage II's data, the LLM at a tenth of the rate.

    hovle train --config=configs/stage2_late.py:hovle_2b --workdir=/bucket/late \\
        --config.data.meta=META.json --config.data.tokenizer=TOKENIZER_DIR \\
        --config.init.previous=/bucket/stage2

The stage is examples/stage.py; stage III starts from it with --config.init.previous. A proposal, as
the others are (NEO and VoRA unfreeze late). Never run at this size.
"""

from pathlib import Path

from models import MODELS, TEACHERS, check

from hovle_jax.config import DataConfig, GroupConfig, OptimConfig, RunConfig

STAGE = Path(__file__).resolve().parent.parent / "examples" / "stage.py"


def get_config(variant="hovle_2b"):
    check(variant)
    config = RunConfig(
        stage="late",
        steps=6_000,
        save_every=1000,
        model=MODELS[variant],
        teacher=TEACHERS[variant],
        data=DataConfig(rows=512, tokens=8192, tiles=26),
        optim=OptimConfig(
            lr=5e-5,
            end_lr=1e-6,
            warmup=0.03,
            groups=(
                GroupConfig(r"embedding/.*/(kernel|\w*table|position)", 1.0, 0.05, "embedding"),
                GroupConfig(r"decoder/.*/kernel", 0.1, 0.01, "llm"),
                GroupConfig(r"embedding/.*/(scale|bias)", 1.0, 0.0, "embedding_vectors"),
                GroupConfig(r"decoder/.*/(scale|bias)", 0.1, 0.0, "llm_vectors"),
            ),
        ),
    ).to_config_dict()
    config.model.plugins = (str(STAGE),)
    return config
