"""What every combination of registered parts has to hold, whoever registered them.

A part that is added to a registry is tested here without another line; combinations are named
changes of one small config (`VARIANTS`), so a new axis is a new line. A fork's file joins by

    HOVLE_PLUGINS=my_part.py pytest tests/test_combinations.py
"""

import dataclasses
import functools
import itertools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hovle_jax
from hovle_jax import model, optim, sharding, stages
from hovle_jax.checkpoint import save_model
from hovle_jax.config import IGNORE, MeshConfig, ModelConfig, OptimConfig, RunConfig
from hovle_jax.errors import UserError
from hovle_jax.generation import decode
from hovle_jax.hf.configs import IMAGE_MASKS, IMAGE_POSITIONS
from hovle_jax.hf.families import FAMILIES
from hovle_jax.hf.writer import ExportOptions, write_directory
from hovle_jax.nn.compressors import COMPRESSORS
from hovle_jax.nn.layers import LAYER_TYPES, MLPS
from hovle_jax.nn.masks import MASKS
from hovle_jax.nn.positions import POSITIONS
from hovle_jax.nn.stack import take_apart
from hovle_jax.registry import load_plugins
from hovle_jax.tree import flatten, split, unflatten
from tests import small

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
PARTS = ("llm_family", "layer_type", "modality_experts", "compressor", "tile_mask")
PARTS += ("spatial_positions",)
PLUGINS = tuple(str(EXAMPLES / f"{name}.py") for name in PARTS)
load_plugins((*PLUGINS, *filter(None, os.environ.get("HOVLE_PLUGINS", "").split(":"))))

LAYERS = dataclasses.replace(small.LAYERS, rope_theta=100.0)
BASE = dataclasses.replace(
    small.PRE, embedding=LAYERS, decoder=LAYERS, plugins=PLUGINS, initializer_range=0.25
)
Changes = dict[str, object]


def both(field: str, value: object) -> Changes:
    """The same field of both stacks."""
    return {f"{stack}.{field}": value for stack in ("embedding", "decoder")}


# Name -> changes of BASE, one part at a time.
VARIANTS: dict[str, Changes] = {
    **{"pre": {}, "post": {"shuffle_loc": "post"}},
    **{
        name: {"llm_family": name} | {f"decoder.{flag}": on for flag, on in family.flags.items()}
        for name, family in FAMILIES.items()
        if name != BASE.llm_family
    },
    **{kind: both("layer_types", (kind,)) for kind in LAYER_TYPES if kind != "attention"},
    **{name: both("mlp", name) for name in MLPS if name != "swiglu"},
    **{name: {"compressor": name, "shuffle": 4} for name in COMPRESSORS if name != BASE.compressor},
    **{  # every mask with some scheme: neither cares what the other is
        f"{mask}, {positions}": both("mask", mask) | both("positions", positions)
        for n, mask, positions in zip(
            range(max(len(MASKS), len(POSITIONS))),
            itertools.cycle(MASKS),
            itertools.cycle(POSITIONS),
            strict=False,
        )
        if n  # the first of both are BASE's
    },
}
# Parts that touch each other; `pytest -m slow` has them, and the engine runs the last.
CROSSES: dict[str, Changes] = {
    "post, other masks and positions in each stack": {
        **{"shuffle_loc": "post", "embedding.mask": "prefix", "embedding.positions": "3d"},
        **{"decoder.mask": "bidirectional", "decoder.positions": "2d"},
    },
    "qwen3, wide heads, norms in both stacks": {
        **{"llm_family": "qwen3", **both("qk_norm", True), **both("head_dim", 12)}
    },
    "post, hybrid, pooled": {
        **{"shuffle_loc": "post", "compressor": "average_pool", "decoder.qk_norm": True},
        **{"embedding.layer_types": ("linear_attention",)},
        **{"decoder.layer_types": ("min_gru", "attention"), "decoder.mask": "bidirectional"},
        **{"embedding.mlp": "modality_experts"},
    },
}
EVERY = pytest.mark.parametrize(
    "name", [*VARIANTS, *(pytest.param(name, marks=pytest.mark.slow) for name in CROSSES)]
)


def config_of(name: str) -> ModelConfig:
    config = BASE
    for key, value in (VARIANTS | CROSSES)[name].items():
        stack, _, field = key.rpartition(".")
        part = {field: value}
        if stack:
            part = {stack: dataclasses.replace(getattr(config, stack), **part)}
        config = dataclasses.replace(config, **part)
    return config


def arithmetic(config: ModelConfig) -> ModelConfig:
    """Families differ in names and flags, nothing else: their programs need no compiling twice."""
    return dataclasses.replace(config, llm_family=BASE.llm_family)


