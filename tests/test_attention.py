"""The Pallas path, interpreted on CPU, and the CPU's own give the numbers of the XLA path."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax import sharding
from hovle_jax.config import MeshConfig, TeacherConfig
from hovle_jax.errors import UserError
from hovle_jax.nn import attention, flash, teacher, tile_attention, vit

HEADS, KV_HEADS, SIZE = 4, 2, 128
# Lengths of the segments of each row; what is left is padding.
ROWS = ((90, 120), (30, 100, 70))
LENGTH = 230  # no multiple of the kernel's 128


def output_and_gradients(implementation: str, causal: bool = True):
    """(output where there are tokens, gradients of q, k and v) of one packed batch.

    What is not causal sees up to some later place, often beyond its segment.
    """
    rng = np.random.default_rng(0)
    segments, positions = np.zeros((2, len(ROWS), LENGTH), np.int32)
    for row, lengths in enumerate(ROWS):
        begin = 0
        for n, length in enumerate(lengths, start=1):
            segments[row, begin : begin + length] = n
            positions[row, begin : begin + length] = np.arange(length)
            begin += length
    shapes = ((HEADS,), (KV_HEADS,), (KV_HEADS,), (HEADS,))
    q, k, v, weight = (
        jnp.asarray(rng.normal(size=(len(ROWS), LENGTH, *n, SIZE)), jnp.float32) for n in shapes
    )
    weight *= (segments > 0)[..., None, None]
    places = np.arange(LENGTH)
    reach = np.minimum(places + rng.integers(0, 150, segments.shape), LENGTH - 1).astype(np.int32)
    mask = attention.visible(segments, positions, implementation, None if causal else reach)

    def loss(q, k, v):
        out = attention.attend(q, k, v, mask, implementation, causal)
        return jnp.sum(out * weight), out

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    gradients, out = grad(q, k, v)
    return [np.asarray(x) for x in (out * (segments > 0)[..., None, None], *gradients)]


@pytest.fixture(scope="module")
def reference():
    return output_and_gradients("xla")


@pytest.fixture(scope="module")
def reaching():
    return output_and_gradients("xla", causal=False)


@pytest.mark.parametrize("heads", ["all heads of a kv head", "a head at a time"])
def test_splash_gives_the_numbers_of_xla(reference, monkeypatch, heads):
    monkeypatch.setattr(flash, "BLOCK", 128)  # several blocks, as at full length
    if heads == "a head at a time":
        monkeypatch.setattr(flash, "VMEM_FOR_DQ", 0)
    for expected, found in zip(reference, output_and_gradients("splash_interpret"), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("seed", range(6))
def test_blocks_are_visited_where_something_is_seen(seed):
    """All of those, and no others but those of the reach of a neighbour in a block."""
    rng = np.random.default_rng(seed)
    block, blocks = 8, 6
    lengths = rng.integers(1, 20, 8)
    segments = np.repeat(np.arange(1, 9), lengths)[: block * blocks - int(rng.integers(0, 12))]
    segments = np.pad(segments, (0, block * blocks - len(segments)))[None].astype(np.int32)
    places = np.arange(block * blocks, dtype=np.int32)[None]
    for reach in (places, np.minimum(places + 5, places.max())):
        seen = (segments[0][:, None] == segments[0]) & (places[0] <= reach[0][:, None])
        wanted = seen.reshape(blocks, block, blocks, block).any((1, 3))
        found = np.asarray(flash.visits(jnp.asarray(segments), jnp.asarray(reach), block))[0]
        assert (found | ~wanted).all(), "a block that is seen was left out"
        if reach is places:
            assert (found == wanted).all(), "a block was visited in vain"


def test_blocks_of_other_segments_are_not_read(monkeypatch):
    """Keys, values and gradients of another segment's blocks are NaN: one visit would show."""
    monkeypatch.setattr(flash, "BLOCK", 128)
    segments = jnp.asarray(np.repeat([[1, 2, 2, 3]], 128, axis=1).astype(np.int32))
    rng = np.random.default_rng(0)
    q, k, v, weight = (jnp.asarray(rng.normal(size=(1, 2, 512, 128)), jnp.float32) for _ in "qkvw")
    second = (segments == 2)[:, None, :, None]

    def loss(q, k, v):
        out = flash.attention(q, k, v, segments, interpret=True)
        return jnp.sum(jnp.where(second, 0, out * weight)), out

    grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    found, out = grad(q, *(jnp.where(second, jnp.nan, x) for x in (k, v)))
    want, expected = grad(q, *(jnp.where(second, 0, x) for x in (k, v)))
    assert np.isnan(np.asarray(out)[:, :, 128:384]).all(), "its own queries do see them"
    for x, y in zip((out, *found), (expected, *want), strict=True):
        np.testing.assert_array_equal(*(np.asarray(jnp.where(second, 0, z)) for z in (x, y)))


