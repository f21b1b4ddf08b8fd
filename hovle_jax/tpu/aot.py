"""The training step, compiled for a TPU that is not there, and what it would cost.

libtpu holds the whole TPU compiler and needs no TPU to run it: a topology by name ("v5e:16x16"), a
mesh of its devices and arguments that are shapes with shardings give the program `hovle train`
would run there (`train_step.jit_step`; nothing here builds a step of its own).

Memory is the compiler's own buffer assignment. Time is an estimate (`hlo`, docs/performance.md).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from hovle_jax import distill, lora, sharding, train_step
from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError, one_line
from hovle_jax.stages import get_stage
from hovle_jax.tpu import chips, hlo
from hovle_jax.tpu.chips import Chip
from hovle_jax.tpu.cost import Cost, price
from hovle_jax.train_step import batch_shapes
from hovle_jax.tree import flatten

# Read when libtpu is loaded: do not look for a TPU, do not complain that there is none, and let
# several processes compile at a time.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Topology:
    """Devices that need not exist."""

    name: str
    chip: Chip
    slices: int
    devices: tuple[Any, ...]


def topology(name: str, slices: int = 1) -> Topology:
    """'v5e:16x16' -> its devices, `slices` times.

    Raises:
      UserError: unknown chip or shape, or no libtpu.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    if not match:
        raise UserError(f"--topology: {name!r} is not of the form v5e:16x16 or v5p:4x4x8")
    chip = chips.get_chip(match.group(1))
    shape = tuple(int(n) for n in match.group(2).split("x"))
    if len(shape) != chip.torus_axes:
        raise UserError(f"--topology: {chip.name} is {chip.torus_axes}-dimensional, {name!r} not")
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {"wrap": chips.wraps(chip, shape)}
    if slices > 1:
        options["num_slices"] = slices
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except ImportError as error:
        raise UserError(
            f"--topology: needs libtpu; pip install 'hovle-jax[tpu]' ({error})"
        ) from None
    except Exception as error:  # jaxlib raises several types for a shape it does not know
        line = one_line(error)[:200]
        raise UserError(f"--topology: {name!r} with {slices} slices: {line}") from None
    return Topology(name, chip, slices, tuple(found.devices))


def arguments(config: RunConfig, mesh: Mesh) -> tuple[Any, ...]:
    """(state, frozen, teacher parameters, batch) of the step as shapes with their shardings."""
    train_step.check_batch(config, mesh)
    _, frozen = train_step.stage_shapes(config)
    teach, teach_shardings = {}, {}
    if get_stage(config.stage).teacher:
        teach = train_step.teacher_shapes(config)
        teach_shardings = train_step.teacher_shardings(config, mesh)
    pairs = (
        (train_step.state_shapes(config), train_step.state_shardings(config, mesh)),
        (frozen, train_step.param_shardings(config, frozen, mesh)),
        (teach, teach_shardings),
    )
    place = sharding.batch_sharding(mesh)
    batch = {k: sharding.abstract(x, place) for k, x in batch_shapes(config).items()}
    return (*(jax.tree.map(sharding.abstract, shapes, where) for shapes, where in pairs), batch)


