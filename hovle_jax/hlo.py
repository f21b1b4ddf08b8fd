"""What a compiled TPU program says about itself: its scheduled HLO text, read and priced.

    text --parse--> Program --price--> Cost: cycles, matrix products, kernels, collectives

The TPU compiler writes an estimate of cycles into every fusion it schedules. It counts the body of
a loop once and knows nothing of Pallas kernels; so loops are walked with their trip counts, and
attention kernels are priced from their shapes: half of all pairs where attention is causal, all of
them and what the kernel adds to fill registers where it is not (`tile_attention`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from hovle_jax.chips import Chip

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Matrix products of an attention kernel, in units of its forward pass (which has two).
KERNEL_PASSES = {"fwd": 1.0, "dq": 1.5, "dkv": 2.0, "dkv_fused": 2.5}
KERNEL_EFFICIENCY = 0.5  # of peak: an assumption, the compiler does not estimate kernels


@dataclass(frozen=True)
class Instruction:
    name: str
    op: str
    shape: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    @property
    def dims(self) -> tuple[int, ...]:
        """Of the first array in the shape."""
        return self.arrays[0][1] if self.arrays else ()

    @property
    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        found = re.findall(r"([a-z]\w*)\[([\d,]*)\]", self.shape)
        return [(kind, tuple(int(x) for x in dims.split(",") if x)) for kind, dims in found]

    @property
    def sizes(self) -> list[float]:
        """Bytes of each array."""
        return [BYTES.get(kind, 4) * math.prod(dims) for kind, dims in self.arrays]

    def attribute(self, pattern: str) -> str:
        """First group of `pattern` in the attributes, '' without a match."""
        match = re.search(pattern, self.attributes)
        return match.group(1) if match else ""

    @property
    def op_name(self) -> str:
        """The JAX name stack: jit(step)/transpose(jvp(HoVLE))/decoder/..."""
        return self.attribute(r'op_name="([^"]*)"')


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    entry: str
    frames: dict[int, str]  # stack frame id -> "file:line" of the innermost frame

    def source(self, instruction: Instruction) -> str:
        frame = instruction.attribute(r"stack_frame_id=(\d+)")
        return self.frames.get(int(frame), "") if frame else ""


@dataclass(frozen=True)
class Visit:
    """An instruction that runs `times` times a step."""

    instruction: Instruction
    computation: str
    times: int
    fused: bool  # inside a fusion, whose cycles count as a whole


_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = ""
    for line in _joined(text):
        if line.startswith("}") and not line.startswith("}}"):
            current = None
        elif current is None:
            header = _COMPUTATION.match(line)
            if header:
                current = computations.setdefault(header.group(2), {})
                entry = header.group(2) if header.group(1) else entry
        elif match := _INSTRUCTION.match(line):
            instruction = _instruction(match.group(2), match.group(3), bool(match.group(1)))
            if instruction is not None:
                current[instruction.name] = instruction
    return Program(computations, entry, _frames(text))


def _joined(text: str) -> list[str]:
    """Lines; an instruction that holds raw line breaks (Pallas metadata) becomes one line again."""
    lines: list[str] = []
    for line in text.splitlines():
        begins = not line or line.startswith(("  ", "%", "ENTRY", "HloModule"))
        closes = line.startswith("}") and not line.startswith("}}")
        if lines and not begins and not closes:
            lines[-1] += line
        else:
            lines.append(line)
    return lines


def _closing(text: str) -> int:
    """Index of the parenthesis that closes the first one."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char == ")" and depth == 0:
            return i
    return len(text) - 1


def _instruction(name: str, rest: str, root: bool) -> Instruction | None:
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    match = re.match(r"([\w\-]+)\(", rest)
    if not match:
        return None
    op = match.group(1)
    close = len(op) + _closing(rest[len(op) :])
    arguments = rest[len(op) + 1 : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name, op, shape, operands, arguments, rest[close + 1 :], root)


