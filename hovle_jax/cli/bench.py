"""`hovle bench`: how fast the parts are on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from hovle_jax.cli.common import add_command, add_group, load_config, no_more
from hovle_jax.errors import UserError
from hovle_jax.output import write_json


def add_commands(commands: Any) -> None:
    commands = add_group(commands, "bench", __doc__)

    data = add_command(
        commands,
        "data",
        _data,
        "Images, tiles and tokens per CPU core, where the time goes, how many cores a host needs.",
        "hovle bench data --config=configs/stage3_instruct.py:hovle_2b --seconds 30",
    )
    data.add_argument("--config", default="", help="FILE.py[:VARIANT]; default: made-up data")
    data.add_argument("--seconds", type=float, default=10.0, help="per kind of data")
    data.add_argument("--workers", type=int, default=0, help="processes; 0: threads of this one")
    data.add_argument("--mfu", type=float, default=0.5, help="of the device, without --plan")
    data.add_argument("--plan", default="", metavar="FILE", help="what hovle plan --json wrote")

    packing = add_command(
        commands,
        "packing",
        _packing,
        "How full rows get: the plan, first fit and InternVL's buffer on one made-up stream.",
        "hovle bench packing --tokens 8192",
    )
    packing.add_argument("--samples", type=int, default=50_000, help="of the stream")
    packing.add_argument("--tokens", type=int, default=16_384, help="of a row")
    packing.add_argument("--tiles", type=int, default=0, help="of a row; 0: suggested")
    packing.add_argument("--window", type=int, default=1024, help="samples packed together")
    packing.add_argument("--buffer", type=int, default=20, help="open rows of InternVL's packing")
    packing.add_argument("--seed", type=int, default=0, help="of the stream")
    packing.add_argument("--only", default="", metavar="KIND", help="samples of one kind")

    steps = [
        add_command(
            commands,
            kind,
            functools.partial(_steps, kind=kind),
            text,
            example,
        )
        for kind, text, example in (
            (
                "train",
                "A training step in its steady state on the devices that are here: time, MFU.",
                "hovle bench train --stage distill",
            ),
            (
                "forward",
                "The loss, and the loss with its gradient: time, MFU; beside PyTorch if asked.",
                "hovle bench forward --reference mmMamba/hovle --python torch-venv/bin/python",
            ),
        )
    ]
    for command in steps:
        command.add_argument("--config", default="", help="FILE.py[:VARIANT]; default: 61.6M")
        command.add_argument("--stage", default="", help="default: the config's, or instruct")
        command.add_argument("--rounds", type=int, default=5, help="timed; medians are reported")
        command.add_argument("--steps", type=int, default=3, help="of a round")
        command.add_argument(
            "--reference", default="", metavar="DIR", help="public PyTorch code, taking turns"
        )
        command.add_argument("--python", default="", help="interpreter that runs --reference")
        command.add_argument(
            "--attention",
            choices=("eager", "flash"),
            default="eager",
            help="of --reference; flash: PyTorch's fused kernel where flash-attn is missing",
        )

    generate = add_command(
        commands,
        "generate",
        _generate,
        "Seconds of prefill and per token of decoding; without MODEL_DIR, a made-up model.",
        "hovle bench generate --prompt 1100 --new 32",
    )
    generate.add_argument(
        "model_dir", nargs="?", default="", metavar="MODEL_DIR", help="native or Hugging Face"
    )
    generate.add_argument("--prompt", type=int, default=1100, help="tokens, image included")
    generate.add_argument("--new", type=int, default=32, help="tokens")
    generate.add_argument("--tiles", type=int, default=1, help="of each prompt")
    generate.add_argument("--batch", type=int, default=1, help="prompts at a time")
    generate.add_argument("--repeats", type=int, default=5, help="timed; medians are reported")
    generate.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="", help="default: the model's"
    )
    generate.add_argument(
        "--reference", default="", metavar="DIR", help="public PyTorch code, taking turns"
    )
    generate.add_argument("--python", default="", help="interpreter that runs --reference")
    generate.add_argument(
        "--export-python", default="", help="interpreter that runs our export; default: --python"
    )
    generate.add_argument(
        "--attention", choices=("eager", "flash"), default="eager", help="of --reference, as train"
    )

    overhead = add_command(
        commands,
        "overhead",
        _overhead,
        "What metrics, guards and checkpoints add to a step: `train` and a bare loop in turns.",
        "hovle bench overhead --config=configs/stage3_instruct.py:tiny --config.data.rows=8 "
        "--config.data.tokens=512",
    )
    overhead.add_argument("--config", required=True, help="FILE.py[:VARIANT]; made-up data if none")
    overhead.add_argument("--rounds", type=int, default=10, help="turns of each")
    overhead.add_argument("--steps", type=int, default=20, help="of a turn")

    for command in (data, packing, generate, overhead, *steps):
        command.add_argument("--json", default="", metavar="FILE", help="the report as one object")


def _data(args: argparse.Namespace, rest: list[str]) -> int:
    from hovle_jax.bench import data

    if not args.config:
        no_more("bench data", rest)
    config = load_config(args.config, rest) if args.config else None
    report = data.run_data(config, args.seconds, args.workers, args.mfu, args.plan)
    return _show(report, data.data_text(report), args.json)


def _packing(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from hovle_jax.bench import packing

    no_more("bench packing", rest)
    limits = (args.samples, args.tokens, args.tiles, args.window)
    report = packing.run_packing(*limits, args.seed, args.buffer, args.only)
    return _show(report, packing.packing_text(report), args.json)


def _steps(args: argparse.Namespace, rest: list[str], kind: str) -> int:
    from hovle_jax.bench import steps
    from hovle_jax.bench.reference import Reference

    if not args.config:
        no_more(f"bench {kind}", rest)
    config = load_config(args.config, rest) if args.config else steps.workload()
    config = dataclasses.replace(config, stage=args.stage or config.stage)
    reference = functools.partial(
        Reference, args.reference, python=args.python, attention=args.attention
    )
    report = steps.run_steps(
        kind,
        config,
        rounds=args.rounds,
        steps=args.steps,
        reference=reference if args.reference else None,
    )
    return _show(report, steps.steps_text(report), args.json)


def _generate(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from hovle_jax.bench import generate
    from hovle_jax.bench.reference import GenerateReference

    no_more("bench generate", rest)
    shape = (args.prompt, args.new, args.tiles, args.batch, args.repeats)
    for name, value, least in zip(
        ("prompt", "new", "tiles", "batch", "repeats"), shape, (1, 2, 0, 1, 1), strict=True
    ):
        if value < least:
            raise UserError(f"--{name} must be {least} or more, not {value}")

    def reference(*model: Any, work: str) -> GenerateReference:
        python = args.export_python if work == "transformers" else ""
        return GenerateReference(
            args.reference,
            *model,
            work=work,
            python=python or args.python,
            attention=args.attention,
        )

    report = generate.run_generate(
        args.model_dir, *shape, args.dtype, reference if args.reference else None
    )
    return _show(report, generate.generate_text(report), args.json)


def _overhead(args: argparse.Namespace, rest: list[str]) -> int:
    from hovle_jax.bench import overhead

    report = overhead.run_overhead(load_config(args.config, rest), args.rounds, args.steps)
    return _show(report, overhead.overhead_text(report), args.json)


def _show(report: dict[str, Any], text: str, path: str) -> int:
    print(text)
    if path:
        write_json(path, report)
    return 0
