"""int8, prefix reuse and several devices: less memory, less work, the same answers."""

import dataclasses
import functools
import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import hovle_jax
from hovle_jax import checkpoint, model
from hovle_jax.cli.main import main
from hovle_jax.config import MeshConfig
from hovle_jax.errors import UserError
from hovle_jax.generation import memory
from hovle_jax.generation.batch import Settings, answer_file
from hovle_jax.generation.chat import Assistant
from hovle_jax.generation.decode import STACKS, compute_params, decode_step, restack, stored_params
from hovle_jax.generation.engine import RESUME_TOKENS, Engine
from hovle_jax.generation.generate import generate
from hovle_jax.generation.prefix import PrefixStore, prefix_key, prefix_length
from hovle_jax.generation.sampling import Sampling
from hovle_jax.nn.quantize import dequantize_heads, quantize, quantize_heads
from hovle_jax.sharding import make_mesh
from tests.test_engine import (
    CONFIGS,
    LOCATIONS,
    PRE,
    SHARED,
    params_of,
    params_of_one,
    request,
    run,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def size(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


# int8


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), (2,)])
def test_quantized_numbers_are_half_a_step_away_at_most(axes):
    x = np.random.default_rng(0).standard_normal((5, 6, 7)).astype(np.float32) ** 3
    x[:, :, 3] = 0  # a scale of zero where the axes are the first two
    values, scale = quantize(jnp.asarray(x), axes)
    assert values.dtype == jnp.int8 and scale.ndim == 3 - len(axes)
    wide = np.expand_dims(np.asarray(scale), axes)
    assert (np.abs(np.asarray(values) * wide - x) <= wide / 2 * (1 + 1e-5)).all()
    assert np.abs(np.asarray(values)).max() == 127  # all of the range


def kernels(params) -> dict[str, jax.Array]:
    return {path: x for path, x in flat(params).items() if path.endswith("['kernel']")}


def test_int8_weights():
    """Every score of a prompt within 5% of the scores' range; the best token the same at four
    places in five, though the scores of random weights lie close; a quarter of float32's bytes."""
    config, own = PRE, params_of("pre")
    prepared = compute_params(own, config, int8=True)
    plain, small = kernels(compute_params(own, config)), kernels(prepared)
    assert plain.keys() == small.keys() and all(x.dtype == jnp.int8 for x in small.values())
    assert size(plain) == 4 * size(small)
    again = jax.tree.leaves(compute_params(prepared, config, int8=True))
    assert all(a is b for a, b in zip(again, jax.tree.leaves(prepared), strict=True))
    one = request(3, 2, 1, text=100)
    forward = jax.jit(functools.partial(model.apply, config=config))
    batch = {"input_ids": one.prompt[None], "pixels": one.tiles[None]}
    exact, near = (
        np.asarray(forward(p, batch)["logits"][0]) for p in (own, restack(prepared, config))
    )
    assert np.abs(near - exact).max() < 0.05 * (exact.max() - exact.min())
    assert np.mean(near.argmax(-1) == exact.argmax(-1)) > 0.8


def test_int8_cache():
    """Twenty given tokens after a prompt: every score within 5% of the scores' range, the best
    token the same at four places in five."""
    config, one = CONFIGS["post"], request(2, 2, 1, text=40)
    batch = {"input_ids": one.prompt[None], "pixels": one.tiles[None]}
    _, cache = model.prefill(params_of("post"), batch, config, 96)
    step = jax.jit(functools.partial(decode_step, config=config))
    params = compute_params(params_of("post"), config)
    tokens = np.random.default_rng(1).integers(3, 80, 20).astype(np.int32)
    scores = []
    for int8 in (False, True):
        own = {
            name: tuple(
                (quantize_heads if int8 else dict)({k: x[i] for k, x in cache[name].items()})
                for i in range(len(cache[name]["k"]))
            )
            for name in STACKS
        } | {"lengths": cache["lengths"]}
        found = []
        for token in tokens:
            out, own = step(params, token[None], own)
            found.append(np.asarray(out[0]))
        assert own["decoder"][0]["k"].dtype == (jnp.int8 if int8 else jnp.float32)
        scores.append(np.array(found))
    exact, near = scores
    assert 0 < np.abs(near - exact).max() < 0.05 * (exact.max() - exact.min())
    assert np.mean(near.argmax(-1) == exact.argmax(-1)) > 0.8


