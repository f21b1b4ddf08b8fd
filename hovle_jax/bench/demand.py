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

HOST_CHIPS = 8  # of v5e-8 and v6e-8


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
    """What hosts of eight chips need: one row per host, or the one of the plan's chip.

    Args:
      planning_seconds: To plan one row. Every worker plans the rows of all hosts: the share of its
        core that this takes is `planning`, not part of `cores`.
    """
    hosts = 1
    if plan:
        step_seconds, count, chip = read_plan(plan)
        hosts = -(-count // HOST_CHIPS)
        rates = {chip: config.data.rows * tiles_per_row / step_seconds / count * HOST_CHIPS}
        source = f"hovle plan, {step_seconds:.3g} s a step on {count} chips"
    else:
        tiles = config.data.rows * tiles_per_row / aot.model_flops(config)  # for a FLOP
        rates = {
            chip: chips.get_chip(chip).peak_flops * HOST_CHIPS * mfu * tiles
            for chip in ("v5e", "v6e")
        }
        source = f"model FLOPs at MFU {mfu:g}"
    return [
        {
            "stage": config.stage,
            "host": f"{chip}-{HOST_CHIPS}",
            "step_time_from": source,
            "tiles_per_second": rate,
            "cores": rate / tiles_per_core_second,
            "hosts": hosts,
            "planning": hosts * rate / tiles_per_row * planning_seconds,
        }
        for chip, rate in rates.items()
    ]
