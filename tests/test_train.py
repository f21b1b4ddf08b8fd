"""Training end to end on a small data set: what must move, what must not, and exact resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from hovle_jax import model, train_step
from hovle_jax.checkpoint import cursor_before, load, open_stored, save_model
from hovle_jax.config import to_dict
from hovle_jax.data import inspect
from hovle_jax.errors import UserError
from hovle_jax.initialize import initial_params
from hovle_jax.run.checkpoints import Checkpoints
from hovle_jax.run.metrics import read_metrics
from hovle_jax.sharding import make_mesh
from hovle_jax.stages import get_stage, open_pipeline
from hovle_jax.train import train as train_on
from hovle_jax.tree import flatten
from tests.conftest import write_meta


def train(config, workdir, devices=1):
    return train_on(config, workdir, devices=jax.devices()[:devices], quiet=True)


@pytest.fixture(scope="module")
def stages(world, tmp_path_factory):
    """Work directories of stage I, II and III, each started from the one before."""
    root = tmp_path_factory.mktemp("stages")
    previous = ""
    for stage in ("distill", "align", "instruct"):
        config = world.config(stage, init__previous=previous)
        train(config, root / stage)
        previous = str(root / stage)
    return root


def params_of(directory: Path) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in flatten(load(directory)[1]).items()}


def test_stage_1_moves_the_embedding_and_not_its_targets(world, stages):
    llm, after = params_of(world.root / "llm"), params_of(stages / "distill")
    assert not any(k.startswith("decoder/") for k in after), "stage I needs no LLM"
    table = "embedding/text/table"
    other = model.init(jax.random.key(1), world.model)
    save_model(stages / "llm", world.model, other)
    config = world.config(
        "align", init__previous=str(stages / "distill"), init__llm=str(stages / "llm")
    )
    with pytest.raises(UserError, match="has another text table than the LLM that"):
        initial_params(config, get_stage("align"), make_mesh(config.mesh, jax.devices()[:1]))
    np.testing.assert_array_equal(after[table], llm[table])
    rows = read_metrics(stages / "distill" / "metrics.jsonl")
    assert rows[-1]["loss/image"] < rows[0]["loss/image"]
    assert rows[-1]["loss/text"] < rows[0]["loss/text"]


def test_stage_2_leaves_every_llm_leaf_bit_identical(world, stages):
    llm, before = params_of(world.root / "llm"), params_of(stages / "distill")
    after = params_of(stages / "align")
    decoder = [k for k in after if k.startswith("decoder/")]
    assert decoder and all(np.array_equal(after[k], llm[k]) for k in decoder)
    embedding = [k for k in after if k.startswith("embedding/")]
    moved = [k for k in embedding if not np.array_equal(after[k], before[k])]
    assert sorted(moved) == sorted(embedding)


def test_stage_2_has_no_optimizer_state_for_the_llm(world):
    shapes = train_step.state_shapes(world.config("align"))
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_flatten_with_path(shapes.opt_state)[0]
    ]
    assert any("mu/embedding/layers" in n for n in names)
    assert not any("decoder" in n for n in names)
    trainable, frozen = train_step.stage_shapes(world.config("align"))
    assert set(trainable) == {"embedding"} and set(frozen) == {"decoder"}


def test_stage_3_moves_everything(stages):
    before, after = params_of(stages / "align"), params_of(stages / "instruct")
    assert sorted(before) == sorted(after)
    assert all(not np.array_equal(before[k], after[k]) for k in after)


def test_metrics_have_every_step_once_and_the_promised_columns(stages):
    rows = read_metrics(stages / "align" / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "loss/next_token", "grad_norm", "lr", "tokens_per_second"):
        assert all(np.isfinite(r[name]) for r in rows), name
    for name in ("step_seconds", "data_wait_seconds", "token_fill", "tile_fill"):
        assert all(r[name] >= 0 for r in rows), name
    assert 0.5 < rows[0]["token_fill"] <= 1


def test_a_run_goes_on_with_another_mixture_and_reports_every_source(world, stages, tmp_path):
    """Losses and counts of the sources are those of the whole; a new source joins in mid-run."""
    entry = json.loads((world.root / "meta.json").read_text())["colours"]
    entry |= {k: str(world.root / entry[k]) for k in ("root", "annotation")}

    def config(steps: int, **entries):
        path = tmp_path / f"{steps}.json"
        path.write_text(json.dumps(entries))
        previous = str(stages / "distill")
        return world.config("align", steps=steps, data__meta=str(path), init__previous=previous)

    train(config(3, first=entry), tmp_path / "run")
    both = config(6, first=entry, second=entry)
    train(both, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert not any("source/second/tokens" in r for r in rows[:3])
    assert rows[-1]["source/second/samples"] > 0 < rows[-1]["source/first/samples"]
    for row in rows:
        names = [n for n in ("first", "second") if f"source/{n}/tokens" in row]
        assert sum(row[f"source/{n}/tokens"] for n in names) == row["tokens"]
        losses = [row[f"source/{n}/loss/next_token"] for n in names]
        assert min(losses) - 1e-4 <= row["loss/next_token"] <= max(losses) + 1e-4
    # The batch of step 5 as `hovle data inspect --workdir` finds it.
    pipeline = open_pipeline(both, quiet=True)
    start = cursor_before(tmp_path / "run", 5)
    assert start[0] == 3
    batch = inspect.batch_at(both, pipeline, 5, start=start)
    assert sum(int((arrays["segment_ids"] > 0).sum()) for arrays, _ in batch) == rows[4]["tokens"]
    samples = [origin["source"] for _, origins in batch for origin in origins]
    assert samples.count("second") == rows[4].get("source/second/samples", 0)


class Killed(Exception):
    pass


def test_resume_after_a_crash_is_bit_for_bit(world, stages, tmp_path, monkeypatch):
    config = world.config("align", steps=7, save_every=3, init__previous=str(stages / "distill"))
    train(config, tmp_path / "whole")
    save = Checkpoints.save

    def crash(self, state, cursor):
        save(self, state, cursor)
        self.close()
        if int(state.step) == 3:
            raise Killed

    monkeypatch.setattr(Checkpoints, "save", crash)
    with pytest.raises(Killed):
        train(config, tmp_path / "resumed")
    monkeypatch.undo()
    train(config, tmp_path / "resumed")
    whole = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    resumed = read_metrics(tmp_path / "resumed" / "metrics.jsonl")
    exact = ("step", "loss", "grad_norm", "tokens", "tiles", "lr")
    assert [[r[k] for k in exact] for r in whole] == [[r[k] for k in exact] for r in resumed]
    a, b = params_of(tmp_path / "whole"), params_of(tmp_path / "resumed")
    assert all(np.array_equal(a[k], b[k]) for k in a)


def test_a_checkpoint_restores_onto_another_mesh(world, stages, tmp_path):
    config = world.config("align", steps=4, save_every=2, init__previous=str(stages / "distill"))
    train(config, tmp_path / "one")
    other = world.config(
        "align",
        steps=6,
        init__previous=str(stages / "distill"),
        mesh__data=2,
        mesh__fsdp=2,
        mesh__tensor=2,
    )
    train(other, tmp_path / "one", devices=8)
    assert [r["step"] for r in read_metrics(tmp_path / "one" / "metrics.jsonl")] == list(
        range(1, 7)
    )
    assert open_stored(tmp_path / "one").step == 6


def test_a_bad_record_in_mid_run_loses_no_step(world, tmp_path, one_line_error):
    """The file breaks after it was measured: the steps done until then are saved."""
    images = tmp_path / "images"
    shutil.copytree(world.root / "images", images)
    row = {"image": "01.jpg", "conversations": [{"from": "human", "value": "Which colour?"}]}
    row["conversations"].append({"from": "gpt", "value": "red"})
    meta = write_meta(tmp_path, [row] * 40)
    config = world.config("instruct", steps=400, init__scratch=True, data__meta=str(meta))
    workdir = tmp_path / "run"
    process = _spawn(config, workdir)
    _wait_for_step(workdir, 3, process)
    whole = (images / "01.jpg").read_bytes()
    (images / "01.jpg").write_bytes(whole[: len(whole) // 2])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: " in err.splitlines()[-1] and "01.jpg" in err.splitlines()[-1]
    steps = [r["step"] for r in read_metrics(workdir / "metrics.jsonl")]
    assert open_stored(workdir).step == steps[-1] >= 3


def _spawn(config, workdir: Path) -> subprocess.Popen:
    """`hovle train` in a process of its own, with the config as a file."""
    path = workdir.with_suffix(".py")
    path.write_text(
        "import ml_collections\n"
        f"def get_config():\n    return ml_collections.ConfigDict({to_dict(config)!r})\n"
    )
    argv = [sys.executable, "-m", "hovle_jax.cli", "train"]
    argv += [f"--config={path}", f"--workdir={workdir}"]
    return subprocess.Popen(
        argv, stderr=subprocess.PIPE, text=True, env=os.environ | {"XLA_FLAGS": ""}
    )


def _wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        rows = read_metrics(workdir / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in time")


def test_sigterm_saves_and_exits_75_and_kill_loses_nothing_saved(world, stages, tmp_path):
    config = world.config(
        "align", steps=4000, save_every=20, init__previous=str(stages / "distill")
    )
    workdir = tmp_path / "run"
    process = _spawn(config, workdir)
    _wait_for_step(workdir, 5, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "run the same command again" in err
    saved = open_stored(workdir).step
    assert saved is not None and saved >= 5
    process = _spawn(config, workdir)
    _wait_for_step(workdir, saved + 25, process)
    deadline = time.monotonic() + 60
    while open_stored(workdir).step == saved and time.monotonic() < deadline:
        time.sleep(0.05)  # saves are finalised behind the steps
    process.kill()
    process.communicate(timeout=60)
    assert open_stored(workdir).step > saved, "the checkpoint of a later step was finalised"
    rows = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))
