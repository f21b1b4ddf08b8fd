"""Recorded outputs of another implementation against ours: `hovle verify`."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax import model, stages
from hovle_jax.checkpoint import load
from hovle_jax.config import IGNORE, ModelConfig, RunConfig, TeacherConfig
from hovle_jax.errors import UserError
from hovle_jax.generation.generate import generate
from hovle_jax.hf import reader
from hovle_jax.hf.cases import (
    BFLOAT16_ULPS,
    EAGER_PADDING,
    LOSSES,
    NOT_COMPUTED,
    PADDED_LENGTH,
    STATES,
    Arrays,
    CaseReport,
    Comparison,
    batch_of,
    channels_last,
    difference,
    failed,
    outputs,
    read_case,
    tiles_per_row,
    under,
)
from hovle_jax.hf.dynamic_rope import recompute, rescales, stretched_rows
from hovle_jax.hf.gradients import compare_gradients, hub_gradients
from hovle_jax.nn import embedding, teacher
from hovle_jax.nn.compressors import pixel_shuffle
from hovle_jax.tree import flatten, unflatten

Batch = dict[str, Any]


class Verifier:
    """A loaded directory that can be held against recorded cases."""

    def __init__(self, directory: str | Path, dtype: str = "", rounded: str = ""):
        """Reads each tensor once.

        dtype: compute in it; '' = the weights' own (float16 computes in float32).
        rounded: round the weights to it first, as an export in that dtype does.
        """
        self._directory = str(directory)
        self._model: tuple[ModelConfig, Any] | None = None
        self._teacher: tuple[TeacherConfig, Any] | None = None
        self._paths: set[str] = set()
        self.dtype = dtype
        for kind in _kinds(directory):
            stored, params = load(directory, kind)
            flat = flatten(params)
            del params
            bfloat16 = next(iter(flat.values())).dtype == jnp.bfloat16
            self.dtype = self.dtype or ("bfloat16" if bfloat16 else "float32")
            for name in flat:  # one by one: two copies of a model may be too many
                x = flat[name].astype(rounded) if rounded else flat[name]
                flat[name] = x.astype(jnp.float32)
            if isinstance(stored.config, TeacherConfig):
                config: Any = dataclasses.replace(stored.config, dtype=self.dtype)
                self._teacher = config, unflatten(flat)
            else:
                config = dataclasses.replace(stored.model, dtype=self.dtype, remat="none")
                self._model, self._paths = (config, unflatten(flat)), set(flat)
        if self._model is None and self._teacher is None:
            raise UserError(f"{directory}: holds neither a model nor a teacher")

    def case(self, path: str | Path) -> CaseReport:
        """Compares everything a case file holds.

        Raises:
          UserError: a file that is no case, or none of whose arrays this directory can produce.
        """
        z = read_case(path)
        try:
            found = list(self._compare(z))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        compared = tuple(c for c in found if isinstance(c, Comparison))
        if not compared:
            raise UserError(f"{path}: holds no recorded output this directory can produce")
        skipped = [s for s in found if isinstance(s, str)]
        looked_at = {c.name.split("[")[0] for c in compared} | {s.split(": ")[0] for s in skipped}
        skipped += [f"{key}: {NOT_COMPUTED}" for key in outputs(z) if key not in looked_at]
        return CaseReport(str(path), compared, tuple(skipped))

    def _compare(self, z: Arrays) -> Iterator[Comparison | str]:
        sizes = sorted({m[1] for k in z if (m := re.fullmatch(r"(\d+)\.in\.pixel_values", k))})
        if self._teacher is not None:
            for size in sizes:
                yield from self._teacher_case(under(z, f"{size}."), f"{size}.")
        if self._model is None:
            return
        if self._is_whole or any(_HOVLE_ONLY.fullmatch(key) for key in z):
            self.whole_model()
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
        stretched = stretched_rows(config, mask)
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
                actual = ours[name]  # [T, places, C], recorded as such or as [T, rows, columns, C]
                same_size = actual.size == expected.size
                yield self._states(
                    key, actual.reshape(expected.shape) if same_size else actual, expected
                )
            elif all(stretched):
                yield f"{key}: {PADDED_LENGTH}"
            elif name != "image_embeds":
                short = expected.shape[1:2] == mask.shape[1:]
                inside = mask if short or expected.ndim < 2 else ours["long_mask"]
                if expected.ndim < 2:
                    yield failed(
                        key, STATES, f"recorded as {list(expected.shape)}, not [B, L, ...]"
                    )
                    continue
                inside = inside[:, : expected.shape[1]]
                if expected.shape[:2] != inside.shape or inside.sum() != len(ours[name]):
                    reason = f"recorded as {list(expected.shape)} for input_ids {list(mask.shape)}"
                    yield failed(key, STATES, reason)
                    continue
                same = ~np.repeat(stretched, inside.sum(axis=1))
                yield self._states(key, ours[name][same], expected[inside][same])
        if any(stretched):
            for key in z:
                if re.fullmatch(r"(flash\.)?(out\.loss.*|gradw?\.(norms|full\..*))", key):
                    yield f"{key}: {PADDED_LENGTH}"
        else:
            yield from self._losses(z, batch, params, config, left)
        yield from self._generation(z)

    @functools.cached_property
    def _is_whole(self) -> bool:
        return self._model is not None and self._paths >= set(
            flatten(model.abstract_params(self._model[0]))
        )

    def whole_model(self) -> tuple[ModelConfig, Any]:
        """Config and float32 parameters of a HoVLE.

        Raises:
          UserError: the directory holds a part of one, or a teacher.
        """
        if self._model is None or not self._is_whole:
            held = "an LLM alone" if "decoder/norm/scale" in self._paths else "the embedding module"
            held = held if self._model is not None else "a teacher"
            raise UserError(
                f"{self._directory}: holds {held}, no whole HoVLE (stage II and later do)"
            )
        return self._model

    def _language_model(self) -> tuple[ModelConfig, Any]:
        needed = {"decoder/norm/scale", "decoder/head/kernel", "embedding/text/table"}
        if self._model is None or not needed <= self._paths:
            raise UserError(f"{self._directory}: holds no LLM (stage II and later do)")
        return self._model

    def greedy(
        self, prompts: Sequence[np.ndarray], tiles: Sequence[np.ndarray], new: int
    ) -> list[list[int]]:
        """`new` tokens after each prompt, as the reference decodes."""
        config, params = self.whole_model()
        if rescales(config, prompts, tiles, new):
            return recompute(params, config, prompts, tiles, new)
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
            ours["pixel_shuffle"] = np.asarray(pixel_shuffle(jnp.asarray(before), config.shuffle))
        return ours

    def _losses(
        self, z: Arrays, batch: Batch, params: Any, config: ModelConfig, left: bool
    ) -> Iterator[Comparison | str]:
        if "in.labels" not in z:
            return
        labels = np.asarray(z["in.labels"])
        for key in ("in.labels", "in.loss_weight", "in.loss_weight_all"):
            if key in z and z[key].shape != batch["input_ids"].shape:
                shape = list(batch["input_ids"].shape)
                raise UserError(f"{key}: expected {shape} as input_ids, got {list(z[key].shape)}")
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

        plain = (labels != IGNORE).astype(np.float32)
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
                yield self._states(key, np.asarray(value), z[key], LOSSES)
            if wanted and self.dtype == "float32":
                hub = hub_gradients(config, grads)
                yield from compare_gradients(z, hub, grad, left)
            else:
                yield from (f"{key}: gradients are compared in float32" for key in wanted)

    def _generation(self, z: Arrays) -> Iterator[Comparison | str]:
        if "gen.input_ids" not in z:
            return
        keys = [k for k in ("gen.tokens", "flash.gen.tokens", "gen.generate_tokens") if k in z]
        if self.dtype != "float32":
            reason = "greedy tokens are compared in float32 (near-ties flip in bfloat16)"
            yield from (f"{key}: {reason}" for key in keys)
            return
        config, _ = self.whole_model()
        batch = batch_of(z, "gen", config)
        mask = batch["segment_ids"] > 0
        prompts = [ids[m] for ids, m in zip(batch["input_ids"], mask, strict=True)]
        if np.any(~mask[:, 0]):
            yield from (f"{key}: {EAGER_PADDING}" for key in keys if not key.startswith("flash."))
            keys = [k for k in keys if k.startswith("flash.")]
        for key in [k for k in keys if z[k].ndim != 2 or len(z[k]) != len(prompts)]:
            yield failed(key, 0.0, f"recorded as {list(z[key].shape)} for {len(prompts)} prompts")
            keys.remove(key)
        stretched = stretched_rows(config, mask, extra=z[keys[0]].shape[1] if keys else 0)
        if any(stretched):
            yield f"gen.* of padded rows: {PADDED_LENGTH}"
        if all(stretched):
            yield from (f"{key}: {PADDED_LENGTH}" for key in keys)
            return
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
        config, params = self._language_model()
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
            expected = z["out.logits"]
            if expected.shape[:2] != mask.shape:
                reason = f"recorded as {list(expected.shape)} for input_ids {list(mask.shape)}"
                yield failed(f"{prefix}out.logits", STATES, reason)
            else:
                yield self._states(f"{prefix}out.logits", ours, expected[mask])

    def _teacher_case(self, z: Arrays, prefix: str) -> Iterator[Comparison | str]:
        """hidden_N, pooler, pixel_shuffle_VERSION, extract_feature_VERSION[_select-N]."""
        assert self._teacher is not None
        config, params = self._teacher
        given = channels_last(z["in.pixel_values"], f"{prefix}in.pixel_values", config.patch_size)
        pixels = jnp.asarray(given)
        least, most = -config.num_layers - 1, config.num_layers

        def hidden_state(key: str, number: str) -> int:
            if not least <= int(number) <= most:
                raise UserError(f"{prefix}{key}: this teacher has hidden states up to {most}")
            return int(number)

        @functools.cache
        def run(version: str, select: int) -> dict[str, np.ndarray]:
            c = dataclasses.replace(config, shuffle_version=version, select_layer=select)
            return {k: np.asarray(v) for k, v in teacher.apply(params, pixels, c).items()}

        for key, expected in z.items():
            if m := re.fullmatch(r"out\.hidden_(\d+)", key):
                ours = run("v2", hidden_state(key, m[1]))["hidden"]
            elif key == "out.pooler":
                ours = run("v2", -1)["hidden"][:, 0]
            elif m := re.fullmatch(r"out\.pixel_shuffle_(v\d)", key):
                hidden = run("v2", config.select_layer)["hidden"][:, 1:]
                shuffled = pixel_shuffle(jnp.asarray(hidden), config.shuffle, m[1])
                ours = np.asarray(shuffled)
                ours = ours.reshape(expected.shape) if ours.size == expected.size else ours
            elif m := re.fullmatch(r"out\.extract_feature(?:_(v\d))?(?:_select(-?\d+))?", key):
                select = hidden_state(key, m[2]) if m[2] else config.select_layer
                ours = run(m[1] or config.shuffle_version, select)["features"]
            else:
                continue
            yield self._states(prefix + key, ours, expected)

    # --- tolerances --------------------------------------------------------------------------

    def _states(
        self, name: str, ours: np.ndarray, expected: np.ndarray, float32: float = STATES
    ) -> Comparison:
        found = difference(name, ours, expected, float32)
        if found.reason:
            return found
        return dataclasses.replace(found, tolerance=self._tolerance(expected, float32))

    def _tolerance(self, expected: np.ndarray, float32: float) -> float:
        if self.dtype == "float32":
            return float32
        scale = float(np.abs(expected).max()) if expected.size else 0.0
        return BFLOAT16_ULPS * scale


def _kinds(directory: str | Path) -> tuple[str, ...]:
    if reader.is_hugging_face(directory):
        return tuple(reader.open_directory(directory).parts)
    return ("model",)


# What no LLM by itself records.
_HOVLE_ONLY = re.compile(
    r"in\.(pixel_values|hd_.*)|(flash\.)?out\.(embed_.*|llm_.*|image_embeds|pixel_shuffle.*|vision_.*"
    r"|pos_embed_.*|resize_pos_.*)|gen\..*"
)
