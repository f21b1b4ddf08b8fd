"""HoVLE as a function: packing, caches, gradients, rematerialisation, precision, long contexts.

'pre' and 'post' models with random float32 weights, 4 tokens (16 patches) per tile.
"""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hovle_jax
from hovle_jax import losses, model, stages
from hovle_jax.config import IGNORE, IMAGE_MEAN, IMAGE_STD, ModelConfig, RunConfig
from hovle_jax.errors import UserError
from hovle_jax.generation.generate import generate
from hovle_jax.nn.embedding import long_stream, normalize_pixels, short_stream
from hovle_jax.nn.layers import LayerInputs, rope_tables
from hovle_jax.nn.stack import REMAT_POLICIES, Layer, layer_stack
from hovle_jax.tree import flatten, unflatten
from tests import small

# Rotations that differ within the few tokens of these tests.
LAYERS = dataclasses.replace(small.LAYERS, rope_theta=100.0)
PRE = dataclasses.replace(small.PRE, embedding=LAYERS, decoder=LAYERS)
CONFIGS = {"pre": PRE, "post": dataclasses.replace(PRE, shuffle_loc="post")}
LOCATIONS = pytest.mark.parametrize("loc", CONFIGS)
ROWS, LENGTH, TILES = 4, 40, 4  # of every packed batch: few shapes, few compilations

# Compiling is most of these tests' time and speed of execution none of it.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def params_of(loc: str, seed: int = 3):
    """Random weights, biases and norms; the same for 'pre' and 'post'."""
    rng, flat = np.random.default_rng(seed), {}
    for path, x in sorted(flatten(model.abstract_params(CONFIGS[loc])).items()):
        noise = rng.standard_normal(x.shape).astype(np.float32)
        flat[path] = jnp.asarray(1 + 0.2 * noise if path.endswith("scale") else 0.25 * noise)
    return unflatten(flat)


@functools.cache
def apply_of(config: ModelConfig):
    return compiled(functools.partial(model.apply, config=config))


