"""`hovle export`: write a directory and, if asked to, hold it against the model it came from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hovle_jax import model
from hovle_jax.errors import UserError
from hovle_jax.hf import live
from hovle_jax.hf.verify import Verifier
from hovle_jax.hf.writer import ExportOptions, write_directory


def export(
    model_dir: str | Path,
    out: str | Path,
    options: ExportOptions,
    *,
    verify: bool = False,
) -> list[str]:
    """Writes OUT; returns remarks about what could not be included.

    Raises:
      UserError: a model that is not whole or cannot be written in this flavour; a full disk; with
        `verify`, scores that differ.
    """
    check = (lambda made: _check(model_dir, made, options)) if verify else None
    return write_directory(model_dir, out, options, check)


def _check(model_dir: str | Path, made: Path, options: ExportOptions) -> dict[str, Any]:
    """Scores of the written directory against the source's (bfloat16 exports: against a bfloat16
    source's own rounding there is nothing exact to hold them to, so only PyTorch is compared)."""
    prompts = live.made_up_prompts(Verifier(made, "float32").whole_model()[0])
    checks: dict[str, Any] = {}
    ours = _scores(made, prompts)
    source = _scores(model_dir, prompts)
    differences = {k: float(np.abs(ours[k] - source[k]).max()) for k in ours}
    checks["scores here, source and export, largest difference by tiles"] = differences
    limit = math.inf if options.dtype == "bfloat16" else 0.0  # which rounds
    if not all(difference <= limit for difference in differences.values()):  # NaN is no pass
        raise UserError(f"{made}: scores differ from the source's: {differences}")
    if not live.available():
        checks["PyTorch"] = "not compared: torch and transformers are not installed"
        return checks
    report = live.compare_live(made, made)
    checks["PyTorch against here"] = {a.name: a.max_abs for a in report.arrays}
    if not report.passed:
        raise UserError(f"{made}: PyTorch disagrees: {checks['PyTorch against here']}")
    return checks


def _scores(directory: str | Path, prompts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    config, params = Verifier(directory, "float32").whole_model()
    out = {}
    for key in (k for k in prompts if k.startswith("ids.")):
        tiles = key.removeprefix("ids.")
        batch = {"input_ids": jnp.asarray(prompts[key][None], jnp.int32)}
        if f"pixels.{tiles}" in prompts:
            batch["pixels"] = jnp.asarray(np.moveaxis(prompts[f"pixels.{tiles}"], 1, -1)[None])
        out[tiles] = np.asarray(model.apply(params, batch, config)["logits"])
    return out
