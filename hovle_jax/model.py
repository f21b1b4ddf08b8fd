"""HoVLE as pure functions over a nested dict of arrays.

A batch is a dict. B rows, S tokens per row, N tiles per row:

    input_ids     int32 [B, S]
    segment_ids   int32 [B, S]   0 = padding; equal numbers belong to one sample   (default: all 1)
    position_ids  int32 [B, S]   counts up from 0 inside each segment         (default: 0, 1, 2...)
    pixels        uint8 [B, N, H, W, 3]   tiles in order of appearance; unused ones last  (optional)
    labels        int32 [B, S]   the token itself where it is to be predicted, else IGNORE (losses)
    loss_weight   float32 [B, S] weight of predicting that token                           (losses)

The k-th tile of a row belongs to its k-th run of `tokens_per_tile` `<IMG_CONTEXT>` tokens.

Generation uses one cache per stack, because 'post' models keep two lengths:

    cache = {"embedding": {"k", "v" [L, B, M, K, D]}, "decoder": {...},
             "lengths": {"embedding": int32 [B], "decoder": int32 [B]}}

(of attention; what layers of other types keep: `nn.stack`)

A stack whose `positions` are not '1d' has another length, "embedding_index" or "decoder_index":
where its next token stands for rotary embedding.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hovle_jax.config import LayersConfig, ModelConfig
from hovle_jax.nn.attention import causal_mask, visible
from hovle_jax.nn.decoder import Decoder
from hovle_jax.nn.embedding import (
    HolisticEmbedding,
    Stream,
    image_order,
    long_stream,
    short_stream,
    take,
)
from hovle_jax.nn.images import Tokens
from hovle_jax.nn.layers import LayerInputs, axis_names, output_axes, rope_tables
from hovle_jax.nn.masks import reach
from hovle_jax.nn.positions import POSITIONS, indices, per_frequency
from hovle_jax.nn.stack import needs_images, needs_segments, pad_places, places_of

Params = dict[str, Any]
Batch = dict[str, jax.Array]
Cache = dict[str, Any]


class HoVLE(nn.Module):
    config: ModelConfig
    keep_cache: bool = False
    keep_hidden: bool = False
    cached: bool = False

    def setup(self) -> None:
        flags = (self.keep_cache, self.keep_hidden, self.cached)
        self.embedding = HolisticEmbedding(self.config, *flags)
        self.decoder = Decoder(self.config, *flags)

    def embed(self, batch: Batch, cache_len: int = 0) -> tuple[jax.Array, Stream, dict[str, Any]]:
        """Batch -> (LLM input [B, S, E], the short stream, extras)."""
        c = self.config
        short = _short(batch)
        pixels = batch.get("pixels")
        stream = short
        if c.shuffle_loc == "post":
            stream = long_stream(short, 0 if pixels is None else pixels.shape[1], c)
        capacity = cache_len and cache_len + stream.ids.shape[1] - short.ids.shape[1]
        inputs, following = self._inputs(stream, "embedding", capacity)
        x, extras = self.embedding(short, stream, inputs, pixels)
        extras |= {"lengths": _lengths(stream, "embedding", following), "capacity": capacity}
        return x, short, extras

    def __call__(self, batch: Batch, cache_len: int = 0) -> tuple[jax.Array, dict[str, Any]]:
        """Batch -> (hidden states after the final norm [B, S, E], extras of both stacks).

        `cache_len` > 0: the sequence is a prompt that will grow to that many tokens at most.
        """
        x, short, embed_extras = self.embed(batch, cache_len)
        inputs, following = self._inputs(short, "decoder", cache_len)
        hidden, extras = self.decoder(x, inputs)
        extras |= {"lengths": _lengths(short, "decoder", following), "capacity": cache_len}
        return hidden, {"embeddings": x, "embedding": embed_extras, "decoder": extras}

    def _inputs(
        self, stream: Stream, stack: str, capacity: int = 0
    ) -> tuple[LayerInputs, jax.Array | None]:
        """What a stack's layers need; and the rotary index [B, L] of text after each token, where
        that is not its number."""
        c = self.config
        own: LayersConfig = getattr(c, stack)
        tokens = _tokens(stream, c, stack)
        positions, following, scheme = stream.position_ids, None, POSITIONS.find(own.positions)
        if scheme is not None:
            index, following = indices(scheme, tokens)
            positions = per_frequency(scheme, index, tokens, own.head_dim // 2)
        cos, sin = _rope(stream, positions, own, capacity)
        seen = reach(own.mask, tokens)
        mask = visible(stream.segment_ids, stream.position_ids, c.attention, seen)
        segments = stream.segment_ids if needs_segments(own) else None
        is_image = tokens.is_image if needs_images(own) else None
        return LayerInputs(cos, sin, mask, None, segments, is_image), following

    def text(self, ids: jax.Array) -> jax.Array:
        return self.embedding.text(ids)

    def language(self, batch: Batch, features: jax.Array | None = None) -> jax.Array:
        """The LLM by itself, reading its own text table: hidden states [B, S, E].

        `features` [B, N, E] stand at image tokens, in order.
        """
        short = _short(batch)
        x = self.embedding.text(short.ids)
        if features is not None:
            is_image, rank = image_order(short.ids, self.config)
            x = jnp.where(is_image[..., None], take(features.astype(x.dtype), rank), x)
        return self.decoder(x, self._inputs(short, "decoder")[0])[0]

    def extend(
        self, ids: jax.Array, cache: Cache, counts: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Text ids [B, S], `counts` [B] of them (default: all), appended to a cache -> (hidden
        [B, S, E], the cache, extended)."""

        def inputs_of(stack: str) -> tuple[Stream, LayerInputs]:
            places = places_of(getattr(self.config, stack), cache[stack])
            return cached_inputs(ids, self.config, stack, cache["lengths"], places, counts)

        # One text token is one place in either stream, whatever came before it.
        stream, inputs = inputs_of("embedding")
        x, e = self.embedding(stream, stream, inputs, None, cache["embedding"])
        _, inputs = inputs_of("decoder")
        hidden, d = self.decoder(x, inputs, cache["decoder"])
        lengths = {k: v + ids.shape[1] for k, v in cache["lengths"].items()}
        return hidden, {"embedding": e["cache"], "decoder": d["cache"], "lengths": lengths}


