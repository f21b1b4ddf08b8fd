"""The one table between native parameters and Hugging Face tensors, used in both directions.

A row names one Hugging Face tensor and the native arrays it holds. In names, {i} is the layer; the
native arrays of a stack carry all layers along their first axis.
"""

from __future__ import annotations

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


def _same(hf: str, native: str, shape: Sequence[int], layers: int = 0) -> Row:
    return Row(hf, (native,), tuple(shape), lambda x: (x,), lambda a: a[0], layers)


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


def _wrapped(hf: str, native: str, shape: Sequence[int], lead: int = 1) -> Row:
    """torch tensors with leading axes of size one."""
    full = (1,) * lead + tuple(shape)
    return Row(hf, (native,), full, lambda x: (x.reshape(shape),), lambda a: a[0].reshape(full))


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
    ]
    for name, part in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        kernel = (c.intermediate_size, e) if part == "down" else (e, c.intermediate_size)
        path = f"{native}/mlp/{part}/kernel"
        rows.append(_linear(f"{hf}.feed_forward.{name}.weight", path, kernel, 1, n))
    if c.qkv_bias:
        rows.append(Row(f"{attention}.wqkv.bias", qkv("bias"), (width,), split, join, n))
    if c.out_bias:
        rows.append(_same(f"{attention}.wo.bias", f"{native}/attention/o/bias", (e,), n))
    return rows


def hovle(c: ModelConfig) -> list[Row]:
    """Every tensor of a released HoVLE checkpoint (spec 1.2)."""
    e, v = c.hidden_size, c.vocab_size
    vision, native = "embedding_model.vision_embeddings", "embedding/vision"
    rows = [
        _unused(f"{vision}.class_embedding", (1, 1, e)),
        _conv(f"{vision}.patch_embedding.weight", f"{native}/patch/kernel", c.patch_size, e),
        _same(f"{vision}.patch_embedding.bias", f"{native}/patch/bias", (e,)),
        _wrapped(f"{vision}.position_embedding", f"{native}/position", (c.grid**2 + 1, e)),
        _same("embedding_model.llm_text_embeddings.weight", "embedding/text/table", (v, e)),
        _unused("language_model.model.tok_embeddings.weight", (v, e)),
        _same("language_model.model.norm.weight", "decoder/norm/scale", (e,)),
    ]
    if c.special_tokens:
        name = "embedding_model.special_text_embeddings.weight"
        rows.append(_same(name, "embedding/text/special_table", (c.special_tokens, e)))
    if c.projector:
        for torch_name, part, width in (("0", "fc1", c.shuffle**2 * e), ("2", "fc2", e)):
            hf = f"embedding_model.pixel_shuffle_proj.{torch_name}"
            rows.append(_linear(f"{hf}.weight", f"embedding/projector/{part}/kernel", (width, e)))
            rows.append(_same(f"{hf}.bias", f"embedding/projector/{part}/bias", (e,)))
    if not c.tie_head:
        rows.append(_linear("language_model.output.weight", "decoder/head/kernel", (e, v)))
    rows += internlm2_layers("embedding_model.encoder.{i}", "embedding/layers", c.embedding)
    rows += internlm2_layers("language_model.model.layers.{i}", "decoder/layers", c.decoder)
    return rows


def teacher(c: TeacherConfig) -> list[Row]:
    """InternViT and mlp1 of an InternVL checkpoint (spec section 7)."""
    e, n, heads = c.hidden_size, c.num_layers, c.num_heads
    size = e // heads
    embed, layer = "vision_model.embeddings", "vision_model.encoder.layers.{i}"
    wide = c.shuffle**2 * e

    def split(x: np.ndarray) -> Arrays:  # q, k, v thirds
        parts = x.reshape(3, heads, size, *x.shape[1:])
        return tuple(np.moveaxis(p, (0, 1), (-2, -1)) for p in parts)

    def join(arrays: Arrays) -> np.ndarray:
        parts = [np.moveaxis(a, (-2, -1), (0, 1)) for a in arrays]
        return np.concatenate([p.reshape(e, *p.shape[2:]) for p in parts])

    def qkv(leaf: str) -> tuple[str, ...]:
        return tuple(f"layers/{p}/{leaf}" for p in "qkv")

    rows = [
        _wrapped(f"{embed}.class_embedding", "class", (1, e)),
        _conv(f"{embed}.patch_embedding.weight", "patch/kernel", c.patch_size, e),
        _same(f"{embed}.patch_embedding.bias", "patch/bias", (e,)),
        _wrapped(f"{embed}.position_embedding", "position", (c.grid**2 + 1, e)),
        Row(f"{layer}.attn.qkv.weight", qkv("kernel"), (3 * e, e), split, join, n),
        _linear(f"{layer}.attn.proj.weight", "layers/o/kernel", (heads, size, e), 2, n),
        _same(f"{layer}.attn.proj.bias", "layers/o/bias", (e,), n),
        _same(f"{layer}.ls1", "layers/ls1/scale", (e,), n),
        _same(f"{layer}.ls2", "layers/ls2/scale", (e,), n),
        _linear(f"{layer}.mlp.fc1.weight", "layers/fc1/kernel", (e, c.intermediate_size), 1, n),
        _same(f"{layer}.mlp.fc1.bias", "layers/fc1/bias", (c.intermediate_size,), n),
        _linear(f"{layer}.mlp.fc2.weight", "layers/fc2/kernel", (c.intermediate_size, e), 1, n),
        _same(f"{layer}.mlp.fc2.bias", "layers/fc2/bias", (e,), n),
        _same("mlp1.0.weight", "mlp1_norm/scale", (wide,)),
        _same("mlp1.0.bias", "mlp1_norm/bias", (wide,)),
        _linear("mlp1.1.weight", "mlp1_fc1/kernel", (wide, c.out_size)),
        _same("mlp1.1.bias", "mlp1_fc1/bias", (c.out_size,)),
        _linear("mlp1.3.weight", "mlp1_fc2/kernel", (c.out_size, c.out_size)),
        _same("mlp1.3.bias", "mlp1_fc2/bias", (c.out_size,)),
    ]
    for norm in ("norm1", "norm2"):
        rows.append(_same(f"{layer}.{norm}.weight", f"layers/{norm}/scale", (e,), n))
        if c.norm == "layer":
            rows.append(_same(f"{layer}.{norm}.bias", f"layers/{norm}/bias", (e,), n))
    if c.qkv_bias:
        rows.append(Row(f"{layer}.attn.qkv.bias", qkv("bias"), (3 * e,), split, join, n))
    if c.qk_norm:
        for p in "qk":
            rows.append(_same(f"{layer}.attn.{p}_norm.weight", f"layers/{p}_norm/scale", (e,), n))
    return rows
