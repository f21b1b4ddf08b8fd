"""Cases - recorded outputs of another implementation - and the report of comparing them.

A case is an .npz file of named arrays. What a file holds is compared, whatever subset that is:

    in.*      input_ids, attention_mask, position_ids, labels [B, L], pixel_values [T, 3, H, W],
              loss_weight, loss_weight_all
    out.*     vision_embeddings, pixel_shuffle, pixel_shuffle_proj, embed_input, embed_layer_N,
              embed_output, image_embeds, llm_input, llm_layer_N, llm_norm, logits, loss,
              loss_weighted, loss_weighted_all; flash.out.* is the same from a path that masks
              padding, and is preferred where rows are padded on the left
    grad.*    names, norms (NaN: no gradient) and full.<tensor> of out.loss; gradw.* of the weighted
    gen.*     input_ids, attention_mask (prompts), tokens (greedy)

Vision teachers have `SIZE.in.pixel_values`, `SIZE.out.hidden_N` and so on instead
(`Verifier._teacher_case`).
Only places that are not padding are compared.
"""

from __future__ import annotations

import dataclasses
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hovle_jax.config import ModelConfig
from hovle_jax.errors import UserError

Arrays = Mapping[str, np.ndarray]

# float32: the reference's own rounding noise is a third of this (docs/conversion.md).
STATES, LOSSES, GRADIENTS = 1e-4, 1e-5, 1e-4
# bfloat16 keeps 8 bits: after some layers two correct implementations differ by a few of the last.
BFLOAT16_ULPS = 16 / 256

# Why something recorded is not compared.
EAGER_PADDING = "the eager reference attends to left padding; flash.* does not"
PADDED_LENGTH = "dynamic rope follows the padded length in the reference, each row's own here"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One array: the largest difference (of losses: the difference; of gradients: relative to the
    tensor's norm; of tokens: how many differ)."""

    name: str
    max_abs: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.max_abs <= self.tolerance  # False for NaN

    def to_json(self) -> dict[str, Any]:
        # JSON knows no infinity (another shape) and no NaN.
        largest = self.max_abs if math.isfinite(self.max_abs) else None
        return dataclasses.asdict(self) | {"max_abs": largest, "passed": self.passed}


@dataclasses.dataclass(frozen=True)
class CaseReport:
    case: str
    arrays: tuple[Comparison, ...]
    skipped: tuple[str, ...]  # recorded but not comparable, with the reason

    @property
    def passed(self) -> bool:
        return bool(self.arrays) and all(a.passed for a in self.arrays)

    def to_json(self) -> dict[str, Any]:
        arrays = [a.to_json() for a in self.arrays]
        skipped = list(self.skipped)
        return {"case": self.case, "passed": self.passed, "arrays": arrays, "skipped": skipped}


def read_case(path: str | Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as z:
            return {k: z[k] for k in z.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not an .npz of arrays"
        raise UserError(f"{path}: {reason}") from None


def under(z: Arrays, prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in z.items() if k.startswith(prefix)}


def batch_of(z: Arrays, prefix: str, config: ModelConfig) -> dict[str, np.ndarray]:
    """Recorded inputs as a batch: padding gets segment 0, tiles go to the rows they belong to."""
    ids = z[f"{prefix}.input_ids"].astype(np.int32)
    mask = z.get(f"{prefix}.attention_mask", np.ones_like(ids)) > 0
    default = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    positions = np.where(mask, z.get(f"{prefix}.position_ids", default), 0)
    batch = {
        "input_ids": ids,
        "segment_ids": mask.astype(np.int32),
        "position_ids": positions.astype(np.int32),
    }
    if "in.pixel_values" not in z:
        return batch
    pixels = np.moveaxis(z["in.pixel_values"], 1, -1)
    batch["pixels"] = pixels[None]
    counts = tiles_per_row(batch, config)
    if sum(counts) != len(pixels):
        raise UserError(
            f"{prefix}.input_ids: {sum(counts)} tiles of <IMG_CONTEXT> tokens, but "
            f"in.pixel_values holds {len(pixels)}"
        )
    rows = np.zeros((len(ids), max(counts), *pixels.shape[1:]), pixels.dtype)
    for i, row in enumerate(np.split(pixels, np.cumsum(counts)[:-1])):
        rows[i, : len(row)] = row
    return batch | {"pixels": rows}


def tiles_per_row(batch: Mapping[str, np.ndarray], config: ModelConfig) -> list[int]:
    if "pixels" not in batch:
        return [0] * len(batch["input_ids"])
    height, width = batch["pixels"].shape[-3:-1]
    size = config.patch_size * config.shuffle
    tokens = (height // size) * (width // size)
    images = (batch["input_ids"] == config.img_context_id) & (batch["segment_ids"] > 0)
    return [int(n) // tokens for n in images.sum(axis=1)]


def table(reports: Sequence[CaseReport], *, every: bool = False) -> str:
    """What a person reads: one line per array, gradients of one kind folded into the worst."""
    lines = []
    for report in reports:
        lines.append(f"{report.case}: {'ok' if report.passed else 'MISS'}")
        for c in report.arrays if every else _folded(report.arrays):
            verdict = "ok" if c.passed else "MISS"
            lines.append(f"  {c.name:<44} {c.max_abs:>10.2e}  <= {c.tolerance:.0e}  {verdict}")
        reasons: dict[str, list[str]] = {}
        for name, reason in (s.split(": ", 1) for s in report.skipped):
            reasons.setdefault(reason, []).append(name)
        lines += [f"  skipped {', '.join(k)}: {reason}" for reason, k in reasons.items()]
    return "\n".join(lines)


def _folded(arrays: Sequence[Comparison]) -> list[Comparison]:
    out: dict[str, Comparison] = {}
    for c in arrays:
        group = c.name.split("[")[0]
        if group not in out or (c.passed, -c.max_abs) < (out[group].passed, -out[group].max_abs):
            out[group] = c
    return list(out.values())
