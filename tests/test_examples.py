"""Every file in examples/ does what its docstring says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest
from etils import epath

from hovle_jax.checkpoint import load, open_tree
from hovle_jax.cli.main import load_config
from hovle_jax.train import train
from hovle_jax.tree import flatten

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 40


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
