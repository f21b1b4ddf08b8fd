"""Mesh axes and the one table that says which array axis lies on which mesh axis.

Layers name the axes of their parameters and activations (`embed`, `heads`, ...); RULES maps those
names to mesh axes. Nothing else in the project mentions a mesh axis.

    slice   batch only: the TPU slices of a run, joined by network; sized by the devices themselves
    data    batch only: parameters replicated
    fsdp    batch, and every parameter split along its width
    tensor  heads, MLP width and vocabulary split inside each layer
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hovle_jax.config import MeshConfig
from hovle_jax.errors import UserError

AXES = ("slice", "data", "fsdp", "tensor")
BATCH_AXES = ("slice", "data", "fsdp")

RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "layers": (),  # the scanned axis of a stack
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "patch": (),
    "norm": (),
    # activations
    "batch": BATCH_AXES,
    "length": (),
    "act_embed": (),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them), sized by `config` inside each slice."""
    devices = jax.devices() if devices is None else list(devices)
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    inside = len(devices) // slices
    sizes = [getattr(config, a) for a in AXES[1:]]
    if sizes.count(-1) > 1:
        raise UserError("mesh: only one of data, fsdp, tensor may be -1")
    known = math.prod(s for s in sizes if s != -1)
    if known < 1 or inside % known:
        raise UserError(f"mesh: {sizes} does not divide {inside} devices")
    sizes = [inside // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != inside:
        raise UserError(f"mesh: {sizes} needs {math.prod(sizes)} devices, found {inside}")
    return Mesh(_grid(devices, slices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid(devices: list[Any], slices: int, sizes: list[int]) -> np.ndarray:
    """Devices as [slice, data, fsdp, tensor]; on TPU, neighbours on an axis are linked."""
    if devices[0].platform != "tpu":
        return np.asarray(devices, dtype=object).reshape(slices, *sizes)
    if slices > 1:
        return mesh_utils.create_hybrid_device_mesh(
            (1, *sizes), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh((1, *sizes), devices, allow_split_physical_axes=True)


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """Axis names -> PartitionSpec; an axis that a mesh axis does not divide stays whole."""
    entries: list[Any] = []
    for name, size in zip(axes, shape, strict=True):
        mesh_axes = RULES[name] if name else ()
        ways = math.prod(mesh.shape[a] for a in mesh_axes)
        entries.append(mesh_axes if ways > 1 and size % ways == 0 else None)
    return PartitionSpec(*entries)


def tree_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """Trees of axis-name tuples and of shapes -> tree of NamedSharding."""
    return jax.tree.map(
        lambda s, a: NamedSharding(mesh, spec(a, s.shape, mesh)),
        shapes,
        axes,
        is_leaf=lambda x: hasattr(x, "shape"),
    )


def batch_ways(mesh: Any) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def check_rows(rows: int, accumulate: int, mesh: Any) -> None:
    """A batch is split evenly over devices, and on each into `accumulate` parts."""
    ways = batch_ways(mesh) * accumulate
    if rows % ways:
        raise UserError(
            f"config.data.rows {rows} is not a multiple of {ways} (mesh data x fsdp x "
            "config.optim.accumulate)"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch spread over every data-parallel device."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def platform() -> str:
    """'tpu', 'gpu' or 'cpu': what the program being traced will run on, here or elsewhere."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return str(device.platform) if device is not None else jax.default_backend()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the layout of an activation under `jax.set_mesh`; without a mesh, does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


Axes = Sequence[str]


def per_shard(
    fn: Callable[..., Any], ins: Sequence[Axes], outs: Sequence[tuple[Axes, Sequence[int]]]
) -> Callable[..., Any]:
    """`fn` run by each device on its own part of arrays whose axes are named; no mesh: `fn`.

    outs: axes and whole shape of each result; `fn` returns a tuple of them.
    """

    def call(*arrays: jax.Array) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return fn(*arrays)
        in_specs = tuple(spec(axes, x.shape, mesh) for axes, x in zip(ins, arrays, strict=True))
        out_specs = tuple(spec(axes, shape, mesh) for axes, shape in outs)
        mapped = jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return mapped(*arrays)

    return call


def gathered(x: jax.Array, axis: str, dim: int, size: int) -> jax.Array:
    """Inside `per_shard`: the whole of dimension `dim`, of which this device has a part."""
    if x.shape[dim] == size:
        return x
    return jax.lax.all_gather(x, RULES[axis], axis=dim, tiled=True)


def scattered(x: jax.Array, axis: str, dim: int, part: int, *, rows_split: bool) -> jax.Array:
    """Inside `per_shard`: the sum of x over the batch, cut to this device's part of `dim`.

    rows_split: whether devices hold different rows; else each has the sum already.
    """
    names = RULES[axis]
    if rows_split:
        scatter = names if x.shape[dim] != part else ()
        others = tuple(a for a in BATCH_AXES if a not in scatter)
        x = jax.lax.psum(x, others)
        return jax.lax.psum_scatter(x, scatter, scatter_dimension=dim, tiled=True) if scatter else x
    if x.shape[dim] == part:
        return x
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(names) * part, part, dim)


def part_of(axis: str, part: int, size: int) -> tuple[Any, Callable[..., jax.Array]]:
    """Inside `per_shard`: (where this part of the axis begins, reduce(psum or pmax, x))."""
    if part == size:
        return 0, lambda _, x: x
    names = RULES[axis]
    return jax.lax.axis_index(names) * part, lambda reduce, x: reduce(x, names)
