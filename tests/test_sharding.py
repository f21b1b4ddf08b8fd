"""Eight simulated devices give the numbers of one."""

from __future__ import annotations

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax import sharding, train_step
from hovle_jax.config import MeshConfig
from hovle_jax.errors import UserError
from hovle_jax.initialize import initial_params, teacher_params
from hovle_jax.nn import teacher
from hovle_jax.nn.text_table import look_up
from hovle_jax.stages import get_stage, open_pipeline
from hovle_jax.tree import flatten, split
from tests.conftest import TEACHER

MESHES = {
    "data": MeshConfig(8, 1, 1),
    "fsdp": MeshConfig(1, 8, 1),
    "tensor": MeshConfig(1, 1, 8),
    "context": MeshConfig(1, 2, 1, 4),
    "mixed": MeshConfig(1, 2, 2, 2),
}


def loss_and_gradients(
    world, stage_name: str, mesh_config: MeshConfig, devices: int, **changes: object
):
    """(loss, {path: gradient}) of the first batch, computed on a mesh of that many devices."""
    config = world.config(stage_name, init__scratch=True, **changes)
    stage = get_stage(stage_name)
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
    pipeline = open_pipeline(config, quiet=True)
    batch, _ = next(pipeline.batches())
    with jax.set_mesh(mesh):
        params = initial_params(config, stage, mesh)
        trainable, frozen = split(params, stage.trainable)
        teach = teacher_params(config, mesh) if stage.teacher else {}
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        grad = jax.value_and_grad(train_step.make_loss(config), has_aux=True)
        shardings = (
            train_step.param_shardings(config, trainable, mesh),
            train_step.param_shardings(config, frozen, mesh),
            train_step.teacher_shardings(config, mesh) if stage.teacher else {},
            sharding.batch_sharding(mesh),
            None,
        )
        step = jax.jit(grad, in_shardings=shardings)
        totals = jax.tree.map(jnp.sum, stage.weights(batch, config))
        (loss, _), grads = step(trainable, frozen, teach, batch, totals)
    return float(loss), {k: np.asarray(v) for k, v in flatten(grads).items()}


@pytest.fixture(scope="module")
def single(world):
    one = MeshConfig(1, 1, 1)
    return {s: loss_and_gradients(world, s, one, 1) for s in ("distill", "instruct")}


@pytest.mark.parametrize("stage", ["distill", "instruct"])
@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_equal_one(world, single, stage, name):
    loss, grads = loss_and_gradients(world, stage, MESHES[name], 8)
    expected_loss, expected = single[stage]
    assert abs(loss - expected_loss) < 1e-5
    assert sorted(grads) == sorted(expected)
    for path, want in expected.items():
        np.testing.assert_allclose(grads[path], want, atol=1e-5, err_msg=path)


def test_the_long_stream_over_places_that_are_split(world):
    """'post': tokens move between two streams that devices hold in parts."""
    model = dataclasses.replace(world.model, shuffle_loc="post")
    found = [
        loss_and_gradients(world, "instruct", mesh, devices, model=model)
        for mesh, devices in ((MeshConfig(1, 1, 1), 1), (MeshConfig(1, 2, 1, context=2), 4))
    ]
    assert abs(found[0][0] - found[1][0]) < 1e-5
    for path, want in found[0][1].items():
        np.testing.assert_allclose(found[1][1][path], want, atol=1e-5, err_msg=path)


def test_rows_and_places_are_really_split():
    mesh = sharding.make_mesh(MeshConfig(1, 2, 1, context=4))
    x = jax.ShapeDtypeStruct((4, 64, 8), jnp.float32)
    with jax.set_mesh(mesh):
        pinned = jax.jit(lambda x: sharding.constrain(x * 2, "batch", "length", "act_embed"))
        where = pinned.lower(x).compile().output_shardings
    assert where.shard_shape(x.shape) == (2, 16, 8)