def test_slots_in_int8():
    """A byte for each number and four for each head of a token; the same alone and in company."""
    requests = [request(0, 0, 9), request(1, 2, 9), request(2, 1, 9, text=40)]
    plain = Engine(params_of("pre"), PRE, **SHARED)
    small = Engine(params_of("pre"), PRE, **SHARED, int8_cache=True)
    caches = [[e._state.cache[name] for name in STACKS] for e in (plain, small)]
    assert size(caches[1]) / size(caches[0]) == (8 + 4) / (4 * 8)
    got = run(small, requests)
    assert run(small, requests[::-1]) == got[::-1]
    assert [t[0] for t, _ in got] == [t[0] for t, _ in run(plain, requests)]  # of the prefill


def test_a_cache_in_int8_is_near():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 3, 64)), jnp.bfloat16)
    cache = quantize_heads({"k": x})
    assert size(cache) == 0.53125 * size(x)  # one byte and a scale per 64, for two bytes
    wide = np.asarray(x, np.float32)
    error = np.abs(np.asarray(dequantize_heads(cache, "k", jnp.float32)) - wide)
    assert (error <= np.abs(wide).max(-1, keepdims=True) / 254 * 1.001).all()


# Loading


@pytest.fixture
def most_bytes(monkeypatch):
    """A function that says how many bytes the first device has held since the test began, at most
    and now, looked at whenever an array goes onto devices."""
    device, real, seen = jax.devices()[0], jax.device_put, []

    def held() -> int:
        # A layer of its own and the whole it is a part of may share a buffer.
        shards = [s for x in jax.live_arrays() for s in x.addressable_shards if s.device == device]
        return sum({s.data.unsafe_buffer_pointer(): s.data.nbytes for s in shards}.values())

    def put(*args, **options):
        out = real(*args, **options)
        seen.append(held())
        return out

    def found() -> tuple[int, int]:
        gc.collect()  # of what older versions of JAX leave in cycles
        return max(seen) - before, held() - before

    gc.collect()
    before = held()
    monkeypatch.setattr(jax, "device_put", put)
    return found


