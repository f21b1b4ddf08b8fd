"""What a compiled TPU step costs: cycles, matrix products, kernels, communication.

The TPU compiler writes an estimate of cycles into every fusion it schedules. It counts the body of
a loop once and knows nothing of Pallas kernels; so loops are walked with their trip counts, and
attention kernels are priced from their shapes: half of all pairs where attention is causal (as if a
row were one segment), all of them and what the kernel adds to fill registers where every query
sees every key (`tile_attention`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from hovle_jax.tpu.chips import Chip
from hovle_jax.tpu.hlo import COLLECTIVES, Instruction, Program, Visit, walk

BACKWARD_PASSES = 2.5  # five matrix products of attention's backward kernel, two of the forward one
KERNEL_EFFICIENCY = 0.5  # of peak: an assumption, the compiler does not estimate kernels


@dataclass(frozen=True)
class Collective:
    kind: str
    group: int  # devices that take part
    bytes: float  # of the whole array, each time
    times: int
    seconds: float  # of all times, on an otherwise idle network
    exposed: float  # of these, seconds that the compiler put no computation beside
    name: str
    op_name: str
    source: str
    shape: str


@dataclass(frozen=True)
class Kernel:
    name: str
    times: int
    flops: float  # of all times
    source: str


@dataclass(frozen=True)
class Cost:
    """Per device and step."""

    matrix_seconds: float  # fusions that hold a matrix product
    vector_seconds: float  # all other fusions: vector units and memory
    matrix_flops: float
    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    kernel_seconds: float

    @property
    def step_seconds(self) -> float:
        return self.matrix_seconds + self.vector_seconds + self.kernel_seconds

    @property
    def kernel_flops(self) -> float:
        return sum(k.flops for k in self.kernels)

    @property
    def exposed_seconds(self) -> float:
        """Communication that nothing hides; not part of `step_seconds`."""
        return sum(c.exposed for c in self.collectives)

    @property
    def hidden_seconds(self) -> float:
        return sum(c.seconds - c.exposed for c in self.collectives)


def price(program: Program, chip: Chip, devices: int) -> Cost:
    """Adds up what the compiler estimated and what it left out; `devices` of one slice."""
    visits = list(walk(program))
    kernels = _price_kernels(program, visits)
    of_kernel = {k.name: k.flops / (KERNEL_EFFICIENCY * chip.peak_flops) for k in kernels}
    cycles = {True: 0.0, False: 0.0}
    flops = 0.0
    schedule = _Schedule(program)
    collectives: dict[tuple[str, ...], Collective] = {}
    for visit in visits:
        x = visit.instruction
        if (estimate := _cycles(visit)) > 0:
            cycles[_holds_product(program, x)] += estimate
        if x.op in ("convolution", "dot"):
            flops += product_flops(program, visit) * visit.times
        schedule.pass_by(visit, estimate / chip.clock_hz + of_kernel.get(x.name, 0.0))
    for visit in visits:
        if collective := _collective(program, visit, schedule, chip, devices):
            key = collective.kind, *schedule.identity(visit)
            before = collectives.get(key)
            order = (collective.times, -collective.exposed)
            if before is None or order > (before.times, -before.exposed):
                collectives[key] = collective
    return Cost(
        matrix_seconds=cycles[True] / chip.clock_hz,
        vector_seconds=cycles[False] / chip.clock_hz,
        matrix_flops=flops,
        kernels=kernels,
        collectives=tuple(sorted(collectives.values(), key=lambda c: -c.seconds)),
        kernel_seconds=sum(of_kernel.values()),
    )


class _Schedule:
    """How long the program computes between the start of something asynchronous and its end.

    A name says nothing: what was to overlap and could not, keeps its asynchronous name.
    """

    def __init__(self, program: Program):
        self._program = program
        self._clock = self._before = 0.0  # now, and as the last instruction outside fusions began
        self._begun: dict[tuple[str, str], tuple[float, Visit]] = {}
        self._beside: dict[tuple[str, str], float] = {}
        self._around: dict[str, str] = {}  # a fusion's computation: the one that runs the fusion
        self._carried: dict[tuple[str, ...], tuple[float, float]] = {}  # from when to when

    def pass_by(self, visit: Visit, seconds: float) -> None:
        """Instructions in the order of the schedule, and the time each takes (of all times)."""
        x, here = visit.instruction, visit.computation
        if not visit.fused:
            self._before = self._clock
        elif x.op in COLLECTIVES:
            since, _ = self._carried.get(self.identity(visit), (self._before, 0.0))
            self._carried[self.identity(visit)] = since, self._clock
        if called := _called(x):
            self._around[called] = self._around.get(here, here) if visit.fused else here
        if x.op.endswith("-start") or x.op in ("send", "recv"):
            name = _rendezvous(x) or x.name
            if x.op != "recv":
                self._begun[here, name] = self._clock, visit
        elif x.op.endswith("-done") and x.operands:
            start = self._program.computations[here].get(x.operands[0])
            begun = self._begun.get((here, start and _rendezvous(start) or x.operands[0]))
            if begun is not None and x.op != "send-done":
                beside = (self._clock - begun[0]) / visit.times
                asynchronous = begun[1].instruction
                self._beside[here, asynchronous.name] = beside
                if called := _called(asynchronous):
                    self._beside[called, ""] = beside
        self._clock += seconds

    def beside(self, visit: Visit) -> float:
        """Seconds of computation each time while a collective is under way; 0: it blocks."""
        x = visit.instruction
        if x.op.endswith("-start") or x.op == "send":
            return self._beside.get((visit.computation, x.name), 0.0)
        # In fusions: the one that starts it, those that carry it, the one that waits for it.
        since, until = self._carried.get(self.identity(visit), (0.0, 0.0))
        return self._beside.get((visit.computation, ""), (until - since) / visit.times)

    def identity(self, visit: Visit) -> tuple[str, ...]:
        """What all instructions of one collective have in common, of which there are several where
        fusions carry it.

        Those of a shard_map all have one channel, and are told apart by what they come from.
        """
        x, here = visit.instruction, visit.computation
        if not visit.fused:
            return here, x.name
        channel = x.attribute(r"channel_id=(\d+)") or here + x.name
        return self._around.get(here, ""), x.op.removesuffix("-start"), channel, x.op_name


def _rendezvous(x: Instruction) -> str:
    """By which a transfer to the host and the one back find each other."""
    return x.attribute(r'_xla_host_transfer_rendezvous="([^"]*)"')


def _called(x: Instruction) -> str:
    return x.attribute(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")


def _cycles(visit: Visit) -> float:
    """Estimated, of all times; a fusion's own count as a whole."""
    estimate = visit.instruction.attribute(r'"estimated_cycles":"(\d+)"')
    return float(estimate) * visit.times if estimate and not visit.fused else 0.0