def _frames(text: str) -> dict[int, str]:
    """The tables of source positions at the head of the text."""

    def table(title: str) -> dict[int, str]:
        begin = text.find(f"\n{title}\n")
        if begin < 0:
            return {}
        rows = text[begin + len(title) + 2 :].split("\n\n", 1)[0].splitlines()
        return {int(n): rest for n, _, rest in (row.partition(" ") for row in rows)}

    def number(key: str, row: str) -> int:
        match = re.search(rf"{key}=(\d+)", row)
        return int(match.group(1)) if match else 0

    files = {k: v.strip('"') for k, v in table("FileNames").items()}
    lines = {
        k: f"{files.get(number('file_name_id', v), '')}:{number('line', v)}"
        for k, v in table("FileLocations").items()
    }
    frames = table("StackFrames")
    return {k: lines.get(number("file_location_id", v), "") for k, v in frames.items()}


def walk(program: Program) -> Iterator[Visit]:
    """Every instruction the step runs, with how often; loops by their trip counts."""

    def visit(name: str, times: int, fused: bool) -> Iterator[Visit]:
        computation = program.computations[name]
        for x in computation.values():
            yield Visit(x, name, times, fused)
            if x.op == "while":
                body = x.attribute(r"body=%?([\w.\-]+)")
                trips = trip_count(program, name, x)
                yield from visit(body, times * trips, fused)
            elif x.op == "fusion":
                inner = x.attribute(r"calls=%?([\w.\-]+)")
                yield from visit(inner, times, True)
            elif x.op == "conditional" or x.op == "call" or x.op.endswith("-start"):
                pattern = (
                    r"(?:to_apply|calls|branch_computations|called_computations)=\{?%?([\w.\-]+)"
                )
                inner = x.attribute(pattern)
                if inner and not x.op.startswith(COLLECTIVES):
                    yield from visit(inner, times, True)

    return visit(program.entry, 1, False)


def trip_count(program: Program, name: str, loop: Instruction) -> int:
    """Of a loop that counts up to a constant, as every `lax.scan` does; 1 if it does not."""
    known = loop.attribute(r"known_trip_count[^\d]*(\d+)")
    if known:
        return int(known)
    condition = program.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    test = next(x for x in condition.values() if x.root)
    limit = index = None
    for operand in test.operands:
        x = condition[operand]
        if (value := _constant(condition, x)) is not None:
            limit = value
        elif x.op == "get-tuple-element":
            index = int(x.attribute(r"index=(\d+)"))
    if limit is None or index is None:
        return 1
    outer = program.computations[name]
    state = outer[loop.operands[0]]
    start = _constant(outer, outer[state.operands[index]]) if state.op == "tuple" else 0
    body = program.computations[loop.attribute(r"body=%?([\w.\-]+)")]
    result = next(x for x in body.values() if x.root)
    step = None
    if result.op == "tuple" and (update := body.get(result.operands[index])) is not None:
        values = [_constant(body, body[o]) for o in update.operands if o in body]
        step = next((v for v in values if v), None) if update.op == "add" else None
    return max(1, math.ceil((limit - (start or 0)) / (step or 1)))


def _constant(computation: Computation, x: Instruction) -> int | None:
    while x.op in ("copy", "bitcast", "convert") and x.operands[0] in computation:
        x = computation[x.operands[0]]
    match = re.match(r"-?\d+", x.arguments) if x.op == "constant" else None
    return int(match.group()) if match else None


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
        estimate = x.attribute(r'"estimated_cycles":"(\d+)"')
        if estimate and not visit.fused:
            matrix = _holds_product(program, x)
            cycles[matrix] += float(estimate) * visit.times
            where = x.op_name or re.sub(r"[.\d]+$", "", x.name)
            label = f"{where} [matrix]" if matrix else where
            slowest[label] = slowest.get(label, 0.0) + float(estimate) * visit.times
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
    priced = _price_kernels(program, kernels)
    order = sorted(slowest.items(), key=lambda item: -item[1])
    return Cost(
        matrix_seconds=cycles[True] / chip.clock_hz,
        vector_seconds=cycles[False] / chip.clock_hz,
        matrix_flops=flops,
        kernels=priced,
        collectives=tuple(sorted(collectives.values(), key=lambda c: -c.seconds)),
        kernel_seconds=sum(k.flops for k in priced) / (KERNEL_EFFICIENCY * chip.peak_flops),
        slowest=tuple((c / chip.clock_hz, name) for name, c in order),
    )


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