@pytest.mark.parametrize("int8", [False, True])
def test_a_directory_is_loaded_layer_by_layer(release, most_bytes, int8):
    """Each of two devices never holds more than its part of the model and one array; the arrays
    are those of the whole model prepared at once."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=2), jax.devices()[:2])
    assistant = Assistant.load(release, int8_weights=int8, mesh=mesh)
    most, own = most_bytes()
    layer = assistant.params["decoder"]["layers"][0]
    assert own < 0.7 * size(assistant.params)  # tables of 309 rows stay whole
    assert most <= own + 8 * size(layer["mlp"]["up"])  # in float32, and what quantizing makes
    assert not int8 or layer["mlp"]["up"]["kernel"].dtype == jnp.int8
    config, params = hovle_jax.load(release)
    expected = flat(compute_params(params, config, int8=int8, mesh=mesh))
    got = flat(assistant.params)
    assert got.keys() == expected.keys()
    for path, x in got.items():
        assert x.dtype == expected[path].dtype and x.sharding == expected[path].sharding
        np.testing.assert_array_equal(x, expected[path], err_msg=path)


@pytest.mark.parametrize("int8", [False, True])
def test_layers_of_several_types_are_loaded_each_from_its_place(tmp_path, int8):
    types = ("linear_attention", "attention")
    layers = dataclasses.replace(PRE.decoder, num_layers=4, layer_types=types)
    config = dataclasses.replace(PRE, decoder=layers, dtype="bfloat16")
    params = model.init(jax.random.key(0), config)
    checkpoint.save_model(tmp_path, config, params)
    tree = checkpoint.open_tree(epath.Path(tmp_path / "params"))
    stored = checkpoint.Stored(str(tmp_path), config, None, trees=(tree,))
    got = flat(stored_params(stored, int8=int8))
    expected = flat(compute_params(params, config, int8=int8))
    assert got.keys() == expected.keys()
    for path, x in got.items():
        assert x.dtype == expected[path].dtype
        np.testing.assert_array_equal(x, expected[path], err_msg=path)


def flat(params) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): x for path, x in leaves}


# What fits


@pytest.mark.parametrize("ways", [(1, 1), (2, 2)])
def test_memory_is_summed_up_before_it_is_taken(monkeypatch, ways):
    """Weights, their layers once more, slots, kept images: to the byte what lies on a device."""
    data, tensor = ways
    devices = jax.devices()[: data * tensor]
    mesh = make_mesh(MeshConfig(data=data, fsdp=1, tensor=tensor), devices)
    options = SHARED | {"mesh": mesh if len(devices) > 1 else None, "prefix_bytes": 2**20}
    engine = Engine(params_of("pre"), PRE, **options)

    def held(tree) -> int:
        shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
        return sum(s.data.nbytes for s in shards if s.device == devices[0])

    parts = [engine._params, [engine._params[name]["layers"] for name in STACKS]]
    parts += [[engine._state.cache[name] for name in STACKS]]
    total = sum(map(held, parts)) + 2**20 // tensor
    monkeypatch.setattr(memory, "limit_of", lambda array: total)
    Engine(params_of("pre"), PRE, **options)
    monkeypatch.setattr(memory, "limit_of", lambda array: total - 1)
    with pytest.raises(UserError, match="of each device, which has .*2 slots .* --slots, a short"):
        Engine(params_of("pre"), PRE, **options)


# Prefix reuse


def about(image: int, question: int, **changes):
    """A request whose image depends on `image` alone and whose text after it on `question`."""
    first, rest = request(image, 2, 8), np.random.default_rng(question).integers(3, 80, 12)
    end = prefix_length(first.prompt, PRE.img_context_id)
    first.prompt[:end] = request(0, 2, 8).prompt[:end]  # equal text before all images
    prompt = np.concatenate([first.prompt[:end], [89], rest]).astype(np.int32)
    return dataclasses.replace(first, prompt=prompt, **changes)


@LOCATIONS
def test_a_question_about_an_image_read_before(loc):
    """Tokens of the path that shares nothing; equal text with another image is another prompt."""
    drawn = Sampling(1.5, seed=3, repetition_penalty=1.3)
    requests = [
        about(1, 1),
        about(2, 1),
        about(1, 2, sampling=drawn),
        request(5, 0, 8),
        about(1, 1),
        about(2, 3),
    ]
    expected = run(Engine(params_of(loc), CONFIGS[loc], **SHARED), requests)
    assert expected[0] != expected[1] and expected[0] == expected[4]
    engine = Engine(params_of(loc), CONFIGS[loc], **SHARED, prefix_bytes=2**20)
    assert run(engine, requests) == expected
    assert (engine.prefixes.hits, engine.prefixes.misses) == (3, 2)
    assert run(engine, requests, 1) == expected
    assert (engine.prefixes.hits, engine.prefixes.misses) == (8, 2)


def test_much_text_after_an_image_is_prefilled_with_it():
    """In one prefill however short the prefix: continuing a cache keeps all scores of the rest."""
    rest = np.random.default_rng(0).integers(3, 80, RESUME_TOKENS + 1)
    one = about(1, 1)
    end = prefix_length(one.prompt, PRE.img_context_id)
    shapes = {}
    for count in (RESUME_TOKENS, RESUME_TOKENS + 1):
        prompt = np.concatenate([one.prompt[:end], rest[:count]]).astype(np.int32)
        engine = Engine(params_of("pre"), PRE, slots=8, capacity=2048, prefix_bytes=2**20)
        shapes[count] = engine._shape(dataclasses.replace(one, prompt=prompt))
    assert [(s.tokens, s.rest) for s in shapes.values()] == [(64, RESUME_TOKENS), (640, 0)]


def test_both_parts_count_in_the_size_of_a_group(monkeypatch):
    """Prompts of one prefill are as many as PREFILL_TOKENS hold, their second parts included."""
    monkeypatch.setattr("hovle_jax.generation.engine.PREFILL_TOKENS", 2 * (128 + 64))
    groups = []
    monkeypatch.setattr(
        Engine, "_fill", lambda self, slots, group, shape: groups.append(len(group))
    )
    engine = Engine(params_of("pre"), PRE, **SHARED | {"slots": 8}, prefix_bytes=2**20)
    for question in range(4):
        engine.submit(about(1, question))
    with pytest.raises(TypeError):  # of the stand-in, which reports nothing
        engine.admit()
    assert groups == [2]


def test_memory_of_prefixes_is_bounded():
    """The least recently used goes; what is larger than the bound is computed and not kept."""
    store, one = PrefixStore(100), np.zeros(40, np.uint8)
    for key in (b"a", b"b"):
        assert store.get(key) is None
        store.put(key, {"k": one})
    assert store.get(b"a") is not None  # b is older now
    store.put(b"c", {"k": one})
    assert store.bytes == 80 and store.get(b"b") is None and store.get(b"a") is not None
    store.put(b"d", {"k": np.zeros(101, np.uint8)})
    assert store.get(b"d") is None and store.bytes == 80
    assert (store.hits, store.misses) == (2, 4)


def test_an_engine_without_room_for_prefixes_answers_the_same():
    requests = [about(1, 1), about(1, 2)]
    expected = run(Engine(params_of("pre"), PRE, **SHARED), requests)
    engine = Engine(params_of("pre"), PRE, **SHARED, prefix_bytes=1)
    assert run(engine, requests, 1) == expected
    assert engine.prefixes.misses == 2 and engine.prefixes.bytes == 0


def test_a_prefix_is_named_by_its_content():
    ids, tiles = np.array([1, 90, 90], np.int32), np.zeros((2, 4, 4, 3), np.uint8)
    other = tiles.copy()
    other[1, 3, 3, 2] = 1
    keys = [
        prefix_key(ids, tiles),
        prefix_key(ids[:2], tiles),
        prefix_key(ids, tiles[:1]),
        prefix_key(ids, other),
        prefix_key(ids, tiles.reshape(2, 2, 8, 3)),
        prefix_key(ids, np.zeros((2, 4, 3), np.float32).reshape(2, 4, 1, 3)),
    ]
    assert len(set(keys)) == 6 and prefix_key(ids.copy(), tiles.copy()) == keys[0]
    prompt = np.array([1, 90, 90, 5], np.int32)
    assert prefix_length(prompt, 90) == 3 and prefix_length(prompt[:3], 90) == 0
    assert prefix_length(prompt, 91) == 0


# Several devices


@pytest.mark.parametrize("loc", ["pre", pytest.param("post", marks=pytest.mark.slow)])
def test_four_devices_answer_as_one(loc):
    """2 x 2: slots over `data`, heads, MLP and vocabulary over `tensor`; images read before too."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    requests = [about(1, 1), request(5, 0, 12), about(1, 2, sampling=Sampling(1.5, seed=3))]
    expected = run(Engine(params_of(loc), CONFIGS[loc], **SHARED), requests)
    engine = Engine(params_of(loc), CONFIGS[loc], **SHARED, prefix_bytes=2**20, mesh=mesh)
    assert run(engine, requests) == expected and engine.prefixes.hits == 1
    k = engine._state.cache["decoder"][0]["k"]
    assert k.sharding.shard_shape(k.shape) == (1, 128, 1, 8)  # of 2 slots and 2 heads
    up = engine._params["decoder"]["layers"][0]["mlp"]["up"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (32, 24)  # of 48


@pytest.mark.slow  # with the other slow ones: the parts are tested apart
def test_int8_on_several_devices():
    """Everything at once, and a number of prompts that devices do not divide."""
    config = dataclasses.replace(PRE, decoder=PRE.embedding)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    requests = [request(1, 1, 8), request(2, 0, 8)]
    prepared = compute_params(params_of_one(), config, int8=True)
    expected = run(Engine(prepared, config, **SHARED, int8_cache=True), requests)
    got = run(Engine(prepared, config, **SHARED, int8_cache=True, mesh=mesh), requests)
    assert got == expected
    with pytest.raises(UserError, match="3 slots cannot be split over 2 devices"):
        Engine(prepared, config, **SHARED | {"slots": 3}, mesh=mesh)
    one = requests[0]
    answer = generate(
        prepared, config, [one.prompt], [one.tiles], max_new=8, stop_ids=(), mesh=mesh
    )
    assert answer == generate(prepared, config, [one.prompt], [one.tiles], max_new=8, stop_ids=())


# The command line


@pytest.fixture
def questions(release, tmp_path):
    """(command line of `hovle generate` over two questions about one image, input, output)."""
    image = str(release.parent / "image.png")
    rows = [{"prompt": "a b", "image": image}, {"prompt": "which", "image": image}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["generate", str(release), f"--input={source}", f"--output={target}"]
    return [*argv, "--slots=2", "--context=256", "--max-new-tokens=6"], source, target


@pytest.mark.slow  # with the other slow ones: the parts are tested apart
def test_flags_reach_the_engine(release, questions):
    argv, source, target = questions
    assert main([*argv, "--mesh=1x2", "--int8-weights", "--int8-kv"]) == 0
    assistant = Assistant.load(release, int8_weights=True)
    engine = assistant.engine(slots=2, context=256, int8_cache=True)
    same = source.with_name("same.jsonl")
    answer_file(assistant, engine, str(source), str(same), Settings(max_new_tokens=6))
    assert target.read_text() == same.read_text()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--mesh=3x3", "--mesh 3x3 needs 9 devices, found 8"),
        ("--mesh=2", "--mesh must be two numbers, as 2x4, not 2"),
        ("--mesh=0x2", "--mesh must be two numbers"),
        ("--mesh=4x1", "2 slots cannot be split over 4 devices"),
        ("--prefix-mib=-1", "--prefix-mib must be 0 or more"),
    ],
)
def test_wrong_flags(questions, one_line_error, flag, message):
    assert message in one_line_error([*questions[0], flag])
