"""Losses of the held-out records while a run trains: WORKDIR/eval.jsonl."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax import lora, losses, sharding
from hovle_jax.config import RunConfig
from hovle_jax.data.pipeline import HostBatch
from hovle_jax.errors import UserError
from hovle_jax.run.agreement import exchange
from hovle_jax.run.prepare import Run
from hovle_jax.stages import get_stage
from hovle_jax.train_step import param_shardings, stage_shapes, sum_of_groups, teacher_shardings

Params = dict[str, Any]


def jit_sums(config: RunConfig, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    """(trainable, frozen, teacher params, batch) -> {term: float32 [2, max_sources]}: weighted
    losses and weights of each source. Laid out as the training step; no gradient."""
    stage = get_stage(config.stage)
    trainable, frozen = stage_shapes(config)

    def sums(trainable: Params, frozen: Params, teach: Params, batch: Any) -> Params:
        params = lora.join(frozen, trainable, config.lora)

        def of_rows(batch: Any) -> Params:
            values = stage.terms(params, teach, batch, config)
            ids, most = batch["source_ids"], config.data.max_sources

            def both(value: jax.Array, weight: jax.Array) -> jax.Array:
                parts = (value * weight, weight)
                return jnp.stack([losses.sum_by_source(x, ids, most) for x in parts])

            return {k: both(values[k], w) for k, w in stage.weights(batch, config).items()}

        # As many rows at once as training has: what fits there fits here.
        return sum_of_groups(of_rows, config.optim.accumulate, batch)

    return jax.jit(
        sums,
        in_shardings=(
            param_shardings(config, trainable, mesh),
            param_shardings(config, frozen, mesh),
            teacher_shardings(config, mesh) if stage.teacher else {},
            sharding.batch_sharding(mesh),
        ),
        out_shardings=sharding.replicated(mesh),
    )


class HeldOut:
    """One pass over the held-out records, every host its part. Training's input reads on behind."""

    def __init__(self, run: Run, frozen: Params):
        self._run, self._frozen = run, frozen
        self._sums, self._place = jit_sums(run.config, run.mesh), sharding.batch_sharding(run.mesh)

    def losses(self, step: int, params: Params, beat: Callable[[], None]) -> dict[str, Any]:
        """The losses after `step`; {} where no records are held out. Calls `beat` after every
        batch.

        Raises:
          UserError: on every host, if one of them cannot read its records, or does not come.
        """
        if not self._run.config.data.holdout:
            return {}
        begin = time.monotonic()
        total: dict[str, Any] = {}
        pending = None
        for batch in self._batches(step):
            arrays = sharding.to_device(batch, self._place)
            found = self._sums(params, self._frozen, self._run.teacher, arrays)
            total = _added(total, pending)  # of the batch before, while this one is computed
            pending = found
            beat()
        total = _added(total, pending)
        means = {term: s.sum() / max(w.sum(), 1e-6) for term, (s, w) in total.items()}
        row: dict[str, Any] = {"loss": float(sum(means.values()))}
        row |= {f"loss/{term}": float(mean) for term, mean in means.items()}
        for number, name in enumerate(self._run.pipeline.names):
            for term, (sums, weights) in total.items():
                if weights[number]:
                    row[f"source/{name}/loss/{term}"] = float(sums[number] / weights[number])
        return row | {"seconds": time.monotonic() - begin}

    def _batches(self, step: int) -> Iterator[HostBatch]:
        """This host's batches, each when all hosts have theirs."""
        batches, number = self._run.pipeline.held_out(**self._run.share), 0
        while True:
            problem, batch = "", None
            try:
                batch = next(batches, None)
            except UserError as error:
                problem = str(error)
            number += 1
            topic = f"evaluation after step {step}, batch {number}"
            said = exchange(topic, problem, self._run.config.data.timeout)
            if problem := next(filter(None, said.values()), ""):
                raise UserError(problem)
            if batch is None:
                return
            yield batch


def _added(total: dict[str, Any], found: Any) -> dict[str, Any]:
    new = {} if found is None else jax.device_get(found)
    return total | {k: total.get(k, 0.0) + x.astype(np.float64) for k, x in new.items()}
