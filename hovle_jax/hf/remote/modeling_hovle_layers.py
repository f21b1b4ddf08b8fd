# SPDX-License-Identifier: Apache-2.0
"""What HoVLE's models are made of: causal layers, patch embedding and the two token streams.

B rows   S tokens   N tiles (of all rows)   P patches per tile   C hidden size
"""

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .modeling_hovle_images import mask_function, rotary_coordinates

MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters


class HoVLERMSNorm(nn.Module):
    """Normalises in float32 and casts back before it multiplies by the weight."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary_tables(position_ids, config, coordinates=None):
    """[B, S] -> cos and sin, float32 [B, S, D/2].

    coordinates: [B, S, D/2], where frequencies have positions of their own.
    Dynamic NTK raises the base with the length a row has reached. Nothing is remembered: while
    decoding, new tokens use the current length and cached keys keep the one they were made with.
    """
    rope = config.rope_parameters
    dim = config.head_dim
    positions = position_ids.float()
    base = torch.full_like(positions[:, :1], rope["rope_theta"])
    if rope["rope_type"] == "linear":
        positions = positions / rope["factor"]
    elif rope["rope_type"] == "dynamic":
        factor, limit = rope["factor"], config.max_position_embeddings
        length = positions.amax(1, keepdim=True) + 1
        stretch = (factor * length / limit - (factor - 1)).clamp(min=1) ** (dim / (dim - 2))
        base = torch.where(length > limit, base * stretch, base)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    by = positions[..., None] if coordinates is None else coordinates.float()
    if coordinates is not None and rope["rope_type"] == "linear":
        by = by / rope["factor"]
    angles = by * (1 / base[..., None] ** exponents)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """x [B, heads, S, D]: the first half of D turns with the second, in float32."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """The plain version of transformers' attention interface; [B, heads, S, D] -> [B, S, ...]."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class HoVLEAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        bias = config.attention_bias
        self.wqkv = nn.Linear(config.hidden_size, heads * self.head_dim, bias=bias)
        width = config.num_attention_heads * self.head_dim
        self.wo = nn.Linear(width, config.hidden_size, bias=bias)
        if config.qk_norm:
            self.q_norm = HoVLERMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = HoVLERMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x, rope, attention_mask, past_key_values=None, cache_kwargs=None, **kwargs):
        groups = self.num_key_value_groups
        # Rows of wqkv: per key head its query heads, then the key, then the value.
        qkv = self.wqkv(x).unflatten(-1, (-1, groups + 2, self.head_dim))
        query, key, value = (
            part.flatten(2, 3).transpose(1, 2) for part in qkv.split((groups, 1, 1), dim=3)
        )
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, *rope), rotate(key, *rope)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, cache_kwargs)
        name = self.config._attn_implementation
        attend = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        y, _ = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.head_dim**-0.5,
            **kwargs,
        )
        return self.wo(y.flatten(2))


class HoVLEFeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class HoVLEDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attention_norm = HoVLERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = HoVLEAttention(config, layer_idx)
        self.ffn_norm = HoVLERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = HoVLEFeedForward(config)

    def forward(self, x, **kwargs):
        x = x + self.attention(self.attention_norm(x), **kwargs)
        return x + self.feed_forward(self.ffn_norm(x))


class CacheFrom:
    """A cache as seen from layer `first`, for mask functions, which ask layer 0."""

    def __init__(self, cache, first):
        self.cache, self.first = cache, first

    def __getattr__(self, name):
        return getattr(self.cache, name)

    def get_seq_length(self, layer_idx=0):
        return self.cache.get_seq_length(self.first + layer_idx)

    def get_mask_sizes(self, query, layer_idx=0):
        return self.cache.get_mask_sizes(query, self.first + layer_idx)

    def get_query_offset(self, layer_idx=0):
        return self.get_seq_length(layer_idx)


def run_layers(layers, config, x, attention_mask, position_ids, cache, images=None, **kwargs):
    """x [B, L, C] -> [x, output of layer 0, ...]. No norm after the last one.

    attention_mask: [B, cached + L], zero at padding; None without any; or 4-D, ready for use.
    images: the `ImageTokens` of x; needed by masks and positions that are not plain.
    """
    first = layers[0].attention.layer_idx
    seen = None if cache is None else CacheFrom(cache, first)
    past = 0 if seen is None else seen.get_seq_length()
    cache_position = torch.arange(x.shape[1], device=x.device) + past
    arguments = {
        "config": config,
        "input_embeds": x,  # name of `inputs_embeds` before transformers v5
        "inputs_embeds": x,
        "attention_mask": attention_mask,
        "cache_position": cache_position,  # gone in v5
        "past_key_values": seen,
        "position_ids": position_ids,
    }
    if (sees_later := mask_function(images, config, past)) is not None:
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"image_mask {config.image_mask!r} needs an attention mask [B, S]")
        arguments["or_mask_function"] = sees_later
    mask = create_causal_mask(**{k: v for k, v in arguments.items() if k in MASK_ARGUMENTS})
    coordinates = rotary_coordinates(images, config, position_ids, cache, first)
    rope = rotary_tables(position_ids, config, coordinates)
    outputs = [x]
    for layer in layers:
        x = layer(
            outputs[-1],
            rope=rope,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            cache_kwargs={"cache_position": cache_position},
            **kwargs,
        )
        outputs.append(x)
    return outputs


