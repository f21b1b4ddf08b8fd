"""What the processes of a run say to each other besides arrays."""

from __future__ import annotations

import socket

import jax
from jax._src import distributed  # orbax reaches the client this way, too; there is no public one

from hovle_jax.errors import UserError

_PREFIX = "hovle/data"


class DataBarrier:
    """Where hosts wait until all have their part of the next batch.

    Without it a host whose data is late leaves the others in a collective that neither ends nor
    says whom it waits for. About a millisecond a step, while the device computes.
    """

    def __init__(self, timeout: float):
        """`timeout`: seconds to wait for the slowest host."""
        self._timeout = timeout
        self._client = distributed.global_state.client if jax.process_count() > 1 else None

    def wait(self, step: int) -> None:
        """Call when the batch of `step` is there. UserError: names the hosts that did not come."""
        if self._client is None:
            return
        mine = f"{_PREFIX}/{jax.process_index()}"
        self._client.key_value_set(mine, f"{step} {socket.gethostname()}", allow_overwrite=True)
        try:
            self._client.wait_at_barrier(_PREFIX, int(self._timeout * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):  # a host is gone: jax says which
                raise
            raise UserError(self._late(step)) from None

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
