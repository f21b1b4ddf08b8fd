"""Answers to a batch of prompts of different lengths: one prefill, one compiled loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hovle_jax.config import ModelConfig
from hovle_jax.errors import UserError
from hovle_jax.generation.engine import BUCKET, Engine, Request, bucket, slot_groups
from hovle_jax.generation.sampling import Sampling


def generate(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[np.ndarray],
    tiles: Sequence[np.ndarray],
    *,
    max_new: int,
    stop_ids: Sequence[int] | None = None,
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 (frozen)
    mesh: Any = None,
) -> list[list[int]]:
    """Answers, without the stop token that ended them; greedy unless `sampling` says otherwise.

    prompts: int32 [n_i] each. tiles: uint8 [t_i, H, W, 3] each, in order of appearance (float32
    ones count as normalised). stop_ids: default `<|im_end|>` and the end of text. sampling: of all
    rows, or one for each. Rows do not influence each other. mesh: the devices that share the work;
    default: one.
    """
    stop = tuple(stop_ids if stop_ids is not None else (config.im_end_id, config.eos_id))
    settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    length = bucket(max(len(p) for p in prompts), BUCKET)
    most = max(len(t) for t in tiles)
    engine = Engine(
        params,
        config,
        slots=-(-len(prompts) // slot_groups(mesh)) * slot_groups(mesh),
        capacity=length + max_new,
        tiles=most,
        chunk=max_new,
        stops=len(stop),
        floor=(length, most),
        mesh=mesh,
    )
    out: dict[int, list[int]] = {}
    for i, (prompt, pixels, own) in enumerate(zip(prompts, tiles, settings, strict=True)):
        try:
            out[engine.submit(Request(prompt, pixels, max_new, own, stop))] = []
        except UserError as error:
            raise UserError(f"prompt {i}: {error}") from None
    while engine.waiting or engine.running:
        for progress in engine.step():
            out[progress.number] += progress.tokens
    return list(out.values())
