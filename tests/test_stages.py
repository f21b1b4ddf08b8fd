"""Distillation terms, their targets and masks, and which parameters each stage has and trains."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax import distill, losses, model, stages, train_step
from hovle_jax.config import IGNORE, ModelConfig, RunConfig, TeacherConfig
from hovle_jax.errors import UserError
from hovle_jax.nn import teacher
from hovle_jax.tree import flatten, split, unflatten
from tests.small import PRE

MODELS = {"pre": PRE, "post": dataclasses.replace(PRE, shuffle_loc="post")}
LOCATIONS = pytest.mark.parametrize("loc", MODELS)
TEACHER = TeacherConfig(
    num_layers=2,
    hidden_size=24,
    num_heads=3,
    intermediate_size=40,
    image_size=28,
    patch_size=7,
    out_size=32,
    dtype="float32",
)
DISTILL = stages.STAGES["distill"]
# Compiling is most of these tests' time and speed of execution none of it.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def run_config(stage: str, loc: str = "pre", **changes) -> RunConfig:
    return RunConfig(stage=stage, model=MODELS[loc], teacher=TEACHER, **changes)


def random_params(shapes, seed: int):
    rng, flat = np.random.default_rng(seed), {}
    for path, x in sorted(flatten(shapes).items()):
        noise = rng.standard_normal(x.shape).astype(np.float32)
        flat[path] = jnp.asarray(1 + 0.2 * noise if path.endswith("scale") else 0.25 * noise)
    return unflatten(flat)


@functools.cache
def all_params():
    return random_params(model.abstract_params(PRE), 0)


@functools.cache
def teacher_params():
    return random_params(teacher.abstract_params(TEACHER), 1)


def embedding_only():
    """All that stage I holds: no LLM."""
    return {"embedding": all_params()["embedding"]}


@functools.cache
def make_batch() -> dict[str, np.ndarray]:
    """Two rows: image, text, image | text, image, padding. Three tiles at most; 4 tokens each."""
    rng = np.random.default_rng(2)

    def text(n: int) -> list[int]:
        return rng.integers(3, 80, n).tolist()

    def image(tiles: int) -> list[int]:
        return [88, *[90] * 4 * tiles, 89]

    rows = [
        ([*image(2), *text(7), *image(1)], [1] * 10 + [2] * 7 + [3] * 6),
        ([*text(5), *image(1)], [1] * 5 + [2] * 6),
    ]
    batch = {k: np.zeros((2, 24), np.int32) for k in ("input_ids", "segment_ids", "position_ids")}
    batch["input_ids"][:] = 90  # padding that looks like an image, or like a bracket
    batch["input_ids"][:, -2:] = 89
    for r, (ids, segments) in enumerate(rows):
        batch["input_ids"][r, : len(ids)] = ids
        batch["segment_ids"][r, : len(ids)] = segments
        firsts = [segments.index(s) for s in segments]
        batch["position_ids"][r, : len(ids)] = np.arange(len(ids)) - firsts
    batch["pixels"] = rng.integers(0, 256, (2, 3, 28, 28, 3)).astype(np.uint8)
    is_text = (batch["segment_ids"] > 0) & (batch["input_ids"] < 88)
    batch["labels"] = np.where(is_text, batch["input_ids"], IGNORE)
    batch["loss_weight"] = np.where(is_text, rng.uniform(0.5, 2.0, is_text.shape), 0.0)
    batch["loss_weight"] = batch["loss_weight"].astype(np.float32)
    return batch


# Where the image tokens of `make_batch` are, and which tile of the row they show.
IMAGE_PLACES = {0: [(1, 0), (5, 1), (18, 2)], 1: [(6, 0)]}
TEXT_PLACES = {0: range(10, 17), 1: range(5)}
NUM_IMAGE, NUM_TEXT = 16, 12


@functools.cache
def embed_of(loc: str):
    """(params, batch) -> output of the embedding module."""
    return compiled(functools.partial(model.embed, config=MODELS[loc]))


@functools.cache
def targets_by_place() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(targets [2, 24, 32], {term: mask}) written out place by place."""
    batch = make_batch()
    run_teacher = compiled(functools.partial(teacher.apply, config=TEACHER))
    features = np.asarray(run_teacher(teacher_params(), batch["pixels"])["features"])
    assert features.shape == (2, 3, 4, 32)
    table = np.asarray(all_params()["embedding"]["text"]["table"])
    targets = np.ones((2, 24, 32), np.float32)
    masks = {name: np.zeros((2, 24), bool) for name in ("image", "text")}
    for row, tiles in IMAGE_PLACES.items():
        for start, tile in tiles:
            targets[row, start : start + 4] = features[row, tile]
            masks["image"][row, start : start + 4] = True
    for row, places in TEXT_PLACES.items():
        for place in places:
            targets[row, place] = table[batch["input_ids"][row, place]]
            masks["text"][row, place] = True
    return targets, masks


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def totals_of(stage, batch, config):
    return jax.tree.map(jnp.sum, stage.weights(batch, config))


