"""`hovle checkpoint`: what a run has saved, whether it is whole, what differs, what can go."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from hovle_jax.cli.common import add_command, add_group, no_more
from hovle_jax.errors import UserError


def add_commands(commands: Any) -> None:
    commands = add_group(commands, "checkpoint", __doc__)

    def add(name: str, run: Any, text: str, example: str) -> argparse.ArgumentParser:
        return add_command(commands, name, functools.partial(_run, run), text, example)

    listing = add("ls", _ls, "The checkpoints of a run.", "hovle checkpoint ls runs/stage2")
    listing.add_argument("workdir", metavar="WORKDIR", help="of a run")

    verify = add(
        "verify",
        _verify,
        "Read every file and compare it with its digest; status 1 names what is damaged.",
        "hovle checkpoint verify runs/stage2",
    )
    verify.add_argument("directory", metavar="DIR", help="work, model or teacher directory")
    verify.add_argument("--step", type=int, default=None, help="default: all of a run")

    diff = add(
        "diff",
        _diff,
        "Which arrays of A differ from B's and by how much; status 1 if any does.",
        "hovle checkpoint diff runs/a/checkpoints/100 runs/b/checkpoints/100",
    )
    for name in ("a", "b"):
        diff.add_argument(name, metavar=name.upper(), help="directory, or WORKDIR/checkpoints/STEP")

    prune = add(
        "prune",
        _prune,
        "Delete old checkpoints; the newest always stays.",
        "hovle checkpoint prune runs/stage2 --keep 3 --keep-every 10000 --dry-run",
    )
    prune.add_argument("workdir", metavar="WORKDIR", help="of a run")
    prune.add_argument("--keep", type=int, required=True, help="so many of the newest stay")
    prune.add_argument("--keep-every", type=int, default=0, help="and multiples of so many steps")
    prune.add_argument(
        "--keep-best", type=int, default=0, help="and those with so many lowest held-out losses"
    )
    prune.add_argument("--damaged", action="store_true", help="also what a run has put aside")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")


def _run(run: Any, args: argparse.Namespace, rest: list[str]) -> int:
    no_more(f"checkpoint {args.checkpoint_command}", rest)
    return int(run(args))


def _ls(args: argparse.Namespace) -> int:
    from hovle_jax.run import checkpoint_tools

    print(checkpoint_tools.table(checkpoint_tools.rows(args.workdir)))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from hovle_jax.run import checkpoint_tools

    found = checkpoint_tools.verify(args.directory, args.step)
    for directory, lines in found.items():
        print(*(lines or [f"{directory}: whole"]), sep="\n")
    if bad := [directory for directory, lines in found.items() if lines]:
        raise UserError(f"{len(bad)} of {len(found)} directories are damaged: {', '.join(bad)}")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from hovle_jax.run import checkpoint_tools

    found, compared = checkpoint_tools.differences(args.a, args.b)
    for difference in found:
        print(f"{difference.name}: {difference.what}")
    print(f"{len(found)} of {compared} arrays differ")
    return 1 if found else 0


def _prune(args: argparse.Namespace) -> int:
    from hovle_jax.run import checkpoint_tools

    gone = checkpoint_tools.prune(
        args.workdir,
        args.keep,
        args.keep_every,
        args.keep_best,
        damaged=args.damaged,
        dry_run=args.dry_run,
    )
    print(*(f"{'would delete' if args.dry_run else 'deleted'} {path}" for path in gone), sep="\n")
    return 0
