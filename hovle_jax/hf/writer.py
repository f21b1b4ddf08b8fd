"""Native directory -> complete Hugging Face directory.

The result needs nothing of this project: weights, config, modelling code that imports only torch
and transformers, tokenizer, processor, chat template, generation config, model card and a report of
what was verified. Weights are converted one tensor at a time, without torch.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hovle_jax.checkpoint import UNUSED, Stored, open_stored
from hovle_jax.config import DataConfig, ModelConfig, RunConfig
from hovle_jax.data.samples import check_tokenizer, get_template
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.hf import card, config_json, names
from hovle_jax.hf.chat_template import chat_template
from hovle_jax.hf.directory import new_directory
from hovle_jax.hf.importer import copy_tokenizer, has_tokenizer
from hovle_jax.hf.reader import open_directory
from hovle_jax.hf.shards import ShardWriter, Tensor, read_header, read_tensor
from hovle_jax.hf.tokenizer_json import tokenizer_files
from hovle_jax.hf.tokens import check_ids
from hovle_jax.output import write_json
from hovle_jax.run.metrics import Progress

REMOTE = Path(__file__).parent / "remote"
_SHARED = ("configuration_hovle.py", "modeling_hovle_layers.py", "modeling_hovle_images.py")
CODE = {
    "reference": (*_SHARED, "modeling_hovle.py"),
    "fused": (*_SHARED, "modeling_hovle_fused.py"),
}
PROCESSOR_CODE = ("image_processing_hovle.py", "processing_hovle.py")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
Plan = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


@dataclass(frozen=True)
class ExportOptions:
    flavour: str = "reference"  # reference (released tensor names) | fused (one Llama)
    dtype: str = ""  # '' = as stored
    max_shard_bytes: int = 5 * 10**9
    assets: str = ""  # directory whose tokenizer files are copied; '' = the model's own
    license: str = "other"


def parse_size(text: str) -> int:
    """'5GB', '200MB' -> bytes, in powers of ten as the Hugging Face tools count."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])B", text.strip().upper())
    if not match:
        raise UserError(f"--max-shard-size: {text!r} is not a size such as 5GB or 200MB")
    return max(1, int(float(match[1]) * {"K": 10**3, "M": 10**6, "G": 10**9}[match[2]]))


def write_directory(
    model_dir: str | Path,
    out: str | Path,
    options: ExportOptions,
    check: Callable[[Path], dict[str, Any]] | None = None,
) -> list[str]:
    """Writes OUT; returns remarks about what it could not include.

    `check` gets the finished directory before it is renamed, and what it returns goes into
    verification.json.

    Raises:
      UserError: a model that is not whole or cannot be written in this flavour; a full disk.
    """
    stored = open_stored(model_dir)
    stored.check()
    config, data = stored.model, stored.data or DataConfig()
    if data.tiler != "dynamic":
        raise UserError(
            f"{model_dir}: was trained with data.tiler={data.tiler!r}; the image processor of an "
            "export cuts tiles as 'dynamic' does"
        )
    table = {"reference": names.hovle, "fused": names.fused}[options.flavour]
    describe = {"reference": config_json.hovle_json, "fused": config_json.fused_json}[
        options.flavour
    ]
    rows, _ = table(config), describe(config, data, "float32")  # refuse before anything is read
    lacking = sorted({p for row in rows for p in row.native} - stored.paths)
    if lacking:
        raise UserError(
            f"{model_dir}: has no {lacking[0]}: not a whole model (stage II and later are)"
        )
    remarks = _check_kept(stored, rows)
    assets = _assets(stored, config, options)
    sources = {
        name: _source(stored, config, row, i) for row in rows for i, name in enumerate(row.tensors)
    }
    plan: Plan = {
        name: (row.shape, DTYPES[options.dtype] if options.dtype else _dtype(stored, row))
        for row in rows
        for name in row.tensors
    }
    plan = dict(sorted(plan.items(), key=lambda item: _natural(item[0])))
    dtypes = sorted({str(dtype) for _, dtype in plan.values()})
    description = describe(config, data, _dtype_name(plan))
    size = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in plan.values())
    progress = Progress("export: tensors", len(plan), 50)
    with new_directory(out, size) as partial:
        writer = ShardWriter(partial, plan, options.max_shard_bytes)
        try:
            for done, (name, read) in enumerate(sources.items(), 1):
                writer.write(name, read().astype(plan[name][1], copy=False))
                progress.update(done)
        finally:
            writer.close()
        remarks += _add_files(partial, assets, config, data, description, options)
        report: dict[str, Any] = {
            "flavour": options.flavour,
            "tensors": len(plan),
            "parameters": sum(int(np.prod(shape)) for shape, _ in plan.values()),
            "dtypes": dtypes,
            "checks": {},
        }
        open_directory(partial).check()
        report["checks"]["layout"] = "every tensor present, of the expected shape and dtype"
        if check is not None:
            report["checks"] |= check(partial)
        write_json(partial / "verification.json", report)
        text = card.model_card(stored, config, report, options.license)
        (partial / "README.md").write_text(text, "utf-8")
    return remarks


def _assets(stored: Stored, config: ModelConfig, options: ExportOptions) -> Path:
    """The directory of the tokenizer's files, if there are any.

    Raises:
      UserError: --assets without a tokenizer, or a tokenizer of another model.
    """
    assets = Path(options.assets) if options.assets else stored.tokenizer
    if has_tokenizer(assets):
        # A SentencePiece model may hold the tokens itself; `check_tokenizer` looks there.
        check_ids(config, assets, complete=not (assets / "tokenizer.model").is_file())
    elif options.assets:
        raise UserError(f"--assets {assets}: no tokenizer (tokenizer.model or tokenizer.json)")
    return assets


