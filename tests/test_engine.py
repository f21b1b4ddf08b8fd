"""Continuous batching gives every request what it gets alone, and what no cache at all gives."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from hovle_jax import model
from hovle_jax.errors import UserError
from hovle_jax.generation.decode import STACKS, compute_params, decode_step, restack
from hovle_jax.generation.engine import Engine, Request, bucket
from hovle_jax.generation.generate import generate
from hovle_jax.generation.sampling import Sampling
from tests import small

pytestmark = pytest.mark.usefixtures("quick_compilation")
LAYERS = dataclasses.replace(small.LAYERS, rope_theta=100.0, initializer_range=0.3)
ONE = dataclasses.replace(LAYERS, num_layers=1)
PRE = dataclasses.replace(small.PRE, embedding=ONE, decoder=LAYERS, initializer_range=0.3)
CONFIGS = {"pre": PRE, "post": dataclasses.replace(PRE, shuffle_loc="post")}
LOCATIONS = pytest.mark.parametrize("loc", CONFIGS)
# One shape of prefill, and one or two rows: compiling is all the time these tests take.
SHARED = {"slots": 2, "capacity": 128, "tiles": 2, "chunk": 5, "floor": (128, 2)}


@functools.cache
def params_of(loc: str):
    params = jax.jit(functools.partial(model.init, config=CONFIGS[loc]))(jax.random.key(1))
    # Recomputing without a cache would look for the tile of an <IMG_CONTEXT> in the answer.
    head = params["decoder"]["head"]
    head["kernel"] = head["kernel"].at[:, PRE.img_context_id].set(0)
    return params


@functools.cache
def params_of_one():
    """Of a model with one layer in each stack."""
    return model.init(jax.random.key(4), dataclasses.replace(PRE, decoder=ONE))


def request(seed: int, tiles: int, new: int, text: int = 9, **changes) -> Request:
    rng = np.random.default_rng(seed)
    image = [88, *[90] * (4 * tiles), 89] if tiles else []
    ids = np.array([1, *rng.integers(3, 80, 4), *image, *rng.integers(3, 80, text)], np.int32)
    pixels = rng.integers(0, 256, (tiles, 28, 28, 3)).astype(np.uint8)
    return Request(ids, pixels, new, **changes)


def run(engine: Engine, requests: list[Request], each: int = 100) -> list[tuple[list[int], str]]:
    """(tokens, finish) per request; `each` of them are submitted between two steps."""
    found: dict[int, tuple[list[int], str]] = {}
    waiting = list(requests)
    while waiting or engine.waiting or engine.running:
        for one in waiting[:each]:
            found[engine.submit(one)] = ([], "")
        del waiting[:each]
        for progress in engine.step():
            tokens, finish = found[progress.number]
            assert not finish and len(progress.logprobs) == len(progress.tokens)
            found[progress.number] = (tokens + progress.tokens, progress.finish)
    return list(found.values())


def alone(loc: str, one: Request) -> tuple[list[int], str]:
    return run(Engine(params_of(loc), CONFIGS[loc], **SHARED), [one])[0]


@LOCATIONS
def test_cached_equals_uncached(loc):
    """64 tokens, every one from a forward pass over the whole sequence."""
    one, config = request(5, tiles=2, new=64), CONFIGS[loc]
    got = generate(params_of(loc), config, [one.prompt], [one.tiles], max_new=64, stop_ids=())
    forward = jax.jit(functools.partial(model.apply, config=config))
    batch = {"input_ids": np.zeros((1, 96), np.int32), "segment_ids": np.zeros((1, 96), np.int32)}
    length = len(one.prompt)
    batch["input_ids"][0, :length] = one.prompt
    batch["pixels"] = one.tiles[None]
    expected = []
    for n in range(length, length + 64):
        batch["segment_ids"][0, :n] = 1
        scores = np.asarray(forward(params_of(loc), batch)["logits"])[0, n - 1]
        assert np.diff(np.sort(scores)[-2:]) > 1e-4  # no tie that rounding could turn
        expected.append(int(scores.argmax()))
        if n < 95:
            batch["input_ids"][0, n] = expected[-1]
    assert got == [expected] and len(set(expected)) > 10


@pytest.mark.parametrize(("loc", "floor"), [("pre", (64, 0)), ("post", (128, 2))])
def test_continuous_equals_one_at_a_time(loc, floor):
    """More requests than slots, of all kinds; some come while others run. Alone, they are
    prefilled in the largest shape, together in their own."""
    requests = [
        request(0, 0, 20),
        request(1, 2, 3),
        request(2, 1, 17, sampling=Sampling(1.5, seed=3)),
        request(3, 0, 1),
        request(4, 0, 30, text=70),
        request(5, 2, 11, sampling=Sampling(repetition_penalty=3.0)),
        request(6, 1, 9, sampling=Sampling(0.7, top_k=5, top_p=0.9, min_p=0.05, seed=9)),
    ]
    expected = [alone(loc, r) for r in requests]
    assert [len(t) for t, _ in expected] == [r.max_new for r in requests]
    assert {f for _, f in expected} == {"length"}
    stop = expected[0][0][6]  # the first request now ends in the middle of its answer
    requests[0] = dataclasses.replace(requests[0], stop_ids=(stop, 97))
    expected[0] = (expected[0][0][: expected[0][0].index(stop)], "stop")
    engine = Engine(params_of(loc), CONFIGS[loc], **SHARED | {"floor": floor})
    assert run(engine, requests) == expected
    assert run(engine, requests[::-1], 2) == expected[::-1]  # slots hold old caches now


def test_settings_reach_the_tokens():
    """Sampling, penalty and seeds change an answer; the greedy ones do not depend on the seed."""

    def answer(**changes):
        return alone("pre", request(2, 1, 17, sampling=Sampling(**changes)))[0]

    greedy = answer()
    assert greedy == answer(seed=4) == answer(temperature=3.0, top_k=1)
    drawn = answer(temperature=3.0, seed=4)
    assert drawn not in (greedy, answer(temperature=3.0, seed=5))
    assert len(set(answer(repetition_penalty=50.0))) == 17 > len(set(greedy))


def test_logprobs():
    """Of the model's scores, whatever the sampling makes of them, from one forward pass; the
    likeliest tokens only for who asks."""
    drawn = Sampling(4.0, top_k=30, top_p=0.95, repetition_penalty=3.0, seed=1)
    one = request(2, 1, 6, sampling=drawn, top=5)
    engine, made = Engine(params_of("pre"), PRE, **SHARED), []
    number, other = engine.submit(one), engine.submit(request(3, 1, 6))
    while engine.running or engine.waiting:
        made += engine.step()
    assert all(not p.best for p in made if p.number == other)
    made = [p for p in made if p.number == number]
    tokens = [t for p in made for t in p.tokens]
    ids = np.array([[*one.prompt, *tokens]], np.int32)
    scores = model.apply(params_of("pre"), {"input_ids": ids, "pixels": one.tiles[None]}, PRE)
    log = jax.nn.log_softmax(scores["logits"][0], axis=-1)
    start = len(one.prompt) - 1
    expected = [float(log[start + i, t]) for i, t in enumerate(tokens)]
    np.testing.assert_allclose([x for p in made for x in p.logprobs], expected, atol=1e-4)
    best = [b for p in made for b in p.best]
    assert len(best) == 6 and any(t not in dict(b) for t, b in zip(tokens, best, strict=True))
    for i, found in enumerate(best):
        row = np.asarray(log[start + i])
        assert [t for t, _ in found] == np.argsort(-row)[:5].tolist()
        np.testing.assert_allclose([p for _, p in found], np.sort(row)[::-1][:5], atol=1e-4)
    with pytest.raises(UserError, match="21 likeliest tokens are not 0 to 20"):
        engine.submit(dataclasses.replace(one, top=21))


def test_cancel():
    """A running and a waiting request leave; the others' answers are what they would have been."""
    requests = [request(i, 0, 20) for i in range(5)]
    expected = [alone("pre", r)[0] for r in requests]
    engine = Engine(params_of("pre"), PRE, **SHARED)
    numbers = [engine.submit(r) for r in requests]
    made: dict[int, list[int]] = {n: [] for n in numbers}
    for step in range(100):
        for progress in engine.step():
            made[progress.number] += progress.tokens
        if step == 0:
            engine.cancel(numbers[1])
            engine.cancel(numbers[4])
            before = len(made[numbers[1]])
    assert before and len(made[numbers[1]]) == before and not made[numbers[4]]
    assert [made[numbers[i]] for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]
    assert engine.running == engine.waiting == 0 and engine.step() == []