@functools.cache
def params_of(name: str):
    """Random weights, biases and norms."""
    rng, flat = np.random.default_rng(3), {}
    for path, x in sorted(flatten(model.abstract_params(config_of(name))).items()):
        noise = rng.standard_normal(x.shape).astype(np.float32)
        flat[path] = jnp.asarray(1 + 0.2 * noise if path.endswith("scale") else 0.25 * noise)
    return unflatten(flat)


# Compiling is most of the time here and speed of execution none of it.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def sample(c: ModelConfig, seed: int, tiles: int, before: int, after: int):
    """(ids, pixels): text, one image of so many tiles, text."""
    rng = np.random.default_rng(seed)
    image = [c.img_start_id, *[c.img_context_id] * (tiles * c.tokens_per_tile), c.img_end_id]
    ids = [1, *rng.integers(3, 80, before), *image, *rng.integers(3, 80, after)]
    pixels = rng.integers(0, 256, (tiles, c.image_size, c.image_size, 3))
    return np.array(ids, np.int32), pixels.astype(np.uint8)


def pack(c: ModelConfig, rows: list, length: int = 48, tiles: int = 4) -> dict[str, np.ndarray]:
    """Rows of samples -> a batch in which every text token is to be predicted."""
    shape = (len(rows), length)
    ids, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    pixels = np.full((len(rows), tiles, c.image_size, c.image_size, 3), 77, np.uint8)
    for r, samples in enumerate(rows):
        start = tile = 0
        for s, (tokens, images) in enumerate(samples):
            where = slice(start, start + len(tokens))
            ids[r, where], segments[r, where] = tokens, s + 1
            positions[r, where] = np.arange(len(tokens))
            pixels[r, tile : tile + len(images)] = images
            start, tile = where.stop, tile + len(images)
    predicted = (segments > 0) & (ids < c.im_end_id)
    return {
        **{"input_ids": ids, "segment_ids": segments, "position_ids": positions},
        **{"labels": np.where(predicted, ids, IGNORE), "loss_weight": np.float32(predicted)},
        "pixels": pixels,
    }


@EVERY
def test_parameters_are_counted_grouped_and_frozen_by_stage(name):
    config = config_of(name)
    shapes = flatten(model.abstract_params(config))
    assert sum(x.size for x in shapes.values()) == config.params()
    assert {k: len(v) for k, v in flatten(model.param_axes(config)).items()} == {
        k: x.ndim for k, x in shapes.items()
    }
    optim.group_labels(OptimConfig().groups, unflatten(shapes))  # each in exactly one group
    for stage, expected in (
        ("distill", {k for k in shapes if k.startswith("embedding/") and "/text/" not in k}),
        ("align", {k for k in shapes if k.startswith("embedding/")}),
        ("instruct", set(shapes)),
    ):
        row = stages.get_stage(stage)
        parts = {k: x for k, x in shapes.items() if k.startswith(row.parts)}
        trainable, _ = split(parts, row.trainable)
        assert set(flatten(trainable)) == expected
    flops = config.flops_per_token(64)
    assert flops["decoder"] > 2 * 0.9 * config.decoder.params()


