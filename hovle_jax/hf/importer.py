"""Hugging Face directory -> native directory, one tensor in memory at a time.

    OUT/ (HoVLE, LLM, tower)  config.json  params/  tokenizer/  unused.safetensors
    OUT/llm/  OUT/teacher/          the same, for an InternVL

`unused.safetensors` keeps what the released file holds and nothing reads, so that an export can
give it back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from hovle_jax import model
from hovle_jax.checkpoint import UNUSED, write_config
from hovle_jax.config import ModelConfig, TeacherConfig
from hovle_jax.hf.directory import new_directory
from hovle_jax.hf.names import Row
from hovle_jax.hf.reader import HubDirectory, Part, open_directory
from hovle_jax.hf.shards import ShardWriter, Tensor, read_tensor, reading
from hovle_jax.nn import teacher
from hovle_jax.registry import load_plugins
from hovle_jax.run.metrics import Progress
from hovle_jax.streaming import Pieces, write_pieces
from hovle_jax.tree import flatten

# What belongs to a tokenizer, of all the small files a directory may have.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "tokenization_*.py",
)


def import_directory(
    source: str | Path, out: str | Path, plugins: Sequence[str] = ()
) -> list[Path]:
    """Converts all parts of `source`; returns the native directories.

    plugins: modules or files that register what is needed to read it; written into the config.

    Raises:
      UserError: tensors that are missing, unexpected, misshaped or cut short; a full disk.
    """
    load_plugins(plugins)
    hub = open_directory(source)
    hub.check()
    out = Path(out)
    size = sum(t.stop - t.start for t in hub.tensors.values())
    progress = Progress("import: tensors", sum(len(p.rows) for p in hub.parts.values()), 10)
    single = len(hub.parts) == 1
    names = {kind: "" for kind in hub.parts} if single else {"model": "llm", "teacher": "teacher"}
    done = 0
    with new_directory(out, size) as partial:
        for kind, part in hub.parts.items():
            directory = partial / names[kind]
            directory.mkdir(exist_ok=True)
            done = _write_part(hub, part, directory, progress, done)
            config = part.config
            if isinstance(config, ModelConfig):
                config = dataclasses.replace(config, plugins=tuple(plugins))
            write_config(directory, config, hub.data if kind == "model" else None)
            if kind == "model":
                copy_tokenizer(hub.path, directory / "tokenizer")
    return [out / names[kind] for kind in hub.parts]


def _write_part(
    hub: HubDirectory, part: Part, directory: Path, progress: Progress, done: int
) -> int:
    if isinstance(part.config, TeacherConfig):
        shapes = flatten(teacher.abstract_params(part.config))
    else:
        shapes = flatten(model.abstract_params(part.config))
    finished = done

    def pieces(row: Row, which: int) -> Iterator[np.ndarray]:
        nonlocal finished
        for name in row.tensors:
            x = row.to_native(read_tensor(hub.tensors[name]))[which]
            yield x[None] if row.layers else x
        finished += which == 0
        progress.update(finished)

    arrays = {}
    for row in part.rows:
        for which, path in enumerate(row.native):
            dtype = hub.tensors[row.tensors[0]].dtype
            assert dtype is not None  # hub.check()
            shape = shapes[path].shape
            source = functools.partial(pieces, row, which)
            arrays[path] = Pieces(shape, dtype, source, bool(row.layers))
    write_pieces(directory / "params", arrays)
    unused = {
        name: hub.tensors[name] for row in part.rows if not row.native for name in row.tensors
    }
    if unused:
        _write_unused(directory / UNUSED, unused)
        finished += len(unused)
        progress.update(finished)
    return finished


def _write_unused(path: Path, tensors: dict[str, Tensor]) -> None:
    plan = {name: (t.shape, t.dtype) for name, t in tensors.items() if t.dtype is not None}
    writer = ShardWriter(path.parent, plan, file_name=path.name)
    try:
        for name, tensor in tensors.items():
            writer.write(name, read_tensor(tensor))
    finally:
        writer.close()


def has_tokenizer(directory: Path) -> bool:
    names = ("tokenizer.model", "tokenizer.json", "vocab.json")
    return any((directory / name).is_file() for name in names)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Byte copies of the tokenizer's files, whichever there are."""
    found = sorted({p for pattern in TOKENIZER_FILES for p in source.glob(pattern)})
    for path in found:
        with reading(path):
            content = path.read_bytes()
        target.mkdir(exist_ok=True)
        (target / path.name).write_bytes(content)
    return [path.name for path in found]
