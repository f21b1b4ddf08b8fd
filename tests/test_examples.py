"""Every file in examples/ does what its docstring says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from hovle_jax.checkpoint import load, open_tree
from hovle_jax.cli.main import load_config
from hovle_jax.config import ModelConfig, RunConfig, from_dict
from hovle_jax.errors import UserError
from hovle_jax.hf.writer import ExportOptions, write_directory
from hovle_jax.nn.images import Tokens
from hovle_jax.nn.masks import reach
from hovle_jax.nn.positions import POSITIONS, indices
from hovle_jax.train import train
from hovle_jax.tree import flatten

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize(
    ("name", "key", "changes"),
    [
        ("llm_family", "llm_family", {"llm_family": "mistral"}),
        ("layer_type", "embedding.layer_types", {"embedding": {"layer_types": ["min_gru"]}}),
        ("compressor", "compressor", {"compressor": "average_pool", "shuffle": 4}),
        ("modality_experts", "embedding.mlp", {"embedding": {"mlp": "modality_experts"}}),
    ],
)
def test_a_part_is_there_once_its_file_is_named(name, key, changes):
    """One file and one line of a config; tests/test_combinations.py is what the parts hold."""
    raw = {"plugins": [str(EXAMPLES / f"{name}.py")]} | changes
    config = from_dict(ModelConfig, raw, "config.model")
    if name == "compressor":
        assert config.tokens_per_tile == (config.grid // 4) ** 2 == 64
        assert config.compressor_params == config.hidden_size**2
    if name == "layer_type":
        plain = ModelConfig().embedding
        assert set(config.embedding.types) == {"min_gru"}
        attention = 2 * plain.hidden_size * plain.head_dim * (plain.num_heads + plain.num_kv_heads)
        less = plain.num_layers * (attention - 3 * plain.hidden_size**2)
        assert config.embedding.params() == plain.params() - less
    if name == "modality_experts":
        plain = ModelConfig().embedding
        twice = plain.num_layers * 3 * plain.hidden_size * plain.intermediate_size
        assert config.embedding.params() == plain.params() + twice
    own = {"layer_types": ["mingru"]} if name == "layer_type" else {"mlp": "experts"}
    raw = {"embedding": own} if key.startswith("embedding.") else changes
    with pytest.raises(UserError, match=f"{key.split('.')[-1]}: '.*' is not one of"):
        from_dict(ModelConfig, _misspelt(raw), "config.model")


def _misspelt(raw):
    return {k: f"{v}_" if isinstance(v, str) else v for k, v in raw.items()}


def test_lora(world, tmp_path):
    example = load_config(f"{EXAMPLES / 'lora.py'}:tiny")
    small = world.config("instruct", steps=1, init__scratch=True)
    config = dataclasses.replace(small, lora=example.lora, trainable=example.trainable)
    train(config, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    saved = set(open_tree(epath.Path(tmp_path) / "run" / "checkpoints" / "1" / "params")[1])
    assert {k for k in saved if "/lora_" not in k} == {
        f"embedding/projector/{name}"
        for name in ("fc1/kernel", "fc1/bias", "fc2/kernel", "fc2/bias")
    }
    adapted = {k.partition("/lora_")[0] for k in saved if "/lora_" in k}
    names = (
        "attention/q",
        "attention/k",
        "attention/v",
        "attention/o",
        "mlp/gate",
        "mlp/up",
        "mlp/down",
    )
    assert adapted == {f"decoder/layers/{name}" for name in names}
    assert not any("/lora_" in k for k in flatten(load(tmp_path / "run")[1]))


def test_a_mask_and_a_position_scheme(world, tmp_path):
    """As their command lines say: named in a config, by their files."""
    raw = world.config("distill", steps=1).to_config_dict()
    raw.model.plugins = tuple(str(EXAMPLES / f"{n}.py") for n in ("tile_mask", "spatial_positions"))
    raw.model.embedding.mask, raw.model.embedding.positions = "tile", "spatial"
    config = RunConfig.from_config_dict(raw)
    train(config, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    assert load(tmp_path / "run")[0].model.embedding == config.model.embedding
    with pytest.raises(UserError, match="embedding.mask='tile': the exported format knows"):
        write_directory(tmp_path / "run", tmp_path / "out", ExportOptions())

    ids = jnp.array([[1, *[9] * 8, 2]])
    tokens = Tokens(ids, jnp.ones_like(ids), jnp.arange(10)[None], 9, tile=4, end_of_turn=3)
    assert reach("tile", tokens)[0].tolist() == [0, 4, 4, 4, 4, 8, 8, 8, 8, 9]
    scheme = POSITIONS["spatial"]
    time, row, column = scheme.coordinates(indices(scheme, tokens)[0], tokens)
    assert time[0].tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert row[0].tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 1, 0]
    assert column[0].tolist() == [0, 0, 1, 0, 1, 0, 1, 0, 1, 0]
