"""What a compiled TPU step costs: cycles, matrix products, kernels, communication.

The TPU compiler writes an estimate of cycles into every fusion it schedules. It counts the body of
a loop once and knows nothing of Pallas kernels; so loops are walked with their trip counts, and
attention kernels are priced from their shapes: half of all pairs where attention is causal, all of
them and what the kernel adds to fill registers where it is not (`tile_attention`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from hovle_jax.chips import Chip
from hovle_jax.hlo import COLLECTIVES, Instruction, Program, Visit, walk

# Matrix products of an attention kernel, in units of its forward pass (which has two).
KERNEL_PASSES = {"fwd": 1.0, "dq": 1.5, "dkv": 2.0, "dkv_fused": 2.5}
KERNEL_EFFICIENCY = 0.5  # of peak: an assumption, the compiler does not estimate kernels


@dataclass(frozen=True)
class Collective:
    kind: str
    group: int  # devices that take part
    bytes: float  # of the whole array, each time
    times: int
    seconds: float  # of all times, on an otherwise idle network
    hidden: bool  # overlapped with computation by the compiler
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
    slowest: tuple[tuple[float, str], ...] = field(repr=False, default=())  # (seconds, name stack)

    @property
    def step_seconds(self) -> float:
        return self.matrix_seconds + self.vector_seconds + self.kernel_seconds

    @property
    def kernel_flops(self) -> float:
        return sum(k.flops for k in self.kernels)

    @property
    def exposed_seconds(self) -> float:
        """Communication that nothing hides; not part of `step_seconds`."""
        return sum(c.seconds for c in self.collectives if not c.hidden)

    @property
    def hidden_seconds(self) -> float:
        return sum(c.seconds for c in self.collectives if c.hidden)


def price(program: Program, chip: Chip, devices: int) -> Cost:
    """Adds up what the compiler estimated and what it left out."""
    cycles = {True: 0.0, False: 0.0}
    flops = 0.0
    slowest: dict[str, float] = {}
    kernels: list[tuple[Visit, str]] = []
    collectives: dict[tuple[str, str], Collective] = {}
    for visit in walk(program):
        x = visit.instruction
        if (estimate := _cycles(visit)) > 0:
            matrix = _holds_product(program, x)
            cycles[matrix] += estimate
            where = x.op_name or re.sub(r"[.\d]+$", "", x.name)
            label = f"{where} [matrix]" if matrix else where
            slowest[label] = slowest.get(label, 0.0) + estimate
        if x.op in ("convolution", "dot"):
            flops += product_flops(program, visit) * visit.times
        if x.op == "custom-call" and "tpu_custom_call" in x.attributes:
            kernels.append((visit, _kernel_kind(x)))
        if collective := _collective(program, visit, chip, devices):
            # An asynchronous one appears at its start, in the bodies that carry it, at its end.
            key = collective.kind, x.attribute(r"channel_id=(\d+)") or visit.computation + x.name
            before = collectives.get(key)
            if before is None or collective.times > before.times:
                collectives[key] = collective
    reductions = (*collectives.values(), *_between_slices(program, chip))
    priced = _price_kernels(program, kernels)
    order = sorted(slowest.items(), key=lambda item: -item[1])
    return Cost(
        matrix_seconds=cycles[True] / chip.clock_hz,
        vector_seconds=cycles[False] / chip.clock_hz,
        matrix_flops=flops,
        kernels=priced,
        collectives=tuple(sorted(reductions, key=lambda c: -c.seconds)),
        kernel_seconds=sum(k.flops for k in priced) / (KERNEL_EFFICIENCY * chip.peak_flops),
        slowest=tuple((c / chip.clock_hz, name) for name, c in order),
    )


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


def _collective(program: Program, visit: Visit, chip: Chip, devices: int) -> Collective | None:
    x = visit.instruction
    kind = x.op.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    operands = program.computations[visit.computation]
    group = 2 if kind == "collective-permute" else group_size(x.attributes, devices)
    if kind == "reduce-scatter":
        whole = sum(sum(operands[o].sizes) for o in x.operands if o in operands)
    elif x.op.endswith("-start") or kind == "collective-permute":
        whole = max(x.sizes)  # the shape also holds the operand and flags
    else:
        whole = sum(x.sizes)
    scattered = kind == "all-reduce" and "all-reduce-scatter" in visit.computation
    if scattered:  # how the compiler spells it: a fusion around an all-reduce
        kind = "reduce-scatter"
    # A collective inside any other fusion shares it with the computation it hides behind.
    overlapped = visit.fused and not scattered
    return Collective(
        kind=kind,
        group=group,
        bytes=whole,
        times=visit.times,
        seconds=visit.times * collective_seconds(kind, whole, group, chip, devices),
        hidden=overlapped or x.op.endswith("-start") or "async_collective_name" in x.attributes,
        name=x.name,
        op_name=x.op_name,
        source=program.source(x),
        shape=x.shape[:80],
    )


def _between_slices(program: Program, chip: Chip) -> list[Collective]:
    """Reductions over the network, which the compiler writes as transfers to the hosts and back.

    Each device sends what is left of an array after its own slice's reduce-scatter. Hidden if the
    compiler scheduled enough between sending and receiving.
    """
    found = []
    clock = 0.0
    sent: dict[str, tuple[Visit, float]] = {}
    name_of = r'_xla_host_transfer_rendezvous="([^"]*)"'
    for visit in walk(program):
        x, operands = visit.instruction, program.computations[visit.computation]
        clock += _cycles(visit) / chip.clock_hz
        if x.op == "send" and "megascale" in x.attributes:
            sent[x.attribute(name_of)] = visit, clock
        elif x.op == "recv-done" and x.operands[0] in operands:
            rendezvous = operands[x.operands[0]].attribute(name_of)
            if rendezvous not in sent:
                continue
            send, begin = sent.pop(rendezvous)
            y = send.instruction
            slices = _count(y.attribute(r'_xla_megascale_target="\{([^}]*)\}'))
            size = y.sizes[0]
            seconds = 2 * (slices - 1) / slices * size / chip.network_bandwidth
            found.append(
                Collective(
                    kind="network reduction",
                    group=slices,
                    bytes=size,
                    times=send.times,
                    seconds=seconds * send.times,
                    hidden=(clock - begin) / send.times >= seconds,
                    name=y.name,
                    op_name=y.op_name or rendezvous,
                    source=program.source(y),
                    shape=y.shape[:80],
                )
            )
    return found


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
    """Of one collective over an idle torus: a ring in both directions over every axis it spans."""
    axes = chip.torus_axes if group == devices and devices > 4 else 1
    # Two-dimensional slices close into a ring only along an axis of 16.
    flat = group >= 16 * axes and devices >= 256
    wraps = group % 4 == 0 if chip.torus_axes == 3 else flat
    bandwidth = chip.ici_bandwidth * (2 if wraps else 1) * axes
    share = (group - 1) / group
    if kind == "collective-permute":
        return size / chip.ici_bandwidth
    factor = {"all-reduce": 2 * share, "all-to-all": share / 4}.get(kind, share)
    return factor * size / bandwidth


def _kernel_kind(x: Instruction) -> str:
    if "tile" in x.name:
        return "tile"
    if "dkv" in x.name:
        return "dkv"
    return "dq" if "dq" in x.name else "fwd"


def _price_kernels(program: Program, found: list[tuple[Visit, str]]) -> tuple[Kernel, ...]:
    """Attention as executed, each kernel by its matrix products."""
    fused = not any(kind == "dq" for _, kind in found)
    kernels = []
    for visit, kind in found:
        x, operands = visit.instruction, program.computations[visit.computation]
        floats = [operands[o] for o in x.operands if operands[o].shape.startswith(("bf16", "f32"))]
        queries, keys = (x.dims for x in floats[:2])
        pairs = 4.0 * math.prod(queries) * keys[-2]
        if kind == "tile":  # it states its padding; never less than what its arrays say
            stated = x.attribute(r'"cost_estimate":\{"flops":"(\d+)"')
            flops = max(float(stated or 0), pairs)
        else:  # causal: half of all pairs count
            flops = KERNEL_PASSES["dkv_fused" if kind == "dkv" and fused else kind] * pairs / 2
        kernels.append(Kernel(x.name, visit.times, flops * visit.times, program.source(x)))
    return tuple(kernels)
