"""What the TPU compiler makes of a training step, without a TPU. Run: pytest -m tpu

Each topology costs a minute or more whatever the model's size, so there are few, with few layers.
A failure names the instruction and the source line it comes from.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from hovle_jax.config import DataConfig, RunConfig
from hovle_jax.nn import flash
from hovle_jax.tpu import aot, hlo
from hovle_jax.tpu.cost import Collective

sys.path.insert(0, str(Path(__file__).parents[2] / "configs"))
from models import HOVLE_2B, TEACHERS  # noqa: E402

pytestmark = pytest.mark.tpu
LAYERS = 2  # in each stack
TEACHER = TEACHERS["hovle_2b"]
TOKENS = 1536  # differs from every width of the model, so an activation is known by it
LARGE = 2**20  # bytes: token ids are smaller, an activation or a weight is not
TOPOLOGIES = ("v5e:4x4", "v5p:4x4x4", "v6e:4x4")


def run_config(devices: int, tokens: int = TOKENS) -> RunConfig:
    model = dataclasses.replace(
        HOVLE_2B,
        remat="products",
        embedding=dataclasses.replace(HOVLE_2B.embedding, num_layers=LAYERS),
        decoder=dataclasses.replace(HOVLE_2B.decoder, num_layers=LAYERS),
    )
    data = DataConfig(rows=devices, tokens=tokens, tiles=3)
    return RunConfig(stage="instruct", model=model, data=data)


@functools.cache
def plan_of(topology: str, tokens: int = TOKENS) -> aot.Plan:
    pytest.importorskip("libtpu", reason="needs libtpu: pip install 'hovle-jax[tpu]'")
    target = aot.topology(topology)
    return aot.make_plan(run_config(len(target.devices), tokens), target)


TEACHER_TILES = 2
# The longest axis of scores: patches and class token, and what they may be padded to.
SCORES = range(TEACHER.grid**2 + 1, 1153)


@functools.cache
def distill_plan() -> aot.Plan:
    """Stage I with its vision teacher, on v5e."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install 'hovle-jax[tpu]'")
    target = aot.topology("v5e:4x4")
    config = run_config(len(target.devices))
    data = dataclasses.replace(config.data, tiles=TEACHER_TILES)
    teacher = dataclasses.replace(TEACHER, num_layers=LAYERS)
    config = dataclasses.replace(config, stage="distill", data=data, teacher=teacher)
    return aot.make_plan(config, target)


@pytest.fixture(params=TOPOLOGIES)
def plan(request) -> aot.Plan:
    return plan_of(request.param)


def complain(what: str, found: list[tuple[str, str, str]]) -> None:
    """Fails with (name, name stack or shape, source line) of every instruction found."""
    assert not found, f"{what}:\n" + "\n".join(f"{n} ({op}) from {src}" for n, op, src in found)


def located(collectives: list[Collective]) -> list[tuple[str, str, str]]:
    return [(c.name, c.op_name or c.shape, c.source or "?") for c in collectives]


def test_attention_is_one_kernel_each_way(plan):
    forward = sum(k.times for k in plan.cost.kernels if "fwd" in k.name)
    backward = sum(k.times for k in plan.cost.kernels if "fwd" not in k.name)
    # More forward kernels than layers: the backward pass runs them again.
    assert (forward, backward) == (2 * LAYERS, 2 * LAYERS), [k.name for k in plan.cost.kernels]


def test_no_activation_is_gathered(plan):
    gathers = [c for c in plan.cost.collectives if c.kind == "all-gather" and c.bytes > LARGE]
    assert len(gathers) >= 7
    activations = [c for c in gathers if str(TOKENS) in c.shape]
    complain("an activation travels between devices", located(activations))


def test_tokens_are_looked_up_by_few_devices(plan):
    """The compiler estimates neither lookups nor their gradient, which adds row by row."""
    found, lookups = [], 0
    for visit in hlo.walk(plan.program):
        x, operands = visit.instruction, plan.program.computations[visit.computation]
        if x.op not in ("gather", "scatter") or "embedding/text" not in x.op_name:
            continue
        lookups += 1
        dims = x.dims if x.op == "gather" else operands[x.operands[2]].dims
        if math.prod(dims[:-1]) > 16 * TOKENS:
            found.append((x.name, f"{x.op} {dims}", plan.program.source(x)))
    assert lookups
    complain("a device looks up the tokens of more than 16", found)


@pytest.mark.parametrize(("topology", "tokens"), [("v5e:4x4", 4096), ("v5p:4x4x4", TOKENS)])
def test_gradients_are_reduced_behind_computation(topology, tokens):
    """But the last of each layer and the head's, after which there is nothing left to compute.

    (Fewer tokens take less time than their gradients travel, on v5e:4x4 and on v6e.)
    """
    plan = plan_of(topology, tokens)
    reductions = [c for c in plan.cost.collectives if c.kind in ("all-reduce", "reduce-scatter")]
    large = [c for c in reductions if c.bytes > LARGE and "/layers/" in c.op_name]
    assert large
    waited = [c for c in large if c.exposed]
    if sum(c.exposed for c in waited) > 0.5 * sum(c.seconds for c in large):
        complain("the step waits for most of its reductions", located(waited))