def _holds_product(program: Program, x: Instruction) -> bool:
    inner = program.computations.get(x.attribute(r"calls=%?([\w.\-]+)"), {})
    return any(y.op in ("convolution", "dot") for y in (x, *inner.values()))


def product_flops(program: Program, visit: Visit) -> float:
    """Of one matrix product, which the TPU compiler writes as a convolution."""
    x, computation = visit.instruction, program.computations[visit.computation]
    left, right = (computation[o].dims for o in x.operands[:2])
    if x.op == "dot":
        axes = x.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        return 2.0 * math.prod(x.dims) * math.prod(left[int(a)] for a in axes.split(",") if a)
    match = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes)
    assert match is not None
    lhs, rhs, out = match.groups()
    window = dict(
        pair.split("=") for pair in x.attribute(r"window=\{([^}]*)\}").split() if "=" in pair
    )
    touched = 1
    for axis in range(len(lhs) - 2):
        size = _window(window, "size", axis, 1)
        stride, pad = _window(window, "stride", axis, 1), _window(window, "pad", axis, 0)
        dilated, spread = (
            _window(window, "lhs_dilate", axis, 1),
            _window(window, "rhs_dilate", axis, 1),
        )
        length, outputs = left[lhs.index(str(axis))], x.dims[out.index(str(axis))]
        places = (o * stride + s * spread - pad for o in range(outputs) for s in range(size))
        touched *= sum(p >= 0 and p % dilated == 0 and p // dilated < length for p in places)
    contracted = right[rhs.index("i")]
    total = 2.0 * x.dims[out.index("b")] * x.dims[out.index("f")] * contracted * touched
    return total / int(x.attribute(r"batch_group_count=(\d+)") or 1)


def _window(window: dict[str, str], key: str, axis: int, default: int) -> int:
    """Padding is written low_high; the low side places the window."""
    return int(window[key].split("x")[axis].split("_")[0]) if key in window else default


def _collective(
    program: Program, visit: Visit, schedule: _Schedule, chip: Chip, devices: int
) -> Collective | None:
    x = visit.instruction
    kind = x.op.removesuffix("-start")
    network = x.op == "send" and "megascale" in x.attributes
    if kind not in COLLECTIVES and not network:
        return None
    operands = program.computations[visit.computation]
    group = 2 if kind == "collective-permute" else group_size(x.attributes, devices)
    if network:
        # How the compiler spells a reduction between slices: to the host and back. What is left
        # of an array after the slice's own reduce-scatter.
        kind, group = "network reduction", _count(x.attribute(r'_megascale_target="\{([^}]*)\}'))
        whole = x.sizes[0]
    elif kind == "reduce-scatter":
        whole = sum(sum(operands[o].sizes) for o in x.operands if o in operands)
    elif x.op.endswith("-start") or kind == "collective-permute":
        whole = max(x.sizes)  # the shape also holds the operand and flags
    else:
        whole = sum(x.sizes)
    beside = schedule.beside(visit)
    if kind == "all-reduce" and "all-reduce-scatter" in visit.computation:
        kind, beside = "reduce-scatter", 0.0  # a fusion around an all-reduce and nothing else
    seconds = collective_seconds(kind, whole, group, chip, devices)
    return Collective(
        kind=kind,
        group=group,
        bytes=whole,
        times=visit.times,
        seconds=visit.times * seconds,
        exposed=visit.times * max(0.0, seconds - beside),
        name=x.name,
        op_name=x.op_name or _rendezvous(x),
        source=program.source(x),
        shape=x.shape[:80],
    )


def _count(ranges: str) -> int:
    """How many numbers "1,2" or "0:3" names."""
    ends = ([int(n) for n in part.split(":")] for part in ranges.split(",") if part)
    return sum(end[-1] - end[0] + 1 for end in ends)


def group_size(attributes: str, devices: int) -> int:
    """Devices per group, from any of the three spellings of replica_groups."""
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}", attributes
    )
    if mesh:
        sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", mesh.group(1))}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh.group(2)))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(match.group(2))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(match.group(1).split(","))
    return devices


