"""Two real processes, connected by jax.distributed on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import jax
import pytest

from hovle_jax.errors import UserError
from hovle_jax.hosts import DataBarrier

SCRIPT = """
import sys, time, jax
process, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
from hovle_jax.errors import UserError
from hovle_jax.hosts import DataBarrier
for step in range(1, 21):
    stop = "disk" if process == 1 and step == 7 else "SIGTERM" if step == 20 else ""
    # Also where a host is a step ahead when the other one reads what was said.
    said = DataBarrier(30).wait(step, stop)
    assert said == {7: "disk", 20: "SIGTERM"}.get(step, ""), (step, said)
if process == 1:
    sys.stdin.readline()  # its data never comes
try:
    DataBarrier(0.5).wait(21)
except UserError as error:
    print(error)
"""


def test_a_late_host_is_named():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
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
        expected = f"step 21: no batch after 0.5 s from 1 of 2 hosts: 1 ({socket.gethostname()}, at"
        assert line.startswith(expected) and "step 20)" in line, line
        second.communicate("\n", timeout=60)
        first.communicate(timeout=60)
    finally:
        first.kill()
        second.kill()


def test_hosts_that_cannot_talk_are_refused(monkeypatch):
    """A TPU slice knows its hosts without jax.distributed; the barrier would be none."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="jax.distributed.initialize"):
        DataBarrier(1)
