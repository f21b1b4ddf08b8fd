"""config.json of Hugging Face directories <-> the project's config dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hovle_jax.config import (
    IMAGE_MEAN,
    IMAGE_STD,
    DataConfig,
    LayersConfig,
    ModelConfig,
    TeacherConfig,
)
from hovle_jax.errors import UserError

Raw = Mapping[str, Any]

# What the classes of the reference and of transformers assume where config.json says nothing.
_EMBEDDING_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 4096}
_LLM_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048}
_ARCHITECTURES = {
    "InternLM2ForCausalLM": "internlm2",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
}


def hovle_config(raw: Raw, name: str = "hovle") -> ModelConfig:
    """A released HoVLE or HoVLE-HD."""
    e, llm = raw["embedding_config"], raw["llm_config"]
    if e.get("use_ls", True):
        raise UserError("embedding_config.use_ls must be false: the layers have no LayerScale")
    base = llm_config(llm, name)
    projector = e.get("use_pixel_shuffle_proj", True)
    image = e["img_context_token_id"]
    return dataclasses.replace(
        base,
        table_rows=0 if e["llm_vocab_size"] == base.vocab_size else e["llm_vocab_size"],
        special_tokens=len(e.get("special_token_maps") or {}),
        embedding=_layers(e, _EMBEDDING_DEFAULTS, bias=e.get("attention_bias", False)),
        image_size=e["image_size"],
        patch_size=e.get("patch_size", 14),
        shuffle=round(1 / e.get("downsample_ratio", 0.5)) if projector else 1,
        shuffle_loc=e.get("pixel_shuffle_loc", "pre"),
        projector=projector,
        normalize_embeddings=raw.get("normalize_encoder_output", False),
        **_image_ids(image, raw),
    )


def fused_config(raw: Raw, name: str = "hovle") -> ModelConfig:
    """HoVLE exported with its layers fused into one Llama (`embedding_layers` of them first)."""
    base, vision = llm_config(raw["text_config"], name), raw["vision_config"]
    first = raw["embedding_layers"]
    total = base.decoder.num_layers
    return dataclasses.replace(
        base,
        embedding=dataclasses.replace(base.decoder, num_layers=first),
        decoder=dataclasses.replace(base.decoder, num_layers=total - first),
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        shuffle=round(1 / vision["downsample_ratio"]),
        projector=vision["use_pixel_shuffle_proj"],
        llm_family="internlm2",
        **_image_ids(raw["image_token_id"], raw),
    )


def llm_config(raw: Raw, name: str = "llm") -> ModelConfig:
    """An LLM alone; everything that is not the LLM's keeps the project's defaults."""
    architecture = (raw.get("architectures") or [""])[0]
    family = _ARCHITECTURES.get(architecture, "") if architecture else raw.get("model_type", "")
    if family not in _ARCHITECTURES.values():
        raise UserError(
            f"LLM {(architecture or family)!r} is not one of {', '.join(_ARCHITECTURES)}"
        )
    if raw.get("mlp_bias"):
        raise UserError("mlp_bias is not supported")
    if raw.get("use_sliding_window"):
        raise UserError("use_sliding_window is not supported; attention is over everything before")
    bias = {"internlm2": "bias", "llama": "attention_bias"}.get(family)
    has_bias = bool(raw.get(bias, False)) if bias else True
    decoder = _layers(raw, _LLM_DEFAULTS, bias=has_bias, out_bias=has_bias and bias is not None)
    ids: dict[str, Any] = {"bos_id": raw.get("bos_token_id"), "eos_id": raw.get("eos_token_id")}
    ids["pad_id"] = raw.get("pad_token_id", ids["eos_id"])
    ids = {k: v[0] if isinstance(v, list) else v for k, v in ids.items()}
    return ModelConfig(
        name=name,
        vocab_size=raw["vocab_size"],
        decoder=decoder,
        embedding=dataclasses.replace(decoder, num_layers=8, qkv_bias=False, out_bias=False),
        llm_family=family,
        tie_head=raw.get("tie_word_embeddings", False),
        **{k: v for k, v in ids.items() if v is not None},
    )


def internvl_llm(raw: Raw, name: str = "llm") -> ModelConfig:
    """The LLM inside an InternVL, custom or transformers' own."""
    if "llm_config" in raw:
        config = llm_config(raw["llm_config"], name)
        # Known to the tokenizer only: <IMG_CONTEXT> is the third of the nine tokens at the end.
        return dataclasses.replace(config, **_image_ids(config.vocab_size - 7))
    # transformers 5 ties by the outer key, whose default is true; 4 by the inner one.
    text = raw["text_config"]
    tied = raw.get("tie_word_embeddings", True) or text.get("tie_word_embeddings", False)
    config = llm_config(dict(text) | {"tie_word_embeddings": tied}, name)
    return dataclasses.replace(config, **_image_ids(raw["image_token_id"]))


