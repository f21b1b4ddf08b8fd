"""`hovle demo`: files -> stand-ins -> stages I, II, III -> held-out scores, in a few minutes.

OUT/data         images, jsonl, meta.json, text: what a user would bring
OUT/standins     the text-only LM and the vision teacher, frozen from here on
OUT/ARM/STAGE    work directories; OUT/full/instruct is a model `hovle chat` can talk to
OUT/report.*     table, plots, JSON
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hovle_jax import model as hovle_model
from hovle_jax.checkpoint import load, save_model
from hovle_jax.config import InitConfig, ModelConfig, RunConfig
from hovle_jax.data.tokenizer import Tokenizer, train_tokenizer
from hovle_jax.demo import digits, report, settings, standins
from hovle_jax.demo.score import cosine_map, score_questions
from hovle_jax.errors import UserError
from hovle_jax.generation.chat import Assistant
from hovle_jax.hf.export import export
from hovle_jax.hf.writer import ExportOptions
from hovle_jax.run.metrics import read_metrics
from hovle_jax.train import train
from hovle_jax.tree import merge

TRAIN_CANVASES, QA_PER_CANVAS, TEST_PER_TYPE, VOCAB = 8000, 6, 600, 160

ARMS: dict[str, tuple[str, ...]] = {
    "full": ("distill", "align", "instruct"),
    "no_stage1": ("align", "instruct"),
    "stage3_only": ("instruct",),
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What every arm starts from."""

    out: Path
    seed: int
    paths: digits.Paths
    tokenizer: Tokenizer
    model: ModelConfig
    quality: dict[str, float]

    @property
    def standins(self) -> Path:
        return self.out / "standins"

    @property
    def tokenizer_dir(self) -> str:
        return str(self.out / "data" / "tokenizer")


def run_demo(out: str | Path, *, seed: int = 0, ablations: bool = False) -> dict[str, Any]:
    """Runs everything into a new directory `out`, prints the table, returns the report."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out: {out} is not empty; remove it or choose another directory")
    begin = time.monotonic()
    setup = prepare(out, seed)
    results, curves, examples = {}, {}, []
    minutes = 0.0
    for arm in ARMS if ablations else ("full",):
        directories = train_arm(setup, arm)
        results[arm], answered = evaluate_arm(setup, directories[-1])
        curves[arm] = {d.name: _curve(d) for d in directories}
        if arm == "full":
            examples, minutes = answered, (time.monotonic() - begin) / 60
            cosines = _cosine_maps(setup, directories[0])
    body = {
        "seed": seed,
        "minutes": minutes,
        "results": results,
        "stand_ins": setup.quality,
        "total_minutes": (time.monotonic() - begin) / 60,
    }
    report.write_report(str(out), body, curves=curves, examples=examples, cosine_map=cosines)
    export(out / "full" / "instruct", out / "hf", ExportOptions(), verify=True)
    print(report.table(results))
    print(f"\n{minutes:.1f} minutes for stand-ins, training and evaluation of 'full'")
    print(f"Look at it:  {out}/report.md")
    print(f"Talk to it:  hovle chat {out}/full/instruct --image {examples[0]['image']}")
    print(f"In transformers, with torch and nothing of ours:  {out}/hf (see its README.md)")
    return body


def prepare(out: Path, seed: int) -> Setup:
    """Data files, tokenizer and the two stand-ins."""
    print("writing digit canvases ...", flush=True)
    paths = digits.write_dataset(
        str(out / "data"),
        seed=seed,
        train_canvases=TRAIN_CANVASES,
        qa_per_canvas=QA_PER_CANVAS,
        test_per_type=TEST_PER_TYPE,
    )
    tokenizer = train_tokenizer(digits.tokenizer_lines(), out / "data" / "tokenizer", VOCAB)
    config = settings.model_config(tokenizer)
    llm, llm_quality = standins.train_lm(config, tokenizer, seed)
    save_model(out / "standins" / "llm", config, llm)
    teacher_config = settings.teacher_config()
    ids = [tokenizer.encode_ordinary(str(d))[0] for d in range(10)]
    words = np.asarray(llm["embedding"]["text"]["table"])[ids]
    teacher, teacher_quality = standins.train_teacher(teacher_config, words, paths, seed)
    save_model(out / "standins" / "teacher", teacher_config, teacher)
    quality = {
        "text-only LM: questions about textual canvases": llm_quality,
        "vision teacher: digits of held-out writers": teacher_quality,
    }
    for name, value in quality.items():
        print(f"stand-in, {name}: {value:.3f}")
    return Setup(out, seed, paths, tokenizer, config, quality)


def arm_config(setup: Setup, stage: str, previous: str) -> RunConfig:
    """The stage's config; an arm that skips stages says so with `scratch`."""
    paths = setup.paths
    init = InitConfig(
        llm=str(setup.standins / "llm"),
        teacher=str(setup.standins / "teacher"),
        previous=previous,
        scratch=stage != "distill" and not previous,
    )
    return settings.stage_config(
        stage,
        setup.model,
        seed=setup.seed,
        tokenizer=setup.tokenizer_dir,
        init=init,
        meta={"align": paths.meta_align, "instruct": paths.meta_instruct}.get(stage, ""),
        images=(paths.unpaired,) if stage == "distill" else (),
    )


def train_arm(setup: Setup, arm: str) -> list[Path]:
    """Trains the arm's stages one after another; their work directories in order."""
    directories: list[Path] = []
    for stage in ARMS[arm]:
        print(f"{arm}: stage {stage}", flush=True)
        previous = str(directories[-1]) if directories else ""
        directory = setup.out / arm / stage
        train(arm_config(setup, stage, previous), directory)
        directories.append(directory)
    return directories


def evaluate_arm(
    setup: Setup, directory: Path
) -> tuple[dict[str, dict[str, float]], list[dict[str, str]]]:
    """Scores per question type, and every answered question."""
    assistant = Assistant.load(directory)
    scores, examples = {}, []
    for kind, annotation in setup.paths.tests.items():
        scores[kind], answered = score_questions(assistant, annotation, setup.paths.images)
        examples += [{"type": kind} | e for e in answered]
        print(f"  {kind}: {json.dumps(scores[kind])}", flush=True)
    return scores, examples


def _curve(workdir: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(workdir / "metrics.jsonl")]


def _cosine_maps(setup: Setup, distilled: Path) -> dict[str, Any]:
    """Student against teacher on test canvases, before and after stage I."""
    names, _ = setup.paths.labels("test")
    images = [f"{setup.paths.images}/{name}" for name in names[:6]]
    stored, after = load(distilled)
    config = stored.config
    assert isinstance(config, RunConfig)
    _, teacher = load(config.init.teacher)
    fresh = hovle_model.init(jax.random.key(setup.seed), setup.model)["embedding"]
    before = merge({"embedding": fresh}, {"embedding": {"text": after["embedding"]["text"]}})
    maps = {
        name: cosine_map(config, params, teacher, setup.tokenizer, images)
        for name, params in (("before", before), ("after", after))
    }
    return {"images": images} | maps
