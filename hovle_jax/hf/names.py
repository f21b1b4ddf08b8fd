"""The one table between native parameters and Hugging Face tensors, used in both directions.

A row names one Hugging Face tensor and the native arrays it holds. In names, {i} is the layer; the
native arrays of a stack carry all layers along their first axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hovle_jax.config import LayersConfig, ModelConfig, TeacherConfig

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Row:
    hf: str
    native: tuple[str, ...]  # paths, '/' between levels; () = kept in files, read by nothing
    shape: tuple[int, ...]  # of the Hugging Face tensor
    to_native: Callable[[np.ndarray], Arrays]
    to_hf: Callable[[Arrays], np.ndarray]
    layers: int = 0  # > 0: one tensor per layer
    first: int = 0  # number of the first layer

    @property
    def tensors(self) -> list[str]:
        """Names of the Hugging Face tensors, one per layer where there are layers."""
        numbers = range(self.first, self.first + self.layers)
        return [self.hf.format(i=i) for i in numbers] if self.layers else [self.hf]


def _same(hf: str, native: str, shape: Sequence[int], layers: int = 0) -> Row:
    return _reshaped(hf, native, shape, shape, layers)


def _reshaped(
    hf: str, native: str, hf_shape: Sequence[int], native_shape: Sequence[int], layers: int = 0
) -> Row:
    """The same numbers in the same order."""
    full = tuple(hf_shape)
    return Row(
        hf,
        (native,),
        full,
        lambda x: (x.reshape(native_shape),),
        lambda a: a[0].reshape(full),
        layers,
    )


def _linear(hf: str, native: str, kernel: Sequence[int], num_in: int = 1, layers: int = 0) -> Row:
    """torch [out, in] <-> native [in..., out...]."""
    rows = int(np.prod(kernel[num_in:]))
    cols = int(np.prod(kernel[:num_in]))
    return Row(
        hf,
        (native,),
        (rows, cols),
        lambda x: (x.T.reshape(kernel),),
        lambda a: a[0].reshape(cols, rows).T,
        layers,
    )


def _conv(hf: str, native: str, patch: int, width: int) -> Row:
    """torch OIHW <-> native HWIO."""
    return Row(
        hf,
        (native,),
        (width, 3, patch, patch),
        lambda x: (x.transpose(2, 3, 1, 0),),
        lambda a: a[0].transpose(3, 2, 0, 1),
    )


def _unused(hf: str, shape: Sequence[int]) -> Row:
    return Row(hf, (), tuple(shape), lambda x: (), lambda a: np.zeros(shape, np.float32))


def internlm2_layers(hf: str, native: str, c: LayersConfig) -> list[Row]:
    """`wqkv` rows are grouped per kv head: [its query heads..., key, value] x head size."""
    group = c.num_heads // c.num_kv_heads
    e, dh, kv, n = c.hidden_size, c.head_dim, c.num_kv_heads, c.num_layers

    def split(x: np.ndarray) -> Arrays:
        x = x.reshape(kv, group + 2, dh, *x.shape[1:])
        q = x[:, :-2].reshape(c.num_heads, dh, *x.shape[3:])
        return tuple(np.moveaxis(y, (0, 1), (-2, -1)) for y in (q, x[:, -2], x[:, -1]))

    def join(arrays: Arrays) -> np.ndarray:
        q, k, v = (np.moveaxis(y, (-2, -1), (0, 1)) for y in arrays)
        q = q.reshape(kv, group, dh, *q.shape[2:])
        x = np.concatenate([q, k[:, None], v[:, None]], axis=1)
        return x.reshape(-1, *x.shape[3:])

    def qkv(leaf: str) -> tuple[str, ...]:
        return tuple(f"{native}/attention/{p}/{leaf}" for p in "qkv")

    width = kv * (group + 2) * dh
    attention = f"{hf}.attention"
    rows = [
        _same(f"{hf}.attention_norm.weight", f"{native}/attention_norm/scale", (e,), n),
        Row(f"{attention}.wqkv.weight", qkv("kernel"), (width, e), split, join, n),
        _linear(
            f"{attention}.wo.weight", f"{native}/attention/o/kernel", (c.num_heads, dh, e), 2, n
        ),
        _same(f"{hf}.ffn_norm.weight", f"{native}/mlp_norm/scale", (e,), n),
        *_mlp(f"{hf}.feed_forward", ("w1", "w3", "w2"), native, c),
    ]
    if c.qkv_bias:
        rows.append(Row(f"{attention}.wqkv.bias", qkv("bias"), (width,), split, join, n))
    if c.out_bias:
        rows.append(_same(f"{attention}.wo.bias", f"{native}/attention/o/bias", (e,), n))
    return rows


def llama_layers(hf: str, native: str, c: LayersConfig) -> list[Row]:
    """Llama and Qwen2: separate projections, heads in order."""
    e, dh, n = c.hidden_size, c.head_dim, c.num_layers
    attention, ours = f"{hf}.self_attn", f"{native}/attention"
    rows = [
        _same(f"{hf}.input_layernorm.weight", f"{native}/attention_norm/scale", (e,), n),
        _linear(f"{attention}.o_proj.weight", f"{ours}/o/kernel", (c.num_heads, dh, e), 2, n),
        _same(f"{hf}.post_attention_layernorm.weight", f"{native}/mlp_norm/scale", (e,), n),
        *_mlp(f"{hf}.mlp", ("gate_proj", "up_proj", "down_proj"), native, c),
    ]
    for p, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
        name = f"{attention}.{p}_proj"
        rows.append(_linear(f"{name}.weight", f"{ours}/{p}/kernel", (e, heads, dh), 1, n))
        if c.qkv_bias:
            shape = (heads, dh)
            rows.append(_reshaped(f"{name}.bias", f"{ours}/{p}/bias", (heads * dh,), shape, n))
    if c.out_bias:
        rows.append(_same(f"{attention}.o_proj.bias", f"{ours}/o/bias", (e,), n))
    return rows


def _mlp(hf: str, parts: Sequence[str], native: str, c: LayersConfig) -> list[Row]:
    e, f, n = c.hidden_size, c.intermediate_size, c.num_layers
    kernels = {"gate": (e, f), "up": (e, f), "down": (f, e)}
    return [
        _linear(f"{hf}.{part}.weight", f"{native}/mlp/{ours}/kernel", kernel, 1, n)
        for part, (ours, kernel) in zip(parts, kernels.items(), strict=True)
    ]


@dataclass(frozen=True)
class Family:
    """What an LLM family calls its tensors."""

    layers: Callable[[str, str, LayersConfig], list[Row]]
    table: str
    head: str


FAMILIES = {
    "internlm2": Family(internlm2_layers, "tok_embeddings", "output"),
    "llama": Family(llama_layers, "embed_tokens", "lm_head"),
    "qwen2": Family(llama_layers, "embed_tokens", "lm_head"),
}


def _decoder(c: ModelConfig, body: str, head: str) -> list[Row]:
    """The LLM without its input table; `body` and `head` are what precedes the family's names."""
    family = FAMILIES[c.llm_family]
    rows = [_same(f"{body}.norm.weight", "decoder/norm/scale", (c.hidden_size,))]
    if not c.tie_head:
        shape = (c.hidden_size, c.vocab_size)
        rows.append(_linear(f"{head}{family.head}.weight", "decoder/head/kernel", shape))
    return rows + family.layers(f"{body}.layers.{{i}}", "decoder/layers", c.decoder)


