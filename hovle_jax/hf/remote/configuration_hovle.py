# SPDX-License-Identifier: Apache-2.0
"""Configurations of HoVLE: the released layout (`HoVLEConfig`) and the fused one."""

import copy

from transformers import CONFIG_MAPPING, LlamaConfig, PretrainedConfig


class StackConfig(PretrainedConfig):
    """What the embedding module and InternLM2 share: a stack of InternLM2-shaped layers.

    Rotary settings come as `rope_theta` + `rope_scaling` (released files) or as `rope_parameters`
    (transformers v5) and are kept as the latter: {"rope_type": "default", "linear" or "dynamic",
    "rope_theta": float, "factor": float}.
    """

    def __init__(
        self,
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=None,
        head_dim=None,
        qk_norm=False,
        intermediate_size=8192,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        initializer_range=0.02,
        rope_theta=10000.0,
        rope_scaling=None,
        rope_parameters=None,
        image_mask="causal",
        image_positions="1d",
        **kwargs,
    ):
        kwargs.pop("model_type", None)
        # Whoever loads the model chooses the attention; files name what trained it.
        kwargs.pop("attn_implementation", None)
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.qk_norm = qk_norm
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        rope = dict(rope_parameters or rope_scaling or {})
        kind = rope.pop("type", None)
        rope.setdefault("rope_type", kind or "default")
        rope.setdefault("rope_theta", rope_theta)
        if rope["rope_type"] not in ("default", "linear", "dynamic"):
            raise ValueError(f"rope_type {rope['rope_type']!r} is not default, linear or dynamic")
        self.rope_theta = rope["rope_theta"]
        self.rope_parameters = rope
        if image_mask not in ("causal", "bidirectional", "prefix"):
            raise ValueError(f"image_mask {image_mask!r} is not causal, bidirectional or prefix")
        if image_positions not in ("1d", "2d", "3d"):
            raise ValueError(f"image_positions {image_positions!r} is not 1d, 2d or 3d")
        self.image_mask = image_mask
        self.image_positions = image_positions


class HoVLEEmbeddingConfig(StackConfig):
    """The holistic embedding module: patch embedding, text table and its layers."""

    model_type = "holistic_embedding"

    def __init__(
        self,
        num_hidden_layers=8,
        image_size=448,
        patch_size=14,
        num_channels=3,
        downsample_ratio=0.5,
        pixel_shuffle_loc="pre",
        use_pixel_shuffle_proj=True,
        llm_vocab_size=92553,
        special_token_maps=None,
        img_context_token_id=92546,
        attention_bias=False,
        **kwargs,
    ):
        super().__init__(num_hidden_layers=num_hidden_layers, **kwargs)
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.downsample_ratio = downsample_ratio
        self.pixel_shuffle_loc = pixel_shuffle_loc
        self.use_pixel_shuffle_proj = use_pixel_shuffle_proj
        self.llm_vocab_size = llm_vocab_size
        self.special_token_maps = special_token_maps or {}
        self.img_context_token_id = img_context_token_id
        self.attention_bias = attention_bias

    @property
    def shuffle(self):
        """Each shuffle x shuffle block of patches is one LLM token."""
        return round(1 / self.downsample_ratio) if self.use_pixel_shuffle_proj else 1


class InternLM2Config(StackConfig):
    model_type = "internlm2"

    def __init__(
        self,
        vocab_size=92553,
        bias=False,
        use_cache=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        **kwargs,
    ):
        super().__init__(
            rms_norm_eps=rms_norm_eps, max_position_embeddings=max_position_embeddings, **kwargs
        )
        self.vocab_size = vocab_size
        self.attention_bias = self.bias = bias
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings


def make_llm_config(config):
    """InternLM2's is above; of other LLMs, transformers has the config class."""
    kind = config.get("model_type", "internlm2")
    if kind != "internlm2" and kind not in CONFIG_MAPPING:
        raise ValueError(f"llm_config: transformers knows no model_type {kind!r}")
    cls = InternLM2Config if kind == "internlm2" else CONFIG_MAPPING[kind]
    return cls(**{**config, "attn_implementation": None})


