"""Mesh axes and the one table that says which array axis lies on which mesh axis.

Layers name the axes of their parameters and activations (`embed`, `heads`, ...); RULES maps those
names to mesh axes. Nothing else in the project mentions a mesh axis.

    slice    batch only: the TPU slices of a run, joined by network; sized by the devices themselves
    data     batch only: parameters replicated
    fsdp     batch, and every parameter split along its width
    context  the places of a row, and parameters like fsdp; for attention, heads in their stead
    tensor   heads, MLP width and vocabulary split inside each layer
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from hovle_jax.config import MeshConfig
from hovle_jax.errors import UserError

AXES = ("slice", "data", "fsdp", "context", "tensor")
BATCH_AXES = ("slice", "data", "fsdp")

RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "layers": (),  # the scanned axis of a stack
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "patch": (),
    "norm": (),
    "rank": (),  # of an adapter
    # activations
    "batch": BATCH_AXES,
    "length": ("context",),
    "act_embed": (),
    # attention needs whole rows: between it and the rest, places and heads change sides
    "row": (),
    "row_heads": ("context", "tensor"),
    "row_kv_heads": ("context", "tensor"),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them), sized by `config` inside each slice."""
    devices = jax.devices() if devices is None else list(devices)
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    inside = len(devices) // slices
    sizes = [getattr(config, a) for a in AXES[1:]]
    if sizes.count(-1) > 1:
        raise UserError(f"mesh: only one of {', '.join(AXES[1:])} may be -1")
    known = math.prod(s for s in sizes if s != -1)
    if known < 1 or inside % known:
        raise UserError(f"mesh: {sizes} does not divide {inside} devices")
    sizes = [inside // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != inside:
        raise UserError(f"mesh: {sizes} needs {math.prod(sizes)} devices, found {inside}")
    return Mesh(_grid(devices, slices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid(devices: list[Any], slices: int, sizes: list[int]) -> np.ndarray:
    """Devices in the order of AXES; on TPU, neighbours on an axis are linked."""
    if devices[0].platform != "tpu":
        return np.asarray(devices, dtype=object).reshape(slices, *sizes)
    if slices > 1:
        return mesh_utils.create_hybrid_device_mesh(
            (1, *sizes), (slices, 1, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh((1, *sizes), devices, allow_split_physical_axes=True)


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """Axis names -> PartitionSpec; an axis that a mesh axis does not divide stays whole."""
    entries: list[Any] = []
    for name, size in zip(axes, shape, strict=True):
        entries.append(RULES[name] if name and split(name, size, mesh) > 1 else None)
    return PartitionSpec(*entries)


def split(axis: str, size: int, mesh: Any = None) -> int:
    """Into how many parts a mesh (default: the current one, if any) splits an axis of this size."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if axis not in RULES:
        raise UserError(f"axis {axis!r} of an array is not one of {', '.join(RULES)}")
    ways = math.prod(mesh.shape.get(a, 1) for a in RULES[axis])  # no mesh has no axes
    return 1 if size % ways else ways


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
            f"config.data.rows {rows} is not a multiple of {ways} (mesh slices x data x "
            "fsdp x config.optim.accumulate)"
        )


def check_length(length: int, what: str, mesh: Any) -> None:
    if length % mesh.shape["context"]:
        raise UserError(
            f"{what} {length} is not a multiple of config.mesh.context {mesh.shape['context']}"
        )


def share_of_rows(mesh: Mesh) -> tuple[int, int]:
    """(which part of each batch this process reads, of how many).

    Processes whose devices hold the same rows, because a mesh axis that splits no rows goes across
    processes, read the same part.

    Raises:
      UserError: rows would be shared by some of a process's devices only.
    """
    groups = np.moveaxis(mesh.devices, [AXES.index(a) for a in BATCH_AXES], range(3))
    rows_of: dict[int, set[int]] = {}
    for rows, devices in enumerate(groups.reshape(batch_ways(mesh), -1)):
        for device in devices:
            rows_of.setdefault(device.process_index, set()).add(rows)
    parts = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    if sum(map(len, parts)) != batch_ways(mesh) or len(set(map(len, parts))) != 1:
        raise UserError(
            "config.mesh: tensor x context devices must be whole processes, or a process whole "
            "groups of them"
        )
    return parts.index(tuple(sorted(rows_of[jax.process_index()]))), len(parts)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch spread over every data-parallel device."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def to_device(batch: Mapping[str, Any], where: NamedSharding) -> dict[str, jax.Array]:
    """This host's rows of a batch -> the global batch, laid out as `where` says."""
    make = jax.make_array_from_process_local_data
    return {k: make(where, np.asarray(v)) for k, v in batch.items()}


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def abstract(x: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """Shape and dtype of `x`, to lie as `where` says."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


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


Groups = list[list[int]]


def groups(ways: int, at_least: float) -> tuple[Groups, Groups]:
    """Of devices 0..ways-1, runs of equal length as short as `at_least` allows, and across them:
    the first of every run, the second of every run, ..."""
    size = next(n for n in range(1, ways + 1) if ways % n == 0 and n >= min(at_least, ways))
    runs = [list(range(first, first + size)) for first in range(0, ways, size)]
    return runs, [list(devices) for devices in zip(*runs, strict=True)]


def gathered(
    x: jax.Array, axis: str, dim: int, size: int, among: Groups | None = None
) -> jax.Array:
    """Inside `per_shard`: the whole of dimension `dim`, of which this device has a part.

    among: each group of devices gathers what the group has.
    """
    if x.shape[dim] == size:
        return x
    return jax.lax.all_gather(x, RULES[axis], axis=dim, tiled=True, axis_index_groups=among)


def exchanged(x: jax.Array, axis: str, cut: int, join: int, among: Groups) -> jax.Array:
    """Inside `per_shard`: part i of dimension `cut` goes to device i of the group, and the parts
    that come are joined along dimension `join`."""
    return jax.lax.all_to_all(x, RULES[axis], cut, join, tiled=True, axis_index_groups=among)


def part_of(axis: str, part: int, size: int) -> tuple[Any, Callable[..., jax.Array]]:
    """Inside `per_shard`: (where this part of the axis begins, reduce(psum or pmax, x))."""
    if part == size:
        return 0, lambda _, x: x
    names = RULES[axis]
    return jax.lax.axis_index(names) * part, lambda reduce, x: reduce(x, names)
