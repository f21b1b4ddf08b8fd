"""Stage III with little memory: LoRA on the LLM's layers, the projector trained as a whole.

    hovle train --config=examples/lora.py:hovle_2b --workdir=runs/lora \\
        --config.data.meta=meta.json --config.data.tokenizer=TOKENIZER_DIR \\
        --config.init.previous=runs/stage2
    hovle export runs/lora exported        # an ordinary model: the adapters are merged

Checkpoints hold what trains; everything else is written once, in runs/lora/frozen.
"""

import dataclasses
from pathlib import Path

from hovle_jax.cli.main import load_config
from hovle_jax.config import LoraConfig

STAGE_3 = Path(__file__).resolve().parent.parent / "configs" / "stage3_instruct.py"


def get_config(variant="hovle_2b"):
    base = load_config(f"{STAGE_3}:{variant}")
    return dataclasses.replace(
        base,
        lora=LoraConfig(
            rank=16,
            alpha=32.0,
            targets=r"decoder/layers/.*/(q|k|v|o|gate|up|down)/kernel",
        ),
        trainable=r"embedding/projector/.*",  # beside the adapters; '' = adapters alone
        optim=dataclasses.replace(base.optim, lr=2e-4),
    ).to_config_dict()
