"""config.json of Hugging Face directories -> the project's config dataclasses.

`tokens` are ids that the directory's tokenizer files give ({ModelConfig field: id}, `hf.tokens`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hovle_jax.config import DataConfig, LayersConfig, ModelConfig, TeacherConfig
from hovle_jax.errors import UserError
from hovle_jax.hf.families import FAMILIES, FLAGS, family_of
from hovle_jax.hf.section import Section

Ids = Mapping[str, Any]

# What the classes of the reference and of transformers assume where config.json says nothing.
_EMBEDDING_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 4096}
_LLM_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048}
# Ids of the chat's tokens that released configs leave to the tokenizer.
ID_KEYS = {
    "img_start_token_id": "img_start_id",
    "img_end_token_id": "img_end_id",
    "im_end_token_id": "im_end_id",
}
# What the exported code knows of `LayersConfig.mask` and `positions`; plain ones are not written.
IMAGE_MASKS = ("causal", "bidirectional", "prefix")
IMAGE_POSITIONS = ("1d", "2d", "3d")
_NO_IDS: Ids = MappingProxyType({})
_DATA_KEYS = (
    *("template", "system_message"),
    *("min_dynamic_patch", "max_dynamic_patch", "use_thumbnail"),
)


def hovle_config(raw: Section, name: str = "hovle", tokens: Ids = _NO_IDS) -> ModelConfig:
    """A released HoVLE or HoVLE-HD."""
    e = raw.section("embedding_config")
    if e.flag("use_ls", True):
        raise UserError("embedding_config.use_ls must be false: the layers have no LayerScale")
    base = llm_config(raw.section("llm_config"), name)
    projector = e.flag("use_pixel_shuffle_proj", True)
    rows = e.count("llm_vocab_size")
    config = dataclasses.replace(
        base,
        table_rows=0 if rows == base.vocab_size else rows,
        special_tokens=len(e.section("special_token_maps")) if e.has("special_token_maps") else 0,
        embedding=_layers(e, _EMBEDDING_DEFAULTS, _embedding_flags(e)),
        image_size=e.count("image_size"),
        patch_size=e.count("patch_size", 14),
        shuffle=_shuffle(e) if projector else 1,
        shuffle_loc=e.one_of("pixel_shuffle_loc", ("pre", "post"), "pre"),
        projector=projector,
        normalize_embeddings=raw.flag("normalize_encoder_output", False),
        **_image_ids(e.token("img_context_token_id"), tokens, raw),
    )
    return _in_range(config)


def fused_config(raw: Section, name: str = "hovle", tokens: Ids = _NO_IDS) -> ModelConfig:
    """HoVLE exported with its layers fused into one Llama (`embedding_layers` of them first)."""
    base, vision = llm_config(raw.section("text_config"), name), raw.section("vision_config")
    first, total = raw.count("embedding_layers"), base.decoder.num_layers
    if first >= total:
        raise UserError(f"embedding_layers {first} leave no layer of {total} to the LLM")
    config = dataclasses.replace(
        base,
        embedding=dataclasses.replace(base.decoder, num_layers=first),
        decoder=dataclasses.replace(base.decoder, num_layers=total - first),
        image_size=vision.count("image_size"),
        patch_size=vision.count("patch_size"),
        shuffle=_shuffle(vision),
        projector=vision.flag("use_pixel_shuffle_proj"),
        llm_family="internlm2",
        **_image_ids(raw.token("image_token_id"), tokens, raw),
    )
    return _in_range(config)


def llm_config(raw: Section, name: str = "llm", tokens: Ids = _NO_IDS) -> ModelConfig:
    """An LLM alone; everything that is not the LLM's keeps the project's defaults."""
    family = _family(raw)
    if raw.flag("mlp_bias", False):
        raise UserError(f"{raw.name('mlp_bias')} is not supported")
    decoder = _layers(raw, _LLM_DEFAULTS, {})
    decoder = dataclasses.replace(decoder, **FAMILIES.find(family).read(raw))
    vocab = raw.count("vocab_size")
    ids: dict[str, Any] = {
        f"{key}_id": _first_id(raw, f"{key}_token_id", vocab) for key in ("bos", "eos", "pad")
    }
    ids["pad_id"] = ids["eos_id"] if ids["pad_id"] is None else ids["pad_id"]
    plain: dict[str, Any] = dict.fromkeys(FLAGS, False)
    return ModelConfig(
        name=name,
        vocab_size=vocab,
        decoder=decoder,
        embedding=dataclasses.replace(decoder, num_layers=8, **plain),
        llm_family=family,
        tie_head=raw.flag("tie_word_embeddings", False),
        **{k: v for k, v in ids.items() if v is not None},
        **tokens,
    )


def internvl_llm(raw: Section, name: str = "llm", tokens: Ids = _NO_IDS) -> ModelConfig:
    """The LLM inside an InternVL, custom or transformers' own."""
    if "llm_config" in raw:
        config = llm_config(raw.section("llm_config"), name)
        # Known to the tokenizer only: <IMG_CONTEXT> is the third of the nine tokens at the end.
        image = tokens.get("img_context_id", config.vocab_size - 7)
    else:
        # transformers 5 ties by the outer key, whose default is true; 4 by the inner one.
        text = raw.section("text_config")
        tied = raw.flag("tie_word_embeddings", True) or text.flag("tie_word_embeddings", False)
        config = llm_config(text, name)
        config = dataclasses.replace(config, tie_head=tied)
        image = raw.token("image_token_id")
    return _in_range(dataclasses.replace(config, **_image_ids(image, tokens)))


