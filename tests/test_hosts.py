"""Two real processes, connected by jax.distributed on this machine."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import jax
import pytest

from hovle_jax.checkpoint import open_stored
from hovle_jax.config import to_dict
from hovle_jax.errors import UserError
from hovle_jax.run.hosts import DataBarrier
from hovle_jax.run.metrics import read_metrics

SCRIPT = """
import os, signal, socket, sys, time
process, port = int(sys.argv[1]), sys.argv[2]
from hovle_jax.errors import UserError
from hovle_jax.run.hosts import NOTICE, DataBarrier, connect
connect(f"127.0.0.1:{port}", 2, process)

def reason(block, *args):
    try:
        block(*args)
    except UserError as error:
        return str(error)

def start(problem):
    with DataBarrier(30).together():
        if problem:
            raise OSError(problem)

one = f"host 1 ({socket.gethostname()}): "
assert DataBarrier(30).gather("abc"[process]) == ["a", "b"]
assert reason(start, "") is None
assert reason(start, "no disk" * process) == one + "no disk"
assert reason(DataBarrier(30).agree, {"a": 1, "b": [2]}) is None
said = reason(DataBarrier(30).agree, {"a": 1, "b": process, f"c{process}": 0})
assert said == one + "b is 1 here, but 0 on host 0 (and 2 more); give all hosts the same", said
for step in range(1, 21):
    stop = "disk" if process == 1 and step == 7 else "SIGTERM" if step == 20 else ""
    # Also where a host is a step ahead when the other one reads what was said.
    said = DataBarrier(30).wait(step, stop)
    assert said == {7: "disk", 20: "SIGTERM"}.get(step, ""), (step, said)
said = ""
if process == 1:
    os.kill(os.getpid(), signal.SIGTERM)  # jax listens, and calls it a notice
while not said:
    step += 1
    said = DataBarrier(30).wait(step)
    time.sleep(0.01)
assert said == NOTICE, said
if process == 1:
    sys.stdin.readline()  # its data never comes
print(reason(DataBarrier(0.5).wait, step + 1))
"""


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_hosts_agree_and_a_late_one_is_named():
    """What they know, whether they start, where they stop, and who does not come."""
    port = free_port()
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(process), port],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        for process in (0, 1)
    )
    try:
        assert first.stdout is not None
        line = first.stdout.readline()
        name = re.escape(socket.gethostname())
        late = rf"step (\d+): no batch after 0.5 s from 1 of 2 hosts: 1 \({name}, at step (\d+)\)"
        found = re.match(late, line)
        assert found and int(found[1]) == int(found[2]) + 1, line
        second.communicate("\n", timeout=60)
        first.communicate(timeout=60)
    finally:
        first.kill()
        second.kill()


def test_hosts_that_cannot_talk_are_refused(monkeypatch):
    """A TPU slice knows its hosts without jax.distributed; the barrier would be none."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="--coordinator"):
        DataBarrier(1)


@pytest.mark.slow
def test_two_hosts_train_like_one(world, tmp_path):
    """`hovle train` as two processes of one device each; starts two interpreters that compile."""
    config = world.config("instruct", steps=3, mesh__fsdp=-1, init__scratch=True)
    path = tmp_path / "config.py"
    path.write_text(
        "import ml_collections\n"
        f"def get_config():\n    return ml_collections.ConfigDict({to_dict(config)!r})\n"
    )

    def run(name: str, processes: int) -> list[dict]:
        argv = [sys.executable, "-m", "hovle_jax.cli", "train", f"--config={path}"]
        argv.append(f"--workdir={tmp_path / name}")
        join = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}"]
        env = os.environ | {"XLA_FLAGS": ""}
        started = [
            subprocess.Popen(argv + [*join, f"--process={i}"] * (processes > 1), env=env)
            for i in range(processes)
        ]
        try:
            assert [process.wait(300) for process in started] == [0] * processes
        finally:
            for process in started:
                process.kill()
        return read_metrics(tmp_path / name / "metrics.jsonl")

    one, two = run("one", 1), run("two", 2)
    assert [r["step"] for r in two] == [1, 2, 3]
    for a, b in zip(one, two, strict=True):
        assert a["tokens"] == b["tokens"] and abs(a["loss"] - b["loss"]) < 1e-5
    assert open_stored(tmp_path / "two").step == 3