def sample(seed: int, tiles: int, before: int = 4, after: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """(ids, pixels [tiles, 28, 28, 3]): text, one image of so many tiles, text."""
    rng = np.random.default_rng(seed)
    image = [88, *[90] * (4 * tiles), 89] if tiles else []
    ids = [1, *rng.integers(3, 80, before), *image, *rng.integers(3, 80, after)]
    return np.array(ids, np.int32), rng.integers(0, 256, (tiles, 28, 28, 3)).astype(np.uint8)


def pack(rows: list[list[tuple[np.ndarray, np.ndarray]]], unused: int = 0) -> dict[str, np.ndarray]:
    """Up to ROWS rows of samples -> a batch; tiles without tokens hold the value `unused`."""
    ids, segments, positions = (np.zeros((ROWS, LENGTH), np.int32) for _ in range(3))
    pixels = np.full((ROWS, TILES, 28, 28, 3), unused, np.uint8)
    for r, samples in enumerate(rows):
        start = tile = 0
        for s, (tokens, images) in enumerate(samples):
            where = slice(start, start + len(tokens))
            ids[r, where], segments[r, where] = tokens, s + 1
            positions[r, where] = np.arange(len(tokens))
            pixels[r, tile : tile + len(images)] = images
            start, tile = where.stop, tile + len(images)
    predicted = (segments > 0) & (ids < 88)  # the first token of a sample, too
    return {
        "input_ids": ids,
        "segment_ids": segments,
        "position_ids": positions,
        "pixels": pixels,
        "labels": np.where(predicted, ids, IGNORE),
        "loss_weight": predicted.astype(np.float32),
    }


A, B = sample(0, tiles=2), sample(1, tiles=1, before=2, after=9)
SIZE_A, SIZE_B = len(A[0]), len(B[0])


def next_token_loss(params, batch, config) -> jax.Array:
    run = RunConfig(stage="instruct", model=config)
    stage = stages.STAGES["instruct"]
    nll, weights = (
        x["next_token"] for x in (stage.terms(params, {}, batch, run), stage.weights(batch, run))
    )
    return (nll * weights).sum() / weights.sum()


@functools.cache
def loss_and_grads_of(config: ModelConfig):
    """(params, normalised float pixels, batch) -> (loss, (gradient by params, by pixels))."""

    def loss(params, pixels, batch):
        return next_token_loss(params, batch | {"pixels": pixels}, config)

    return compiled(jax.value_and_grad(loss, argnums=(0, 1)))


def normalized(pixels: np.ndarray) -> np.ndarray:
    return ((pixels / 255.0 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)).astype(np.float32)


@functools.partial(compiled, static_argnames="chunk")
def token_losses(hidden, head, batch, chunk):
    """(nll [B, S], weights [B, S]) from the LLM's hidden states."""
    names = ("labels", "loss_weight", "segment_ids")
    targets, weights = losses.next_token_weights(*(batch[n] for n in names))
    return losses.token_nll(hidden, head, targets, weights, chunk), weights


# Packing


@LOCATIONS
def test_packed_row_equals_its_samples(loc):
    batch = pack([[A, B], [B, A], [A], [B]], unused=77)
    hidden = apply_of(CONFIGS[loc])(params_of(loc), batch)["hidden"]
    head = model.head_kernel(params_of(loc))
    nll, weights = map(np.asarray, token_losses(hidden, head, batch, chunk=16))
    alone_a, alone_b = nll[2, :SIZE_A], nll[3, :SIZE_B]
    assert np.ptp(alone_a) > 1 and np.ptp(alone_b) > 1
    size = SIZE_A + SIZE_B
    for got, alone in (
        (nll[0, :SIZE_A], alone_a),
        (nll[0, SIZE_A:size], alone_b),
        (nll[1, :SIZE_B], alone_b),
        (nll[1, SIZE_B:size], alone_a),
    ):
        # The last place would predict the next sample's first token; its weight is 0.
        np.testing.assert_allclose(got[:-1], alone[:-1], atol=1e-5, rtol=0)
    sums = np.sum(nll * weights, axis=1)
    np.testing.assert_allclose(sums[:2], sums[2] + sums[3], rtol=1e-6)
    assert weights[0, SIZE_A - 1] == weights[0, size - 1] == weights[1, SIZE_B - 1] == 0
    assert weights[0].sum() == weights[2].sum() + weights[3].sum()


@LOCATIONS
def test_samples_do_not_see_each_other(loc):
    """Text and pixels of one sample change; the scores of the other stay as they are."""
    run, params = apply_of(CONFIGS[loc]), params_of(loc)
    other_a, other_b = sample(10, tiles=2), sample(11, tiles=1, before=2, after=9)
    base = np.asarray(run(params, pack([[A, B]]))["logits"])
    changed_a = np.asarray(run(params, pack([[other_a, B]]))["logits"])
    changed_b = np.asarray(run(params, pack([[A, other_b]]))["logits"])
    first, second = slice(0, SIZE_A), slice(SIZE_A, SIZE_A + SIZE_B)
    np.testing.assert_allclose(changed_a[0, second], base[0, second], atol=1e-6, rtol=0)
    np.testing.assert_allclose(changed_b[0, first], base[0, first], atol=1e-6, rtol=0)
    assert np.abs(changed_a[0, first] - base[0, first])[1:].max(axis=-1).min() > 1e-3
    assert np.abs(changed_b[0, second] - base[0, second])[1:].max(axis=-1).min() > 1e-3


def test_long_stream_of_a_packed_row():
    """Positions count up from 0 in each segment, an image token's id takes four places."""
    batch = pack([[A, B], [B]])
    names = ("input_ids", "segment_ids", "position_ids")
    short = short_stream(*(jnp.asarray(batch[name]) for name in names))
    stream = long_stream(short, TILES, CONFIGS["post"])
    assert stream.ids.shape == (ROWS, LENGTH + 12 * TILES)
    for row, samples in enumerate([[A, B], [B]]):
        ids = [np.repeat(x, np.where(x == 90, 4, 1)) for x, _ in samples]
        segments = [np.full(len(x), i + 1) for i, x in enumerate(ids)]
        size = sum(map(len, ids))
        np.testing.assert_array_equal(stream.ids[row, :size], np.concatenate(ids))
        np.testing.assert_array_equal(stream.segment_ids[row, :size], np.concatenate(segments))
        positions = np.concatenate([np.arange(len(x)) for x in ids])
        np.testing.assert_array_equal(stream.position_ids[row, :size], positions)
        # What is left of the row is padding; the short row's own padding comes first.
        assert not np.any(np.asarray(stream.segment_ids)[row, size:])
        tokens = sum(len(x) for x, _ in samples)
        found = np.asarray(stream.ids)[row, np.asarray(stream.places)[row, :tokens]]
        np.testing.assert_array_equal(found, batch["input_ids"][row, :tokens])


@LOCATIONS
def test_causal(loc):
    """What comes later in a sample, be it text or a tile, changes nothing before it."""
    run, params = apply_of(CONFIGS[loc]), params_of(loc)
    base = np.asarray(run(params, pack([[A, B]]))["logits"])
    ids, pixels = A[0].copy(), A[1].copy()
    pixels[1] = 255 - pixels[1]  # the second of two tiles: from place 6 + 4 on
    late = np.asarray(run(params, pack([[(ids, pixels), B]]))["logits"])
    np.testing.assert_allclose(late[0, :10], base[0, :10], atol=1e-6, rtol=0)
    assert np.abs(late[0, 10:SIZE_A] - base[0, 10:SIZE_A]).max(axis=-1).min() > 1e-3
    ids[SIZE_A - 3] += 1
    late = np.asarray(run(params, pack([[(ids, A[1]), B]]))["logits"])
    np.testing.assert_allclose(late[0, : SIZE_A - 3], base[0, : SIZE_A - 3], atol=1e-6, rtol=0)
    assert np.abs(late[0, SIZE_A - 3 : SIZE_A] - base[0, SIZE_A - 3 : SIZE_A]).max() > 1e-3


# Generation

NEW = 16
NEVER = (-1,)  # a stop token that no model can write
PROMPTS = [sample(20, 0), sample(21, 1), sample(23, 2, before=7, after=3)]


@functools.cache
def uncached(loc: str) -> list[list[int]]:
    """Greedy tokens of PROMPTS, the whole sequence again for every one of them."""
    batch = pack([[p] for p in PROMPTS])
    lengths = np.array([len(p[0]) for p in PROMPTS])
    assert lengths.max() + NEW <= LENGTH
    rows = np.arange(len(PROMPTS))
    out: list[np.ndarray] = []
    for _ in range(NEW):
        scores = np.asarray(apply_of(CONFIGS[loc])(params_of(loc), batch)["logits"])
        scores = scores[rows, lengths - 1]
        best = np.sort(scores, axis=-1)
        assert np.all(best[:, -1] - best[:, -2] > 1e-4)  # no ties that rounding could turn
        token = scores.argmax(axis=-1)
        out.append(token)
        batch["input_ids"][rows, lengths] = token
        batch["segment_ids"][rows, lengths] = 1
        batch["position_ids"][rows, lengths] = lengths
        lengths += 1
    tokens = np.stack(out, axis=1)
    # A written <IMG_CONTEXT> would ask for a tile; these weights never do that.
    assert not np.any(tokens == PRE.img_context_id)
    assert all(len(set(row.tolist())) > 5 for row in tokens)
    return tokens.tolist()


@LOCATIONS
def test_cache_equals_no_cache(loc):
    prompts, tiles = zip(*PROMPTS, strict=True)
    got = generate(params_of(loc), CONFIGS[loc], prompts, tiles, max_new=NEW, stop_ids=NEVER)
    assert got == uncached(loc)


@pytest.mark.parametrize(("loc", "row"), [("pre", 0), ("post", 1)])
def test_one_prompt_equals_its_row_of_a_batch(loc, row):
    """Text alone (no pixels at all), and one image without the others' padding."""
    ids, tiles = PROMPTS[row]
    got = generate(params_of(loc), CONFIGS[loc], [ids], [tiles], max_new=NEW, stop_ids=NEVER)
    assert got == [uncached(loc)[row]]


def test_stop_tokens():
    """Each row ends at its own stop token, which is left out; the others go on."""
    expected = uncached("pre")
    stop = expected[0][5]
    prompts, tiles = zip(*PROMPTS, strict=True)
    got = generate(params_of("pre"), PRE, prompts, tiles, max_new=NEW, stop_ids=(stop,))
    for row, full in zip(got, expected, strict=True):
        assert row == full[: full.index(stop) if stop in full else NEW]
    assert len(got[0]) <= 5 < max(map(len, got))


@pytest.mark.parametrize("tiles", [0, 1, 3])
def test_wrong_number_of_image_tokens(tiles):
    ids, _ = sample(0, tiles=2)
    pixels = np.zeros((tiles, 28, 28, 3), np.uint8)
    good = sample(1, tiles=1)
    message = f"prompt 1: 8 image tokens for {tiles} tiles"
    with pytest.raises(UserError, match=message):
        generate(params_of("pre"), PRE, [good[0], ids], [good[1], pixels], max_new=1)


# Pixels


@LOCATIONS
def test_pixels_matter(loc):
    config, params = CONFIGS[loc], params_of(loc)
    # Row 0 uses three of four tiles, row 1 one, row 2 none.
    batch = pack([[A, B], [B], [sample(5, 0)]], unused=128)
    used = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    floats = normalized(batch["pixels"])
    run = loss_and_grads_of(config)
    loss, (_, grads) = run(params, floats, batch)
    size = np.abs(np.asarray(grads))[: len(used)]
    assert np.all(size[~used] == 0)
    patches = size[used].reshape(-1, 4, 7, 4, 7, 3).max(axis=(2, 4, 5))
    assert patches.shape == (4, 4, 4)
    assert patches.min() > 1e-7  # every patch of every used tile is seen
    for row, tile in np.argwhere(used):
        changed = floats.copy()
        changed[row, tile] = 0
        assert abs(float(run(params, changed, batch)[0]) - float(loss)) > 1e-4
    changed = floats.copy()
    changed[: len(used)][~used] = 3.0
    assert float(run(params, changed, batch)[0]) == float(loss)


def test_uint8_pixels_are_normalised():
    """uint8 is normalised on the device; floats count as normalised already."""
    expected = normalized(A[1])
    np.testing.assert_allclose(normalize_pixels(A[1], "float32"), expected, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(normalize_pixels(expected, "float32"), expected)
    assert normalize_pixels(A[1], "bfloat16").dtype == jnp.bfloat16


def test_text_needs_no_pixels():
    """A text row gives the same scores with unused tiles as without any."""
    batch = pack([[sample(5, 0), sample(6, 0)]], unused=50)
    without = {k: v for k, v in batch.items() if k != "pixels"}
    run, params = apply_of(CONFIGS["post"]), params_of("post")
    with_tiles, alone = run(params, batch)["logits"], run(params, without)["logits"]
    valid = batch["segment_ids"] > 0
    np.testing.assert_allclose(with_tiles[valid], alone[valid], atol=1e-4, rtol=0)


# How it is computed


def relative(actual, expected) -> float:
    """Largest difference of any leaf, relative to that leaf's largest entry."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def test_remat_recomputes():
    """The policies differ in what they compute twice."""
    batch, params = pack([[A, B]]), model.abstract_params(PRE)

    def products(remat: str) -> int:
        config = dataclasses.replace(PRE, remat=remat)
        loss = functools.partial(next_token_loss, config=config)
        jaxpr = jax.make_jaxpr(jax.grad(loss))(params, batch)
        return sum(eqn.primitive.name == "dot_general" for eqn in equations(jaxpr.jaxpr))

    count = {remat: products(remat) for remat in REMAT_POLICIES}
    assert count["full"] > count["attention"] > count["mixed"] > count["products"]
    assert count["products"] == count["none"] + 2  # the scores of attention, in both stacks
    assert count["full"] > count["dots"] > count["none"]
    assert count["offload"] == count["minimal"]


def test_what_is_offloaded_comes_back():
    """Through the host's memory and the same gradients."""
    batch, params = pack([[A, B]]), model.init(jax.random.key(0), PRE)

    def gradient(remat: str):
        config = dataclasses.replace(PRE, remat=remat)
        return jax.jit(jax.grad(functools.partial(next_token_loss, config=config)))

    jaxpr = str(jax.make_jaxpr(gradient("offload"))(params, batch))
    assert "pinned_host" in jaxpr or "<host>" in jaxpr
    assert relative(gradient("offload")(params, batch), gradient("none")(params, batch)) < 1e-5


def test_unknown_remat():
    with pytest.raises(UserError, match="model.remat: 'some'"):
        layer_stack(LAYERS, "xla", "some")


@functools.cache
def stack_inputs():
    x = jax.random.normal(jax.random.key(0), (2, 12, 32))
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((12, 12), bool)), (2, 12, 12))
    return x, LayerInputs(*rope_tables(positions, LAYERS), mask)