def data_config(raw: Raw) -> DataConfig:
    """Chat template and tile limits of a released checkpoint."""
    return DataConfig(
        template=raw.get("template") or "internlm2-chat",
        min_tiles=raw.get("min_dynamic_patch", 1),
        max_tiles=raw.get("max_dynamic_patch", 12),
        thumbnail=raw.get("use_thumbnail", True),
    )


def teacher_config(raw: Raw) -> TeacherConfig:
    """The vision tower and mlp1 of an InternVL, custom or transformers' own."""
    v, own = raw["vision_config"], raw.get("model_type") == "internvl"
    if own and not v.get("use_mean_pooling", True):
        raise UserError("vision_config.use_mean_pooling=false adds a final norm: not supported")
    if v.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"vision_config.hidden_act {v['hidden_act']!r} is not 'gelu'")
    norm = {"layer_norm": "layer", "rms_norm": "rms"}.get(v.get("norm_type", "layer_norm"))
    if norm is None:
        raise UserError(f"vision_config.norm_type {v['norm_type']!r} is not layer_norm or rms_norm")
    return TeacherConfig(
        num_layers=v["num_hidden_layers"],
        hidden_size=v["hidden_size"],
        num_heads=v["num_attention_heads"],
        intermediate_size=v["intermediate_size"],
        image_size=_side(v["image_size"]),
        patch_size=_side(v["patch_size"]),
        shuffle=round(1 / raw.get("downsample_ratio", 0.5)),
        shuffle_version="v2" if own else raw.get("ps_version", "v1"),
        norm=norm,
        norm_eps=v.get("layer_norm_eps", 1e-6),
        qkv_bias=v.get("attention_bias", False) if own else v.get("qkv_bias", True),
        qk_norm=v.get("use_qk_norm", False) if own else v.get("qk_normalization", False),
        select_layer=raw.get("vision_feature_layer" if own else "select_layer", -1),
        out_size=raw["llm_config" if "llm_config" in raw else "text_config"]["hidden_size"],
    )


def _side(size: Any) -> int:
    """transformers writes [448, 448] where others write 448."""
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise UserError(f"vision_config: {size} is not square")
    return size[0]


_ID_KEYS = {
    "img_start_token_id": "img_start_id",
    "img_end_token_id": "img_end_id",
    "im_end_token_id": "im_end_id",
}


def _image_ids(image: int, raw: Raw = MappingProxyType({})) -> dict[str, Any]:
    """Ids of the chat's added tokens. Released configs name one of them; the others stand in their
    released order, <|im_end|>, <|im_start|>, <img>, </img>, <IMG_CONTEXT>."""
    ids = {"img_end_id": image - 1, "img_start_id": image - 2, "im_end_id": image - 4}
    named = {ours: raw[key] for key, ours in _ID_KEYS.items() if key in raw}
    return {"img_context_id": image} | ids | named


def _layers(c: Raw, defaults: Raw, *, bias: bool, out_bias: bool | None = None) -> LayersConfig:
    if c.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {c['hidden_act']!r} is not 'silu'")
    scaling = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "none", "linear", "dynamic"):
        raise UserError(f"rope scaling {kind!r} is not one of default, linear, dynamic")
    theta: Any = scaling.get("rope_theta", c.get("rope_theta", defaults["rope_theta"]))
    heads = c["num_attention_heads"]
    return LayersConfig(
        num_layers=c["num_hidden_layers"],
        hidden_size=c["hidden_size"],
        num_heads=heads,
        num_kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        intermediate_size=c["intermediate_size"],
        rms_norm_eps=float(c.get("rms_norm_eps", defaults["rms_norm_eps"])),
        rope_theta=float(theta),
        rope_scaling="none" if kind in ("default", "none") else kind,
        rope_factor=float(scaling.get("factor", 1.0)),
        max_positions=c.get("max_position_embeddings", defaults["max_position_embeddings"]),
        qkv_bias=bias,
        out_bias=bias if out_bias is None else out_bias,
        initializer_range=c.get("initializer_range", 0.02),
    )