def _family(raw: Section) -> str:
    listed = raw["architectures"] if raw.has("architectures") else []
    if not isinstance(listed, list) or not all(isinstance(x, str) for x in listed):
        raise raw.expected("architectures", "a list of names")
    architecture = listed[0] if listed else ""
    kind = "" if architecture else raw.text("model_type", "")
    return family_of(architecture, kind)


def _embedding_flags(e: Section) -> dict[str, Any]:
    bias = e.flag("attention_bias", False)
    return {"qkv_bias": bias, "out_bias": bias, "qk_norm": e.flag("qk_norm", False)}


def _first_id(raw: Section, key: str, vocab: int) -> int | None:
    """A token id, the first of a list of them, or None."""
    if not raw.has(key):
        return None
    listed = raw[key] if isinstance(raw[key], list) else [raw[key]]
    ids = [Section({key: x}, raw.where).token(key) for x in listed]
    if not ids:
        raise raw.expected(key, "a token id")
    if max(ids) >= vocab:
        raise UserError(f"{raw.name(key)} {max(ids)} is outside of vocab_size {vocab}")
    return ids[0]


def data_config(raw: Section) -> DataConfig | None:
    """Chat template, system message and tile limits; None of a model that names none of them."""
    if not any(key in raw for key in _DATA_KEYS):
        return None
    least, most = raw.count("min_dynamic_patch", 1), raw.count("max_dynamic_patch", 12)
    if least > most:
        raise UserError(f"min_dynamic_patch {least} is more than max_dynamic_patch {most}")
    return DataConfig(
        template=raw.text("template") if raw.has("template") else "internlm2-chat",
        system=raw.text("system_message") if raw.has("system_message") else None,
        min_tiles=least,
        max_tiles=most,
        thumbnail=raw.flag("use_thumbnail", True),
    )


