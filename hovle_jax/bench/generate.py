"""`hovle bench generate`: seconds of prefill and seconds per token of decoding.

With a reference, PyTorch answers the same prompt with the same weights in turn: the published code,
and transformers with a cache on our exported directory. Other tokens than ours are an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hovle_jax import checkpoint, model
from hovle_jax.bench.reference import GenerateReference
from hovle_jax.bench.steps import workload
from hovle_jax.config import ModelConfig
from hovle_jax.errors import UserError
from hovle_jax.generation.engine import Engine, Request
from hovle_jax.tree import flatten

DEFAULT = workload().model  # 61.6M parameters: large enough for memory to set the pace


PARTS = ("prefill", "token")
REFERENCE = ("transformers", "public")
# Of the published code each token is a forward pass over all before: a few say what all take.
PUBLIC_TOKENS = 3


@dataclasses.dataclass(frozen=True)
class Turn:
    """One run over: wall and CPU seconds of the prefill and of each later token."""

    prefill: tuple[float, float]
    token: tuple[float, float]


def run_generate(
    directory: str,
    prompt: int,
    new: int,
    tiles: int,
    batch: int,
    repeats: int,
    dtype: str,
    reference: Callable[..., GenerateReference] | None = None,
) -> dict[str, Any]:
    """Medians over `repeats` runs after one that compiles; random weights without a directory.

    reference: (config, parameters, prompt, tiles, work) -> a PyTorch side.

    Raises:
      UserError: settings that do not work here; other tokens than the reference's.
    """
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
    if reference and batch > 1:
        raise UserError("--reference: the published code answers one prompt at a time: --batch 1")
    load = [os.getloadavg()[0]]
    start = time.perf_counter()
    tokens = _once(engine, requests)[1]
    first = time.perf_counter() - start
    turns: dict[str, list[Turn]] = {"ours": []}
    others: dict[str, GenerateReference] = {}
    with contextlib.ExitStack() as stack:
        for name in REFERENCE if reference else ():
            assert reference is not None
            others[name] = reference(
                config, params, requests[0].prompt, requests[0].tiles, work=name
            )
            stack.callback(others[name].close)
            turns[name] = []
        for _ in range(repeats + bool(others)):  # PyTorch has a first time too
            turns["ours"].append(_once(engine, requests)[0])
            for name, other in others.items():
                count = min(PUBLIC_TOKENS, new) if name == "public" else new
                turn, found = _turn(other.run(name, count))
                if found != tokens[:count]:
                    raise UserError(
                        f"--reference: {name} answers {found[:8]}..., not {tokens[:8]}...: not the "
                        "same work, so not timed"
                    )
                turns[name].append(turn)
    turns = {name: found[bool(others) :] for name, found in turns.items()}
    prefill, token = (
        statistics.median(x[0] for x in _column(turns["ours"], part)) for part in PARTS
    )
    leaves = flatten(params).values()
    load.append(os.getloadavg()[0])
    return {
        "prefill_seconds": prefill,
        "decode_seconds_per_token": token,
        "prefill_tokens_per_second": batch * prompt / prefill,
        "decode_tokens_per_second": batch / token,
        "compile_seconds": first - prefill - token * (new - 1),
        "reference": {
            name: _beside(turns["ours"], turns[name], new) | {"description": other.description}
            for name, other in others.items()
        },
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
        "load_average": load,
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


def _clock() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def _once(engine: Engine, requests: list[Request]) -> tuple[Turn, list[int]]:
    """Until every request has its first token, and from there to the last; the first's tokens."""
    numbers = [engine.submit(request) for request in requests]
    start = _clock()
    made = engine.admit()
    middle = _clock()
    while engine.running:
        made += engine.extend()
    last = (_clock() - middle) / (requests[0].max_new - 1)
    tokens = [t for progress in made if progress.number == numbers[0] for t in progress.tokens]
    return Turn(_pair(middle - start), _pair(last)), tokens


def _pair(x: Any) -> tuple[float, float]:
    wall, cpu = x
    return float(wall), float(cpu)


def _turn(answer: dict[str, Any]) -> tuple[Turn, list[int]]:
    """What the worker says of one answer."""
    ticks = np.array([answer["seconds"], answer["cpu_seconds"]])  # [clock, (first, last)]
    later = max(len(answer["tokens"]) - 1, 1)
    return Turn(_pair(ticks[:, 0]), _pair((ticks[:, 1] - ticks[:, 0]) / later)), answer["tokens"]


def _column(turns: list[Turn], part: str) -> list[tuple[float, float]]:
    return [getattr(turn, part) for turn in turns]


def _beside(ours: list[Turn], theirs: list[Turn], new: int) -> dict[str, Any]:
    """Medians of the other side, and of its seconds over ours turn by turn: of prefill, of a later
    token, and of an answer of `new` tokens."""

    def answer(turns: list[Turn]) -> np.ndarray:
        prefill, token = (np.array(_column(turns, part)) for part in PARTS)
        return prefill + (new - 1) * token

    out: dict[str, Any] = {}
    for name, mine, other in (
        *((part, np.array(_column(ours, part)), np.array(_column(theirs, part))) for part in PARTS),
        ("answer", answer(ours), answer(theirs)),
    ):
        (wall, cpu), ratio = np.median(other, axis=0), np.median(other / mine, axis=0)
        out[name] = {
            "seconds": float(wall),
            "cpu_seconds": float(cpu),
            "ratio": float(ratio[0]),
            "cpu_ratio": float(ratio[1]),
            "ratios": (other / mine)[:, 0].tolist(),
        }
    return out


def generate_text(report: dict[str, Any]) -> str:
    w = report["workload"]
    lines = []
    for name, parts in report["reference"].items():
        lines.append(f"{name}: {parts['description']}")
        for part in (*PARTS, "answer"):
            found = parts[part]
            ratios = found["ratios"]
            lines.append(
                f"  {part:8} {found['seconds'] * 1e3:9.1f} ms  ratio "
                f"{found['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), of CPU seconds "
                f"{found['cpu_ratio']:.2f}"
            )
    if report["reference"]:
        low, high = report["load_average"]
        lines.append(f"load {low:.1f} to {high:.1f}")
    return "\n".join(
        [
            f"{w['model']}: {w['parameters']:,} parameters, {w['dtype']}, batch {w['batch']}, "
            f"{w['prompt_tokens']:,} prompt tokens ({w['tiles']} tiles), {w['new_tokens']} new",
            f"prefill  {report['prefill_seconds']:.3f} s  "
            f"({report['prefill_tokens_per_second']:,.0f} tokens/s)",
            f"decode   {report['decode_seconds_per_token'] * 1e3:.2f} ms a token  "
            f"({report['decode_tokens_per_second']:,.1f} tokens/s)",
            f"on {report['device']}, {report['cpu_cores']} cores, medians of {w['repeats']} runs",
            *lines,
        ]
    )
