"""`hovle bench overhead`: what watching a run costs: metrics, guards, asynchronous checkpoints.

`train` itself runs, and every few steps hands over to a bare loop on the same program and data
(next batch, step, the loss of the step before): turns of the one and of the other. Every other turn
of `train` ends with a checkpoint and lasts until that is finished.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from hovle_jax import sharding
from hovle_jax.bench import synthetic
from hovle_jax.checkpoint import latest_step
from hovle_jax.config import InitConfig, RunConfig
from hovle_jax.errors import UserError
from hovle_jax.run.prepare import open_run
from hovle_jax.train import train
from hovle_jax.train_step import TrainState

Times = tuple[float, float]  # wall, CPU seconds


class Bare:
    """The least that trains."""

    def __init__(self, config: RunConfig, workdir: Path):
        self._run = open_run(config, workdir, quiet=True)
        with jax.set_mesh(self._run.mesh):
            self._state, self._frozen, cursor = self._run.fresh()
            self._step = self._run.program()
        self._batches = self._run.pipeline.batches(cursor)
        self._place = sharding.batch_sharding(self._run.mesh)

    def turn(self, steps: int) -> Times:
        begin, last = _now(), None
        for _ in range(steps):
            batch = sharding.to_device(next(self._batches)[0], self._place)
            self._state, metrics = self._step(self._state, self._frozen, self._run.teacher, batch)
            if last is not None:
                float(last)
            last = metrics["loss"]
        jax.block_until_ready(self._state)
        return _since(begin)


def run_overhead(config: RunConfig, rounds: int, steps: int) -> dict[str, Any]:
    """The report of `hovle bench overhead`; seconds. Made-up data where the config names none.

    'overhead' is the share that watching adds to a bare step, a checkpoint every
    `config.save_every` steps included; of wall time and of CPU seconds.
    """
    if rounds < 1 or steps < 1 or jax.process_count() > 1:
        raise UserError("hovle bench overhead: one host, --rounds and --steps of at least 1")
    if not config.save_every:
        raise UserError("config.save_every: is 0; how often a checkpoint is saved matters here")
    turns: dict[str, list[Times]] = {"bare": [], "watched": [], "saving": []}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        config, every = _with_data(config, root), config.save_every
        config = dataclasses.replace(
            config,
            steps=2 * steps * (rounds + 1),
            save_every=2 * steps,
            tensorboard=importlib.util.find_spec("tensorboardX") is not None,
        )
        bare, begin = Bare(config, root / "bare"), _now()

        def after_step(step: int, state: TrainState) -> None:
            nonlocal begin
            if step % steps:
                return
            jax.block_until_ready(state)
            saved = step % config.save_every == 0
            while saved and latest_step(root / "run") != step:
                time.sleep(0.01)
            turns["saving" if saved else "watched"].append(_since(begin))
            turns["bare"].append(bare.turn(steps))
            begin = _now()

        train(config, root / "run", quiet=True, after_step=after_step)
    # The first round warms up: files, threads, caches.
    wall, cpu = (
        {name: [t[i] for t in times[len(times) // (rounds + 1) :]] for name, times in turns.items()}
        for i in (0, 1)
    )
    return {
        "model": config.model.name,
        "stage": config.stage,
        "rows": config.data.rows,
        "tokens": config.data.tokens,
        "steps_of_a_turn": steps,
        "rounds": rounds,
        "save_every": every,
        "tensorboard": config.tensorboard,
        "wall": summary(wall, steps, every),
        "cpu": summary(cpu, steps, every),
    }


def _with_data(config: RunConfig, root: Path) -> RunConfig:
    config = dataclasses.replace(config, init=InitConfig(scratch=True))
    if config.data.meta or config.stage == "distill":
        return config
    synthetic.write_data(root / "data", rows=400, sizes=((224, 168),))
    made = synthetic.bench_config(root / "data", config.stage, unpaired=False, model=config.model)
    names = ("meta", "images", "tokenizer", "system")
    made_up = {name: getattr(made.data, name) for name in names}
    data = dataclasses.replace(config.data, **made_up, too_long="drop")
    return dataclasses.replace(config, model=made.model, data=data)


def summary(turns: dict[str, list[float]], steps: int, save_every: int) -> dict[str, Any]:
    """Medians; a checkpoint's cost is what a turn that ends with one takes longer."""
    bare, watched, saving = (statistics.median(turns[k]) for k in ("bare", "watched", "saving"))
    save = saving - watched
    return {
        "bare_step_seconds": bare / steps,
        "watched_step_seconds": watched / steps,
        "checkpoint_seconds": save,
        "overhead_without_checkpoints": watched / bare - 1,
        "overhead": watched / bare - 1 + save / (bare / steps * save_every),
        "turns": turns,
    }


def _now() -> Times:
    return time.perf_counter(), time.process_time()


def _since(begin: Times) -> Times:
    wall, cpu = _now()
    return wall - begin[0], cpu - begin[1]


def overhead_text(report: dict[str, Any]) -> str:
    r = report
    board = "on" if r["tensorboard"] else "off"
    lines = [
        f"{r['model']}, stage {r['stage']}, {r['rows']} x {r['tokens']} tokens; {r['rounds']} "
        f"rounds, turns of {r['steps_of_a_turn']} steps; TensorBoard {board}",
        "                bare step     watched  checkpoint  overhead, and with a checkpoint every "
        f"{r['save_every']} steps",
    ]
    for name in ("wall", "cpu"):
        s = r[name]
        lines.append(
            f"{name:5} seconds {1e3 * s['bare_step_seconds']:8.1f} ms "
            f"{1e3 * s['watched_step_seconds']:8.1f} ms {1e3 * s['checkpoint_seconds']:8.0f} ms "
            f"{s['overhead_without_checkpoints']:10.2%} {s['overhead']:10.2%}"
        )
    return "\n".join(lines)
