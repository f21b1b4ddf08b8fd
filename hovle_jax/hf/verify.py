"""Recorded outputs of another implementation against ours: `hovle verify`."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax import embedding, model, stages, teacher
from hovle_jax.checkpoint import Stored, load
from hovle_jax.config import ModelConfig, RunConfig, TeacherConfig
from hovle_jax.errors import UserError
from hovle_jax.generate import generate
from hovle_jax.hf import names, reader
from hovle_jax.hf.cases import (
    BFLOAT16_ULPS,
    EAGER_PADDING,
    GRADIENTS,
    LOSSES,
    PADDED_LENGTH,
    STATES,
    Arrays,
    CaseReport,
    Comparison,
    batch_of,
    read_case,
    tiles_per_row,
    under,
)
from hovle_jax.tree import flatten

Batch = dict[str, Any]


class Verifier:
    """A loaded directory that can be held against recorded cases."""

    def __init__(self, directory: str | Path, dtype: str = ""):
        """`dtype`: compute in it; '' = the weights' own (float16 computes in float32)."""
        self._directory = str(directory)
        parts = dict(_parts(directory))
        if not parts:
            raise UserError(f"{directory}: holds neither a model nor a teacher")
        some = next(iter(flatten(next(iter(parts.values()))[1]).values()))
        own = "bfloat16" if some.dtype == jnp.bfloat16 else "float32"
        self.dtype = dtype or own
        self._model: tuple[ModelConfig, Any] | None = None
        self._teacher: tuple[TeacherConfig, Any] | None = None
        self._whole = False
        for stored, params in parts.values():
            params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
            if isinstance(stored.config, TeacherConfig):
                self._teacher = dataclasses.replace(stored.config, dtype=self.dtype), params
            else:
                config = dataclasses.replace(stored.model, dtype=self.dtype, remat="none")
                self._model = config, params
                self._whole = "embedding/vision/position" in stored.paths

    def case(self, path: str | Path) -> CaseReport:
        """Compares everything a case file holds.

        Raises:
          UserError: a file that is no case, or none of whose arrays this directory can produce.
        """
        found = list(self._compare(read_case(path)))
        compared = tuple(c for c in found if isinstance(c, Comparison))
        if not compared:
            raise UserError(f"{path}: holds no recorded output this directory can produce")
        return CaseReport(str(path), compared, tuple(s for s in found if isinstance(s, str)))

    def _compare(self, z: Arrays) -> Iterator[Comparison | str]:
        sizes = sorted({m[1] for k in z if (m := re.fullmatch(r"(\d+)\.in\.pixel_values", k))})
        if self._teacher is not None:
            for size in sizes:
                yield from self._teacher_case(under(z, f"{size}."), f"{size}.")
        if self._model is None:
            return
        if self._whole:
            yield from self._interpolation(z)
            if "in.input_ids" in z:
                yield from self._model_case(z)
            elif "gen.input_ids" in z:
                yield from self._generation(z)
        elif "in.input_ids" in z:
            yield from self._language_case(z, "")
        elif "full.in.input_ids" in z:
            pixels = z[f"{sizes[0]}.in.pixel_values"] if sizes else None
            yield from self._language_case(under(z, "full."), "full.", pixels)

    # --- HoVLE -------------------------------------------------------------------------------

    def _model_case(self, z: Arrays) -> Iterator[Comparison | str]:
        config, params = self.whole_model()
        batch = batch_of(z, "in", config)
        mask = batch["segment_ids"] > 0
        left, ours = bool(np.any(~mask[:, 0])), self._outputs(batch, mask)
        stretched = _stretched(config, mask)
        if any(stretched):
            yield f"padded rows: {PADDED_LENGTH}"
        for key, expected in z.items():
            prefix, _, name = key.rpartition("out.")
            if prefix not in ("", "flash.") or name not in ours:
                continue
            per_tile = name in ("vision_embeddings", "pixel_shuffle", "pixel_shuffle_proj")
            if left and not prefix and not per_tile:
                yield f"{key}: {EAGER_PADDING}"
            elif per_tile or (name == "image_embeds" and not any(stretched)):
                yield self._states(key, ours[name].reshape(expected.shape), expected)
            elif all(stretched):
                yield f"{key}: {PADDED_LENGTH}"
            elif name != "image_embeds":
                inside = mask if expected.shape[1] == mask.shape[1] else ours["long_mask"]
                inside = inside[:, : expected.shape[1]]
                same = ~np.repeat(stretched, inside.sum(axis=1))
                yield self._states(key, ours[name][same], expected[inside][same])
        if any(stretched):
            yield f"losses and gradients: {PADDED_LENGTH}"
        else:
            yield from self._losses(z, batch, params, config, left)
        yield from self._generation(z)

    def whole_model(self) -> tuple[ModelConfig, Any]:
        """Config and float32 parameters."""
        if self._model is None:
            raise UserError(f"{self._directory}: holds no model")
        return self._model

    def greedy(
        self, prompts: Sequence[np.ndarray], tiles: Sequence[np.ndarray], new: int
    ) -> list[list[int]]:
        """`new` tokens after each prompt, as the reference decodes."""
        config, params = self.whole_model()
        if _rescales(config, prompts, tiles, new):
            return _recompute(params, config, prompts, tiles, new)
        return generate(params, config, prompts, tiles, max_new=new, stop_ids=())

    def _outputs(self, batch: Batch, mask: np.ndarray) -> dict[str, np.ndarray]:
        """Every named intermediate at the places that are not padding: [places, ...]."""
        config, params = self.whole_model()
        run = jax.jit(functools.partial(model.apply, config=config, keep_hidden=True))
        out = jax.tree.map(np.asarray, run(params, batch))
        tiles = tiles_per_row(batch, config)
        long = mask
        if config.shuffle_loc == "post":
            keys = ("input_ids", "segment_ids", "position_ids")
            short = embedding.short_stream(*(jnp.asarray(batch[k]) for k in keys))
            most = batch["pixels"].shape[1] if "pixels" in batch else 0
            long = np.asarray(embedding.long_stream(short, most, config).segment_ids) > 0
        e, d = out["embedding"], out["decoder"]
        ours = {
            "long_mask": long,
            "embed_input": e["embed_input"][long],
            "embed_output": e["hidden"][-1][long],
            "llm_input": out["embeddings"][mask],
            "llm_norm": out["hidden"][mask],
            "logits": out["logits"][mask],
        }
        ours |= {f"embed_layer_{i}": x[long] for i, x in enumerate(e["hidden"])}
        ours |= {f"llm_layer_{i}": x[mask] for i, x in enumerate(d["hidden"])}

        def of_tiles(x: np.ndarray) -> np.ndarray:
            return np.concatenate([row[:n] for row, n in zip(x, tiles, strict=True)])

        is_image = batch["input_ids"] == config.img_context_id
        if config.shuffle_loc == "pre":
            ours["image_embeds"] = e["hidden"][-1][is_image]
        if "pixels" in batch:
            ours["vision_embeddings"] = of_tiles(e["vision_embeddings"])
            ours["pixel_shuffle_proj"] = of_tiles(e["projected"])
            before = ours["vision_embeddings"]
            if config.shuffle_loc == "post":
                ours["image_embeds"] = ours["pixel_shuffle_proj"]
                streams = np.asarray(embedding.long_stream(short, most, config).ids)
                patches = e["hidden"][-1][(streams == config.img_context_id) & long]
                before = patches.reshape(
                    -1, (batch["pixels"].shape[-2] // config.patch_size) ** 2, patches.shape[-1]
                )
            ours["pixel_shuffle"] = np.asarray(
                embedding.pixel_shuffle(jnp.asarray(before), config.shuffle)
            )
        return ours

    def _losses(
        self, z: Arrays, batch: Batch, params: Any, config: ModelConfig, left: bool
    ) -> Iterator[Comparison | str]:
        if "in.labels" not in z:
            return
        labels = np.asarray(z["in.labels"])
        run = RunConfig(stage="instruct", model=config)

        @functools.partial(jax.jit, static_argnums=2)
        def loss(params: Any, weight: jax.Array, with_grad: bool) -> Any:
            b: Any = batch | {"labels": jnp.asarray(labels, jnp.int32), "loss_weight": weight}
            # Weights of places that predict nothing count in the reference's mean.
            count = jnp.sum(weight[:, 1:])

            def mean(params: Any) -> jax.Array:
                stage = stages.STAGES["instruct"]
                nll = stage.terms(params, {}, b, run)["next_token"]
                return jnp.sum(nll * stage.weights(b, run)["next_token"]) / count

            return jax.value_and_grad(mean)(params) if with_grad else (mean(params), None)

        plain = (labels != -100).astype(np.float32)
        kinds = {"loss": ("grad", plain)}
        if "in.loss_weight" in z:
            kinds["loss_weighted"] = ("gradw", z["in.loss_weight"].astype(np.float32))
        if "in.loss_weight_all" in z:
            kinds["loss_weighted_all"] = ("", z["in.loss_weight_all"].astype(np.float32))
        for name, (grad, weight) in kinds.items():
            keys = [f"{p}out.{name}" for p in ("", "flash.") if f"{p}out.{name}" in z]
            wanted = [k for k in z if grad and re.match(rf"(flash\.)?{grad}\.", k)]
            if not keys and not wanted:
                continue
            value, grads = loss(params, jnp.asarray(weight), bool(wanted))
            for key in keys:
                if left and not key.startswith("flash."):
                    yield f"{key}: {EAGER_PADDING}"
                    continue
                tolerance = self._tolerance(z[key], LOSSES)
                yield Comparison(key, abs(float(value) - float(z[key])), tolerance)
            if wanted and self.dtype == "float32":
                hub = hub_gradients(config, grads)
                yield from _gradients(z, hub, grad, left)
            elif wanted:
                yield f"{grad}.*: gradients are compared in float32"

    def _generation(self, z: Arrays) -> Iterator[Comparison | str]:
        if "gen.input_ids" not in z:
            return
        keys = [k for k in ("gen.tokens", "flash.gen.tokens", "gen.generate_tokens") if k in z]
        if self.dtype != "float32":
            yield "gen.*: greedy tokens are compared in float32 (near-ties flip in bfloat16)"
            return
        config, _ = self.whole_model()
        mask = z["gen.attention_mask"] > 0
        prompts = [ids[m] for ids, m in zip(z["gen.input_ids"], mask, strict=True)]
        if np.any(~mask[:, 0]):
            yield f"gen.tokens: {EAGER_PADDING}"
            keys = [k for k in keys if k.startswith("flash.")]
        stretched = _stretched(config, mask, extra=z[keys[0]].shape[1] if keys else 0)
        if any(stretched):
            yield f"gen.* of padded rows: {PADDED_LENGTH}"
        if all(stretched):
            return
        batch = batch_of(z, "gen", config)
        pixels = batch.get("pixels")
        shape = (config.image_size, config.image_size, 3)
        tiles = [
            np.zeros((0, *shape), np.float32) if pixels is None else pixels[i, :n]
            for i, n in enumerate(tiles_per_row(batch, config))
        ]
        for key in keys:
            ours = self.greedy(prompts, tiles, z[key].shape[1])
            differ = (np.asarray(ours) != z[key])[~stretched]
            yield Comparison(key, float(np.sum(differ)), 0.0)

    def _interpolation(self, z: Arrays) -> Iterator[Comparison | str]:
        """Other tile sizes: in.pixel_values_HxW, out.vision_embeddings_HxW, out.pos_embed_RxC,
        out.resize_pos_embeddings_SIZE."""
        config, params = self.whole_model()
        vision = params["embedding"]["vision"]
        for key, expected in z.items():
            if m := re.fullmatch(r"out\.vision_embeddings_(\d+x\d+)", key):
                pixels = np.moveaxis(z[f"in.pixel_values_{m[1]}"], 1, -1)
                ours = embedding.PatchEmbedding(config).apply({"params": vision}, pixels)
            elif m := re.fullmatch(r"out\.pos_embed_(\d+)x(\d+)", key):
                grid = (int(m[1]), int(m[2]))
                ours = embedding.resize_positions(vision["position"][1:], grid)[None]
            elif m := re.fullmatch(r"out\.resize_pos_embeddings_(\d+)", key):
                side = int(m[1]) // config.patch_size
                rest = embedding.resize_positions(vision["position"][1:], (side, side))
                ours = jnp.concatenate([vision["position"][:1], rest])[None]
            else:
                continue
            yield self._states(key, np.asarray(ours), expected)

    # --- LLMs and teachers -------------------------------------------------------------------

    def _language_case(
        self, z: Arrays, prefix: str, pixels: np.ndarray | None = None
    ) -> Iterator[Comparison | str]:
        """The LLM alone: `text_embeddings` from its table, `logits`; its image tokens, if it has
        any, are the teacher's features of the first of `pixels` [T, 3, H, W]."""
        config, params = self.whole_model()
        batch: Batch = batch_of(
            {k: v for k, v in z.items() if k != "in.pixel_values"}, "in", config
        )
        mask = batch["segment_ids"] > 0
        features = None
        if self._teacher is not None and pixels is not None:
            vision, teacher_params = self._teacher
            tiles = jnp.asarray(np.moveaxis(pixels, 1, -1))
            out = teacher.apply(teacher_params, tiles, vision)["features"]
            features = out.reshape(1, -1, out.shape[-1])
        if "out.text_embeddings" in z:
            ours = np.asarray(model.text_vectors(params, jnp.asarray(batch["input_ids"]), config))
            yield self._states(f"{prefix}out.text_embeddings", ours, z["out.text_embeddings"])
        if "out.logits" in z:
            x = model.language_hidden(params, batch, config, features)
            ours = np.asarray(model.logits(params, x))[mask]
            yield self._states(f"{prefix}out.logits", ours, z["out.logits"][mask])

    def _teacher_case(self, z: Arrays, prefix: str) -> Iterator[Comparison | str]:
        """hidden_N, pooler, pixel_shuffle_VERSION, extract_feature_VERSION[_select-N]."""
        assert self._teacher is not None
        config, params = self._teacher
        pixels = jnp.asarray(np.moveaxis(z["in.pixel_values"], 1, -1))

        @functools.cache
        def run(version: str, select: int) -> dict[str, np.ndarray]:
            c = dataclasses.replace(config, shuffle_version=version, select_layer=select)
            return {k: np.asarray(v) for k, v in teacher.apply(params, pixels, c).items()}

        for key, expected in z.items():
            if m := re.fullmatch(r"out\.hidden_(\d+)", key):
                ours = run("v2", int(m[1]))["hidden"]
            elif key == "out.pooler":
                ours = run("v2", -1)["hidden"][:, 0]
            elif m := re.fullmatch(r"out\.pixel_shuffle_(v\d)", key):
                hidden = run("v2", config.select_layer)["hidden"][:, 1:]
                shuffled = embedding.pixel_shuffle(jnp.asarray(hidden), config.shuffle, m[1])
                ours = np.asarray(shuffled)
                ours = ours.reshape(expected.shape)
            elif m := re.fullmatch(r"out\.extract_feature(?:_(v\d))?(?:_select(-?\d+))?", key):
                select = int(m[2]) if m[2] else config.select_layer
                ours = run(m[1] or config.shuffle_version, select)["features"]
            else:
                continue
            yield self._states(prefix + key, ours, expected)

    # --- tolerances --------------------------------------------------------------------------

    def _states(self, name: str, ours: np.ndarray, expected: np.ndarray) -> Comparison:
        if ours.shape != expected.shape:
            return Comparison(name, math.inf, STATES)
        difference = np.abs(ours.astype(np.float64) - expected.astype(np.float64))
        largest = float(difference.max()) if difference.size else 0.0
        return Comparison(name, largest, self._tolerance(expected, STATES))

    def _tolerance(self, expected: np.ndarray, float32: float) -> float:
        if self.dtype == "float32":
            return float32
        scale = float(np.abs(expected).max()) if expected.size else 0.0
        return BFLOAT16_ULPS * scale


def _parts(directory: str | Path) -> Iterator[tuple[str, tuple[Stored, Any]]]:
    kinds: Sequence[str] = ("model",)
    if reader.is_hugging_face(directory):
        kinds = tuple(reader.open_directory(directory).parts)
    for kind in kinds:
        yield kind, load(directory, kind)


def hub_gradients(config: ModelConfig, grads: Any) -> dict[str, np.ndarray]:
    """Gradients by the released tensors' names; tensors that nothing reads are missing."""
    flat = {k: np.asarray(v) for k, v in flatten(grads).items()}
    out = {}
    for row in names.hovle(config):
        if not row.native:
            continue
        arrays = tuple(flat.pop(path) for path in row.native)
        for i, name in enumerate(row.tensors):
            out[name] = row.to_hf(tuple(a[i] for a in arrays) if row.layers else arrays)
    assert not flat, f"gradients without a name: {sorted(flat)}"
    return out


def _gradients(
    z: Arrays, ours: Mapping[str, np.ndarray], kind: str, left: bool
) -> Iterator[Comparison | str]:
    for prefix in ("", "flash."):
        recorded = [
            k for k in z if k.startswith((f"{prefix}{kind}.norms", f"{prefix}{kind}.full."))
        ]
        if left and not prefix:
            yield from (f"{key}: {EAGER_PADDING}" for key in recorded)
            continue
        for key in recorded:
            if key.endswith(".norms"):
                yield from _norms(key, z["grad.names"].tolist(), z[key].tolist(), ours)
            else:
                expected = z[key].astype(np.float64)
                actual = ours.get(key.split(".full.")[1], np.zeros_like(expected))
                scale = float(np.linalg.norm(expected)) or 1.0
                difference = float(np.linalg.norm(actual - expected)) / scale
                yield Comparison(key, difference, GRADIENTS)


def _norms(
    key: str, recorded: Sequence[str], norms: Sequence[float], ours: Mapping[str, np.ndarray]
) -> Iterator[Comparison]:
    found = {k: float(np.linalg.norm(v.astype(np.float64))) for k, v in ours.items()}
    for name in sorted(set(found) - set(recorded)):
        yield Comparison(f"{key}[{name}]", math.inf, GRADIENTS)
    for name, norm in zip(recorded, norms, strict=True):
        if np.isnan(norm) or norm == 0:  # no gradient there: none here either
            yield Comparison(f"{key}[{name}]", found.get(name, 0.0), 0.0)
        else:
            yield Comparison(f"{key}[{name}]", abs(found.get(name, 0.0) - norm) / norm, GRADIENTS)


def _stretched(config: ModelConfig, mask: np.ndarray, extra: int = 0) -> np.ndarray:
    """bool [B]: rows whose padding changes the reference's dynamic rope."""
    stacks = (config.embedding, config.decoder)
    trained = [s.max_positions for s in stacks if s.rope_scaling == "dynamic"]
    if not trained or mask.shape[1] + extra <= min(trained):
        return np.zeros(len(mask), bool)
    return np.asarray(~mask.all(axis=1))


def _rescales(
    config: ModelConfig, prompts: Sequence[np.ndarray], tiles: Sequence[np.ndarray], new: int
) -> bool:
    """Whether dynamic rope scaling sets in before the last token."""

    def reaches(stack: Any, extra: Sequence[int]) -> bool:
        longest = max(len(p) + x for p, x in zip(prompts, extra, strict=True)) + new
        return stack.rope_scaling == "dynamic" and longest > stack.max_positions

    grown = config.tokens_per_tile * (config.shuffle**2 - 1)
    post = config.shuffle_loc == "post"
    extra = [len(t) * grown if post else 0 for t in tiles]
    return reaches(config.embedding, extra) or reaches(config.decoder, [0] * len(prompts))


def _recompute(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[np.ndarray],
    tiles: Sequence[np.ndarray],
    new: int,
) -> list[list[int]]:
    """Greedy decoding without a cache, row by row.

    Past the trained length dynamic rope scaling turns every key anew with each token, which the
    reference does and no cache can.
    """
    run: Callable[..., Any] = jax.jit(functools.partial(model.apply, config=config))
    out = []
    for prompt, own in zip(prompts, tiles, strict=True):
        ids = [int(i) for i in prompt]
        for _ in range(new):
            batch = {"input_ids": jnp.asarray([ids], jnp.int32)}
            if len(own):
                batch["pixels"] = jnp.asarray(own[None])
            ids.append(int(run(params, batch)["logits"][0, -1].argmax()))
        out.append(ids[len(prompt) :])
    return out