def test_weights_are_prepared_once():
    """The engine's copy of the weights gives the scores of the model's own cast at use; what was
    prepared is not copied again."""
    config = dataclasses.replace(PRE, dtype="bfloat16")
    own = params_of("pre")
    cast = compute_params(own, config)
    assert cast["decoder"]["layers"][1]["mlp"]["up"]["kernel"].dtype == "bfloat16"
    assert cast["embedding"]["text"]["table"].dtype == "bfloat16"
    one = request(3, 1, 8)
    run = jax.jit(functools.partial(model.apply, config=config))
    batch = {"input_ids": one.prompt[None], "pixels": one.tiles[None]}
    expected, got = (np.asarray(run(p, batch)["logits"]) for p in (own, restack(cast, config)))
    assert got.tolist() == expected.tolist()
    for prepared, c in ((cast, config), (compute_params(own, PRE), PRE)):
        again = jax.tree.leaves(compute_params(prepared, c))
        assert all(a is b for a, b in zip(again, jax.tree.leaves(prepared), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new": 0}, "at least one new token"),
        ({"max_new": 128}, "are more than the context of 128"),
        ({"prompt": np.zeros(0, np.int32), "tiles": np.zeros((0, 28, 28, 3), np.uint8)}, "needs a"),
        ({"tiles": np.zeros((2, 28, 28, 3), np.uint8)}, "4 image tokens for 2 tiles of 4"),
        ({"tiles": np.zeros((1, 28, 28, 3), np.int64)}, "uint8 or float32"),
        ({"stop_ids": (3, 4, 5, 6, 7)}, "5 stop tokens are more than 4"),
    ],
)
def test_refused(changes, message):
    engine = Engine(params_of("pre"), PRE, **SHARED)
    with pytest.raises(UserError, match=message):
        engine.submit(dataclasses.replace(request(0, 1, 4), **changes))
    with pytest.raises(UserError, match="3 tiles are more than 2"):
        Engine(params_of("post"), CONFIGS["post"], **SHARED).submit(request(0, 3, 4))