@functools.cache
def distill_of(loc: str):
    """(params, teacher params, batch) -> ((loss, {term: mean}), gradients by both params).

    The gradient is with respect to everything, as if nothing were frozen.
    """
    config = run_config("distill", loc)

    def loss(params, teacher_params, batch):
        totals = totals_of(DISTILL, batch, config)
        loss, parts = train_step.make_loss(config)(params, {}, teacher_params, batch, totals)
        return loss, {name: parts[name] for name in totals}

    return compiled(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


# Stage I


@LOCATIONS
def test_distillation_terms(loc):
    """Each place's target, the masks, the means: against a loop over places."""
    batch = make_batch()
    targets, masks = targets_by_place()
    output = np.asarray(embed_of(loc)(embedding_only(), batch))
    distances = 1 - cosine(output, targets)
    (loss, means), _ = distill_of(loc)(embedding_only(), teacher_params(), batch)
    assert set(means) == {"image", "text"}
    for name, mean in means.items():
        assert masks[name].sum() == {"image": NUM_IMAGE, "text": NUM_TEXT}[name]
        assert float(mean) == pytest.approx(distances[masks[name]].mean(), abs=1e-5)
    assert float(loss) == pytest.approx(float(means["image"] + means["text"]), abs=1e-6)


def test_masks_leave_out_padding_and_brackets():
    found = distill.masks(make_batch(), PRE)
    for name, mask in targets_by_place()[1].items():
        np.testing.assert_array_equal(found[name], mask, name)
    ids, segments = make_batch()["input_ids"], make_batch()["segment_ids"]
    left_out = ~(found["image"] | found["text"])
    assert np.all(left_out == ((segments == 0) | (ids == 88) | (ids == 89)))
    assert not np.any(found["image"] & found["text"])


def test_targets_are_constants():
    """The teacher gets no gradient, nor does the table as a target.

    Differentiated by everything, the terms give the gradient they would give if the targets were
    numbers. (The table is also the module's input; the stage freezes it.)
    """
    batch, config = make_batch(), run_config("distill", "post")
    targets, masks = targets_by_place()

    def constant_targets(params):
        distance = losses.cosine_distance(model.embed(params, batch, config.model), targets)
        return sum(jnp.sum(distance * m) / m.sum() for m in masks.values())

    (loss, _), (grads, teacher_grads) = distill_of("post")(
        embedding_only(), teacher_params(), batch
    )
    expected_loss, expected = compiled(jax.value_and_grad(constant_targets))(embedding_only())
    assert float(loss) == pytest.approx(float(expected_loss), abs=1e-5)
    for path, grad in flatten(teacher_grads).items():
        assert not np.any(np.asarray(grad)), path
    expected = flatten(expected)
    for path, grad in flatten(grads).items():
        scale = np.abs(expected[path]).max()
        assert scale > 1e-6, path
        np.testing.assert_allclose(grad, expected[path], atol=1e-4 * scale, rtol=0, err_msg=path)


def test_table_is_no_parameter_of_stage_one():
    """What the optimizer differentiates has no table, and the frozen one stays as it is."""
    config = run_config("distill")
    trainable, frozen = split(embedding_only(), train_step.trainable_regex(config))
    assert set(flatten(frozen)) == {"embedding/text/table"}
    loss = train_step.make_loss(config)
    totals = totals_of(DISTILL, make_batch(), config)
    args = trainable, frozen, teacher_params(), make_batch(), totals
    shapes, _ = jax.eval_shape(jax.grad(loss, has_aux=True), *args)
    assert set(flatten(shapes)) == set(flatten(trainable))
    assert not any(path.startswith("embedding/text") for path in flatten(shapes))


def test_the_table_is_not_trained_where_it_is_the_target(monkeypatch):
    """In a stage of one's own, too."""
    own = dataclasses.replace(DISTILL, name="own", terms=lambda *args: DISTILL.terms(*args))
    monkeypatch.setitem(stages.STAGES, "own", own)
    for stage in ("distill", "own"):
        with pytest.raises(UserError, match=f"matches embedding/text/.*stage '{stage}' has for"):
            train_step.stage_shapes(run_config(stage, trainable="embedding/.*"))
    image = dataclasses.replace(own, weights=lambda b, c: {"image": DISTILL.weights(b, c)["image"]})
    monkeypatch.setitem(stages.STAGES, "own", image)
    train_step.stage_shapes(run_config("own", trainable="embedding/.*"))


@pytest.mark.parametrize(
    ("distance", "terms", "found"),
    [
        (lambda p, t: jnp.mean((p - t) ** 2), {}, r"'image': .* losses \[\], .* \[2, 24\];"),
        (lambda p, t: (p - t) ** 2, {}, r"'image': .* losses \[2, 24, 32\], .* \[2, 24\];"),
        (losses.cosine_distance, {"more": 0.0}, r"'more': .* losses \[\], .* weights none;"),
    ],
)
def test_every_term_is_a_loss_and_a_weight_of_every_place(distance, terms, found, monkeypatch):
    monkeypatch.setitem(losses.DISTANCES, "cosine", distance)
    own = dataclasses.replace(
        DISTILL,
        terms=lambda *args: DISTILL.terms(*args) | {k: jnp.float32(x) for k, x in terms.items()},
    )
    monkeypatch.setitem(stages.STAGES, "distill", own)
    loss = train_step.make_loss(run_config("distill"))
    with pytest.raises(UserError, match=f"^config.stage 'distill', term {found}"):
        jax.eval_shape(loss, embedding_only(), {}, teacher_params(), make_batch(), {})


def identity_layers(params):
    """The embedding module with layers that add nothing to their input."""
    flat = flatten(params)
    for path in ("attention/o", "mlp/down"):
        path = f"embedding/layers/{path}/kernel"
        flat[path] = jnp.zeros_like(flat[path])
    return flat


@LOCATIONS
def test_terms_vanish_where_output_equals_target(loc):
    """Layers that do nothing give the text table back; a projector fitted to the teacher's features
    gives those."""
    batch = make_batch()
    targets, masks = targets_by_place()
    flat = identity_layers(embedding_only())
    last = "embedding/projector/fc2"
    # What the last linear layer reads: its input is its output when it is the identity.
    flat |= {f"{last}/kernel": jnp.eye(32), f"{last}/bias": jnp.zeros(32)}
    read = np.asarray(embed_of(loc)(unflatten(flat), batch))[masks["image"]]
    features = targets[masks["image"]]
    assert np.linalg.matrix_rank(read) == len(features) == NUM_IMAGE  # so that the fit is exact

    def terms_fitted_to(features):
        kernel = np.linalg.pinv(read.astype(np.float64)) @ features
        fitted = unflatten(flat | {f"{last}/kernel": jnp.asarray(kernel, jnp.float32)})
        (_, terms), _ = distill_of(loc)(fitted, teacher_params(), batch)
        return {name: float(mean) for name, mean in terms.items()}

    right = terms_fitted_to(features)
    assert abs(right["image"]) <= 1e-5 and abs(right["text"]) <= 1e-5
    shifted = terms_fitted_to(np.roll(features, 1, axis=0))  # each gets its neighbour's
    assert shifted["image"] > 1e-3 and abs(shifted["text"]) <= 1e-5


def test_teacher_and_padding_pixels():
    """Terms follow the teacher; a tile without tokens and padding ids are never read."""
    batch = make_batch()
    (_, means), _ = distill_of("pre")(embedding_only(), teacher_params(), batch)
    pixels, ids = batch["pixels"].copy(), batch["input_ids"].copy()
    pixels[1, 1:] = 255 - pixels[1, 1:]
    ids[batch["segment_ids"] == 0] = 7
    unseen = batch | {"pixels": pixels, "input_ids": ids}
    (_, same), _ = distill_of("pre")(embedding_only(), teacher_params(), unseen)
    other = random_params(teacher.abstract_params(TEACHER), 5)
    (_, moved), _ = distill_of("pre")(embedding_only(), other, batch)
    for name, mean in means.items():
        assert float(same[name]) == pytest.approx(float(mean), abs=1e-6)
    assert float(moved["text"]) == pytest.approx(float(means["text"]), abs=1e-6)
    assert abs(float(moved["image"] - means["image"])) > 1e-2


def test_cosine_distance():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 8)).astype(np.float32)
    np.testing.assert_allclose(losses.cosine_distance(a, b), 1 - cosine(a, b), atol=1e-6)
    np.testing.assert_allclose(losses.cosine_distance(a, 3 * a), np.zeros(5), atol=1e-6)
    np.testing.assert_allclose(losses.cosine_distance(a, -a), 2 * np.ones(5), atol=1e-6)
    zero = jax.grad(lambda x: jnp.sum(losses.cosine_distance(x, b)))(jnp.zeros((5, 8)))
    assert np.all(np.isfinite(zero))
    assert losses.cosine_distance(a.astype(jnp.bfloat16), b).dtype == jnp.float32


