"""The step itself: groups, schedules, accumulation, non-finite steps, one compilation."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from hovle_jax import sharding, train_step
from hovle_jax.config import GroupConfig, OptimConfig
from hovle_jax.data.pipeline import Pipeline
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.initialize import initial_params
from hovle_jax.optim import group_labels, make_optimizer, make_schedule
from hovle_jax.stages import get_stage
from hovle_jax.tree import flatten, split


def setup(world, count: int, **changes):
    """(compiled step, state, frozen, `count` host batches, mesh) of stage 'align' on one device."""
    config = world.config("align", init__scratch=True, **changes)
    stage = get_stage("align")
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    tokenizer = Tokenizer.load(config.data.tokenizer)
    pipeline = Pipeline(config, stage.data, stage.token_weights, tokenizer, quiet=True)
    batches = [b for b, _ in itertools.islice(pipeline.batches(), count)]
    with jax.set_mesh(mesh):
        trainable, frozen = split(initial_params(config, stage, mesh), stage.trainable)
        tx = make_optimizer(config.optim, config.steps, trainable)
        state = train_step.new_state(trainable, tx)
        state = jax.device_put(state, train_step.state_shardings(config, mesh))
        return train_step.jit_step(config, mesh), state, frozen, batches, mesh


def test_fifty_batches_compile_once(world):
    step, state, frozen, batches, mesh = setup(world, 50)
    with jax.set_mesh(mesh):
        for batch in batches:
            state, _ = step(state, frozen, {}, batch)
    assert step._cache_size() == 1
    assert int(state.step) == 50


def test_accumulated_micro_batches_equal_the_whole_batch(world):
    outcomes = []
    for parts in (1, 4):
        step, state, frozen, batches, mesh = setup(world, 1, optim__accumulate=parts)
        with jax.set_mesh(mesh):
            state, metrics = step(state, frozen, {}, batches[0])
        outcomes.append((jax.device_get(metrics), flatten(jax.device_get(state.params))))
    (one, params), (four, params_four) = outcomes
    for name in ("loss", "grad_norm", "tokens", "tiles"):
        np.testing.assert_allclose(one[name], four[name], rtol=1e-5, err_msg=name)
    for path, value in params.items():
        np.testing.assert_allclose(value, params_four[path], atol=2e-5, err_msg=path)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(world):
    step, state, frozen, batches, mesh = setup(world, 1)
    before = flatten(jax.device_get(state.params))
    bad = batches[0] | {"loss_weight": np.full_like(batches[0]["loss_weight"], np.inf)}
    with jax.set_mesh(mesh):
        state, metrics = step(state, frozen, {}, bad)
        assert not np.isfinite(metrics["loss"]) and int(state.skipped) == 1
        after = flatten(jax.device_get(state.params))
        assert all(np.array_equal(before[k], after[k]) for k in before)
        state, metrics = step(state, frozen, {}, batches[0])
    assert np.isfinite(metrics["loss"]) and int(state.skipped) == 1 and int(state.step) == 2
    assert not np.array_equal(
        before["embedding/vision/patch/kernel"],
        state.params["embedding"]["vision"]["patch"]["kernel"],
    )


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


def test_the_config_is_the_only_difference_between_stages(world):
    """One trainer: the same code accepts every row of the table."""
    for name in ("distill", "align", "instruct"):
        config = dataclasses.replace(world.config(name))
        trainable, frozen = train_step.stage_shapes(config)
        assert not set(flatten(trainable)) & set(flatten(frozen))
