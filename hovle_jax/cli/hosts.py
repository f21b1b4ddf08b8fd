"""Flags of commands that several hosts run together."""

from __future__ import annotations

import argparse


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
