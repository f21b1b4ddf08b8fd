"""Conversion of large models: memory that does not follow the model, and the released size."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from hovle_jax.config import DataConfig, ModelConfig
from hovle_jax.hf import config_json, names, shards
from tests.test_convert import LAYERS, assert_same, make_directory, tensors_of

# Peak resident memory must not follow the number of layers; the full size is test_full_size.
BIG_LAYERS = dataclasses.replace(
    LAYERS, hidden_size=512, head_dim=64, num_heads=8, num_kv_heads=4, intermediate_size=2048
)


def big(layers: int) -> ModelConfig:
    return ModelConfig(
        name="big",
        vocab_size=12_000,
        embedding=dataclasses.replace(BIG_LAYERS, num_layers=2),
        decoder=dataclasses.replace(BIG_LAYERS, num_layers=layers),
        image_size=448,
        im_end_id=11_989,
        img_start_id=11_991,
        img_end_id=11_992,
        img_context_id=11_993,
    )


MEASURE = """
import re, sys
from pathlib import Path
from hovle_jax.cli.main import main
assert main(sys.argv[1:]) == 0
# Not ru_maxrss: that remembers the process this one was forked from.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


def peak_of(*command: object) -> int:
    """Peak resident memory of a command line in a process of its own, bytes."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout.split()[-1])


def test_memory_stays_small(tmp_path):
    peaks, sizes = [], []
    for layers in (2, 14):
        config, root = big(layers), tmp_path / str(layers)
        raw = config_json.hovle_json(config, DataConfig(), "float32")
        make_directory(root / "hf", raw, names.hovle(config))
        sizes.append((root / "hf/model.safetensors").stat().st_size)
        first = peak_of("import", root / "hf", root / "native")
        peaks.append((first, peak_of("export", root / "native", root / "out")))
    assert_same(tensors_of(root / "out"), tensors_of(root / "hf"))
    assert sizes[1] > 200e6 and sizes[1] - sizes[0] > 150e6
    for few, many in zip(*peaks, strict=True):
        assert many - few < 50e6, peaks


@pytest.mark.slow
def test_full_size(tmp_path):
    """The released size, three shards: 10.4 GB. Needs 45 GB of disk; -s shows times."""
    config = ModelConfig()
    rows = names.hovle(config)
    source = tmp_path / "hf"
    source.mkdir()
    raw = config_json.hovle_json(config, DataConfig(), "float32")
    (source / "config.json").write_text(json.dumps(raw))
    plan = {n: (row.shape, np.dtype(np.float32)) for row in rows for n in row.tensors}
    writer = shards.ShardWriter(source, plan, 5 * 10**9)
    noise = np.random.default_rng(0).standard_normal(92553 * 2048 + 1000).astype(np.float32)
    for i, (name, (shape, _)) in enumerate(plan.items()):
        writer.write(name, noise[i : i + math.prod(shape)].reshape(shape))
    writer.close()
    assert len(plan) == 236 and len(list(source.glob("*.safetensors"))) == 3
    start = time.monotonic()
    shutil.copytree(source, tmp_path / "copy")
    print(f"copy: {time.monotonic() - start:.0f} s")
    shutil.rmtree(tmp_path / "copy")
    for command in (
        ("import", source, tmp_path / "native"),
        ("export", tmp_path / "native", tmp_path / "out"),
    ):
        os.sync()
        start = time.monotonic()
        peak = peak_of(*command)
        print(f"{command[0]}: {time.monotonic() - start:.0f} s, peak {peak / 1e9:.2f} GB")
        assert peak < 3e9
    ours, theirs = shards.open_shards(tmp_path / "out"), shards.open_shards(source)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(shards.read_tensor(ours[name]), shards.read_tensor(tensor))
