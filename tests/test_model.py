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
from hovle_jax.config import IGNORE, IMAGE_MEAN, IMAGE_STD, LayersConfig, ModelConfig, RunConfig
from hovle_jax.errors import UserError
from hovle_jax.generate import generate
from hovle_jax.layers import REMAT_POLICIES, Layer, LayerInputs, layer_stack, rope_tables

LAYERS = LayersConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=512,
    initializer_range=0.3,
)
PRE = ModelConfig(
    name="small",
    vocab_size=97,
    embedding=LAYERS,
    decoder=LAYERS,
    image_size=28,
    patch_size=7,
    initializer_range=0.3,
    im_end_id=86,
    img_start_id=88,
    img_end_id=89,
    img_context_id=90,
    dtype="float32",
    remat="none",
    loss_chunk=16,
)
CONFIGS = {"pre": PRE, "post": dataclasses.replace(PRE, shuffle_loc="post")}
LOCATIONS = pytest.mark.parametrize("loc", CONFIGS)
LENGTH, TILES = 40, 4


@functools.cache
def params_of(loc: str):
    return jax.jit(functools.partial(model.init, config=CONFIGS[loc]))(jax.random.key(3))


@functools.cache
def apply_of(config: ModelConfig):
    return jax.jit(functools.partial(model.apply, config=config))


