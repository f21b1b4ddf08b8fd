"""Beyond the paper: five ideas that paid elsewhere, each alone, and all that change the model.

    hovle study configs/studies/beyond.py --out runs/studies

Each arm changes one thing of the first; all take the same number of steps of the same size.
"""

from pathlib import Path

from hovle_jax.registry import load_plugins
from hovle_jax.study.plan import Arm, Study

ROOT = Path(__file__).resolve().parent.parent.parent


def arms(instruct=300):
    """instruct: steps of stage III; late unfreezing keeps the LLM frozen in the first half."""
    load_plugins([str(ROOT / "examples" / "stage.py")])
    bidirectional = {"model.embedding.mask": "bidirectional"}
    plane = {"model.embedding.positions": "2d"}
    layers = {"distill:distill.layers": "all"}
    text = {"align:data.meta": "{align_text}", "instruct:data.meta": "{instruct_text}"}
    late = {
        "late:data.meta": "{instruct}",
        "late:trainable": "embedding/.*",
        "late:steps": instruct // 2,
        "instruct:steps": instruct // 2,
    }
    return (
        Arm("paper"),
        Arm("bidirectional in images", bidirectional),
        Arm("plane positions", plane),
        Arm("multi-layer distillation", layers),
        Arm("text mixed in", text),
        Arm("late unfreezing", late, stages=("distill", "align", "late", "instruct")),
        Arm("first three", bidirectional | plane | layers),
    )


def get_study():
    return Study("What helps beyond the paper?", arms())