@functools.cache
def looped():
    """A stack as a loop over its layers: (params, x) -> (value, gradients)."""
    _, inputs = stack_inputs()

    def run(params, x):
        for i in range(LAYERS.num_layers):
            layer = jax.tree.map(lambda p, i=i: p[i], params)
            x, _ = Layer(LAYERS, "xla", False, False).apply({"params": layer}, x, inputs, None)
        return jnp.sum(jnp.sin(x))

    return compiled(jax.value_and_grad(run, argnums=(0, 1)))


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_stack_equals_a_loop(remat):
    """A scanned stack is its layers one after the other, whatever it recomputes."""
    params = params_of("pre")["decoder"]["layers"]
    x, inputs = stack_inputs()

    def scanned(params, x):
        stack = layer_stack(LAYERS, "xla", remat)
        return jnp.sum(jnp.sin(stack.apply({"params": params}, x, inputs, None)[0]))

    value, grads = compiled(jax.value_and_grad(scanned, argnums=(0, 1)))(params, x)
    expected, expected_grads = looped()(params, x)
    assert float(value) == pytest.approx(float(expected), abs=1e-5)
    assert relative(grads, expected_grads) < 1e-5


def test_order_of_layers_matters():
    params = params_of("pre")["decoder"]["layers"]
    x, _ = stack_inputs()
    swapped = jax.tree.map(lambda p: p[::-1], params)
    assert abs(float(looped()(swapped, x)[0]) - float(looped()(params, x)[0])) > 1e-3


