"""One stage of the digits demo, on the files and stand-ins `hovle demo --out runs/demo` left.

    hovle train --config=configs/digits.py:instruct --workdir=runs/again --config.optim.lr=1e-3

Expected: `instruct` from runs/demo/full/align takes about two minutes on two CPU cores and ends
with position questions above 0.95 on held-out writers.
"""

from pathlib import Path

from hovle_jax.config import InitConfig
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.demo import digits, settings
from hovle_jax.stages import get_stage

DEMO = Path("runs/demo")


def get_config(stage="instruct"):
    paths = digits.paths(str(DEMO / "data"))
    tokenizer = str(DEMO / "data" / "tokenizer")
    after = get_stage(stage).after
    return settings.stage_config(
        stage,
        settings.model_config(Tokenizer.load(tokenizer)),
        seed=0,
        tokenizer=tokenizer,
        init=InitConfig(
            llm=str(DEMO / "standins" / "llm"),
            teacher=str(DEMO / "standins" / "teacher"),
            previous=str(DEMO / "full" / after) if after else "",
        ),
        meta={"align": paths.meta_align, "instruct": paths.meta_instruct}.get(stage, ""),
        images=(paths.unpaired,) if stage == "distill" else (),
    ).to_config_dict()
