"""A run that is watched, killed twice and looked at afterwards: metrics, evaluation, replay."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import sys
import time
import types

import jax
import numpy as np
import pytest

from hovle_jax.bench.overhead import summary
from hovle_jax.checkpoint import latest_step, load
from hovle_jax.cli.main import main
from hovle_jax.config import MeshConfig
from hovle_jax.data import inspect
from hovle_jax.errors import UserError
from hovle_jax.initialize import initial_params, teacher_params
from hovle_jax.run.goodput import split_time
from hovle_jax.run.heldout import jit_sums
from hovle_jax.run.metrics import read_metrics
from hovle_jax.run.plot import read_run
from hovle_jax.run.profiler import parse_window
from hovle_jax.run.replay import compare, replay
from hovle_jax.run.reporter import peak_shares
from hovle_jax.run.sinks import open_sinks
from hovle_jax.sharding import make_mesh
from hovle_jax.stages import get_stage, open_pipeline
from hovle_jax.tpu import aot, chips
from hovle_jax.train import train as train_on
from hovle_jax.train_step import make_loss, trainable_regex
from hovle_jax.tree import flatten, split


def train(config, workdir, **options):
    return train_on(config, workdir, devices=jax.devices()[:1], quiet=True, **options)


class Killed(Exception):
    pass


def killed(config, workdir, step: int, saved: int | None) -> None:
    """Trains and dies after `step` is under way, when the checkpoint of `saved` is there."""

    def die(now: int, _) -> None:
        if now == step:
            deadline = time.monotonic() + 120
            while latest_step(workdir) != saved and time.monotonic() < deadline:
                time.sleep(0.05)
            raise Killed

    with pytest.raises(Killed):
        train(config, workdir, after_step=die)


@pytest.fixture(scope="module")
def config(world):
    return world.config(
        "distill", steps=8, save_every=4, keep=3, data__holdout=4, eval_every=2, guards__every=3
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that nothing disturbs, with everything on."""
    workdir = tmp_path_factory.mktemp("watched") / "whole"
    train(config, workdir, profile=(3, 2))
    return workdir


@pytest.fixture(scope="module")
def disturbed(config, tmp_path_factory):
    """The same run in three starts: killed in step 3 (nothing saved), in step 7 (4 saved)."""
    workdir = tmp_path_factory.mktemp("watched") / "disturbed"
    killed(config, workdir, 3, None)
    killed(config, workdir, 7, 4)
    train(config, workdir)
    return workdir


def test_kills_leave_no_trace_in_metrics_evaluation_or_weights(whole, disturbed):
    clocks = ("step_seconds", "data_wait_seconds", "seconds", "tokens_per_second")
    for name in ("metrics.jsonl", "eval.jsonl"):
        a, b = (
            [
                {k: v for k, v in row.items() if k not in (*clocks, "tiles_per_second")}
                for row in read_metrics(workdir / name)
            ]
            for workdir in (whole, disturbed)
        )
        assert a == b and [row["step"] for row in a] == sorted({row["step"] for row in a})
    assert [row["step"] for row in a] == [2, 4, 6, 8]
    one, two = (flatten(load(workdir)[1]) for workdir in (whole, disturbed))
    assert all(np.array_equal(one[k], two[k]) for k in one)


def test_goodput_of_the_disturbed_run_is_the_sum_of_what_counts(disturbed):
    rows = read_metrics(disturbed / "goodput.jsonl")
    starts = [i for i, row in enumerate(rows) if "start" in row]
    assert len(starts) == 3
    first, second, third = (rows[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True))
    # Steps 1 and 2 of the first start, 5 and 6 of the second are done again.
    assert [r["step"] for r in first if "step" in r] == [1, 2, 2]
    assert [r["step"] for r in second if "step" in r] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert [r["restored"] for r in rows if "restored" in r] == [0, 0, 4]
    lost = [r for r in first if "step" in r] + [r for r in second if r.get("step", 0) > 4]
    counts = [r for r in rows if "seconds" in r and r not in lost]
    seconds = split_time(rows)
    for phase in ("step", "data", "checkpoint", "evaluation", "init", "compile"):
        assert seconds[phase] == pytest.approx(sum(r["seconds"].get(phase, 0) for r in counts))
        assert seconds[phase] > 0
    assert seconds["lost"] == pytest.approx(sum(sum(r["seconds"].values()) for r in lost))
    down = (second[0]["time"] - first[-1]["time"]) + (third[0]["time"] - second[-1]["time"])
    assert seconds["down"] == pytest.approx(down)


