"""Guards notice what they are there for, and nothing else."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from hovle_jax import sharding
from hovle_jax.config import GuardConfig, MeshConfig
from hovle_jax.errors import UserError
from hovle_jax.run.array_digests import digest, digests
from hovle_jax.run.guards import LossGuard, ParameterGuard
from hovle_jax.run.watchdog import Watchdog
from tests.test_hosts import free_port


def noisy(n: int, seed: int = 0) -> list[float]:
    """A training curve: falls, and scatters by some percent."""
    rng = np.random.default_rng(seed)
    return (2 + 8 * np.exp(-np.arange(n) / 300) + rng.normal(0, 0.15, n)).tolist()


def test_ordinary_noise_is_no_spike_and_a_spike_is_one():
    guard = LossGuard(GuardConfig())
    losses = noisy(2000)
    assert not any(guard.look(loss, 1.0) for loss in losses)
    assert "deviations above" in guard.look(6.0, 1.0)
    assert guard.look(7.0, 1.0) == "", "the same spike"
    assert not guard.look(losses[-1], 1.0)
    assert guard.look(6.0, 1.0), "another spike"


def test_a_run_that_goes_on_knows_its_past_and_a_flat_loss_is_no_alarm():
    losses = noisy(200)
    assert LossGuard(GuardConfig(), losses).look(20.0, 1.0)
    assert not LossGuard(GuardConfig()).look(20.0, 1.0)
    assert not LossGuard(GuardConfig(spike=0), losses).look(20.0, 1.0)
    assert not LossGuard(GuardConfig(), [1.0] * 100).look(1.05, 1.0)
    with_nan = LossGuard(GuardConfig(), [*losses, math.nan])
    assert with_nan.look(20.0, 1.0), "a loss that was none does not blind the guard"


def test_only_steps_in_a_row_end_a_run(tmp_path):
    guard = LossGuard(GuardConfig(max_nonfinite=3))
    for loss, norm in ((math.nan, 1.0), (1.0, math.inf), (1.0, 1.0), (math.inf, 1.0), (1.0, 1.0)):
        assert bool(guard.look(loss, norm)) == (not math.isfinite(loss + norm))
        guard.check(1, tmp_path)
    for step in (6, 7):
        guard.look(math.nan, 1.0)
        guard.check(step, tmp_path)
    guard.look(1.0, math.nan)
    with pytest.raises(UserError, match="step 8: .* not finite 3 times in a row"):
        guard.check(8, tmp_path / "bad_batches.jsonl")


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def test_a_digest_sees_every_bit_and_no_layout():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 24)).astype(np.float32)
    whole = int(jax.jit(digest)(x))
    seen = {whole}
    for place in ((0, 0), (7, 11), (15, 23)):
        for bit in (0, 13, 31):
            y = x.copy()
            y.view(np.uint32)[place] ^= np.uint32(1 << bit)
            seen.add(int(jax.jit(digest)(y)))
    swapped = x.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    seen |= {int(jax.jit(digest)(y)) for y in (swapped, x.reshape(24, 16).T.copy(), -x)}
    assert len(seen) == 13
    mesh = mesh_of(2, 2, 2)
    for spec in ((), ("fsdp",), ("fsdp", "tensor"), (None, ("data", "fsdp"))):
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        found = digests(mesh)({"x": jax.device_put(x, where), "n": jax.device_put(3)})
        assert set(found["x"].values()) == {f"{whole:08x}"} and len(found["x"]) == 8


def copies(mesh: jax.sharding.Mesh, spec: tuple, x: np.ndarray, odd: int) -> jax.Array:
    """An array whose copy on device `odd` differs in one bit; -1: on no device."""
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    parts = []
    for device, index in where.addressable_devices_indices_map(x.shape).items():
        part = x[index].copy()
        if device.id == odd:
            part.view(np.uint32).flat[0] ^= np.uint32(1)
        parts.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(x.shape, where, parts)


@pytest.mark.parametrize("spec", [(), ("fsdp",)])
def test_a_copy_that_differs_is_named_with_its_device(spec, tmp_path):
    mesh = mesh_of(4, 2, 1)
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    with jax.set_mesh(mesh):
        guard = ParameterGuard(mesh, {}, {}, tmp_path, 10, resumed=False)
        guard.check(0, {"a": {"kernel": copies(mesh, spec, x, -1)}})
        with pytest.raises(UserError, match=r"after step 4, host 0: a/kernel on .*5.* is not that"):
            guard.check(4, {"a": {"kernel": copies(mesh, spec, x, 5)}})


def test_a_frozen_weight_that_moves_is_named(tmp_path):
    mesh = mesh_of(1, 1, 1)
    x = np.ones((4, 4), np.float32)
    frozen, teacher = {"decoder": {"kernel": x}}, {"patch": {"kernel": 2 * x}}

    def guard_of(frozen, teacher, resumed=True):
        return ParameterGuard(mesh, frozen, teacher, tmp_path, 10, resumed=resumed)

    guard_of(teacher, frozen, resumed=False).check(0, {"table": x})  # a mistake
    guard_of(frozen, teacher, resumed=False).check(0, {"table": x})
    again = guard_of(frozen, teacher)
    again.check(3, {"table": -x})  # what trains may move
    moved = x.copy()
    moved[2, 2] = np.nextafter(np.float32(1), np.float32(2))
    guard = guard_of({"decoder": {"kernel": moved}}, teacher)
    with pytest.raises(UserError, match="after step 3, host 0: decoder/kernel is frozen, but no"):
        guard.check(3, {"table": x})
    guard = guard_of(frozen, {"patch": {"kernel": x}})
    with pytest.raises(UserError, match="teacher/patch/kernel is frozen"):
        guard.check(3, {"table": x})


def test_the_watchdog_bites_once_after_silence_and_not_before(tmp_path, capfd):
    ended = threading.Event()
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    with Watchdog(600, tmp_path, lambda: "never", end=end):
        pass
    with Watchdog(0, tmp_path, lambda: "off", end=end):
        pass
    assert not codes and not list(tmp_path.iterdir())
    with Watchdog(0.05, tmp_path, lambda: "5 steps done, now in 'data'", patience=0, end=end):
        assert ended.wait(60)
    assert codes == [1]
    err = capfd.readouterr().err
    assert "nothing finished in 0.05 s" in err and "5 steps done, now in 'data'" in err
    stacks = (tmp_path / "stacks-0.txt").read_text()
    for text in (err, stacks):
        assert "test_the_watchdog_bites_once" in text, "the stack of the thread that hangs"


SCRIPT = """
import sys, jax, numpy as np
from pathlib import Path
process, port, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
from hovle_jax import sharding
from hovle_jax.run.agreement import exchange
from hovle_jax.config import MeshConfig
from hovle_jax.errors import UserError
from hovle_jax.run.guards import ParameterGuard
from hovle_jax.run.watchdog import Watchdog

