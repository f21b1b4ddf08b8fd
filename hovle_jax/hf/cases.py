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
import re
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
NOT_COMPUTED = "nothing here computes it"
PADDED_LENGTH = "dynamic rope follows the padded length in the reference, each row's own here"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One array: the largest difference (of losses: the difference; of gradients: relative to the
    tensor's norm; of tokens: how many differ)."""

    name: str
    max_abs: float
    tolerance: float
    reason: str = ""  # why it could not be compared: it has not passed then

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


# What a case gives, or says about what it records, beside outputs.
_GIVEN = re.compile(
    r"((full|\d+)\.)?in\..*|gen\.(input_ids|attention_mask|position_ids|margin|hd_.*)"
    r"|(flash\.)?gradw?\.names"
)


def outputs(z: Arrays) -> list[str]:
    """The keys of recorded outputs."""
    return [key for key in z if not _GIVEN.fullmatch(key)]


def failed(name: str, tolerance: float, reason: str) -> Comparison:
    return Comparison(name, math.inf, tolerance, reason)


def difference(name: str, ours: np.ndarray, expected: np.ndarray, tolerance: float) -> Comparison:
    """The largest absolute difference."""
    if expected.dtype.kind not in "fiub":
        return failed(name, tolerance, f"recorded as {expected.dtype}, which are no numbers")
    if ours.shape != expected.shape:
        return failed(
            name, tolerance, f"recorded as {list(expected.shape)}, here {list(ours.shape)}"
        )
    apart = np.abs(ours.astype(np.float64) - expected.astype(np.float64))
    return Comparison(name, float(apart.max()) if apart.size else 0.0, tolerance)


def under(z: Arrays, prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in z.items() if k.startswith(prefix)}


def batch_of(z: Arrays, prefix: str, config: ModelConfig) -> dict[str, np.ndarray]:
    """Recorded inputs as a batch: padding gets segment 0, tiles go to the rows they belong to."""
    ids = z[f"{prefix}.input_ids"]
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise UserError(f"{prefix}.input_ids: expected integers [B, L], got {_described(ids)}")
    ids = ids.astype(np.int32)
    for name in ("attention_mask", "position_ids"):
        x = z.get(f"{prefix}.{name}", ids)
        if x.shape != ids.shape or x.dtype.kind not in "iub":
            expected = f"integers {list(ids.shape)} as input_ids"
            raise UserError(f"{prefix}.{name}: expected {expected}, got {_described(x)}")
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
    pixels = channels_last(z["in.pixel_values"], "in.pixel_values", config.patch_size)
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


def channels_last(pixels: np.ndarray, name: str, patch: int) -> np.ndarray:
    """[T, 3, H, W] -> [T, H, W, 3]."""
    good = pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.dtype.kind == "f"
    if not good or pixels.shape[2] % patch or pixels.shape[3] % patch:
        raise UserError(
            f"{name}: expected floats [T, 3, H, W] with multiples of {patch}, got "
            f"{_described(pixels)}"
        )
    return np.moveaxis(pixels, 1, -1)


def _described(x: np.ndarray) -> str:
    return f"{x.dtype} {list(x.shape)}"


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
            why = f" ({c.reason})" if c.reason else ""
            numbers = f"{c.max_abs:>10.2e}  <= {c.tolerance:.0e}"
            lines.append(f"  {c.name:<44} {numbers}  {verdict}{why}")
        reasons: dict[str, list[str]] = {}
        for name, reason in (s.split(": ", 1) for s in report.skipped):
            reasons.setdefault(reason, []).append(name)
        lines += [f"  skipped {_first(k)}: {reason}" for reason, k in reasons.items()]
    return "\n".join(lines)


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more


def _folded(arrays: Sequence[Comparison]) -> list[Comparison]:
    out: dict[str, Comparison] = {}
    for c in arrays:
        group = c.name.split("[")[0]
        if group not in out or (c.passed, -c.max_abs) < (out[group].passed, -out[group].max_abs):
            out[group] = c
    return list(out.values())