def collective_seconds(kind: str, size: float, group: int, chip: Chip, devices: int) -> float:
    """Of one collective over an idle torus: a ring in both directions over every axis it spans.

    size: bytes of the whole array; for all-to-all of what one device has of it, each byte of which
    passes a quarter of every axis on its way (half where it is no ring, in one direction).
    """
    if kind == "network reduction":
        return 2 * (group - 1) / group * size / chip.network_bandwidth
    axes = chip.torus_axes if group == devices and devices > 4 else 1
    # Two-dimensional slices close into a ring only along an axis of 16.
    flat = group >= 16 * axes and devices >= 256
    wraps = group % 4 == 0 if chip.torus_axes == 3 else flat
    bandwidth = chip.ici_bandwidth * (2 if wraps else 1) * axes
    share = (group - 1) / group
    if kind == "collective-permute":
        return size / chip.ici_bandwidth
    hops = axes * group ** (1 / axes) / 4
    factor = {"all-reduce": 2 * share, "all-to-all": hops}.get(kind, share)
    return factor * size / bandwidth


def _price_kernels(program: Program, visits: list[Visit]) -> tuple[Kernel, ...]:
    """Attention as executed, each kernel by its matrix products."""
    kernels = []
    for visit in visits:
        x, operands = visit.instruction, program.computations[visit.computation]
        if x.op != "custom-call" or "tpu_custom_call" not in x.attributes:
            continue
        floats = [operands[o] for o in x.operands if operands[o].shape.startswith(("bf16", "f32"))]
        queries, keys = (x.dims for x in floats[:2])
        pairs = 4.0 * math.prod(queries) * keys[-2]
        if "tile" in x.name:  # it states its padding; never less than what its arrays say
            stated = x.attribute(r'"cost_estimate":\{"flops":"(\d+)"')
            flops = max(float(stated or 0), pairs)
        else:  # causal: half of all pairs count
            flops = (BACKWARD_PASSES if "dkv" in x.name else 1) * pairs / 2
        kernels.append(Kernel(x.name, visit.times, flops * visit.times, program.source(x)))
    return tuple(kernels)
