"""Parameter names, shapes and counts, against the released checkpoint's table."""

import dataclasses
import functools
import math

import numpy as np
import pytest

from hovle_jax import model
from hovle_jax.config import LayersConfig, ModelConfig, TeacherConfig
from hovle_jax.hf import names
from hovle_jax.nn import teacher
from hovle_jax.tree import flatten

HOVLE_2B = ModelConfig()
HOVLE_HD = dataclasses.replace(ModelConfig(), name="hovle_hd", shuffle_loc="post")
RELEASED = pytest.mark.parametrize("config", [HOVLE_2B, HOVLE_HD], ids=lambda c: c.name)

# One layer of either stack, by its name under `embedding_model.encoder.{i}` (8 of them) and
# `language_model.model.layers.{i}` (24).
HF_LAYER = {
    "attention_norm.weight": (2048,),
    "attention.wqkv.weight": (4096, 2048),
    "attention.wo.weight": (2048, 2048),
    "ffn_norm.weight": (2048,),
    "feed_forward.w1.weight": (8192, 2048),
    "feed_forward.w3.weight": (8192, 2048),
    "feed_forward.w2.weight": (2048, 8192),
}
HF_OTHERS = {
    "embedding_model.vision_embeddings.class_embedding": (1, 1, 2048),
    "embedding_model.vision_embeddings.patch_embedding.weight": (2048, 3, 14, 14),
    "embedding_model.vision_embeddings.patch_embedding.bias": (2048,),
    "embedding_model.vision_embeddings.position_embedding": (1, 1025, 2048),
    "embedding_model.llm_text_embeddings.weight": (92553, 2048),
    "embedding_model.pixel_shuffle_proj.0.weight": (2048, 8192),
    "embedding_model.pixel_shuffle_proj.0.bias": (2048,),
    "embedding_model.pixel_shuffle_proj.2.weight": (2048, 2048),
    "embedding_model.pixel_shuffle_proj.2.bias": (2048,),
    "language_model.model.tok_embeddings.weight": (92553, 2048),
    "language_model.model.norm.weight": (2048,),
    "language_model.output.weight": (92553, 2048),
}

# The project's own names. Checkpoints, regexes in configs and users depend on them: changing one
# breaks old runs.
NATIVE = {
    "decoder/head/kernel": (2048, 92553),
    "decoder/layers/attention/k/kernel": (24, 2048, 8, 128),
    "decoder/layers/attention/o/kernel": (24, 16, 128, 2048),
    "decoder/layers/attention/q/kernel": (24, 2048, 16, 128),
    "decoder/layers/attention/v/kernel": (24, 2048, 8, 128),
    "decoder/layers/attention_norm/scale": (24, 2048),
    "decoder/layers/mlp/down/kernel": (24, 8192, 2048),
    "decoder/layers/mlp/gate/kernel": (24, 2048, 8192),
    "decoder/layers/mlp/up/kernel": (24, 2048, 8192),
    "decoder/layers/mlp_norm/scale": (24, 2048),
    "decoder/norm/scale": (2048,),
    "embedding/layers/attention/k/kernel": (8, 2048, 8, 128),
    "embedding/layers/attention/o/kernel": (8, 16, 128, 2048),
    "embedding/layers/attention/q/kernel": (8, 2048, 16, 128),
    "embedding/layers/attention/v/kernel": (8, 2048, 8, 128),
    "embedding/layers/attention_norm/scale": (8, 2048),
    "embedding/layers/mlp/down/kernel": (8, 8192, 2048),
    "embedding/layers/mlp/gate/kernel": (8, 2048, 8192),
    "embedding/layers/mlp/up/kernel": (8, 2048, 8192),
    "embedding/layers/mlp_norm/scale": (8, 2048),
    "embedding/projector/fc1/bias": (2048,),
    "embedding/projector/fc1/kernel": (8192, 2048),
    "embedding/projector/fc2/bias": (2048,),
    "embedding/projector/fc2/kernel": (2048, 2048),
    "embedding/text/table": (92553, 2048),
    "embedding/vision/patch/bias": (2048,),
    "embedding/vision/patch/kernel": (14, 14, 3, 2048),
    "embedding/vision/position": (1025, 2048),
}
TEACHER = {
    "class": (1, 1024),
    "layers/fc1/bias": (24, 4096),
    "layers/fc1/kernel": (24, 1024, 4096),
    "layers/fc2/bias": (24, 1024),
    "layers/fc2/kernel": (24, 4096, 1024),
    "layers/k/bias": (24, 16, 64),
    "layers/k/kernel": (24, 1024, 16, 64),
    "layers/ls1/scale": (24, 1024),
    "layers/ls2/scale": (24, 1024),
    "layers/norm1/bias": (24, 1024),
    "layers/norm1/scale": (24, 1024),
    "layers/norm2/bias": (24, 1024),
    "layers/norm2/scale": (24, 1024),
    "layers/o/bias": (24, 1024),
    "layers/o/kernel": (24, 16, 64, 1024),
    "layers/q/bias": (24, 16, 64),
    "layers/q/kernel": (24, 1024, 16, 64),
    "layers/v/bias": (24, 16, 64),
    "layers/v/kernel": (24, 1024, 16, 64),
    "mlp1_fc1/bias": (2048,),
    "mlp1_fc1/kernel": (4096, 2048),
    "mlp1_fc2/bias": (2048,),
    "mlp1_fc2/kernel": (2048, 2048),
    "mlp1_norm/bias": (4096,),
    "mlp1_norm/scale": (4096,),
    "patch/bias": (1024,),
    "patch/kernel": (14, 14, 3, 1024),
    "position": (1025, 1024),
}

