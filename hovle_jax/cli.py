"""`hovle`: one console script, one function per subcommand.

Exit status: 0 done, 1 an error (one line), 2 usage, 75 preempted with a checkpoint saved: run the
same command again.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hovle_jax import __version__
from hovle_jax.errors import UserError

EXIT_ERROR, EXIT_PREEMPTED = 1, 75


def load_config(spec: str, overrides: Sequence[str] = ()) -> Any:
    """`FILE.py[:VARIANT]` and `--config.a.b=VALUE` overrides -> RunConfig."""
    from hovle_jax.config import RunConfig

    path, _, variant = spec.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config: no such file {path}")
    module_spec = importlib.util.spec_from_file_location("hovle_config", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, str(Path(path).resolve().parent))  # configs share files beside them
    try:
        module_spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    config = module.get_config(variant) if variant else module.get_config()
    for override in overrides:
        _override(config, override)
    return RunConfig.from_config_dict(config)


def _override(config: Any, override: str) -> None:
    key, equals, text = override.partition("=")
    if not key.startswith("--config.") or not equals:
        raise SystemExit(_usage(f"unknown argument {override}; overrides are --config.a.b=VALUE"))
    *parents, leaf = key.removeprefix("--config.").split(".")
    node = config
    for name in parents:
        node = node.get(name, None)
        if not hasattr(node, "keys"):
            raise UserError(f"{key[2:]}: unknown config key; {name!r} is no section")
    old = node.get(leaf)
    try:
        value = text if isinstance(old, str) else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    with node.unlocked(), node.ignore_type():  # RunConfig checks names and types, with better words
        node[leaf] = value


def _usage(message: str) -> int:
    print(f"hovle: {message}", file=sys.stderr)
    return 2


def _train(args: argparse.Namespace, rest: list[str]) -> int:
    config = load_config(args.config, rest)
    from hovle_jax.train import Preempted, train

    try:
        train(config, args.workdir)
    except Preempted as reason:
        print(f"preempted: {reason}; run the same command again", file=sys.stderr)
        return EXIT_PREEMPTED
    print(f"{config.stage}: {config.steps} steps done, result in {args.workdir}")
    return 0


def _demo(args: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        return _usage(f"unknown argument {rest[0]}")
    from hovle_jax.demo.run import run_demo

    run_demo(args.out, seed=args.seed, ablations=args.ablations)
    return 0


def _chat(args: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        return _usage(f"unknown argument {rest[0]}")
    from hovle_jax.chat import Assistant, first_question, interactive

    assistant = Assistant.load(args.model_dir)
    if args.prompt is None:
        interactive(assistant, args.image, args.max_new_tokens)
    else:
        question = first_question(args.prompt, args.image)
        print(assistant.answer([question], max_new=args.max_new_tokens)[0])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hovle", description="HoVLE in JAX: train, inspect and talk to models."
    )
    parser.add_argument("--version", action="version", version=f"hovle-jax {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(run=run)
        return command

    demo = add(
        "demo",
        _demo,
        "Train the three stages on real handwritten digits and evaluate them.",
        "hovle demo --out runs/demo",
    )
    demo.add_argument("--out", default="runs/demo", help="directory of the results")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--ablations", action="store_true", help="also without stage I, and III only")

    train = add(
        "train",
        _train,
        "Run one stage; resumes if --workdir holds a checkpoint. --config.a.b=VALUE overrides.",
        "hovle train --config=configs/stage1_distill.py:hovle_2b --workdir=runs/stage1 "
        "--config.data.rows=64",
    )
    train.add_argument("--config", required=True, help="FILE.py[:VARIANT]")
    train.add_argument("--workdir", required=True)

    chat = add(
        "chat",
        _chat,
        "Talk to a trained model about images; without --prompt, interactively.",
        "hovle chat runs/demo/full/instruct --image digit.png --prompt 'Which digit is top-left?'",
    )
    chat.add_argument("model_dir", metavar="MODEL_DIR")
    chat.add_argument("--image", action="extend", nargs="+", default=[], metavar="PATH")
    chat.add_argument("--prompt")
    chat.add_argument("--max-new-tokens", type=int, default=64)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args, rest = _parser().parse_known_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        return int(args.run(args, rest))
    except UserError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
