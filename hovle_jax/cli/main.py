"""`hovle`: one console script, one function per subcommand.

Exit status: 0 done, 1 an error (one line), 2 usage, 75 preempted with a checkpoint saved: run the
same command again.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hovle_jax import __version__
from hovle_jax.cli import bench as cli_bench
from hovle_jax.cli import checkpoint as cli_checkpoint
from hovle_jax.cli import data as cli_data
from hovle_jax.cli import eval as cli_eval
from hovle_jax.cli import plan as cli_plan
from hovle_jax.cli import serve as cli_serve
from hovle_jax.cli.common import UsageError, add_command, add_hosts, load_config, no_more
from hovle_jax.errors import UserError
from hovle_jax.output import check_place, write_json
from hovle_jax.run import preemption

EXIT_ERROR, EXIT_USAGE, EXIT_PREEMPTED = 1, 2, 75


def _train(args: argparse.Namespace, rest: list[str]) -> int:
    config = load_config(args.config, rest)
    with preemption.listening():  # importing and connecting take seconds, too
        status = _train_on(args, config)
    import jax

    if jax.process_count() > 1:
        preemption.ignore()
    return status


def _train_on(args: argparse.Namespace, config: Any) -> int:
    from hovle_jax.run import hosts
    from hovle_jax.run.profiler import parse_window
    from hovle_jax.run.replay import replay
    from hovle_jax.train import Preempted, train

    window = parse_window(args.profile)
    hosts.connect(
        args.coordinator, args.processes, args.process, args.start_timeout, args.dead_after
    )
    try:
        if args.replay_step:
            done = replay(config, args.workdir, args.replay_step)
            print(f"steps {done[0]} to {done[-1]}: as recorded, bit for bit")
            return 0
        train(config, args.workdir, profile=window)
    except Preempted as reason:
        print(f"preempted: {reason}; run the same command again", file=sys.stderr)
        return EXIT_PREEMPTED
    except Exception as error:
        hosts.fail(error, traceback=args.debug)
        raise
    print(f"{config.stage}: {config.steps} steps done, result in {args.workdir}")
    return 0


def _plot(args: argparse.Namespace, rest: list[str]) -> int:
    no_more("plot", rest)
    from hovle_jax.run.plot import goodput_table, read_run, write_plot

    runs = [read_run(directory) for directory in args.run_dirs]
    out = Path(args.out or Path(args.run_dirs[0]) / "plot.png")
    write_plot(out, runs)
    print(goodput_table(runs))
    print(f"wrote {out}")
    if args.json:
        write_json(args.json, {run.name: run.seconds for run in runs})
    return 0


def _demo(args: argparse.Namespace, rest: list[str]) -> int:
    no_more("demo", rest)
    from hovle_jax.demo.run import run_demo

    run_demo(args.out, seed=args.seed, ablations=args.ablations)
    return 0


def _study(args: argparse.Namespace, rest: list[str]) -> int:
    no_more("study", rest)
    from hovle_jax.study.plan import read_study
    from hovle_jax.study.report import markdown
    from hovle_jax.study.run import run_study

    name = Path(args.file).stem
    body = run_study(read_study(args.file), args.out, lambda x: print(x, flush=True), name)
    print(f"\n{markdown(body)}\nwrote {args.out}/{name}.json, {name}.md and {name}.png")
    return 0


def _import(args: argparse.Namespace, rest: list[str]) -> int:
    no_more("import", rest)
    from hovle_jax.hf.importer import import_directory

    for directory in import_directory(args.hf_dir, args.out_dir, args.plugin):
        print(f"wrote {directory}")
    return 0


def _export(args: argparse.Namespace, rest: list[str]) -> int:
    no_more("export", rest)
    from hovle_jax.hf import export
    from hovle_jax.hf.writer import ExportOptions, parse_size

    options = ExportOptions(
        flavour=args.flavour,
        dtype=args.dtype,
        max_shard_bytes=parse_size(args.max_shard_size),
        assets=args.assets,
        license=args.license,
    )
    for remark in export.export(args.model_dir, args.out_dir, options, verify=args.verify):
        print(f"note: {remark}", file=sys.stderr)
    print(f"wrote {args.out_dir}")
    return 0


def _verify(args: argparse.Namespace, rest: list[str]) -> int:
    no_more("verify", rest)
    if not args.cases and not args.live:
        raise UsageError("verify: needs recorded cases or --live HF_DIR")
    from hovle_jax.hf.cases import table
    from hovle_jax.hf.live import compare_live
    from hovle_jax.hf.verify import Verifier

    reports = []
    verifier = Verifier(args.model_dir, args.dtype if args.cases else "float32")
    if args.live:
        verifier.whole_model()  # before any work
    if args.cases:
        for case in args.cases:
            reports.append(verifier.case(case))
            print(table(reports[-1:], every=args.all), flush=True)
    if args.live:
        if verifier.dtype != "float32":
            verifier = Verifier(args.model_dir, "float32")
        reports.append(compare_live(verifier, args.live))
        print(table(reports[-1:], every=args.all))
    passed = all(report.passed for report in reports)
    if args.json:
        cases = [report.to_json() for report in reports]
        write_json(args.json, {"passed": passed, "cases": cases})
    return 0 if passed else EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hovle", description="HoVLE in JAX: train, inspect and talk to models."
    )
    parser.add_argument("--version", action="version", version=f"hovle-jax {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add = functools.partial(add_command, commands)

    demo = add(
        "demo",
        _demo,
        "Train the three stages on real handwritten digits and evaluate them.",
        "hovle demo --out runs/demo",
    )
    demo.add_argument("--out", default="runs/demo", help="directory of the results")
    demo.add_argument("--seed", type=int, default=0, help="of data, weights and order")
    demo.add_argument("--ablations", action="store_true", help="also without stage I, and III only")

    study = add(
        "study",
        _study,
        "Compare variants of the three stages over seeds on small tasks; resumes after a kill.",
        "hovle study configs/studies/stages.py --out runs/studies",
    )
    study.add_argument("file", metavar="FILE.py", help="its get_study() says what is compared")
    study.add_argument("--out", default="runs/studies", metavar="DIR", help="of the results")

    train = add(
        "train",
        _train,
        "Run one stage; resumes if --workdir holds a checkpoint. --config.a.b=VALUE overrides.",
        "hovle train --config=configs/stage1_distill.py:hovle_2b --workdir=runs/stage1 "
        "--config.data.rows=64",
    )
    train.add_argument("--config", required=True, help="FILE.py[:VARIANT]")
    train.add_argument(
        "--workdir", required=True, help="checkpoints and metrics; the same on all hosts"
    )
    add_hosts(train)
    traced = train.add_argument("--profile", default="", metavar="START:COUNT")
    traced.help = "trace these steps into WORKDIR/profile, for xprof"
    again = train.add_argument("--replay-step", type=int, metavar="K")
    again.help = "train nothing: do the steps up to K again and compare every bit with the record"

    plot = add(
        "plot",
        _plot,
        "One picture of runs: losses, gradients, speed, and where the time went.",
        "hovle plot runs/stage2 runs/stage2_other_lr --out compare.png",
    )
    plot.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="work directory")
    plot.add_argument("--out", default="", metavar="FILE", help="default: RUN_DIR/plot.png")
    plot.add_argument("--json", default="", metavar="FILE", help="seconds of every phase")

    for module in (cli_plan, cli_data, cli_bench, cli_checkpoint):
        module.add_commands(commands)

    imported = add(
        "import",
        _import,
        "Hugging Face directory (HoVLE, InternVL, InternLM2, Llama, Qwen) -> native directory.",
        "hovle import HoVLE runs/released",
    )
    imported.add_argument("hf_dir", metavar="HF_DIR", help="config.json and safetensors")
    imported.add_argument(
        "out_dir", metavar="OUT_DIR", help="an InternVL gives OUT_DIR/{llm,teacher}"
    )
    imported.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="a module or .py file that adds an LLM family; becomes one of model.plugins",
    )

    export = add(
        "export",
        _export,
        "Model -> complete Hugging Face directory that needs only torch and transformers.",
        "hovle export runs/stage3 exported --dtype bfloat16 --verify",
    )
    export.add_argument("model_dir", metavar="MODEL_DIR", help="of a run or a model")
    export.add_argument("out_dir", metavar="OUT_DIR", help="new, or empty")
    export.add_argument(
        "--flavour",
        choices=("reference", "fused"),
        default="reference",
        help="reference: the released tensor names; fused: both stacks as one Llama",
    )
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="", help="default: as stored"
    )
    export.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a safetensors file"
    )
    export.add_argument(
        "--assets", default="", metavar="HF_DIR", help="tokenizer files to copy byte for byte"
    )
    export.add_argument("--license", default="other", help="of the weights, for the model card")
    export.add_argument(
        "--verify", action="store_true", help="compare scores, in PyTorch too if it is installed"
    )

    verify = add(
        "verify",
        _verify,
        "Compare a model with recorded outputs of another implementation; status 1 on a miss.",
        "hovle verify HoVLE cases/*.npz --json report.json",
    )
    verify.add_argument("model_dir", metavar="MODEL_DIR", help="native or Hugging Face")
    verify.add_argument("cases", nargs="*", metavar="CASE.npz", help="recorded outputs")
    verify.add_argument("--json", default="", metavar="FILE", help="every comparison")
    verify.add_argument(
        "--all", action="store_true", help="every gradient, not the worst of a kind"
    )
    verify.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="", help="default: the weights' own"
    )
    verify.add_argument("--live", default="", metavar="HF_DIR", help="run HF_DIR in PyTorch")

    for module in (cli_serve, cli_eval):
        module.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args, rest = _parser().parse_known_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # What libraries log as errors they also raise; it would bury the one line that helps.
    logging.getLogger("absl").setLevel(logging.ERROR if args.debug else logging.CRITICAL)
    try:
        for name in ("json", "png"):
            if path := getattr(args, name, ""):
                check_place(path)
        return int(args.run(args, rest))
    except UsageError as error:
        print(f"hovle: {error}", file=sys.stderr)
        return EXIT_USAGE
    except UserError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
