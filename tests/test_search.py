"""The search for settings: which candidates are compiled, which is chosen."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import jax
import pytest

from hovle_jax.cli.main import main
from hovle_jax.cli.plan import report
from hovle_jax.config import DataConfig, MeshConfig, RunConfig
from hovle_jax.errors import UserError
from hovle_jax.tpu import chips
from hovle_jax.tpu.aot import Memory, Plan, Topology
from hovle_jax.tpu.search import Trial, search
from tests.small import PRE

CHIP = chips.get_chip("v5e")
SAVED = {"products": 4.0, "minimal": 2.0, "mixed": 1.5, "full": 1.0}  # GiB a row
SLOWDOWN = {"products": 1.0, "minimal": 1.1, "mixed": 1.15, "full": 1.3}


def cost(seconds: float, exposed: float = 0.0) -> SimpleNamespace:
    names = ("matrix_flops", "kernel_flops", "vector_seconds", "kernel_seconds")
    rest = dict.fromkeys((*names, "hidden_seconds"), 0.0)
    return SimpleNamespace(
        step_seconds=seconds,
        exposed_seconds=exposed,
        matrix_seconds=seconds,
        collectives=[],
        **rest,
    )


def compiled(config: RunConfig, target: Topology) -> Plan:
    """As if by the compiler: 10 GiB; a fixed cost a step; two loss chunks cost 2 %."""
    rows = config.data.rows // 8 * config.mesh.tensor
    used = 1.0 + rows * SAVED[config.model.remat]
    if used > 10:
        raise UserError(f"does not compile: Ran out of memory, {used} GiB")
    chunks = -(-config.data.tokens // config.model.loss_chunk)
    seconds = 0.05 + rows * SLOWDOWN[config.model.remat] * (1 + 0.02 * (chunks - 1))
    exposed = 0.0 if config.mesh.tensor == 1 else 1.0
    return Plan(Memory(1e9, 1e9, used * 2**30, 10 * 2**30), 1e12, cost(seconds, exposed))


@pytest.fixture
def target() -> Topology:
    return Topology("v5e:2x4", CHIP, 1, tuple(jax.devices()))


def run_config() -> RunConfig:
    model = dataclasses.replace(PRE, remat="products", loss_chunk=32)
    data = DataConfig(rows=8, tokens=64, tiles=4)
    return RunConfig(stage="instruct", model=model, data=data, mesh=MeshConfig(1, -1, 1))


def test_the_fastest_that_fits_is_found(target):
    seen: list[Trial] = []
    trials = search(run_config(), target, compile_step=compiled, tried=seen.append)
    best = trials[0]
    # Four rows would fit with less kept, and are slower for it.
    assert best.changes == {"data.rows": 16, "model.remat": "products", "model.loss_chunk": 64}
    assert best.config.model.loss_chunk == 64 and best.config.data.rows == 16
    assert sorted(map(id, seen)) == sorted(map(id, trials)) and len(trials) < 12
    assert [t.tokens_per_second for t in trials] == sorted(
        (t.tokens_per_second for t in trials), reverse=True
    )
    rows = [(t.changes["data.rows"] // 8, t.changes["model.remat"]) for t in seen[:6]]
    assert rows == [
        (1, "products"),
        (2, "products"),
        (4, "products"),
        (4, "minimal"),
        (8, "minimal"),
        (8, "mixed"),
    ]
    assert seen[-1].config.mesh == MeshConfig(1, 4, 2)
    lost = [t for t in trials if t.plan is None]
    assert lost and all("Ran out of memory" in t.reason for t in lost)


def test_nothing_fits(target):
    def never(config: RunConfig, target: Topology) -> Plan:
        raise UserError("does not compile: Ran out of memory, 99 GiB")

    with pytest.raises(UserError, match="nothing fits v5e:2x4; .* 99 GiB"):
        search(run_config(), target, compile_step=never)


def test_plans_as_a_table(target, tmp_path, capsys):
    config = run_config()
    body = report(config, target, compiled(config, target))
    (tmp_path / "a.json").write_text(json.dumps(body))
    (tmp_path / "fast.json").write_text(json.dumps({**body, "stage": "align"} | {"mfu": 0}))
    body.pop("step_seconds")
    (tmp_path / "shapes.json").write_text(json.dumps(body))
    assert main(["plan", "--tabulate", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| small | II | v5e:2x4 | 1, 64 + 4 |")
    assert "| III |" in lines[3] and lines[0].count("|") == lines[3].count("|") == 12


def test_requests_that_contradict(one_line_error):
    config = "--config=configs/stage1_distill.py:hovle_2b"
    fast = ["plan", config, "--topology=v5e:4x4", "--fast"]
    assert "--search: compiles" in one_line_error([*fast, "--search"])
    assert "--dump-hlo: compiles" in one_line_error([*fast, "--dump-hlo=x"])
