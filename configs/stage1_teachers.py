"""Stage I with other teachers than InternViT: SigLIP 2, DINOv3, or both at once.

    hovle train --config=configs/stage1_teachers.py:siglip2 --workdir=/bucket/stage1 \\
        --config.init.teacher=siglip2-so400m-patch16-256 ...     (:dinov3, :both, :layers)

Both towers have 16 x 16 patches of a 256-pixel picture, HoVLE's 256 tokens per tile; the student's
tiles of 448 are resized inside jit. Their features are no vectors that an LLM can read: image
tokens are held against them through linear maps, and stage II has more to align than after
InternViT.
`both` holds each token against both, and expects the second tower's directory in TEACHER_2.
`layers` is InternViT with hidden states: student layers 2, 4, 6 against 6, 12, 18 of the teacher's.
Proposals, as stage1_distill.py is. Never run at this size.
"""

import dataclasses
import os

import stage1_distill
from models import MODELS

from hovle_jax.config import DistillConfig, MoreTeacher, RunConfig, TeacherConfig
from hovle_jax.errors import UserError

HALF = (0.5, 0.5, 0.5)
SIGLIP2 = TeacherConfig(
    kind="siglip",
    num_layers=27,
    hidden_size=1152,
    num_heads=16,
    intermediate_size=4304,
    image_size=256,
    patch_size=16,
    shuffle=1,
    activation="gelu_tanh",
    out_size=1152,
    mean=HALF,
    std=HALF,
)
DINOV3 = TeacherConfig(
    kind="dinov3",
    num_layers=24,
    hidden_size=1024,
    num_heads=16,
    intermediate_size=4096,
    image_size=256,
    patch_size=16,
    shuffle=1,
    norm_eps=1e-5,
    key_bias=False,
    registers=4,
    out_size=1024,
)
LINEAR = DistillConfig(adaptor="linear")


def get_config(variant="siglip2"):
    base = RunConfig.from_config_dict(stage1_distill.get_config("hovle_2b"))
    second = MoreTeacher("dinov3", os.environ.get("TEACHER_2", ""), DINOV3)
    changes = {
        "siglip2": {"teacher": SIGLIP2, "distill": LINEAR},
        "dinov3": {"teacher": DINOV3, "distill": LINEAR},
        "both": {"teacher": SIGLIP2, "distill": LINEAR, "teachers": (second,)},
        "layers": {"distill": DistillConfig(layers="2:6,4:12,6:18")},
    }
    if variant not in changes:
        raise UserError(f"--config: variant {variant!r} is not one of {', '.join(changes)}")
    return dataclasses.replace(base, model=MODELS["hovle_2b"], **changes[variant]).to_config_dict()
