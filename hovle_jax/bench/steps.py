"""`hovle bench train` and `hovle bench forward`: a step's steady state on the devices here.

The programs are those of training (`train_step.jit_step`, `train_step.make_loss`) on random weights
and a made-up packed batch. With a reference they run in turn with PyTorch (`bench.reference`): the
same weights, the same batch, the same loss, or there is no report.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax import distill, sharding, train_step
from hovle_jax.bench.reference import Reference
from hovle_jax.config import (
    IGNORE,
    DataConfig,
    InitConfig,
    LayersConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
)
from hovle_jax.errors import UserError
from hovle_jax.initialize import initial_params
from hovle_jax.nn import teacher
from hovle_jax.stages import get_stage
from hovle_jax.tpu import aot, chips
from hovle_jax.tree import split

WORK = {"train": ("train",), "forward": ("forward", "forward_backward")}
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
# Of the product that stands for the speed of an unknown device; short, so that on a busy machine
# some of them run undisturbed.
_PEAK_SIDE, _PEAK_TRIES = 1024, 40


def workload() -> RunConfig:
    """61.6M released parameters, one row: one 448-pixel tile among 1,100 tokens; float32."""
    layers = LayersConfig(
        num_layers=4,
        hidden_size=512,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        intermediate_size=2048,
    )
    model = ModelConfig(
        name="bench",
        vocab_size=8000,
        embedding=layers,
        decoder=dataclasses.replace(layers, num_layers=8),
        im_end_id=7992,
        img_start_id=7994,
        img_end_id=7995,
        img_context_id=7996,
        dtype="float32",
        remat="none",
        loss_chunk=2048,
    )
    target = dataclasses.replace(RunConfig().teacher, out_size=512, dtype="float32")
    data = DataConfig(rows=1, tokens=1100, tiles=1)
    return RunConfig(
        stage="instruct", model=model, teacher=target, data=data, mesh=MeshConfig(1, 1, 1)
    )


def made_up_batch(config: RunConfig) -> dict[str, np.ndarray]:
    """A full batch as the pipeline makes it: every row `tiles` samples (at least one) of one tile.

    A sample is BOS, its image and random words; the words are its answer, of weight 1 each.

    Raises:
      UserError: the tiles do not fit into the tokens.
    """
    c, data = config.model, config.data
    rng = np.random.default_rng(config.seed)
    samples, tiles = max(data.tiles, 1), min(data.tiles, 1)
    image = [c.img_start_id, *[c.img_context_id] * c.tokens_per_tile, c.img_end_id] * tiles
    ends = np.linspace(0, data.tokens, samples + 1).astype(int)
    length = int(np.diff(ends).min())
    if length < 2 + len(image):
        raise UserError(
            f"config.data.tokens: {data.tokens} have no room for {data.tiles} tiles of "
            f"{c.tokens_per_tile} tokens and some words"
        )
    shape = (data.rows, data.tokens)
    special = (c.bos_id, c.eos_id, c.pad_id, c.im_end_id)
    marks = (*special, c.img_start_id, c.img_end_id, c.img_context_id)
    words = np.setdiff1d(np.arange(c.text_rows), marks)
    ids = rng.choice(words, shape).astype(np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    labels = np.full(shape, IGNORE, np.int32)
    for number, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True), 1):
        prompt = start + 1 + len(image)
        ids[:, start:prompt] = [c.bos_id, *image]
        segments[:, start:end] = number
        positions[:, start:end] = np.arange(end - start)
        labels[:, prompt:end] = ids[:, prompt:end]
    size = (data.rows, data.tiles, c.image_size, c.image_size, 3)
    return {
        "input_ids": ids,
        "segment_ids": segments,
        "position_ids": positions,
        "labels": labels,
        "loss_weight": (labels != IGNORE).astype(np.float32),
        "source_ids": np.zeros(shape, np.int32),
        "pixels": rng.integers(0, 256, size, np.uint8),
    }


@dataclasses.dataclass
class Program:
    """A compiled step that can be called again and again."""

    call: Callable[[], float]  # one step -> its loss
    model_flops: float
    compile_seconds: float
    peak_bytes: float | None  # by the compiler, per device


def programs(config: RunConfig, work: tuple[str, ...], mesh: Any, params: Any, batch: Any) -> Any:
    """{name of the work: Program}. `params`: of the whole stage; they are not kept."""
    regex = train_step.trainable_regex(config)
    trainable, frozen = split(params, regex)
    teach: Any = {}
    if get_stage(config.stage).teacher:
        where = train_step.teacher_shardings(config, mesh)
        teachers = distill.run_teachers(config)

        def random(key: jax.Array) -> Any:
            return distill.teacher_tree([teacher.init(key, t.config) for t in teachers])

        teach = jax.jit(random, out_shardings=where)(jax.random.key(config.seed))
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    made = {}
    for name in work:
        forward_only = name == "forward"
        flops = aot.model_flops(config, backward=not forward_only)
        if name == "train":
            made[name] = _train(config, mesh, trainable, frozen, teach, batch, flops)
        else:
            fn = _loss(config) if forward_only else jax.value_and_grad(_loss(config))
            made[name] = _pure(fn, (trainable, frozen, teach, batch), flops)
    return made


def _loss(config: RunConfig) -> Callable[..., jax.Array]:
    stage, loss = get_stage(config.stage), train_step.make_loss(config)

    def call(trainable: Any, frozen: Any, teach: Any, batch: Any) -> jax.Array:
        totals = jax.tree.map(jnp.sum, stage.weights(batch, config))
        return loss(trainable, frozen, teach, batch, totals)[0]

    return call


def _compile(jitted: Any, args: Any) -> tuple[Any, float, float | None]:
    lowered = jitted.lower(*args)
    begin = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - begin
    stats = compiled.memory_analysis()
    return compiled, seconds, stats and float(stats.peak_memory_in_bytes)


def _pure(fn: Callable[..., Any], args: Any, flops: float) -> Program:
    compiled, seconds, peak = _compile(jax.jit(fn), args)

    def call() -> float:
        out = jax.block_until_ready(compiled(*args))
        return float(jax.tree.leaves(out)[0])

    return Program(call, flops, seconds, peak)


def _train(
    config: RunConfig, mesh: Any, trainable: Any, frozen: Any, teach: Any, batch: Any, flops: float
) -> Program:
    tx = train_step.make_optimizer(config.optim, config.steps, trainable)
    where = train_step.state_shardings(config, mesh)
    # A copy, not the parameters: the step donates its state.
    start = jax.jit(lambda p: train_step.new_state(p, tx), out_shardings=where)
    state = start(jax.tree.map(jnp.copy, trainable))
    args = (frozen, teach, batch)
    compiled, seconds, peak = _compile(train_step.jit_step(config, mesh), (state, *args))

    def call() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(compiled(state, *args))
        return float(metrics["loss"])

    return Program(call, flops, seconds, peak)


def peak_flops(dtype: str) -> tuple[float, str]:
    """(matrix FLOPs per second of one device, where the figure is from)."""
    if chip := chips.of_kind(jax.devices()[0].device_kind):
        return chip.peak_flops, f"{chip.name}'s bfloat16 peak"
    x = jnp.ones((_PEAK_SIDE, _PEAK_SIDE), dtype)
    product = jax.jit(jnp.matmul)
    seconds = min(_seconds(lambda: product(x, x)) for _ in range(_PEAK_TRIES))
    source = f"a {dtype} product of {_PEAK_SIDE} x {_PEAK_SIDE} matrices, measured here"
    return 2.0 * _PEAK_SIDE**3 / seconds, source


def _seconds(fn: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - begin


def _round(call: Callable[[], float], steps: int) -> tuple[float, float]:
    """(wall, CPU) seconds per step."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        call()
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def run_steps(
    kind: str,
    config: RunConfig,
    *,
    rounds: int = 5,
    steps: int = 3,
    reference: Callable[[RunConfig, Any, Any], Reference] | None = None,
) -> dict[str, Any]:
    """The report of `hovle bench train | forward`. Times in seconds, memory in bytes.

    kind: a key of WORK. reference: (config, parameters, batch) -> the PyTorch side; it takes a
      turn after each of ours.

    Raises:
      UserError: settings that do not work here; another loss than the reference's.
    """
    if rounds < 1 or steps < 1:
        raise UserError("--rounds and --steps must be at least 1")
    config = dataclasses.replace(config, init=InitConfig(scratch=True))
    mesh = sharding.make_mesh(config.mesh)
    train_step.check_batch(config, mesh)
    batch = made_up_batch(config)
    load = [os.getloadavg()[0]]
    peak, source = peak_flops(config.model.dtype)
    with jax.set_mesh(mesh):
        params = initial_params(config, get_stage(config.stage), mesh)
        other = reference(config, params, batch) if reference else None
        try:
            made = programs(config, WORK[kind], mesh, params, batch)
            measured = {
                name: _measure(name, program, config, rounds, steps, other)
                for name, program in made.items()
            }
        finally:
            if other is not None:
                other.close()
    peak = max(peak, peak_flops(config.model.dtype)[0])
    load.append(os.getloadavg()[0])
    devices = jax.devices()
    tokens = config.data.rows * config.data.tokens
    for name, program in made.items():
        seconds = measured[name]["step_seconds"]
        measured[name] |= {
            "tokens_per_second": tokens / seconds,
            "model_flops": program.model_flops,
            "mfu": program.model_flops / (seconds * peak * mesh.size),
        }
    stats = devices[0].memory_stats() or {}
    return {
        "device": devices[0].device_kind,
        "devices": mesh.size,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "load": load,
        "stage": config.stage,
        "model": config.model.name,
        "parameters": config.model.params(),
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "rows": config.data.rows,
        "tokens": config.data.tokens,
        "tiles": config.data.tiles,
        "peak_flops": peak,
        "peak_flops_from": source,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
        "reference": other.description if other else None,
        "work": measured,
    }