def teacher_config(raw: Section) -> TeacherConfig:
    """The vision tower and mlp1 of an InternVL, custom or transformers' own."""
    v, own = raw.section("vision_config"), raw.get("model_type") == "internvl"
    if own:
        if not v.flag("use_mean_pooling", True):
            raise UserError("vision_config.use_mean_pooling=false adds a final norm: not supported")
        raw.one_of("projector_hidden_act", ("gelu",), "gelu")
        raw.one_of("vision_feature_select_strategy", ("default",), "default")
    v.one_of("hidden_act", ("gelu",), "gelu")
    norm = v.one_of("norm_type", ("layer_norm", "rms_norm"), "layer_norm")
    layers, heads, width = (
        v.count(k) for k in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    if width % heads:
        raise UserError(f"{v.name('hidden_size')} {width} is not a multiple of {heads} heads")
    select_key = "vision_feature_layer" if own else "select_layer"
    select = raw.integer(select_key, -1)
    if not -layers - 1 <= select <= layers:
        raise UserError(f"{select_key} {select} is not a hidden state of {layers} layers")
    image, patch, shuffle = _side(v, "image_size"), _side(v, "patch_size"), _shuffle(raw)
    if image % (patch * shuffle):
        raise UserError(
            f"{v.name('image_size')} {image} is not a multiple of patch_size x shuffle "
            f"({patch} x {shuffle})"
        )
    version = "v2" if own else raw.one_of("ps_version", ("v1", "v2"), "v1")
    return TeacherConfig(
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        intermediate_size=v.count("intermediate_size"),
        image_size=image,
        patch_size=patch,
        shuffle=shuffle,
        shuffle_version=version,
        norm={"layer_norm": "layer", "rms_norm": "rms"}[norm],
        norm_eps=v.number("layer_norm_eps", 1e-6),
        qkv_bias=v.flag("attention_bias", False) if own else v.flag("qkv_bias", True),
        qk_norm=v.flag("use_qk_norm" if own else "qk_normalization", False),
        select_layer=select,
        out_size=raw.section("llm_config" if "llm_config" in raw else "text_config").count(
            "hidden_size"
        ),
    )


def _side(raw: Section, key: str) -> int:
    """transformers writes [448, 448] where others write 448."""
    if not isinstance(raw.get(key), list):
        return raw.count(key)
    sides = [Section({key: x}, raw.where).count(key) for x in raw[key]]
    if len(sides) != 2 or sides[0] != sides[1]:
        raise UserError(f"{raw.name(key)}: {raw[key]} is not square")
    return sides[0]


def _shuffle(raw: Section) -> int:
    """Patches along one side of what becomes one token."""
    ratio = raw.number("downsample_ratio", 0.5)
    side = round(1 / max(ratio, 1e-3))
    if abs(ratio * side - 1) > 1e-3:
        raise raw.expected("downsample_ratio", "1, 1/2, 1/3 or so on")
    return side


def _image_ids(image: int, tokens: Ids, raw: Mapping[str, Any] = MappingProxyType({})) -> Ids:
    """Ids of the chat's added tokens: as config.json names them, else as the tokenizer does, else
    in their released order, <|im_end|>, <|im_start|>, <img>, </img>, <IMG_CONTEXT>."""
    ids = {"img_end_id": image - 1, "img_start_id": image - 2, "im_end_id": image - 4}
    section = Section(raw)
    named = {ours: section.token(key) for key, ours in ID_KEYS.items() if key in section}
    return ids | dict(tokens) | named | {"img_context_id": image}


def _in_range(c: ModelConfig) -> ModelConfig:
    rows = max(c.vocab_size, c.text_rows + c.special_tokens)
    for field in ("img_context_id", *ID_KEYS.values()):
        if not 0 <= getattr(c, field) < rows:
            raise UserError(
                f"{field.replace('_id', '_token_id')} would be {getattr(c, field)}, which is "
                f"outside of the vocabulary of {rows} tokens"
            )
    return c


def _layers(c: Section, defaults: Any, flags: Mapping[str, Any]) -> LayersConfig:
    c.one_of("hidden_act", ("silu",), "silu")
    if c.flag("use_sliding_window", False):
        raise UserError(f"{c.name('use_sliding_window')}: attention is over everything before")
    kinds = c["layer_types"] if c.has("layer_types") else []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise c.expected("layer_types", "'full_attention' only")
    heads, width = c.count("num_attention_heads"), c.count("hidden_size")
    kv_heads = c.count("num_key_value_heads") if c.has("num_key_value_heads") else heads
    if heads % kv_heads:
        raise UserError(f"{c.name('num_attention_heads')} {heads} is no multiple of {kv_heads}")
    if not c.has("head_dim") and width % heads:
        raise UserError(f"{c.name('hidden_size')} {width} is no multiple of {heads} heads")
    head_dim = c.count("head_dim") if c.has("head_dim") else width // heads
    if head_dim % 2:
        raise UserError(f"{c.name('head_dim')} {head_dim} is odd: rotary embedding needs pairs")
    return LayersConfig(
        num_layers=c.count("num_hidden_layers"),
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=c.count("intermediate_size"),
        rms_norm_eps=c.number("rms_norm_eps", defaults["rms_norm_eps"]),
        max_positions=c.count("max_position_embeddings", defaults["max_position_embeddings"]),
        initializer_range=c.number("initializer_range", 0.02),
        mask=c.one_of("image_mask", IMAGE_MASKS, IMAGE_MASKS[0]),
        positions=c.one_of("image_positions", IMAGE_POSITIONS, IMAGE_POSITIONS[0]),
        **flags,
        **_rope(c, defaults["rope_theta"]),
    )


def _rope(c: Section, theta: float) -> dict[str, Any]:
    """transformers 4 has `rope_theta` and `rope_scaling`, 5 has `rope_parameters` of both."""
    key = "rope_scaling" if c.get("rope_parameters") in (None, {}) else "rope_parameters"
    scaling = c.section(key) if c.has(key) else Section({}, c.name(key))
    if scaling and all(isinstance(x, Mapping) for x in scaling.values()):
        raise UserError(f"{c.name(key)}: one rope per kind of layer is not supported")
    for section in (c, scaling):
        if section.has("partial_rotary_factor") and section.number("partial_rotary_factor") != 1:
            raise section.expected("partial_rotary_factor", "1: all of a head is rotated")
    kind = scaling.text("rope_type" if "rope_type" in scaling else "type", "default")
    if kind not in ("default", "none", "linear", "dynamic"):
        raise UserError(f"rope scaling {kind!r} is not one of default, linear, dynamic")
    scaled = kind in ("linear", "dynamic")
    factor = scaling.number("factor") if scaled else 1.0
    if factor < 1:
        raise scaling.expected("factor", "1 or more")
    own = scaling if "rope_theta" in scaling else c
    return {
        "rope_theta": own.number("rope_theta", theta),
        "rope_scaling": kind if scaled else "none",
        "rope_factor": factor,
    }
