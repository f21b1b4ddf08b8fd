"""Stacks of layers: the causal layer, its scan over the depth, what layers keep between tokens.

    x = x + Attention(RMSNorm(x));  x = x + SwiGLU(RMSNorm(x))        (InternLM2)

where any type of LAYER_TYPES may stand for attention and any of MLPS for SwiGLU. Layers are
scanned, so a stack compiles once whatever its depth. Where all are of one type, their arrays are
stacked under the stack's own name; else one period of types is scanned and layer i of each period
has its arrays under `layer_i`:

    layers/attention/q/kernel [L, ...]          layers/layer_0/linear_attention/q/kernel [L/2, ...]
                                                layers/layer_1/attention/q/kernel [L/2, ...]

Caches are laid out like parameters; generation takes both apart, into a tuple of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import hovle_jax.nn.linear_attention  # noqa: F401  (registers its type)
from hovle_jax.config import LayersConfig
from hovle_jax.nn.layers import LAYER_TYPES, MLPS, Cache, LayerInputs, RMSNorm, StateArray
from hovle_jax.nn.quantize import quantize_heads
from hovle_jax.registry import Registry
from hovle_jax.sharding import constrain

# What a layer keeps from its forward pass for the backward one; everything else is recomputed.
_policies = jax.checkpoint_policies
REMAT_POLICIES: Registry[Callable[..., bool] | None] = Registry("model.remat")
for _name, _policy in {
    "none": None,  # keep everything
    "full": _policies.nothing_saveable,
    "attention": _policies.save_only_these_names("attention_out"),
    # Every matrix product once, as "none", without what lies between them:
    "minimal": _policies.save_only_these_names("qkv", "attention_out", "residual", "mlp_in"),
    "products": _policies.save_only_these_names(
        "qkv", "attention_out", "residual", "mlp_in", "mlp_hidden"
    ),
    "mixed": _policies.save_only_these_names("qkv", "attention_out", "residual"),
    # As "minimal", with the widest of it in the host's memory meanwhile:
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["qkv", "attention_out", "residual"],
        names_which_can_be_offloaded=["mlp_in"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots": _policies.dots_with_no_batch_dims_saveable,
}.items():
    REMAT_POLICIES.add(_name)(_policy)


class Layer(nn.Module):
    """One causal layer, in the form `nn.scan` wants: (carry, inputs, cache) -> (carry, outputs)."""

    config: LayersConfig
    implementation: str
    keep_cache: bool
    keep_hidden: bool
    kind: str = "attention"

    @nn.compact
    def __call__(
        self, x: jax.Array, inputs: LayerInputs, cache: Cache | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        c = self.config
        y = RMSNorm(c.rms_norm_eps, name="attention_norm")(x)
        mixer = LAYER_TYPES.find(self.kind)(c, self.implementation, name=self.kind)
        y, state = mixer(y, inputs, cache)
        x = checkpoint_name(x + y, "residual")
        y = RMSNorm(c.rms_norm_eps, name="mlp_norm")(x)
        x = x + MLPS.find(c.mlp)(c, name="mlp")(y, inputs)
        x = constrain(x, "batch", "length", "act_embed")
        out: dict[str, Any] = {}
        if self.keep_cache:
            out["cache"] = state
        if self.keep_hidden:
            out["hidden"] = x
        return x, out


def _remat(remat: str) -> Any:
    policy = REMAT_POLICIES.find(remat)
    if policy is None:
        return Layer
    # Inside a scan XLA cannot merge the recomputation with the original anyway.
    return nn.remat(Layer, policy=policy, prevent_cse=False)


class Period(nn.Module):
    """One layer of each type of the period, in the form `nn.scan` wants."""

    config: LayersConfig
    implementation: str
    keep_cache: bool
    keep_hidden: bool
    remat: str

    @nn.compact
    def __call__(
        self, x: jax.Array, inputs: LayerInputs, cache: Cache | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        states, hidden = {}, []
        for i, kind in enumerate(self.config.period):
            name, layer = f"layer_{i}", _remat(self.remat)
            own = None if cache is None else cache[name]
            flags = (self.implementation, self.keep_cache, self.keep_hidden, kind)
            x, out = layer(self.config, *flags, name=name)(x, inputs, own)
            states[name] = out.get("cache")
            hidden.append(out.get("hidden"))
        extras: dict[str, Any] = {"cache": states} if self.keep_cache else {}
        return x, extras | {"hidden": jnp.stack(hidden)} if self.keep_hidden else extras


def layer_stack(
    config: LayersConfig,
    implementation: str,
    remat: str,
    *,
    keep_cache: bool = False,
    keep_hidden: bool = False,
    cached: bool = False,
) -> Any:
    """A module of `num_layers` layers in one scan; arrays gain a leading `layers` axis.

    Called as (x [B, S, E], inputs, cache or None) it returns (output [B, S, E], extras), extras
    being {"cache": Cache, "hidden": [L, B, S, E]} as asked for; call it by `run_stack`. `cached`
    says that a cache will be given. There is no norm after the last layer; the LLM has its own.
    """
    period = config.period
    scanned = nn.scan(
        _remat(remat) if len(period) == 1 else Period,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0 if cached else nn.broadcast),
        length=config.num_layers // len(period),
        metadata_params={"name": "layers"},
    )
    last = period[0] if len(period) == 1 else remat
    return scanned(config, implementation, keep_cache, keep_hidden, last)


def run_stack(
    stack: Any, x: jax.Array, inputs: LayerInputs, cache: Cache | None
) -> tuple[jax.Array, dict[str, Any]]:
    """Calls a `layer_stack`."""
    x, extras = stack(x, inputs, cache)
    if "hidden" in extras:  # [L, B, S, E], or of periods [L / period, period, B, S, E]
        extras["hidden"] = extras["hidden"].reshape(-1, *x.shape)
    return x, extras


# Arrays of layers, apart and stacked


def take_apart(stacked: Any) -> tuple[Any, ...]:
    """Parameters or cache of a stack -> those of each layer, first to last."""
    if "layer_0" in stacked:
        kinds = [take_apart(stacked[f"layer_{i}"]) for i in range(len(stacked))]
        return tuple(layer for period in zip(*kinds, strict=True) for layer in period)
    count = len(jax.tree.leaves(stacked)[0])
    return tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count))


def put_together(config: LayersConfig, layers: tuple[Any, ...]) -> Any:
    """What `take_apart` was given."""

    def stacked(layers: tuple[Any, ...]) -> Any:
        return jax.tree.map(lambda *x: jnp.stack(x), *layers)

    size = len(config.period)
    if size == 1:
        return stacked(layers)
    return {f"layer_{i}": stacked(layers[i::size]) for i in range(size)}


# What layers keep between tokens


def needs_segments(config: LayersConfig) -> bool:
    """Attention's mask says who sees whom; other types look at the segments themselves."""
    return any(kind != "attention" for kind in config.period)


