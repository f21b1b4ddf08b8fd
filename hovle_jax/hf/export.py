"""`hovle export`: write a directory and, if asked to, hold it against the model it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hovle_jax import model
from hovle_jax.checkpoint import open_stored
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
    """Scores of the written directory against those of the source, rounded as it was."""
    prompts = live.made_up_prompts(open_stored(made).model)
    # Each is read once, and the source is gone before the export comes.
    source = _scores(Verifier(model_dir, "float32", options.dtype), prompts)
    verifier = Verifier(made, "float32")
    ours = _scores(verifier, prompts)
    differences = {str(k): float(np.abs(ours[k] - source[k]).max()) for k in live.TILES}
    checks: dict[str, Any] = {
        "scores here, source and export, largest difference by tiles": differences
    }
    if not all(difference == 0 for difference in differences.values()):  # NaN is no pass
        raise UserError(f"{model_dir}: the export's scores differ: {differences}")
    if not live.available():
        checks["PyTorch"] = "not compared: torch and transformers are not installed"
        return checks
    report = live.compare_live(verifier, made)
    checks["PyTorch against here"] = {a.name: a.max_abs for a in report.arrays}
    if not report.passed:
        raise UserError(f"{model_dir}: PyTorch disagrees: {checks['PyTorch against here']}")
    return checks


def _scores(verifier: Verifier, prompts: dict[str, np.ndarray]) -> dict[int, np.ndarray]:
    config, params = verifier.whole_model()
    return {
        tiles: np.asarray(model.apply(params, live.batch_of(prompts, tiles), config)["logits"])
        for tiles in live.TILES
    }