def language_model(c: ModelConfig, body: str = "model", head: str = "") -> list[Row]:
    """An LLM's own checkpoint: its input table is the start of the holistic text table."""
    shape = (c.text_rows, c.hidden_size)
    name = f"{body}.{FAMILIES[c.llm_family].table}.weight"
    table = _same(name, "embedding/text/table", shape)
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
    """Every tensor of a released HoVLE checkpoint (spec 1.2)."""
    e, v = c.hidden_size, c.vocab_size
    own = "embedding_model.llm_text_embeddings.weight"
    idle = f"language_model.model.{FAMILIES[c.llm_family].table}.weight"
    rows = [
        _unused("embedding_model.vision_embeddings.class_embedding", (1, 1, e)),
        *_vision(c, "embedding_model."),
        _same(own, "embedding/text/table", (c.text_rows, e)),
        # The LLM reads vectors: its own input table is idle unless the head is the same tensor.
        _linear(idle, "decoder/head/kernel", (e, v)) if c.tie_head else _unused(idle, (v, e)),
    ]
    if c.special_tokens:
        name = "embedding_model.special_text_embeddings.weight"
        rows.append(_same(name, "embedding/text/special_table", (c.special_tokens, e)))
    rows += internlm2_layers("embedding_model.encoder.{i}", "embedding/layers", c.embedding)
    rows += _decoder(c, "language_model.model", "language_model.")
    return rows


