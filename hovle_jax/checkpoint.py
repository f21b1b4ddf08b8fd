"""Model directories: what is on disk, how it is written, how it is read onto any mesh.

    model or teacher directory          work directory of a run
      config.json  plugins/               config.json  plugins/  .py files of model.plugins
      params/       all parameters        frozen/            parameters the run does not train, once
      tokenizer/    (models)              checkpoints/STEP/  params/ optimizer/ meta (cursor)
      unused.safetensors (imported)       tokenizer/  metrics.jsonl

digests.json in params, frozen and STEP lists what was written; nothing is read that differs. With
config.storage, frozen and checkpoints lie there and not in the work directory.

Reading merges `frozen` with the newest finished checkpoint, and kernels with adapters (`lora.py`),
so all kinds load the same way. A Hugging Face directory can stand wherever a model or teacher
directory can (`hf.reader`).
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
from etils import epath

from hovle_jax import heads, lora, model, sharding
from hovle_jax.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    TeacherConfig,
    from_dict,
    to_dict,
)
from hovle_jax.data import files
from hovle_jax.data.pipeline import START, Cursor
from hovle_jax.errors import UserError, one_line
from hovle_jax.hf import reader
from hovle_jax.hf.tokens import check_ids
from hovle_jax.nn import teacher
from hovle_jax.output import replace_bytes, replace_json
from hovle_jax.registry import copy_plugins
from hovle_jax.run import digests
from hovle_jax.run.metrics import json_lines, parse_rows
from hovle_jax.streaming import open_arrays, read_array
from hovle_jax.tree import flatten, unflatten

REWINDS = "rewinds.jsonl"  # beside the checkpoints
CONFIG = "config.json"
PLUGINS = "plugins"  # copies of the config's plug-in files
UNUSED = "unused.safetensors"  # released tensors that nothing reads (hf.importer)
_KINDS: dict[str, Any] = {"model": ModelConfig, "teacher": TeacherConfig, "run": RunConfig}
_PACKAGES = ("hovle-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")
Config = ModelConfig | TeacherConfig | RunConfig


def write_config(directory: str | Path, config: Config, data: DataConfig | None = None) -> None:
    """config.json: what the directory is, its resolved config and the package versions; plug-ins.

    `data` keeps the chat template and tile limits of a model that is no run.
    """
    kind = next(k for k, cls in _KINDS.items() if isinstance(config, cls))
    found = {p.metadata["Name"].lower(): p.version for p in importlib.metadata.distributions()}
    versions = {p: found[p] for p in _PACKAGES if p in found}
    body = {"kind": kind, "config": to_dict(config), "versions": versions}
    if data is not None:
        body["data"] = to_dict(data)
    if not isinstance(config, TeacherConfig):
        plugins = (config.model if isinstance(config, RunConfig) else config).plugins
        copy_plugins(plugins, Path(directory) / PLUGINS)
    replace_json(Path(directory) / CONFIG, body)


def read_config(directory: str | Path) -> Config:
    return _read_config(directory)[0]


def _read_config(directory: str | Path) -> tuple[Config, DataConfig | None]:
    files.check_local(directory, "a model or work directory")
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise UserError(f"{directory}: no {CONFIG}; expected a model or work directory")
    try:
        body = json.loads(path.read_text())
        copies = Path(directory) / PLUGINS
        config = from_dict(_KINDS[body["kind"]], body["config"], str(path), copies)
        data = from_dict(DataConfig, body["data"], str(path)) if "data" in body else None
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{path}: not a hovle_jax config ({error!r})") from None
    return config, config.data if isinstance(config, RunConfig) else data


def save_model(directory: str | Path, config: ModelConfig | TeacherConfig, params: Any) -> None:
    """Writes a model or teacher directory (parameters may be a part of the model's tree)."""
    write_config(directory, config)
    write_tree(Path(directory) / "params", params)


def write_tree(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes arrays into a directory that then is complete, or lacks its digests.json."""
    directory = _absolute(path)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, tree, force=True)
    if jax.process_index() == 0:
        digests.write(directory)


def _absolute(path: str | os.PathLike[str]) -> epath.Path:
    return epath.Path(path if files.is_remote(os.fspath(path)) else os.path.abspath(path))


def storage_of(workdir: str | Path, config: RunConfig) -> epath.Path:
    """Where a run keeps `frozen` and `checkpoints`: local, gs:// or whatever epath knows."""
    return _absolute(config.storage or workdir)


@dataclasses.dataclass(frozen=True)
class Stored:
    """An opened directory: its config and where each parameter lies."""

    directory: str
    config: Config
    data: DataConfig | None  # chat template and tile limits
    step: int | None = None  # of a run
    trees: tuple[
        tuple[epath.Path, dict[str, Any]], ...
    ] = ()  # (its directory, {path: TensorStore})
    verified: bool = False  # the contents of the trees have been compared with their digests
    merged: bool = True  # kernels are given with their adapters, not beside them
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
        paths = {path for _, arrays in self.trees for path in arrays}
        return {p for p in paths if not lora.is_adapter(p)} if self.merged else paths

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
        self._verify()
        out: dict[str, Any] = {}
        for path, arrays in self.trees:
            here = {k: wanted[k] for k in arrays if k in wanted}
            for name, want in here.items():
                self._check_shape(name, arrays[name].shape, want)
            if here:
                out |= flatten(_restore(path, unflatten(here), arrays))
        return {path: self._adapted(path, x) for path, x in out.items()}

    def _has_adapter(self, path: str) -> bool:
        a, _ = lora.factors(path)
        return self.merged and any(a in arrays for _, arrays in self.trees)

    def _adapted(self, path: str, kernel: jax.Array) -> jax.Array:
        """Of a parameter as read: itself, or with its adapter, made where it lies."""
        if not self._has_adapter(path):
            return kernel
        near = where = kernel.sharding
        if isinstance(where, jax.sharding.NamedSharding):
            near = sharding.replicated(where.mesh)
        wanted = {
            name: jax.ShapeDtypeStruct(self._array(name)[1].shape, np.float32, sharding=near)
            for name in lora.factors(path)
        }
        found = dataclasses.replace(self, merged=False).read(wanted)
        with jax.default_matmul_precision("highest"):
            merge = jax.jit(self._merge, out_shardings=where)
            return merge(kernel, *(found[name] for name in lora.factors(path)))

    def _merge(self, kernel: Any, a: Any, b: Any) -> Any:
        assert isinstance(self.config, RunConfig)
        return lora.merge(kernel, a, b, lora.scale(self.config.lora)).astype(kernel.dtype)

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
        if self._has_adapter(path):
            return np.dtype(np.float32)
        return np.dtype(self._array(path)[1].dtype.numpy_dtype)

    def pieces(self, paths: Sequence[str], index: Any) -> tuple[np.ndarray, ...]:
        """A part of each parameter, on the host: a layer's number, or a slice of one without.

        A Hugging Face tensor that holds several of them is read once.
        """
        if self.hub is None:
            self._verify()
            return tuple(self._piece(path, index) for path in paths)
        found: dict[str, np.ndarray] = {}
        for path in paths:
            if path not in found:
                found |= self.hub.read_layer(self._rows[path], index)
        return tuple(found[path] for path in paths)

    def _piece(self, path: str, index: Any) -> np.ndarray:
        tree, array = self._array(path)
        piece = read_array(tree, path, array, index)
        if not self._has_adapter(path):
            return piece
        assert isinstance(self.config, RunConfig)
        beside = dataclasses.replace(self, merged=False)
        a, b = lora.factors(path)
        # A slice of a matrix is one of its first inputs, which B does not have.
        of_b = index if isinstance(index, int) else ...
        pair = beside._piece(a, index), beside._piece(b, of_b)
        return np.asarray(lora.merge(piece, *pair, lora.scale(self.config.lora)))

    def check(self) -> None:
        """Refuses tensors or arrays that are not those of the config, naming them."""
        if self.hub is not None:
            self.hub.check()
            return
        if isinstance(self.config, TeacherConfig):
            shapes = flatten(teacher.abstract_params(self.config))
        else:
            shapes = flatten(model.abstract_params(self.model))
        if isinstance(self.config, RunConfig):
            shapes |= flatten(lora.shapes(self.config))
        for name, array in ((k, x) for _, arrays in self.trees for k, x in arrays.items()):
            if name not in shapes:
                raise UserError(f"{self.directory}: holds {name}, which the config has not")
            self._check_shape(name, array.shape, shapes[name])

    def _verify(self) -> None:
        """Once; a flipped bit would otherwise be read as a number."""
        if not self.verified:
            for tree, _ in self.trees:
                _check_digests(tree, contents=True)
            object.__setattr__(self, "verified", True)

    def _array(self, path: str) -> tuple[epath.Path, Any]:
        return next((tree, found[path]) for tree, found in reversed(self.trees) if path in found)

    def _check_shape(self, name: str, shape: Any, want: Any) -> None:
        if tuple(shape) != tuple(want.shape):
            raise UserError(
                f"{self.directory}: {name} has shape {tuple(shape)}, the config says "
                f"{tuple(want.shape)}"
            )


def open_stored(
    directory: str | Path, kind: str = "model", *, verified: bool = False, merged: bool = True
) -> Stored:
    """Opens a native or Hugging Face directory; `kind` ("model" or "teacher") picks a part where
    a Hugging Face directory has both. `verified`: the caller has compared it with its digests.
    `merged`: kernels are read with their adapters."""
    files.check_local(directory, "a model or work directory")
    if reader.is_hugging_face(directory):
        hub = reader.open_directory(directory)
        return Stored(str(directory), hub.part(kind).config, hub.data, hub=hub)
    stored = _open_native(*_at_step(Path(directory)))
    stored = dataclasses.replace(stored, verified=verified, merged=merged)
    if not isinstance(stored.config, TeacherConfig):
        check_ids(stored.model, stored.tokenizer)
    return stored


def _at_step(directory: Path) -> tuple[Path, int | None]:
    """(work directory, step) of WORKDIR/checkpoints/STEP, wherever config.storage keeps that;
    (directory, None) of anything else."""
    of_run = directory.name.isdigit() and directory.parent.name == "checkpoints"
    if of_run and (directory.parents[1] / CONFIG).is_file():
        return directory.parents[1], int(directory.name)
    return directory, None


def _open_native(directory: Path, step: int | None = None) -> Stored:
    """`step`: of a run; None for the newest."""
    config, data = _read_config(directory)
    if not isinstance(config, RunConfig):
        trees = [open_tree(_absolute(directory / "params"))]
        return Stored(str(directory), config, data, trees=tuple(trees))
    storage = storage_of(directory, config)
    step = latest_step(directory) if step is None else step
    if step is None:
        raise UserError(f"{directory}: no finished checkpoint")
    path, arrays = open_tree(storage / "checkpoints" / str(step) / "params")
    trees = [(path, {k: x for k, x in arrays.items() if not k.startswith(heads.PREFIX)})]
    if (storage / "frozen").is_dir():
        trees.insert(0, open_tree(storage / "frozen"))
    return Stored(str(directory), config, data, step, tuple(trees))


def finished_steps(root: epath.Path) -> list[int]:
    """The checkpoints below `root`, oldest first; one being written has another name."""
    if not root.is_dir():
        return []
    return sorted(int(path.name) for path in root.iterdir() if path.name.isdigit())


def run_storage(workdir: str | Path) -> epath.Path:
    """`storage_of` a work directory by its own config; itself where it has none yet."""
    if not (Path(workdir) / CONFIG).is_file():
        return _absolute(workdir)
    config = read_config(workdir)
    return storage_of(workdir, config) if isinstance(config, RunConfig) else _absolute(workdir)


def latest_step(workdir: str | Path) -> int | None:
    """Newest finished checkpoint of a work directory; unfinished ones do not count."""
    return max(finished_steps(run_storage(workdir) / "checkpoints"), default=None)


def open_tree(path: epath.Path) -> tuple[epath.Path, dict[str, Any]]:
    """An Orbax directory with its arrays, which are not yet read; its files have their sizes."""
    if not path.is_dir():
        raise UserError(f"{path}: missing; the directory is not complete")
    _check_digests(path, contents=False)
    return path, open_arrays(path)


def _check_digests(tree: epath.Path, *, contents: bool) -> None:
    """Of a tree by itself, or of one item of a checkpoint."""
    item = tree.parent.name.isdigit() and tree.parent.parent.name == "checkpoints"
    root, under = (tree.parent, f"{tree.name}/") if item else (tree, "")
    if lines := digests.damage(root, under, contents=contents):
        raise UserError(f"{lines[0]}; copy {root} again, or make it anew")


def _restore(path: epath.Path, item: Any, arrays: Mapping[str, Any]) -> Any:
    args = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path, args=args)
    except Exception as error:  # orbax raises nothing narrower
        for name in flatten(item):  # which array it was, in one line
            read_array(path, name, arrays[name])
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from error


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
    root = run_storage(workdir) / "checkpoints"
    found = [s for s in finished_steps(root) if s < step]
    return (max(found), cursor_after(root / str(max(found)))) if found else (0, START)


def cursor_after(checkpoint: epath.Path) -> Cursor:
    """Where the data goes on after a checkpoint: its own cursor, or that of the last rewind to it,
    which left batches out."""
    own: Cursor = read_meta(checkpoint)["cursor"]
    # A checkpoint of the same step that came about in another way is not the one that was meant.
    rewound = [
        row["cursor"]
        for row in read_rewinds(checkpoint.parent.parent)
        if row["to"] == int(checkpoint.name) and row["instead_of"] == own
    ]
    return rewound[-1] if rewound else own


def read_rewinds(storage: epath.Path) -> list[dict[str, Any]]:
    """How often a run went back after a spike: {"step" that spiked, "reason", "to" which
    checkpoint, "cursor" of the data from there on, "instead_of" the checkpoint's own}."""
    path = storage / REWINDS
    return parse_rows(path.read_text(), str(path)) if path.exists() else []


def add_rewind(storage: epath.Path, row: Mapping[str, Any]) -> None:
    """The file is whole at any time: a store has an object in one piece or not at all."""
    path, content = storage / REWINDS, json_lines([*read_rewinds(storage), row])
    if files.is_remote(os.fspath(path)):
        path.write_bytes(content)
    else:
        replace_bytes(path, content)


def read_meta(checkpoint: epath.Path) -> dict[str, Any]:
    """What a checkpoint holds besides arrays: {"cursor", "skipped"}."""
    path = checkpoint / "meta" / "metadata"
    try:
        return json.loads(path.read_text())
    except Exception as error:  # every store has its own
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
