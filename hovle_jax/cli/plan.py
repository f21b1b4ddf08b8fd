"""`hovle plan`: what a run would cost on TPUs that are not here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from hovle_jax.cli.common import UsageError, add_command, load_config, no_more
from hovle_jax.errors import UserError
from hovle_jax.output import write_json, writing

# What a core delivered to a stage that reads such data (docs/performance.md, 'Cores a host needs').
TILES_PER_CORE_SECOND = {"unpaired": 59.0, "conversations": 189.0}
DISK_BYTES_PER_SECOND = 1e9  # a host's share of a bucket: an assumption


def _plan(args: argparse.Namespace, rest: list[str]) -> int:
    if args.tabulate:
        no_more("plan --tabulate", rest)
        print(tabulate(Path(args.tabulate)))
        return 0
    for name in ("config", "topology"):
        if not getattr(args, name):
            raise UsageError(f"plan: --{name} is missing")
    for name in ("dump_hlo", "search"):
        if args.fast and getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: compiles; leave out --fast")
    # No TPU is used, so none is looked for: the process may sit on a TPU host or on a laptop.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    config = load_config(args.config, rest)
    from hovle_jax.tpu import aot

    target = aot.topology(args.topology, args.slices)
    more: dict[str, Any] = {}
    if args.search:
        config, plan, more = _search(config, target)
    else:
        plan = aot.outline(config, target) if args.fast else aot.make_plan(config, target)
    body = report(config, target, plan) | more
    print(table(body))
    if args.dump_hlo:
        with writing(args.dump_hlo):
            Path(args.dump_hlo).write_text(plan.text)
    if args.json:
        write_json(args.json, body)
    return 0


def _search(config: Any, target: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(the fastest config, its plan, what was tried, for the report)."""
    from hovle_jax.tpu.search import Trial, search

    def show(trial: Trial) -> None:
        rate = trial.tokens_per_second / len(target.devices) * target.chip.devices_per_chip
        result = f"{rate:,.0f} tokens per chip and second" if rate else trial.reason
        changes = " ".join(f"{k}={v}" for k, v in trial.changes.items())
        print(f"{changes}  {result}", file=sys.stderr, flush=True)

    trials = search(config, target, tried=show)
    best = trials[0]
    print("fastest: " + " ".join(f"--config.{k}={v}" for k, v in best.changes.items()))
    tried = [
        {"changes": t.changes, "tokens_per_second": t.tokens_per_second, "reason": t.reason}
        for t in trials
    ]
    return best.config, best.plan, {"tried": tried}


def add_commands(commands: Any) -> None:
    command = add_command(
        commands,
        "plan",
        _plan,
        "Compile a training step for a TPU topology, without a TPU: memory and estimated time.",
        "hovle plan --config=configs/stage3_instruct.py:hovle_2b --topology=v5e:4x4 "
        "--config.data.rows=16 --config.data.tokens=4096 --config.data.tiles=8",
    )
    command.add_argument("--config", default="", help="FILE.py[:VARIANT]")
    command.add_argument("--topology", default="", help="v5e:16x16, v5p:4x4x8, tpu7x:4x4x4, ...")
    command.add_argument(
        "--slices", type=int, default=1, help="that many of them, joined by network"
    )
    command.add_argument(
        "--fast", action="store_true", help="shapes only: no compilation, no times"
    )
    command.add_argument(
        "--search", action="store_true", help="tries rows, remat, loss chunks and meshes; an hour"
    )
    command.add_argument("--json", default="", metavar="FILE", help="the figures as one object")
    command.add_argument(
        "--tabulate", default="", metavar="DIR", help="only print the --json files there as a table"
    )
    command.add_argument("--dump-hlo", default="", metavar="FILE", help="the scheduled program")