# The chunked loss


def plain_nll(hidden, head, targets):
    log_probs = jax.nn.log_softmax(hidden @ head, axis=-1)
    picked = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets == IGNORE, 0.0, -picked)


NLL_B, NLL_S, NLL_E, NLL_V = 2, 12, 8, 101


@functools.cache
def nll_inputs():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((NLL_B, NLL_S, NLL_E)).astype(np.float32)
    head = rng.standard_normal((NLL_E, NLL_V)).astype(np.float32)
    targets = rng.integers(0, NLL_V, (NLL_B, NLL_S)).astype(np.int32)
    targets[0, 3] = targets[1, 11] = IGNORE
    weights = rng.uniform(0.5, 2.0, (NLL_B, NLL_S)).astype(np.float32)
    return hidden, head, targets, weights


def summed(nll):
    """(hidden, head) -> ((weighted sum, nll), gradients)."""
    weights = nll_inputs()[3]

    def run(hidden, head):
        out = nll(hidden, head)
        return jnp.sum(out * weights), out

    return compiled(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))


@functools.cache
def expected_nll():
    hidden, head, targets, _ = nll_inputs()
    return summed(functools.partial(plain_nll, targets=targets))(hidden, head)


@pytest.mark.parametrize("chunk", [1, 5, 12, 512])
def test_chunked_loss(chunk):
    hidden, head, targets, weights = nll_inputs()
    chunked = functools.partial(losses.token_nll, targets=targets, weights=weights, chunk=chunk)
    (value, nll), grads = summed(chunked)(hidden, head)
    (expected_value, expected), expected_grads = expected_nll()
    assert nll.shape == (NLL_B, NLL_S) and nll.dtype == jnp.float32
    np.testing.assert_allclose(nll, expected, atol=2e-6, rtol=1e-6)
    assert nll[0, 3] == nll[1, 11] == 0
    assert float(value) == pytest.approx(float(expected_value), rel=1e-6)
    assert relative(grads, expected_grads) < 1e-5
    assert np.all(np.asarray(grads[0])[targets == IGNORE] == 0)


