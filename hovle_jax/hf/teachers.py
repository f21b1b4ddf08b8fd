"""Vision towers of Hugging Face directories that are no InternVL, by config.json's `model_type`.

    siglip, siglip_vision_model   SigLIP, and SigLIP 2 of a fixed size
    siglip2, siglip2_vision_model SigLIP 2 NaFlex, at the square size of its position table
    dinov3_vit                    DINOv3's ViTs

Tensor names are the published ones. A fork's tower is an entry here and one of nn.vit.TEACHERS.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hovle_jax.config import IMAGE_MEAN, IMAGE_STD, TeacherConfig
from hovle_jax.errors import UserError
from hovle_jax.hf.rows import Row, conv, linear, reshaped, same, unused
from hovle_jax.hf.section import Section
from hovle_jax.registry import Registry

HALF = (0.5, 0.5, 0.5)
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}


@dataclass(frozen=True)
class HubTeacher:
    config: Callable[[Section, Section], TeacherConfig]  # of config.json, preprocessor_config.json
    # (config, names of the directory's tensors) -> rows of the name table
    rows: Callable[[TeacherConfig, Collection[str]], list[Row]]
    ignored: str = ""  # regex over tensors that are not the tower's


HUB_TEACHERS: Registry[HubTeacher] = Registry("model_type")


def preprocessor(directory: Path) -> Section:
    """preprocessor_config.json, {} where there is none."""
    path = directory / "preprocessor_config.json"
    try:
        return Section(json.loads(path.read_text()) if path.is_file() else {}, path.name)
    except ValueError as error:
        raise UserError(f"{path.name}: not JSON ({error})") from None


def _numbers(raw: Section, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    if not raw.has(key):
        return default
    listed = raw[key] if isinstance(raw[key], list) else []
    if len(listed) != 3:
        raise raw.expected(key, "three numbers")
    return tuple(Section({key: x}, raw.where).number(key) for x in listed)


def _tower(raw: Section, **own: Any) -> TeacherConfig:
    width, heads = own["hidden_size"], own["num_heads"]
    if width % heads or (width // heads) % 2:
        raise UserError(f"{raw.name('hidden_size')} {width} is no even multiple of {heads} heads")
    kind = raw.one_of("hidden_act", tuple(_ACTIVATIONS), own.pop("hidden_act"))
    return TeacherConfig(shuffle=1, out_size=width, activation=_ACTIVATIONS[kind], **own)


def siglip_config(raw: Section, pixels: Section) -> TeacherConfig:
    v = raw.section("vision_config") if "vision_config" in raw else raw
    patch = v.count("patch_size", 16)
    flexible = str(raw.get("model_type")).startswith("siglip2")
    side = math.isqrt(v.count("num_patches", 256)) * patch if flexible else 0
    return _tower(
        v,
        kind="siglip",
        num_layers=v.count("num_hidden_layers", 12),
        hidden_size=v.count("hidden_size", 768),
        num_heads=v.count("num_attention_heads", 12),
        intermediate_size=v.count("intermediate_size", 3072),
        image_size=side or v.count("image_size", 224),
        patch_size=patch,
        norm_eps=v.number("layer_norm_eps", 1e-6),
        hidden_act="gelu_pytorch_tanh",
        mean=_numbers(pixels, "image_mean", HALF),
        std=_numbers(pixels, "image_std", HALF),
    )


def dinov3_config(raw: Section, pixels: Section) -> TeacherConfig:
    if not (raw.flag("proj_bias", True) and raw.flag("mlp_bias", True)):
        raise UserError("proj_bias and mlp_bias must be true")
    bias = raw.flag("query_bias", True)
    if raw.flag("value_bias", True) != bias or (raw.flag("key_bias", False) and not bias):
        raise UserError(
            "query_bias and value_bias must be the same, and key_bias no more than they"
        )
    return _tower(
        raw,
        kind="dinov3",
        num_layers=raw.count("num_hidden_layers", 12),
        hidden_size=raw.count("hidden_size", 384),
        num_heads=raw.count("num_attention_heads", 6),
        intermediate_size=raw.count("intermediate_size", 1536),
        image_size=raw.count("image_size", 224),
        patch_size=raw.count("patch_size", 16),
        norm_eps=raw.number("layer_norm_eps", 1e-5),
        qkv_bias=bias,
        key_bias=raw.flag("key_bias", False),
        hidden_act="gelu",
        gated=raw.flag("use_gated_mlp", False),
        registers=raw.token("num_register_tokens", 0),
        rope_theta=raw.number("rope_theta", 100.0),
        mean=_numbers(pixels, "image_mean", IMAGE_MEAN),
        std=_numbers(pixels, "image_std", IMAGE_STD),
    )


def _norm(hf: str, native: str, c: TeacherConfig, layers: int = 0) -> list[Row]:
    parts = (("weight", "scale"), ("bias", "bias"))
    return [same(f"{hf}.{a}", f"{native}/{b}", (c.hidden_size,), layers) for a, b in parts]


def _layers(hf: str, names: dict[str, str], c: TeacherConfig) -> list[Row]:
    """Attention, MLP and norms of all layers, by what `names` calls them."""
    e, f, n = c.hidden_size, c.intermediate_size, c.num_layers
    split = (c.num_heads, e // c.num_heads)
    name = {ours: f"{hf}.{theirs}" for ours, theirs in names.items()}
    rows = [row for part in ("norm1", "norm2") for row in _norm(name[part], f"layers/{part}", c, n)]
    rows.append(linear(f"{name['o']}.weight", "layers/o/kernel", (*split, e), 2, n))
    rows.append(same(f"{name['o']}.bias", "layers/o/bias", (e,), n))
    for p in "qkv":
        rows.append(linear(f"{name[p]}.weight", f"layers/{p}/kernel", (e, *split), 1, n))
        if c.qkv_bias and (c.key_bias or p != "k"):
            rows.append(reshaped(f"{name[p]}.bias", f"layers/{p}/bias", (e,), split, n))
    for p, kernel in (("fc1", (e, f)), ("gate", (e, f)), ("fc2", (f, e))):
        if p != "gate" or c.gated:
            rows.append(linear(f"{name[p]}.weight", f"layers/{p}/kernel", kernel, 1, n))
            rows.append(same(f"{name[p]}.bias", f"layers/{p}/bias", kernel[1:], n))
    return rows


def siglip_rows(c: TeacherConfig, tensors: Collection[str], *, matrix: bool = False) -> list[Row]:
    """matrix: the patch embedding is a matrix over (row, column, channel), not a convolution."""
    prefix = "vision_model." if any(t.startswith("vision_model.") for t in tensors) else ""
    e, p, patch = c.hidden_size, c.patch_size, f"{prefix}embeddings.patch_embedding"
    kernel = linear(f"{patch}.weight", "patch/kernel", (p, p, 3, e), 3)
    position = f"{prefix}embeddings.position_embedding.weight"
    attention = {x: f"self_attn.{x}_proj" for x in "qkv"} | {"o": "self_attn.out_proj"}
    other = {"norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    layer = f"{prefix}encoder.layers.{{i}}"
    return [
        kernel if matrix else conv(f"{patch}.weight", "patch/kernel", p, e),
        same(f"{patch}.bias", "patch/bias", (e,)),
        same(position, "position", (c.grid**2, e)),
        *_layers(layer, attention | other | {"gate": "mlp.gate"}, c),
        *_norm(f"{prefix}post_layernorm", "norm", c),
    ]


def naflex_rows(c: TeacherConfig, tensors: Collection[str]) -> list[Row]:
    return siglip_rows(c, tensors, matrix=True)


def dinov3_rows(c: TeacherConfig, tensors: Collection[str]) -> list[Row]:
    e, n, patch = c.hidden_size, c.num_layers, "embeddings.patch_embeddings"
    # Versions of transformers differ in the prefix that they write.
    layer = "model.layer.{i}" if any(t.startswith("model.layer.") for t in tensors) else "layer.{i}"
    attention = {x: f"attention.{x}_proj" for x in "qkvo"}
    mlp = {"fc1": "mlp.up_proj", "gate": "mlp.gate_proj", "fc2": "mlp.down_proj"}
    rows = [
        conv(f"{patch}.weight", "patch/kernel", c.patch_size, e),
        same(f"{patch}.bias", "patch/bias", (e,)),
        reshaped("embeddings.cls_token", "class", (1, 1, e), (1, e)),
        *_layers(layer, attention | mlp | {"norm1": "norm1", "norm2": "norm2"}, c),
        *_norm("norm", "norm", c),
    ]
    for k in "12":
        rows.append(same(f"{layer}.layer_scale{k}.lambda1", f"layers/ls{k}/scale", (e,), n))
    registers, shape = "embeddings.register_tokens", (c.registers, e)
    if c.registers:
        rows.append(reshaped(registers, "registers", (1, *shape), shape))
    elif registers in tensors:
        rows.append(unused(registers, (1, *shape)))
    return rows


_BESIDE = r"text_model\..*|logit_(scale|bias)|(vision_model\.)?head\..*"
for _name in ("siglip", "siglip_vision_model"):
    HUB_TEACHERS.add(_name)(HubTeacher(siglip_config, siglip_rows, _BESIDE))
for _name in ("siglip2", "siglip2_vision_model"):
    HUB_TEACHERS.add(_name)(HubTeacher(siglip_config, naflex_rows, _BESIDE))
HUB_TEACHERS.add("dinov3_vit")(HubTeacher(dinov3_config, dinov3_rows, r"embeddings\.mask_token"))
