"""The paper's scaling of distillation data: fewer different images, and fewer steps.

    hovle study configs/studies/data.py --out runs/studies

Arms with fewer images take as many steps as the first, over the same images again and again.
"""

from hovle_jax.study.plan import Arm, Study


def get_study():
    return Study(
        "How much distillation data?",
        (
            Arm("2,000 images, 200 steps"),
            Arm("400 images, 200 steps", images=400),
            Arm("80 images, 200 steps", images=80),
            Arm("2,000 images, 50 steps", {"distill:steps": 50}),
        ),
    )
