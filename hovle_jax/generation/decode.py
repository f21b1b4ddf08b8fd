"""One token through all layers, each with arrays of its own.

    B rows   M cache places   K kv heads   D head size

A scan over stacked layers (`model.decode_step`) copies every layer's weights and cache out of the
stacked arrays, which costs more than computing with them when each row brings a single token. Here
a layer's weights are read in place and its cache is extended in place.

    cache = {"embedding": ({"k", "v" [B, M, K, D]}, ... per layer), "decoder": (...),
             "lengths": {"embedding": int32 [B], "decoder": int32 [B]}}

(of attention; layers of other types: `nn.stack`). Caches and matrices may be in int8
(`quantize.py`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hovle_jax import model, sharding
from hovle_jax.config import ModelConfig
from hovle_jax.nn.layers import RMSNorm
from hovle_jax.nn.quantize import quantize_kernels
from hovle_jax.nn.stack import Layer, places_of, put_together, take_apart
from hovle_jax.nn.text_table import TextTable
from hovle_jax.tree import flatten

STACKS = ("embedding", "decoder")


def unstack(params: Any) -> Any:
    """The model's parameters with a tuple of layers in place of stacked ones, or as they are if
    they have been unstacked before."""

    def layers(name: str) -> Any:
        stacked = params[name]["layers"]
        return stacked if isinstance(stacked, tuple) else take_apart(stacked)

    return _replace_layers(params, {name: layers(name) for name in STACKS})


def restack(params: Any, config: ModelConfig) -> Any:
    """What `unstack` was given."""
    together = {name: put_together(c, params[name]["layers"]) for name, c in config.stacks.items()}
    return _replace_layers(params, together)


def _replace_layers(params: Any, layers: dict[str, Any]) -> Any:
    return params | {name: params[name] | {"layers": layers[name]} for name in STACKS}


def compute_params(
    params: Any, config: ModelConfig, *, int8: bool = False, mesh: Any = None
) -> Any:
    """Parameters as decoding wants them, from the model's or from prepared ones (which stay as they
    are): layers apart, matrices in the dtype they are computed in, or in int8. Decoding is as fast
    as memory delivers them. With a mesh, split over it as `sharding.RULES` says."""

    def cast(path: Any, x: Any) -> Any:
        # The other parameters are small, and some are used in float32 first.
        matrix = str(path[-1].key).endswith(("kernel", "table")) and x.dtype != jnp.int8
        return x.astype(config.dtype) if matrix and config.dtype != "float32" else x

    apart = unstack(params)
    apart = quantize_kernels(apart) if int8 else apart
    apart = jax.tree_util.tree_map_with_path(cast, apart)
    return apart if mesh is None else jax.device_put(apart, _shardings(apart, config, mesh))


def _shardings(params: Any, config: ModelConfig, mesh: Any) -> Any:
    axes_of = flatten(model.param_axes(config))

    def sharding_of(path: Any, x: Any) -> Any:
        keys = [getattr(key, "key", "") for key in path]
        if "" in keys:  # the number of a layer, which lies in a period of several or in no level
            place = keys.index("")
            size = len(config.stacks[keys[0]].period)
            keys[place : place + 1] = [f"layer_{path[place].idx % size}"] if size > 1 else []
        axes = axes_of["/".join(keys).removesuffix("_scale")]
        # Without the axis of stacked layers, and the scales of a matrix without its inputs.
        own = sharding.spec(axes[len(axes) - x.ndim :], x.shape, mesh)
        return jax.sharding.NamedSharding(mesh, own)

    return jax.tree_util.tree_map_with_path(sharding_of, params)


def decode_step(
    params: Any, tokens: jax.Array, cache: Any, config: ModelConfig
) -> tuple[jax.Array, Any]:
    """As `model.decode_step`, of unstacked parameters and caches."""
    lengths = cache["lengths"]
    x: Any = TextTable(config).apply({"params": params["embedding"]["text"]}, tokens[:, None])
    x, embedding = _layers(params, x, cache, config, "embedding")
    if config.normalize_embeddings:
        x = x / jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True).astype(x.dtype)
    x, decoder = _layers(params, x, cache, config, "decoder")
    norm = RMSNorm(config.decoder.rms_norm_eps)
    x = norm.apply({"params": params["decoder"]["norm"]}, x)
    lengths = {name: length + 1 for name, length in lengths.items()}
    new = {"embedding": embedding, "decoder": decoder, "lengths": lengths}
    return model.logits(params, x[:, 0]), new


def _layers(
    params: Any, x: jax.Array, cache: Any, config: ModelConfig, name: str
) -> tuple[jax.Array, tuple[Any, ...]]:
    own = config.stacks[name]
    ids = jnp.zeros(x.shape[:2], jnp.int32)
    places = places_of(own, cache[name])
    _, inputs = model.cached_inputs(ids, config, name, cache["lengths"], places)
    new = []
    for kind, weights, kept in zip(own.types, params[name]["layers"], cache[name], strict=True):
        layer = Layer(own, config.attention, keep_cache=True, keep_hidden=False, kind=kind)
        x, out = layer.apply({"params": weights}, x, inputs, kept)
        new.append(out["cache"])
    return x, tuple(new)
