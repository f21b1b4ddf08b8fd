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

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hovle_jax import model, sharding
from hovle_jax.checkpoint import Stored
from hovle_jax.config import ModelConfig
from hovle_jax.nn.layers import RMSNorm
from hovle_jax.nn.quantize import quantize_kernels
from hovle_jax.nn.stack import Layer, places_of, put_together
from hovle_jax.nn.text_table import TextTable
from hovle_jax.tree import flatten, unflatten

STACKS = ("embedding", "decoder")


def restack(params: Any, config: ModelConfig) -> Any:
    """The model's own parameters, layers stacked, of those that `compute_params` has prepared."""
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

    def layer(name: str, i: int) -> Any:
        layers = params[name]["layers"]
        if isinstance(layers, tuple):
            return layers[i]
        kind, place = _kind_and_place(config, name, i)
        return jax.tree.map(lambda x: x[place], layers[kind] if kind else layers)

    rest = _replace_layers(params, dict.fromkeys(STACKS, ()))
    return _prepared(rest, layer, config, int8, mesh)


def stored_params(stored: Stored, *, int8: bool = False, mesh: Any = None) -> Any:
    """`compute_params` of a model directory, read one layer at a time: devices never hold more than
    what they keep and one array."""
    config, paths = stored.model, sorted(stored.paths)

    def read(paths: list[str], prefix: str, index: Any) -> Any:
        pieces = stored.pieces(paths, index)
        names = (path.removeprefix(prefix) for path in paths)
        return unflatten(dict(zip(names, pieces, strict=True)))

    def layer(name: str, i: int) -> Any:
        kind, place = _kind_and_place(config, name, i)
        prefix = "/".join(filter(None, (name, "layers", kind))) + "/"
        return read([path for path in paths if path.startswith(prefix)], prefix, place)

    stacks = tuple(f"{name}/layers/" for name in STACKS)
    rest = read([path for path in paths if not path.startswith(stacks)], "", ...)
    return _prepared(rest, layer, config, int8, mesh)


def _kind_and_place(config: ModelConfig, name: str, i: int) -> tuple[str, int]:
    """Layer i among stacked ones: in which level of them ('': in none), at which place."""
    size = len(config.stacks[name].period)
    return (f"layer_{i % size}", i // size) if size > 1 else ("", i)


def _prepared(
    rest: Any, layer: Callable[[str, int], Any], config: ModelConfig, int8: bool, mesh: Any
) -> Any:
    """Everything but the layers, and the layers one by one, each made ready before the next."""
    axes_of = flatten(model.param_axes(config)) if mesh else {}

    def ready(tree: Any, *prefix: str) -> Any:
        def place(path: Any, x: Any) -> jax.Array:
            keys = [*filter(None, prefix), *(str(key.key) for key in path)]
            # The other parameters are small, and some are used in float32 first.
            matrix = keys[-1] in ("kernel", "table") and x.dtype != jnp.int8
            if matrix and config.dtype != "float32":
                x = x.astype(jnp.dtype(config.dtype))  # of what was read, on the host
            if mesh is None:
                return jnp.asarray(x)
            axes = axes_of["/".join(keys).removesuffix("_scale")]
            # Without the axis of stacked layers, and the scales of a matrix without its inputs.
            own = sharding.spec(axes[len(axes) - x.ndim :], x.shape, mesh)
            return jax.device_put(x, jax.sharding.NamedSharding(mesh, own))

        return jax.tree_util.tree_map_with_path(place, quantize_kernels(tree) if int8 else tree)

    layers = {
        name: tuple(
            ready(layer(name, i), name, "layers", _kind_and_place(config, name, i)[0])
            for i in range(own.num_layers)
        )
        for name, own in config.stacks.items()
    }
    return _replace_layers(ready(rest), layers)


def decode_step(
    params: Any, tokens: jax.Array, cache: Any, config: ModelConfig
) -> tuple[jax.Array, Any]:
    """As `model.decode_step`, of parameters and caches of layers apart."""
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
