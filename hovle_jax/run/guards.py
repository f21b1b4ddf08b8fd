"""What would ruin a run without a sound: losses that jump, weights that change on their own."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hovle_jax.config import GuardConfig
from hovle_jax.errors import UserError
from hovle_jax.output import replace_json
from hovle_jax.run.agreement import exchange, odd_ones
from hovle_jax.run.array_digests import digests
from hovle_jax.tree import flatten

_DEVIATION = 1.4826  # median absolute deviations in a standard deviation, of normal numbers
_LEAST = 16  # losses before one of them can be unusual


class LossGuard:
    """Looks at every step's loss, in order; the same on all hosts."""

    def __init__(self, config: GuardConfig, losses: Iterable[float] = ()):
        """`losses`: of the steps before, in a run that goes on."""
        self._config = config
        self._recent = collections.deque(filter(math.isfinite, losses), config.spike_window)
        self._spiking = False
        self._nonfinite = 0  # steps in a row

    def look(self, loss: float, grad_norm: float) -> str:
        """What is wrong with a step; '' for nothing. Of a spike that lasts, its first step."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._nonfinite += 1
            return "loss or gradient is not finite"
        self._nonfinite = 0
        spike = self._spike(loss)
        self._recent.append(loss)
        begins, self._spiking = spike and not self._spiking, bool(spike)
        return spike if begins else ""

    def check(self, step: int, bad_batches: Path) -> None:
        """Ends the run after too many non-finite steps in a row, with UserError."""
        most = self._config.max_nonfinite
        if most and self._nonfinite >= most:
            raise UserError(
                f"step {step}: loss or gradient was not finite {most} times in a row; "
                f"{bad_batches} lists the records; lower config.optim.lr or mend them, and start "
                "again from an earlier checkpoint (config.guards.max_nonfinite)"
            )

    def _spike(self, loss: float) -> str:
        if not self._config.spike or len(self._recent) < _LEAST:
            return ""
        median = float(np.median(self._recent))
        deviation = _DEVIATION * float(np.median(np.abs(np.array(self._recent) - median)))
        # Losses that hardly move have no deviation to speak of.
        unit = max(deviation, 0.01 * abs(median))
        if loss <= median + self._config.spike * unit:
            return ""
        return f"loss {loss:.4g} is {(loss - median) / unit:.0f} deviations above {median:.4g}"


class ParameterGuard:
    """Compares digests: replicas with each other, hosts with each other, and what is frozen with
    what the run began with (kept in WORKDIR/frozen.json)."""

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        frozen: Mapping[str, Any],
        teacher: Mapping[str, Any],
        workdir: Path,
        timeout: float,
        *,
        resumed: bool,
    ):
        """`timeout`: seconds to wait for the slowest host. `resumed`: the run goes on; what an
        earlier attempt to begin it has left does not count."""
        self._digests, self._timeout = digests(mesh), timeout
        self._frozen = flatten({**frozen, "teacher": teacher})
        self._path = workdir / "frozen.json"
        self._known: dict[str, str] = {}
        if resumed and self._path.is_file():
            self._known = json.loads(self._path.read_text())

    def check(self, step: int, params: Mapping[str, Any]) -> None:
        """All hosts call it after the same steps, and first before any step.

        Raises:
          UserError: on every host; names the parameter, and the device or host that differs.
        """
        table = flatten({"params": dict(params)}) | self._frozen
        found = self._digests(table)
        mine = {path: next(iter(of_devices.values())) for path, of_devices in found.items()}
        topic = f"the check of parameters after step {step}"
        problem = _replicas(found) or self._moved(mine)
        said = exchange(topic, json.dumps([problem, mine]), self._timeout)
        answers = {host: json.loads(text) for host, text in said.items()}
        for host, (problem, _) in answers.items():
            if problem:
                raise UserError(f"after step {step}, host {host}: {problem}")
        for path in table:
            if odd := odd_ones({host: values[path] for host, (_, values) in answers.items()}):
                raise UserError(
                    f"after step {step}: {_shown(path)} on host {', '.join(odd)} is not that of "
                    "the other hosts; one of them computes or remembers wrong: start again without "
                    "it"
                )
        if self._frozen and not self._known:
            self._known = {path: mine[path] for path in self._frozen}
            if jax.process_index() == 0:
                replace_json(self._path, self._known)

    def _moved(self, mine: Mapping[str, str]) -> str:
        """Which frozen parameter is another than at the beginning; '' if none is. The first host
        knows, and those that share its work directory."""
        moved = next((k for k in self._frozen if self._known.get(k, mine[k]) != mine[k]), "")
        return moved and (
            f"{_shown(moved)} is frozen, but no longer what the run began with ({self._path}); "
            "a device, a file or config.init has changed it"
        )


def _replicas(found: Mapping[str, Mapping[str, str]]) -> str:
    """Which parameter has copies that differ on this host's devices; '' if none has."""
    for path, of_devices in found.items():
        if odd := odd_ones(of_devices):
            return (
                f"{_shown(path)} on {', '.join(odd)} is not that of the other devices; it computes "
                "or remembers wrong"
            )
    return ""


def _shown(path: str) -> str:
    return path.removeprefix("params/")
