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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from hovle_jax import model, teacher
from hovle_jax.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    TeacherConfig,
    from_dict,
    to_dict,
)
from hovle_jax.data.pipeline import START, Cursor
from hovle_jax.errors import UserError
from hovle_jax.hf import reader
from hovle_jax.hf.tokens import check_ids
from hovle_jax.streaming import open_arrays, read_array
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
    trees: tuple[tuple[Path, dict[str, Any]], ...] = ()  # (orbax directory, {path: TensorStore})
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
        return {path for _, arrays in self.trees for path in arrays}

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
        for path, arrays in self.trees:
            here = {k: wanted[k] for k in arrays if k in wanted}
            for name, want in here.items():
                self._check_shape(name, arrays[name].shape, want)
            if here:
                out |= flatten(_restore(path, unflatten(here), arrays))
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
        return np.dtype(self._array(path)[1].dtype.numpy_dtype)

    def pieces(self, paths: Sequence[str], index: Any) -> tuple[np.ndarray, ...]:
        """A part of each parameter, on the host: a layer's number, or a slice of one without.

        A Hugging Face tensor that holds several of them is read once.
        """
        if self.hub is None:
            where = ((path, *self._array(path)) for path in paths)
            return tuple(read_array(tree, path, array, index) for path, tree, array in where)
        found: dict[str, np.ndarray] = {}
        for path in paths:
            if path not in found:
                found |= self.hub.read_layer(self._rows[path], index)
        return tuple(found[path] for path in paths)

    def check(self) -> None:
        """Refuses tensors or arrays that are not those of the config, naming them."""
        if self.hub is not None:
            self.hub.check()
            return
        if isinstance(self.config, TeacherConfig):
            shapes = flatten(teacher.abstract_params(self.config))
        else:
            shapes = flatten(model.abstract_params(self.model))
        for name, array in ((k, x) for _, arrays in self.trees for k, x in arrays.items()):
            if name not in shapes:
                raise UserError(f"{self.directory}: holds {name}, which the config has not")
            self._check_shape(name, array.shape, shapes[name])

    def _array(self, path: str) -> tuple[Path, Any]:
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
    stored = _open_native(Path(directory))
    if not isinstance(stored.config, TeacherConfig):
        check_ids(stored.model, stored.tokenizer)
    return stored


def _open_native(directory: Path) -> Stored:
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
    return path, open_arrays(path)


def _restore(path: Path, item: Any, arrays: Mapping[str, Any]) -> Any:
    args = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path.absolute(), args=args)
    except Exception as error:  # orbax raises nothing narrower
        for name in flatten(item):  # which array it was, in one line
            read_array(path, name, arrays[name])
        raise UserError(f"{path}: cannot be read ({str(error).partition(chr(10))[0]})") from error


def _place(x: np.ndarray, want: Any) -> jax.Array:
    """A host array onto the devices of `want`, in its dtype; each host has the whole of x."""
    return jax.make_array_from_callback(
        x.shape, want.sharding, lambda index: x[index].astype(want.dtype)
    )


def load(directory: str | Path, kind: str = "model") -> tuple[Stored, dict[str, Any]]:
    """Opens a directory and reads all of it, in its own dtypes, onto the first local device."""
    stored = open_stored(directory, kind)
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    stored.check()
    if stored.hub is not None:
        rows = stored.hub.part(kind).rows
        arrays = {k: x for row in rows if row.native for k, x in stored.hub.read(row).items()}
        return stored, unflatten({k: jax.device_put(x, where) for k, x in arrays.items()})
    found = {k: jax.device_put(stored.pieces((k,), ...)[0], where) for k in sorted(stored.paths)}
    return stored, unflatten(found)


def cursor_before(workdir: str | Path, step: int) -> tuple[int, Cursor]:
    """(steps done, data cursor) of the newest checkpoint before `step`; (0, START) without one."""
    root = Path(workdir) / "checkpoints"
    found = [int(p.name) for p in root.glob("*") if p.name.isdigit() and int(p.name) < step]
    if not found:
        return 0, START
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        meta = checkpointer.restore(root.absolute() / str(max(found)) / "meta")
    return max(found), meta["cursor"]


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
