"""What a compiled TPU program says about itself: its scheduled HLO text, read.

text --parse--> Program --walk--> its instructions, each with how often it runs (`cost` prices)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


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