@pytest.mark.parametrize("width", [16, 256, 512, 1024])
@pytest.mark.parametrize("name", ["fsdp", "context", "mixed", "replicas"])
def test_a_table_is_looked_up_by_groups_of_devices(name, width):
    """Of 128 columns each: with 1,024 every device has them, with 16 all put theirs together."""
    mesh = sharding.make_mesh((MESHES | {"replicas": MeshConfig(2, 4, 1)})[name])
    keys = jax.random.split(jax.random.key(0), 3)
    table = jax.random.normal(keys[0], (100, width))
    ids = jax.random.randint(keys[1], (8, 12), 0, 100)
    weights = jax.random.normal(keys[2], (8, 12, width))

    def weighted(table):
        x = look_up(table, ids, "float32")
        return jnp.sum(x * weights), x

    where = sharding.tree_shardings(("vocab", "embed"), table, mesh)
    with jax.set_mesh(mesh):
        run = jax.jit(
            jax.grad(weighted, has_aux=True), in_shardings=where, out_shardings=(where, None)
        )
        gradient, rows = run(jax.device_put(table, where))
        program = run.lower(table).compile().as_text()
    np.testing.assert_array_equal(rows, table[ids])
    want = jnp.zeros_like(table).at[ids].add(weights)
    np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-5)
    lookups = re.findall(r"= f32\[[\d,]*?(\d+)\]\S* gather\(", program)
    assert lookups and min(map(int, lookups)) >= min(width, 128)


@pytest.mark.parametrize(
    ("sizes", "per_process", "shares"),
    [
        ((1, 8, 1, 1), 4, [(0, 2), (1, 2)]),
        ((1, 4, 2, 1), 4, [(0, 2), (1, 2)]),
        ((1, 1, 2, 4), 4, [(0, 1), (0, 1)]),  # both hosts hold parts of the same rows
        ((1, 2, 2, 2), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((1, 2, 4, 1), 8, [(0, 1)]),
    ],
)
def test_processes_with_the_same_rows_read_the_same_share(monkeypatch, sizes, per_process, shares):
    class Device:
        platform = "cpu"

        def __init__(self, number: int):
            self.process_index = number // per_process

    config = MeshConfig(*sizes)
    axes = [getattr(config, a) if a != "slice" else 1 for a in sharding.AXES]
    devices = np.array([Device(i) for i in range(8)], dtype=object).reshape(axes)
    mesh = types.SimpleNamespace(devices=devices, shape=dict(zip(sharding.AXES, axes, strict=True)))
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.share_of_rows(mesh) == share


def test_a_process_must_not_hold_parts_of_groups(monkeypatch):
    class Device:
        def __init__(self, number: int):
            self.process_index = number // 4

    devices = np.array([Device(i) for i in range(12)], dtype=object).reshape(1, 1, 2, 1, 6)
    shape = dict(zip(sharding.AXES, devices.shape, strict=True))
    with pytest.raises(UserError, match="tensor x context devices must be whole processes"):
        sharding.share_of_rows(types.SimpleNamespace(devices=devices, shape=shape))


def test_places_must_divide(world):
    mesh = sharding.make_mesh(MeshConfig(1, 2, 1, context=4))
    with pytest.raises(UserError, match="config.data.tokens 98 is not a multiple of .* 4"):
        train_step.check_batch(world.config("instruct", data__tokens=98), mesh)


def test_parameters_and_moments_are_really_split(world):
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2))
    config = world.config("instruct")
    state = train_step.state_shardings(config, mesh)
    kernel = state.params["embedding"]["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.spec == jax.P(None, ("fsdp", "context"), ("tensor",))
    leaves = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    moments = [s for p, s in leaves if "mlp" in str(p) and "gate" in str(p)]
    assert len(moments) == 4 and all(m == kernel for m in moments)


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(MeshConfig(1, 1, 8))
    assert sharding.spec(("kv_heads", "embed"), (2, 32), mesh) == jax.P(None, None)
    with pytest.raises(UserError, match=r"axis 'experts' of an array is not one of layers, embed,"):
        sharding.spec(("experts", "embed"), (2, 32), mesh)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (2, 2, 1)])
def test_a_mesh_that_does_not_fit_is_an_error(sizes):
    with pytest.raises(UserError, match="mesh"):
        sharding.make_mesh(MeshConfig(*sizes))


def test_the_teacher_gathers_weights_and_sums_no_activations():
    """Its rows stay on their devices: left to the compiler, every layer's activations are summed
    over all devices, which once took most of stage I's time."""
    mesh = sharding.make_mesh(MeshConfig(1, 8, 1), jax.devices())
    with jax.set_mesh(mesh):
        shapes = teacher.abstract_params(TEACHER)
        where = sharding.tree_shardings(teacher.param_axes(TEACHER), shapes, mesh)
        features = jax.jit(
            lambda params, pixels: teacher.apply(params, pixels, TEACHER)["features"],
            in_shardings=(where, sharding.batch_sharding(mesh)),
        )
        pixels = jax.ShapeDtypeStruct((8, 4, 32, 32, 3), np.uint8)
        program = features.lower(shapes, pixels).compile().as_text()
    assert " all-gather(" in program and " all-reduce(" not in program
