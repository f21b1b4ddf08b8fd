"""What is written is whole or not there; what is damaged afterwards is named and never read."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from hovle_jax.checkpoint import load, open_stored, write_config
from hovle_jax.cli.main import main
from hovle_jax.config import GroupConfig
from hovle_jax.errors import UserError
from hovle_jax.initialize import initial_params
from hovle_jax.run import checkpoint_tools, digests, preemption
from hovle_jax.run.checkpoints import Checkpoints, kept
from hovle_jax.run.hosts import DataBarrier
from hovle_jax.run.metrics import read_metrics
from hovle_jax.sharding import make_mesh
from hovle_jax.stages import get_stage
from hovle_jax.train import Preempted, train
from hovle_jax.tree import flatten
from tests.chaos import cluster


def config_of(world, **changes):
    return world.config("align", **({"init__scratch": True, "save_every": 2, "keep": 3} | changes))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run of six steps with checkpoints at 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(config_of(world), workdir, devices=jax.devices()[:1], quiet=True)
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_a_run_goes_on_with_the_teacher_it_began_with(world, tmp_path):
    config = world.config("distill")
    write_config(tmp_path, config)
    (tmp_path / "checkpoints/1").mkdir(parents=True)
    other = dataclasses.replace(config.teacher, select_layer=-2)
    with pytest.raises(UserError, match=r"with config.teacher.select_layer=-1; use that"):
        train(dataclasses.replace(config, teacher=other), tmp_path, devices=jax.devices()[:1])


def test_the_number_of_groups_stays(world, tmp_path):
    config = world.config("align")
    write_config(tmp_path, config)
    (tmp_path / "checkpoints/1").mkdir(parents=True)
    more = dataclasses.replace(
        config.optim, groups=(*config.optim.groups, GroupConfig("none/.*", 1.0, 0.0))
    )
    with pytest.raises(UserError, match="with 2 config.optim.groups"):
        train(dataclasses.replace(config, optim=more), tmp_path, devices=jax.devices()[:1])


def test_a_start_that_failed_binds_nobody(world, tmp_path):
    """Before the first checkpoint a run may begin anew with less: the usual way to fit memory."""
    first = config_of(world, data__tokens=128)
    write_config(tmp_path, first)
    train(config_of(world, steps=1), tmp_path, devices=jax.devices()[:1], quiet=True)
    with pytest.raises(UserError, match="belongs to a run with config.data.tokens=96"):
        train(first, tmp_path, devices=jax.devices()[:1], quiet=True)


def test_an_earlier_checkpoint_stands_for_its_run(world, tmp_path, capsys):
    """Wherever a model directory can: the best one, not only the newest."""
    config = config_of(world, steps=4, save_every=2, keep=2, storage=str(tmp_path / "bucket"))
    train(config, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    early, late = tmp_path / "run/checkpoints/2", tmp_path / "run"
    assert (open_stored(early).step, open_stored(late).step) == (2, 4)
    params = [flatten(load(path)[1]) for path in (early, late, tmp_path / "run/checkpoints/4")]
    equal = [all((params[i][k] == x).all() for k, x in params[1].items()) for i in (0, 2)]
    assert equal == [False, True]
    capsys.readouterr()
    following = world.config("instruct", init__previous=str(early))
    mesh = make_mesh(following.mesh, jax.devices()[:1])
    initial_params(following, get_stage("instruct"), mesh)
    said = f"warning: starting from step 2 of 4 in {tmp_path / 'run'}"
    assert said in capsys.readouterr().err


def files(directory: Path) -> list[Path]:
    """All that is listed, by size."""
    names = digests.read(directory)
    return sorted((directory / n for n in names), key=lambda p: (p.stat().st_size, str(p)))


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


DAMAGE = {"cut": cut, "flipped": flip, "missing": remove}


def reopened(world, workdir, **changes) -> Checkpoints:
    return Checkpoints(workdir, config_of(world, **changes), DataBarrier(10))


def test_the_policy():
    steps = list(range(10, 101, 10))
    assert sorted(kept(steps, 2, 0)) == [90, 100]
    assert kept(steps, 1, 40) == {40: "every 40", 80: "every 40", 100: "last 1"}
    assert list(kept([7], 0, 0)) == [7], "the newest always stays"
    losses = {20: 0.5, 30: 0.4, 35: 0.1, 50: 0.4}  # 35 has no checkpoint; of equals the later
    assert kept(steps, 1, 0, 1, losses) == {50: "best 1 (0.4000)", 100: "last 1"}
    assert sorted(kept(steps, 1, 0, 2, losses)) == [30, 50, 100]


def test_the_best_stays(world, tmp_path):
    """It is the first: the run unlearns."""
    changes = {"keep": 1, "data__holdout": 4, "eval_every": 2, "keep_best": 1, "optim__lr": 1.0}
    config = config_of(world, steps=8, **changes)
    train(config, tmp_path, devices=jax.devices()[:1], quiet=True)
    rows = read_metrics(tmp_path / "eval.jsonl")
    best = min(rows, key=lambda row: (row["loss"], -row["step"]))
    assert best["step"] != 8 and cluster.saved(tmp_path) == [best["step"], 8]
    found = {row.name: row.kept for row in checkpoint_tools.rows(str(tmp_path))}
    assert found == {str(best["step"]): f"best 1 ({best['loss']:.4f})", "8": "last 1"}
    assert checkpoint_tools.prune(str(tmp_path), 1, keep_best=1) == []
    (gone,) = checkpoint_tools.prune(str(tmp_path), 1)
    assert gone.endswith(f"/{best['step']}") and cluster.saved(tmp_path) == [8]


def test_keep_best_needs_losses_of_its_checkpoints(world):
    for changes in ({}, {"eval_every": 4}):
        with pytest.raises(UserError, match="keep_best: needs an eval_every that divides"):
            config_of(world, steps=8, save_every=6, data__holdout=4, **changes, keep_best=1)


def test_old_checkpoints_go_and_every_kth_stays(world, tmp_path):
    config = config_of(world, steps=8, keep=1, keep_every=4)
    train(config, tmp_path, devices=jax.devices()[:1], quiet=True)
    assert cluster.saved(tmp_path) == [4, 8]


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_file_of_a_checkpoint_counts(damage, finished, world, tmp_path, capsys):
    """Of the newest, each file in turn: it is named, put aside, and the one before is taken."""
    rng = random.Random(damage)
    listed = files(finished / "checkpoints/6")
    assert len(listed) > 8 and any(p.name == "metadata" for p in listed)
    # The largest hold arrays; a few of the others, which hold lists, shapes and the cursor.
    for path in [
        *listed[-2:],
        *rng.sample(listed[:-2], 3),
        finished / "checkpoints/6/digests.json",
    ]:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        workdir = shutil.copytree(finished, tmp_path / "run")
        broken = workdir / path.relative_to(finished)
        DAMAGE[damage](broken)
        assert reopened(world, workdir).latest() == 4
        (line,) = capsys.readouterr().err.splitlines()
        assert str(broken) in line and "going on from 4" in line, line
        assert cluster.saved(workdir) == [2, 4]
        assert (workdir / "checkpoints/damaged/6/params").is_dir()


def test_no_checkpoint_is_whole(world, workdir):
    """A run does not silently start anew."""
    for step in (2, 4, 6):
        flip(files(workdir / f"checkpoints/{step}")[-1])
    with pytest.raises(UserError, match="no checkpoint in .* is whole .*checkpoints/2/"):
        reopened(world, workdir)
    assert cluster.saved(workdir) == [2, 4, 6]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_arrays_are_not_read(damage, workdir):
    """By the next stage, chat, export: whatever opens a work directory."""
    for tree in (workdir / "frozen", workdir / "checkpoints/6/params"):
        listed = [
            p for p in files(tree if tree.name == "frozen" else tree.parent) if tree in p.parents
        ]
        whole = listed[-1].read_bytes()
        DAMAGE[damage](listed[-1])
        with pytest.raises(UserError) as error:
            load(workdir)
        assert str(listed[-1]) in str(error.value) and "\n" not in str(error.value)
        listed[-1].write_bytes(whole)
    load(workdir)


def test_damaged_frozen_parameters_stop_a_run(world, workdir):
    flip(files(workdir / "frozen")[-1])
    with pytest.raises(UserError, match="frozen.*holds other bytes than were written.*only once"):
        reopened(world, workdir)


def test_half_written_checkpoints_are_named_and_deleted(world, workdir, capsys):
    """As a kill leaves them: while it was written, and while an old one was deleted."""
    half = workdir / "checkpoints/8.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints/6/params", half / "params.orbax-checkpoint-tmp")
    (workdir / "checkpoints/2").rename(workdir / "checkpoints/2.deleted")
    assert reopened(world, workdir).latest() == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert str(half) in line and "not written to its end" in line
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4", "6"]
    # One that was renamed, or copied, without its end.
    (workdir / "checkpoints/6/digests.json").unlink()
    assert reopened(world, workdir).latest() == 4
    assert "not written to its end" in capsys.readouterr().err


def test_a_save_that_fails_surfaces_and_names_step_and_directory(world, tmp_path, monkeypatch):
    """The disk fills up under the second save: at once, at the next save and at exit."""
    config = config_of(world, steps=40)
    write = digests.write

    def full(directory, known=None):
        if "4." in directory.name:
            raise OSError(28, "No space left on device")
        write(directory, known)

    monkeypatch.setattr(digests, "write", full)
    with pytest.raises(UserError) as error:
        train(config, tmp_path, devices=jax.devices()[:1], quiet=True)
    assert f"saving step 4 in {tmp_path}/checkpoints failed" in str(error.value)
    assert "No space left" in str(error.value) and "\n" not in str(error.value)
    assert cluster.saved(tmp_path) == [2]
    monkeypatch.undo()
    train(config_of(world, steps=6), tmp_path, devices=jax.devices()[:1], quiet=True)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_failed_last_save_is_an_error(world, tmp_path, monkeypatch):
    def full(directory, known=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hovle_jax.run.checkpoints.digests.write", full)
    config = config_of(world, steps=1, trainable=".*")  # nothing is frozen
    with pytest.raises(UserError, match="saving step 1 in .* failed: .*No space left"):
        train(config, tmp_path, devices=jax.devices()[:1], quiet=True)


def test_a_directory_that_cannot_be_written(world, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="checkpoints"):
        reopened(world, tmp_path)


def test_checkpoints_lie_elsewhere(world, tmp_path, capsys):
    """config.storage, by epath as a remote one would be."""
    config = config_of(world, steps=2, storage=str(tmp_path / "bucket"))
    train(config, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    assert not (tmp_path / "run/checkpoints").exists() and not (tmp_path / "run/frozen").exists()
    assert open_stored(tmp_path / "run").step == 2
    load(tmp_path / "run")
    again = config_of(world, steps=3, storage=str(tmp_path / "bucket"))
    train(again, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    assert open_stored(tmp_path / "run").step == 3
    with pytest.raises(UserError, match="config.storage"):  # it would begin anew
        train(config_of(world), tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    assert main(["checkpoint", "ls", str(tmp_path / "run")]) == 0
    assert "last 3" in capsys.readouterr().out


def test_sigterm_before_the_first_step(world, tmp_path, monkeypatch):
    """Nothing was done, so nothing is saved, and it says so."""
    with preemption.listening():
        os.kill(os.getpid(), 15)
        with pytest.raises(Preempted, match="SIGTERM, no step was done yet"):
            train(config_of(world), tmp_path, devices=jax.devices()[:1], quiet=True)
    assert cluster.saved(tmp_path) == []


def test_sigterm_after_a_restore_saves_nothing_twice(world, workdir):
    newest = (workdir / "checkpoints/6/digests.json").stat().st_mtime_ns
    with preemption.listening():
        os.kill(os.getpid(), 15)
        with pytest.raises(Preempted, match="SIGTERM, step 6 is saved in"):
            train(config_of(world, steps=9), workdir, devices=jax.devices()[:1], quiet=True)
    assert (workdir / "checkpoints/6/digests.json").stat().st_mtime_ns == newest


def test_ls(workdir, capsys):
    (workdir / "checkpoints/8.orbax-checkpoint-tmp").mkdir()
    (workdir / "checkpoints/2/meta/metadata").unlink()
    assert main(["checkpoint", "ls", str(workdir)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["step", "2", "4", "6", "8.orbax-checkpoint-tmp"]
    assert "damaged" in lines[1] and "finished" in lines[2] and lines[3][-2:] == ["last", "3"]
    assert "not finished" in " ".join(lines[4])


def test_verify(workdir, capsys, one_line_error):
    assert main(["checkpoint", "verify", str(workdir)]) == 0
    assert capsys.readouterr().out.count(": whole") == 4  # three steps and what is frozen
    broken = files(workdir / "checkpoints/4")[-1]
    flip(broken)
    assert main(["checkpoint", "verify", str(workdir), "--step", "6"]) == 0
    message = one_line_error(["checkpoint", "verify", str(workdir)])
    assert "1 of 4 directories are damaged" in message and "checkpoints/4" in message
    (line,) = checkpoint_tools.verify(str(workdir))[str(workdir / "checkpoints/4")]
    assert str(broken) in line
    message = one_line_error(["checkpoint", "verify", str(workdir), "--step", "5"])
    assert "no checkpoint of step 5; there: 2, 4, 6" in message


def test_diff(workdir, world, capsys):
    steps = [f"{workdir}/checkpoints/{step}" for step in (4, 6)]
    assert main(["checkpoint", "diff", steps[1], steps[1]]) == 0
    assert capsys.readouterr().out.startswith("0 of ")
    assert main(["checkpoint", "diff", *steps]) == 1
    out = capsys.readouterr().out
    assert "embedding/vision/patch/kernel: " in out and "optimizer/" in out
    assert main(["checkpoint", "diff", str(workdir), str(world.root / "llm")]) == 1
    out = capsys.readouterr().out
    assert f"embedding/vision/patch/kernel: only in {workdir}" in out
    assert "decoder/head/kernel" not in out, "frozen, and equal"
    a, b = (cluster.arrays(workdir, step) for step in (4, 6))
    found, compared = checkpoint_tools.differences(*steps)
    assert compared == len(a)
    assert {d.name for d in found} == {
        k.removeprefix("params/") for k in a if not np.array_equal(a[k], b[k])
    }


def test_prune(workdir, capsys):
    argv = ["checkpoint", "prune", str(workdir), "--keep", "1", "--keep-every", "4"]
    assert main([*argv, "--dry-run"]) == 0
    assert capsys.readouterr().out.split() == ["would", "delete", f"{workdir}/checkpoints/2"]
    assert cluster.saved(workdir) == [2, 4, 6]
    assert main(argv) == 0
    assert cluster.saved(workdir) == [4, 6]
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4", "6"]


@pytest.mark.parametrize(
    "argv, says",
    [
        (["ls", "{tmp}/none"], "expected a model or work directory"),
        (["ls", "{llm}"], "is a model directory"),
        (["diff", "{llm}", "{tmp}"], "neither a model or work directory"),
        (["prune", "{run}", "--keep", "0"], "at least the newest"),
    ],
)
def test_bad_input(argv, says, finished, world, tmp_path, one_line_error):
    names = {"tmp": tmp_path, "llm": world.root / "llm", "run": finished}
    assert says in one_line_error(["checkpoint", *(x.format(**names) for x in argv)])


def test_remote_paths_stay_what_they_are():
    from hovle_jax.checkpoint import storage_of
    from hovle_jax.config import RunConfig

    assert str(storage_of("run", RunConfig(storage="gs://b/run"))) == "gs://b/run"
    assert storage_of("run", RunConfig()) == epath.Path(os.path.abspath("run"))
