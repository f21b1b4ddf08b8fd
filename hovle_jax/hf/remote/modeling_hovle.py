# SPDX-License-Identifier: Apache-2.0
"""HoVLE for transformers: one causal sequence of image patches and text, read by two stacks.

    tiles -> patch embedding ['pre': pixel shuffle, projector] -+
    ids   -> text table ----------------------------------------+-> embedding layers
          -> ['post': pixel shuffle, projector at image places] -> LLM -> logits

    B rows   S tokens   N tiles (of all rows)   P patches per tile   C hidden size
    T = P / shuffle^2 tokens per tile in the LLM

'post' models (HoVLE-HD) run the embedding layers over a *long stream*, of Z >= S places, in which
a tile takes P places and not T. It is derived here from the ids; callers know only the short one.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import can_return_tuple

from .configuration_hovle import HoVLEConfig, HoVLEEmbeddingConfig, InternLM2Config
from .modeling_hovle_images import ImageTokens
from .modeling_hovle_layers import (
    HoVLEDecoderLayer,
    HoVLERMSNorm,
    ImageGenerationMixin,
    LongStream,
    VisionEmbeddings,
    check_image_tokens,
    make_position_ids,
    make_projector,
    pixel_shuffle,
    run_layers,
)


class HoVLEPreTrainedModel(PreTrainedModel):
    config_class = HoVLEConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["HoVLEDecoderLayer", "VisionEmbeddings"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True  # the flag's name before transformers 4.54
    _supports_flex_attn = True

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, VisionEmbeddings):
            for name in ("class_embedding", "position_embedding"):
                if hasattr(module, name):
                    nn.init.normal_(getattr(module, name), std=0.02)


class HolisticEmbedding(HoVLEPreTrainedModel):
    """Pixels and token ids -> what the LLM reads in place of its own token embeddings."""

    config_class = HoVLEEmbeddingConfig

    def __init__(self, config, first_layer=0):
        """`first_layer`: index in the cache of this module's first layer."""
        super().__init__(config)
        self.first_layer = first_layer
        size = config.hidden_size
        self.vision_embeddings = VisionEmbeddings(config)
        self.llm_text_embeddings = nn.Embedding(config.llm_vocab_size, size)
        if config.special_token_maps:
            self.special_text_embeddings = nn.Embedding(len(config.special_token_maps), size)
        if config.use_pixel_shuffle_proj:
            self.pixel_shuffle_proj = make_projector(config)
        self.encoder = nn.ModuleList(
            HoVLEDecoderLayer(config, first_layer + i) for i in range(config.num_hidden_layers)
        )
        self.post_init()

    def get_input_embeddings(self):
        return self.llm_text_embeddings

    def set_input_embeddings(self, value):
        self.llm_text_embeddings = value

    @property
    def is_post(self):
        return self.config.pixel_shuffle_loc == "post"

    def embed_text(self, input_ids):
        """Ids past the table read the special tokens' own one or, where there is none, row 0."""
        rows = self.config.llm_vocab_size
        special = input_ids >= rows
        x = self.llm_text_embeddings(input_ids.masked_fill(special, 0))
        if self.config.special_token_maps:
            extra = self.special_text_embeddings((input_ids - rows).clamp(min=0))
            x = torch.where(special[..., None], extra, x)
        return x

    def project(self, x, grid):
        """Patches [N, P, C] -> tokens [N, T, C]."""
        if not self.config.use_pixel_shuffle_proj:
            return x
        return self.pixel_shuffle_proj(pixel_shuffle(x, grid, self.config.shuffle))

    def get_image_features(self, pixel_values):
        """[N, 3, H, W] -> what the layers read at image places: [N, T, C], 'post' [N, P, C]."""
        x, grid = self.vision_embeddings(pixel_values)
        return x if self.is_post else self.project(x, grid)

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        images=None,
        **kwargs,
    ):
        """-> (LLM input [B, S, C], [input of the layers, output of each]); 'post': [B, Z, C]."""
        stream, is_image = None, None
        if inputs_embeds is None:
            ids = input_ids
            if pixel_values is not None:
                is_image = input_ids == self.config.img_context_token_id
                if self.is_post:
                    stream = LongStream.of(is_image, self.config.shuffle**2)
                    ids = stream.spread(input_ids)
            inputs_embeds = self.embed_text(ids)
            if pixel_values is not None:
                place = ids == self.config.img_context_token_id
                image = self.get_image_features(pixel_values).to(inputs_embeds.dtype)
                inputs_embeds = inputs_embeds.masked_scatter(place[..., None], image)
        if self.is_post:
            attention_mask, position_ids = self._long_mask(
                stream, inputs_embeds, attention_mask, past_key_values
            )
            if images is not None:
                side = self.config.image_size // self.config.patch_size
                images = images.spread(stream, (side, side))
        hidden_states = run_layers(
            self.encoder,
            self.config,
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            images,
            **kwargs,
        )
        x = hidden_states[-1]
        if stream is not None:
            patch = self.config.patch_size
            grid = tuple(side // patch for side in pixel_values.shape[2:])
            patches = x[place].view(-1, grid[0] * grid[1], x.shape[-1])
            image = self.project(patches, grid)
            x = stream.gather(x).masked_scatter(is_image[..., None], image.to(x.dtype))
        return x, hidden_states

    def _long_mask(self, stream, x, attention_mask, cache):
        """The long stream's mask [B, cached + Z] and positions [B, Z].

        Which of the cached places are padding cannot be told from the short mask; the cache
        carries it from call to call.
        """
        rows, length = x.shape[:2]
        short = length if stream is None else stream.starts.shape[1]
        if getattr(cache, "is_compileable", False):
            raise ValueError("a static cache has one length, a 'post' model two: use a dynamic one")
        if attention_mask is None:
            mask = torch.ones(rows, short, dtype=torch.long, device=x.device)
        elif attention_mask.ndim == 2:
            mask = attention_mask[:, -short:].long()
        else:
            raise ValueError("'post' models take attention masks [B, S] only")
        if stream is not None:
            mask = stream.spread(mask)
        past = 0 if cache is None else cache.get_seq_length(self.first_layer)
        if past:
            earlier, extra = cache.hovle_long_stream
            if past - cache.get_seq_length() != extra:
                raise ValueError("a 'post' cache cannot be cropped to an absolute length")
            mask = torch.cat((earlier[:, :past], mask), dim=1)
        if cache is not None:
            extra = past + length - cache.get_seq_length() - short
            cache.hovle_long_stream = (mask, extra)
        return mask, make_position_ids(mask, length, past, x.device)


class InternLM2Model(nn.Module):
    """The LLM's layers. HoVLE never reads `tok_embeddings`; checkpoints have it."""

    def __init__(self, config):
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            HoVLEDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = HoVLERMSNorm(config.hidden_size, config.rms_norm_eps)


class InternLM2ForCausalLM(HoVLEPreTrainedModel):
    config_class = InternLM2Config
    _tied_weights_keys = {"output.weight": "model.tok_embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.tok_embeddings

    def set_input_embeddings(self, value):
        self.model.tok_embeddings = value

    def get_output_embeddings(self):
        return self.output

    def set_output_embeddings(self, value):
        self.output = value

    def forward(
        self,
        inputs_embeds,
        attention_mask,
        position_ids,
        past_key_values=None,
        output_hidden_states=False,
        logits_to_keep=0,
        use_cache=None,
        **kwargs,
    ):
        """hidden_states as in transformers: the input, each layer's output, the last one normed."""
        outputs = run_layers(
            self.model.layers,
            self.config,
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            **kwargs,
        )
        x = outputs[-1] = self.model.norm(outputs[-1])
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            logits=self.output(x[:, keep]),
            past_key_values=past_key_values,
            hidden_states=tuple(outputs) if output_hidden_states else None,
        )


def make_llm(config):
    """InternLM2 is above; other LLMs are transformers' own."""
    if config.model_type == InternLM2Config.model_type:  # its class may be loaded twice
        return InternLM2ForCausalLM(config)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


@dataclass
class HoVLEOutput(CausalLMOutputWithPast):
    """`hidden_states` are the LLM's; those of the embedding layers come beside them.

    embedding_hidden_states: their input and every layer's output, [B, S, C], 'post' [B, Z, C].
    """

    embedding_hidden_states: tuple[torch.FloatTensor, ...] | None = None


class HoVLEForConditionalGeneration(HoVLEPreTrainedModel, ImageGenerationMixin):
    """HoVLE with the tensor names of released checkpoints.

    One cache serves both stacks: the LLM's layers come first, so its length is that of the ids;
    the embedding layers, which hold the long stream in 'post' models, follow.
    """

    def __init__(self, config):
        super().__init__(config)
        first = config.llm_config.num_hidden_layers
        self.embedding_model = HolisticEmbedding(config.embedding_config, first)
        self.language_model = make_llm(config.llm_config)
        whole = (*self._no_split_modules, *(self.language_model._no_split_modules or ()))
        self._no_split_modules = sorted(set(whole))
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.embedding_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.language_model.set_output_embeddings(value)

    def get_image_features(self, pixel_values, **kwargs):
        """[N, 3, H, W] -> [N, T, C]; 'post': the [N, P, C] that enter the embedding layers."""
        return self.embedding_model.get_image_features(pixel_values)

    @property
    def vision_config(self):
        return self.config.embedding_config

    def _image_tokens(self, input_ids, pixel_values):
        """What masks over images and positions in their plane go by."""
        vision = self.vision_config
        side = vision.image_size // (vision.patch_size * vision.shuffle)
        is_image = input_ids == self.config.image_token_id
        if pixel_values is None:
            is_image = torch.zeros_like(is_image)
        end_of_turn = getattr(self.config, "im_end_token_id", None)
        return ImageTokens(input_ids, is_image, (side, side), end_of_turn)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """
        input_ids       [B, S], every tile as T consecutive image tokens
        pixel_values    [N, 3, H, W] normalised tiles of all rows, in order of appearance; only
                        with the ids that hold their image tokens, not while decoding
        attention_mask  [B, cached + S], zero at padding on either side
        position_ids    [B, S]; default: count what is not padding ('post': the long stream's
                        always do)
        inputs_embeds   [B, S, C] instead of ids: what enters the embedding layers
        labels          [B, S], -100 where nothing is to be predicted
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is not None and pixel_values is not None:
            raise ValueError("inputs_embeds has image features in it already: no pixel_values")
        kwargs.pop("cache_position", None)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if not use_cache:
            past_key_values = None
        elif past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        given = input_ids if inputs_embeds is None else inputs_embeds
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if input_ids is not None and not (past and pixel_values is None):
            # While decoding, an image token is what the model wrote: text like any other.
            is_image = input_ids == self.config.image_token_id
            check_image_tokens(is_image, pixel_values, self.vision_config)
        if position_ids is None:
            position_ids = make_position_ids(attention_mask, given.shape[1], past, given.device)
        images = None
        if input_ids is not None:
            images = self._image_tokens(input_ids, pixel_values)
        mask = attention_mask  # of a static cache: a dict for LLMs that may have sliding windows
        x, embedding_hidden_states = self.embedding_model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=mask["full_attention"] if isinstance(mask, dict) else mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            images=images,
            **kwargs,
        )
        # Other LLMs are exported with plain masks and positions only.
        own = isinstance(self.language_model, InternLM2ForCausalLM)
        if self.config.normalize_encoder_output:
            x = x / x.float().norm(dim=-1, keepdim=True).to(x.dtype)
        outputs = self.language_model(
            inputs_embeds=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            logits_to_keep=logits_to_keep,
            **({"images": images} if own else {}),
            **kwargs,
        )
        loss = None
        if labels is not None:
            size = self.config.llm_config.vocab_size
            loss = self.loss_function(outputs.logits, labels, vocab_size=size, **kwargs)
        return HoVLEOutput(
            loss=loss,
            logits=outputs.logits,
            past_key_values=past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            embedding_hidden_states=(
                tuple(embedding_hidden_states) if output_hidden_states else None
            ),
        )
