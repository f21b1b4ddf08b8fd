"""LoRA: low-rank adapters beside frozen kernels, chosen by a regex over parameter paths.

    y = x W + alpha / rank (x A) B                    (arXiv 2106.09685)

    W  decoder/layers/attention/q/kernel         [L, *inputs, *outputs]   frozen
    A  decoder/layers/attention/q/lora_a/kernel  [L, *inputs, R]          trains
    B  decoder/layers/attention/q/lora_b/kernel  [L, R, *outputs]         trains, starts at zero

The two products stay apart while training (`layers.Linear`): of m inputs and n outputs they cost
6 R (m + n) FLOPs per token and keep R numbers of it. With W + A B made in the step, the gradient of
W would come first: 2 m n FLOPs per token and an array of W's size per layer. `merge` is for the
end: whoever reads a work directory (export, chat, the next stage) reads merged kernels.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from hovle_jax import model, tree
from hovle_jax.config import LoraConfig, ModelConfig, RunConfig
from hovle_jax.errors import UserError
from hovle_jax.stages import get_stage
from hovle_jax.tree import flatten, unflatten

Params = dict[str, Any]
_ADAPTER = r".*/lora_[ab]/kernel"


def is_adapter(path: str) -> bool:
    return re.fullmatch(_ADAPTER, path) is not None


def factors(path: str) -> tuple[str, str]:
    """Paths of A and B of the kernel at `path`."""
    parent = path.removesuffix("/kernel")
    return f"{parent}/lora_a/kernel", f"{parent}/lora_b/kernel"


def trainable_regex(config: RunConfig) -> str:
    """Of what trains with LoRA: adapters, and what `config.trainable` names without an adapter."""
    if not config.trainable:
        return _ADAPTER
    return f"{_ADAPTER}|(?!(?:{config.lora.targets})$)(?:{config.trainable})"


def scale(config: LoraConfig) -> float:
    return config.alpha / config.rank


def join(frozen: Params, trainable: Params, config: LoraConfig) -> Params:
    """The tree the model computes with."""
    if config.rank:
        flat = flatten(trainable)
        scaled = {k: x * scale(config) for k, x in flat.items() if k.endswith("/lora_b/kernel")}
        trainable = unflatten(flat | scaled)
    return tree.merge(frozen, trainable)


def whole(frozen: Params, trainable: Params, config: LoraConfig) -> Params:
    """The same model without adapters: merged kernels, in the dtype of the frozen ones."""
    flat = flatten(tree.merge(frozen, trainable))
    out = {path: x for path, x in flat.items() if not is_adapter(path)}
    for path, x in out.items():
        a, b = factors(path)
        if a in flat:
            out[path] = merge(x, flat[a], flat[b], scale(config)).astype(x.dtype)
    return unflatten(out)


def merge(kernel: Any, a: Any, b: Any, scale: float) -> Any:
    """kernel + scale A B in float32: of a whole stack, one layer of it, or a matrix alone; numpy or
    jax arrays."""
    stacked = a.ndim + b.ndim - 2 > kernel.ndim
    lead, rank = kernel.shape[:1] if stacked else (), a.shape[-1]
    product = a.reshape(*lead, -1, rank) @ b.reshape(*lead, rank, -1)
    return kernel.astype("float32") + scale * product.reshape(kernel.shape)


def shapes(config: RunConfig) -> Params:
    """The adapters as shapes; {} without LoRA."""
    found = {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, (shape, _) in _plan(config).items()}
    return unflatten(found)


def axes(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """{path of an adapter: names of its axes}."""
    return {path: names for path, (_, names) in _plan(config).items()}


def init(rng: jax.Array, config: RunConfig) -> dict[str, jax.Array]:
    """{path: float32}: A of variance 1 / inputs, B zero."""
    out = {}
    for i, (path, (shape, names)) in enumerate(sorted(_plan(config).items())):
        inputs = shape[:-1][names[0] == "layers" :]
        std = 1 / math.sqrt(math.prod(inputs)) if path.endswith("/lora_a/kernel") else 0.0
        out[path] = std * jax.random.normal(jax.random.fold_in(rng, i), shape)
    return out


def _plan(config: RunConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """{path of an adapter: (shape, names of its axes)}."""
    rank = config.lora.rank
    if not rank:
        return {}
    kernels, names, outputs = _layout(config.model)
    out: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for path in _targets(config, outputs):
        shape, axes = kernels[path].shape, names[path]
        lead = int(axes[0] == "layers")
        cut = len(shape) - outputs[path]
        a, b = factors(path)
        out[a] = (*shape[:cut], rank), (*axes[:cut], "rank")
        out[b] = (*shape[:lead], rank, *shape[cut:]), (*axes[:lead], "rank", *axes[cut:])
    return out


@functools.lru_cache(maxsize=8)  # tracing a model takes a second, and a run asks several times
def _layout(config: ModelConfig) -> tuple[dict[str, Any], ...]:
    """Shape, axes and number of outputs of every parameter, by path."""
    parts = model.abstract_params, model.param_axes, model.matrix_outputs
    return tuple(flatten(part(config)) for part in parts)


def _targets(config: RunConfig, outputs: dict[str, int]) -> list[str]:
    regex, stage = config.lora.targets, get_stage(config.stage)
    read = [p for p in outputs if p.split("/")[0] in stage.parts]
    found = [p for p in read if re.fullmatch(regex, p)]
    if not found:
        raise UserError(
            f"config.lora.targets: {regex!r} matches no parameter of stage {stage.name!r}"
        )
    if odd := next((p for p in found if not outputs[p]), ""):
        raise UserError(
            f"config.lora.targets: {regex!r} matches {odd}, which is not the matrix of a linear "
            "layer; leave it out, or train it by config.trainable"
        )
    return found
