"""Schedules, groups, and moments that take less memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax import sharding, train_step
from hovle_jax.config import GroupConfig, MeshConfig, OptimConfig
from hovle_jax.errors import UserError
from hovle_jax.optim import decode, encode, group_labels, make_optimizer, make_schedule

PARAMS = {"a": {"kernel": np.ones(3), "bias": np.ones(3)}}


@pytest.mark.parametrize("regexes", [("a/kernel",), ("a/.*", "a/bias")])
def test_every_parameter_matches_exactly_one_group(regexes):
    groups = tuple(GroupConfig(r) for r in regexes)
    with pytest.raises(UserError, match="parameter a/bias must match exactly one group"):
        group_labels(groups, PARAMS)


def test_groups_scale_the_rate_and_decay_only_their_own():
    groups = (GroupConfig("a/kernel", 0.5, 0.1), GroupConfig("a/bias", 2.0, 0.0))
    config = OptimConfig(lr=1e-2, schedule="constant", warmup=0.0, clip_norm=0.0, groups=groups)
    tx = make_optimizer(config, 10, PARAMS)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    # Adam's first step is the sign of the gradient; decay adds 0.1 of the parameter.
    np.testing.assert_allclose(updates["a"]["kernel"], -1e-2 * 0.5 * 1.1, rtol=1e-4)
    np.testing.assert_allclose(updates["a"]["bias"], -1e-2 * 2.0, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_schedules(schedule):
    config = OptimConfig(lr=1.0, end_lr=0.1, schedule=schedule, warmup=0.1, decay=0.2)
    rate = make_schedule(config, 100)
    values = np.array([float(rate(i)) for i in range(101)])
    assert 0 < values[0] < values[5] < values[10] == 1.0
    assert values[100] == pytest.approx(1.0 if schedule == "constant" else 0.1, abs=1e-3)
    if schedule == "wsd":
        assert values[79] == 1.0 and values[90] == pytest.approx(0.55, abs=0.01)


def test_int8_codes_keep_sign_and_size():
    x = np.random.default_rng(0).normal(size=(3, 500, 7)).astype(np.float32)
    x *= np.array([1e-6, 1.0, 1e4], np.float32)[:, None, None]
    x[0, 3] = 0.0
    x[:, :, 2] = 0.0  # a column without any moment
    code, scale = encode(jnp.asarray(x))
    assert code.dtype == jnp.int8 and scale.shape == (3, 1, 7)
    back = np.asarray(decode(code, scale))
    np.testing.assert_allclose(back, x, rtol=0.045, atol=2.0**-15.7 * np.asarray(scale).max())
    np.testing.assert_allclose(back[0], x[0], rtol=0.045, atol=1e-9)
    assert (back[:, :, 2] == 0).all() and (back[0, 3] == 0).all()


@pytest.mark.parametrize(("moments", "size"), [("bfloat16", 4), ("int8", 3)])
def test_short_moments_optimize_alike(moments, size):
    """Noisy least squares, unequal scales: the loss of float32 moments, in less memory."""
    steps, rng = 300, np.random.default_rng(0)
    inputs = rng.normal(size=(steps, 16, 40)).astype(np.float32) * np.geomspace(0.01, 1, 40)
    target = rng.normal(size=(40, 8)).astype(np.float32)
    groups = (GroupConfig(".*", 1.0, 0.0),)

    def final_loss(moments: str) -> tuple[float, int]:
        config = OptimConfig(lr=0.05, warmup=0.0, clip_norm=0.0, moments=moments, groups=groups)
        params = {"w": jnp.zeros((40, 8))}
        tx = make_optimizer(config, steps, params)

        def loss(params, x):
            return jnp.mean((x @ (params["w"] - target)) ** 2)

        def step(carry, x):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, x), state, params)
            return (jax.tree.map(jnp.add, params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.asarray(inputs))
        large = sum(x.nbytes for x in jax.tree.leaves(state) if x.size == 320)
        return float(np.mean([loss(params, x) for x in inputs[:50]])), large

    expected, full = final_loss("float32")
    found, short = final_loss(moments)
    assert found < 1.1 * expected + 1e-6
    assert full == 8 * 320 and short == size * 320


def test_a_first_moment_without_gradient_dies_away():
    """Rounding must not hold it where it is."""
    config = OptimConfig(schedule="constant", warmup=0.0, moments="int8", b1=0.9)
    params = {"kernel": jnp.ones((64, 2))}
    tx = make_optimizer(config, 10, {"a": params})
    state = tx.init({"a": params})
    gradient = {"a": {"kernel": jnp.linspace(-1, 1, 128).reshape(64, 2)}}
    update = jax.jit(lambda gradient, state: tx.update(gradient, state, {"a": params})[1])
    state = update(gradient, state)
    for _ in range(40):
        state = update(jax.tree.map(jnp.zeros_like, gradient), state)
    codes = next(x for x in jax.tree.leaves(state) if x.dtype == jnp.int8)
    scale = next(x for x in jax.tree.leaves(state) if x.shape == (1, 2))
    assert np.abs(decode(codes, scale)).max() < 0.1 * 0.9**40 * 2


def test_short_moments_need_a_second_moment_that_moves():
    with pytest.raises(UserError, match="optim.b2 of at most 0.99"):
        OptimConfig(moments="bfloat16", b2=0.999)


def test_short_moments_are_split_like_their_parameters(world):
    config = world.config("instruct", optim__moments="int8")
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2))
    places = train_step.state_shardings(config, mesh).opt_state
    shapes = train_step.state_shapes(config).opt_state
    found = {
        jax.tree_util.keystr(path): (x, place.spec)
        for (path, place), x in zip(
            jax.tree_util.tree_leaves_with_path(places), jax.tree.leaves(shapes), strict=True
        )
        if "decoder" in str(path) and "'down'" in str(path)
    }
    by_name = {k.split(".")[1].split("[")[0]: v for k, v in found.items()}
    whole = jax.P(None, ("tensor",), ("fsdp", "context"))
    assert by_name["mu"][0].dtype == jnp.int8 and by_name["mu"][1] == whole
    assert by_name["nu"][0].dtype == jnp.bfloat16 and by_name["nu"][1] == whole
    assert by_name["mu_scale"][1] == jax.P(None, None, ("fsdp", "context"))
