"""The step itself: groups, schedules, accumulation, non-finite steps, one compilation."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from hovle_jax import sharding, train_step
from hovle_jax.errors import UserError
from hovle_jax.initialize import initial_params
from hovle_jax.optim import make_optimizer, make_schedule
from hovle_jax.stages import get_stage, open_pipeline
from hovle_jax.tree import flatten, split


def setup(world, count: int, **changes):
    """(compiled step, state, frozen, `count` host batches, mesh) of stage 'align' on one device."""
    config = world.config("align", init__scratch=True, **changes)
    stage = get_stage("align")
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    pipeline = open_pipeline(config, quiet=True)
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
    config = world.config("align")
    schedule = make_schedule(config.optim, config.steps)
    assert float(schedule(0)) < float(schedule(1))
    bad = batches[0] | {"loss_weight": np.full_like(batches[0]["loss_weight"], np.inf)}
    with jax.set_mesh(mesh):
        state, metrics = step(state, frozen, {}, bad)
        assert not np.isfinite(metrics["loss"]) and int(state.skipped) == 1
        after = flatten(jax.device_get(state.params))
        assert all(np.array_equal(before[k], after[k]) for k in before)
        state, metrics = step(state, frozen, {}, batches[0])
    assert np.isfinite(metrics["loss"]) and int(state.skipped) == 1 and int(state.step) == 2
    # The schedule went on all the same: Adam's first step is as long as the rate that is reported.
    scale = "embedding/layers/mlp_norm/scale"
    moved = np.abs(before[scale] - flatten(jax.device_get(state.params))[scale]).max()
    rate = float(metrics["lr"])
    assert rate == float(schedule(1)) and float(moved) == pytest.approx(rate, rel=1e-3)


def test_the_config_is_the_only_difference_between_stages(world):
    """One trainer: the same code accepts every row of the table."""
    for name in ("distill", "align", "instruct"):
        config = dataclasses.replace(world.config(name))
        trainable, frozen = train_step.stage_shapes(config)
        assert not set(flatten(trainable)) & set(flatten(frozen))


def test_a_target_is_not_trained(world):
    """Text and table would become all alike, and the loss would call it success."""
    for regex in ("embedding/.*", ".*table"):
        config = world.config("distill", trainable=regex)
        with pytest.raises(UserError, match="config.trainable: .* matches embedding/text/table, "):
            train_step.stage_shapes(config)
    train_step.stage_shapes(world.config("align", trainable="embedding/.*"))


def test_frozen_parameters_are_held_as_they_are_computed_with(world):
    """In bfloat16 at half the memory, and the step's numbers are those of float32 copies."""
    step, state, frozen, batches, mesh = setup(world, 1, model__dtype="bfloat16")
    held = jax.tree.map(lambda x: x.astype(np.dtype("bfloat16")), frozen)
    shapes = train_step.stage_shapes(world.config("align", model__dtype="bfloat16"))[1]
    assert jax.tree.map(lambda x: x.dtype, shapes) == jax.tree.map(lambda x: x.dtype, held)
    outcomes = []
    for weights in (frozen, held):
        with jax.set_mesh(mesh):
            outcomes.append(step(jax.tree.map(lambda x: x.copy(), state), weights, {}, batches[0]))
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get(outcomes))
