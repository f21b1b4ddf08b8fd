"""A run that goes back after a spike: the last good state, other batches, and the same again after
a crash."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from etils import epath

from hovle_jax.checkpoint import cursor_after, load, read_meta, read_rewinds
from hovle_jax.run import goodput
from hovle_jax.run.metrics import read_metrics
from hovle_jax.run.replay import replay
from hovle_jax.stages import STAGES, get_stage, open_pipeline
from hovle_jax.train import train
from hovle_jax.tree import flatten

DEVICES = jax.devices()[:1]


@pytest.fixture(scope="module")
def config(world):
    """Losses that hardly fall, and a guard that takes the first one above the median for a spike
    as soon as it has seen enough of them."""
    changes = {"guards__spike": 1e-3, "guards__rewind": 1, "optim__lr": 1e-5}
    return world.config("align", steps=26, save_every=4, keep=9, init__scratch=True, **changes)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(config, workdir, devices=DEVICES, quiet=True)
    return workdir


def timeless(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if "second" not in k and "hbm" not in k} for r in rows]


def params_of(workdir):
    return {k: np.asarray(x) for k, x in flatten(load(workdir)[1]).items()}


def test_it_goes_back_once_and_leaves_batches_out(config, whole):
    (row,) = read_rewinds(epath.Path(whole))
    assert row["step"] > 16 and row["to"] == (row["step"] - 1) // 4 * 4
    assert "deviations above" in row["reason"]
    rows = read_metrics(whole / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 27))
    # What was read and counts for nothing: the batches from the checkpoint to the spike, and the
    # one under way when it was seen, unless a save made the run look at once.
    left_out = row["step"] - row["to"] + (row["step"] % 4 != 0)
    pipeline = open_pipeline(config, quiet=True)
    batches = itertools.islice(pipeline.batches(), 26 + left_out)
    cursors = [cursor for _, cursor in batches]
    assert read_meta(epath.Path(whole) / "checkpoints/26")["cursor"] == cursors[-1]
    target = epath.Path(whole) / "checkpoints" / str(row["to"])
    assert read_meta(target)["cursor"] == cursors[row["to"] - 1]
    assert cursor_after(target) == row["cursor"] == cursors[row["to"] + left_out - 1]
    seconds = goodput.split_time(read_metrics(whole / "goodput.jsonl"))
    assert seconds["lost"] > 0


def test_a_gradient_that_is_not_finite_costs_no_rewind(world, tmp_path):
    """Its step is left out already; going back would lose good ones."""

    @jax.custom_jvp
    def same(x):
        return x

    same.defjvp(lambda primals, tangents: (primals[0], tangents[0] * np.nan))
    align = get_stage("align")

    def terms(*args):
        return {k: same(x) for k, x in align.terms(*args).items()}

    STAGES.add("nan_gradient")(dataclasses.replace(align, name="nan_gradient", terms=terms))
    try:
        changes = {"init__scratch": True, "guards__rewind": 2, "save_every": 2, "steps": 4}
        config = dataclasses.replace(world.config("align", **changes), stage="nan_gradient")
        train(config, tmp_path, devices=DEVICES, quiet=True)
    finally:
        del STAGES["nan_gradient"]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert len(read_metrics(tmp_path / "bad_batches.jsonl")) == 4
    assert read_rewinds(epath.Path(tmp_path)) == []


class Killed(Exception):
    pass


def test_a_crash_after_it_changes_nothing(config, whole, tmp_path):
    """Killed before anything is saved after the rewind, the run goes on past the same batches."""
    back = read_rewinds(epath.Path(whole))[0]["to"]
    seen: list[int] = []

    def kill(step, state):
        seen.append(step)
        if seen.count(back + 1) == 2:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "run", devices=DEVICES, quiet=True, after_step=kill)
    train(config, tmp_path / "run", devices=DEVICES, quiet=True)
    assert timeless(tmp_path / "run") == timeless(whole)
    one, other = params_of(whole), params_of(tmp_path / "run")
    assert all(one[k].tobytes() == other[k].tobytes() for k in one)
    assert len((tmp_path / "run/rewinds.jsonl").read_text().splitlines()) == 1


def test_steps_after_it_are_replayed(config, whole):
    back = read_rewinds(epath.Path(whole))[0]["to"]
    assert replay(config, whole, back + 2, devices=DEVICES) == [back + 1, back + 2]


def test_a_checkpoint_of_another_history_keeps_its_cursor(whole):
    (row,) = read_rewinds(epath.Path(whole))
    target = epath.Path(whole) / "checkpoints" / str(row["to"])
    other = row | {"instead_of": {"window": 9, "row": 9, "mixture": []}, "cursor": "another"}
    path = whole / "rewinds.jsonl"
    before = path.read_text()
    try:
        path.write_text(before + json.dumps(other) + "\n")
        assert cursor_after(target) == row["cursor"]
    finally:
        path.write_text(before)