def fused(c: ModelConfig) -> list[Row]:
    """A 'pre' model as one Llama whose first layers are the embedding's; no idle tensors."""
    layer, e = "model.layers.{i}", c.hidden_size
    decoder = llama_layers(layer, "decoder/layers", c.decoder)
    return [
        *_vision(c, "model."),
        _same("model.embed_tokens.weight", "embedding/text/table", (c.text_rows, e)),
        *llama_layers(layer, "embedding/layers", c.embedding),
        *(dataclasses.replace(row, first=c.embedding.num_layers) for row in decoder),
        _same("model.norm.weight", "decoder/norm/scale", (e,)),
        _linear("lm_head.weight", "decoder/head/kernel", (e, c.vocab_size)),
    ]


def _vision(c: ModelConfig, prefix: str) -> list[Row]:
    e, vision, native = c.hidden_size, f"{prefix}vision_embeddings", "embedding/vision"
    here, there = (c.grid**2 + 1, e), (1, c.grid**2 + 1, e)
    rows = [
        _conv(f"{vision}.patch_embedding.weight", f"{native}/patch/kernel", c.patch_size, e),
        _same(f"{vision}.patch_embedding.bias", f"{native}/patch/bias", (e,)),
        _reshaped(f"{vision}.position_embedding", f"{native}/position", there, here),
    ]
    if c.projector:
        for torch_name, part, width in (("0", "fc1", c.shuffle**2 * e), ("2", "fc2", e)):
            hf = f"{prefix}pixel_shuffle_proj.{torch_name}"
            rows.append(_linear(f"{hf}.weight", f"embedding/projector/{part}/kernel", (width, e)))
            rows.append(_same(f"{hf}.bias", f"embedding/projector/{part}/bias", (e,)))
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
    """InternViT and mlp1 of an InternVL checkpoint (spec section 7), by the names of `hf`."""
    hf = {k: v if k in _IN_LAYER else prefix + v for k, v in hf.items()}
    e, n, heads, positions = c.hidden_size, c.num_layers, c.num_heads, c.grid**2 + 1
    size, wide = e // heads, c.shuffle**2 * e
    rows = [
        _reshaped(hf["class"], "class", (1, 1, e), (1, e)),
        _conv(f"{hf['patch']}.weight", "patch/kernel", c.patch_size, e),
        _same(f"{hf['patch']}.bias", "patch/bias", (e,)),
        _reshaped(hf["position"], "position", (1, positions, e), (positions, e)),
        _same(f"{hf['mlp1_norm']}.weight", "mlp1_norm/scale", (wide,)),
        _same(f"{hf['mlp1_norm']}.bias", "mlp1_norm/bias", (wide,)),
    ]
    for part, width in (("mlp1_fc1", wide), ("mlp1_fc2", c.out_size)):
        rows.append(_linear(f"{hf[part]}.weight", f"{part}/kernel", (width, c.out_size)))
        rows.append(_same(f"{hf[part]}.bias", f"{part}/bias", (c.out_size,)))
    layer = {k: f"{hf['layer']}.{v}" for k, v in hf.items() if k in _IN_LAYER}
    for norm in ("norm1", "norm2"):
        rows.append(_same(f"{layer[norm]}.weight", f"layers/{norm}/scale", (e,), n))
        if c.norm == "layer":
            rows.append(_same(f"{layer[norm]}.bias", f"layers/{norm}/bias", (e,), n))
    rows += [
        _linear(f"{layer['o']}.weight", "layers/o/kernel", (heads, size, e), 2, n),
        _same(f"{layer['o']}.bias", "layers/o/bias", (e,), n),
        _same(layer["ls1"], "layers/ls1/scale", (e,), n),
        _same(layer["ls2"], "layers/ls2/scale", (e,), n),
    ]
    for part, kernel in (("fc1", (e, c.intermediate_size)), ("fc2", (c.intermediate_size, e))):
        rows.append(_linear(f"{layer[part]}.weight", f"layers/{part}/kernel", kernel, 1, n))
        rows.append(_same(f"{layer[part]}.bias", f"layers/{part}/bias", (kernel[1],), n))
    if c.qk_norm:
        for p in ("q_norm", "k_norm"):
            rows.append(_same(f"{layer[p]}.weight", f"layers/{p}/scale", (e,), n))
    if "qkv" in hf:
        return rows + _packed_qkv(layer["qkv"], c)
    for p in "qkv":
        rows.append(_linear(f"{layer[p]}.weight", f"layers/{p}/kernel", (e, heads, size), 1, n))
        if c.qkv_bias:
            shape = (heads, size)
            rows.append(_reshaped(f"{layer[p]}.bias", f"layers/{p}/bias", (e,), shape, n))
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