@pytest.mark.parametrize("factor", [1.0, -0.25, 0.0])
def test_a_loss_weighed_otherwise_than_announced_has_no_gradient(factor):
    hidden, head, targets, weights = nll_inputs()

    def total(head, used):
        nll = losses.token_nll(hidden, head, targets, weights, 5)
        return jnp.sum(nll * used)

    gradient = jax.jit(jax.grad(total))
    expected = jax.grad(lambda h: jnp.sum(plain_nll(hidden, h, targets) * weights * factor))(head)
    np.testing.assert_allclose(gradient(head, weights * factor), expected, atol=2e-5)
    other = weights * factor
    other[0, 5] += 0.1
    assert np.isnan(gradient(head, other)).all()


def equations(jaxpr):
    """Every equation of a jaxpr and of the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def vocabulary_places(fn, vocab: int, *args) -> int:
    """The most places that any array with a vocabulary axis has scores for."""
    shapes = [v.aval.shape for e in equations(jax.make_jaxpr(fn)(*args).jaxpr) for v in e.outvars]
    sizes = [int(np.prod(s)) // vocab for s in shapes if vocab in s]
    assert sizes
    return max(sizes)


@pytest.mark.parametrize("chunk", [3, 4, 5])
def test_all_scores_never_exist(chunk):
    """[B, S, V] is in neither the loss nor its gradient; at most B x chunk places have scores."""
    hidden, head, targets, _ = nll_inputs()

    def total(hidden, head, chunk):
        weights = jnp.ones(targets.shape)
        return jnp.sum(losses.token_nll(hidden, head, targets, weights, chunk))

    for fn in (total, jax.grad(total, argnums=(0, 1))):
        small = vocabulary_places(functools.partial(fn, chunk=chunk), NLL_V, hidden, head)
        assert small <= max(NLL_B * chunk, NLL_E)  # the head itself is E wide
        whole = vocabulary_places(functools.partial(fn, chunk=NLL_S), NLL_V, hidden, head)
        assert whole == NLL_B * NLL_S  # so the count does see such arrays


@LOCATIONS
def test_all_scores_never_exist_in_a_training_step(loc):
    batch, params = pack([[A, B]]), model.abstract_params(CONFIGS[loc])
    places = {}
    for chunk in (8, 16, LENGTH):
        config = dataclasses.replace(CONFIGS[loc], loss_chunk=chunk)
        fn = jax.value_and_grad(functools.partial(next_token_loss, config=config))
        places[chunk] = vocabulary_places(fn, config.vocab_size, params, batch)
    # The head and the table themselves are 32 wide.
    assert places == {8: 32, 16: ROWS * 16, LENGTH: ROWS * LENGTH}


# bfloat16


@LOCATIONS
def test_bfloat16_types(loc):
    """Activations are bfloat16; scores, loss and the gradients of parameters are float32."""
    batch, params = pack([[A, B]]), params_of(loc)
    config = dataclasses.replace(CONFIGS[loc], dtype="bfloat16")
    out = jax.eval_shape(apply_of(config), params, batch)
    assert out["hidden"].dtype == out["embeddings"].dtype == jnp.bfloat16
    assert out["logits"].dtype == jnp.float32
    args = params, normalized(batch["pixels"]), batch
    loss, (grads, _) = jax.eval_shape(loss_and_grads_of(config), *args)
    assert {x.dtype for x in jax.tree.leaves((loss, grads))} == {jnp.dtype(jnp.float32)}


@LOCATIONS
def test_bfloat16_scores(loc):
    batch, params = pack([[A, B]]), params_of(loc)
    config = dataclasses.replace(CONFIGS[loc], dtype="bfloat16")
    exact = apply_of(CONFIGS[loc])(params, batch)["logits"]
    out = apply_of(config)(params, batch)["logits"]
    valid = batch["segment_ids"] > 0
    difference = np.asarray(out - exact)[valid]
    scale = float(jnp.std(exact[valid]))
    assert 1e-4 * scale < np.sqrt(np.mean(difference**2)) < 0.06 * scale


def test_bfloat16_gradients():
    batch, params = pack([[A, B]]), params_of("post")
    args = params, normalized(batch["pixels"]), batch
    config = dataclasses.replace(CONFIGS["post"], dtype="bfloat16")
    loss, (grads, _) = loss_and_grads_of(config)(*args)
    exact_loss, (exact_grads, _) = loss_and_grads_of(CONFIGS["post"])(*args)
    assert float(loss) == pytest.approx(float(exact_loss), rel=0.01)
    a, b = (np.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (grads, exact_grads))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.98


# Dynamic NTK scaling
#
# The rule (model.py): a sequence longer than max_positions is rotated with a base for its length; a
# growing one is rotated once, for the length it may reach (`cache_len`), because a cache keeps
# rotated keys. In a packed row the length is the segment's, not the row's.

MAX = 24


def scaled_config(loc: str) -> ModelConfig:
    changes = {"rope_scaling": "dynamic", "rope_factor": 2.0, "max_positions": MAX}
    stack = dataclasses.replace(LAYERS, **changes)
    return dataclasses.replace(CONFIGS[loc], embedding=stack, decoder=stack)


def extra(loc: str, tiles: int) -> int:
    """Places that the embedding module's stream has more than the LLM's."""
    return 12 * tiles if loc == "post" else 0


@functools.cache
def scores_of(loc: str, scaled: bool) -> tuple[np.ndarray, list[int]]:
    """(logits [4, S, V], lengths) of rows that are at, above and around MAX (see below)."""
    config = scaled_config(loc) if scaled else CONFIGS[loc]
    at = sample(30, tiles=1, before=2, after=MAX - 9 - extra(loc, 1))
    above = sample(30, tiles=1, before=2, after=MAX - 8 - extra(loc, 1))
    short, long = sample(31, tiles=0, before=2, after=6), sample(32, tiles=0, before=2, after=25)
    batch = pack([[at], [above], [short, long], [long]])
    logits = np.asarray(apply_of(config)(params_of(loc), batch)["logits"])
    return logits, [len(x[0]) for x in (at, above, short, long)]


@LOCATIONS
def test_scaling_starts_above_max_positions(loc):
    """In a stack, a segment of MAX places is rotated as without scaling, one of MAX + 1 is not."""
    (scaled, lengths), (plain, _) = scores_of(loc, True), scores_of(loc, False)
    at, above, short, long = lengths
    assert (at + extra(loc, 1), above + extra(loc, 1)) == (MAX, MAX + 1)
    assert short < MAX < long and short + long > MAX
    np.testing.assert_allclose(scaled[0, :at], plain[0, :at], atol=1e-6, rtol=0)
    assert np.abs(scaled - plain)[1, 1:above].max(axis=-1).min() > 1e-4


@LOCATIONS
def test_packed_segments_are_scaled_by_their_own_length(loc):
    (scaled, lengths), (plain, _) = scores_of(loc, True), scores_of(loc, False)
    *_, short, long = lengths
    end = short + long
    np.testing.assert_allclose(scaled[2, :short], plain[2, :short], atol=1e-6, rtol=0)
    assert np.abs(scaled - plain)[2, short + 1 : end].max(axis=-1).min() > 1e-4
    np.testing.assert_allclose(scaled[2, short:end], scaled[3, :long], atol=1e-4, rtol=0)


@LOCATIONS
def test_growing_past_max_positions(loc):
    """Prefill and decoding up to the cache's end equal one call on the final sequence."""
    config, params = scaled_config(loc), params_of(loc)
    ids, pixels = sample(33, tiles=2, before=2, after=20)
    prompt, total = 16, len(ids)
    assert prompt < MAX < total
    full, plain = (
        np.asarray(apply_of(c)(params, pack([[(ids, pixels)]]))["logits"])[0]
        for c in (config, CONFIGS[loc])
    )
    assert np.abs(full - plain)[prompt - 1 : total].max(axis=-1).min() > 1e-3

    prefill = compiled(functools.partial(model.prefill, config=config, cache_len=total))
    step = compiled(functools.partial(model.decode_step, config=config))
    start = {"input_ids": ids[None, :prompt], "pixels": pixels[None]}
    scores, cache = prefill(params, start)
    assert cache["decoder"]["k"].shape[2] == total
    assert cache["embedding"]["k"].shape[2] == total + extra(loc, 2)
    np.testing.assert_allclose(scores[0], full[prompt - 1], atol=1e-4, rtol=0)
    for i in range(prompt, total):
        scores, cache = step(params, ids[i : i + 1], cache)
        np.testing.assert_allclose(scores[0], full[i], atol=1e-4, rtol=0)
    assert int(cache["lengths"]["decoder"][0]) == total
    assert int(cache["lengths"]["embedding"][0]) == total + extra(loc, 2)


