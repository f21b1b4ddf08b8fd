"""A Hugging Face directory as native configs and parameters, read one tensor at a time, no torch.

What is understood, by config.json:

    embedding_config            HoVLE, HoVLE-HD (released layout)          one part: model
    embedding_layers            HoVLE exported as one Llama ('fused')      one part: model
    vision_config               InternVL (custom or transformers' names)   two parts: model, teacher
    internlm2, llama, qwen2...  an LLM                                     one part: model
    siglip, dinov3_vit ...      a vision tower (hf.teachers)               one part: teacher

The model part of InternVL and of an LLM holds `decoder/*` and the text table only.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hovle_jax.config import DataConfig, ModelConfig, TeacherConfig
from hovle_jax.errors import UserError
from hovle_jax.hf import names
from hovle_jax.hf.configs import (
    data_config,
    fused_config,
    hovle_config,
    internvl_llm,
    llm_config,
    teacher_config,
)
from hovle_jax.hf.families import FAMILIES
from hovle_jax.hf.section import Section
from hovle_jax.hf.shards import Tensor, open_shards, read_tensor, same_bytes
from hovle_jax.hf.teachers import HUB_TEACHERS, HubTeacher, preprocessor
from hovle_jax.hf.tokens import check_ids, token_ids

CONFIG = "config.json"
# Buffers that old transformers saved; they are computed, not learned.
_COMPUTED = r".*\.rotary_emb\.inv_freq"


@dataclass(frozen=True)
class Part:
    """A model or a teacher, and the rows of the name table that hold it."""

    config: ModelConfig | TeacherConfig
    rows: tuple[names.Row, ...]

    @property
    def row_of(self) -> dict[str, names.Row]:
        """Native path -> the row that holds it."""
        return {path: row for row in self.rows for path in row.native}


@dataclass(frozen=True)
class HubDirectory:
    """An opened Hugging Face directory; nothing but headers has been read."""

    path: Path
    data: DataConfig | None  # chat template and tile limits, of models that have them
    parts: dict[str, Part]  # by "model" and "teacher"
    tensors: dict[str, Tensor]
    ignored: str = ""  # regex over tensors that are nobody's

    def part(self, kind: str) -> Part:
        if kind not in self.parts:
            held = " and ".join(self.parts)
            raise UserError(f"{self.path}: holds a {held}, no {kind}")
        return self.parts[kind]

    def read(self, row: names.Row) -> dict[str, np.ndarray]:
        """Native arrays of one row in the file's dtype; layers are stacked as they are read.

        Raises:
          UserError: a tensor is missing, of another shape, or of a dtype that is not f32/bf16/f16.
        """
        self._check((row,))
        if not row.layers:
            arrays = row.to_native(read_tensor(self.tensors[row.hf]))
            return dict(zip(row.native, map(np.ascontiguousarray, arrays), strict=True))
        out: dict[str, np.ndarray] = {}
        for i, name in enumerate(row.tensors):
            arrays = row.to_native(read_tensor(self.tensors[name]))
            for path, x in zip(row.native, arrays, strict=True):
                if path not in out:
                    out[path] = np.empty((row.layers, *x.shape), x.dtype)
                out[path][i] = x
        return out

    def read_layer(self, row: names.Row, index: Any) -> dict[str, np.ndarray]:
        """Native arrays of a row: of layer `index`, or that part of a row without layers."""
        arrays = row.to_native(
            read_tensor(self.tensors[row.tensors[index] if row.layers else row.hf])
        )
        parts = arrays if row.layers else (x[index] for x in arrays)
        return dict(zip(row.native, parts, strict=True))

    def check(self) -> None:
        """Refuses missing, misshaped and unexpected tensors, naming them.

        Raises:
          UserError: one line with all that is wrong.
        """
        rows = [row for part in self.parts.values() for row in part.rows]
        known = {name for row in rows for name in row.tensors}
        idle = re.compile(f"{_COMPUTED}|{self.ignored}")
        extra = [n for n in self.tensors if n not in known and not idle.fullmatch(n)]
        self._check(rows, extra)

    def _check(self, rows: Any, extra: Any = ()) -> None:
        missing, misshaped, dtypes = [], [], []
        for row in rows:
            found = set()
            for name in row.tensors:
                tensor = self.tensors.get(name)
                if tensor is None:
                    missing.append(f"{name} (expected {_shape(row.shape)})")
                elif tensor.shape != row.shape:
                    shapes = f"{_shape(tensor.shape)}, expected {_shape(row.shape)}"
                    misshaped.append(f"{name} is {shapes}")
                elif tensor.dtype is None:
                    dtypes.append(f"{name} is {tensor.code}, expected F32, BF16 or F16")
                else:
                    found.add(tensor.code)
            if len(found) > 1:
                dtypes.append(f"{row.hf} is {' and '.join(sorted(found))}, expected one dtype")
        problems = [
            *_listed("missing", missing),
            *_listed("of another shape", misshaped),
            *_listed("of another dtype", dtypes),
            *_listed("not expected", [f"{n} {_shape(self.tensors[n].shape)}" for n in extra]),
        ]
        if problems:
            raise UserError(f"{self.path}: " + "; ".join(problems))


def is_hugging_face(directory: str | Path) -> bool:
    """Whether a directory's config.json is not one of the project's own."""
    return (Path(directory) / CONFIG).is_file() and not {"kind", "config"} <= set(
        read_config(directory)
    )


def read_config(directory: str | Path) -> dict[str, Any]:
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise UserError(f"{path}: not found; expected a Hugging Face model directory")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected an object")
    return raw


def open_directory(directory: str | Path) -> HubDirectory:
    """Reads config.json and the headers of the weights.

    Raises:
      UserError: a config that is not understood, or weights that are not whole.
    """
    path = Path(directory)
    raw = Section(read_config(path))
    if not is_hugging_face(path):
        raise UserError(f"{path}: is a native directory already")
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in HUB_TEACHERS:
        return _open_teacher(path, raw, HUB_TEACHERS[kind])
    known = isinstance(kind, str) and kind in FAMILIES
    towers = "vision_config" in raw and kind in (None, "internvl_chat", "internvl")
    if not ({"embedding_config", "embedding_layers"} & set(raw) or towers or known):
        if kind in ("hovle", "internvl_chat", "internvl"):
            raise UserError(
                f"{path / CONFIG}: model_type {kind!r} with neither embedding_config (HoVLE) nor "
                "vision_config (InternVL)"
            )
        raise UserError(
            f"{path / CONFIG}: model_type {kind!r} is not HoVLE, InternVL, "
            + ", ".join([*FAMILIES, *HUB_TEACHERS])
            + "; a plug-in may add it (hovle import --plugin)"
        )
    tensors, tokens = open_shards(path), token_ids(path)
    try:
        data = data_config(raw)
        parts = _parts(raw, path.resolve().name, tensors, tokens)
    except UserError as error:
        raise UserError(f"{path / CONFIG}: {error}") from None
    config = parts["model"].config
    assert isinstance(config, ModelConfig)
    check_ids(config, path)
    return HubDirectory(path, data, parts, tensors)


def _open_teacher(path: Path, raw: Section, form: HubTeacher) -> HubDirectory:
    tensors = open_shards(path)
    try:
        config = form.config(raw, preprocessor(path))
    except UserError as error:
        raise UserError(f"{path / CONFIG}: {error}") from None
    part = Part(config, tuple(form.rows(config, tensors)))
    return HubDirectory(path, None, {"teacher": part}, tensors, form.ignored)


def _parts(
    raw: Section, name: str, tensors: Mapping[str, Tensor], tokens: Mapping[str, int]
) -> dict[str, Part]:
    if "embedding_layers" in raw:
        config = fused_config(raw, name, tokens)
        return {"model": Part(config, tuple(names.fused(config)))}
    if "embedding_config" in raw:
        body, head, llm = "language_model.model", "language_model.", raw.section("llm_config")
        config = _untied(hovle_config(raw, name, tokens), llm, body, head, tensors)
        return {"model": Part(config, tuple(names.hovle(config)))}
    if "vision_config" not in raw:
        config = _untied(llm_config(raw, name, tokens), raw, "model", "", tensors)
        return {"model": Part(config, tuple(names.language_model(config)))}
    outer, body, head, tower = "", "language_model.model", "language_model.", names.TEACHER_NAMES
    if raw.get("model_type") == "internvl":
        # transformers has moved these prefixes more than once: the files say which they use.
        tower = names.TEACHER_NAMES_TRANSFORMERS
        if f"model.{tower['class']}" in tensors:
            outer, body, head = "model.", "model.language_model", ""
    vision = teacher_config(raw)
    llm = raw.section("llm_config" if "llm_config" in raw else "text_config")
    config = _untied(internvl_llm(raw, name, tokens), llm, body, head, tensors)
    return {
        "teacher": Part(vision, tuple(names.teacher(vision, tower, outer))),
        "model": Part(config, tuple(names.language_model(config, body, head))),
    }


def _untied(
    config: ModelConfig, llm: Section, body: str, head: str, tensors: Mapping[str, Tensor]
) -> ModelConfig:
    """Versions of transformers disagree on which config key ties a head; a head that is there
    wins, unless the LLM's own config says that there is none.

    Raises:
      UserError: tied by the LLM's own config, and a head that is not the table.
    """
    family = FAMILIES.find(config.llm_family)
    own, table = f"{head}{family.head}.weight", f"{body}.{family.table}.weight"
    if own not in tensors:
        return config
    tied = llm.flag("tie_word_embeddings", False)
    if tied and table in tensors and not same_bytes(tensors[own], tensors[table]):
        raise UserError(
            f"{llm.name('tie_word_embeddings')} is true, but {own} is not {table}, and versions of "
            "transformers differ on which they use; set the key to false or delete the tensor"
        )
    return dataclasses.replace(config, tie_head=False)


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _listed(what: str, entries: list[str], most: int = 3) -> list[str]:
    if not entries:
        return []
    more = f" and {len(entries) - most} more" if len(entries) > most else ""
    plural = "tensor" if len(entries) == 1 else "tensors"
    return [f"{len(entries)} {plural} {what}: " + ", ".join(entries[:most]) + more]
