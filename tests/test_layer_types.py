"""Layers that are not attention: linear attention by its definition, stacks of several types."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from hovle_jax import model
from hovle_jax.config import LayersConfig
from hovle_jax.errors import UserError
from hovle_jax.generation.engine import Engine, Request
from hovle_jax.nn.layers import LayerInputs, RMSNorm
from hovle_jax.nn.linear_attention import TEMPERATURE, LinearAttention
from hovle_jax.nn.stack import put_together, take_apart
from tests.test_combinations import BASE, compiled, config_of, params_of, sample

LAYERS = LayersConfig(
    num_layers=1, hidden_size=12, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=8
)


def inputs_of(segments: np.ndarray) -> LayerInputs:
    none = jnp.zeros(())
    return LayerInputs(none, none, none, segment_ids=jnp.asarray(segments))


@functools.cache
def layer():
    """(parameters, function of them, x, segment ids and state) of one linear attention."""
    module = LinearAttention(LAYERS, "xla")
    x, segments = jnp.zeros((1, 4, 12)), np.ones((1, 4), np.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, inputs_of(segments), None)
    rng = np.random.default_rng(0)
    shapes = meta.unbox(shapes)
    params = jax.tree.map(lambda s: jnp.float32(rng.normal(0, 0.4, s.shape)), shapes)

    def run(params, x, segments, state):
        return module.apply(params, x, inputs_of(segments), state)

    return params, compiled(run)


def by_definition(params, x: np.ndarray) -> np.ndarray:
    """One sample [S, E], token by token."""
    p = jax.tree.map(np.float64, params)["params"]
    memory, out = np.zeros((2, 6, 6)), []
    for token in np.float64(x):
        q, k, v = (np.einsum("e,ehd->hd", token, p[n]["kernel"]) for n in "qkv")
        gate = token @ p["gate"]["kernel"] + p["gate"]["bias"]
        decay = (1 / (1 + np.exp(-gate))) ** (1 / TEMPERATURE)
        memory = memory * decay[:, None, None] + k[:, :, None] * v[:, None]
        y = np.stack([q[h] @ memory[h // 2] for h in range(4)]) / np.sqrt(6)
        y = y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-5) * p["norm"]["scale"]
        out.append(np.einsum("hd,hde->e", y, p["o"]["kernel"]))
    return np.stack(out)


def test_linear_attention_is_its_recurrence():
    """Over chunks, over borders of samples within and between chunks, with padding at both ends."""
    params, run = layer()
    x = np.random.default_rng(1).standard_normal((1, 200, 12)).astype(np.float32)
    spans = [(3, 40), (40, 75), (75, 190)]
    segments = np.zeros((1, 200), np.int32)
    for number, (start, stop) in zip((2, 1, 3), spans, strict=True):
        segments[0, start:stop] = number
    y, state = run(params, x, segments, None)
    for start, stop in spans:
        expected = by_definition(params, x[0, start:stop])
        np.testing.assert_allclose(y[0, start:stop], expected, atol=2e-5)
    _, alone = run(params, x[:, 75:190], segments[:, 75:190], None)
    np.testing.assert_allclose(state["memory"], alone["memory"], atol=1e-5)


def test_linear_attention_goes_on_where_it_stopped():
    """A row in three parts, the second of them with padding, gives what the row as a whole does."""
    params, run = layer()
    x = np.random.default_rng(2).standard_normal((1, 30, 12)).astype(np.float32)
    whole, end = run(params, x, np.ones((1, 30), np.int32), None)
    first, state = run(params, x[:, :17], np.ones((1, 17), np.int32), None)
    padded = np.concatenate([x[:, 17:22], 9 * np.ones((1, 3, 12), np.float32)], axis=1)
    second, state = run(params, padded, np.int32(np.arange(8) < 5)[None], state)
    third, state = run(params, x[:, 22:], np.ones((1, 8), np.int32), state)
    parts = np.concatenate([first, second[:, :5], third], axis=1)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    np.testing.assert_allclose(state["memory"], end["memory"], atol=1e-5)


def test_periods():
    def period(*types: str, depth: int) -> tuple[str, ...]:
        return dataclasses.replace(LAYERS, num_layers=depth, layer_types=types).period

    assert period("attention", depth=24) == ("attention",)
    assert period("attention", "attention", depth=24) == ("attention",)
    assert period("a", "b", "a", "b", depth=8) == ("a", "b")
    assert period("a", "b", "b", depth=3) == ("a", "b", "b")
    with pytest.raises(UserError, match="num_layers 2 is not a multiple of the 3 in layer_types"):
        types = ("attention", "attention", "linear_attention")
        dataclasses.replace(BASE, decoder=dataclasses.replace(BASE.decoder, layer_types=types))


def test_layers_apart_and_together():
    """In the order of the depth, whatever the period; arrays of one type stay as they were."""
    config = dataclasses.replace(
        LAYERS, num_layers=4, layer_types=("linear_attention", "attention")
    )
    stacked = {
        "layer_0": {"linear_attention": {"x": jnp.array([0, 2])}},
        "layer_1": {"attention": {"x": jnp.array([1, 3])}},
    }
    apart = take_apart(stacked)
    assert [int(x) for layer in apart for x in jax.tree.leaves(layer)] == [0, 1, 2, 3]
    assert [next(iter(layer)) for layer in apart] == list(config.types)
    again = put_together(config, apart)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, stacked))


def test_hidden_states_come_in_the_order_of_the_layers():
    config, params = config_of("post, hybrid, pooled"), params_of("post, hybrid, pooled")
    ids, pixels = sample(config, 0, 1, 3, 4)
    batch = {"input_ids": ids[None], "pixels": pixels[None]}
    run = functools.partial(model.apply, config=config, keep_hidden=True)
    out = compiled(run)(params, batch)
    hidden = out["decoder"]["hidden"]
    assert hidden.shape == (2, 1, len(ids), 32) and out["embedding"]["hidden"].shape[0] == 2
    last = RMSNorm(config.decoder.rms_norm_eps).apply(
        {"params": params["decoder"]["norm"]}, hidden[-1]
    )
    np.testing.assert_allclose(last, out["hidden"], atol=1e-6)


@pytest.mark.parametrize("int8", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_engine_keeps_states_of_its_slots(int8, quick_compilation):
    """More requests than slots, prefixes kept: what a model that recomputes would answer."""
    name = "post, hybrid, pooled"
    config, params = config_of(name), params_of(name)
    ids, pixels = sample(config, 5, 1, 3, 4)
    prompts = [ids, np.concatenate([ids, [7, 8, 9]]).astype(np.int32), ids[:-2]]
    engine = Engine(
        params,
        config,
        slots=2,
        capacity=64,
        tiles=1,
        chunk=4,
        int8_cache=int8,
        prefix_bytes=10**8,
    )
    asked = {engine.submit(Request(p, pixels, 5)): p for p in prompts}
    made: dict[int, list[int]] = {number: [] for number in asked}
    while engine.waiting or engine.running:
        for progress in engine.step():
            made[progress.number] += progress.tokens
    assert engine.prefixes.hits == 2
    run = compiled(functools.partial(model.apply, config=config))
    for number, prompt in asked.items():
        whole = np.concatenate([prompt, made[number]]).astype(np.int32)
        padded = np.pad(whole, (0, 32 - len(whole)))
        segments = np.int32(np.arange(32) < len(whole))
        batch = {"input_ids": padded, "segment_ids": segments, "pixels": pixels}
        scores = run(params, {k: x[None] for k, x in batch.items()})["logits"][0]
        for i, token in enumerate(made[number]):
            at = np.asarray(scores[len(prompt) - 1 + i])
            assert at[token] > at.max() - (0.5 if int8 else 1e-3)
