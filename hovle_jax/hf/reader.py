"""Hugging Face directory -> native config and parameters, tensor by tensor, without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from hovle_jax.config import DataConfig, LayersConfig, ModelConfig, TeacherConfig
from hovle_jax.errors import UserError
from hovle_jax.hf import names
from hovle_jax.tree import unflatten


def read_hovle(directory: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """A HoVLE or HoVLE-HD directory -> (config, params in the files' dtype)."""
    raw = read_config(directory)
    config = hovle_config(raw, name=Path(directory).name)
    return config, read_rows(directory, names.hovle(config))


def read_teacher(directory: str | Path) -> tuple[TeacherConfig, dict[str, Any]]:
    """The vision tower and mlp1 of an InternVL directory -> (config, params)."""
    raw = read_config(directory)
    config = teacher_config(raw)
    return config, read_rows(directory, names.teacher(config))


def hovle_config(raw: dict[str, Any], name: str = "hovle") -> ModelConfig:
    """config.json of a released checkpoint -> ModelConfig; keys it lacks take class defaults."""
    e, llm = raw["embedding_config"], raw["llm_config"]
    vocab = e["llm_vocab_size"]
    added = vocab - 11  # the eleven added tokens close the table, in the released order
    use_projector = e.get("use_pixel_shuffle_proj", True)
    return ModelConfig(
        name=name,
        vocab_size=vocab,
        embedding=_layers(e, bias=e.get("attention_bias", False)),
        decoder=_layers(llm, bias=llm.get("bias", False)),
        image_size=e["image_size"],
        patch_size=e["patch_size"],
        shuffle=round(1 / e.get("downsample_ratio", 0.5)) if use_projector else 1,
        shuffle_loc=e.get("pixel_shuffle_loc", "pre"),
        projector=use_projector,
        special_tokens=len(e.get("special_token_maps") or {}),
        normalize_embeddings=raw.get("normalize_encoder_output", False),
        tie_head=llm.get("tie_word_embeddings", False),
        bos_id=llm.get("bos_token_id", 1),
        eos_id=llm.get("eos_token_id", 2),
        pad_id=llm.get("pad_token_id", 2),
        im_end_id=added,
        img_start_id=e["img_context_token_id"] - 2,
        img_end_id=e["img_context_token_id"] - 1,
        img_context_id=e["img_context_token_id"],
    )


def data_config(raw: dict[str, Any]) -> DataConfig:
    """Chat template and tile limits of a released checkpoint."""
    return DataConfig(
        template=raw.get("template", "internlm2-chat"),
        min_tiles=raw.get("min_dynamic_patch", 1),
        max_tiles=raw.get("max_dynamic_patch", 12),
        thumbnail=raw.get("use_thumbnail", True),
    )


def is_hugging_face(directory: str | Path) -> bool:
    path = Path(directory) / "config.json"
    return path.is_file() and "model_type" in json.loads(path.read_text())


def teacher_config(raw: dict[str, Any]) -> TeacherConfig:
    """config.json of an InternVL checkpoint -> TeacherConfig."""
    v = raw["vision_config"]
    return TeacherConfig(
        num_layers=v["num_hidden_layers"],
        hidden_size=v["hidden_size"],
        num_heads=v["num_attention_heads"],
        intermediate_size=v["intermediate_size"],
        image_size=v["image_size"],
        patch_size=v["patch_size"],
        shuffle=round(1 / raw.get("downsample_ratio", 0.5)),
        shuffle_version=raw.get("ps_version", "v1"),
        norm="rms" if v.get("norm_type", "layer_norm") == "rms_norm" else "layer",
        norm_eps=v.get("layer_norm_eps", 1e-6),
        qkv_bias=v.get("qkv_bias", True),
        qk_norm=v.get("qk_normalization", False),
        select_layer=raw.get("select_layer", -1),
        out_size=raw["llm_config"]["hidden_size"],
    )


def _layers(c: dict[str, Any], *, bias: bool) -> LayersConfig:
    scaling = c.get("rope_scaling") or {"type": "none", "factor": 1.0}
    return LayersConfig(
        num_layers=c["num_hidden_layers"],
        hidden_size=c["hidden_size"],
        num_heads=c["num_attention_heads"],
        num_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
        head_dim=c["hidden_size"] // c["num_attention_heads"],
        intermediate_size=c["intermediate_size"],
        rms_norm_eps=c.get("rms_norm_eps", 1e-5),
        rope_theta=float(c.get("rope_theta", 10000.0)),
        rope_scaling=scaling["type"],
        rope_factor=float(scaling["factor"]),
        max_positions=c.get("max_position_embeddings", 4096),
        qkv_bias=bias,
        out_bias=bias,
    )


def read_config(directory: str | Path) -> dict[str, Any]:
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; expected a Hugging Face model directory")
    return json.loads(path.read_text())


def read_rows(directory: str | Path, rows: Sequence[names.Row]) -> dict[str, Any]:
    """Reads what `rows` name from all shards; an error names a tensor that is missing or wrong."""
    shards = sorted(Path(directory).glob("*.safetensors"))
    if not shards:
        raise UserError(f"{directory}: no *.safetensors files")
    where: dict[str, Any] = {}
    handles = [safe_open(shard, framework="np") for shard in shards]
    for handle in handles:
        where |= dict.fromkeys(handle.keys(), handle)

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in where:
            raise UserError(f"{directory}: tensor {name} is missing (expected shape {shape})")
        x = where[name].get_tensor(name)
        if x.shape != shape:
            raise UserError(f"{directory}: tensor {name} has shape {x.shape}, expected {shape}")
        return x

    flat: dict[str, np.ndarray] = {}
    for row in rows:
        if not row.native:
            continue
        if row.layers:
            layers = [
                row.to_native(tensor(row.hf.format(i=i), row.shape)) for i in range(row.layers)
            ]
            arrays = tuple(np.stack(parts) for parts in zip(*layers, strict=True))
        else:
            arrays = row.to_native(tensor(row.hf, row.shape))
        flat |= dict(zip(row.native, map(np.ascontiguousarray, arrays), strict=True))
    return unflatten(flat)