def make_position_ids(attention_mask, length, past, device):
    """Positions of the last `length` tokens, [B or 1, length]: they count what is not padding."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return torch.arange(past, past + length, device=device)[None]
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]


class VisionEmbeddings(nn.Module):
    """Patch projection plus learned positions.

    Row 0 of the positions belongs to the class token. Neither is ever read; they are here because
    checkpoints have them.
    """

    def __init__(self, config, class_token=True):
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.grid = config.image_size // patch
        if class_token:
            self.class_embedding = nn.Parameter(torch.zeros(1, 1, size))
        self.patch_embedding = nn.Conv2d(config.num_channels, size, patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + self.grid**2, size))

    def forward(self, pixel_values):
        """[N, 3, H, W] -> [N, P, C] and the grid (rows, columns) of the P patches."""
        x = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        grid = tuple(x.shape[2:])
        positions = self.position_embedding[:, 1:]
        if grid != (self.grid, self.grid):
            table = positions.float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
            table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
            positions = table.flatten(2).transpose(1, 2)
        return x.flatten(2).transpose(1, 2) + positions.to(x.dtype), grid


def make_projector(config):
    """The MLP after the shuffle; GELU by erf, and no norm (unlike InternVL's)."""
    wide = config.hidden_size * config.shuffle**2
    return nn.Sequential(
        nn.Linear(wide, config.hidden_size),
        nn.GELU(),
        nn.Linear(config.hidden_size, config.hidden_size),
    )


def pixel_shuffle(x, grid, factor):
    """[N, P, C] -> [N, T, factor^2 C], channels in the order (row offset, column offset, C)."""
    x = x.unflatten(1, (grid[0] // factor, factor, grid[1] // factor, factor))
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


def tokens_per_tile(pixel_values, config):
    """T, of tiles [N, 3, H, W]."""
    side = config.patch_size * config.shuffle
    return (pixel_values.shape[2] // side) * (pixel_values.shape[3] // side)


def check_image_tokens(is_image, pixel_values, config):
    """Image tokens and tiles must agree before one is put in the place of the other."""
    found = int(is_image.sum())
    if pixel_values is None:
        if found:
            raise ValueError(f"input_ids has {found} image tokens but there are no pixel_values")
        return
    if pixel_values.ndim != 4:
        raise ValueError(f"pixel_values must be [tiles, 3, H, W], not {[*pixel_values.shape]}")
    per_tile = tokens_per_tile(pixel_values, config)
    if found != len(pixel_values) * per_tile:
        raise ValueError(
            f"input_ids has {found} image tokens but pixel_values needs "
            f"{len(pixel_values) * per_tile} ({len(pixel_values)} tiles of {per_tile})"
        )


def expand_tiles(pixel_values, is_image, expand_size, config):
    """The tiles for a batch whose every row (is_image [B, S]) is repeated `expand_size` times."""
    check_image_tokens(is_image, pixel_values, config)
    tiles = is_image.sum(1) // tokens_per_tile(pixel_values, config)
    rows = pixel_values.split(tiles.tolist())
    return torch.cat([row for row in rows for _ in range(expand_size)])


class ImageGenerationMixin(GenerationMixin):
    """`generate` for models whose `pixel_values` holds the tiles of all rows, one after another.

    The model has `vision_config`, whatever config knows `patch_size` and `shuffle`.
    """

    def prepare_inputs_for_generation(self, input_ids, pixel_values=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        if pixel_values is not None and ids is not None:
            # Tiles go with the chunk of ids that has their tokens: the prompt, or one that
            # continues a cache. A stray image token is something the model wrote or guessed.
            tile = tokens_per_tile(pixel_values, self.vision_config)
            wanted = cache is None or cache.get_seq_length() == 0
            if not wanted and ids.shape[1] >= tile:
                wanted = bool(((ids == self.config.image_token_id).sum(1) >= tile).any())
            if wanted:
                inputs["pixel_values"] = pixel_values
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, input_ids=None, **kwargs):
        pixel_values = kwargs.pop("pixel_values", None)
        if pixel_values is not None and expand_size > 1 and input_ids is not None:
            # Base code would repeat tile by tile; a row's tiles must stay together.
            is_image = input_ids == self.config.image_token_id
            pixel_values = expand_tiles(pixel_values, is_image, expand_size, self.vision_config)
        ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **kwargs
        )
        if pixel_values is not None:
            kwargs["pixel_values"] = pixel_values
        return ids, kwargs


@dataclass
class LongStream:
    """The sequence the layers of a 'post' model read. Rows are filled up on the left."""

    source: torch.Tensor  # [B, Z]: index of the token a place belongs to, plus 1; 0 = filled up
    starts: torch.Tensor  # [B, S]: the (first) place of each token

    @classmethod
    def of(cls, is_image, ratio):
        """is_image [B, S]; each such token takes `ratio` places."""
        widths = 1 + (ratio - 1) * is_image.long()
        fill = widths.sum(1)
        widths = torch.cat(((fill.max() - fill)[:, None], widths), dim=1)
        places = torch.arange(widths.shape[1], device=widths.device).repeat(len(widths))
        source = places.repeat_interleave(widths.flatten()).view(len(widths), -1)
        return cls(source, widths.cumsum(1)[:, :-1])

    def spread(self, x, fill=0):
        """[B, S] of the short stream -> [B, Z]."""
        return F.pad(x, (1, 0), value=fill).gather(1, self.source)

    def gather(self, x):
        """[B, Z, C] -> [B, S, C]: the first place of every token."""
        return x.gather(1, self.starts[..., None].expand(-1, -1, x.shape[-1]))
