"""Runs that are killed at random moments end exactly as one that was left alone."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from hovle_jax.checkpoint import read_meta
from tests.chaos import cluster
from tests.chaos.cluster import Launch, last_row, saved, unfinished

PHASES = ("step", "save", "restore", "initialisation")
EVERY = 6


def disturb(config, workdir: Path, kills: list[tuple[str, signal.Signals]], rng) -> None:
    """The run with one kill per start, and a start more to end it."""
    for phase, kill in kills:
        with Launch(config, workdir) as launch:
            first = max([0, *saved(workdir)])
            victim = rng.randrange(2)
            wait_for(phase, launch, first, rng)
            launch.send(victim, kill)
            if phase == "initialisation":
                launch.end_after(victim)  # others may still wait for it to come
            codes = launch.wait()
        check(launch, phase, kill, victim, codes, first)
    cluster.run(config, workdir).done()


def wait_for(phase: str, launch: Launch, first: int, rng) -> None:
    workdir = launch.workdir
    if phase == "initialisation":
        time.sleep(rng.uniform(0.2, 6))
    elif phase == "restore" and first:
        launch.until(lambda: "going on from step" in launch.text(0))
    elif phase == "save":
        after, start = first + rng.randrange(1, EVERY), time.time()
        launch.until(lambda: any(step > after for step in unfinished(workdir, start)))
    else:
        goal = first + rng.randrange(1, 2 * EVERY)
        # Once the run has begun, and has dropped the rows of steps that were lost.
        launch.until(lambda: "of the samples" in launch.text(0) and last_row(workdir) >= goal)


def check(launch: Launch, phase, kill, victim, codes, first) -> None:
    """Nothing that was saved is lost, and SIGTERM loses nothing at all."""
    workdir, what = launch.workdir, (phase, kill.name, victim, codes)
    newest, done = max([0, *saved(workdir)]), last_row(workdir)
    texts = launch.text(0) + launch.text(1)
    assert newest >= first, what
    if kill == signal.SIGKILL:
        assert codes[victim] in (-signal.SIGKILL, 0), what
        # What is being written while the next steps run is not yet saved.
        writing = [step for step in unfinished(workdir) if step > newest]
        late = max(done - max(writing), 0) if writing else 0
        assert done - newest <= EVERY + late, (what, done, newest, writing)
        if phase != "initialisation" and codes[victim]:  # the other ended by itself, and said why
            named = ("lost host", "JAX distributed service")
            assert codes[1 - victim] in (1, -signal.SIGABRT), what
            assert any(x in launch.text(1 - victim) for x in named), (what, texts[-3000:])
    elif -signal.SIGTERM in codes:
        assert phase == "initialisation", what  # the interpreter had not yet begun to listen
    elif codes != [0, 0]:
        assert codes == [75, 75], (what, texts[-3000:])
        assert newest == done or phase in ("restore", "initialisation"), (what, newest, done)
        assert "run the same command again" in launch.text(victim)


def compare(whole: Path, disturbed: Path, steps: int) -> None:
    a, b = (cluster.arrays(workdir, steps) for workdir in (whole, disturbed))
    assert a.keys() == b.keys() and any(k.startswith("optimizer/") for k in a)
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name
    assert any(np.any(x) for k, x in a.items() if k.startswith("optimizer/"))
    metas = [read_meta(epath.Path(w) / "checkpoints" / str(steps)) for w in (whole, disturbed)]
    assert metas[0] == metas[1] and metas[0]["cursor"]["window"] + metas[0]["cursor"]["row"] > 0
    rows = [cluster.timeless(workdir) for workdir in (whole, disturbed)]
    assert [r["step"] for r in rows[1]] == list(range(1, steps + 1))
    assert rows[0] == rows[1]


def mesh(world, stage: str, **changes):
    changes = {"mesh__fsdp": -1, "save_every": EVERY, "init__scratch": True} | changes
    return world.config(stage, **changes)


def test_a_few_kills_change_nothing(world, tmp_path):
    """The short version: stage II, one kill of each kind."""
    config = mesh(world, "align", steps=30)
    cluster.run(config, tmp_path / "whole").done()
    kills = [("save", signal.SIGKILL), ("step", signal.SIGTERM), ("restore", signal.SIGKILL)]
    disturb(config, tmp_path / "disturbed", kills, random.Random(1))
    compare(tmp_path / "whole", tmp_path / "disturbed", 30)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["distill", "align"])
def test_random_kills_change_nothing(stage, world, tmp_path):
    """Ten kills a stage, every phase with both signals; about 25 starts of two processes."""
    rng = random.Random(f"{stage} 7")
    kills = [(phase, kill) for phase in PHASES for kill in (signal.SIGTERM, signal.SIGKILL)]
    kills += [(rng.choice(PHASES), rng.choice((signal.SIGTERM, signal.SIGKILL))) for _ in range(2)]
    rng.shuffle(kills)
    config = mesh(world, stage, steps=90)
    cluster.run(config, tmp_path / "whole").done()
    disturb(config, tmp_path / "disturbed", kills, rng)
    compare(tmp_path / "whole", tmp_path / "disturbed", 90)