def _measure(
    name: str,
    program: Program,
    config: RunConfig,
    rounds: int,
    steps: int,
    other: Reference | None,
) -> dict[str, Any]:
    loss = program.call()
    if other is not None:
        check_loss(name, loss, other.run(name, 1)["loss"], config.model.dtype)
    program.call()
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(_round(program.call, steps))
        if other is not None:
            turn = other.run(name, steps)
            theirs.append((turn["seconds"], turn["cpu_seconds"]))
    report: dict[str, Any] = {
        **_summary(ours),
        "compile_seconds": program.compile_seconds,
        "program_peak_bytes": program.peak_bytes,
        "loss": loss,
    }
    if other is not None:
        wall, cpu = ([t[i] / o[i] for o, t in zip(ours, theirs, strict=True)] for i in range(2))
        report["reference"] = {
            **_summary(theirs),
            "ratio": float(np.median(wall)),
            "ratios": wall,
            "cpu_ratio": float(np.median(cpu)),
        }
    return report


def _summary(turns: list[tuple[float, float]]) -> dict[str, Any]:
    wall, cpu = (float(x) for x in np.median(turns, axis=0))
    return {"step_seconds": wall, "cpu_seconds": cpu, "round_seconds": [t[0] for t in turns]}


def check_loss(name: str, ours: float, theirs: float, dtype: str) -> None:
    """Raises UserError unless both did the same work."""
    if not abs(ours - theirs) <= LOSS_TOLERANCE[dtype]:
        raise UserError(
            f"--reference: {name}: the loss is {theirs:.6f} there and {ours:.6f} here: not the "
            "same work, so not timed"
        )


