"""`hovle eval`: a model on a benchmark."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from hovle_jax.cli.common import add_command, no_more
from hovle_jax.cli.serve import add_engine, engine_options, load
from hovle_jax.data.files import check_local
from hovle_jax.errors import UserError
from hovle_jax.output import write_json


def add_commands(commands: Any) -> None:
    """Adds the command to those of `hovle`."""
    command: argparse.ArgumentParser = add_command(
        commands,
        "eval",
        _eval,
        "Ask a model a benchmark's questions and score its answers; resumes after a kill.",
        "hovle eval runs/stage3 --task mme --data MME.tsv",
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "model_dir", nargs="?", default="", metavar="MODEL_DIR", help="native or Hugging Face"
    )
    source.add_argument("--model", default="", metavar="MODEL_DIR", help="the same")
    source.add_argument("--predictions", default="", metavar="FILE", help="score these, no model")
    command.add_argument("--task", required=True, help="mme, mmbench_en, ...: docs/evaluation.md")
    command.add_argument(
        "--data", required=True, nargs="+", metavar="FILE", help="VLMEvalKit's TSV, jsonl or JSON"
    )
    command.add_argument("--answers", default="", metavar="FILE", help="annotations it lacks")
    command.add_argument("--images", default="", metavar="DIR", help="root of its image paths")
    command.add_argument(
        "--dialect",
        default="vlmevalkit",
        help="whose prompts and metric: vlmevalkit (default), lmms-eval or internvl",
    )
    command.add_argument("--out", default="runs/eval", metavar="DIR", help="answers and results")
    add_engine(command, context=0)
    command.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    command.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    command.add_argument("--json", default="", metavar="FILE", help="a copy of results.json")


def _eval(args: argparse.Namespace, rest: list[str]) -> int:
    no_more("eval", rest)
    from hovle_jax.eval.examples import ImageStore
    from hovle_jax.eval.report import HEAD, markdown_row
    from hovle_jax.eval.run import Run, answer, read_examples, score
    from hovle_jax.eval.tasks import check

    for name, least in (("slots", 1), ("resamples", 1), ("context", 0), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be {least} or more")
    for flag in ("data", "answers", "images", "out"):
        given = getattr(args, flag)
        for path in given if isinstance(given, list) else [given]:
            check_local(path, f"--{flag}")
    check(args.task, args.dialect)
    run = Run(
        args.task,
        args.dialect,
        tuple(args.data),
        args.answers,
        args.images,
        args.out,
        args.resamples,
        args.seed,
    )
    model = args.model_dir or args.model
    scale = run.definition.upscale.get(args.dialect, 1)
    pictures = run.directory.parent / "images" if model else None
    examples, empty = read_examples(run, ImageStore(pictures, scale))
    if empty:
        print(f"{empty} rows without an image are left out", file=sys.stderr)
    predictions = args.predictions
    if model:
        assistant, options = load(args, model), engine_options(args)
        path, _ = answer(
            run, model, assistant, examples, slots=args.slots, context=args.context, **options
        )
        predictions = str(path)
    found = score(run, examples, predictions)
    if found is None:
        print(f"{run.directory / 'predictions.tsv'}: {len(examples)} answers for a judge or server")
        return 0
    print("\n".join((*HEAD, markdown_row(found))))
    print(f"{Path(run.directory) / 'results.json'}, {Path(run.out) / 'results.md'}")
    if args.json:
        write_json(args.json, found)
    return 1 if found["failed"] else 0