def needs_images(config: LayersConfig) -> bool:
    """Whether a part of its layers asks which tokens are an image's."""
    kinds = (LAYER_TYPES.find(kind).images for kind in config.period)
    return MLPS.find(config.mlp).images or any(kinds)


def empty_cache(
    config: LayersConfig, rows: int, places: int, dtype: str, *, int8: bool = False
) -> tuple[Cache, ...]:
    """Caches of layers apart, of rows that hold nothing; int8: of what grows with a row."""

    def layer(kind: str) -> Cache:
        known = LAYER_TYPES.find(kind).state(config, places)
        zeros = {k: jnp.zeros((rows, *s.shape), s.dtype or dtype) for k, s in known.items()}
        growing = {k: x for k, x in zeros.items() if known[k].grows}
        return zeros | quantize_heads(growing) if int8 else zeros

    return tuple(map(layer, config.types))


def as_kept(old: Cache, new: Cache) -> Cache:
    """A layer's new arrays in int8 where the old ones are."""
    growing = {k: x for k, x in new.items() if f"{k}_scale" in old}
    return new | quantize_heads(growing)


def map_states(config: LayersConfig, change: Callable[..., jax.Array], *caches: Any) -> Any:
    """`change(StateArray, *arrays)` for every array of caches of one stack, apart or stacked."""

    def layer(kind: str, *parts: Cache) -> Cache:
        known = LAYER_TYPES.find(kind).state(config, 0)
        return {k: change(_described(known, k), *(p[k] for p in parts)) for k in parts[0]}

    if isinstance(caches[0], tuple):
        return tuple(map(layer, config.types, *caches))
    if len(config.period) == 1:
        return layer(config.period[0], *caches)
    return {
        f"layer_{i}": layer(kind, *(c[f"layer_{i}"] for c in caches))
        for i, kind in enumerate(config.period)
    }


def _described(known: dict[str, StateArray], name: str) -> StateArray:
    """The scales of an array in int8 are one axis short of it."""
    if name in known:
        return known[name]
    whole = known[name.removesuffix("_scale")]
    return StateArray(whole.shape[:-1], whole.axes[:-1], "float32")


def pad_places(config: LayersConfig, stacked: Cache, places: int) -> Cache:
    """Room for `places` tokens in all, in a cache of stacked layers."""

    def pad(array: StateArray, x: jax.Array) -> jax.Array:
        room = [(0, 0), (0, 0), (0, places - x.shape[2]), *[(0, 0)] * (x.ndim - 3)]
        return jnp.pad(x, room) if array.grows else x

    return map_states(config, pad, stacked)


def places_of(config: LayersConfig, cache: Any) -> int:
    """Tokens a cache has room for; 0: as many as come, because no layer keeps them apart."""
    found: list[int] = []
    axis = 1 if isinstance(cache, tuple) else 2

    def look(array: StateArray, x: jax.Array) -> jax.Array:
        if array.grows:
            found.append(x.shape[axis])
        return x

    map_states(config, look, cache)
    return found[0] if found else 0
