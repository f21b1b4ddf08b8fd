"""Plans: the planned program is the one that trains, and what shapes alone tell."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest

from hovle_jax import sharding, train_step
from hovle_jax.cli.main import main
from hovle_jax.config import MeshConfig
from hovle_jax.errors import UserError
from hovle_jax.initialize import initial_params, teacher_params
from hovle_jax.optim import make_optimizer
from hovle_jax.stages import get_stage, open_pipeline
from hovle_jax.tpu import aot, chips
from hovle_jax.tree import split


@pytest.mark.parametrize(
    "name", [pytest.param("distill", marks=pytest.mark.slow), "align", "instruct"]
)
def test_the_planned_program_is_the_one_that_trains(world, name):
    """Lowered from real arrays, as `train` calls it, and from shapes, as `plan` does."""
    config = world.config(name, init__scratch=True, mesh=MeshConfig(2, 2, 2))
    stage, mesh = get_stage(name), sharding.make_mesh(config.mesh)
    pipeline = open_pipeline(config, quiet=True)
    batch = next(pipeline.batches())[0]
    with jax.set_mesh(mesh):
        trainable, frozen = split(initial_params(config, stage, mesh), stage.trainable)
        tx = make_optimizer(config.optim, config.steps, trainable)
        where = train_step.state_shardings(config, mesh)
        state = jax.jit(lambda p: train_step.new_state(p, tx), out_shardings=where)(trainable)
        teach = teacher_params(config, mesh) if stage.teacher else {}
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        trained = train_step.jit_step(config, mesh).lower(state, frozen, teach, batch)
    assert aot.fingerprint(aot.lower(config, mesh)) == aot.fingerprint(trained)
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip_norm=0.5))
    assert aot.fingerprint(aot.lower(other, mesh)) != aot.fingerprint(trained)


def test_model_flops(world):
    """Three passes over what trains, two over a frozen LLM, none over what a stage has not."""
    config = world.config("instruct")
    c, tokens = config.model, config.data.tokens
    text = sum(c.flops_per_token(tokens).values()) * tokens * config.data.rows
    instruct = aot.model_flops(config)
    assert 3 * text < instruct < 3.3 * text  # and the pixels
    assert instruct * 2 / 3 < aot.model_flops(world.config("align")) < instruct
    distill = aot.model_flops(world.config("distill"))
    assert distill > aot.teacher_flops(config) * config.data.rows


def test_memory_of_the_state(world):
    config = world.config("instruct", mesh=MeshConfig(1, 8, 1))
    count = sum(x.size for x in jax.tree.leaves(train_step.state_shapes(config).params))
    assert aot.state_bytes(config) == pytest.approx(12 * count, rel=1e-3)


def test_bad_requests_are_one_line(world, one_line_error, tmp_path):
    plan = ["plan", "--config=configs/stage1_distill.py:hovle_2b", "--fast"]
    assert "is not of the form" in one_line_error([*plan, "--topology=v5e-16"])
    assert "chip 'v9' is not one of" in one_line_error([*plan, "--topology=v9:4x4"])
    assert "2-dimensional" in one_line_error([*plan, "--topology=v5e:4x4x4"])


def test_rows_must_divide(world):
    mesh = sharding.make_mesh(MeshConfig(1, 8, 1))
    with pytest.raises(UserError, match="config.data.rows 12 is not a multiple of 8"):
        aot.lower(world.config("instruct", data__rows=12), mesh)


def test_fast_plan(tmp_path, capsys):
    """Needs libtpu for the names of topologies, compiles nothing."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install 'hovle-jax[tpu]'")
    out = tmp_path / "plan.json"
    config = "--config=configs/stage3_instruct.py:hovle_2b"
    data = ["--config.data.tokens=4096", "--config.data.tiles=8", "--config.data.rows=16"]
    assert main(["plan", config, "--topology=v5e:4x4", "--fast", f"--json={out}", *data]) == 0
    plan = json.loads(out.read_text())
    # 2.41 B parameters x 12 bytes over 16 chips; 6 x parameters x tokens and half of attention.
    assert 1.6 * 2**30 < plan["hbm"]["arguments"] < 1.8 * 2**30
    assert plan["hbm"]["limit"] == chips.CHIPS["v5e"].hbm_bytes and plan["hbm"]["peak"] is None
    assert plan["model_flops_per_chip"] == pytest.approx(61.05e12, rel=0.01)
    assert "61.05 T" in capsys.readouterr().out
