"""The one table between native parameters and Hugging Face tensors, used in both directions.

A row (`hf.rows`) names one Hugging Face tensor and the native arrays it holds.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from hovle_jax.config import ModelConfig, TeacherConfig
from hovle_jax.errors import UserError
from hovle_jax.hf.families import FAMILIES, internlm2_layers, llama_layers
from hovle_jax.hf.rows import Arrays, Row, conv, linear, reshaped, same, unused


def _known(c: ModelConfig) -> None:
    """Hugging Face files, and the exported code that reads them, know these parts only."""
    for name, stack in c.stacks.items():
        if other := [kind for kind in stack.types if kind != "attention"]:
            raise UserError(
                f"model.{name}.layer_types: the exported format knows 'attention' only, not "
                f"{other[0]!r}; the model can be used and trained here, but not exported"
            )
        if stack.mlp != "swiglu":
            raise UserError(
                f"model.{name}.mlp: the exported format knows 'swiglu' only, not {stack.mlp!r}; "
                "the model can be used and trained here, but not exported"
            )
    if c.compressor != "pixel_shuffle":
        raise UserError(
            f"model.compressor: the exported format knows 'pixel_shuffle' only, not "
            f"{c.compressor!r}; the model can be used and trained here, but not exported"
        )


def _decoder(c: ModelConfig, body: str, head: str) -> list[Row]:
    """The LLM without its input table; `body` and `head` are what precedes the family's names."""
    family = FAMILIES.find(c.llm_family)
    rows = [same(f"{body}.norm.weight", "decoder/norm/scale", (c.hidden_size,))]
    if not c.tie_head:
        shape = (c.hidden_size, c.vocab_size)
        rows.append(linear(f"{head}{family.head}.weight", "decoder/head/kernel", shape))
    return rows + family.layers(f"{body}.layers.{{i}}", "decoder/layers", c.decoder)


def language_model(c: ModelConfig, body: str = "model", head: str = "") -> list[Row]:
    """An LLM's own checkpoint: its input table is the start of the holistic text table."""
    shape = (c.text_rows, c.hidden_size)
    name = f"{body}.{FAMILIES.find(c.llm_family).table}.weight"
    table = same(name, "embedding/text/table", shape)
    if c.tie_head:
        table = Row(
            name,
            ("embedding/text/table", "decoder/head/kernel"),
            shape,
            lambda x: (x, x.T),
            lambda a: a[0],
        )
    return [table, *_decoder(c, body, head)]


def hovle(c: ModelConfig) -> list[Row]:
    """Every tensor of a released HoVLE checkpoint.

    Raises:
      UserError: parts that this format does not know.
    """
    _known(c)
    e, v = c.hidden_size, c.vocab_size
    own = "embedding_model.llm_text_embeddings.weight"
    idle = f"language_model.model.{FAMILIES.find(c.llm_family).table}.weight"
    rows = [
        unused("embedding_model.vision_embeddings.class_embedding", (1, 1, e)),
        *_vision(c, "embedding_model."),
        same(own, "embedding/text/table", (c.text_rows, e)),
        # The LLM reads vectors: its own input table is idle unless the head is the same tensor.
        linear(idle, "decoder/head/kernel", (e, v)) if c.tie_head else unused(idle, (v, e)),
    ]
    if c.special_tokens:
        name = "embedding_model.special_text_embeddings.weight"
        rows.append(same(name, "embedding/text/special_table", (c.special_tokens, e)))
    rows += internlm2_layers("embedding_model.encoder.{i}", "embedding/layers", c.embedding)
    rows += _decoder(c, "language_model.model", "language_model.")
    return rows


def fused(c: ModelConfig) -> list[Row]:
    """A 'pre' model as one Llama whose first layers are the embedding's; no idle tensors.

    Raises:
      UserError: parts that this format does not know.
    """
    _known(c)
    layer, e = "model.layers.{i}", c.hidden_size
    decoder = llama_layers(layer, "decoder/layers", c.decoder)
    return [
        *_vision(c, "model."),
        same("model.embed_tokens.weight", "embedding/text/table", (c.text_rows, e)),
        *llama_layers(layer, "embedding/layers", c.embedding),
        *(dataclasses.replace(row, first=c.embedding.num_layers) for row in decoder),
        same("model.norm.weight", "decoder/norm/scale", (e,)),
        linear("lm_head.weight", "decoder/head/kernel", (e, c.vocab_size)),
    ]


def _vision(c: ModelConfig, prefix: str) -> list[Row]:
    e, vision, native = c.hidden_size, f"{prefix}vision_embeddings", "embedding/vision"
    here, there = (c.grid**2 + 1, e), (1, c.grid**2 + 1, e)
    rows = [
        conv(f"{vision}.patch_embedding.weight", f"{native}/patch/kernel", c.patch_size, e),
        same(f"{vision}.patch_embedding.bias", f"{native}/patch/bias", (e,)),
        reshaped(f"{vision}.position_embedding", f"{native}/position", there, here),
    ]
    if c.projector:
        for torch_name, part, width in (("0", "fc1", c.shuffle**2 * e), ("2", "fc2", e)):
            hf = f"{prefix}pixel_shuffle_proj.{torch_name}"
            rows.append(linear(f"{hf}.weight", f"embedding/projector/{part}/kernel", (width, e)))
            rows.append(same(f"{hf}.bias", f"embedding/projector/{part}/bias", (e,)))
    return rows


