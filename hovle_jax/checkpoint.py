"""Native directories: what is on disk, how it is written, how it is read onto any mesh.

    model or teacher directory          work directory of a run
      config.json                         config.json
      params/       all parameters        frozen/            parameters the run does not train, once
      tokenizer/    (models)              checkpoints/STEP/  params/ optimizer/ meta (cursor)
                                          tokenizer/  metrics.jsonl

Reading merges `frozen` with the newest finished checkpoint, so both kinds load the same way.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from hovle_jax.config import ModelConfig, RunConfig, TeacherConfig, from_dict, to_dict
from hovle_jax.data.pipeline import Cursor
from hovle_jax.errors import UserError
from hovle_jax.train_step import TrainState
from hovle_jax.tree import flatten, unflatten

CONFIG = "config.json"
_KINDS: dict[str, Any] = {"model": ModelConfig, "teacher": TeacherConfig, "run": RunConfig}
_PACKAGES = ("hovle-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")
Config = ModelConfig | TeacherConfig | RunConfig


def write_config(directory: str | Path, config: Config) -> None:
    """config.json: what the directory is, its resolved config and the package versions."""
    kind = next(k for k, cls in _KINDS.items() if isinstance(config, cls))
    found = {p.metadata["Name"].lower(): p.version for p in importlib.metadata.distributions()}
    versions = {p: found[p] for p in _PACKAGES if p in found}
    body = {"kind": kind, "config": to_dict(config), "versions": versions}
    path = Path(directory) / CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(body, indent=2) + "\n")
    os.replace(temporary, path)


def read_config(directory: str | Path) -> Config:
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise UserError(f"{directory}: no {CONFIG}; expected a model or work directory")
    try:
        body = json.loads(path.read_text())
        return from_dict(_KINDS[body["kind"]], body["config"], str(path))
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{path}: not a hovle_jax config ({error!r})") from None


def save_model(directory: str | Path, config: ModelConfig | TeacherConfig, params: Any) -> None:
    """Writes a model or teacher directory (parameters may be a part of the model's tree)."""
    write_config(directory, config)
    write_tree(Path(directory) / "params", params)


def write_tree(path: Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree, force=True)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A native directory, opened: its config and where each parameter lies."""

    directory: str
    config: Config
    step: int | None  # of a run
    trees: tuple[tuple[Path, dict[str, Any]], ...]  # (orbax directory, {parameter: metadata})

    @property
    def paths(self) -> set[str]:
        return {path for _, metadata in self.trees for path in metadata}


def open_stored(directory: str | Path) -> Stored:
    directory = Path(directory)
    config = read_config(directory)
    if not isinstance(config, RunConfig):
        return Stored(str(directory), config, None, (_open_tree(directory / "params"),))
    step = latest_step(directory)
    if step is None:
        raise UserError(f"{directory}: no finished checkpoint")
    trees = [_open_tree(directory / "checkpoints" / str(step) / "params")]
    if (directory / "frozen").is_dir():
        trees.insert(0, _open_tree(directory / "frozen"))
    return Stored(str(directory), config, step, tuple(trees))


def latest_step(workdir: str | Path) -> int | None:
    """Newest finished checkpoint of a work directory; unfinished ones do not count."""
    root = Path(workdir) / "checkpoints"
    if not root.is_dir():
        return None
    return max((int(p.name) for p in root.iterdir() if p.name.isdigit()), default=None)


def _open_tree(path: Path) -> tuple[Path, dict[str, Any]]:
    if not path.is_dir():
        raise UserError(f"{path}: missing; the directory is not complete")
    metadata: Any = ocp.PyTreeCheckpointHandler().metadata(epath.Path(path.absolute()))
    return path, flatten(dict(metadata.tree))


def read_params(stored: Stored, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the parameters named by `wanted` ({path: ShapeDtypeStruct with sharding}).

    Only these are read, straight into their shards. Paths the directory lacks are left out; a shape
    that differs is an error.
    """
    out: dict[str, Any] = {}
    for path, metadata in stored.trees:
        here = {k: wanted[k] for k in metadata if k in wanted}
        for name, want in here.items():
            if tuple(metadata[name].shape) != tuple(want.shape):
                raise UserError(
                    f"{stored.directory}: {name} has shape {tuple(metadata[name].shape)}, the "
                    f"config says {tuple(want.shape)}"
                )
        if here:
            item = unflatten(here)
            args = ocp.args.PyTreeRestore(
                item=item,
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True,
            )
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                out |= flatten(checkpointer.restore(path.absolute(), args=args))
    return out


def load(directory: str | Path) -> tuple[Config, dict[str, Any]]:
    """Everything a native directory holds, on the first local device."""
    stored = open_stored(directory)
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(m.shape, np.dtype(m.dtype), sharding=where)
        for _, metadata in stored.trees
        for name, m in metadata.items()
    }
    return stored.config, unflatten(read_params(stored, wanted))


class Checkpoints:
    """The checkpoints of one work directory: asynchronous, atomic, the last `keep` of them."""

    def __init__(self, workdir: str | Path, keep: int):
        self._manager = ocp.CheckpointManager(
            (Path(workdir) / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_names=("params", "optimizer", "meta"),
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, cursor: Cursor) -> None:
        """Saves after the step that `cursor` follows. Errors of the save before surface here."""
        self._manager.check_for_errors()
        meta = {"cursor": cursor, "skipped": int(state.skipped)}
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(state.opt_state),
                meta=ocp.args.JsonSave(meta),
            ),
            force=True,
        )

    def restore(self, step: int, shapes: TrainState) -> tuple[TrainState, Cursor]:
        """`shapes`: ShapeDtypeStructs with the shardings to restore onto, whatever was saved."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(shapes.params),
                optimizer=ocp.args.StandardRestore(shapes.opt_state),
                meta=ocp.args.JsonRestore(),
            ),
        )
        meta = restored["meta"]

        def counter(value: int, like: Any) -> jax.Array:
            return jax.device_put(np.int32(value), like.sharding)

        state = TrainState(
            counter(step, shapes.step),
            counter(meta["skipped"], shapes.skipped),
            restored["params"],
            restored["optimizer"],
        )
        return state, meta["cursor"]

    def close(self) -> None:
        """Waits for the last save and raises its error, if it had one."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._manager.close()
