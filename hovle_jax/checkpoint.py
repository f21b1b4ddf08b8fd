"""Model directories: what is on disk, how it is written, how it is read onto any mesh.

    model or teacher directory          work directory of a run
      config.json                         config.json
      params/       all parameters        frozen/            parameters the run does not train, once
      tokenizer/    (models)              checkpoints/STEP/  params/ optimizer/ meta (cursor)
      unused.safetensors (imported)       tokenizer/  metrics.jsonl

Reading merges `frozen` with the newest finished checkpoint, so both kinds load the same way. A
Hugging Face directory can stand wherever a model or teacher directory can (`hf.reader`).
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

from hovle_jax.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    TeacherConfig,
    from_dict,
    to_dict,
)
from hovle_jax.data.pipeline import Cursor
from hovle_jax.errors import UserError
from hovle_jax.hf import reader
from hovle_jax.streaming import open_array
from hovle_jax.train_step import TrainState
from hovle_jax.tree import flatten, unflatten

CONFIG = "config.json"
UNUSED = "unused.safetensors"  # released tensors that nothing reads (hf.importer)
_KINDS: dict[str, Any] = {"model": ModelConfig, "teacher": TeacherConfig, "run": RunConfig}
_PACKAGES = ("hovle-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")
Config = ModelConfig | TeacherConfig | RunConfig


def write_config(directory: str | Path, config: Config, data: DataConfig | None = None) -> None:
    """config.json: what the directory is, its resolved config and the package versions.

    `data` keeps the chat template and tile limits of a model that is no run.
    """
    kind = next(k for k, cls in _KINDS.items() if isinstance(config, cls))
    found = {p.metadata["Name"].lower(): p.version for p in importlib.metadata.distributions()}
    versions = {p: found[p] for p in _PACKAGES if p in found}
    body = {"kind": kind, "config": to_dict(config), "versions": versions}
    if data is not None:
        body["data"] = to_dict(data)
    path = Path(directory) / CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(body, indent=2) + "\n")
    os.replace(temporary, path)


def read_config(directory: str | Path) -> Config:
    return _read_config(directory)[0]


def _read_config(directory: str | Path) -> tuple[Config, DataConfig | None]:
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise UserError(f"{directory}: no {CONFIG}; expected a model or work directory")
    try:
        body = json.loads(path.read_text())
        config = from_dict(_KINDS[body["kind"]], body["config"], str(path))
        data = from_dict(DataConfig, body["data"], str(path)) if "data" in body else None
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{path}: not a hovle_jax config ({error!r})") from None
    return config, config.data if isinstance(config, RunConfig) else data


def save_model(directory: str | Path, config: ModelConfig | TeacherConfig, params: Any) -> None:
    """Writes a model or teacher directory (parameters may be a part of the model's tree)."""
    write_config(directory, config)
    write_tree(Path(directory) / "params", params)


def write_tree(path: Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree, force=True)


@dataclasses.dataclass(frozen=True)
class Stored:
    """An opened directory: its config and where each parameter lies."""

    directory: str
    config: Config
    data: DataConfig | None  # chat template and tile limits
    step: int | None = None  # of a run
    trees: tuple[tuple[Path, dict[str, Any]], ...] = ()  # (orbax directory, {path: metadata})
    hub: reader.HubDirectory | None = None

    @property
    def model(self) -> ModelConfig:
        config = self.config.model if isinstance(self.config, RunConfig) else self.config
        if not isinstance(config, ModelConfig):
            raise UserError(f"{self.directory}: holds a vision teacher, not a model")
        return config

    @property
    def paths(self) -> set[str]:
        if self.hub is not None:
            return set(self._rows)
        return {path for _, metadata in self.trees for path in metadata}

    @property
    def tokenizer(self) -> Path:
        """The directory of the tokenizer's files."""
        return Path(self.directory) / ("" if self.hub is not None else "tokenizer")

    @property
    def _rows(self) -> dict[str, Any]:
        assert self.hub is not None
        return self.hub.part(
            "teacher" if isinstance(self.config, TeacherConfig) else "model"
        ).row_of

    def read(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the parameters named by `wanted` ({path: ShapeDtypeStruct with sharding}).

        Only these are read, straight into their shards. Paths the directory lacks are left out; a
        shape that differs is an error.
        """
        if self.hub is not None:
            return self._read_hub(wanted)
        out: dict[str, Any] = {}
        for path, metadata in self.trees:
            here = {k: wanted[k] for k in metadata if k in wanted}
            for name, want in here.items():
                self._check_shape(name, metadata[name].shape, want)
            if here:
                out |= flatten(_restore(path, unflatten(here)))
        return out

    def _read_hub(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        assert self.hub is not None
        rows = {row.hf: row for path, row in self._rows.items() if path in wanted}
        out: dict[str, Any] = {}
        for row in rows.values():
            for name, x in self.hub.read(row).items():
                if name in wanted:
                    self._check_shape(name, x.shape, wanted[name])
                    out[name] = _place(x, wanted[name])
        return out

    def dtype_of(self, path: str) -> np.dtype[Any]:
        if self.hub is not None:
            dtype = self.hub.tensors[self._rows[path].tensors[0]].dtype
            assert dtype is not None
            return dtype
        return np.dtype(self._metadata(path)[1].dtype)

    def piece(self, path: str, index: Any) -> np.ndarray:
        """A part of one parameter, on the host: a layer's number, or a slice of one without."""
        if self.hub is not None:
            return self.hub.read_layer(self._rows[path], path, index)
        return open_array(self._metadata(path)[0], path)[index].read().result()

    def _metadata(self, path: str) -> tuple[Path, Any]:
        return next((tree, found[path]) for tree, found in reversed(self.trees) if path in found)

    def _check_shape(self, name: str, shape: Any, want: Any) -> None:
        if tuple(shape) != tuple(want.shape):
            raise UserError(
                f"{self.directory}: {name} has shape {tuple(shape)}, the config says "
                f"{tuple(want.shape)}"
            )


def open_stored(directory: str | Path, kind: str = "model") -> Stored:
    """Opens a native or Hugging Face directory; `kind` ("model" or "teacher") picks a part where
    a Hugging Face directory has both."""
    if reader.is_hugging_face(directory):
        hub = reader.open_directory(directory)
        return Stored(str(directory), hub.part(kind).config, hub.data, hub=hub)
    directory = Path(directory)
    config, data = _read_config(directory)
    if not isinstance(config, RunConfig):
        trees = [_open_tree(directory / "params")]
        return Stored(str(directory), config, data, trees=tuple(trees))
    step = latest_step(directory)
    if step is None:
        raise UserError(f"{directory}: no finished checkpoint")
    trees = [_open_tree(directory / "checkpoints" / str(step) / "params")]
    if (directory / "frozen").is_dir():
        trees.insert(0, _open_tree(directory / "frozen"))
    return Stored(str(directory), config, data, step, tuple(trees))


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


def _restore(path: Path, item: Any) -> Any:
    args = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path.absolute(), args=args)


def _place(x: np.ndarray, want: Any) -> jax.Array:
    """A host array onto the devices of `want`, in its dtype; each host has the whole of x."""
    return jax.make_array_from_callback(
        x.shape, want.sharding, lambda index: x[index].astype(want.dtype)
    )


def load(directory: str | Path, kind: str = "model") -> tuple[Stored, dict[str, Any]]:
    """Opens a directory and reads all of it, in its own dtypes, onto the first local device."""
    stored = open_stored(directory, kind)
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if stored.hub is not None:
        stored.hub.check()
        rows = stored.hub.part(kind).rows
        arrays = {k: x for row in rows if row.native for k, x in stored.hub.read(row).items()}
        return stored, unflatten({k: jax.device_put(x, where) for k, x in arrays.items()})
    wanted = {
        name: jax.ShapeDtypeStruct(m.shape, np.dtype(m.dtype), sharding=where)
        for _, metadata in stored.trees
        for name, m in metadata.items()
    }
    return stored, unflatten(stored.read(wanted))


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
