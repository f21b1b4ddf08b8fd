"""Causal, as the paper has it, against image tokens that see each other.

    hovle study configs/studies/masks.py --out runs/studies

The LLM of the third arm was trained on text, which has no images: its mask is new to it.
"""

from hovle_jax.study.plan import Arm, Study


def get_study():
    embedding = {"model.embedding.mask": "bidirectional"}
    return Study(
        "Causal or bidirectional inside an image?",
        (
            Arm("causal"),
            Arm("bidirectional in the embedding module", embedding),
            Arm("bidirectional in both", embedding | {"model.decoder.mask": "bidirectional"}),
        ),
    )