TEACHER_NAMES = {
    "class": "vision_model.embeddings.class_embedding",
    "patch": "vision_model.embeddings.patch_embedding",
    "position": "vision_model.embeddings.position_embedding",
    "layer": "vision_model.encoder.layers.{i}",
    **{"norm1": "norm1", "norm2": "norm2", "ls1": "ls1", "ls2": "ls2"},
    **{"qkv": "attn.qkv", "q_norm": "attn.q_norm", "k_norm": "attn.k_norm", "o": "attn.proj"},
    **{"fc1": "mlp.fc1", "fc2": "mlp.fc2"},
    **{"mlp1_norm": "mlp1.0", "mlp1_fc1": "mlp1.1", "mlp1_fc2": "mlp1.3"},
}
# The same tensors in transformers' own InternVL (model_type 'internvl').
TEACHER_NAMES_TRANSFORMERS = {
    "class": "vision_tower.embeddings.cls_token",
    "patch": "vision_tower.embeddings.patch_embeddings.projection",
    "position": "vision_tower.embeddings.position_embeddings",
    "layer": "vision_tower.encoder.layer.{i}",
    **{"norm1": "layernorm_before", "norm2": "layernorm_after"},
    **{"ls1": "lambda_1", "ls2": "lambda_2"},
    **{"q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj"},
    **{"q_norm": "attention.q_norm", "k_norm": "attention.k_norm"},
    "o": "attention.projection_layer",
    **{"fc1": "mlp.fc1", "fc2": "mlp.fc2"},
    "mlp1_norm": "multi_modal_projector.layer_norm",
    "mlp1_fc1": "multi_modal_projector.linear_1",
    "mlp1_fc2": "multi_modal_projector.linear_2",
}


def teacher(c: TeacherConfig, hf: dict[str, str] = TEACHER_NAMES, prefix: str = "") -> list[Row]:
    """InternViT and mlp1 of an InternVL checkpoint, by the names of `hf`."""
    hf = {k: v if k in _IN_LAYER else prefix + v for k, v in hf.items()}
    e, n, heads, positions = c.hidden_size, c.num_layers, c.num_heads, c.grid**2 + 1
    size, wide = e // heads, c.shuffle**2 * e
    rows = [
        reshaped(hf["class"], "class", (1, 1, e), (1, e)),
        conv(f"{hf['patch']}.weight", "patch/kernel", c.patch_size, e),
        same(f"{hf['patch']}.bias", "patch/bias", (e,)),
        reshaped(hf["position"], "position", (1, positions, e), (positions, e)),
        same(f"{hf['mlp1_norm']}.weight", "mlp1_norm/scale", (wide,)),
        same(f"{hf['mlp1_norm']}.bias", "mlp1_norm/bias", (wide,)),
    ]
    for part, width in (("mlp1_fc1", wide), ("mlp1_fc2", c.out_size)):
        rows.append(linear(f"{hf[part]}.weight", f"{part}/kernel", (width, c.out_size)))
        rows.append(same(f"{hf[part]}.bias", f"{part}/bias", (c.out_size,)))
    layer = {k: f"{hf['layer']}.{v}" for k, v in hf.items() if k in _IN_LAYER}
    for norm in ("norm1", "norm2"):
        rows.append(same(f"{layer[norm]}.weight", f"layers/{norm}/scale", (e,), n))
        if c.norm == "layer":
            rows.append(same(f"{layer[norm]}.bias", f"layers/{norm}/bias", (e,), n))
    rows += [
        linear(f"{layer['o']}.weight", "layers/o/kernel", (heads, size, e), 2, n),
        same(f"{layer['o']}.bias", "layers/o/bias", (e,), n),
        same(layer["ls1"], "layers/ls1/scale", (e,), n),
        same(layer["ls2"], "layers/ls2/scale", (e,), n),
    ]
    for part, kernel in (("fc1", (e, c.intermediate_size)), ("fc2", (c.intermediate_size, e))):
        rows.append(linear(f"{layer[part]}.weight", f"layers/{part}/kernel", kernel, 1, n))
        rows.append(same(f"{layer[part]}.bias", f"layers/{part}/bias", (kernel[1],), n))
    if c.qk_norm:
        for p in ("q_norm", "k_norm"):
            rows.append(same(f"{layer[p]}.weight", f"layers/{p}/scale", (e,), n))
    if "qkv" in hf:
        return rows + _packed_qkv(layer["qkv"], c)
    for p in "qkv":
        rows.append(linear(f"{layer[p]}.weight", f"layers/{p}/kernel", (e, heads, size), 1, n))
        if c.qkv_bias:
            shape = (heads, size)
            rows.append(reshaped(f"{layer[p]}.bias", f"layers/{p}/bias", (e,), shape, n))
    return rows


_IN_LAYER = {"norm1", "norm2", "ls1", "ls2", "qkv", *"qkv", "q_norm", "k_norm", "o", "fc1", "fc2"}


def _packed_qkv(hf: str, c: TeacherConfig) -> list[Row]:
    """q, k, v thirds of one tensor."""
    e, heads = c.hidden_size, c.num_heads

    def split(x: np.ndarray) -> Arrays:
        parts = x.reshape(3, heads, e // heads, *x.shape[1:])
        return tuple(np.moveaxis(p, (0, 1), (-2, -1)) for p in parts)

    def join(arrays: Arrays) -> np.ndarray:
        parts = [np.moveaxis(a, (-2, -1), (0, 1)) for a in arrays]
        return np.concatenate([p.reshape(e, *p.shape[2:]) for p in parts])

    def paths(leaf: str) -> tuple[str, ...]:
        return tuple(f"layers/{p}/{leaf}" for p in "qkv")

    rows = [Row(f"{hf}.weight", paths("kernel"), (3 * e, e), split, join, c.num_layers)]
    if c.qkv_bias:
        rows.append(Row(f"{hf}.bias", paths("bias"), (3 * e,), split, join, c.num_layers))
    return rows
