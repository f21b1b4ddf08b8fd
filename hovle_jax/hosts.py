"""What the processes of a run say to each other besides arrays."""

from __future__ import annotations

import itertools
import os
import socket

import jax
from jax._src import distributed  # orbax reaches the client this way, too; there is no public one

from hovle_jax.errors import UserError

_PREFIX = "hovle/data"
_STOP = "hovle/stop"
_runs = itertools.count()  # a process may train more than once


def connect(coordinator: str = "", processes: int = 0, process: int = 0) -> None:
    """Joins the processes of a run; call before anything touches a device.

    On TPU pods, GKE and Slurm jax finds all that it takes by itself; elsewhere say the
    coordinator's HOST:PORT, the number of processes and which one this is. Alone: does nothing.
    """
    if coordinator:
        jax.distributed.initialize(coordinator, processes, process)
    elif (
        "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
        or int(os.environ.get("SLURM_NTASKS", "1")) > 1
    ):
        jax.distributed.initialize()


class DataBarrier:
    """Where hosts wait until all have their part of the next batch.

    Without it a host whose data is late leaves the others in a collective that neither ends nor
    says whom it waits for. About a millisecond a step, while the device computes.

    Here they also agree on the step at which a run ends before its last: a host that cannot go on,
    or was told to stop, would otherwise save a checkpoint for which the others never come.
    """

    def __init__(self, timeout: float):
        """`timeout`: seconds to wait for the slowest host. UserError: hosts without connection."""
        self._timeout, self._run = timeout, next(_runs)
        self._client = distributed.global_state.client if jax.process_count() > 1 else None
        if jax.process_count() > 1 and self._client is None:
            raise UserError(
                f"{jax.process_count()} hosts, but nothing connects them: give --coordinator, "
                "--processes and --process, or call hosts.connect() before the run"
            )

    def wait(self, step: int, stop: str = "") -> str:
        """Call when the batch of `step` is there, or with the reason to stop before that step.

        Returns the same on all hosts: the reason of the first host that has one, '' to go on.

        Raises:
          UserError: names the hosts that did not come.
        """
        if self._client is None:
            return stop
        process = jax.process_index()
        mine = f"{_PREFIX}/{process}"
        self._client.key_value_set(mine, f"{step} {socket.gethostname()}", allow_overwrite=True)
        # Of this step alone: a host that is ahead may already have a reason to stop at the next.
        reasons = f"{_STOP}/{self._run}/{step}/"
        if stop:
            self._client.key_value_set(f"{reasons}{process:06}", stop)
        try:
            self._client.wait_at_barrier(_PREFIX, int(self._timeout * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):  # a host is gone: jax says which
                raise
            raise UserError(self._late(step)) from None
        return next((reason for _, reason in sorted(self._client.key_value_dir_get(reasons))), "")

    def _late(self, step: int) -> str:
        assert self._client is not None
        there = {k.rsplit("/", 1)[1]: v for k, v in self._client.key_value_dir_get(_PREFIX + "/")}
        late = []
        for process in map(str, range(jax.process_count())):
            at, _, name = there.get(process, "0 unknown").partition(" ")
            if int(at) < step:
                late.append(f"{process} ({name}, at step {at})")
        shown = ", ".join(late[:8]) + (", ..." if len(late) > 8 else "")
        return (
            f"step {step}: no batch after {self._timeout:g} s from {len(late)} of "
            f"{jax.process_count()} hosts: {shown}; look at the logs and storage there "
            "(config.data.timeout)"
        )
