"""Vision towers against transformers' own, their import, and what the student is held against."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hovle_jax import checkpoint, sharding
from hovle_jax.config import MeshConfig, TeacherConfig
from hovle_jax.data.image import resize
from hovle_jax.errors import UserError
from hovle_jax.hf import live
from hovle_jax.hf.importer import import_directory
from hovle_jax.hf.teachers import _ACTIVATIONS
from hovle_jax.nn import teacher
from hovle_jax.nn.vit import TEACHERS, _activate
from hovle_jax.run.hosts import make_mesh
from hovle_jax.tree import flatten

TOWERS = Path(__file__).parent / "golden" / "towers"
NAMES = ("siglip", "naflex", "dinov3", "dinov3_gated")
each_tower = pytest.mark.parametrize("name", NAMES)
quick = {"xla_backend_optimization_level": 0}


def test_activations():
    """CLIP's is x sigmoid(1.702 x), at most 0.02 from GELU."""
    x = jnp.linspace(-6, 6, 101)
    quick = _activate(x, "quick_gelu")
    np.testing.assert_allclose(quick, x / (1 + np.exp(-1.702 * x)), atol=1e-6)
    difference = np.abs(quick - _activate(x, "gelu")).max()
    assert 0.015 < difference < 0.025
    assert TeacherConfig(activation="quick_gelu").activation in _ACTIVATIONS.values()


def opened(directory: Path):
    stored, params = checkpoint.load(directory, "teacher")
    return dataclasses.replace(stored.config, dtype="float32"), params


def check_outputs(directory: Path) -> None:
    config, params = opened(directory)
    z = np.load(directory / "io.npz")

    def both(pixels):
        first = dataclasses.replace(config, select_layer=1)
        return (
            teacher.apply(params, pixels, config, keep_hidden=True),
            teacher.apply(params, pixels, first),
        )

    out, early = jax.jit(both, compiler_options=quick)(z["pixels"])
    patches = config.grid**2
    for ours, expected in (
        (out["features"], z["last"][:, -patches:]),  # after the final norm
        (out["layers"][0], z["hidden_1"][:, -patches:]),
        (early["hidden"], z["hidden_1"]),  # class token and registers first
        (early["features"], z["hidden_1"][:, -patches:]),  # not the last: no norm
    ):
        assert ours.shape == expected.shape
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


@each_tower
def test_towers_give_the_recorded_outputs(name):
    check_outputs(TOWERS / name)


@pytest.mark.torch
@pytest.mark.skipif(not live.available(), reason="needs torch and transformers")
def test_towers_give_what_transformers_gives(tmp_path):
    script = Path(__file__).with_name("record_towers.py")
    subprocess.run([sys.executable, script, tmp_path / "out", "7"], check=True, timeout=300)
    for name in NAMES:
        check_outputs(tmp_path / "out" / name)


def test_settings_come_from_both_json_files():
    config, _ = opened(TOWERS / "dinov3_gated")
    assert config == TeacherConfig(
        kind="dinov3",
        num_layers=2,
        hidden_size=24,
        num_heads=3,
        intermediate_size=32,
        image_size=24,
        patch_size=8,
        shuffle=1,
        norm_eps=1e-5,
        key_bias=False,
        activation="silu",
        gated=True,
        registers=3,
        rope_theta=50.0,
        out_size=24,
        dtype="float32",
    )
    mean, std = opened(TOWERS / "dinov3")[0].mean, opened(TOWERS / "siglip")[0].std
    assert (mean, std) == ((0.4, 0.45, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("name", ["siglip", "dinov3_gated"])
def test_a_tower_is_imported_as_a_native_teacher(name, tmp_path):
    (out,) = import_directory(TOWERS / name, tmp_path / "out")
    (config, params), (again, native) = opened(TOWERS / name), opened(out)
    assert config == again and out == tmp_path / "out"
    flat, found = flatten(params), flatten(native)
    assert flat.keys() == found.keys() == flatten(teacher.abstract_params(config)).keys()
    for path, x in flat.items():
        np.testing.assert_array_equal(x, found[path], path)
    checkpoint.open_stored(out, "teacher").check()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"proj_bias": False}, "proj_bias and mlp_bias must be true"),
        ({"value_bias": False}, "query_bias and value_bias"),
        ({"num_register_tokens": 0}, r"embeddings.register_tokens is \[1, 3, 24\], expected"),
        ({"num_attention_heads": 5}, "hidden_size 24 is no even multiple of 5 heads"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not 'gelu'"),
        ({"num_hidden_layers": 1}, "not expected: layer.1.attention"),
    ],
)
def test_a_config_that_is_not_the_weights_is_one_line(change, words, tmp_path):
    shutil.copytree(TOWERS / "dinov3", tmp_path / "dino")
    path = tmp_path / "dino" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words) as caught:
        import_directory(tmp_path / "dino", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_normalisation_that_is_none_is_one_line(tmp_path):
    shutil.copytree(TOWERS / "dinov3", tmp_path / "dino")
    (tmp_path / "dino" / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5]}')
    with pytest.raises(UserError, match=r"preprocessor_config.json.image_mean: expected three"):
        checkpoint.open_stored(tmp_path / "dino", "teacher")