@pytest.mark.parametrize(("over", "same"), [(0, True), (1, False)])
def test_prefill_is_scaled_by_the_cache(over, same):
    """The same short prompt, in a cache of MAX slots and of one more."""
    ids, pixels = sample(30, tiles=1, before=2, after=2)
    plain = apply_of(CONFIGS["post"])(params_of("post"), pack([[(ids, pixels)]]))["logits"]
    cache_len = MAX + over - extra("post", 1)
    prefill = functools.partial(model.prefill, config=scaled_config("post"), cache_len=cache_len)
    batch = {"input_ids": ids[None], "pixels": pixels[None]}
    scores, _ = compiled(prefill)(params_of("post"), batch)
    error = np.abs(np.asarray(scores[0] - plain[0, len(ids) - 1])).max()
    assert error < 1e-4 if same else error > 1e-3


# Structure


def test_flax_stays_in_its_files():
    """Modules are an implementation detail; everything else sees functions of nested dicts."""
    root = pathlib.Path(hovle_jax.__file__).parent
    pattern = re.compile(r"^\s*(import|from)\s+flax\b.*(linen|nn)|flax\.linen", re.MULTILINE)
    files = {str(path.relative_to(root)): path.read_text() for path in root.rglob("*.py")}
    users = {name for name, text in files.items() if pattern.search(text)}
    assert all(name == "model.py" or name.startswith("nn/") for name in users), users
    assert {"model.py", "nn/layers.py"} <= users
