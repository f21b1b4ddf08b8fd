"""Eight simulated devices give the numbers of one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax import sharding, teacher, train_step
from hovle_jax.config import MeshConfig
from hovle_jax.data.pipeline import Pipeline
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.initialize import initial_params, teacher_params
from hovle_jax.stages import get_stage
from hovle_jax.tree import flatten, split
from tests.conftest import TEACHER

MESHES = {
    "data": MeshConfig(8, 1, 1),
    "fsdp": MeshConfig(1, 8, 1),
    "tensor": MeshConfig(1, 1, 8),
    "mixed": MeshConfig(2, 2, 2),
}


def loss_and_gradients(world, stage_name: str, mesh_config: MeshConfig, devices: int):
    """(loss, {path: gradient}) of the first batch, computed on a mesh of that many devices."""
    config = world.config(stage_name, init__scratch=True)
    stage = get_stage(stage_name)
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
    tokenizer = Tokenizer.load(config.data.tokenizer)
    pipeline = Pipeline(config, stage.data, stage.token_weights, tokenizer, quiet=True)
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


def test_parameters_and_moments_are_really_split(world):
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2))
    config = world.config("instruct")
    state = train_step.state_shardings(config, mesh)
    kernel = state.params["embedding"]["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.spec == jax.sharding.PartitionSpec(None, ("fsdp",), ("tensor",))
    leaves = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    moments = [s for p, s in leaves if "mlp" in str(p) and "gate" in str(p)]
    assert len(moments) == 4 and all(m == kernel for m in moments)


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(MeshConfig(1, 1, 8))
    assert sharding.spec(("kv_heads", "embed"), (2, 32), mesh) == jax.P(None, None)


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