def test_a_tower_is_no_model():
    with pytest.raises(UserError, match="holds a teacher, no model"):
        checkpoint.open_stored(TOWERS / "siglip")


def test_unknown_kinds_and_widths():
    with pytest.raises(UserError, match="config.teacher.kind: 'clip' is not one of .*internvit"):
        teacher.abstract_params(TeacherConfig(kind="clip"))
    with pytest.raises(UserError, match="out_size 2048 must be .* 4096: siglip has no projector"):
        teacher.abstract_params(TeacherConfig(kind="siglip"))


# `pytest -m slow`: each compiles two programs.
@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.slow] * (k != "dinov3")) for k in TEACHERS],
)
def test_every_tower_is_saved_and_is_the_same_on_eight_devices(kind, tmp_path):
    config = dataclasses.replace(
        TeacherConfig(kind=kind, num_layers=2, hidden_size=16, num_heads=2, intermediate_size=24),
        image_size=16,
        patch_size=4,
        shuffle=2,
        out_size=64,
        registers=1,
        initializer_range=0.2,
        dtype="float32",
    )
    make = jax.jit(lambda key: teacher.init(key, config), compiler_options=quick)
    params = make(jax.random.key(0))
    checkpoint.save_model(tmp_path / "teacher", config, params)
    stored, again = checkpoint.load(tmp_path / "teacher", "teacher")
    assert stored.config == config
    pixels = np.random.default_rng(0).integers(0, 256, (4, 2, 16, 16, 3)).astype(np.uint8)

    def run(params, pixels):
        return teacher.targets(params, pixels, config, 4, layer_places=16)

    single = jax.jit(run, compiler_options=quick)(again, pixels)
    assert single["features"].shape == (4, 2, 4, 64)
    assert single["layers"].shape == (2, 4, 2, 16, 16)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    where = sharding.tree_shardings(teacher.param_axes(config), params, mesh)
    assert any(s.spec != jax.sharding.PartitionSpec() for s in jax.tree.leaves(where))
    with jax.set_mesh(mesh):
        placed = jax.device_put((params, pixels), (where, sharding.batch_sharding(mesh)))
        split = jax.jit(run, compiler_options=quick)(*placed)
    for name, x in single.items():
        np.testing.assert_allclose(split[name], x, atol=2e-5, err_msg=name)


def test_tiles_are_resized_as_pillow_does():
    rng = np.random.default_rng(0)
    # Within what no overshoot clips: Pillow clips between its passes, too.
    smooth = np.kron(rng.integers(70, 190, (8, 8, 3)), np.ones((7, 7, 1))).astype(np.uint8)
    for side in (30, 100):
        ours = np.asarray(teacher.resize_pixels(jnp.asarray(smooth), side)).astype(int)
        expected = np.asarray(resize(Image.fromarray(smooth), side, side)).astype(int)
        assert np.abs(ours - expected).max() <= 1, side
        assert ours.std() > 20


def test_targets_are_on_the_students_grid():
    """A tower whose size and grid are the student's is left alone; else both are resized."""
    config, params = opened(TOWERS / "dinov3")  # 24 pixels, grid of 3
    pixels = np.random.default_rng(1).integers(0, 256, (1, 2, 24, 24, 3)).astype(np.uint8)
    larger = np.kron(pixels, np.ones((2, 2, 1), np.uint8))

    def both(small, large):
        raw = teacher.apply(params, small, config, keep_hidden=True)
        same = teacher.targets(params, small, config, 9, layer_places=9)
        other = teacher.targets(params, large, config, 16, layer_places=36)
        return raw, same, other

    raw, same, other = jax.jit(both, compiler_options=quick)(pixels, larger)
    for name, x in same.items():
        np.testing.assert_allclose(x, raw[name], atol=1e-6, err_msg=name)
    assert other["features"].shape == (1, 2, 16, 24)
    assert other["layers"].shape == (2, 1, 2, 36, 24)
    # Every pixel four times is nearly the same picture: the middle of a 3 x 3 grid stays near.
    inside = teacher.resize_grid(other["features"], 9)[0, :, 4], same["features"][0, :, 4]
    assert np.corrcoef(*(np.ravel(x) for x in inside))[0, 1] > 0.8


def test_a_grid_keeps_what_is_even_and_what_is_linear():
    row = np.arange(6.0)
    x = np.stack([np.add.outer(2 * row, row), np.ones((6, 6))], axis=-1).reshape(1, 36, 2)
    for grid in (3, 9):
        out = np.asarray(teacher.resize_grid(jnp.asarray(x), grid**2)).reshape(grid, grid, 2)
        np.testing.assert_allclose(out[..., 1], 1, rtol=1e-5)
        centre = (np.arange(grid) + 0.5) * 6 / grid - 0.5
        inner = slice(1, -1)  # at the border neighbours are missing
        expected = np.add.outer(2 * centre, centre)[inner, inner]
        np.testing.assert_allclose(out[inner, inner, 0], expected, atol=1e-4)
    with pytest.raises(UserError, match="36 features cannot be laid over the 12 tokens"):
        teacher.resize_grid(jnp.asarray(x), 12)
