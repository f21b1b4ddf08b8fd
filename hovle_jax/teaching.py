"""Settings of what stage I distils from: vision teachers, and how outputs are held against them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hovle_jax.errors import UserError
from hovle_jax.typed import one_of

IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet, as InternVL normalises
IMAGE_STD = (0.229, 0.224, 0.225)
ADAPTORS = ("none", "linear")


@dataclass(frozen=True)
class TeacherConfig:
    """A vision tower that ends in features per token; the defaults are InternViT-300M and mlp1.

    InternViT ends in the LLM's input space, T = (grid / shuffle)^2 tokens of `out_size`. Others
    end in a space of their own: shuffle^2 x hidden_size is their `out_size`, and the student
    needs an adaptor (distill.py).
    """

    kind: str = "internvit"  # nn.vit.TEACHERS
    num_layers: int = 24
    hidden_size: int = 1024
    num_heads: int = 16
    intermediate_size: int = 4096
    image_size: int = 448
    patch_size: int = 14
    shuffle: int = 2
    shuffle_version: str = "v2"  # v1 keeps the transposed order of early InternVL releases
    norm: str = "layer"  # layer (300M) | rms (6B)
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    key_bias: bool = True  # of `qkv_bias`, in k (DINOv3 has none)
    qk_norm: bool = False  # RMSNorm over the full width of q and k (6B)
    activation: str = "gelu"  # gelu | gelu_tanh (SigLIP) | quick_gelu (CLIP) | silu
    gated: bool = False  # a gate beside fc1 (DINOv3 ViT-H+ and 7B)
    registers: int = 0  # tokens beside the class token, dropped like it
    rope_theta: float = 100.0  # of rotary positions (DINOv3)
    select_layer: int = -1  # which hidden state is the feature; -1 = after the last layer
    out_size: int = 2048  # width of the features; InternViT: of the LLM's input space
    mean: tuple[float, ...] = IMAGE_MEAN  # its own normalisation of the pixels both models see
    std: tuple[float, ...] = IMAGE_STD
    initializer_range: float = 0.02
    dtype: str = "bfloat16"
    attention: str = "auto"  # auto: the kernel of `nn/tile_attention.py` where it fits | xla

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3:
            raise UserError("teacher.mean and teacher.std must have three numbers")
        one_of("teacher.dtype", self.dtype, ("float32", "bfloat16"))
        one_of("teacher.attention", self.attention, ("auto", "xla"))
        one_of("teacher.norm", self.norm, ("layer", "rms"))
        one_of("teacher.shuffle_version", self.shuffle_version, ("v1", "v2"))
        known = ("gelu", "gelu_tanh", "quick_gelu", "silu")
        one_of("teacher.activation", self.activation, known)

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        return (self.grid // self.shuffle) ** 2

    @property
    def used_layers(self) -> int:
        """How many layers `select_layer` needs."""
        return self.select_layer + (self.num_layers + 1 if self.select_layer < 0 else 0)

    def flops_per_tile(self) -> float:
        """Forward matrix FLOPs; attention is not causal. A fork's tower is taken for a ViT, too."""
        width, patches = self.hidden_size, self.grid**2
        places = patches + (self.kind != "siglip") + self.registers
        matrices = 4 * width + (2 + self.gated) * self.intermediate_size
        per_place = 2.0 * width * matrices + 4.0 * places * width
        head = 0.0
        if self.kind == "internvit":
            merged = self.shuffle**2 * width
            head = 2.0 * self.tokens_per_tile * (merged + self.out_size) * self.out_size
        patch = 2.0 * patches * 3 * self.patch_size**2 * width
        return self.used_layers * places * per_place + head + patch


@dataclass(frozen=True)
class MoreTeacher:
    """A teacher beside `RunConfig.teacher`."""

    name: str  # its loss term is image_NAME
    path: str  # its directory, as init.teacher
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    adaptor: str = "linear"  # as `DistillConfig.adaptor`
    weight: float = 1.0  # of its term

    def __post_init__(self) -> None:
        one_of("teachers.adaptor", self.adaptor, ADAPTORS)
        if not self.name.isidentifier():
            raise UserError(f"teachers.name: {self.name!r} must be letters, digits and '_'")


@dataclass(frozen=True)
class DistillConfig:
    """How stage I holds the embedding module against its teachers (distill.py)."""

    loss: str = "cosine"  # losses.DISTANCES
    image: float = 1.0  # weights of the terms
    text: float = 1.0
    # The student's output is taken for a feature of the teacher as it is, or through a linear map
    # that is trained along and thrown away.
    adaptor: str = "none"  # none | linear
    # last: the output alone. Also, through linear maps, hidden states: all, or some as
    # 'STUDENT:TEACHER,...' by the number of layers that have run.
    layers: str = "last"
    layer_weight: float = 1.0  # of the term of hidden states, the mean over them

    def __post_init__(self) -> None:
        one_of("distill.adaptor", self.adaptor, ADAPTORS)
