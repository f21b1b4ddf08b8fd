"""What the commands share: how one is added, configs with their overrides, usage errors."""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hovle_jax.errors import UserError
from hovle_jax.modules import load_module

if TYPE_CHECKING:
    from hovle_jax.config import RunConfig


class UsageError(UserError):
    """A command line that no command understands: exit status 2."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions and examples as they are written; after a flag's help, its default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, value = action.help or "", action.default
        empty = value is False or value in (None, "", [], argparse.SUPPRESS)
        if empty or "default" in text or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)"


def add_command(
    commands: Any, name: str, run: Any, text: str, example: str
) -> argparse.ArgumentParser:
    """A subcommand with its example; `run(args, rest)` gives the exit status."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    command.set_defaults(run=run)
    return command


def add_group(commands: Any, name: str, text: str | None) -> Any:
    """`hovle NAME COMMAND`: what its own commands are added to."""
    group = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    return group.add_subparsers(dest=f"{name}_command", required=True, metavar="COMMAND")


def add_hosts(command: argparse.ArgumentParser) -> None:
    """--coordinator and what belongs to it, as `run.hosts.connect` wants them."""
    command.add_argument(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help="of several hosts, where neither TPU nor Slurm tells; with the next two",
    )
    command.add_argument("--processes", type=int, default=1, help="hosts of the run")
    command.add_argument("--process", type=int, default=0, help="this one, from 0")
    command.add_argument(
        "--start-timeout", type=int, default=300, help="seconds in which all hosts have to come"
    )
    command.add_argument(
        "--dead-after", type=int, default=100, help="seconds of silence that make a host dead"
    )


def no_more(command: str, rest: Sequence[str]) -> None:
    """Refuses arguments that are left over, of a command without a config to override."""
    if rest:
        raise UsageError(f"{command}: unknown argument {rest[0]}")


def load_config(spec: str, overrides: Sequence[str] = ()) -> RunConfig:
    """`FILE.py[:VARIANT]` and `--config.a.b=VALUE` overrides -> RunConfig."""
    from hovle_jax.config import RunConfig

    path, _, variant = spec.partition(":")
    module, given = load_module(path, "--config"), [variant] if variant else []
    make = getattr(module, "get_config", None)
    if not callable(make):
        raise UserError(f"--config: {path} has no function get_config")
    try:
        inspect.signature(make).bind(*given)
    except TypeError as error:
        raise UserError(f"--config: {spec}: get_config: {error}") from None
    config = make(*given)
    for override in overrides:
        _override(config, override)
    return RunConfig.from_config_dict(config)


def _override(config: Any, override: str) -> None:
    key, equals, text = override.partition("=")
    if not key.startswith("--config.") or not equals:
        raise UsageError(f"unknown argument {override}; overrides are --config.a.b=VALUE")
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
