"""The settings of a step that cost least on a topology, by compiling candidates.

One compilation a candidate, so few of them: first how many rows a device takes and the lightest
recomputation they fit with, then one setting after another with the rest held. Sizes of attention
blocks are not among them: the estimate cannot see into kernels (docs/performance.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from hovle_jax import sharding
from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.tpu import aot
from hovle_jax.tpu.aot import Plan, Topology
from hovle_jax.typed import changed

ROWS = (1, 2, 4, 8)  # a device
# From keeping everything that helps to recomputing everything: the first that fits is the fastest.
REMAT = ("products", "minimal", "mixed", "full")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate: what it changes of the config ({dotted name: value}) and what came of it."""

    changes: dict[str, Any]
    config: RunConfig
    plan: Plan | None  # None: `reason` says why not
    reason: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Of all devices, exposed communication included; 0 where it does not fit."""
        if self.plan is None or self.plan.cost is None:
            return 0.0
        seconds = self.plan.cost.step_seconds + self.plan.cost.exposed_seconds
        return self.config.data.rows * self.config.data.tokens / seconds


def search(
    config: RunConfig,
    target: Topology,
    *,
    compile_step: Callable[[RunConfig, Topology], Plan] = aot.make_plan,
    tried: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """All candidates, the fastest first.

    tried: called with each as it is known; a candidate takes minutes.

    Raises:
      UserError: none of them fits.
    """
    trials: list[Trial] = []

    def attempt(changes: dict[str, Any]) -> Trial:
        candidate = changed(config, changes, "--search")
        try:
            trial = Trial(changes, candidate, compile_step(candidate, target))
        except UserError as error:
            trial = Trial(changes, candidate, None, str(error))
        trials.append(trial)
        tried(trial)
        return trial

    ways = sharding.batch_ways(aot.mesh_of(config, target))
    lightest = 0  # more rows never fit with less recomputation
    for rows in (ways * n for n in ROWS):
        fits = False
        while not fits and lightest < len(REMAT):
            changes = {"data.rows": rows, "model.remat": REMAT[lightest]}
            fits = attempt(changes).plan is not None
            lightest += not fits
        if not fits:
            break
    best = _fastest(trials, target)
    for choices in (_chunks(config), _meshes(best.config, target)):
        for choice in choices:
            attempt(best.changes | choice)
        best = _fastest(trials, target)
    return sorted(trials, key=lambda t: -t.tokens_per_second)


def _fastest(trials: list[Trial], target: Topology) -> Trial:
    best = max(trials, key=lambda t: t.tokens_per_second)
    if best.plan is None:
        raise UserError(f"--search: nothing fits {target.name}; {trials[-1].reason}")
    return best


def _chunks(config: RunConfig) -> list[dict[str, Any]]:
    """The loss of a row in one piece, in two, or in pieces as small as memory may ask for."""
    tokens = config.data.tokens
    sizes = {tokens, -(-tokens // 2), min(tokens, 512)} - {config.model.loss_chunk}
    return [{"model.loss_chunk": size} for size in sorted(sizes, reverse=True)]


def _meshes(config: RunConfig, target: Topology) -> list[dict[str, Any]]:
    """Other ways to split a slice: replicas of 16 or 64 devices, and pairs sharing a layer."""
    devices = len(target.devices) // target.slices
    sizes = [(devices // n, n, 1) for n in (16, 64) if n < devices and devices % n == 0]
    heads = math.gcd(config.model.decoder.num_kv_heads, config.model.embedding.num_kv_heads)
    if devices % 2 == 0 and heads % 2 == 0 and not config.data.rows % (devices // 2):
        sizes.append((1, devices // 2, 2))
    return [{"mesh.data": d, "mesh.fsdp": f, "mesh.tensor": t} for d, f, t in sizes]