def _short(batch: Batch) -> Stream:
    ids = batch["input_ids"]
    segments, positions = batch.get("segment_ids"), batch.get("position_ids")
    if segments is None:
        segments = jnp.ones_like(ids)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=ids.dtype), ids.shape)
    return short_stream(ids, segments, positions)


def _tokens(stream: Stream, config: ModelConfig, stack: str) -> Tokens:
    long = stack == "embedding" and config.shuffle_loc == "post"
    return Tokens(
        stream.ids,
        stream.segment_ids,
        stream.position_ids,
        config.img_context_id,
        tile=config.tokens_per_tile * (config.patches_per_token if long else 1),
        end_of_turn=config.im_end_id,
    )


def _lengths(stream: Stream, stack: str, following: jax.Array | None) -> dict[str, jax.Array]:
    """A cache's `lengths` of this stack, of tokens up to the last that is not padding."""
    index = jnp.arange(1, stream.ids.shape[1] + 1)
    count = jnp.max(jnp.where(stream.segment_ids > 0, index, 0), axis=1)
    if following is None:
        return {stack: count}
    last = jnp.take_along_axis(following, count[:, None] - 1, axis=1)[:, 0]
    return {stack: count, f"{stack}_index": last}


def _rope(
    stream: Stream, positions: jax.Array, config: LayersConfig, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of positions, of tokens or frequencies (`rope_tables`)."""
    lengths = None
    if (
        config.rope_scaling == "dynamic"
        and max(stream.ids.shape[1], capacity) > config.max_positions
    ):
        # A growing sequence is rotated once, for the length it may reach: a cache keeps rotated
        # keys, so the table cannot follow the length step by step.
        lengths = jnp.full_like(stream.ids, capacity) if capacity else _segment_lengths(stream)
    return rope_tables(positions, config, lengths)


def _segment_lengths(stream: Stream) -> jax.Array:
    """Length of the segment each token belongs to, [B, S]."""

    def row(segments: jax.Array, positions: jax.Array) -> jax.Array:
        last = jax.ops.segment_max(positions, segments, num_segments=segments.shape[0] + 1)
        return last[segments] + 1

    return jax.vmap(row)(stream.segment_ids, stream.position_ids)


def length_names(config: ModelConfig) -> tuple[str, ...]:
    """Keys of a cache's `lengths`."""
    stacks = config.stacks
    indexed = (f"{k}_index" for k, s in stacks.items() if POSITIONS.find(s.positions) is not None)
    return (*stacks, *indexed)


def cached_inputs(
    ids: jax.Array,
    config: ModelConfig,
    stack: str,
    lengths: dict[str, jax.Array],
    capacity: int,
    counts: jax.Array | None = None,
) -> tuple[Stream, LayerInputs]:
    """What a stack's layers need for text ids [B, S] after `lengths` of tokens in a cache.

    counts: how many of a row's ids are no padding; default: all.

    A cache slot is its token's position, so 'not later' also hides slots not yet written. Text
    after the last image of a prompt sees nothing later in any mask.
    """
    own: LayersConfig = getattr(config, stack)
    starts = lengths[stack]
    positions = starts[:, None] + jnp.arange(ids.shape[1])
    stream = short_stream(ids, jnp.ones_like(ids), positions)
    slots = jnp.broadcast_to(jnp.arange(capacity), (ids.shape[0], capacity))
    mask = causal_mask(stream.segment_ids, jnp.ones_like(slots), positions, slots)
    segments = None
    if needs_segments(own):
        segments = stream.segment_ids
        if counts is not None:
            segments = (jnp.arange(ids.shape[1]) < counts[:, None]).astype(ids.dtype)
    if (scheme := POSITIONS.find(own.positions)) is not None:
        text = dataclasses.replace(_tokens(stream, config, stack), image_id=None)
        index = positions + (lengths[f"{stack}_index"] - starts)[:, None]
        positions = per_frequency(scheme, index, text, own.head_dim // 2)
    is_image = jnp.zeros(ids.shape, bool) if needs_images(own) else None
    cos, sin = _rope(stream, positions, own, capacity)
    return stream, LayerInputs(cos, sin, mask, starts, segments, is_image)


# Pure functions: everything outside this file and its modules uses only these.


def init(rng: jax.Array, config: ModelConfig) -> Params:
    """Random parameters, float32, as a nested dict."""
    return nn.unbox(_boxed_init(rng, config))


def abstract_params(config: ModelConfig) -> Params:
    """The same tree as shapes and dtypes, without computing anything."""
    return jax.eval_shape(functools.partial(init, config=config), jax.random.key(0))


def param_axes(config: ModelConfig) -> Params:
    """The same tree with each array's axis names, as `sharding.RULES` knows them."""
    boxed = jax.eval_shape(functools.partial(_boxed_init, config=config), jax.random.key(0))
    return axis_names(boxed)


def matrix_outputs(config: ModelConfig) -> Params:
    """The same tree with the number of each matrix's last axes that are its outputs; 0 elsewhere.

    A matrix is what `layers.Linear` multiplies with, and nothing else reads.
    """
    boxed = jax.eval_shape(functools.partial(_boxed_init, config=config), jax.random.key(0))
    outputs = output_axes(boxed)
    outputs["decoder"]["head"]["kernel"] = 0  # `head_kernel` is read by losses and decoding
    return outputs


def _boxed_init(rng: jax.Array, config: ModelConfig) -> Params:
    tile = jnp.zeros((1, 1, config.image_size, config.image_size, 3), jnp.uint8)
    ids = jnp.full((1, config.tokens_per_tile), config.img_context_id, jnp.int32)
    return HoVLE(config).init(rng, {"input_ids": ids, "pixels": tile})["params"]


def _run(module: HoVLE, params: Params, *args: Any, method: str = "__call__") -> Any:
    return module.apply({"params": params}, *args, method=method)


def embed(params: Params, batch: Batch, config: ModelConfig) -> jax.Array:
    """Output of the holistic embedding module, the LLM's input: [B, S, E].

    Needs only params["embedding"] (stage I holds no LLM).
    """
    return _run(HoVLE(config), params, batch, method="embed")[0]


def embed_layers(
    params: Params, batch: Batch, config: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(what `embed` gives, hidden states [L, B, Z, E] after each of its layers, ids [B, Z] there).

    Z is the length of the stream the layers run over: S for 'pre', that of the long one for 'post'.
    """
    module = HoVLE(config, keep_hidden=True)
    x, short, extras = _run(module, params, batch, method="embed")
    stream = short
    if config.shuffle_loc == "post":
        stream = long_stream(short, batch["pixels"].shape[1], config)
    return x, extras["hidden"], stream.ids


def hidden(params: Params, batch: Batch, config: ModelConfig) -> jax.Array:
    """The LLM's hidden states after its final norm: [B, S, E]; `logits` turns them into scores."""
    return _run(HoVLE(config), params, batch)[0]


def language_hidden(
    params: Params, batch: Batch, config: ModelConfig, features: jax.Array | None = None
) -> jax.Array:
    """As `hidden`, without the holistic embedding: the LLM as it was before HoVLE.

    With a teacher's `features` [B, N, E] in place of image tokens it is the teacher's own model.
    """
    return _run(HoVLE(config), params, batch, features, method="language")


def text_vectors(params: Params, ids: jax.Array, config: ModelConfig) -> jax.Array:
    """What the text table holds for ids [...], before any layer: float32 [..., E]."""
    exact = dataclasses.replace(config, dtype="float32")
    return _run(HoVLE(exact), params, ids, method="text")


def head_kernel(params: Params) -> jax.Array:
    """[E, V]: the LLM head."""
    return params["decoder"]["head"]["kernel"]


def logits(params: Params, x: jax.Array) -> jax.Array:
    """Hidden [..., E] -> float32 scores [..., V]."""
    scores = (x @ head_kernel(params).astype(x.dtype)).astype(jnp.float32)
    scale = params["decoder"]["head"].get("kernel_scale")  # of a head in int8
    return scores if scale is None else scores * scale


def apply(
    params: Params, batch: Batch, config: ModelConfig, *, keep_hidden: bool = False
) -> dict[str, Any]:
    """{"logits" float32 [B, S, V], "hidden" [B, S, E], "embeddings" [B, S, E]}.

    `keep_hidden` adds every named intermediate under "embedding" and "decoder" (each layer's
    output as [L, B, S, E] under "hidden").
    """
    x, extras = _run(HoVLE(config, keep_hidden=keep_hidden), params, batch)
    out = {"logits": logits(params, x), "hidden": x, "embeddings": extras["embeddings"]}
    return out | {k: extras[k] for k in ("embedding", "decoder")} if keep_hidden else out


def prefill(
    params: Params, batch: Batch, config: ModelConfig, cache_len: int
) -> tuple[jax.Array, Cache]:
    """Prompts -> (scores of each one's next token, float32 [B, V]; cache for `cache_len` tokens).

    Rows may have different lengths: padded on the right, segment id 0 there.
    """
    model = HoVLE(dataclasses.replace(config, remat="none"), keep_cache=True)
    x, extras = _run(model, params, batch, cache_len)
    cache: Cache = {"lengths": {}}
    for stack, layers in config.stacks.items():
        extra = extras[stack]
        cache[stack] = pad_places(layers, extra["cache"], extra["capacity"])
        cache["lengths"] |= extra["lengths"]
    last = jnp.take_along_axis(x, cache["lengths"]["decoder"][:, None, None] - 1, axis=1)[:, 0]
    return logits(params, last), cache


def extend(
    params: Params, ids: jax.Array, counts: jax.Array, cache: Cache, config: ModelConfig
) -> tuple[jax.Array, Cache]:
    """Text after what a cache holds -> (scores of each row's next token, float32 [B, V]; cache).

    ids: int32 [B, S]. counts: int32 [B], how many of a row's ids count; the others are padding on
    the right. The cache needs room for S tokens.
    """
    model = HoVLE(dataclasses.replace(config, remat="none"), keep_cache=True, cached=True)
    x, new = _run(model, params, ids, cache, counts, method="extend")
    lengths = {name: length + counts for name, length in cache["lengths"].items()}
    last = jnp.take_along_axis(x, counts[:, None, None] - 1, axis=1)[:, 0]
    return logits(params, last), new | {"lengths": lengths}


def decode_step(
    params: Params, tokens: jax.Array, cache: Cache, config: ModelConfig
) -> tuple[jax.Array, Cache]:
    """One text token per row, int32 [B] -> (scores of the next, float32 [B, V]; cache)."""
    model = HoVLE(dataclasses.replace(config, remat="none"), keep_cache=True, cached=True)
    x, cache = _run(model, params, tokens[:, None], cache, method="extend")
    return logits(params, x[:, 0]), cache
