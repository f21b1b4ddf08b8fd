"""Every fault ends as docs/operations.md says; its table is this file's `FAULTS`."""

from __future__ import annotations

import dataclasses
import re
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from hovle_jax.config import MeshConfig, RunConfig
from hovle_jax.data.pipeline import Pipeline
from hovle_jax.errors import UserError
from hovle_jax.run import hosts
from hovle_jax.run.metrics import read_metrics
from hovle_jax.train import train
from tests.chaos import cluster
from tests.chaos.cluster import Launch
from tests.conftest import World

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"


@dataclasses.dataclass(frozen=True)
class Fault:
    what: str
    ends: str  # for the table
    says: str  # regex over the last line of error
    inject: Callable[[World, Path], str]  # -> that line


def _two(world: World, tmp_path: Path, prelude: str = "", **changes) -> Launch:
    """Two hosts; `prelude` runs on the second one."""
    config = _config(world, **changes)
    return cluster.run(config, tmp_path / "run", prelude={1: prelude}, devices=1)


def _config(world: World, **changes) -> RunConfig:
    changes = {"mesh__fsdp": -1, "steps": 8, "save_every": 3, "init__scratch": True} | changes
    return world.config("align", **changes)


def _disk_full(world: World, tmp_path: Path) -> str:
    """Files of one host may not grow; nothing is frozen, so the first large ones are a save's. Its
    log goes through another process, which may write what tensorstore's threads say meanwhile."""
    limit = (
        "import os, resource, subprocess\n"
        "log = subprocess.Popen(['cat'], stdin=subprocess.PIPE).stdin.fileno()\n"
        "os.dup2(log, 1), os.dup2(log, 2)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
    )
    launch = _two(world, tmp_path, limit, trainable=".*")
    assert launch.wait() == [1, 1]
    assert cluster.saved(tmp_path / "run") == []
    lines = launch.errors()
    assert all("saving step 3" in line for line in lines), lines
    # Room is made, the same command goes on.
    _two(world, tmp_path, trainable=".*").done()
    assert cluster.saved(tmp_path / "run") == [6, 8]
    return lines[0]


def _damaged(world: World, tmp_path: Path, damage: Callable[[Path], None]) -> str:
    _two(world, tmp_path).done()
    newest = tmp_path / "run/checkpoints/8"
    damage(max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size))
    launch = _two(world, tmp_path, steps=9).done()
    assert cluster.saved(tmp_path / "run") == [6, 9]
    assert [r["step"] for r in read_metrics(tmp_path / "run/metrics.jsonl")] == list(range(1, 10))
    return re.findall(r"^warning: .*", launch.text(0), re.M)[-1]


def _cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _slow_loader(world: World, tmp_path: Path) -> str:
    sleep = """
import time
from hovle_jax.data.pipeline import Pipeline
batches = Pipeline.batches
def slow(*args, **kwargs):
    for number, batch in enumerate(batches(*args, **kwargs), start=1):
        time.sleep(60 if number == 5 else 0)
        yield batch
Pipeline.batches = slow
"""
    launch = _two(world, tmp_path, sleep, data__timeout=8.0)
    assert launch.wait()[0] == 1
    return launch.errors()[0]


def _dead_process(world: World, tmp_path: Path) -> str:
    config = _config(world, steps=4000)
    with Launch(config, tmp_path / "run", devices=1) as launch:
        launch.until(lambda: cluster.last_row(tmp_path / "run") > 4)
        launch.send(1, signal.SIGKILL)
        codes = launch.wait()
    assert codes[0] in (1, -signal.SIGABRT) and codes[1] == -signal.SIGKILL
    return launch.errors()[0] or launch.text(0)


def _other_config(world: World, tmp_path: Path) -> str:
    other = _config(world, optim__lr=0.5)
    config = _config(world)
    launch = cluster.run(config, tmp_path / "run", configs={1: other}, devices=1)
    assert launch.wait() == [1, 1]
    lines = launch.errors()
    assert lines[0] == lines[1]
    return lines[0]


def _clock(world: World, tmp_path: Path) -> str:
    """An hour ahead on one host: nothing reads another host's clock."""
    skew = "import time; real = time.time; time.time = lambda: real() + 3600"
    launch = _two(world, tmp_path, skew).done()
    assert cluster.saved(tmp_path / "run") == [6, 8]
    return launch.text(0)


