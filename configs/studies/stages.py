"""The paper's ablation of stages: without stage I, without II, without both.

    hovle study configs/studies/stages.py --out runs/studies

Stages that stay take as many steps as before: an arm that drops one is also the cheaper one.
"""

from hovle_jax.study.plan import Arm, Study


def get_study():
    return Study(
        "Which stages pay?",
        (
            Arm("full"),
            Arm("without stage I", stages=("align", "instruct")),
            Arm("without stage II", stages=("distill", "instruct")),
            Arm("stage III only", stages=("instruct",)),
        ),
    )
