"""What the hosts of a run tell each other now and then, to find out that one of them differs."""

from __future__ import annotations

import collections
import itertools
import json
import socket
import time
from collections.abc import Mapping

import jax
from jax._src import distributed  # as in hosts.py: there is no public way to the client

from hovle_jax.errors import UserError

_PREFIX = "hovle/agreement"
_turns = itertools.count()


def exchange(topic: str, mine: str, timeout: float) -> dict[str, str]:
    """What every host says about `topic`: {"3 (its name)": text}, in order. All hosts call it.

    Through the coordination service, not the devices: one that does not come is named.

    Args:
      timeout: Seconds to wait for the slowest host.

    Raises:
      UserError: names the hosts that did not come.
    """
    if jax.process_count() == 1:
        return {"0": mine}
    client = distributed.global_state.client
    assert client is not None  # hosts.DataBarrier has refused hosts without a connection
    # Two places in turn: a host that is one exchange ahead overwrites nothing that is being read.
    place = f"{_PREFIX}/{next(_turns) % 2}"
    said = json.dumps([topic, socket.gethostname(), mine])
    client.key_value_set(f"{place}/{jax.process_index()}", said, allow_overwrite=True)
    late = ""
    try:
        client.wait_at_barrier(_PREFIX, int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):  # a host is gone: jax says which
            raise
        late = f"{topic}: waited {timeout:g} s in vain for"
    found = {k.rsplit("/", 1)[1]: json.loads(v) for k, v in client.key_value_dir_get(place + "/")}
    answers = {n: found.get(str(n), ["", "unknown", ""]) for n in range(jax.process_count())}
    if late:
        missing = [f"{n} ({name})" for n, (about, name, _) in answers.items() if about != topic]
        raise UserError(f"{late} host {_few(missing)}; look at the logs there")
    return {f"{n} ({name})": text for n, (_, name, text) in answers.items()}


def odd_ones(said: Mapping[str, str]) -> list[str]:
    """The hosts that do not say what most say."""
    common, _ = collections.Counter(said.values()).most_common(1)[0]
    return [host for host, text in said.items() if text != common]


def last_words(mine: str, patience: float) -> str:
    """What the hosts of a run that hangs say of themselves, the rarest first, as one line.

    Waits `patience` seconds for those that notice later; needs no host but this one.
    """
    client = distributed.global_state.client
    if client is None:
        return f"this host: {mine}"
    place = f"{_PREFIX}/hang"
    said = json.dumps([socket.gethostname(), mine])
    client.key_value_set(f"{place}/{jax.process_index()}", said, allow_overwrite=True)
    time.sleep(patience)
    found = {k.rsplit("/", 1)[1]: json.loads(v) for k, v in client.key_value_dir_get(place + "/")}
    hosts: dict[str, list[str]] = {}
    for number in range(jax.process_count()):
        name, text = found.get(str(number), ["unknown", "says nothing"])
        hosts.setdefault(text, []).append(f"{number} ({name})")
    rarest = sorted(hosts.items(), key=lambda item: len(item[1]))
    return "; ".join(f"host {_few(names)}: {text}" for text, names in rarest)


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
