"""The paper's ablation of the embedding module's depth.

    hovle study configs/studies/layers.py --out runs/studies

The LLM keeps its two layers; the teacher has three.
"""

from hovle_jax.study.plan import Arm, Study


def get_study():
    return Study(
        "How many holistic layers?",
        tuple(Arm(f"{n} of them", {"model.embedding.num_layers": n}) for n in (2, 1, 4)),
    )