# --- and back -----------------------------------------------------------------------------------

_CLASS = "HoVLEForConditionalGeneration"
_FUSED_CLASS = "HoVLEFusedForConditionalGeneration"


def hovle_json(c: ModelConfig, data: DataConfig, dtype: str) -> dict[str, Any]:
    """config.json in the released layout; the released code and ours both read it.

    Raises:
      UserError: settings the released layout cannot express.
    """
    stacks = {"embedding": c.embedding, "decoder": c.decoder}
    for name, stack in stacks.items():
        if stack.qkv_bias != stack.out_bias and not (name == "decoder" and c.llm_family == "qwen2"):
            raise UserError(f"model.{name}: qkv_bias and out_bias are one setting in this format")
        derived = name == "embedding" or c.llm_family == "internlm2"  # no head_dim in the format
        if derived and stack.head_dim * stack.num_heads != stack.hidden_size:
            raise UserError(f"model.{name}: num_heads x head_dim is not hidden_size")
    if c.llm_family == "qwen2" and not (c.decoder.qkv_bias and not c.decoder.out_bias):
        raise UserError("model.decoder: Qwen2 has biases in q, k and v and none in o")
    main = f"modeling_hovle.{_CLASS}"
    special = {f"<special_{i}>": c.text_rows + i for i in range(c.special_tokens)}
    return {
        "architectures": [_CLASS],
        "model_type": "hovle",
        "auto_map": _auto_map("HoVLEConfig", main, main),
        "bos_token_id": c.bos_id,
        "downsample_ratio": 1 / c.shuffle,
        "dynamic_image_size": True,
        "embedding_config": {
            "architectures": ["HolisticEmbedding"],
            "model_type": "holistic_embedding",
            "attention_bias": c.embedding.qkv_bias,
            "attention_dropout": 0.0,
            "attn_implementation": "eager",  # the released code reads it; ours takes an argument
            "downsample_ratio": 1 / c.shuffle,
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "image_size": c.image_size,
            "img_context_token_id": c.img_context_id,
            "llm_hidden_size": c.hidden_size,
            "llm_vocab_size": c.text_rows,
            "mlp_bias": False,
            "num_channels": 3,
            "patch_size": c.patch_size,
            "pixel_shuffle_loc": c.shuffle_loc,
            "special_token_maps": special,
            "use_ls": False,
            "use_pixel_shuffle_proj": c.projector,
            **_layers_json(c.embedding),
        },
        "eos_token_id": c.eos_id,
        "force_image_size": c.image_size,
        "image_token_id": c.img_context_id,
        **{key: getattr(c, ours) for key, ours in _ID_KEYS.items()},
        "llm_config": _llm_json(c, c.llm_family, dtype),
        "max_dynamic_patch": data.max_tiles,
        "min_dynamic_patch": data.min_tiles,
        "normalize_encoder_output": c.normalize_embeddings,
        "pad_token_id": c.pad_id,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": data.template,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_thumbnail": data.thumbnail,
    }


def fused_json(c: ModelConfig, data: DataConfig, dtype: str) -> dict[str, Any]:
    """config.json of a model whose two stacks are one Llama.

    Raises:
      UserError: a model that is no such thing, with the reason.
    """
    for name, exact in (
        ("model.shuffle_loc is 'post'", c.shuffle_loc == "pre"),
        ("model.normalize_embeddings stands between the stacks", not c.normalize_embeddings),
        ("the special-token table is separate", not c.special_tokens and not c.table_rows),
        (
            "dynamic rope follows a batch's longest row in Llama",
            c.decoder.rope_scaling != "dynamic",
        ),
        ("Llama has biases in q, k, v and o or in none", c.decoder.qkv_bias == c.decoder.out_bias),
    ):
        if not exact:
            raise UserError(f"--flavour fused is not exact for this model: {name}")
    for field in dataclasses.fields(LayersConfig):
        ours, theirs = getattr(c.embedding, field.name), getattr(c.decoder, field.name)
        if ours != theirs and field.name not in ("num_layers", "initializer_range"):
            raise UserError(
                f"--flavour fused is not exact for this model: {field.name} is {ours} in the "
                f"embedding module and {theirs} in the LLM"
            )
    main = f"modeling_hovle_fused.{_FUSED_CLASS}"
    layers = c.embedding.num_layers + c.decoder.num_layers
    return {
        "architectures": [_FUSED_CLASS],
        "model_type": "hovle",
        "auto_map": _auto_map("HoVLEFusedConfig", "modeling_hovle_fused.HoVLEFusedModel", main),
        "bos_token_id": c.bos_id,
        "embedding_layers": c.embedding.num_layers,
        "eos_token_id": c.eos_id,
        "image_token_id": c.img_context_id,
        **{key: getattr(c, ours) for key, ours in _ID_KEYS.items()},
        "max_dynamic_patch": data.max_tiles,
        "min_dynamic_patch": data.min_tiles,
        "pad_token_id": c.pad_id,
        "template": data.template,
        "text_config": _llm_json(c, "llama", dtype)
        | {"num_hidden_layers": layers, "tie_word_embeddings": False},
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_thumbnail": data.thumbnail,
        "vision_config": {
            "model_type": "hovle_vision",
            "downsample_ratio": 1 / c.shuffle,
            "hidden_size": c.hidden_size,
            "image_size": c.image_size,
            "num_channels": 3,
            "patch_size": c.patch_size,
            "use_pixel_shuffle_proj": c.projector,
        },
    }