def _missing_host(world: World, tmp_path: Path) -> str:
    port = cluster.free_port()
    with pytest.raises(UserError) as error:
        hosts.connect(f"127.0.0.1:{port}", 2, 1, start_timeout=1)
    return f"error: {error.value}"


def _other_topology(world: World, tmp_path: Path) -> str:
    with pytest.raises(UserError) as error:
        hosts.make_mesh(MeshConfig(fsdp=256))
    return f"error: {error.value}"


def _nan_batch(world: World, tmp_path: Path) -> str:
    """One weight of the third batch is NaN: the step is left out, counted, and the run goes on."""
    batches = Pipeline.batches

    def poisoned(*args, **kwargs):
        for number, (batch, cursor) in enumerate(batches(*args, **kwargs), start=1):
            if number == 3:
                batch["loss_weight"] = np.full_like(batch["loss_weight"], np.nan)
            yield batch, cursor

    config = _config(world, steps=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "batches", poisoned)
        train(config, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1]
    assert all(np.isfinite(x).all() for x in cluster.arrays(tmp_path / "run", 5).values())
    return f"skipped {rows[-1]['skipped']} in step {rows[2]['step']}"


FAULTS = {
    "disk full during a save": Fault(
        "disk full during a save, on one host",
        "all hosts end with status 1 and name the step and the directory; the checkpoint before "
        "stays the newest",
        r"^error: .*saving step 3 in .*/run/checkpoints failed: ",
        _disk_full,
    ),
    "truncated file": Fault(
        "truncated array file",
        "the file is named, the checkpoint put into `checkpoints/damaged`, the one before is used",
        r"^warning: .*/checkpoints/8/.*: has [\d,]+ bytes, [\d,]+ when .*going on from 6$",
        lambda world, tmp_path: _damaged(world, tmp_path, _cut),
    ),
    "flipped bit": Fault(
        "a flipped bit in an array file",
        "the same; nothing that reads a work or model directory takes it for a number",
        r"^warning: .*/checkpoints/8/.*: holds other bytes than were written; .*going on from 6$",
        lambda world, tmp_path: _damaged(world, tmp_path, _flip),
    ),
    "NaN batch": Fault(
        "NaN in a batch",
        "the step changes nothing and is counted (`skipped` in the metrics)",
        r"^skipped 1 in step 3$",
        _nan_batch,
    ),
    "slow loader": Fault(
        "a loader that sleeps on one host",
        "after `config.data.timeout` the others end with status 1 and name the step and the host",
        r"^error: step 5: no batch after 8 s from 1 of 2 hosts: 1 \(.*, at step 4\)",
        _slow_loader,
    ),
    "dead process": Fault(
        "a process that dies",
        "the others end by themselves within `--dead-after` seconds and say that a host is lost; "
        "the launcher starts all again",
        r"lost (host 1|another host) of 2|another task died",
        _dead_process,
    ),
    "other config": Fault(
        "another config on one host",
        "no host starts; key, both values and the host are named",
        r"^error: host 1 \(.*\): config.optim.lr is 0.5 here, but 0.003 on host 0; ",
        _other_config,
    ),
    "clock skew": Fault(
        "the clock of one host is an hour off",
        "nothing: hosts never compare clocks",
        r"8 steps done",
        _clock,
    ),
    "missing host": Fault(
        "the command was not started on host 0, or with another address",
        "after `--start-timeout` seconds status 1, with the command for all hosts",
        r"^error: .*nothing answers at --coordinator=.*--worker=all",
        _missing_host,
    ),
    "other topology": Fault(
        "devices that do not fit config.mesh",
        "status 1, with the number found and the command for all hosts",
        r"^error: mesh: .* 8 devices on 1 host take part: .*--worker=all",
        _other_topology,
    ),
}
QUICK = ("NaN batch", "missing host", "other topology")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAULTS]
)
def test_fault(name, world, tmp_path):
    """Two processes each, where the fault needs them; slow for their start."""
    line = FAULTS[name].inject(world, tmp_path)
    assert re.search(FAULTS[name].says, line, re.M), line


def test_the_table_of_faults_is_documented():
    rows = [f"| {fault.what} | {fault.ends} |" for fault in FAULTS.values()]
    table = "\n".join(["| fault | what happens |", "|---|---|", *rows])
    assert table in DOCS.read_text(), f"docs/operations.md lacks this table:\n{table}"
