"""Masks over images and position schemes: who sees whom, packed and unpacked, cached and not.

Tiles have 4 tokens (16 places in the long stream of a 'post' model).
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax import model
from hovle_jax.checkpoint import save_model
from hovle_jax.config import InitConfig, MeshConfig, RunConfig
from hovle_jax.errors import UserError
from hovle_jax.generation.engine import Engine, Request
from hovle_jax.initialize import initial_params
from hovle_jax.nn.images import Tokens
from hovle_jax.nn.layers import rope_tables
from hovle_jax.nn.masks import MASKS, reach
from hovle_jax.nn.positions import POSITIONS, indices, per_frequency
from hovle_jax.sharding import make_mesh
from hovle_jax.stages import STAGES
from tests import small

pytestmark = pytest.mark.usefixtures("quick_compilation")
END, START, CLOSE, IMAGE = 86, 88, 89, 90
STACK = dataclasses.replace(
    small.LAYERS, num_layers=1, rope_theta=100.0, initializer_range=0.3, max_positions=64
)
LOCATIONS = pytest.mark.parametrize("loc", ["pre", "post"])
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def config_of(loc: str, embedding: dict[str, str], decoder: dict[str, str] | None = None):
    return dataclasses.replace(
        small.PRE,
        embedding=dataclasses.replace(STACK, **embedding),
        decoder=dataclasses.replace(STACK, **(decoder or {})),
        shuffle_loc=loc,
        initializer_range=0.3,
    )


# A mask and a scheme in each stack, and different ones.
MIXED = (
    {"mask": "bidirectional", "positions": "3d"},
    {"mask": "prefix", "positions": "2d"},
)


@functools.cache
def params_of():
    return jax.jit(functools.partial(model.init, config=config_of("pre", {})))(jax.random.key(1))


def tokens_of(ids, segments=None, tile: int = 4) -> Tokens:
    ids = jnp.asarray(ids, jnp.int32)
    segments = jnp.ones_like(ids) if segments is None else jnp.asarray(segments, jnp.int32)
    row = np.asarray(segments)
    begins = np.array([[np.flatnonzero(r == s)[0] for s in r] for r in row])
    return Tokens(ids, segments, jnp.arange(ids.shape[1]) - begins, IMAGE, tile, END)


# Masks


def bidirectional(ids, i, j):
    return all(ids[k] == IMAGE for k in range(i, j + 1))


def prefix(ids, i, j):
    turn = ids[i : next((k for k in range(i, len(ids)) if ids[k] == END), len(ids))]
    return IMAGE in turn[j - i :]


@pytest.mark.parametrize("sees", [bidirectional, prefix])
def test_masks_are_what_they_are_said_to_be(sees):
    """Against pairs of tokens one by one, over random rows of segments, turns and images."""
    rng = np.random.default_rng(0)
    ids = rng.choice([5, END, IMAGE], p=[0.3, 0.1, 0.6], size=(8, 60)).astype(np.int32)
    segments = np.cumsum(rng.random((8, 60)) < 0.1, axis=1) + 1
    last = np.asarray(reach(sees.__name__, tokens_of(ids, segments)))
    later = 0
    for row in range(8):
        for i in range(60):
            of = segments[row] == segments[row, i]
            own = np.where(of, ids[row], -1)  # nothing of another segment
            own = own[: np.flatnonzero(of)[-1] + 1]
            for j in range(i + 1, len(own)):
                expected = sees(own, i, j)
                later += expected
                assert (last[row, i] >= j) == expected, (row, i, j)
        assert np.all(last[row] >= np.arange(60))
    assert later > 100


def test_what_a_mask_of_ones_own_gives(monkeypatch):
    """A bool or a bit per pair is no place; places are kept between the token itself and the last
    image of its segment."""
    tokens = tokens_of([[5, IMAGE, 6, IMAGE, 7, 8, IMAGE, 9]], [[1, 1, 1, 1, 1, 2, 2, 2]])
    own = {
        "bool": lambda t: t.is_image,
        "pairs": lambda t: jnp.zeros((1, 8, 8), jnp.int32),
        "all": lambda t: jnp.full(t.ids.shape, 99),
        "none": lambda t: jnp.full(t.ids.shape, -1),
    }
    for name, mask in own.items():
        monkeypatch.setitem(MASKS, name, mask)
    for name, found in (("bool", r"bool \[1, 8\]"), ("pairs", r"int32 \[1, 8, 8\]")):
        with pytest.raises(UserError, match=rf"mask '{name}': gives {found}; it must be .* \[1, 8"):
            reach(name, tokens)
    assert reach("all", tokens).tolist() == [[3, 3, 3, 3, 4, 6, 6, 7]]
    assert reach("none", tokens).tolist() == [[*range(8)]]


@LOCATIONS
@pytest.mark.parametrize("stack", ["embedding", "decoder"])
@pytest.mark.parametrize("mask", ["causal", "bidirectional", "prefix"])  # plug-ins may be there
def test_who_sees_a_later_pixel(mask, stack, loc):
    """Text, two tiles, text, one tile, text, and the same again in a segment of its own: the last
    patch of the second tile changes."""
    if stack == "decoder" and loc == "post":
        pytest.skip("the LLM reads the same stream in both")
    image = [START, *[IMAGE] * 8, CLOSE]
    one = [1, 5, END, 6, 7, *image, 8, START, *[IMAGE] * 4, CLOSE, 9, END, 10]
    turn, first, last = 3, 6, 13  # first and last token of the image
    ids = np.array([one + one], np.int32)
    batch = {
        "input_ids": ids,
        "segment_ids": np.repeat([[1, 2]], len(one), axis=1),
        "position_ids": np.tile(np.arange(len(one)), 2)[None],
    }
    pixels = np.random.default_rng(0).integers(0, 256, (1, 6, 28, 28, 3)).astype(np.uint8)
    changed = pixels.copy()
    changed[0, 1, 21:, 21:] = 255 - changed[0, 1, 21:, 21:]
    if stack == "embedding":
        run = functools.partial(model.embed, config=config_of(loc, {"mask": mask}))
        run = compiled(run)
        difference = run(params_of(), batch | {"pixels": pixels})
        difference -= run(params_of(), batch | {"pixels": changed})
    else:
        config = config_of(loc, {}, {"mask": mask})
        run = compiled(functools.partial(model.language_hidden, config=config))
        features = np.random.default_rng(0).normal(size=(1, 24, 32)).astype(np.float32)
        other = features.copy()
        other[0, 7] += 1  # of the second tile's last token
        difference = run(params_of(), batch, features=features)
        difference -= run(params_of(), batch, features=other)
    seen = np.abs(np.asarray(difference)[0]).max(axis=-1) > 1e-5
    expected = {"causal": last, "bidirectional": first, "prefix": turn}[mask]
    assert not seen[:expected].any() and not seen[len(one) :].any()
    assert seen[expected : len(one)].all()


@LOCATIONS
def test_text_never_sees_the_future(loc):
    """A later word changes nothing before it, but in the prefix of its turn's image."""
    run = compiled(functools.partial(model.hidden, config=config_of(loc, *MIXED)))
    ids = np.array([[1, 5, 6, START, *[IMAGE] * 4, CLOSE, 7, 8, 9, END, 10, 11]], np.int32)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 1, 28, 28, 3)).astype(np.uint8)
    base = np.asarray(run(params_of(), {"input_ids": ids, "pixels": pixels}))
    for place in range(8, ids.shape[1]):  # from the token after the image on
        changed = ids.copy()
        changed[0, place] = 20
        found = np.asarray(run(params_of(), {"input_ids": changed, "pixels": pixels}))
        seen = np.abs(found - base)[0].max(axis=-1) > 1e-5
        assert not seen[:place].any() and seen[place:].all()