def test_rows_have_the_documented_columns(whole):
    for row in read_metrics(whole / "metrics.jsonl"):
        for name in ("grad_norm/matrices", "grad_norm/vectors", "tiles_per_second", "lr"):
            assert row[name] > 0, name
        parts = (row["grad_norm/matrices"], row["grad_norm/vectors"])
        assert row["grad_norm"] == pytest.approx(np.hypot(*parts), rel=1e-5)
        assert row["loss"] == pytest.approx(row["loss/image"] + row["loss/text"], rel=1e-5)
        assert "mfu" not in row, "nobody knows what this machine can do"
    traces = list((whole / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000


def test_held_out_losses_are_those_of_the_held_out_records(config, whole, world):
    """All at once, from the last checkpoint, without any of the run's machinery."""
    stage = get_stage("distill")
    pipeline = open_pipeline(config, quiet=True)
    batches = list(pipeline.held_out())
    batch = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
    assert (batch["segment_ids"].max(axis=1)).sum() == 24 // 4
    params, teacher = load(whole)[1], load(world.root / "teacher", "teacher")[1]
    totals = {k: w.sum() for k, w in stage.weights(batch, config).items()}
    loss, parts = jax.jit(make_loss(config))(params, {}, teacher, batch, totals)
    row = read_metrics(whole / "eval.jsonl")[-1]
    assert row["step"] == 8 and row["loss"] == pytest.approx(float(loss), rel=1e-5)
    for term in ("image", "text"):
        assert row[f"loss/{term}"] == pytest.approx(float(parts[term]), rel=1e-5)
        assert row[f"source/{pipeline.names[0]}/loss/{term}"] == row[f"loss/{term}"]


def test_held_out_records_take_no_more_memory_than_training(config):
    """As many rows at once; the sums are those of all rows."""
    found, shapes = [], []
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    stage = get_stage(config.stage)
    pipeline = open_pipeline(config, quiet=True)
    batch = next(pipeline.held_out())
    for accumulate in (1, 4):
        optim = dataclasses.replace(config.optim, accumulate=accumulate)
        changed = dataclasses.replace(config, optim=optim)
        with jax.set_mesh(mesh):
            params = initial_params(changed, stage, mesh)
            parts = split(params, trainable_regex(changed))
            arguments = (*parts, teacher_params(changed, mesh), batch)
            run = jit_sums(changed, mesh)
            found.append(jax.device_get(run(*arguments)))
            program = run.lower(*arguments).as_text()
        rows, tokens = config.data.rows, config.data.tokens
        shapes.append([f"tensor<{n}x{tokens}x32x" in program for n in (rows, rows // 4)])
    assert shapes == [[True, False], [False, True]]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)


def test_replay_says_so_or_names_the_first_difference(config, disturbed):
    one = {"devices": jax.devices()[:1]}
    before = sorted((p, p.stat().st_mtime_ns) for p in disturbed.rglob("*.json*"))
    # From 4, and the state of 8. As nothing is evaluated here, evaluation changes no step.
    assert replay(config, disturbed, 8, **one) == [5, 6, 7, 8]
    assert replay(config, disturbed, 2, **one) == [1, 2]  # from the sources
    with pytest.raises(UserError, match="has no such step"):
        replay(config, disturbed, 9, **one)
    assert sorted((p, p.stat().st_mtime_ns) for p in disturbed.rglob("*.json*")) == before
    row = read_metrics(disturbed / "metrics.jsonl")[5]
    compare(6, row | {"text": math.nan}, row | {"text": math.nan})
    value = row["grad_norm/vectors"]
    other = row | {"grad_norm/vectors": float(np.nextafter(np.float32(value), np.float32(9)))}
    with pytest.raises(UserError, match="step 6: grad_norm/vectors was .*, now is"):
        compare(6, other, row)


def test_plot_compares_runs(whole, disturbed, tmp_path, capsys, one_line_error, monkeypatch):
    pytest.importorskip("matplotlib")
    out = tmp_path / "both.png"
    argv = ["plot", str(whole), str(disturbed), "--out", str(out)]
    assert main([*argv, "--json", str(tmp_path / "g.json")]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 20_000
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["run", "goodput", "hours"] and len(table) == 4
    seconds = json.loads((tmp_path / "g.json").read_text())
    assert seconds[str(disturbed)] == read_run(disturbed).seconds
    assert seconds[str(disturbed)]["lost"] > 0 == seconds[str(whole)]["lost"]
    assert main(["plot", str(whole)]) == 0 and (whole / "plot.png").is_file()
    assert "no metrics.jsonl" in one_line_error(["plot", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'hovle-jax[demo]'" in one_line_error(argv)


def test_a_run_that_blows_up_ends_and_lists_its_records(world, tmp_path):
    config = world.config("instruct", init__scratch=True, steps=40, optim__lr=1e38, log_every=1)
    config = dataclasses.replace(
        config, guards=dataclasses.replace(config.guards, max_nonfinite=3, every=1)
    )
    with pytest.raises(
        UserError, match="step 4: .* not finite 3 times in a row.*bad_batches.jsonl"
    ):
        train(config, tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["skipped"] == 3
    bad = read_metrics(tmp_path / "bad_batches.jsonl")
    assert [row["step"] for row in bad] == [2, 3, 4]
    pipeline = open_pipeline(config, quiet=True)
    for row in bad:
        assert row["rows"] == [o for _, o in inspect.batch_at(config, pipeline, row["step"])]


def test_mfu_counts_useful_work_with_and_without_the_teacher(config, monkeypatch):
    chip = chips.CHIPS["v5e"]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), "x")
    assert peak_shares(config, mesh) == {}
    monkeypatch.setattr(chips, "of_kind", lambda kind: chip)
    shares = peak_shares(config, mesh)
    assert shares["mfu"] == pytest.approx(aot.model_flops(config) / (4 * 197e12))
    teacher = config.data.rows * aot.teacher_flops(config) / (4 * 197e12)
    assert shares["mfu"] - shares["mfu_without_teacher"] == pytest.approx(teacher)
    align = dataclasses.replace(config, stage="align")
    assert set(peak_shares(align, mesh)) == {"mfu"}


def test_tensorboard_has_every_number_once_per_start(config, tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    config = dataclasses.replace(config, tensorboard=True)
    for done, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # the second start goes on from step 2
        (sink,) = open_sinks(config, tmp_path, done)
        for step in steps:
            sink.write({"step": step, "loss": step / 4, "source/a/loss/text": 1.0})
        sink.write({"step": steps[-1], "loss": 9.0}, "eval/")
        sink.close()
    events = []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    losses = [
        (event.step, value.simple_value)
        for event in events
        for value in event.summary.value
        if value.tag == "loss"
    ]
    assert losses == [(1, 0.25), (2, 0.5), (3, 0.75), (3, 0.75), (4, 1.0)]
    assert any(value.tag == "eval/loss" for event in events for value in event.summary.value)
    assert [e.step for e in events if e.HasField("session_log")] == [1, 3], "hides what came after"


def test_wandb_gets_the_rows_of_one_run_however_often_it_starts(config, tmp_path, monkeypatch):
    calls: list = []

    class FakeRun:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append(options)
        return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = dataclasses.replace(config, wandb="project")
    for done in (0, 1):
        (sink,) = open_sinks(config, tmp_path, done)
        sink.write({"step": done + 1, "loss": 2.0})
        sink.close()
    first, _, _, second, row, end = calls
    assert first["id"] == second["id"] and first["project"] == "project"
    assert first["config"]["data"]["holdout"] == 4 and first["resume"] == "allow"
    assert (row, end) == ((2, {"loss": 2.0}), "finish")


@pytest.mark.parametrize("name, key", [("tensorboardX", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_writer_is_an_error_with_its_extra(name, key, config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    value = True if key == "tensorboard" else "project"
    with pytest.raises(UserError, match=rf"pip install 'hovle-jax\[{key}\]'"):
        open_sinks(dataclasses.replace(config, **{key: value}), tmp_path, 0)


def test_profile_windows():
    assert parse_window("100:5") == (100, 5) and parse_window("") == (0, 0)
    for text in ("5", "5:", "0:3", "3:0", "-1:2", "a:b"):
        with pytest.raises(UserError, match="START:COUNT"):
            parse_window(text)


def test_overhead_is_what_a_step_and_its_share_of_a_checkpoint_cost():
    """Turns of ten steps: 1 s each bare, 1 % more watched; a checkpoint costs 2 s more."""
    turns = {"bare": [10.0, 9.0, 30.0], "watched": [10.1, 10.1], "saving": [12.1, 12.1]}
    found = summary(turns, steps=10, save_every=500)
    assert found["checkpoint_seconds"] == pytest.approx(2)
    assert found["overhead_without_checkpoints"] == pytest.approx(0.01)
    assert found["overhead"] == pytest.approx(0.01 + 2 / 500)
