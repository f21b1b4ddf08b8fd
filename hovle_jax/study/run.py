"""`hovle study`: every arm, seed and task, once; what several of them share is made once.

OUT/compiled                          programs, which seeds share
OUT/TASK/seed-N/data, standins        files, text-only LM and vision teacher
OUT/TASK/seed-N/STAGE-KEY             work directories; arms alike up to a stage share it
OUT/TASK/seed-N/answers/STAGE-KEY.json
OUT/NAME.json, NAME.md, NAME.png      the report; studies in one directory share all of the above
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hovle_jax.checkpoint import read_config, save_model
from hovle_jax.config import (
    InitConfig,
    LayersConfig,
    ModelConfig,
    RunConfig,
    TeacherConfig,
    to_dict,
)
from hovle_jax.data.readers import JsonlConversations
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.demo import settings, standins
from hovle_jax.demo.score import answer_all
from hovle_jax.errors import UserError
from hovle_jax.generation.chat import Assistant, Question
from hovle_jax.output import replace_json
from hovle_jax.stages import get_stage
from hovle_jax.study import report
from hovle_jax.study.plan import Arm, Study
from hovle_jax.study.tasks import TASKS, Files, Task, write
from hovle_jax.train import train
from hovle_jax.typed import changed

LAYERS = LayersConfig(
    num_layers=2,
    hidden_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    intermediate_size=144,
    rope_theta=10_000.0,
    initializer_range=0.12,
    max_positions=1024,
)
STEPS = {"distill": 200, "align": 400, "instruct": 300}
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class World:
    """One task with one seed."""

    task: Task
    seed: int
    root: Path
    files: Files
    model: ModelConfig


def run_study(
    study: Study, out: str | Path, say: Say = print, name: str = "report"
) -> dict[str, Any]:
    """Runs what is not there yet, writes the report `name` and returns it.

    Raises:
      UserError: an arm with a config key that is none, or whatever a stage raises.
    """
    out = Path(out)
    for task in study.tasks:
        TASKS.find(task)
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str((out / "compiled").resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    correct: report.Correct = {task: {} for task in study.tasks}
    units = list(itertools.product(study.seeds, study.tasks, study.arms))
    for number, (seed, task, arm) in enumerate(units, 1):
        say(f"[{number}/{len(units)}] {task}, seed {seed}: {arm.name}")
        root = out / task / f"seed-{seed}"
        answers = root / "answers" / f"{study.key(arm, arm.stages[-1])}.json"
        if not answers.is_file():
            _run_arm(study, arm, _prepare(study, task, seed, root, say), answers, say)
        found = json.loads(answers.read_text())["correct"]
        correct[task].setdefault(arm.name, []).append(found)
        body = report.summary(study, correct, _cpu_seconds(out, study))
        report.write(out / name, body)
    report.draw(out / f"{name}.png", body)
    return body


def _once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returned when it was done, with its CPU seconds; made now if it was not."""
    if path.is_file():
        return json.loads(path.read_text())
    begin = time.process_time()
    body = make()
    body["cpu_seconds"] = time.process_time() - begin
    replace_json(path, body)
    return body


def _prepare(study: Study, name: str, seed: int, root: Path, say: Say) -> World:
    task = TASKS.find(name)

    def make() -> dict[str, Any]:
        files, tokenizer = write(task, root / "data", seed, study.sizes)
        quality = _standins(task, files, _model(tokenizer), tokenizer, seed, root, study)
        return {"quality": quality, "sizes": to_dict(study.sizes)}

    done = (root / "standins.json").is_file()
    found = _once(root / "standins.json", make)
    if found["sizes"] != to_dict(study.sizes):
        raise UserError(f"{root}: has data of other sizes, {found['sizes']}; take another --out")
    if not done:
        say("  " + _seconds("stand-ins", found) + f", {found['quality']}")
    files = Files(root / "data")
    return World(task, seed, root, files, _model(Tokenizer.load(files.tokenizer)))


def _model(tokenizer: Tokenizer) -> ModelConfig:
    config = settings.model_config(tokenizer)
    return dataclasses.replace(config, name="study", embedding=LAYERS, decoder=LAYERS)