def test_the_kernels_see_what_xla_sees():
    """The masks of both stacks reach the layers on TPU, too: gradients through the interpreted
    kernels, layers recomputed, in a packed row."""
    ids = np.array([[1, 5, START, *[IMAGE] * 8, CLOSE, 6, END, 7, START, *[IMAGE] * 4, CLOSE, 9]])
    batch = {
        "input_ids": ids.astype(np.int32),
        "segment_ids": np.repeat([[1, 2]], [14, 8], axis=1),
        "position_ids": np.concatenate([np.arange(14), np.arange(8)])[None],
    }
    pixels = np.random.default_rng(0).normal(size=(1, 3, 28, 28, 3)).astype(np.float32)
    params = params_of()

    def run(attention: str):
        config = dataclasses.replace(config_of("post", *MIXED), attention=attention, remat="full")

        def total(pixels):
            hidden = model.hidden(params, batch | {"pixels": pixels}, config)
            return jnp.sum(hidden * jnp.sin(jnp.arange(hidden.size).reshape(hidden.shape)))

        return compiled(jax.value_and_grad(total))(pixels)

    for found, expected in zip(
        jax.tree.leaves(run("splash_interpret")), jax.tree.leaves(run("xla")), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


# Positions


def coordinates(name: str, tokens: Tokens) -> np.ndarray:
    """[axes, L] of the first row."""
    scheme = POSITIONS.find(name)
    index, _ = indices(scheme, tokens)
    return np.stack([np.asarray(x)[0] for x in scheme.coordinates(index, tokens)])


def test_coordinates():
    ids = [[1, 5, START, *[IMAGE] * 8, CLOSE, 6, 7, START, *[IMAGE] * 4, CLOSE]]
    segments = [[1] * 14 + [2] * 6]
    tokens = tokens_of(ids, segments)
    # Both tiles are 2 x 2: the index moves by 2 over each.
    index = [0, 1, 2, 3, 3, 3, 3, 5, 5, 5, 5, 7, 8, 9] + [0, 1, 1, 1, 1, 3]
    row = [0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0] + [0, 0, 0, 1, 1, 0]
    column = [0, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0, 0, 0] + [0, 0, 1, 0, 1, 0]
    index, row, column = map(np.array, (index, row, column))
    np.testing.assert_array_equal(coordinates("3d", tokens), [index, index + row, index + column])
    np.testing.assert_array_equal(coordinates("2d", tokens), [index + row, index + column])
    following = np.asarray(indices(POSITIONS["3d"], tokens)[1])[0]
    np.testing.assert_array_equal(following[[2, 9, 10, 13]], [3, 5, 7, 10])


@pytest.mark.parametrize("name", ["2d", "3d"])
def test_text_turns_as_in_one_dimension(name):
    tokens, scheme = tokens_of([[1, 5, 6, 7, 8, 9]]), POSITIONS[name]
    positions = per_frequency(scheme, indices(scheme, tokens)[0], tokens, 4)
    for found, expected in zip(
        rope_tables(positions, STACK), rope_tables(jnp.arange(6)[None], STACK), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_every_axis_has_slow_and_fast_frequencies():
    ids = [[IMAGE] * 4]
    tokens, scheme = tokens_of(ids), POSITIONS["3d"]
    found = np.asarray(per_frequency(scheme, indices(scheme, tokens)[0], tokens, 8))[0]
    np.testing.assert_array_equal(found[1], [0, 0, 1, 0, 0, 1, 0, 0])  # row 0, column 1
    np.testing.assert_array_equal(found[2], [0, 1, 0, 0, 1, 0, 0, 1])


def test_a_tile_that_is_no_square():
    with pytest.raises(UserError, match="6 tokens of a tile are no square"):
        coordinates("2d", tokens_of([[IMAGE] * 6], tile=6))


def test_the_next_stage_keeps_the_mask(tmp_path):
    """Nothing in the parameters would tell that a stage was trained with another one."""
    stack = {"mask": "bidirectional", "positions": "2d"}
    save_model(tmp_path / "stage1", config_of("pre", stack), params_of())
    for scratch in (False, True):
        init = InitConfig(previous=str(tmp_path / "stage1"), scratch=scratch)
        for changed, message in (
            ({}, None),
            ({"mask": "causal"}, "config.model.embedding.mask is 'causal', but"),
            ({"positions": "1d"}, "config.model.embedding.positions is '1d', but"),
        ):
            config = RunConfig(stage="align", init=init, model=config_of("pre", stack | changed))
            allowed = scratch or message is None
            expected = (
                contextlib.nullcontext() if allowed else pytest.raises(UserError, match=message)
            )
            with expected:
                initial_params(config, STAGES["align"], make_mesh(MeshConfig(), jax.devices()[:1]))


# Both, cached (packed, sharded and exported: test_combinations.py)


def sample(seed: int, tiles: tuple[int, ...], after: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """(ids, pixels): a turn with images of so many tiles and text between, a turn of text."""
    rng = np.random.default_rng(seed)
    ids = [1, 5, END]
    for n in tiles:
        ids += [*rng.integers(3, 80, 2), START, *[IMAGE] * (4 * n), CLOSE]
    ids += [7, END, *rng.integers(3, 80, after)]
    pixels = rng.integers(0, 256, (sum(tiles), 28, 28, 3)).astype(np.uint8)
    return np.array(ids, np.int32), pixels


def test_cached_equals_uncached():
    """Two prompts of different lengths, up to their last image and further; the rest in one call
    and token by token."""
    config = config_of("post", *MIXED)
    apply, prefill, step, extend = (
        compiled(functools.partial(f, config=config, **kw))
        for f, kw in (
            (model.apply, {}),
            (model.prefill, {"cache_len": 48}),
            (model.decode_step, {}),
            (model.extend, {}),
        )
    )
    samples = [sample(3, (2, 1), after=12), sample(4, (1,), after=12)]
    length = max(len(ids) for ids, _ in samples)
    batch = {
        "input_ids": np.stack([np.pad(ids, (0, length - len(ids))) for ids, _ in samples]),
        "segment_ids": np.stack([(np.arange(length) < len(ids)) * 1 for ids, _ in samples]),
        "pixels": np.stack([np.pad(p, ((0, 3 - len(p)), *[(0, 0)] * 3)) for _, p in samples]),
    }
    full = np.asarray(apply(params_of(), batch)["logits"])
    images = [int(np.flatnonzero(ids == IMAGE)[-1]) + 1 for ids, _ in samples]
    for starts in (images, [n + 4 for n in images]):
        part = batch | {"segment_ids": (np.arange(length) < np.array(starts)[:, None]) * 1}
        scores, cache = prefill(params_of(), part)
        for row, start in enumerate(starts):
            np.testing.assert_allclose(scores[row], full[row, start - 1], atol=1e-4, rtol=0)
        rest = np.stack([ids[n : n + 4] for (ids, _), n in zip(samples, starts, strict=True)])
        counts = np.array([4, 3])
        scores, cache = extend(params_of(), rest, counts, cache)
        places = np.array(starts) + counts
        for _ in range(3):
            for row, place in enumerate(places):
                np.testing.assert_allclose(scores[row], full[row, place - 1], atol=1e-4, rtol=0)
            next_ids = np.array([samples[row][0][place] for row, place in enumerate(places)])
            scores, cache = step(params_of(), next_ids, cache)
            places += 1


def test_a_prompt_read_before_gives_the_same_answer():
    """With and without reuse of what was computed up to the last image, and without any cache."""
    config, params = config_of("post", *MIXED), params_of()
    ids, pixels = sample(5, (2, 1))
    other = np.concatenate([ids[:-3], [44, 45]]).astype(np.int32)
    settings = {"slots": 1, "capacity": 64, "tiles": 3, "chunk": 4, "floor": (64, 3)}
    answers = []
    for size in (0, 1 << 20):
        engine = Engine(params, config, prefix_bytes=size, **settings)
        for prompt in (ids, other):
            engine.submit(Request(prompt, pixels, 5))
            tokens = []
            while engine.waiting or engine.running:
                for progress in engine.step():
                    tokens += progress.tokens
            answers.append(tokens)
        assert engine.prefixes.hits == (size > 0)
    assert answers[:2] == answers[2:] and answers[0] != answers[1]
    apply = compiled(functools.partial(model.apply, config=config))
    line = np.pad(ids, (0, 64 - len(ids)))
    for n, token in enumerate(answers[0], len(ids)):
        batch = {"input_ids": line[None], "segment_ids": (np.arange(64) < n)[None] * 1}
        scores = np.asarray(apply(params, batch | {"pixels": pixels[None]})["logits"])[0, n - 1]
        assert int(scores.argmax()) == token
        line[n] = token


@pytest.mark.parametrize(
    "stack, message",
    [
        ({"mask": "bidirectonal"}, "did you mean 'bidirectional'"),
        ({"positions": "4d"}, "positions of model.embedding or model.decoder: '4d' is not one of"),
        ({"mask": "prefix", "layer_types": ("linear_attention",)}, "can see later tokens"),
        *(
            (
                {key: value, "layer_types": ("linear_attention",)},
                f"model.embedding.{key}={value!r}: no layer of layer_types .* has a use for it",
            )
            for key, value in (
                *(("positions", "2d"), ("qk_norm", True), ("qkv_bias", True), ("out_bias", True)),
            )
        ),
    ],
)
def test_stacks_that_cannot_be(stack, message):
    with pytest.raises(UserError, match=message):
        model.abstract_params(config_of("pre", stack))
