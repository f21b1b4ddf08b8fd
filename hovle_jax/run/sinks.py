"""Where metrics can go besides metrics.jsonl: TensorBoard and Weights & Biases, if asked for."""

from __future__ import annotations

import hashlib
import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from hovle_jax.config import RunConfig, to_dict
from hovle_jax.modules import require


class Sink(Protocol):
    def write(self, row: Mapping[str, Any], prefix: str = "") -> None:
        """The numbers of one step, `row["step"]`."""

    def close(self) -> None: ...


def open_sinks(config: RunConfig, workdir: Path, done: int) -> list[Sink]:
    """Those the config asks for. `done`: steps of the run so far; later ones are written again.

    Raises:
      UserError: the library is not installed.
    """
    sinks: list[Sink] = []
    if config.tensorboard:
        sinks.append(TensorBoard(workdir, done))
    if config.wandb:
        sinks.append(WeightsAndBiases(config, workdir))
    return sinks


class TensorBoard:
    """One event per row: one for each number, as `SummaryWriter` makes them, takes 2 ms a step."""

    def __init__(self, workdir: Path, done: int):
        events = require("tensorboardX", "tensorboard", "config.tensorboard")
        self._proto = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summary = importlib.import_module("tensorboardX.proto.summary_pb2").Summary
        # Of files of the same name, as made in the same second, the later would replace the other.
        suffix = f".{time.time_ns()}"
        self._writer = events.FileWriter(str(workdir / "tensorboard"), filename_suffix=suffix)
        # TensorBoard then hides what an earlier start wrote of later steps.
        log = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._writer.add_event(self._proto.Event(step=done + 1, session_log=log))

    def write(self, row: Mapping[str, Any], prefix: str = "") -> None:
        value = self._summary.Value
        values = [value(tag=prefix + k, simple_value=x) for k, x in row.items() if k != "step"]
        self._writer.add_summary(self._summary(value=values), row["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run at Weights & Biases per work directory, whatever the number of starts.

    It takes steps in ascending order only: of steps done again it keeps the first, which is equal.
    """

    def __init__(self, config: RunConfig, workdir: Path):
        self._run = require("wandb", "wandb", "config.wandb").init(
            project=config.wandb,
            id=hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16],
            name=workdir.name,
            dir=str(workdir),
            config=to_dict(config),
            resume="allow",
        )

    def write(self, row: Mapping[str, Any], prefix: str = "") -> None:
        numbers = {prefix + name: value for name, value in row.items() if name != "step"}
        self._run.log(numbers, step=row["step"])

    def close(self) -> None:
        self._run.finish()