def steps_text(report: dict[str, Any]) -> str:
    """The report as a table."""
    r = report
    lines = [
        f"{r['model']}, {r['parameters'] / 1e6:.1f}M parameters, stage {r['stage']}, {r['dtype']}, "
        f"remat {r['remat']}: {r['rows']} x {r['tokens']} tokens, {r['tiles']} tiles a row",
        f"{r['devices']} x {r['device']}, {r['cpu_cores']} CPU cores, load {r['load'][0]:.1f} to "
        f"{r['load'][1]:.1f}; {r['peak_flops'] / 1e12:.3g} TFLOP/s ({r['peak_flops_from']})",
    ]
    for name, w in r["work"].items():
        lines.append(
            f"{name:17} {1e3 * w['step_seconds']:9.1f} ms  {w['tokens_per_second']:10,.0f} "
            f"tokens/s  MFU {w['mfu']:.3f}  compiled in {w['compile_seconds']:.1f} s"
            + _memory(w["program_peak_bytes"], "by the compiler")
        )
        if "reference" in w:
            ratios = w["reference"]["ratios"]
            lines.append(
                f"{'  PyTorch':17} {1e3 * w['reference']['step_seconds']:9.1f} ms  "
                f"ratio {w['reference']['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
                f"of CPU seconds {w['reference']['cpu_ratio']:.2f}"
            )
    if r["reference"]:
        lines.append(f"PyTorch: {r['reference']}")
    if r["device_peak_bytes"]:
        lines.append("most memory in use" + _memory(r["device_peak_bytes"], "by the device"))
    return "\n".join(lines)


def _memory(size: float | None, source: str) -> str:
    return f"  {size / 2**30:.2f} GiB ({source})" if size else ""
