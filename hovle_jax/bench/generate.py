"""`hovle bench generate`: seconds of prefill and seconds per token of decoding."""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hovle_jax import checkpoint, model
from hovle_jax.bench.steps import workload
from hovle_jax.config import ModelConfig
from hovle_jax.engine import Engine, Request
from hovle_jax.errors import UserError
from hovle_jax.tree import flatten

DEFAULT = workload().model  # 61.6M parameters: large enough for memory to set the pace


def run_generate(
    directory: str, prompt: int, new: int, tiles: int, batch: int, repeats: int, dtype: str
) -> dict[str, Any]:
    """Medians over `repeats` runs after one that compiles; random weights without a directory."""
    if directory:
        stored, params = checkpoint.load(directory)
        config = stored.model
    else:
        config = DEFAULT
        params = jax.jit(functools.partial(model.init, config=config))(jax.random.key(0))
    config = dataclasses.replace(config, dtype=dtype or config.dtype)
    requests = [_request(config, prompt, new, tiles, seed) for seed in range(batch)]
    engine = Engine(
        params,
        config,
        slots=batch,
        capacity=prompt + new,
        tiles=tiles,
        chunk=new - 1,
        floor=(prompt, tiles),
    )
    times = [_once(engine, requests) for _ in range(repeats + 1)]
    prefill, decode = (statistics.median(t[i] for t in times[1:]) for i in (0, 1))
    leaves = flatten(params).values()
    return {
        "prefill_seconds": prefill,
        "decode_seconds_per_token": decode / (new - 1),
        "prefill_tokens_per_second": batch * prompt / prefill,
        "decode_tokens_per_second": batch * (new - 1) / decode,
        "compile_seconds": sum(times[0]) - prefill - decode,
        "workload": {
            "model": Path(directory).name if directory else config.name,
            "parameters": sum(x.size for x in leaves),
            "dtype": config.dtype,
            "batch": batch,
            "prompt_tokens": prompt,
            "tiles": tiles,
            "new_tokens": new,
            "repeats": repeats,
        },
        "device": jax.devices()[0].device_kind,
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "jax": jax.__version__,
    }


def _request(config: ModelConfig, prompt: int, new: int, tiles: int, seed: int) -> Request:
    """One image, then random words; no stop token, so every answer is `new` tokens long."""
    rng = np.random.default_rng(seed)
    run = [config.img_context_id] * (config.tokens_per_tile * tiles)
    image = [config.img_start_id, *run, config.img_end_id] if tiles else []
    words = prompt - 1 - len(image)
    if words < 0:
        raise UserError(f"--prompt {prompt}: {tiles} tiles alone take {1 + len(image)} tokens")
    ordinary = min(config.im_end_id, config.img_start_id, config.img_context_id)
    ids = [config.bos_id, *image, *rng.integers(3, ordinary, words)]
    size = config.image_size
    pixels = rng.integers(0, 256, (tiles, size, size, 3)).astype(np.uint8)
    return Request(np.array(ids, np.int32), pixels, new)


def _once(engine: Engine, requests: list[Request]) -> tuple[float, float]:
    """Seconds until every request has its first token, and from there to the last."""
    for request in requests:
        engine.submit(request)
    start = time.perf_counter()
    engine.admit()
    middle = time.perf_counter()
    while engine.running:
        engine.extend()
    return middle - start, time.perf_counter() - middle


def generate_text(report: dict[str, Any]) -> str:
    w = report["workload"]
    return "\n".join(
        [
            f"{w['model']}: {w['parameters']:,} parameters, {w['dtype']}, batch {w['batch']}, "
            f"{w['prompt_tokens']:,} prompt tokens ({w['tiles']} tiles), {w['new_tokens']} new",
            f"prefill  {report['prefill_seconds']:.3f} s  "
            f"({report['prefill_tokens_per_second']:,.0f} tokens/s)",
            f"decode   {report['decode_seconds_per_token'] * 1e3:.2f} ms a token  "
            f"({report['decode_tokens_per_second']:,.1f} tokens/s)",
            f"on {report['device']}, {report['cpu_cores']} cores, medians of {w['repeats']} runs",
        ]
    )