def report(config: Any, target: Any, plan: Any) -> dict[str, Any]:
    """The JSON object: seconds, bytes and FLOPs of one step, per chip unless it says otherwise.

    `step_seconds` and `mfu` leave exposed communication out, as estimates are compared elsewhere;
    rates, days, chip-hours and cores count it.
    """
    from hovle_jax.stages import get_stage
    from hovle_jax.tpu import aot, chips

    per_chip = target.chip.devices_per_chip
    devices = len(target.devices)
    num_chips = devices // per_chip
    state = aot.state_bytes(config)
    num_hosts = target.slices * chips.num_hosts(target.chip, num_chips // target.slices)
    body: dict[str, Any] = {
        "topology": target.name,
        "slices": target.slices,
        "chips": num_chips,
        "devices_per_chip": per_chip,
        "stage": config.stage,
        "model": config.model.name,
        "rows": config.data.rows,
        "tokens": config.data.tokens,
        "tiles": config.data.tiles,
        "remat": config.model.remat,
        "loss_chunk": config.model.loss_chunk,
        "mesh": dataclasses.asdict(config.mesh),
        "hbm": {k: v and v * per_chip for k, v in dataclasses.asdict(plan.memory).items()},
        "model_flops_per_chip": plan.model_flops * per_chip,
        "state_bytes": state,
        "checkpoint_write_seconds": state / DISK_BYTES_PER_SECOND / num_hosts,
    }
    if plan.cost is None:
        return body
    cost, seconds = plan.cost, plan.cost.step_seconds
    whole = seconds + cost.exposed_seconds  # what a person plans with waits for the network, too
    peak = target.chip.peak_flops
    tiles = config.data.rows * config.data.tiles
    rate = TILES_PER_CORE_SECOND[get_stage(config.stage).data]
    body |= {
        "hardware_flops_per_chip": (cost.matrix_flops + cost.kernel_flops) * per_chip,
        "pallas_flops_per_chip": cost.kernel_flops * per_chip,
        "step_seconds": seconds,
        "parts": {
            "matrix_seconds": cost.matrix_seconds,
            "vector_seconds": cost.vector_seconds,
            "kernel_seconds": cost.kernel_seconds,
            "exposed_communication_seconds": cost.exposed_seconds,
            "hidden_communication_seconds": cost.hidden_seconds,
        },
        "mfu": plan.model_flops / (peak * seconds),
        "mfu_with_exposed_communication": plan.model_flops / (peak * whole),
        "tokens_per_chip_second": config.data.rows * config.data.tokens / whole / num_chips,
        "tiles_per_chip_second": tiles / whole / num_chips,
        "days": config.steps * whole / 86400,
        "chip_hours": config.steps * whole / 3600 * num_chips,
        "host_cores": math.ceil(tiles / whole / rate),
        "collectives": _collectives(cost),
        "compile_seconds": plan.compile_seconds,
        "fingerprint": plan.fingerprint,
    }
    return body


STAGES = {"distill": "I", "align": "II", "instruct": "III"}


def tabulate(directory: Path) -> str:
    """Markdown, a line for every compiled plan among the JSON files of a directory."""
    names = "model | stage | topology | rows a chip, tokens + tiles | remat, loss chunk | "
    names += "HBM peak, GiB | step, s | matrix + vector + attention | exposed | MFU, all in | "
    names += "days, chip-h"
    lines = [f"| {names} |", "|" + "---|" * 11]
    plans = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    order = {key: i for i, key in enumerate(STAGES)}

    def place(p: dict[str, Any]) -> tuple[Any, ...]:
        chip = p["topology"].partition(":")[0]
        return p["model"], order.get(p["stage"], 9), chip.startswith("tpu"), chip, p["chips"]

    for p in sorted(plans, key=place):
        if "step_seconds" not in p:
            continue
        parts, hbm, seconds = p["parts"], p["hbm"], p["step_seconds"]
        exposed = parts["exposed_communication_seconds"] / seconds
        cells = (
            p["model"],
            STAGES.get(p["stage"], p["stage"]),
            p["topology"] + (f" x {p['slices']}" if p["slices"] > 1 else ""),
            f"{p['rows'] / p['chips']:g}, {p['tokens']:,} + {p['tiles']}",
            f"{p['remat']}, {p['loss_chunk']:,}",
            f"{hbm['peak'] / 2**30:.1f} of {hbm['limit'] / 2**30:.2f}",
            f"{seconds:.3f}",
            " + ".join(f"{parts[f'{k}_seconds']:.3f}" for k in ("matrix", "vector", "kernel")),
            f"{100 * exposed:.1f} %",
            f"{p['mfu']:.3f}, {p['mfu_with_exposed_communication']:.3f}",
            f"{p['days']:.2f}, {p['chip_hours']:,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _collectives(cost: Any) -> list[dict[str, Any]]:
    """One row per kind and group."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for c in cost.collectives:
        empty = {"count": 0, "bytes": 0.0, "seconds": 0.0, "exposed_seconds": 0.0}
        row = rows.setdefault((c.kind, c.group), {"kind": c.kind, "group": c.group} | empty)
        row["count"] += c.times
        row["bytes"] += c.bytes * c.times
        row["seconds"] += c.seconds
        row["exposed_seconds"] += c.exposed
    return sorted(rows.values(), key=lambda row: -row["seconds"])


def table(body: dict[str, Any]) -> str:
    """The same for people."""

    def gib(x: float | None) -> str:
        return "-" if x is None else f"{x / 2**30:.2f} GiB"

    slices = f" x {body['slices']}" if body["slices"] > 1 else ""
    hbm = body["hbm"]
    lines = [
        f"{body['model']} {body['stage']} on {body['topology']}{slices}, {body['chips']} chips",
        f"  memory per chip     arguments {gib(hbm['arguments'])}, temporaries "
        f"{gib(hbm['temporaries'])}, peak {gib(hbm['peak'])} of {gib(hbm['limit'])}",
        f"  model FLOPs         {body['model_flops_per_chip'] / 1e12:.2f} T per chip and step",
        f"  checkpoint          {gib(body['state_bytes'])}, written in "
        f"{body['checkpoint_write_seconds']:.0f} s at 1 GB/s per host",
    ]
    if "step_seconds" not in body:
        return "\n".join(lines)
    parts, seconds = body["parts"], body["step_seconds"]
    exposed = parts["exposed_communication_seconds"]
    lines += [
        f"  step, estimated     {seconds:.4f} s: matrix units {parts['matrix_seconds']:.4f}, "
        f"vector and memory {parts['vector_seconds']:.4f}, attention {parts['kernel_seconds']:.4f}",
        f"  communication       exposed {exposed:.4f} s ({exposed / seconds:.1%} of the step), "
        f"hidden {parts['hidden_communication_seconds']:.4f} s",
    ]
    for c in body["collectives"]:
        lines.append(
            f"    {c['kind']:<18} of {c['group']:<4} {c['count']:>5} x {c['bytes'] / 1e9:8.3f} GB "
            f"{c['seconds']:.4f} s, {c['exposed_seconds']:.4f} exposed"
        )
    lines += [
        f"  MFU, estimated      {body['mfu']:.3f}, "
        f"{body['mfu_with_exposed_communication']:.3f} with exposed communication",
        f"  throughput          {body['tokens_per_chip_second']:,.0f} tokens and "
        f"{body['tiles_per_chip_second']:.1f} tiles per chip and second",
        f"  the whole stage     {body['days']:.1f} days, {body['chip_hours']:,.0f} chip-hours",
        f"  data                {body['host_cores']} cores of all hosts decode and resize",
        f"  compiled in {body['compile_seconds']:.0f} s, fingerprint {body['fingerprint']}",
    ]
    return "\n".join(lines)