@pytest.mark.parametrize("topology", TOPOLOGIES[1:])
def test_sparse_cores_carry_weights_and_gradients(topology):
    """What they carry is begun and awaited; a collective in one piece stops the chip."""
    program = plan_of(topology).program
    begun, blocking = 0, []
    for visit in hlo.walk(program):
        x = visit.instruction
        if x.op in ("all-gather", "all-reduce", "reduce-scatter") and max(x.sizes) > LARGE:
            begun += visit.fused
            if not visit.fused:
                blocking.append((x.name, x.op_name, program.source(x)))
    complain("the chip waits for a collective", blocking)
    assert begun >= 7 * 3


def test_weights_are_gathered_and_not_added_up():
    """Of a small weight each of 256 chips has so little that the compiler would sum it with zeros;
    such a sum comes from no line of the program, a gradient does."""
    program = plan_of("v5e:16x16").program
    found, gathered = [], 0
    for visit in hlo.walk(program):
        x = visit.instruction
        if visit.times < LAYERS or max(x.sizes, default=0) < LARGE:
            continue
        gathered += x.op == "all-gather"
        if x.op == "all-reduce" and "transpose(" not in x.op_name:
            found.append((x.name, x.op_name or x.shape, program.source(x)))
    assert gathered >= 7 * 3
    complain("a weight is summed to be gathered", found)


def test_layers_multiply_in_bfloat16(plan):
    found = []
    products = 0
    for visit in hlo.walk(plan.program):
        x = visit.instruction
        if x.op not in ("convolution", "dot") or "/layers/" not in x.op_name:
            continue
        products += 1
        operands = plan.program.computations[visit.computation]
        if any(operands[o].shape.startswith("f32") for o in x.operands if o in operands):
            found.append((x.name, x.op_name, plan.program.source(x)))
    assert products >= 7 * 3
    complain("float32 matrix product in a layer", found)


def test_state_is_split_over_all_devices(plan):
    """Parameters and both moments in float32; a replicated leaf of any size would show."""
    devices = 16
    config = run_config(devices)
    state, frozen, _, batch = aot.arguments(config, aot.mesh_of(config, aot.topology("v5e:4x4")))
    assert not frozen
    whole = []
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        ways = math.prod(x.shape) / math.prod(x.sharding.shard_shape(x.shape))
        if math.prod(x.shape) > 2**20 and ways != devices:
            whole.append(f"{jax.tree_util.keystr(path)} lies on {devices / ways:.0f} devices each")
    assert not whole, whole


def test_memory_is_bounded(plan):
    # 0.7B parameters x 12 bytes over 16 devices; 4 layers of 1,536 tokens and their scores.
    assert plan.memory.arguments < 0.6 * 2**30
    assert plan.memory.peak < 3.0 * 2**30


def test_masks_over_images_are_computed_in_the_kernels():
    """With a reach of each query: a kernel forward, one backward; no scores or mask in memory."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install 'hovle-jax[tpu]'")
    length, where = 1100, SingleDeviceSharding(aot.topology("v5e:4x4").devices[0])

    def array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    q, k = (array((2, heads, length, 128), "bfloat16") for heads in (4, 2))
    per_token = array((2, length), "int32")
    attend = jax.grad(lambda *args: flash.attention(*args).astype("float32").sum(), (0, 1, 2))
    text = jax.jit(attend).lower(q, k, k, per_token, per_token).compile().as_text()
    kernels = re.findall(r"%\S*(splash_mha_[a-z]+)\S* = .* custom-call", text)
    assert sorted(kernels) == ["splash_mha_dkv", "splash_mha_fwd"]
    padded = length + -length % flash.block_of(length)
    assert f"{padded},{padded}" not in text and f"{length},{length}" not in text


def test_the_teacher_attends_in_one_kernel_a_layer():
    (kernel,) = [k for k in distill_plan().cost.kernels if "tile" in k.name]
    assert kernel.times == LAYERS
    # Every pair of places, at the width of the matrix unit: twice that of a head.
    pairs = TEACHER_TILES * TEACHER.num_heads * SCORES[0] ** 2
    assert 1.0 < kernel.flops / (LAYERS * 4 * 128 * pairs) < 1.2


def test_the_teachers_scores_stay_on_the_chip():
    program = distill_plan().program
    found = []
    for visit in hlo.walk(program):
        x = visit.instruction
        if any(len(d) > 1 and d[-1] in SCORES and d[-2] in SCORES for _, d in x.arrays):
            found.append((x.name, x.op_name or x.shape, program.source(x)))
    complain("scores of the teacher in memory", found)


def test_the_teachers_activations_are_not_copied():
    """The compiler's estimate of a copy is next to nothing; turning one around is not."""
    program = distill_plan().program
    found = []
    for visit in hlo.walk(program):
        x = visit.instruction
        inside = visit.times == LAYERS and len(x.dims) > 2
        if x.op in ("copy", "transpose") and inside and set(x.dims) & set(SCORES):
            found.append((x.name, x.op_name or x.shape, program.source(x)))
    complain("an activation of the teacher is copied", found)
