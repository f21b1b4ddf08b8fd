"""Unpaired against paired: does stage I need to know which text belongs to an image?

    hovle study configs/studies/pairs.py --out runs/studies

The paired arm distils on stage II's captions with their images: as many, same loss, same steps.
"""

import dataclasses

from hovle_jax.stages import STAGES
from hovle_jax.study.plan import Arm, Study

if "distill_paired" not in STAGES:
    paired = dataclasses.replace(STAGES["distill"], name="distill_paired", data="conversations")
    STAGES.add("distill_paired")(paired)


def get_study():
    captions = {
        "distill:stage": "distill_paired",
        "distill:data.images": (),
        "distill:data.meta": "{align}",
    }
    return Study(
        "Unpaired or paired images in stage I?",
        (
            Arm("unpaired"),
            Arm("paired", captions),
            Arm("no stage I", stages=("align", "instruct")),
        ),
    )
