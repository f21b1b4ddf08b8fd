# SPDX-License-Identifier: Apache-2.0
"""HoVLE with its layers fused: one Llama behind a patch embedder.

In models that shuffle before the embedding layers ('pre'), those layers and the LLM's see the same
sequence and have the same shape: together they are an ordinary Llama decoder, and everything that
serves Llama serves HoVLE. `LlamaForCausalLM` loads the text half of such a directory directly.

    B rows   S tokens   N tiles (of all rows)   T tokens per tile   C hidden size
"""

from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_hovle import HoVLEFusedConfig
from .modeling_hovle_layers import (
    ImageGenerationMixin,
    VisionEmbeddings,
    check_image_tokens,
    make_position_ids,
    make_projector,
    pixel_shuffle,
)


class HoVLEFusedModel(LlamaModel):
    """A Llama without head that also embeds image tiles.

    `config` is the Llama's own (`text_config`), as LlamaModel and inference engines, which replace
    its attention, expect. Save through `HoVLEFusedForConditionalGeneration`, which has all of it.
    """

    config_class = HoVLEFusedConfig

    def __init__(self, config):
        super().__init__(config.text_config)
        self.vision_config = config.vision_config
        self.image_token_id = config.image_token_id
        self.vision_embeddings = VisionEmbeddings(config.vision_config, class_token=False)
        if config.vision_config.use_pixel_shuffle_proj:
            self.pixel_shuffle_proj = make_projector(config.vision_config)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, VisionEmbeddings):
            nn.init.normal_(module.position_embedding, std=self.config.initializer_range)

    def get_image_features(self, pixel_values, **kwargs):
        """[N, 3, H, W] -> [N, T, C]."""
        x, grid = self.vision_embeddings(pixel_values)
        if self.vision_config.use_pixel_shuffle_proj:
            x = self.pixel_shuffle_proj(pixel_shuffle(x, grid, self.vision_config.shuffle))
        return x

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        """As LlamaModel; pixel_values [N, 3, H, W] fill the image tokens of input_ids in order."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
            if pixel_values is not None:
                is_image = input_ids == self.image_token_id
                check_image_tokens(is_image, pixel_values, self.vision_config)
                image = self.get_image_features(pixel_values).to(inputs_embeds.dtype)
                inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], image)
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class HoVLEFusedForConditionalGeneration(LlamaPreTrainedModel, ImageGenerationMixin):
    config_class = HoVLEFusedConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _no_split_modules = ["LlamaDecoderLayer", "VisionEmbeddings"]

    def __init__(self, config):
        super().__init__(config)
        self.model = HoVLEFusedModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @property
    def vision_config(self):
        return self.config.vision_config

    def get_image_features(self, pixel_values, **kwargs):
        """[N, 3, H, W] -> [N, T, C]."""
        return self.model.get_image_features(pixel_values)

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
        logits_to_keep=0,
        **kwargs,
    ):
        """
        input_ids       [B, S], every tile as T consecutive image tokens
        pixel_values    [N, 3, H, W] normalised tiles of all rows, in order of appearance; only
                        with the ids that hold their image tokens, not while decoding
        attention_mask  [B, cached + S], zero at padding on either side
        labels          [B, S], -100 where nothing is to be predicted
        """
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            given = input_ids if inputs_embeds is None else inputs_embeds
            position_ids = make_position_ids(attention_mask, given.shape[1], past, given.device)
        if input_ids is not None and pixel_values is None and not past:
            is_image = input_ids == self.config.image_token_id
            check_image_tokens(is_image, pixel_values, self.vision_config)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            size = self.config.text_config.vocab_size
            loss = self.loss_function(logits, labels, vocab_size=size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
