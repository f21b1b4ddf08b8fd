"""The project's config dataclasses -> JSON files of a Hugging Face directory."""

from __future__ import annotations

import dataclasses
from typing import Any

from hovle_jax.config import IMAGE_MEAN, IMAGE_STD, DataConfig, LayersConfig, ModelConfig
from hovle_jax.errors import UserError
from hovle_jax.hf.configs import ID_KEYS, IMAGE_MASKS, IMAGE_POSITIONS
from hovle_jax.hf.families import FAMILIES

_CLASS = "HoVLEForConditionalGeneration"
_FUSED_CLASS = "HoVLEFusedForConditionalGeneration"


def hovle_json(c: ModelConfig, data: DataConfig, dtype: str) -> dict[str, Any]:
    """config.json in the released layout; the released code and ours both read it.

    Raises:
      UserError: settings the released layout cannot express.
    """
    if c.embedding.qkv_bias != c.embedding.out_bias:
        raise UserError("model.embedding: qkv_bias and out_bias are one setting in this format")
    _check_exported(c)
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
            **_beyond_release(c.embedding),
        },
        "eos_token_id": c.eos_id,
        "force_image_size": c.image_size,
        "image_token_id": c.img_context_id,
        **{key: getattr(c, ours) for key, ours in ID_KEYS.items()},
        "llm_config": _llm_json(c, c.llm_family, dtype),
        "max_dynamic_patch": data.max_tiles,
        "min_dynamic_patch": data.min_tiles,
        "normalize_encoder_output": c.normalize_embeddings,
        "pad_token_id": c.pad_id,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "system_message": data.system,
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
        ("Llama's attention is causal", c.embedding.mask == c.decoder.mask == "causal"),
        ("Llama's positions are 1-D", c.embedding.positions == c.decoder.positions == "1d"),
        (
            "dynamic rope follows a batch's longest row in Llama",
            c.decoder.rope_scaling != "dynamic",
        ),
        ("Llama has biases in q, k, v and o or in none", c.decoder.qkv_bias == c.decoder.out_bias),
        ("Llama has no norms of q and k", not c.decoder.qk_norm),
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
        **{key: getattr(c, ours) for key, ours in ID_KEYS.items()},
        "max_dynamic_patch": data.max_tiles,
        "min_dynamic_patch": data.min_tiles,
        "pad_token_id": c.pad_id,
        "system_message": data.system,
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
    entry = FAMILIES.find(family)
    return {
        "architectures": [entry.architecture],
        "model_type": family,
        **entry.write(family, c.decoder),
        "bos_token_id": c.bos_id,
        "eos_token_id": c.eos_id,
        "pad_token_id": c.pad_id,
        "tie_word_embeddings": c.tie_head,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": c.vocab_size,
        **_layers_json(c.decoder),
    }


def _beyond_release(s: LayersConfig) -> dict[str, Any]:
    """Keys of the embedding module that the released code does not know, where they say more than
    it assumes."""
    out: dict[str, Any] = {"qk_norm": True} if s.qk_norm else {}
    wide = s.num_heads * s.head_dim != s.hidden_size
    return out | {"head_dim": s.head_dim} if wide else out


def _check_exported(c: ModelConfig) -> None:
    """What `hf/remote` computes."""
    for name, stack in c.stacks.items():
        for field, known in (("mask", IMAGE_MASKS), ("positions", IMAGE_POSITIONS)):
            value = getattr(stack, field)
            if value not in known:
                raise UserError(
                    f"model.{name}.{field}={value!r}: the exported format knows "
                    f"{', '.join(known)} only"
                )
            if name == "decoder" and value != known[0] and c.llm_family != "internlm2":
                raise UserError(
                    f"model.decoder.{field}={value!r}: exports of family {c.llm_family!r} run "
                    f"transformers' own LLM, which is {known[0]!r}"
                )


def _layers_json(s: LayersConfig) -> dict[str, Any]:
    scaled = s.rope_scaling != "none"
    ours = {"image_mask": s.mask, "image_positions": s.positions}
    return {
        **{k: v for k, v in ours.items() if v not in (IMAGE_MASKS[0], IMAGE_POSITIONS[0])},
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
