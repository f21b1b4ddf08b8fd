"""How many tiles per second the chips of one host eat, and the CPU cores that takes.

From the step time that `hovle plan` wrote where there is one, else from model FLOPs at a given MFU.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.stages import get_stage
from hovle_jax.tpu.aot import teacher_flops

PEAK_FLOPS = {"v5e": 197e12, "v6e": 918e12}  # bfloat16, per chip
HOST_CHIPS = 8  # of v5e-8 and v6e-8


def row_flops(config: RunConfig, tiles: float, context: int) -> float:
    """Model FLOPs of a training step per row of `config.data.tokens`, padding included.

    Args:
      config: The run.
      tiles: Image tiles of the row; the teacher also runs on the empty ones.
      context: Tokens of a sample, for attention.
    """
    stage, model, data = get_stage(config.stage), config.model, config.data
    forward = model.flops_per_token(context)
    # In 'post' models every image token is a block of patches in the holistic layers.
    places = model.patches_per_token if model.shuffle_loc == "post" else 1
    tokens = data.tokens + (places - 1) * tiles * model.tokens_per_tile
    total = 3 * forward["embedding"] * tokens
    if "decoder" in stage.parts:
        trainable = config.trainable or stage.trainable
        # Gradients pass through frozen layers too; they have no weight gradients.
        passes = 3 if re.fullmatch(trainable, "decoder/layers/kernel") else 2
        total += passes * (forward["decoder"] + forward["head"]) * data.tokens
    if stage.teacher:
        total += teacher_flops(config)
    return total


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
    context: int,
    tiles_per_core_second: float,
    *,
    mfu: float = 0.5,
    plan: str = "",
) -> list[dict[str, Any]]:
    """What hosts of eight chips need: one row per host, or the one of the plan's chip."""
    if plan:
        step_seconds, chips, chip = read_plan(plan)
        rates = {chip: config.data.rows * tiles_per_row / step_seconds / chips * HOST_CHIPS}
        source = f"hovle plan, {step_seconds:.3g} s a step on {chips} chips"
    else:
        flops = row_flops(config, tiles_per_row, context)
        rates = {
            chip: peak * HOST_CHIPS * mfu / flops * tiles_per_row
            for chip, peak in PEAK_FLOPS.items()
        }
        source = f"model FLOPs at MFU {mfu:g}"
    return [
        {
            "stage": config.stage,
            "host": f"{chip}-{HOST_CHIPS}",
            "step_time_from": source,
            "tiles_per_second": rate,
            "cores": rate / tiles_per_core_second,
        }
        for chip, rate in rates.items()
    ]
