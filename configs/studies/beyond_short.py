"""The same ideas with half of the steps, where the paper's recipe is far from perfect.

hovle study configs/studies/beyond_short.py --out runs/studies
"""

from beyond import arms

from hovle_jax.study.plan import Study


def get_study():
    return Study(
        "What helps beyond the paper, with half of the steps?",
        arms(instruct=150),
        changes={"distill:steps": 100, "align:steps": 200, "instruct:steps": 150},
    )