def test_splash_over_places_that_are_split(reference):
    """Rows over two devices, the places of each over two more."""
    mesh = sharding.make_mesh(MeshConfig(2, 1, 1, context=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = output_and_gradients("splash_interpret")
    for want, x in zip(reference, found, strict=True):
        np.testing.assert_allclose(x, want, atol=2e-5)


def test_blocks_give_the_numbers_of_xla(reference):
    for expected, found in zip(reference, output_and_gradients("blocks"), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_what_is_not_causal(reference, reaching, monkeypatch):
    """Every implementation sees the later keys that a mask allows; rows and places split, too."""
    assert np.abs(reaching[0] - reference[0]).max() > 0.1
    monkeypatch.setattr(flash, "BLOCK", 128)
    mesh = sharding.make_mesh(MeshConfig(2, 1, 1, context=2), jax.devices()[:4])
    found = {name: output_and_gradients(name, False) for name in ("blocks", "splash_interpret")}
    with jax.set_mesh(mesh):
        found["split"] = output_and_gradients("splash_interpret", False)
    for name, values in found.items():
        for want, x in zip(reaching, values, strict=True):
            np.testing.assert_allclose(x, want, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("length, share", [(128, 1.0), (1100, 0.57), (4000, 0.57)])
def test_blocks_make_no_scores_of_later_keys(length, share):
    q = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, length, length), bool)

    def flops(implementation: str) -> float:
        attend = jax.jit(lambda q, mask: attention.attend(q, q, q, mask, implementation))
        return attend.lower(q, mask).cost_analysis()["flops"]

    assert flops("blocks") == pytest.approx(share * flops("xla"), rel=0.02)


def test_blocks_are_as_large_as_pays():
    lengths = (100, 128, 640, 1100, 4096, 18176, 28160)
    assert [flash.block_of(n) for n in lengths] == [128, 128, 384, 384, 512, 512, 512]
    for length in range(1, 3000, 7):  # padded to whole blocks, a row keeps its block
        block = flash.block_of(length)
        assert flash.block_of(length + -length % block) == block


def test_query_heads_stay_with_their_kv_heads():
    """Two kv heads on four devices: each would take the wrong one for its query head."""
    mesh = sharding.make_mesh(MeshConfig(2, 1, 4))
    q, k = (jax.ShapeDtypeStruct((2, 128, n, SIZE), jnp.float32) for n in (HEADS, KV_HEADS))
    segments = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    attend = functools.partial(attention.attend, implementation="splash_interpret")
    with jax.set_mesh(mesh), pytest.raises(UserError, match="tensor x context must divide"):
        jax.eval_shape(attend, q, k, k, segments)


@pytest.mark.parametrize(
    "heads, size, places, length, block",
    [
        (4, 64, 272, 257, 144),  # two heads to a register; two blocks of queries, the last ragged
        (2, 128, 48, 33, 576),
        (4, 32, 16, 16, 576),  # nothing padded
    ],
)
def test_tiles_give_the_numbers_of_xla(monkeypatch, heads, size, places, length, block):
    monkeypatch.setattr(tile_attention, "BLOCK", block)
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, places, heads * size)).astype(np.float32)
    # Padding must not matter, however large; a kernel that let it in would give NaN.
    k[:, length:], v[:, length:] = 1e4, np.inf
    clean = np.where(np.arange(places)[:, None] < length, v, 0.0)
    expected = attention.attend_all(q, k, clean, size, length, "xla")
    found = attention.attend_all(q, k, v, size, length, "tile_interpret")
    np.testing.assert_allclose(found, expected, atol=2e-5)
    mask = np.broadcast_to(np.arange(length) < length, (2, length, length))
    apart = (x[:, :length].reshape(2, length, heads, size) for x in (q, k, v))
    whole = attention.attend(*apart, mask, "xla").reshape(2, length, -1)
    np.testing.assert_allclose(found[:, :length], whole, atol=2e-5)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(2, 1, 1, 2), MeshConfig(2, 1, 2, 1), MeshConfig(2, 1, 2, 2)]
)
def test_tiles_are_split_by_whole_registers(mesh):
    """Two registers over two devices, places too by their own axis; over four, each has both."""
    heads, size = 4, 64
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 8, 16, heads * size)).astype(np.float32)
    attend = jax.jit(functools.partial(attention.attend_all, size=size, length=9))
    tile = jax.jit(
        functools.partial(
            attention.attend_all, size=size, length=9, implementation="tile_interpret"
        )
    )
    expected = attend(q, k, v)
    devices = jax.devices()[: math.prod(dataclasses.astuple(mesh))]
    with jax.set_mesh(sharding.make_mesh(mesh, devices)):
        np.testing.assert_allclose(tile(q, k, v), expected, atol=2e-5)


@pytest.mark.parametrize("kind", [{}, {"norm": "rms", "qk_norm": True, "qkv_bias": False}])
def test_the_teacher_on_tpu_is_the_teacher(monkeypatch, kind):
    """17 places padded to 32, through the kernel, for both kinds of InternViT."""
    config = TeacherConfig(
        num_layers=2,
        hidden_size=128,
        num_heads=2,
        intermediate_size=256,
        image_size=56,
        out_size=64,
        initializer_range=0.2,
        dtype="float32",
        **kind,
    )
    rng = np.random.default_rng(0)
    shapes = teacher.abstract_params(config)
    params = jax.tree.map(lambda x: rng.normal(0.2, 0.2, x.shape).astype(np.float32), shapes)
    pixels = rng.integers(0, 256, (2, 56, 56, 3), np.uint8)

    def run() -> Callable:  # a new one each time: JAX remembers what a function traced to
        return functools.partial(teacher.apply, params, config=config)

    expected = jax.jit(run())(pixels)

    def tile(*args):
        how = {"auto": "tile_interpret"}  # as if on TPU
        return attention.attend_all(*args[:-1], how.get(args[-1], args[-1]))

    monkeypatch.setattr(vit, "attend_all", tile)
    monkeypatch.setattr(vit, "aligned", lambda length: length + -length % 16)
    text = str(jax.make_jaxpr(run())(pixels))
    assert "tile_mha_fwd" in text and "[2,32,128]" in text
    plain = dataclasses.replace(config, attention="xla")  # should the kernel not compile
    text = str(jax.make_jaxpr(functools.partial(teacher.apply, params, config=plain))(pixels))
    assert "tile_mha_fwd" not in text
    found = jax.jit(run())(pixels)
    for name, value in expected.items():
        assert value.shape == found[name].shape
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4)
