"""Real processes as the hosts of a run: started, watched, killed, and never left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from hovle_jax.checkpoint import finished_steps
from hovle_jax.config import RunConfig, to_dict
from hovle_jax.run.metrics import read_metrics
from hovle_jax.streaming import open_arrays, read_array

LIMIT = 600.0  # seconds until a launch counts as hanging; generous, for machines that are busy
DEAD_AFTER = 10  # seconds of silence that make a host dead

# Only process 0 keeps what it compiled; the others would compile all of it at every start.
CACHE = """
from jax._src import compiler, distributed
write = compiler._cache_write
def write_too(*args, **kwargs):
    here, distributed.global_state.process_id = distributed.global_state.process_id, 0
    try:
        write(*args, **kwargs)
    finally:
        distributed.global_state.process_id = here
compiler._cache_write = write_too
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def write_config(config: RunConfig, path: Path) -> Path:
    path.write_text(
        "import ml_collections\n"
        f"def get_config():\n    return ml_collections.ConfigDict({to_dict(config)!r})\n"
    )
    return path


class Launch:
    """`hovle train` on `processes` processes with `devices` simulated devices each.

    prelude: {process: Python source that runs there before the command}, to break something.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: Path,
        *,
        processes: int = 2,
        devices: int = 2,
        prelude: dict[int, str] | None = None,
        configs: dict[int, RunConfig] | None = None,
        flags: tuple[str, ...] = (),
    ):
        self.workdir = workdir
        port = free_port()
        self.logs = []
        self.hosts = []
        number = len(list(workdir.parent.glob(f"{workdir.name}.*.log")))
        for process in range(processes):
            here = (configs or {}).get(process, config)
            path = write_config(here, workdir.with_suffix(f".{process}.py"))
            argv = ["hovle", "train", f"--config={path}", f"--workdir={workdir}"]
            if processes > 1:
                argv += [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}"]
                argv += [f"--process={process}", f"--dead-after={DEAD_AFTER}"]
            source = CACHE + (prelude or {}).get(process, "")
            source += "\nimport sys; from hovle_jax.cli.main import main\n"
            source += f"sys.exit(main({[*argv[1:], *flags]!r}))"
            log = workdir.parent / f"{workdir.name}.{number + process:03}.log"
            self.logs.append(log)
            with log.open("w") as out:
                self.hosts.append(
                    subprocess.Popen(
                        [sys.executable, "-c", source],
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        env=os.environ
                        | {
                            "JAX_PLATFORMS": "cpu",
                            # Compiled quickly, not to be quick; the same for all that is compared.
                            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
                            "--xla_backend_optimization_level=0",
                            "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
                            # Restarts compile nothing again.
                            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                            "TF_CPP_MIN_LOG_LEVEL": "2",
                        },
                    )
                )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: Any) -> None:
        for host in self.hosts:
            host.kill()
            host.wait()

    def text(self, process: int) -> str:
        return self.logs[process].read_text()

    def until(self, happened: Callable[[], bool], limit: float = LIMIT) -> bool:
        """Waits; False when a process ended first."""
        deadline = time.monotonic() + limit
        while not happened():
            if any(host.poll() is not None for host in self.hosts):
                return False
            assert time.monotonic() < deadline, self._all()
            time.sleep(0.005)
        return True

    def send(self, process: int, what: signal.Signals) -> None:
        self.hosts[process].send_signal(what)

    def wait(self, limit: float = LIMIT) -> list[int]:
        """Exit status of every process; all have to end by themselves."""
        deadline = time.monotonic() + limit
        for host in self.hosts:
            try:
                host.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"hangs: {self._all()}") from None
        return [int(host.returncode) for host in self.hosts]

    def end_after(self, victim: int, grace: float = 5.0) -> None:
        """What launchers do: when one process was ended by a signal, the others are ended, too."""
        self.hosts[victim].wait(LIMIT)
        if self.hosts[victim].returncode < 0:
            time.sleep(grace)
            for host in self.hosts:
                host.kill()

    def done(self) -> Launch:
        assert self.wait() == [0] * len(self.hosts), self._all()
        return self

    def errors(self) -> list[str]:
        """The line of error of every process."""
        found = [re.findall(r"^error: .*", self.text(i), re.M) for i in range(len(self.hosts))]
        return [lines[-1] if lines else "" for lines in found]

    def _all(self) -> str:
        return "\n".join(f"--- {i}\n{self.text(i)[-3000:]}" for i in range(len(self.hosts)))


def run(config: RunConfig, workdir: Path, **options: Any) -> Launch:
    with Launch(config, workdir, **options) as launch:
        launch.wait()
        return launch


def last_row(workdir: Path) -> int:
    rows = read_metrics(workdir / "metrics.jsonl")
    return int(rows[-1]["step"]) if rows else 0


def saved(workdir: Path) -> list[int]:
    return finished_steps(epath.Path(workdir) / "checkpoints")


def unfinished(workdir: Path, since: float = 0.0) -> list[int]:
    """Steps whose checkpoint is being written, or was when a process was killed; `since`: leaves
    out what has lain there untouched from before that time."""
    found = []
    for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
        with contextlib.suppress(FileNotFoundError):  # finished meanwhile
            if path.stat().st_mtime >= since:
                found.append(int(path.name.partition(".")[0]))
    return found


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, parameters and optimizer."""
    out = {}
    for item in ("params", "optimizer"):
        tree = epath.Path(workdir) / "checkpoints" / str(step) / item
        found = open_arrays(tree)
        out |= {f"{item}/{name}": read_array(tree, name, x) for name, x in found.items()}
    return out


def timeless(workdir: Path) -> list[dict[str, Any]]:
    """Rows of the metrics without what differs from run to run: times, and what is made of them."""
    times = re.compile(r"seconds|per_second|goodput|mfu|time|wait|hbm")
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not times.search(k)} for row in rows]