# All stages


@pytest.mark.parametrize("stage", stages.STAGES)
def test_every_term_has_a_weight_for_every_place(stage):
    config = run_config(stage)
    row = stages.STAGES[stage]
    batch = make_batch()
    weights = row.weights(batch, config)
    values = jax.eval_shape(
        lambda p, t: row.terms(p, t, batch, config), all_params(), teacher_params()
    )
    shape = batch["input_ids"].shape
    assert {k: v.shape for k, v in values.items()} == {k: shape for k in weights}
    totals = {k: float(v) for k, v in totals_of(row, batch, config).items()}
    if stage == "distill":
        assert totals == {"image": NUM_IMAGE, "text": NUM_TEXT}
    else:
        # All weighted tokens but the first of each segment: nothing before it predicts it.
        w = batch["loss_weight"]
        expected = w.sum() - w[0, 10] - w[1, 0]
        assert totals["next_token"] == pytest.approx(expected, rel=1e-6)


def test_losses_of_the_sources_add_up_to_the_loss():
    config, batch = run_config("distill"), make_batch()
    batch = batch | {"source_ids": np.where(batch["segment_ids"] == 1, 5, 2).astype(np.int32)}
    totals = totals_of(DISTILL, batch, config)
    args = embedding_only(), {}, teacher_params(), batch, totals
    _, parts = compiled(train_step.make_loss(config))(*args)
    for name in ("image", "text"):
        of_source = np.asarray(parts[f"{name}/source"])
        assert set(np.flatnonzero(of_source)) == {5, 2}
        assert of_source.sum() / float(totals[name]) == pytest.approx(float(parts[name]), rel=1e-5)


