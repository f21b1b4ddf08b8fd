"""What the processes of a run say to each other besides arrays."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from traceback import print_exception
from typing import Any

import jax
from jax._src import distributed  # orbax reaches the client this way, too; there is no public one

from hovle_jax import sharding
from hovle_jax.config import MeshConfig
from hovle_jax.errors import UserError, one_line
from hovle_jax.run.agreement import exchange

SIGTERM, NOTICE = "SIGTERM", "a maintenance notice"
PREEMPTIONS = (SIGTERM, NOTICE)

_PREFIX = "hovle/data"
_STOP = "hovle/stop"
_START = (
    "start the same command on every host (TPU VMs: gcloud compute tpus tpu-vm ssh NAME "
    "--worker=all --command='hovle train ...'; elsewhere --coordinator=HOST:PORT --processes=N "
    "--process=I)"
)
PATIENCE = 600.0  # seconds between hosts while they start, measure data and read parameters
_runs = itertools.count()  # a process may train more than once


def connect(
    coordinator: str = "",
    processes: int = 0,
    process: int = 0,
    start_timeout: int = 300,
    dead_after: int = 100,
) -> None:
    """Joins the processes of a run; call before anything touches a device.

    On TPU pods, GKE and Slurm jax finds all that it takes by itself; elsewhere say the
    coordinator's HOST:PORT, the number of processes and which one this is. Alone: does nothing.

    start_timeout: seconds to wait for all hosts to come. dead_after: seconds without a sign of life
    after which a host counts as dead and jax ends the others.

    Raises:
      UserError: settings that do not fit together, or hosts that did not come.
    """
    limits: dict[str, Any] = {
        "initialization_timeout": start_timeout,
        "heartbeat_timeout_seconds": dead_after,
        "shutdown_timeout_seconds": dead_after,
    }
    try:
        if coordinator:
            if not 0 <= process < processes or ":" not in coordinator:
                raise UserError(
                    f"--coordinator={coordinator} --processes={processes} --process={process}: "
                    "wants HOST:PORT of the first host, how many there are, and this one from 0"
                )
            if process:
                _reach(coordinator, start_timeout)
            jax.distributed.initialize(coordinator, processes, process, **limits)
        elif (
            "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
            or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
            or int(os.environ.get("SLURM_NTASKS", "1")) > 1
            or "TPU_ML_PLATFORM" in os.environ  # jax has found TPU chips: a TPU VM, of a pod or not
        ):
            jax.distributed.initialize(**limits)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError) and "must be called before" in str(error):
            raise  # a mistake of the caller's program, not of its user
        reason = one_line(error)[:300]
        raise UserError(
            f"{socket.gethostname()}: the hosts of the run did not find each other within "
            f"{start_timeout} s ({reason}); {_START}"
        ) from None


def _reach(coordinator: str, seconds: float) -> None:
    """Waits until the first host listens: jax would end this process without a word to the user."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline or isinstance(error, ValueError):
                raise UserError(
                    f"{socket.gethostname()}: nothing answers at --coordinator={coordinator} after "
                    f"{seconds} s ({one_line(error)}); is host 0 running and the address its own? "
                    f"{_START[0].upper()}{_START[1:]}"
                ) from None
            time.sleep(0.2)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """`sharding.make_mesh` of a run: says how to start it where hosts may be missing."""
    try:
        return sharding.make_mesh(config, devices)
    except UserError as error:
        count, hosts = jax.device_count(), jax.process_count()
        found = f"{count} devices on {hosts} host{'s' * (hosts > 1)} take part"
        raise UserError(f"{error}; {found}: set config.mesh to them, or {_START}") from None


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
        notices = distributed.global_state.preemption_sync_manager
        if not stop and notices is not None and notices.reached_sync_point(step):
            stop = NOTICE
        mine = f"{_PREFIX}/{process}"
        self._client.key_value_set(mine, f"{step} {socket.gethostname()}", allow_overwrite=True)
        # Of this step alone: a host that is ahead may already have a reason to stop at the next.
        reasons = f"{_STOP}/{self._run}/{step}/"
        if stop:
            self._client.key_value_set(f"{reasons}{process:06}", stop)
        with _peers(lambda: self._late(step)):
            self._client.wait_at_barrier(_PREFIX, int(self._timeout * 1000))
            said = self._client.key_value_dir_get(reasons)
        return next((reason for _, reason in sorted(said)), "")

    def _late(self, step: int) -> str:
        assert self._client is not None
        there = {k.rsplit("/", 1)[1]: v for k, v in self._client.key_value_dir_get(_PREFIX + "/")}
        late = []
        for process in map(str, range(jax.process_count())):
            at, _, name = there.get(process, "0 unknown").partition(" ")
            if int(at) < step:
                late.append(f"{process} ({name}, at step {at})")
        return (
            f"step {step}: no batch after {self._timeout:g} s from {_some(late)}; look at the logs "
            "and storage there (config.data.timeout)"
        )

    def gather(self, value: str) -> list[str]:
        """What every host gives, in their order; all hosts have to call it, equally often."""
        with _peers(str):  # `exchange` itself says who is late
            patience = max(self._timeout, PATIENCE)
            return list(exchange("what all hosts have to say", value, patience).values())

    def post(self, what: str, value: str) -> None:
        """Leaves `value` of this host where all hosts find it under `what`; waits for nobody."""
        assert self._client is not None
        key = f"hovle/post/{self._run}/{what}/{jax.process_index():06}"
        self._client.key_value_set(key, value, allow_overwrite=True)

    def posted(self, what: str) -> list[str]:
        """What hosts have left under `what` until now."""
        if self._client is None:
            return []
        said = self._client.key_value_dir_get(f"hovle/post/{self._run}/{what}/")
        return [value for _, value in sorted(said)]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block through which all hosts get, or none: they raise what the first one raised.

        Otherwise a host that cannot start (a file it cannot read) would leave the others waiting.
        """
        reason = ""
        try:
            yield
        except (UserError, OSError) as error:
            reason = one_line(error)
        self._raise_first(reason)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Refuses to go on where a host knows another value of one of `facts`; names both.

        The first host's values count as the right ones.
        """
        mine = {k: json.dumps(v, sort_keys=True, default=str) for k, v in facts.items()}
        first = json.loads(self.gather(json.dumps(mine))[0])
        differ = sorted(k for k in mine.keys() | first.keys() if mine.get(k) != first.get(k))
        reason = ""
        if differ:
            name = differ[0]
            more = f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
            reason = (
                f"{name} is {mine.get(name, 'nothing')} here, but {first.get(name, 'nothing')} on "
                f"host 0{more}; give all hosts the same"
            )
        self._raise_first(reason)

    def _raise_first(self, reason: str) -> None:
        """`reason` of the first host that has one, with the host's name."""
        said = f"host {jax.process_index()} ({socket.gethostname()}): {reason}" if reason else ""
        if first := next(filter(None, self.gather(said)), ""):
            raise UserError(reason if self._client is None else first)