def say(call):
    try:
        call()
    except UserError as error:
        print(error, flush=True)

for n in range(20):  # also where one host is ahead of the other
    said = list(exchange(f"round {n}", str(process * n), 60).values())
    assert said == ["0", str(n)], (n, said)
mesh = sharding.make_mesh(MeshConfig(2, 1, 1))
where = sharding.replicated(mesh)
def replicated(value):
    part = jax.device_put(np.full(3, value, np.float32), jax.local_devices()[0])
    return jax.make_array_from_single_device_arrays((3,), where, [part])
with jax.set_mesh(mesh):
    guard = ParameterGuard(mesh, {"f": replicated(1.0)}, {}, out, 60, resumed=False)
    guard.check(0, {"x": replicated(1.0)})
    say(lambda: guard.check(7, {"x": replicated(1.0 + process)}))
doing = ["9 steps done, now in 'step'", "8 steps done, now in 'data'"][process]
import threading
bitten = threading.Event()
with Watchdog(0.1, out, lambda: doing, patience=3, end=lambda _: bitten.set()):
    assert bitten.wait(60)
exchange("before the end", "", 60)
if process == 1:
    sys.stdin.readline()  # does not come
say(lambda: exchange("evaluation after step 9", "", 0.5))
"""


def test_hosts_that_differ_or_do_not_come_are_named(tmp_path):
    port = free_port()
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(process), port, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for process in (0, 1)
    ]
    try:
        assert hosts[0].stdout is not None
        lines = [hosts[0].stdout.readline() for _ in range(2)]
        others, _ = hosts[1].communicate("\n", timeout=120)
        _, err = hosts[0].communicate(timeout=120)
    finally:
        for host in hosts:
            host.kill()
    assert lines[0].startswith("after step 7: x on host 1 (")
    assert others.splitlines()[0] == lines[0].strip(), "on every host"
    assert lines[1].startswith("evaluation after step 9: waited 0.5 s in vain for host 1 (")
    # In either order: as many hosts say the one as the other.
    assert "8 steps done, now in 'data'" in err and "9 steps done, now in 'step'" in err
    assert (tmp_path / "stacks-0.txt").is_file() and (tmp_path / "stacks-1.txt").is_file()