def test_align_trains_the_module_through_the_frozen_decoder():
    """The loss is the term's mean; its gradient reaches all of embedding/ and nothing else."""
    config, batch = run_config("align", "post"), make_batch()
    valid = (batch["segment_ids"] > 0).astype(np.int32)  # one conversation per row
    positions = valid * np.arange(24, dtype=np.int32)
    batch = batch | {"segment_ids": valid, "position_ids": positions}
    row = stages.STAGES["align"]
    trainable, frozen = split(all_params(), row.trainable)
    run = compiled(jax.value_and_grad(train_step.make_loss(config), has_aux=True))
    (loss, parts), grads = run(trainable, frozen, {}, batch, totals_of(row, batch, config))
    assert float(parts["next_token"]) == float(loss)
    logits = compiled(functools.partial(model.apply, config=config.model))(all_params(), batch)
    nll = -np.asarray(jax.nn.log_softmax(logits["logits"], axis=-1))
    total = weight = 0.0
    for r, places in TEXT_PLACES.items():
        for place in places:
            if place > 0:
                w = float(batch["loss_weight"][r, place])
                total += w * nll[r, place - 1, batch["input_ids"][r, place]]
                weight += w
    assert float(loss) == pytest.approx(total / weight, rel=1e-5)
    assert set(flatten(grads)) == set(flatten({"embedding": all_params()["embedding"]}))
    for path, grad in flatten(grads).items():
        assert np.abs(np.asarray(grad)).max() > 1e-7, path


