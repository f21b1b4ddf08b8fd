"""Numbers recorded from the PyTorch reference (float32, one thread), under tests/golden.

hovle/inputs/<case>.npz has what both variants read: tokens, labels, weights, uint8 tiles.
hovle/<variant>/<case>.npz has what that variant made of them, at the places that are not padding:
hidden states and full gradients keep every 4th channel, scores every 4th or 8th word (`thin`), so
that the files stay small. Losses, gradient norms and generated tokens are complete.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax import checkpoint, model, stages
from hovle_jax.config import ModelConfig, RunConfig
from hovle_jax.generation.generate import generate
from hovle_jax.hf.gradients import hub_gradients
from hovle_jax.nn import embedding, teacher

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = {"a_pre": ("text", "img1", "img5t", "batch_left"), "b_post": ("img1", "img5t")}
ALL = [(variant, case) for variant, cases in CASES.items() for case in cases]
LENGTH, TILES = 57, 6  # of the longest case; the others are padded to it: one compilation
CONTEXT = 302  # <IMG_CONTEXT>
TILE_TOKENS = 4

# Compiling is most of these tests' time and speed of execution none of it.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def load(path: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / path) as file:
        return dict(file)


@functools.cache
def inputs_of(case: str) -> dict[str, np.ndarray]:
    return load(f"hovle/inputs/{case}.npz")


@functools.cache
def golden_of(variant: str, case: str) -> dict[str, np.ndarray]:
    return load(f"hovle/{variant}/{case}.npz")


@functools.cache
def model_of(variant: str) -> tuple[ModelConfig, dict]:
    stored, params = checkpoint.load(GOLDEN / "hovle" / variant)
    return dataclasses.replace(stored.model, dtype="float32", remat="none"), params


def tiles_per_row(ids: np.ndarray) -> list[int]:
    return [int(np.sum(row == CONTEXT)) // TILE_TOKENS for row in ids]


def split_tiles(ids: np.ndarray, pixels: np.ndarray | None) -> list[np.ndarray]:
    """The reference concatenates the tiles of all rows; here every row has its own."""
    if pixels is None:
        return [np.zeros((0, 56, 56, 3), np.uint8)] * len(ids)
    counts = tiles_per_row(ids)
    assert sum(counts) == len(pixels)
    return np.split(pixels, np.cumsum(counts)[:-1])


@functools.cache
def batch_of(case: str) -> dict[str, np.ndarray]:
    z = inputs_of(case)
    ids, mask = z["in.input_ids"], z["in.attention_mask"]
    rows, length = ids.shape
    pad = ((0, 0), (0, LENGTH - length))
    pixels = np.zeros((rows, TILES, 56, 56, 3), np.uint8)
    for row, tiles in zip(pixels, split_tiles(ids, z.get("in.pixels")), strict=True):
        row[: len(tiles)] = tiles
    return {
        "input_ids": np.pad(ids, pad, constant_values=2),
        "segment_ids": np.pad(mask, pad),
        "position_ids": np.pad(np.where(mask > 0, z["in.position_ids"], 0), pad),
        "labels": np.pad(z["in.labels"], pad, constant_values=-100),
        "loss_weight": np.pad(z["in.loss_weight"], pad),
        "pixels": pixels,
    }


@functools.cache
def outputs_of(variant: str) -> dict[str, dict]:
    """{case: outputs of its rows}, from one call over all cases."""
    config, params = model_of(variant)
    batches = [batch_of(case) for case in CASES[variant]]
    batch = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
    run = compiled(functools.partial(model.apply, config=config, keep_hidden=True))
    out = jax.tree.map(np.asarray, run(params, batch))
    result, first = {}, 0
    for case, b in zip(CASES[variant], batches, strict=True):
        rows = slice(first, first + len(b["input_ids"]))
        picked = {k: out[k][rows] for k in ("logits", "hidden", "embeddings")}
        picked["embed_layers"] = out["embedding"]["hidden"][:, rows]
        picked["vision"] = out["embedding"]["vision_embeddings"][rows]
        picked["decoder_layers"] = out["decoder"]["hidden"][:, rows]
        result[case] = picked
        first = rows.stop
    return result


def thin(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The entries of x's last axis that the golden array keeps."""
    step = -(-x.shape[-1] // like.shape[-1])
    assert step in (1, 4, 8)
    return x[..., ::step]


def close(actual: np.ndarray, expected: np.ndarray, atol: float) -> None:
    actual = thin(np.asarray(actual), expected)
    assert actual.shape == expected.shape
    assert np.ptp(expected) > 1e-3  # a constant array would show nothing
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("variant", "case"), ALL)
def test_forward(variant, case):
    out, z = outputs_of(variant)[case], golden_of(variant, case)
    mask = batch_of(case)["segment_ids"] > 0
    long = mask
    if variant == "b_post":  # one row: its long stream is a prefix
        length = z["in.hd_input_ids"].shape[1]
        long = np.arange(out["embed_layers"].shape[2])[None] < length
    for i in range(2):
        close(out["embed_layers"][i][long], z[f"out.embed_layer_{i}"], 1e-4)
    for i in range(3):
        close(out["decoder_layers"][i][mask], z[f"out.llm_layer_{i}"], 1e-4)
    # 'pre' has nothing between the last embedding layer and the LLM: recorded once.
    llm_input = z["out.llm_input"] if variant == "b_post" else z["out.embed_layer_1"]
    close(out["embeddings"][mask], llm_input, 1e-4)
    close(out["hidden"][mask], z["out.llm_norm"], 1e-4)
    close(out["logits"][mask], z["out.logits"], 1e-4)
    if case != "text":
        counts = tiles_per_row(batch_of(case)["input_ids"])
        tiles = np.concatenate([row[:n] for row, n in zip(out["vision"], counts, strict=True)])
        close(tiles, z["out.vision_embeddings"], 1e-4)