def lower(config: RunConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The step of `hovle train` with this config on this mesh, before compilation."""
    step = train_step.jit_step(config, mesh)
    shapes = arguments(config, mesh)
    with jax.set_mesh(mesh):
        return step.lower(*shapes)


def fingerprint(lowered: jax.stages.Lowered) -> str:
    """The same for the same program: 16 hex digits of its StableHLO."""
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Memory:
    """Bytes per device."""

    arguments: float
    temporaries: float | None  # None: not compiled
    peak: float | None
    limit: float


@dataclass(frozen=True)
class Plan:
    """What one step of one config costs on one topology; per device where it says nothing."""

    memory: Memory
    model_flops: float
    cost: Cost | None = None  # None: not compiled
    compile_seconds: float = 0.0
    fingerprint: str = ""
    text: str = dataclasses.field(default="", repr=False)  # the scheduled HLO
    program: hlo.Program | None = dataclasses.field(default=None, repr=False)


def mesh_of(config: RunConfig, target: Topology) -> Mesh:
    return sharding.make_mesh(config.mesh, target.devices)


def make_plan(config: RunConfig, target: Topology) -> Plan:
    """Compiles the step for `target`.

    Raises:
      UserError: it does not fit; the compiler's own figures are in the message.
    """
    mesh = mesh_of(config, target)
    lowered = lower(config, mesh)
    begin = time.monotonic()
    try:
        compiled: Any = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"{target.name}: {_reason(error)}") from None
    seconds = time.monotonic() - begin
    stats = compiled.memory_analysis()
    text = compiled.as_text()
    program = hlo.parse(text)
    return Plan(
        memory=Memory(
            arguments=float(stats.argument_size_in_bytes),
            temporaries=float(stats.temp_size_in_bytes),
            peak=float(stats.peak_memory_in_bytes),
            limit=target.chip.hbm_bytes,
        ),
        model_flops=model_flops(config) / len(target.devices),
        cost=price(program, target.chip, len(target.devices) // target.slices),
        compile_seconds=seconds,
        fingerprint=fingerprint(lowered),
        text=text,
        program=program,
    )


def outline(config: RunConfig, target: Topology) -> Plan:
    """The part of a plan that shapes alone tell: state in memory, FLOPs. Seconds, not a minute."""
    mesh = mesh_of(config, target)
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(arguments(config, mesh))
    )
    memory = Memory(float(held), None, None, target.chip.hbm_bytes)
    return Plan(memory, model_flops(config) / len(target.devices))


def state_bytes(config: RunConfig) -> float:
    """Of a checkpoint: what trains and its optimizer state."""
    leaves = jax.tree.leaves(train_step.state_shapes(config))
    return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves))


def _reason(error: Exception) -> str:
    found = re.search(r"[^.\n]*(?:Ran out of memory|exceeds)[^\n]*", str(error))
    return f"does not compile: {found.group(0).strip() if found else one_line(error)}"[:300]


# The matrices behind each term of `model_flops`.
_MATRICES = {
    "vision": r"embedding/(vision|projector)/.*kernel",
    "embedding": r"embedding/layers/.*kernel",
    "decoder": r"decoder/layers/.*kernel",
    "head": r"decoder/head/kernel",
}


def model_flops(config: RunConfig, *, backward: bool = True) -> float:
    """Useful matrix FLOPs of one step (or its forward pass alone), without recomputation.

    Forward once, backward twice where weights train and once where gradients only pass through;
    causal attention counts half. Every row is taken as one sequence and every tile as used.
    """
    c, data, stage = config.model, config.data, get_stage(config.stage)
    rows, tokens, tiles = data.rows, data.tokens, data.tiles
    patches = tiles * c.grid**2
    long = tokens + tiles * c.extra_places_per_tile
    vision = 2.0 * patches * 3 * c.patch_size**2 * c.hidden_size
    vision += 2.0 * tiles * c.tokens_per_tile * c.compressor_params
    forward = {
        "vision": vision,
        "embedding": long * c.flops_per_token(long)["embedding"],
        "decoder": tokens * c.flops_per_token(tokens)["decoder"],
        "head": tokens * c.flops_per_token(tokens)["head"],
    }
    extra = 0.0
    if stage.teacher:
        del forward["decoder"], forward["head"]
        extra = teacher_flops(config)
    trainable, share = _trained(config)
    for path in filter(lora.is_adapter, trainable):
        places = tokens if path.startswith("decoder/") else long
        extra += (6.0 if backward else 2.0) * places * math.prod(trainable[path].shape)
    if not backward:
        return rows * (sum(forward.values()) + extra)
    passes = {name: 2.0 + share[name] for name in forward}
    if not any(path.startswith("embedding/") for path in trainable):
        passes |= {"vision": 1.0, "embedding": 1.0}  # no gradient gets there
    for name, length in (("embedding", long), ("decoder", tokens)):
        if passes.get(name, 1.0) > 1.0:  # attention has no weights: three passes whatever trains
            s = getattr(c, name)
            extra += (1.0 - share[name]) * length * s.mixing_flops(length)
    return rows * (sum(passes[name] * f for name, f in forward.items()) + extra)


def _trained(config: RunConfig) -> tuple[dict[str, Any], dict[str, float]]:
    """({path: shape of what trains}, share of the matrices of each term of `model_flops`)."""
    trainable, frozen = (flatten(tree) for tree in train_step.stage_shapes(config))
    share = {}
    for name, regex in _MATRICES.items():
        sizes = [
            sum(math.prod(x.shape) for k, x in part.items() if re.fullmatch(regex, k))
            for part in ({k: x for k, x in trainable.items() if not lora.is_adapter(k)}, frozen)
        ]
        share[name] = sizes[0] / max(sum(sizes), 1)
    return trainable, share


def teacher_flops(config: RunConfig) -> float:
    """Forward matrix FLOPs of the teachers for one row."""
    teachers = distill.run_teachers(config)
    return config.data.tiles * sum(t.config.flops_per_tile() for t in teachers)