def generation_json(c: ModelConfig) -> dict[str, Any]:
    """generation_config.json: an answer ends at <|im_end|>."""
    return {
        "bos_token_id": c.bos_id,
        "eos_token_id": [c.im_end_id, c.eos_id],
        "pad_token_id": c.pad_id,
    }


def processor_json(c: ModelConfig, data: DataConfig) -> dict[str, dict[str, Any]]:
    """The two files AutoProcessor reads, by name."""
    processor = {"AutoProcessor": "processing_hovle.HoVLEProcessor"}
    image = {"AutoImageProcessor": "image_processing_hovle.HoVLEImageProcessor"}
    return {
        "preprocessor_config.json": {
            "image_processor_type": "HoVLEImageProcessor",
            "processor_class": "HoVLEProcessor",
            "auto_map": image | processor,
            "image_size": c.image_size,
            "image_mean": list(IMAGE_MEAN),
            "image_std": list(IMAGE_STD),
            "max_dynamic_patch": data.max_tiles,
            "min_dynamic_patch": data.min_tiles,
            "use_thumbnail": data.thumbnail,
        },
        "processor_config.json": {
            "processor_class": "HoVLEProcessor",
            "auto_map": processor,
            "tokens_per_tile": c.tokens_per_tile,
        },
    }


def _auto_map(config: str, base: str, main: str) -> dict[str, str]:
    return {
        "AutoConfig": f"configuration_hovle.{config}",
        "AutoModel": base,
        "AutoModelForCausalLM": main,
        "AutoModelForImageTextToText": main,
    }


def _llm_json(c: ModelConfig, family: str, dtype: str) -> dict[str, Any]:
    architecture = next(k for k, v in _ARCHITECTURES.items() if v == family)
    bias, head_dim = c.decoder.qkv_bias, c.decoder.head_dim
    own: dict[str, dict[str, Any]] = {
        "internlm2": {"bias": bias, "attn_implementation": "eager"},
        "llama": {"attention_bias": bias, "mlp_bias": False, "head_dim": head_dim},
        "qwen2": {"use_sliding_window": False, "head_dim": head_dim},
    }
    return {
        "architectures": [architecture],
        "model_type": family,
        **own[family],
        "bos_token_id": c.bos_id,
        "eos_token_id": c.eos_id,
        "pad_token_id": c.pad_id,
        "tie_word_embeddings": c.tie_head,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": c.vocab_size,
        **_layers_json(c.decoder),
    }


def _layers_json(s: LayersConfig) -> dict[str, Any]:
    scaled = s.rope_scaling != "none"
    return {
        "hidden_act": "silu",
        "hidden_size": s.hidden_size,
        "initializer_range": s.initializer_range,
        "intermediate_size": s.intermediate_size,
        "max_position_embeddings": s.max_positions,
        "num_attention_heads": s.num_heads,
        "num_hidden_layers": s.num_layers,
        "num_key_value_heads": s.num_kv_heads,
        "rms_norm_eps": s.rms_norm_eps,
        "rope_scaling": {"type": s.rope_scaling, "factor": s.rope_factor} if scaled else None,
        "rope_theta": s.rope_theta,
    }
