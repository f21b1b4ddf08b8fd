"""A stage of one's own: the LLM wakes up late, between II and III, on stage II's data and loss.

It starts from stage II, and stage III may start from it (`before`), as from stage II itself.
`configs/stage2_late.py` trains it with the LLM at a tenth of the learning rate:

    hovle train --config=configs/stage2_late.py:hovle_2b --workdir=runs/late \\
        --config.data.meta=META.json --config.data.tokenizer=TOKENIZER_DIR \\
        --config.init.previous=runs/stage2
    hovle train --config=configs/stage3_instruct.py:hovle_2b --workdir=runs/stage3 \\
        --config.init.previous=runs/late ...
"""

import dataclasses

from hovle_jax.stages import STAGES

STAGES.add("late")(
    dataclasses.replace(
        STAGES["align"], name="late", trainable=r".*", after="align", before=("instruct",)
    )
)