@contextlib.contextmanager
def _peers(late: Callable[[], str]) -> Iterator[None]:
    """Errors of the coordination service as one line; `late()` says who did not come."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            raise UserError(late()) from None
        raise UserError(lost_peer(error) or one_line(error)) from None


def _some(hosts: list[str]) -> str:
    shown = ", ".join(hosts[:8]) + (", ..." if len(hosts) > 8 else "")
    return f"{len(hosts)} of {jax.process_count()} hosts: {shown}"


# What jax (coordination service, gloo, gRPC) says when a process on the other side has gone.
_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "connection refused",
    "heartbeat",
    "failed to connect",
    "Socket closed",
    "task is in error",
    "preempted/died/restarted",
    "Gloo",
    "UNAVAILABLE",
)


def lost_peer(error: BaseException) -> str:
    """One line when `error` comes of another host's end; '' when it does not."""
    text = str(error)
    if ": lost " in text:
        return text  # said already
    if jax.process_count() < 2 or not any(x.lower() in text.lower() for x in _GONE):
        return ""
    tasks = sorted({int(n) for n in re.findall(r"task[:/ ](\d+)", text)} - {jax.process_index()})
    if not tasks and jax.process_count() == 2:
        tasks = [1 - jax.process_index()]
    who = f"host {', '.join(map(str, tasks))}" if tasks else "another host"
    return (
        f"host {jax.process_index()} ({socket.gethostname()}): lost {who} of "
        f"{jax.process_count()}; look at its log, then run the same command on all hosts again "
        f"({one_line(error)[:160]})"
    )


def fail(error: BaseException, *, traceback: bool = False) -> None:
    """Ends one process of several after an error; alone: does nothing.

    At once and whatever its threads still wait for: the ordinary exit meets the other hosts first,
    and some of them may never come. The others are told by the service that connects them.
    """
    if jax.process_count() < 2:
        return
    line = lost_peer(error) or (str(error) if isinstance(error, UserError) else "")
    with contextlib.suppress(OSError):  # what is full may be the log's disk
        if line and not traceback:
            print(f"error: {line}", file=sys.stderr)
        else:
            print_exception(error)
        sys.stderr.flush()
        sys.stdout.flush()
    with contextlib.suppress(Exception):  # nobody is left to tell
        _close_the_door()
    os._exit(1)


def _close_the_door() -> None:
    """Host 0 leaves last if it can in 10 s: with it goes what the others may still be reading."""
    client: Any = distributed.global_state.client
    left = "hovle/left/"
    client.key_value_set(f"{left}{jax.process_index()}", "", allow_overwrite=True)
    deadline = time.monotonic() + 10
    while jax.process_index() == 0 and time.monotonic() < deadline:
        if len(client.key_value_dir_get(left)) == jax.process_count():
            return
        time.sleep(0.1)
