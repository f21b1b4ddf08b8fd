"""Gradients by the released tensors' names, and recorded ones against them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hovle_jax.config import ModelConfig
from hovle_jax.errors import UserError
from hovle_jax.hf import names
from hovle_jax.hf.cases import EAGER_PADDING, GRADIENTS, Arrays, Comparison, difference
from hovle_jax.tree import flatten


def hub_gradients(config: ModelConfig, grads: Any) -> dict[str, np.ndarray]:
    """Gradients by the released tensors' names; tensors that nothing reads are missing."""
    flat = {k: np.asarray(v) for k, v in flatten(grads).items()}
    out = {}
    for row in names.hovle(config):
        if not row.native:
            continue
        arrays = tuple(flat.pop(path) for path in row.native)
        for i, name in enumerate(row.tensors):
            out[name] = row.to_hf(tuple(a[i] for a in arrays) if row.layers else arrays)
    assert not flat, f"gradients without a name: {sorted(flat)}"
    return out


def compare_gradients(
    z: Arrays, ours: Mapping[str, np.ndarray], kind: str, left: bool
) -> Iterator[Comparison | str]:
    for prefix in ("", "flash."):
        recorded = [
            k for k in z if k.startswith((f"{prefix}{kind}.norms", f"{prefix}{kind}.full."))
        ]
        if left and not prefix:
            yield from (f"{key}: {EAGER_PADDING}" for key in recorded)
            continue
        for key in recorded:
            if key.endswith(".norms"):
                yield from _norms(key, _names_of(z, key), z[key], ours)
            else:
                yield _whole(key, z[key], ours)


def _whole(key: str, expected: np.ndarray, ours: Mapping[str, np.ndarray]) -> Comparison:
    actual = ours.get(key.split(".full.")[1], np.zeros(expected.shape))
    apart = difference(key, actual, expected, GRADIENTS)
    if apart.reason:
        return apart
    scale = float(np.linalg.norm(expected.astype(np.float64))) or 1.0
    return Comparison(key, float(np.linalg.norm(actual - expected)) / scale, GRADIENTS)


def _names_of(z: Arrays, key: str) -> list[str]:
    """Which tensors the norms are of: `gradw.norms` without names of its own has those of grad."""
    own = key.replace(".norms", ".names")
    for name in (own, own.removeprefix("flash."), "grad.names"):
        if name in z:
            names = [str(x) for x in np.ravel(z[name])]
            if z[key].shape != (len(names),):
                raise UserError(f"{key}: {list(z[key].shape)} for the {len(names)} of {name}")
            return names
    raise UserError(f"{key}: there is no {own} that says of which tensors")


def _norms(
    key: str, recorded: Sequence[str], norms: np.ndarray, ours: Mapping[str, np.ndarray]
) -> Iterator[Comparison]:
    found = {k: float(np.linalg.norm(v.astype(np.float64))) for k, v in ours.items()}
    for name in sorted(set(found) - set(recorded)):
        yield Comparison(f"{key}[{name}]", math.inf, GRADIENTS)
    for name, norm in zip(recorded, norms.tolist(), strict=True):
        if np.isnan(norm) or norm == 0:  # no gradient there: none here either
            yield Comparison(f"{key}[{name}]", found.get(name, 0.0), 0.0)
        else:
            yield Comparison(f"{key}[{name}]", abs(found.get(name, 0.0) - norm) / norm, GRADIENTS)