def _check_kept(stored: Stored, rows: list[names.Row]) -> list[str]:
    """Remarks about tensors nothing reads that are made up, of a model that is no run.

    Raises:
      UserError: one that is there, but of another shape or kind.
    """
    kept, idle = _kept(stored), [row for row in rows if not row.native]
    for row in idle:
        tensor = kept.get(row.hf)
        if tensor is not None and (tensor.shape != row.shape or tensor.dtype is None):
            raise UserError(
                f"{tensor.file}: {row.hf} is {tensor.code} {list(tensor.shape)}, expected "
                f"{list(row.shape)}; delete the file to export without"
            )
    lost = [row.hf for row in idle if row.hf not in kept]
    if not lost or isinstance(stored.config, RunConfig):
        return []
    return [f"{stored.directory}: no {UNUSED}: nothing reads {' and '.join(lost)}, made up here"]


def _source(
    stored: Stored, config: ModelConfig, row: names.Row, i: int
) -> Callable[[], np.ndarray]:
    """How to get one Hugging Face tensor."""
    if not row.native:
        return lambda: _unused(stored, config, row)
    index: Any = i if row.layers else slice(None)
    return lambda: row.to_hf(stored.pieces(row.native, index))


def _dtype(stored: Stored, row: names.Row) -> np.dtype[Any]:
    if not row.native:
        tensor = _kept(stored).get(row.hf)
        if tensor is not None and tensor.dtype is not None:
            return tensor.dtype
        return stored.dtype_of("embedding/text/table")
    # A tensor of several parameters, of which some may have trained: none of them is rounded.
    return functools.reduce(np.promote_types, map(stored.dtype_of, row.native))


def _kept(stored: Stored) -> Mapping[str, Tensor]:
    """Tensors nothing reads, where the model was imported with them."""
    if stored.hub is not None:
        return stored.hub.tensors
    path = Path(stored.directory) / UNUSED
    return read_header(path) if path.is_file() else {}


def _unused(stored: Stored, config: ModelConfig, row: names.Row) -> np.ndarray:
    """The tensor as imported; of a model trained here, the text table or zeros (class token)."""
    tensor = _kept(stored).get(row.hf)
    if tensor is not None:
        return read_tensor(tensor)
    table = "embedding/text/table"
    if row.shape == (config.text_rows, config.hidden_size):
        return stored.pieces((table,), slice(None))[0]
    return np.zeros(row.shape, stored.dtype_of(table))


def _dtype_name(plan: Plan) -> str:
    sizes: dict[str, int] = {}
    for shape, dtype in plan.values():
        sizes[str(dtype)] = sizes.get(str(dtype), 0) + int(np.prod(shape))
    return max(sizes, key=lambda k: sizes[k])


def _natural(name: str) -> list[Any]:
    """Sorts layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _write_template(out: Path, template: str, before: str, after: str) -> list[str]:
    """The chat that the model was trained on, whatever the copied files of an LLM say; remarks."""
    remarks = []
    for name in ("chat_template.jinja", "chat_template.json"):
        if (out / name).is_file() and (out / name).read_text("utf-8") != template:
            remarks += [f"{before}another chat template in {name}:{after}"]
        (out / name).unlink(missing_ok=True)
    (out / "chat_template.jinja").write_text(template, "utf-8")
    path = out / "tokenizer_config.json"
    raw = json.loads(path.read_bytes()) if path.is_file() else {}
    if raw.get("chat_template", template) != template:
        write_json(path, raw | {"chat_template": template})
        remarks += [f"{before}another chat template in {path.name}:{after}"]
    return remarks


def _add_files(
    out: Path,
    assets: Path,
    config: ModelConfig,
    data: DataConfig,
    description: dict[str, Any],
    options: ExportOptions,
) -> list[str]:
    """Everything but the weights; returns remarks."""
    write_json(out / "config.json", description)
    write_json(out / "generation_config.json", config_json.generation_json(config))
    for name in CODE[options.flavour]:
        shutil.copyfile(REMOTE / name, out / name)
    copied = set(copy_tokenizer(assets, out))
    if not has_tokenizer(assets):
        return [f"{assets} has no tokenizer: exported without one, and without a processor"]
    # Servers encode rendered chats without special tokens: BOS has to be in the text.
    template = chat_template(get_template(data.template), data.system, bos=True)
    remarks = []
    if "tokenizer.model" in copied:
        tokenizer = Tokenizer.load(out)
        check_tokenizer(tokenizer, config)  # ids of another model's tokens would be nonsense
        if copied.isdisjoint(("tokenizer.json", "tokenizer_config.json")):
            try:
                files = tokenizer_files(tokenizer, template, model_max_length=data.tokens)
            except UserError as reason:
                files, remarks = {}, [f"no tokenizer.json beside tokenizer.model: {reason}"]
            for name, content in files.items():
                (out / name).write_bytes(content)
    remarks += _write_template(out, template, f"{assets}: ", f" {data.template!r} takes its place")
    for name, body in config_json.processor_json(config, data).items():
        write_json(out / name, body)
    for name in PROCESSOR_CODE:
        shutil.copyfile(REMOTE / name, out / name)
    return remarks