def sample(seed: int, tiles: int, before: int = 4, after: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """(ids, pixels [tiles, 28, 28, 3]): text, one image of so many tiles, text."""
    rng = np.random.default_rng(seed)
    image = [88, *[90] * (4 * tiles), 89] if tiles else []
    ids = [1, *rng.integers(3, 80, before), *image, *rng.integers(3, 80, after)]
    return np.array(ids, np.int32), rng.integers(0, 256, (tiles, 28, 28, 3)).astype(np.uint8)


def pack(rows: list[list[tuple[np.ndarray, np.ndarray]]], unused: int = 0) -> dict[str, np.ndarray]:
    """Rows of samples -> a batch; tiles that no token stands for hold the value `unused`."""
    b = len(rows)
    ids, segments, positions = (np.zeros((b, LENGTH), np.int32) for _ in range(3))
    pixels = np.full((b, TILES, 28, 28, 3), unused, np.uint8)
    for r, samples in enumerate(rows):
        start = tile = 0
        for s, (tokens, images) in enumerate(samples):
            where = slice(start, start + len(tokens))
            ids[r, where], segments[r, where] = tokens, s + 1
            positions[r, where] = np.arange(len(tokens))
            pixels[r, tile : tile + len(images)] = images
            start, tile = where.stop, tile + len(images)
    predicted = (segments > 0) & (ids < 88) & (ids > 1)
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
    total, weight = stages.STAGES["instruct"].terms(params, {}, batch, run)["next_token"]
    return total / weight


@functools.cache
def loss_and_grad_of(config: ModelConfig):
    return jax.jit(jax.value_and_grad(functools.partial(next_token_loss, config=config)))


@functools.cache
def token_losses_of(config: ModelConfig):
    """(params, batch) -> (nll [B, S], weights [B, S])."""

    def run(params, batch):
        names = ("labels", "loss_weight", "segment_ids")
        targets, weights = losses.next_token_weights(*(batch[n] for n in names))
        hidden = model.hidden(params, batch, config)
        head = model.head_kernel(params, config)
        return losses.token_nll(hidden, head, targets, config.loss_chunk), weights

    return jax.jit(run)


# Packing


@LOCATIONS
def test_packed_row_equals_its_samples(loc):
    batch = pack([[A, B], [B, A], [A], [B]], unused=77)
    nll, weights = map(np.asarray, token_losses_of(CONFIGS[loc])(params_of(loc), batch))
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
PROMPTS = [sample(20, 0), sample(21, 1), sample(23, 2, before=7, after=3)]


@functools.cache
def uncached(loc: str) -> list[list[int]]:
    """Greedy tokens of PROMPTS, the whole sequence again for every one of them."""
    batch = pack([[p] for p in PROMPTS])
    lengths = np.array([len(p[0]) for p in PROMPTS])
    assert lengths.max() + NEW <= LENGTH
    rows = np.arange(len(PROMPTS))
    out = []
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
    got = generate(params_of(loc), CONFIGS[loc], prompts, tiles, max_new=NEW, stop_ids=())
    assert got == uncached(loc)


@LOCATIONS
@pytest.mark.parametrize("row", [0, 1], ids=["text", "image"])
def test_one_prompt_equals_its_row_of_a_batch(loc, row):
    ids, tiles = PROMPTS[row]
    got = generate(params_of(loc), CONFIGS[loc], [ids], [tiles], max_new=NEW, stop_ids=())
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
        generate({}, PRE, [good[0], ids], [good[1], pixels], max_new=1)


# Pixels


@LOCATIONS
def test_pixels_matter(loc):
    config, params = CONFIGS[loc], params_of(loc)
    # Row 0 uses three of four tiles, row 1 one, row 2 none.
    batch = pack([[A, B], [B], [sample(5, 0)]], unused=128)
    used = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    normal = (batch["pixels"] / 255.0 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    floats = normal.astype(np.float32)

    @jax.jit
    def run(pixels):
        return next_token_loss(params, batch | {"pixels": pixels}, config)

    loss, grads = jax.jit(jax.value_and_grad(run))(floats)
    # uint8 tiles are normalised on the device, floats are taken as they are.
    assert float(run(batch["pixels"])) == pytest.approx(float(loss), abs=1e-6)
    size = np.abs(np.asarray(grads))
    assert np.all(size[~used] == 0)
    patches = size[used].reshape(-1, 4, 7, 4, 7, 3).max(axis=(2, 4, 5))
    assert patches.shape == (4, 4, 4)
    assert patches.min() > 1e-7  # every patch of every used tile is seen
    for row, tile in np.argwhere(used):
        changed = floats.copy()
        changed[row, tile] = 0
        assert abs(float(run(changed)) - float(loss)) > 1e-4
    changed = np.where(used[..., None, None, None], floats, 3.0).astype(np.float32)
    assert float(run(changed)) == float(loss)


def test_text_needs_no_pixels():
    """A text row gives the same scores with unused tiles as without any."""
    batch = pack([[sample(5, 0), sample(6, 0)]], unused=50)
    without = {k: v for k, v in batch.items() if k != "pixels"}
    for loc, config in CONFIGS.items():
        with_tiles = apply_of(config)(params_of(loc), batch)["logits"]
        alone = apply_of(config)(params_of(loc), without)["logits"]
        valid = batch["segment_ids"] > 0
        np.testing.assert_allclose(with_tiles[valid], alone[valid], atol=1e-5, rtol=0)


# How it is computed


def relative(actual, expected) -> float:
    """Largest difference of any leaf, relative to that leaf's largest entry."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


@pytest.mark.parametrize("remat", [k for k in REMAT_POLICIES if k != "none"])
def test_remat_changes_nothing(remat):
    batch, params = pack([[A, B]]), params_of("post")
    loss, grads = loss_and_grad_of(CONFIGS["post"])(params, batch)
    config = dataclasses.replace(CONFIGS["post"], remat=remat)
    again, grads_again = loss_and_grad_of(config)(params, batch)
    assert float(again) == pytest.approx(float(loss), abs=1e-6)
    assert relative(grads_again, grads) < 2e-6


def test_remat_recomputes():
    """The policies differ in what they compute twice."""
    batch, params = pack([[A, B]]), model.abstract_params(PRE)

    def products(remat: str) -> int:
        config = dataclasses.replace(PRE, remat=remat)
        loss = functools.partial(next_token_loss, config=config)
        jaxpr = jax.make_jaxpr(jax.grad(loss))(params, batch)
        return sum(eqn.primitive.name == "dot_general" for eqn in equations(jaxpr.jaxpr))

    count = {remat: products(remat) for remat in REMAT_POLICIES}
    assert count["full"] > count["attention"] > count["projections"] > count["none"]
    assert count["full"] > count["dots"] > count["none"]


def test_unknown_remat():
    with pytest.raises(UserError, match="model.remat: 'some'"):
        layer_stack(LAYERS, "xla", "some")


def test_scan_equals_a_loop():
    """A stack is its layers one after the other, in value and in gradient."""
    params = params_of("pre")["decoder"]["layers"]
    x = jax.random.normal(jax.random.key(0), (2, 12, 32))
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((12, 12), bool)), (2, 12, 12))
    inputs = LayerInputs(*rope_tables(positions, LAYERS), mask)

    def scanned(params, x):
        return layer_stack(LAYERS, "xla", "none").apply({"params": params}, x, inputs, None)[0]

    def looped(params, x):
        for i in range(LAYERS.num_layers):
            layer = jax.tree.map(lambda p, i=i: p[i], params)
            x, _ = Layer(LAYERS, "xla", False, False).apply({"params": layer}, x, inputs, None)
        return x

    def both(fn):
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(fn(p, x))), (0, 1)))

    value, grads = both(scanned)(params, x)
    expected, expected_grads = both(looped)(params, x)
    assert float(value) == pytest.approx(float(expected), abs=1e-5)
    assert relative(grads, expected_grads) < 1e-5
    first, second = (jax.tree.map(lambda p, i=i: p[i], params) for i in range(2))
    swapped = jax.tree.map(lambda a, b: jnp.stack([b, a]), first, second)
    assert abs(float(both(looped)(swapped, x)[0]) - float(expected)) > 1e-3


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


@pytest.mark.parametrize("chunk", [1, 4, 5, 7, 11, 12, 512])
def test_chunked_loss(chunk):
    hidden, head, targets, weights = nll_inputs()

    def summed(nll):
        return jax.jit(jax.value_and_grad(lambda h, w: jnp.sum(nll(h, w) * weights), (0, 1)))

    chunked = functools.partial(losses.token_nll, targets=targets, chunk=chunk)
    plain = functools.partial(plain_nll, targets=targets)
    nll = np.asarray(chunked(hidden, head))
    np.testing.assert_allclose(nll, plain(hidden, head), atol=2e-6, rtol=1e-6)
    assert nll[0, 3] == nll[1, 11] == 0 and nll.shape == (NLL_B, NLL_S)
    value, grads = summed(chunked)(hidden, head)
    expected, expected_grads = summed(plain)(hidden, head)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert relative(grads, expected_grads) < 1e-5
    assert np.all(np.asarray(grads[0])[targets == IGNORE] == 0)


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
        return jnp.sum(losses.token_nll(hidden, head, targets, chunk))

    for fn in (total, jax.grad(total, argnums=(0, 1))):
        small = vocabulary_places(functools.partial(fn, chunk=chunk), NLL_V, hidden, head)
        assert small == NLL_B * chunk
        whole = vocabulary_places(functools.partial(fn, chunk=NLL_S), NLL_V, hidden, head)
        assert whole == NLL_B * NLL_S  # so the count does see such arrays


@LOCATIONS
def test_all_scores_never_exist_in_a_training_step(loc):
    batch, params = pack([[A, B], [B, A]]), model.abstract_params(CONFIGS[loc])
    places = {}
    for chunk in (8, 16, LENGTH):
        config = dataclasses.replace(CONFIGS[loc], loss_chunk=chunk)
        fn = jax.value_and_grad(functools.partial(next_token_loss, config=config))
        places[chunk] = vocabulary_places(fn, config.vocab_size, params, batch)
    # The head and the table themselves are 32 wide.
    assert places == {8: 32, 16: 32, LENGTH: 2 * LENGTH}


# bfloat16


@LOCATIONS
def test_bfloat16(loc):
    batch, params = pack([[A, B]]), params_of(loc)
    config = dataclasses.replace(CONFIGS[loc], dtype="bfloat16")
    exact = apply_of(CONFIGS[loc])(params, batch)
    out = apply_of(config)(params, batch)
    assert out["hidden"].dtype == out["embeddings"].dtype == jnp.bfloat16
    assert out["logits"].dtype == exact["hidden"].dtype == jnp.float32
    valid = batch["segment_ids"] > 0
    difference = np.asarray(out["logits"] - exact["logits"])[valid]
    scale = float(jnp.std(exact["logits"][valid]))
    assert 1e-4 * scale < np.sqrt(np.mean(difference**2)) < 0.03 * scale
    loss, grads = loss_and_grad_of(config)(params, batch)
    exact_loss, exact_grads = loss_and_grad_of(CONFIGS[loc])(params, batch)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(float(exact_loss), rel=0.01)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    a, b = (np.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (grads, exact_grads))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.995


# Dynamic NTK scaling
#
# The rule (model.py): a sequence longer than max_positions is rotated with a base for its length; a
# growing one is rotated once, for the length it may reach (`cache_len`), because a cache keeps
# rotated keys. In a packed row the length is the segment's, not the row's.

MAX = 24


def with_rope(config: ModelConfig, scaling: str, max_positions: int = MAX) -> ModelConfig:
    stack = dataclasses.replace(
        LAYERS, rope_scaling=scaling, rope_factor=2.0, max_positions=max_positions, rope_theta=100.0
    )
    return dataclasses.replace(config, embedding=stack, decoder=stack)


def unpacked(ids: np.ndarray, pixels: np.ndarray) -> dict[str, np.ndarray]:
    return {"input_ids": ids[None], "pixels": pixels[None]}


@LOCATIONS
def test_growing_past_max_positions(loc):
    """Prefill and decoding up to the cache's end equal one call on the final sequence."""
    config, params = with_rope(CONFIGS[loc], "dynamic"), params_of(loc)
    ids, pixels = sample(30, tiles=2, before=2, after=20)
    prompt, total = 18, len(ids)
    assert prompt < MAX < total
    full = np.asarray(apply_of(config)(params, unpacked(ids, pixels))["logits"])[0]
    plain = with_rope(CONFIGS[loc], "none")
    unscaled = np.asarray(apply_of(plain)(params, unpacked(ids, pixels))["logits"])[0]
    assert np.abs(full - unscaled)[prompt - 1 :].max(axis=-1).min() > 1e-3

    prefill = jax.jit(functools.partial(model.prefill, config=config, cache_len=total))
    step = jax.jit(functools.partial(model.decode_step, config=config))
    scores, cache = prefill(params, unpacked(ids[:prompt], pixels))
    assert cache["decoder"]["k"].shape[2] == total
    assert cache["embedding"]["k"].shape[2] == total + (24 if loc == "post" else 0)
    np.testing.assert_allclose(scores[0], full[prompt - 1], atol=1e-4, rtol=0)
    for i in range(prompt, total):
        scores, cache = step(params, ids[i : i + 1], cache)
        np.testing.assert_allclose(scores[0], full[i], atol=1e-4, rtol=0)
    assert int(cache["lengths"]["decoder"][0]) == total


@LOCATIONS
def test_no_scaling_up_to_max_positions(loc):
    """At and below max_positions the tables are the plain ones, bit for bit."""
    params = params_of(loc)
    ids, pixels = sample(30, tiles=1, before=2, after=4)
    batch = unpacked(ids, pixels)
    longest = len(ids) + (12 if loc == "post" else 0)  # in the embedding module
    plain = np.asarray(apply_of(with_rope(CONFIGS[loc], "none"))(params, batch)["logits"])
    for limit, same in ((longest, True), (longest - 1, False)):
        config = with_rope(CONFIGS[loc], "dynamic", limit)
        scores = np.asarray(apply_of(config)(params, batch)["logits"])
        assert np.array_equal(scores, plain) == same
    # The same at prefill, where the length that counts is the cache's.
    config = with_rope(CONFIGS[loc], "dynamic", longest + 2)
    for grow, same in ((2, True), (3, False)):
        prefill = jax.jit(functools.partial(model.prefill, config=config))
        prefill = functools.partial(model.prefill, config=config, cache_len=len(ids) + grow)
        scores, _ = jax.jit(prefill)(params, batch)
        assert np.allclose(scores[0], plain[0, -1], atol=1e-5, rtol=0) == same


@LOCATIONS
def test_packed_segments_are_scaled_by_their_own_length(loc):
    """A row longer than max_positions, of samples that are not (but for the long one)."""
    config, params = with_rope(CONFIGS[loc], "dynamic", 20), params_of(loc)
    plain = with_rope(CONFIGS[loc], "none")
    short, long = sample(31, tiles=0, before=2, after=9), sample(32, tiles=0, before=2, after=23)
    batch = pack([[short, long]])
    n, end = len(short[0]), len(short[0]) + len(long[0])
    assert n < 20 < end - n
    scaled = np.asarray(apply_of(config)(params, batch)["logits"])[0]
    unscaled = np.asarray(apply_of(plain)(params, batch)["logits"])[0]
    np.testing.assert_allclose(scaled[:n], unscaled[:n], atol=1e-6, rtol=0)
    assert np.abs(scaled - unscaled)[n + 2 : end].max(axis=-1).min() > 1e-4
    alone = np.asarray(apply_of(config)(params, pack([[long]]))["logits"])[0]
    np.testing.assert_allclose(scaled[n:end], alone[: end - n], atol=1e-5, rtol=0)


# Structure


def test_flax_stays_in_its_files():
    """Modules are an implementation detail; everything else sees functions of nested dicts."""
    root = pathlib.Path(hovle_jax.__file__).parent
    pattern = re.compile(r"^\s*(import|from)\s+flax\b.*(linen|nn)|flax\.linen", re.MULTILINE)
    users = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if pattern.search(path.read_text())
    }
    assert users == {"layers.py", "embedding.py", "decoder.py", "model.py", "teacher.py"}
