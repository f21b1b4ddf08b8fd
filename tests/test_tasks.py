"""Benchmarks that a run answers while it trains."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from hovle_jax.checkpoint import load
from hovle_jax.errors import UserError
from hovle_jax.eval.examples import Example
from hovle_jax.eval.tasks import TASKS
from hovle_jax.generation.chat import Assistant, first_question
from hovle_jax.run.metrics import read_metrics
from hovle_jax.run.prepare import open_run
from hovle_jax.run.tasks import Tasks
from hovle_jax.stages import get_stage
from hovle_jax.train import train
from hovle_jax.tree import flatten
from tests.chaos import cluster

NEW = 6


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """A run that answers nothing."""
    workdir = tmp_path_factory.mktemp("plain") / "run"
    config = world.config("instruct", steps=4, init__scratch=True)
    train(config, workdir, devices=jax.devices()[:1], quiet=True)
    return workdir


@pytest.fixture(scope="module")
def questions(plain, world, tmp_path_factory):
    """Eight questions of ANLS; to five of them the run's last weights give the accepted answer."""
    assistant = Assistant.load(plain)
    path = tmp_path_factory.mktemp("questions") / "docvqa.jsonl"
    rows = []
    for i in range(8):
        image = str(world.root / "images" / f"{i:02}.{'jpg' if i % 2 else 'png'}")
        row = {"question_id": i, "image": image, "question": f"Which colour?{' please' * i}"}
        text = TASKS["docvqa"].prompt(_example(row), "vlmevalkit")
        asked = dataclasses.replace(first_question(text, [image]), max_tiles=18)
        answer = assistant.answer([asked], max_new=NEW)[0]
        assert answer
        rows.append(row | {"answer": [answer if i < 5 else "nothing like it at all"]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _example(row):
    return Example(str(row["question_id"]), row, (row["image"],), "test")


def config_of(world, questions, **changes):
    changes = {"steps": 4, "init__scratch": True} | changes
    return dataclasses.replace(
        world.config("instruct", **changes),
        eval_every=2,
        eval_tasks=(f"docvqa={questions}",),
        eval_tokens=NEW,
    )


def scores(workdir):
    return {row["step"]: row["task/docvqa"] for row in read_metrics(workdir / "eval.jsonl")}


def test_answers_are_scored_and_training_does_not_notice(plain, questions, world, tmp_path):
    config = config_of(world, questions)
    train(config, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    found = scores(tmp_path / "run")
    assert list(found) == [2, 4] and found[4] == 62.5 > found[2]
    one, other = (flatten(load(where)[1]) for where in (plain, tmp_path / "run"))
    assert all(np.asarray(one[k]).tobytes() == np.asarray(other[k]).tobytes() for k in one)


def test_a_broken_picture_costs_its_question(questions, world, tmp_path, capsys):
    """Not the run. Of the five questions that are asked, four are answered right."""
    (tmp_path / "broken.png").write_text("no picture")
    lines = questions.read_text().splitlines(keepends=True)
    broken = json.loads(lines[4]) | {"image": str(tmp_path / "broken.png")}
    file = tmp_path / "questions.jsonl"
    file.write_text("".join([*lines[:4], json.dumps(broken) + "\n", *lines[5:]]))
    config = dataclasses.replace(config_of(world, file), eval_questions=5, eval_every=4)
    train(config, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    [row] = read_metrics(tmp_path / "run" / "eval.jsonl")
    assert row["task/docvqa"] == 80 and row["task_failed"] == 1
    assert "error: question 5: " in capsys.readouterr().err


@pytest.mark.slow  # two processes that train and answer; run with `pytest -m slow`
def test_several_hosts_answer_together(questions, world, tmp_path):
    config = config_of(world, questions, mesh__fsdp=2, mesh__tensor=2)
    cluster.run(config, tmp_path / "run").done()
    assert scores(tmp_path / "run")[4] == 62.5


def test_what_cannot_be_asked_is_refused_before_the_first_step(questions, world, tmp_path):
    config = world.config("instruct", init__scratch=True)
    run = open_run(config, tmp_path / "run", jax.devices()[:1], quiet=True)
    docvqa = f"docvqa={questions}"
    for stage, tasks, message in (
        ("instruct", ["docvqa"], "'docvqa' is not TASK=FILE or TASK:DIALECT=FILE"),
        ("instruct", [f"docqa={questions}"], "--task docqa: not one of mme,"),
        ("instruct", ["docvqa=nowhere.jsonl"], "no such file nowhere.jsonl"),
        ("instruct", [f"mmvet={questions}"], "mmvet needs a judge"),
        ("instruct", [docvqa, docvqa], "docvqa is asked twice"),
        ("distill", [docvqa], "stage 'distill' has no LLM that could answer"),
    ):
        config = dataclasses.replace(config, eval_every=2, eval_tasks=tuple(tasks))
        with pytest.raises(UserError, match=re.escape(message)):
            Tasks(dataclasses.replace(run, config=config, stage=get_stage(stage)), {})
    with pytest.raises(UserError, match="eval_tasks: needs eval_every"):
        dataclasses.replace(config, eval_every=0)
