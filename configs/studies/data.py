"""The paper's scaling of distillation data: fewer different images, and fewer steps.

    hovle study configs/studies/data.py --out runs/studies

Arms with fewer images take as many steps as the first, over the same images again and again.
"""

from hovle_jax.study.plan import Arm, Study


def get_study():
    return Study(
        "How much distillation data?",
        (
            Arm("2,000 images, 300 steps"),
            Arm("500 images, 300 steps", images=500),
            Arm("100 images, 300 steps", images=100),
            Arm("2,000 images, 100 steps", {"distill:steps": 100}),
            Arm("2,000 images, 30 steps", {"distill:steps": 30}),
        ),
    )