@functools.cache
def losses_and_gradients(config: ModelConfig):
    """(params, float pixels, batch) -> ((loss, nll [B, S]), gradients)."""
    run = RunConfig(stage="instruct", model=config)
    stage = stages.get_stage("instruct")

    def loss(params, pixels, batch):
        batch = batch | {"pixels": pixels}
        nll = stage.terms(params, {}, batch, run)["next_token"]
        weights = stage.weights(batch, run)["next_token"]
        return (nll * weights).sum() / weights.sum(), nll

    return compiled(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@EVERY
def test_packed_rows_and_gradients(name):
    """A sample's losses are the same alone and in company; every parameter and every tile that is
    read has a gradient."""
    config, params = config_of(name), params_of(name)
    a, b = sample(config, 0, 2, 4, 7), sample(config, 1, 1, 2, 9)
    batch = pack(config, [[a, b], [b, a], [a], [b]])
    pixels = np.float32(batch.pop("pixels")) / 64 - 2
    step = losses_and_gradients(arithmetic(config))
    (_, nll), (by_params, by_pixels) = step(params, pixels, batch)
    nll, size_a, size_b = np.asarray(nll), len(a[0]), len(b[0])
    assert np.ptp(nll[2, :size_a]) > 0.5  # something to compare
    for row, start, alone, size in (
        *((0, 0, 2, size_a), (0, size_a, 3, size_b)),
        *((1, 0, 3, size_b), (1, size_b, 2, size_a)),
    ):
        # The last place would predict the next sample's first token; its weight is 0.
        got = nll[row, start : start + size - 1]
        np.testing.assert_allclose(got, nll[alone, : size - 1], atol=2e-5, rtol=0)
    for path, g in flatten(by_params).items():
        assert np.all(np.isfinite(g)) and np.any(g), path
    norms = np.sqrt(np.sum(np.square(by_pixels), axis=(2, 3, 4)))
    assert np.array_equal(norms > 0, [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])


@functools.cache
def scores_of(config: ModelConfig):
    """Scores of whole rows; of the last place of prompts, of what continues them, of tokens."""

    def run(params, whole, prompt, more, counts, tokens):
        scores = [model.apply(params, whole, config)["logits"]]
        found, cache = model.prefill(params, prompt, config, 40)
        scores.append(found)
        found, cache = model.extend(params, more, counts, cache, config)
        scores.append(found)
        apart = {k: take_apart(cache[k]) for k in decode.STACKS} | {"lengths": cache["lengths"]}
        params = decode.compute_params(params, config)

        def step(cache, token):
            found, cache = decode.decode_step(params, token, cache, config)
            return cache, found

        return [*scores, *jax.lax.scan(step, apart, tokens)[1]]

    return compiled(run)


@functools.cache
def sharded_scores_of(config: ModelConfig, mesh: jax.sharding.Mesh):
    def run(params, batch):
        return model.apply(params, batch, config)["logits"]

    return compiled(run, in_shardings=(None, sharding.batch_sharding(mesh)))


@EVERY
def test_cached_and_sharded_scores_equal_plain_ones(name):
    """Prompts of two lengths, a padded continuation, single tokens; whole rows on eight devices
    (their gradients: test_sharding)."""
    config, params = config_of(name), params_of(name)
    samples = sample(config, 0, 2, 4, 9), sample(config, 1, 1, 2, 9)
    whole = pack(config, [[s] for s in samples], length=40)
    ids, ends = whole["input_ids"], np.array([len(s[0]) for s in samples])
    first = ends - 7  # tokens of the prompts; then 3 and 2 in one call, then one at a time
    counts = np.array([3, 2])
    inside = np.arange(40) < first[:, None]
    prompt = {
        "input_ids": np.where(inside, ids, config.pad_id),
        "segment_ids": np.int32(inside),
        "pixels": whole["pixels"],
    }
    more = np.stack([ids[i, n : n + 3] for i, n in enumerate(first)])

    at = [first - 1, first + counts - 1, *(first + counts + i for i in range(2))]
    tokens = np.stack([ids[np.arange(2), n] for n in at[2:]])
    run = scores_of(arithmetic(config))
    plain, *cached = map(np.asarray, run(params, whole, prompt, more, counts, tokens))
    for places, got in zip(at, cached, strict=True):
        np.testing.assert_allclose(got, plain[np.arange(2), places], atol=1e-4, rtol=0)
    assert np.ptp(cached[-1]) > 1

    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    where = sharding.tree_shardings(model.param_axes(config), params, mesh)
    with jax.set_mesh(mesh):
        sharded = sharded_scores_of(arithmetic(config), mesh)
        got = sharded(jax.device_put(params, where), whole)
    real = whole["segment_ids"] > 0
    np.testing.assert_allclose(np.asarray(got)[real], plain[real], atol=1e-4, rtol=0)


@EVERY
def test_saved_and_exported(name, tmp_path):
    """A native directory gives back config and arrays; so does an export, or it says why not."""
    config, params = config_of(name), flatten(params_of(name))
    save_model(tmp_path / "native", config, params_of(name))
    again, found = hovle_jax.load(tmp_path / "native")
    assert again == config
    stacks = (config.embedding, config.decoder)
    known = all(
        {"attention"}.issuperset(stack.types)
        and stack.mlp == "swiglu"
        and stack.mask in IMAGE_MASKS
        and stack.positions in IMAGE_POSITIONS
        for stack in stacks
    )
    if known and config.compressor == "pixel_shuffle":
        write_directory(tmp_path / "native", tmp_path / "out", ExportOptions())
        again, exported = hovle_jax.load(tmp_path / "out")
        assert again.llm_family == config.llm_family
        assert (again.embedding, again.decoder) == stacks
        found = {"native": found, "exported": exported}
    else:
        with pytest.raises(UserError, match=r"^model\.\S+: the exported format knows .* only"):
            write_directory(tmp_path / "native", tmp_path / "out", ExportOptions())
        assert not (tmp_path / "out").exists()
        found = {"native": found}
    for where, tree in found.items():
        flat = flatten(tree)
        assert flat.keys() == params.keys(), where
        for path, x in params.items():
            np.testing.assert_array_equal(np.asarray(flat[path]), x, err_msg=f"{where} {path}")
