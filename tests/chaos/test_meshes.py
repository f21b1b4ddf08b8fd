"""A checkpoint goes on anywhere: other hosts, other devices, other axes."""

from __future__ import annotations

import shutil

import jax
import pytest
from etils import epath

from hovle_jax.checkpoint import read_meta
from hovle_jax.run.metrics import read_metrics
from hovle_jax.train import train
from tests.chaos import cluster

EXACT = ("step", "tokens", "tiles", "lr", "source/colours/samples", "source/colours/tokens")


@pytest.mark.slow
def test_restore_onto_other_hosts_and_meshes(world, tmp_path):
    """Three launches of 2, 2 and 4 processes, which compile; minutes on two cores.

    Saved by 2 processes x 4 devices with fsdp 8; the next losses of the same mesh count.
    """

    def config(steps: int, **mesh: int):
        axes = {"mesh__data": 1, "mesh__fsdp": 1, "mesh__tensor": 1}
        axes |= {f"mesh__{axis}": size for axis, size in mesh.items()}
        return world.config("align", steps=steps, init__scratch=True, **axes)

    begun = tmp_path / "begun"
    cluster.run(config(3, fsdp=8), begun, processes=2, devices=4).done()
    cursor = read_meta(epath.Path(begun) / "checkpoints/3")["cursor"]

    def go_on(name: str, processes: int, devices: int, **mesh: int) -> tuple[list[dict], dict]:
        workdir = shutil.copytree(begun, tmp_path / name)
        there = config(5, **mesh)
        if processes == 1:
            train(there, workdir, devices=jax.devices()[:devices], quiet=True)
        else:
            cluster.run(there, workdir, processes=processes, devices=devices).done()
        meta = read_meta(epath.Path(workdir) / "checkpoints/5")
        return read_metrics(workdir / "metrics.jsonl"), meta

    rows, meta = go_on("same", 2, 4, fsdp=8)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5] and meta["cursor"] != cursor
    places = {
        "1x2": (1, 2, {"fsdp": 2}),
        "4x2": (4, 2, {"data": 2, "fsdp": 4}),
        "1x8": (1, 8, {"data": 4, "tensor": 2}),
    }
    for name, (processes, devices, mesh) in places.items():
        others, other_meta = go_on(name, processes, devices, **mesh)
        assert other_meta == meta, name
        for a, b in zip(rows, others, strict=True):
            assert [a[k] for k in EXACT] == [b[k] for k in EXACT], name
            assert abs(a["loss"] - b["loss"]) < 1e-5, (name, a["step"])


@pytest.mark.slow
def test_tensor_parallelism_over_hosts(world, tmp_path):
    """Hosts of one device each that share every row: they read the same part of the data."""
    one = world.config("align", steps=3, init__scratch=True)
    train(one, tmp_path / "one", devices=jax.devices()[:1], quiet=True)
    two = world.config("align", steps=3, init__scratch=True, mesh__fsdp=1, mesh__tensor=2)
    cluster.run(two, tmp_path / "two", devices=1).done()
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        assert [a[k] for k in EXACT] == [b[k] for k in EXACT]
        assert abs(a["loss"] - b["loss"]) < 1e-5