def test_a_term_without_places_is_zero():
    """A batch of text alone has no image term; the loss stays finite."""
    config = run_config("distill")
    batch = make_batch()
    segments = np.where(batch["input_ids"] < 88, batch["segment_ids"], 0)
    batch = batch | {"segment_ids": segments}
    totals = totals_of(DISTILL, batch, config)
    assert float(totals["image"]) == 0 and float(totals["text"]) == NUM_TEXT
    (loss, means), grads = distill_of("pre")(embedding_only(), teacher_params(), batch)
    assert float(means["image"]) == 0
    assert float(loss) == float(means["text"]) > 0
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def paths(config: RunConfig) -> tuple[set[str], set[str]]:
    trainable, frozen = (set(flatten(tree)) for tree in train_step.stage_shapes(config))
    assert not trainable & frozen
    return trainable, frozen


def everything(config: RunConfig) -> tuple[set[str], set[str]]:
    flat = set(flatten(model.abstract_params(config.model)))
    embedding = {path for path in flat if path.startswith("embedding/")}
    assert all(path.startswith("decoder/") for path in flat - embedding)
    return embedding, flat - embedding


SIZES = pytest.mark.parametrize(
    "size",
    [PRE, MODELS["post"], dataclasses.replace(PRE, special_tokens=4), ModelConfig()],
    ids=["pre", "post", "special", "2b"],
)


@SIZES
def test_stage_one_trains_the_module_without_its_tables(size):
    matching = dataclasses.replace(TEACHER, out_size=size.hidden_size)
    config = RunConfig(stage="distill", model=size, teacher=matching)
    trainable, frozen = paths(config)
    embedding, _ = everything(config)
    tables = {"embedding/text/table"}
    if size.special_tokens:
        tables.add("embedding/text/special_table")
    assert frozen == tables
    assert trainable == embedding - tables  # and no decoder parameter anywhere
    assert {path.split("/")[1] for path in trainable} == {"vision", "projector", "layers"}


@SIZES
def test_stage_two_freezes_the_decoder(size):
    config = RunConfig(stage="align", model=size)
    assert paths(config) == everything(config)


@SIZES
def test_stage_three_trains_everything(size):
    config = RunConfig(stage="instruct", model=size)
    embedding, decoder = everything(config)
    assert paths(config) == (embedding | decoder, set())


def test_trainable_can_be_overridden():
    config = run_config("instruct", trainable=r"decoder/norm/.*")
    embedding, decoder = everything(config)
    norm = {"decoder/norm/scale"}
    assert paths(config) == (norm, embedding | decoder - norm)
    with pytest.raises(UserError, match="matches no parameter"):  # paths match as a whole
        paths(run_config("instruct", trainable="decoder/norm"))


def test_order_of_stages():
    ours = list(stages.STAGES.items())[:3]  # a plug-in of an earlier test may follow
    table = {name: (s.data, s.parts, s.teacher, s.after, s.token_weights) for name, s in ours}
    both = ("embedding", "decoder")
    assert table == {
        "distill": ("unpaired", ("embedding",), True, "", "token"),
        "align": ("conversations", both, False, "distill", "token"),
        "instruct": ("conversations", both, False, "align", "square"),
    }
    with pytest.raises(UserError, match="config.stage: 'pretrain' is not one of distill, align"):
        stages.get_stage("pretrain")


def test_the_teacher_normalises_the_students_pixels_its_own_way():
    """One decode serves both: uint8 pixels under another mean equal pixels normalised outside."""
    config = dataclasses.replace(
        run_config("distill").teacher, mean=(0.5, 0.4, 0.3), std=(0.2,) * 3
    )
    pixels = make_batch()["pixels"]
    outside = (pixels.astype(np.float32) / 255 - np.float32([0.5, 0.4, 0.3])) / np.float32(0.2)
    features = compiled(lambda params, x: teacher.apply(params, x, config)["features"])
    found, expected = (features(teacher_params(), x) for x in (pixels, outside))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    usual = compiled(lambda p, x: teacher.apply(p, x, run_config("distill").teacher)["features"])
    assert np.abs(found - usual(teacher_params(), pixels)).max() > 1e-2


@pytest.mark.parametrize(
    ("field", "known"), [("data", "conversations"), ("token_weights", "square")]
)
def test_a_misspelt_stage_is_refused_where_it_is_defined(field, known):
    """A plug-in's, say; else it would be taken for another kind, or fail at the first batch."""
    with pytest.raises(
        UserError, match=f"stage 'align': {field}: 'unparied' is not one of.*{known}"
    ):
        dataclasses.replace(stages.STAGES["align"], **{field: "unparied"})