SMALL_LAYERS = LayersConfig(
    num_layers=2,
    hidden_size=24,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=40,
)
SMALL = ModelConfig(
    name="small",
    vocab_size=50,
    embedding=SMALL_LAYERS,
    decoder=dataclasses.replace(SMALL_LAYERS, num_layers=3),
    image_size=28,
    img_context_id=46,
)
BIASED = dataclasses.replace(SMALL_LAYERS, qkv_bias=True, out_bias=True)
SMALL_TEACHER = TeacherConfig(
    num_layers=2,
    hidden_size=24,
    num_heads=4,
    intermediate_size=40,
    image_size=28,
    out_size=20,
)
MODELS = {
    "plain": SMALL,
    "special_tokens": dataclasses.replace(SMALL, special_tokens=3),
    "biases": dataclasses.replace(SMALL, embedding=BIASED, decoder=BIASED),
    "qkv_bias_only": dataclasses.replace(
        SMALL, decoder=dataclasses.replace(SMALL_LAYERS, qkv_bias=True)
    ),
    "tied": dataclasses.replace(SMALL, tie_head=True),
    "no_projector": dataclasses.replace(SMALL, projector=False, shuffle=1),
}
TEACHERS = {
    "layer": SMALL_TEACHER,
    "layer_qk_norm": dataclasses.replace(SMALL_TEACHER, qk_norm=True),
    "rms": dataclasses.replace(SMALL_TEACHER, norm="rms", qk_norm=True, qkv_bias=False),
}
SMALL_CASES = [
    *(pytest.param(model, names.hovle, c, id=f"model-{k}") for k, c in MODELS.items()),
    *(pytest.param(teacher, names.teacher, c, id=f"teacher-{k}") for k, c in TEACHERS.items()),
]


@functools.cache
def shapes_of(module, config) -> dict[str, tuple[int, ...]]:
    flat = flatten(module.abstract_params(config))
    assert all(x.dtype == np.float32 for x in flat.values())
    return {path: x.shape for path, x in flat.items()}