def _standins(
    task: Task,
    files: Files,
    config: ModelConfig,
    tokenizer: Tokenizer,
    seed: int,
    root: Path,
    study: Study,
) -> dict[str, float]:
    sizes = study.sizes
    llm, reads = standins.fit_lm(config, tokenizer, task.text, seed, sizes.lm_steps)
    save_model(root / "standins" / "llm", config, llm)
    vectors = np.asarray(llm["embedding"]["text"]["table"])
    words = vectors[[tokenizer.encode_ordinary(symbol)[-1] for symbol in task.symbols]]
    teacher_config = dataclasses.replace(
        settings.teacher_config(),
        hidden_size=LAYERS.hidden_size,
        intermediate_size=LAYERS.intermediate_size,
        out_size=LAYERS.hidden_size,
    )
    parts = files.labelled("train", "unpaired"), files.labelled("test")
    teacher, sees = standins.fit_teacher(
        teacher_config, words, *parts, task.pool, seed, sizes.teacher_steps
    )
    save_model(root / "standins" / "teacher", teacher_config, teacher)
    return {"language model": round(reads, 3), "teacher": round(sees, 3)}


def _run_arm(study: Study, arm: Arm, world: World, answers: Path, say: Say) -> None:
    previous, before = "", ""
    for stage in arm.stages:
        workdir = world.root / study.key(arm, stage)
        config = stage_config(study, arm, world, stage, previous, before)
        if not (workdir / "cpu.json").is_file():
            found = _once(workdir / "cpu.json", lambda: _train(config, workdir))  # noqa: B023
            say("  " + _seconds(stage, found) + f", loss {found['loss']:.3f}")
        previous, before = str(workdir), config.stage
    found = _once(answers, lambda: {"correct": _ask(world, Path(previous))})
    say("  " + _seconds("questions", found) + f", {np.mean(found['correct']):.3f} right")


def _train(config: RunConfig, workdir: Path) -> dict[str, Any]:
    return {"loss": float(train(config, workdir, quiet=True).get("loss", float("nan")))}


def stage_config(
    study: Study, arm: Arm, world: World, stage: str, previous: str, before: str
) -> RunConfig:
    """The demo's stage on this task, smaller, with what the arm changes.

    previous: work directory of the stage before, '' for none; before: its config's stage.
    """
    places = world.files.places
    recipe = stage if stage in STEPS else "align"
    base = settings.stage_config(
        recipe,
        world.model,
        seed=world.seed,
        tokenizer=world.files.tokenizer,
        init=InitConfig(
            llm=str(world.root / "standins" / "llm"),
            teacher=str(world.root / "standins" / "teacher"),
            previous=previous,
        ),
        meta=places.get(f"{{{recipe}}}", ""),
        images=(world.files.unpaired(arm.images),) if stage == "distill" else (),
    )
    teacher = read_config(base.init.teacher)
    assert isinstance(teacher, TeacherConfig)
    base = dataclasses.replace(base, teacher=teacher, steps=STEPS[recipe])
    base = changed(base, {"data.rows": 16, "guards.step_timeout": 0.0}, "study")
    asked = {"stage": stage} | study.of(arm, stage)
    own = {k: places.get(v, v) if isinstance(v, str) else v for k, v in asked.items()}
    config = changed(base, own, f"arm {arm.name!r}, stage {stage!r}")
    # An arm that leaves stages out, or has its own, says so with it.
    scratch = get_stage(config.stage).after != before
    return changed(config, {"init.scratch": scratch}, "study")


def _ask(world: World, workdir: Path) -> list[int]:
    """1 for each question of the test that is answered exactly, else 0."""
    assistant = Assistant.load(workdir)
    records = JsonlConversations("test", str(world.files.test), str(world.files.root))
    rows = [records[i] for i in range(len(records))]
    answers = answer_all(assistant, [Question(r.turns[:1], r.images) for r in rows])
    return [int(a == r.turns[1].text) for a, r in zip(answers, rows, strict=True)]


def _seconds(what: str, found: dict[str, Any]) -> str:
    return f"{what}: {found['cpu_seconds']:.1f} s of CPU"


def _cpu_seconds(out: Path, study: Study) -> float:
    """Of everything the report is made from, whenever it was run."""
    used = set()
    for name in study.tasks:
        for seed in study.seeds:
            root = out / name / f"seed-{seed}"
            used.add(root / "standins.json")
            for arm in study.arms:
                used |= {root / study.key(arm, s) / "cpu.json" for s in arm.stages}
                used.add(root / "answers" / f"{study.key(arm, arm.stages[-1])}.json")
    return sum(json.loads(p.read_text())["cpu_seconds"] for p in used if p.is_file())