def test_buckets():
    sizes = [bucket(n, 64) for n in range(1, 5000)]
    assert all(n <= size < 1.25 * n + 64 for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 25


@pytest.mark.parametrize(
    "changes",
    [
        {"normalize_embeddings": True},
        {"vocab_size": 97, "table_rows": 91, "special_tokens": 6},
        {"decoder": dataclasses.replace(LAYERS, rope_scaling="dynamic", rope_factor=2.0)},
        {"embedding": dataclasses.replace(LAYERS, qkv_bias=True, out_bias=True)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_layers_apart_equal_layers_stacked(changes):
    """One step of both, after a prompt, where the model has parts that most have not."""
    config = dataclasses.replace(PRE, **changes)
    params = model.init(jax.random.key(2), config)
    size = 640 if config.decoder.rope_scaling == "dynamic" else 32  # past max_positions
    ids = np.array([request(1, 0, 1).prompt, request(2, 0, 1).prompt], np.int32)
    _, cache = model.prefill(params, {"input_ids": ids}, config, size)
    apart = {
        name: tuple({k: x[i] for k, x in cache[name].items()} for i in range(len(cache[name]["k"])))
        for name in STACKS
    } | {"lengths": cache["lengths"]}
    token = np.array([5, 95], np.int32)
    expected, grown = model.decode_step(params, token, cache, config)
    got, also = decode_step(compute_params(params, config), token, apart, config)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.abs(np.asarray(expected)).max() > 0.1
    for name in STACKS:
        assert also["lengths"][name].tolist() == grown["lengths"][name].tolist()
        for i, layer in enumerate(also[name]):
            np.testing.assert_allclose(layer["k"], grown[name]["k"][i], atol=1e-5)


def test_dynamic_scaling_past_its_limit():
    """Rotations are those of the engine's context, in prefill, decoding and any company."""
    layers = dataclasses.replace(ONE, rope_scaling="dynamic", rope_factor=2.0, max_positions=64)
    config = dataclasses.replace(PRE, embedding=layers, decoder=layers)
    one, other = request(1, 1, 8), request(2, 2, 8, text=30)
    engine = Engine(params_of_one(), config, **SHARED)
    alone = run(engine, [one])[0]
    assert run(engine, [other, one])[1] == alone
    prefill = functools.partial(model.prefill, config=config, cache_len=128)
    scores, cache = prefill(
        params_of_one(), {"input_ids": one.prompt[None], "pixels": one.tiles[None]}
    )
    expected = []
    for _ in range(8):
        expected.append(int(scores.argmax()))
        token = np.array(expected[-1:], np.int32)
        scores, cache = model.decode_step(params_of_one(), token, cache, config)
    assert alone == (expected, "length")
    plain = Engine(params_of_one(), config, **SHARED | {"capacity": 64, "floor": (64, 2)})
    assert run(plain, [one])[0] != alone