def tensors(rows: list[names.Row]) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor, layers written out."""
    found = [(name, row.shape) for row in rows for name in row.tensors]
    assert len(dict(found)) == len(found)
    return dict(found)


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@RELEASED
def test_released_tensors(config):
    expected = dict(HF_OTHERS)
    for i in range(8):
        expected |= {f"embedding_model.encoder.{i}.{k}": v for k, v in HF_LAYER.items()}
    for i in range(24):
        expected |= {f"language_model.model.layers.{i}.{k}": v for k, v in HF_LAYER.items()}
    found = tensors(names.hovle(config))
    assert found == expected
    assert len(found) == 236
    assert sum(math.prod(shape) for shape in found.values()) == 2_606_327_808


@RELEASED
def test_native_names_and_shapes(config):
    assert shapes_of(model, config) == NATIVE


@RELEASED
def test_parameter_count(config):
    count = sum(math.prod(shape) for shape in shapes_of(model, config).values())
    class_embedding, tok_embeddings = 2048, 92553 * 2048  # in the file, read by nothing
    assert count + class_embedding + tok_embeddings == 2_606_327_808
    assert config.params() == count
    by_part = {part: 0 for part in ("embedding", "decoder")}
    for path, shape in shapes_of(model, config).items():
        by_part[path.split("/")[0]] += math.prod(shape)
    assert by_part["embedding"] + class_embedding == 717_180_928
    assert by_part["decoder"] + tok_embeddings == 1_889_146_880


def test_teacher_names_and_shapes():
    assert shapes_of(teacher, TeacherConfig()) == TEACHER


def test_optional_names():
    """What a config adds to or takes from the plain model's and teacher's paths."""
    plain = set(shapes_of(model, SMALL))
    assert plain == set(NATIVE)

    def changed(name: str) -> tuple[set[str], set[str]]:
        paths = set(shapes_of(model, MODELS[name]))
        return paths - plain, plain - paths

    attention = {f"{s}/layers/attention/{{}}/bias" for s in ("embedding", "decoder")}
    biases = {a.format(p) for a in attention for p in "qkvo"}
    assert changed("special_tokens") == ({"embedding/text/special_table"}, set())
    assert changed("biases") == (biases, set())
    decoder = {f"decoder/layers/attention/{p}/bias" for p in "qkv"}
    assert changed("qkv_bias_only") == (decoder, set())
    assert changed("tied") == (set(), set())  # the head is a tensor of its own here
    projector = {f"embedding/projector/{f}/{x}" for f in ("fc1", "fc2") for x in ("kernel", "bias")}
    assert changed("no_projector") == (set(), projector)

    rms = set(shapes_of(teacher, TEACHERS["rms"]))
    assert rms - set(TEACHER) == {"layers/q_norm/scale", "layers/k_norm/scale"}
    gone = {f"layers/{p}/bias" for p in (*"qkv", "norm1", "norm2")}
    assert set(TEACHER) - rms == gone


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_config_counts_its_parameters(config):
    count = sum(math.prod(shape) for shape in shapes_of(model, config).values())
    assert config.params() == count


@pytest.mark.parametrize(("module", "table", "config"), SMALL_CASES)
def test_rows_give_native_shapes(module, table, config):
    """Every native array comes from exactly one row, in the shape the module asks for."""
    shapes = {}
    for row in table(config):
        lead = (row.layers,) if row.layers else ()
        arrays = row.to_native(np.zeros(row.shape, np.float32))
        for path, x in zip(row.native, arrays, strict=True):
            assert path not in shapes
            shapes[path] = lead + x.shape
    assert shapes == shapes_of(module, config)


@pytest.mark.parametrize(("module", "table", "config"), SMALL_CASES)
def test_rows_round_trip(module, table, config):
    rng = np.random.default_rng(0)
    for row in table(config):
        x = random_tensor(rng, row.shape)
        back = row.to_hf(row.to_native(x))
        assert back.shape == row.shape, row.hf
        np.testing.assert_array_equal(back, x if row.native else np.zeros_like(x), row.hf)


def rows_by_name(rows: list[names.Row]) -> dict[str, names.Row]:
    return {row.hf: row for row in rows}


def test_wqkv_is_grouped_per_kv_head():
    """Per kv head: its query heads, its key, its value. 2 kv heads, 3 queries each."""
    rows = rows_by_name(names.hovle(MODELS["biases"]))
    weight = random_tensor(np.random.default_rng(1), (2 * 5 * 4, 24))
    attention = "language_model.model.layers.{i}.attention"
    q, k, v = rows[f"{attention}.wqkv.weight"].to_native(weight)
    slots = weight.reshape(2, 5, 4, 24)
    for kv in range(2):
        for group in range(3):
            np.testing.assert_array_equal(q[:, kv * 3 + group], slots[kv, group].T)
        np.testing.assert_array_equal(k[:, kv], slots[kv, 3].T)
        np.testing.assert_array_equal(v[:, kv], slots[kv, 4].T)
    bias = np.arange(40, dtype=np.float32)
    q, k, v = rows[f"{attention}.wqkv.bias"].to_native(bias)
    np.testing.assert_array_equal(q[4], [24, 25, 26, 27])  # kv head 1, its second query head
    np.testing.assert_array_equal(k[1], [32, 33, 34, 35])
    np.testing.assert_array_equal(v[0], [16, 17, 18, 19])


def test_teacher_qkv_is_in_thirds():
    row = rows_by_name(names.teacher(SMALL_TEACHER))[
        "vision_model.encoder.layers.{i}.attn.qkv.bias"
    ]
    q, k, v = row.to_native(np.arange(72, dtype=np.float32))
    np.testing.assert_array_equal(q[1], np.arange(6, 12))
    np.testing.assert_array_equal(k[0], np.arange(24, 30))
    np.testing.assert_array_equal(v[2], np.arange(60, 66))


def test_layouts():
    """Linears are transposed, heads split on the input side of wo, the patch kernel is HWIO."""
    rows, rng = rows_by_name(names.hovle(SMALL)), np.random.default_rng(2)
    x = random_tensor(rng, (24, 24))
    (o,) = rows["embedding_model.encoder.{i}.attention.wo.weight"].to_native(x)
    np.testing.assert_array_equal(o[5, 3], x[:, 5 * 4 + 3])
    x = random_tensor(rng, (50, 24))
    (head,) = rows["language_model.output.weight"].to_native(x)
    np.testing.assert_array_equal(head, x.T)
    (table,) = rows["embedding_model.llm_text_embeddings.weight"].to_native(x)
    np.testing.assert_array_equal(table, x)
    x = random_tensor(rng, (24, 3, 14, 14))
    (patch,) = rows["embedding_model.vision_embeddings.patch_embedding.weight"].to_native(x)
    np.testing.assert_array_equal(patch[2, 9, 1], x[:, 1, 2, 9])
    gate = rows["embedding_model.encoder.{i}.feed_forward.w1.weight"].native
    up = rows["embedding_model.encoder.{i}.feed_forward.w3.weight"].native
    assert gate == ("embedding/layers/mlp/gate/kernel",)
    assert up == ("embedding/layers/mlp/up/kernel",)


@pytest.mark.parametrize(("module", "_", "config"), SMALL_CASES)
def test_every_axis_is_named(module, _, config):
    axes = flatten(module.param_axes(config))
    assert {k: len(v) for k, v in axes.items()} == {
        k: len(v) for k, v in shapes_of(module, config).items()
    }
    stacked = {k for k in axes if k.startswith(("layers/", "embedding/layers/", "decoder/layers/"))}
    assert {k for k, v in axes.items() if v[0] == "layers"} == stacked
