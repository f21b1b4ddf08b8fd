"""How many tiles per second the chips of one host eat, and the CPU cores that takes.

From the step time that `hovle plan` wrote where there is one, else from model FLOPs at a given MFU.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.tpu import aot, chips


def read_plan(path: str) -> tuple[float, int, str]:
    """(seconds of a step, chips, chip) of a file `hovle plan --json` wrote."""
    try:
        plan = json.loads(Path(path).read_bytes())
        chip, _, shape = plan["topology"].partition(":")
        chips = math.prod(map(int, shape.split("x"))) * int(plan.get("slices", 1))
        return float(plan["step_seconds"]), chips, chip
    except OSError as e:
        raise UserError(f"--plan: {path}: cannot be read ({e.strerror})") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"--plan: {path}: lacks 'step_seconds' or 'topology', which hovle plan --json writes "
            f"({type(e).__name__}: {e})"
        ) from e


def cores(
    config: RunConfig,
    tiles_per_row: float,
    tiles_per_core_second: float,
    *,
    planning_seconds: float,
    mfu: float = 0.5,
    plan: str = "",
) -> list[dict[str, Any]]:
    """What the largest hosts need: one row for each of v5e and v6e, or that of the plan's chip.

    Args:
      planning_seconds: To plan one row. Every worker plans the rows of all hosts: the share of its
        core that this takes is `planning`, not part of `cores`.
    """
    count = 0
    if plan:
        step_seconds, count, chip = read_plan(plan)
        per_chip = {chip: config.data.rows * tiles_per_row / step_seconds / count}
        source = f"hovle plan, {step_seconds:.3g} s a step on {count} chips"
    else:
        of_flop = config.data.rows * tiles_per_row / aot.model_flops(config)
        per_chip = {
            name: chips.get_chip(name).peak_flops * mfu * of_flop for name in ("v5e", "v6e")
        }
        source = f"model FLOPs at MFU {mfu:g}"
    rows = []
    for name, rate in per_chip.items():
        spec = chips.get_chip(name)
        tiles, hosts = rate * spec.host_chips, max(1, -(-count // spec.host_chips))
        rows.append(
            {
                "stage": config.stage,
                "host": spec.host,
                "step_time_from": source,
                "tiles_per_second": tiles,
                "cores": tiles / tiles_per_core_second,
                "hosts": hosts,
                "planning": hosts * tiles / tiles_per_row * planning_seconds,
            }
        )
    return rows