def flat_rope(config):
    """A config dict as saved by transformers v5, with rotary settings where v4 looks for them."""
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config = {"rope_theta": rope["rope_theta"], **config}
    if rope.get("rope_type", "default") != "default":
        config = {"rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}, **config}
    return config


class HoVLEConfig(PretrainedConfig):
    """An embedding module and an LLM; takes the config.json of released models unchanged."""

    model_type = "hovle"
    sub_configs = {"embedding_config": HoVLEEmbeddingConfig, "llm_config": PretrainedConfig}

    def __init__(
        self,
        embedding_config=None,
        llm_config=None,
        normalize_encoder_output=False,
        image_token_id=None,
        **kwargs,
    ):
        kwargs.pop("model_type", None)
        if not isinstance(embedding_config, PretrainedConfig):
            embedding_config = HoVLEEmbeddingConfig(**(embedding_config or {}))
        if not isinstance(llm_config, PretrainedConfig):
            llm_config = make_llm_config(flat_rope(llm_config or {}))
        self.embedding_config = embedding_config
        self.llm_config = llm_config
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if kwargs.get(name) is None:
                kwargs[name] = getattr(llm_config, name, None)
        kwargs["tie_word_embeddings"] = False  # of this class's own tables; the LLM ties its own
        super().__init__(**kwargs)
        self.normalize_encoder_output = normalize_encoder_output
        self.image_token_id = (
            embedding_config.img_context_token_id if image_token_id is None else image_token_id
        )
        self.use_cache = getattr(llm_config, "use_cache", True)

    def get_text_config(self, decoder=None, encoder=None):
        """The LLM as caches see it: its layers first, then those of the embedding module.

        A fresh copy on every call: changing it changes nothing.
        """
        text = copy.copy(self.llm_config)
        extra = self.embedding_config.num_hidden_layers
        types = getattr(text, "layer_types", None)
        if types is not None:
            text.layer_types = [*types, *["full_attention"] * extra]
        text.num_hidden_layers = text.num_hidden_layers + extra
        text.tie_word_embeddings = False  # its head is never tied to the text table
        return text


class HoVLEVisionConfig(PretrainedConfig):
    """The patch embedder of the fused layout."""

    model_type = "hovle_vision"

    def __init__(
        self,
        image_size=448,
        patch_size=14,
        num_channels=3,
        hidden_size=2048,
        downsample_ratio=0.5,
        use_pixel_shuffle_proj=True,
        initializer_range=0.02,
        **kwargs,
    ):
        kwargs.pop("model_type", None)
        super().__init__(**kwargs)
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.downsample_ratio = downsample_ratio
        self.use_pixel_shuffle_proj = use_pixel_shuffle_proj
        self.initializer_range = initializer_range

    shuffle = HoVLEEmbeddingConfig.shuffle


class HoVLEFusedConfig(PretrainedConfig):
    """HoVLE as one Llama (`text_config`) behind a patch embedder; the first `embedding_layers`
    of its layers are the holistic embedding module."""

    model_type = "hovle"
    sub_configs = {"text_config": LlamaConfig, "vision_config": HoVLEVisionConfig}

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        image_token_id=92546,
        embedding_layers=8,
        **kwargs,
    ):
        kwargs.pop("model_type", None)
        if not isinstance(text_config, PretrainedConfig):
            text_config = LlamaConfig(**flat_rope(text_config or {}))
        if not isinstance(vision_config, PretrainedConfig):
            vision_config = {"hidden_size": text_config.hidden_size, **(vision_config or {})}
            vision_config = HoVLEVisionConfig(**vision_config)
        self.text_config = text_config
        self.vision_config = vision_config
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if kwargs.get(name) is None:
                kwargs[name] = getattr(text_config, name, None)
        kwargs["tie_word_embeddings"] = text_config.tie_word_embeddings
        super().__init__(**kwargs)
        self.image_token_id = image_token_id
        self.embedding_layers = embedding_layers