@pytest.mark.parametrize("case", CASES["b_post"])
def test_long_stream(case):
    config, _ = model_of("b_post")
    b, z = batch_of(case), golden_of("b_post", case)
    short = [jnp.asarray(b[k]) for k in ("input_ids", "segment_ids", "position_ids")]
    stream = embedding.long_stream(embedding.short_stream(*short), TILES, config)
    length = z["in.hd_input_ids"].shape[1]
    assert length == np.sum(b["segment_ids"]) + tiles_per_row(b["input_ids"])[0] * 12
    np.testing.assert_array_equal(stream.ids[:, :length], z["in.hd_input_ids"])
    np.testing.assert_array_equal(stream.position_ids[:, :length], z["in.hd_position_ids"])
    np.testing.assert_array_equal(stream.segment_ids[0], np.arange(stream.ids.shape[1]) < length)


@functools.cache
def value_and_grad(variant: str):
    """(params, batch of one row) -> ((nll sum, weight), gradient of their quotient)."""
    config, _ = model_of(variant)
    run = RunConfig(stage="instruct", model=config)

    def loss(params, batch):
        stage = stages.STAGES["instruct"]
        weights = stage.weights(batch, run)["next_token"]
        total = (stage.terms(params, {}, batch, run)["next_token"] * weights).sum()
        return total / weights.sum(), (total, weights.sum())

    return compiled(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def gradient_of(variant: str, case: str, weighted: bool):
    """(loss of the case, gradient of its last row): sums and weights of rows add up."""
    _, params = model_of(variant)
    b = dict(batch_of(case))
    if not weighted:
        b["loss_weight"] = np.ones_like(b["loss_weight"])
    total = weight = 0.0
    for i in range(len(b["input_ids"])):
        row = {k: v[i : i + 1] for k, v in b.items()}
        (_, (t, w)), grads = value_and_grad(variant)(params, row)
        total, weight = total + float(t), weight + float(w)
    return total / weight, grads


@pytest.mark.parametrize(("variant", "case"), ALL)
def test_losses(variant, case):
    z = golden_of(variant, case)
    plain, weighted = (gradient_of(variant, case, w)[0] for w in (False, True))
    assert abs(plain - weighted) > 1e-3
    assert plain == pytest.approx(float(z["out.loss"]), abs=1e-5)
    assert weighted == pytest.approx(float(z["out.loss_weighted"]), abs=1e-5)


def hf_gradients(variant: str, weighted: bool) -> dict[str, np.ndarray]:
    """Gradients by the reference's tensor names; tensors that nothing reads are missing."""
    config, _ = model_of(variant)
    return hub_gradients(config, gradient_of(variant, "img1", weighted)[1])


@pytest.mark.parametrize("variant", CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_norms(variant, weighted):
    z = golden_of(variant, "img1")
    grads = hf_gradients(variant, weighted)
    norms = z["gradw.norms" if weighted else "grad.norms"]
    recorded = dict(zip(z["grad.names"].tolist(), norms.tolist(), strict=True))
    dead = {name for name, norm in recorded.items() if np.isnan(norm)}
    assert dead == {
        "embedding_model.vision_embeddings.class_embedding",
        "language_model.model.tok_embeddings.weight",
    }
    assert set(grads) == set(recorded) - dead
    for name, grad in grads.items():
        norm = np.linalg.norm(grad.astype(np.float64))
        assert norm == pytest.approx(recorded[name], rel=1e-4), name


@pytest.mark.parametrize("variant", CASES)
def test_full_gradients(variant):
    z, grads = golden_of(variant, "img1"), hf_gradients(variant, weighted=False)
    full = {k.removeprefix("grad.full."): v for k, v in z.items() if k.startswith("grad.full.")}
    assert len(full) == 3
    for name, expected in full.items():
        close(grads[name], expected, 1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("variant", "cases"), [("a_pre", ("text",)), *CASES.items()])
def test_generation(variant, cases):
    """One call for prompts of different lengths; the text alone also without any pixels."""
    config, params = model_of(variant)
    prompts, tiles, expected = [], [], []
    for case in cases:
        z = inputs_of(case)
        mask = z["gen.attention_mask"] > 0
        prompts += [ids[m] for ids, m in zip(z["gen.input_ids"], mask, strict=True)]
        tiles += split_tiles(z["gen.input_ids"], z.get("in.pixels"))
        expected += golden_of(variant, case)["gen.tokens"].tolist()
    assert generate(params, config, prompts, tiles, max_new=12, stop_ids=()) == expected


def test_position_interpolation():
    config, params = model_of("a_pre")
    z = load("hovle/a_pre/pos_interp.npz")
    table = params["embedding"]["vision"]["position"]
    for rows, columns in ((6, 6), (2, 2), (8, 4), (3, 7)):
        resized = embedding.resize_positions(table[1:], (rows, columns))
        close(resized[None], z[f"out.pos_embed_{rows}x{columns}"], 1e-5)
    np.testing.assert_array_equal(embedding.resize_positions(table[1:], (4, 4)), table[1:])
    vision = {"params": params["embedding"]["vision"]}
    out = embedding.PatchEmbedding(config).apply(vision, z["in.pixels_42x98"])
    close(out, z["out.vision_embeddings_42x98"], 1e-4)


@functools.cache
def teacher_model() -> tuple:
    stored, params = checkpoint.load(GOLDEN / "teacher", "teacher")
    return dataclasses.replace(stored.config, dtype="float32"), params


@functools.cache
def teacher_outputs(size: int, version: str, select: int) -> dict[str, jax.Array]:
    config, params = teacher_model()
    config = dataclasses.replace(config, shuffle_version=version, select_layer=select)
    run = compiled(functools.partial(teacher.apply, config=config))
    return run(params, load("teacher/io.npz")[f"{size}.in.pixels"])


@pytest.mark.parametrize("size", [56, 84])
@pytest.mark.parametrize(
    ("version", "select", "recorded"),
    [("v1", -1, "v1"), ("v2", -1, "v2"), ("v2", -2, "v2_select-2")],
)
def test_teacher(size, version, select, recorded):
    z = load("teacher/io.npz")
    out = teacher_outputs(size, version, select)
    close(out["features"], z[f"{size}.out.extract_feature_{recorded}"], 2e-5)
    if select == -1:
        close(out["hidden"], z[f"{size}.out.hidden_3"], 2e-5)
    # The three recordings differ, so reading the wrong one would show.
    for other in {"v1", "v2", "v2_select-2"} - {recorded}:
        wrong = z[f"{size}.out.extract_feature_{other}"]
        assert np.abs(np.asarray(out["features"]) - wrong).max() > 1e-2
