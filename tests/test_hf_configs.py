"""config.json and tokenizer files of Hugging Face directories: kept, or refused in one line."""

import copy
import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hovle_jax
from hovle_jax import checkpoint
from hovle_jax.config import DataConfig, LayersConfig, ModelConfig
from hovle_jax.data.chat import TEMPLATES
from hovle_jax.data.tokenizer import IM_END, IMG_CONTEXT, IMG_END, IMG_START
from hovle_jax.errors import UserError
from hovle_jax.hf import config_json, configs
from hovle_jax.hf.chat_template import chat_template
from hovle_jax.hf.export import export
from hovle_jax.hf.importer import import_directory
from hovle_jax.hf.reader import open_directory
from hovle_jax.hf.section import Section
from hovle_jax.hf.writer import ExportOptions

A_PRE = pathlib.Path(__file__).parent / "golden/hovle/a_pre"
NAN, INF = float("nan"), float("inf")
LAYERS = LayersConfig(
    num_layers=2, hidden_size=24, num_heads=6, num_kv_heads=2, head_dim=4, intermediate_size=40
)
IDS = {"im_end_id": 40, "img_start_id": 42, "img_end_id": 43, "img_context_id": 44}
HOVLE = ModelConfig(vocab_size=50, decoder=LAYERS, embedding=LAYERS, image_size=28, **IDS)
LLAMA = dataclasses.replace(HOVLE, llm_family="llama")
VISION = {
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 28,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}


def llm_raw(**more: object) -> dict:
    scaled = dataclasses.replace(LAYERS, rope_scaling="linear", rope_factor=2.0)
    config = dataclasses.replace(LLAMA, decoder=scaled)
    return config_json.hovle_json(config, DataConfig(), "float32")["llm_config"] | more


RAW = {
    "hovle": config_json.hovle_json(HOVLE, DataConfig(), "float32"),
    "fused": config_json.fused_json(HOVLE, DataConfig(), "float32"),
    "llm": llm_raw(),
    "chat": {
        "model_type": "internvl_chat",
        "vision_config": VISION,
        "llm_config": llm_raw(),
        "downsample_ratio": 0.5,
        "select_layer": -1,
        "max_dynamic_patch": 6,
    },
    "internvl": {
        "model_type": "internvl",
        "vision_config": VISION,
        "text_config": llm_raw(),
        "downsample_ratio": 0.5,
        "vision_feature_layer": -1,
        "image_token_id": 44,
    },
}


def parse(kind: str, raw: dict) -> tuple:
    """All that is read of a config.json."""
    section = Section(raw)
    data = configs.data_config(section)
    if kind == "hovle":
        return data, configs.hovle_config(section)
    if kind == "fused":
        return data, configs.fused_config(section)
    if kind == "llm":
        return data, configs.llm_config(section)
    return data, configs.internvl_llm(section), configs.teacher_config(section)


def numeric(raw: dict, path: tuple = ()) -> list[tuple]:
    """Places of all numbers."""
    out = []
    for key, value in raw.items():
        if isinstance(value, dict):
            out += numeric(value, (*path, key))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            out.append((*path, key))
    return out


def changed(raw: dict, path: tuple, value: object) -> dict:
    raw = copy.deepcopy(raw)
    node = raw
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return raw


# Written for the released code or for transformers; nothing here depends on them.
UNREAD = {
    "hovle": {
        *[("downsample_ratio",), ("force_image_size",), ("image_token_id",), ("select_layer",)],
        *[("bos_token_id",), ("eos_token_id",), ("pad_token_id",)],
        *[("embedding_config", k) for k in ("attention_dropout", "drop_path_rate", "dropout")],
        *[("embedding_config", k) for k in ("llm_hidden_size", "num_channels")],
    },
    "fused": {
        *[("bos_token_id",), ("eos_token_id",), ("pad_token_id",)],
        *[("vision_config", k) for k in ("hidden_size", "num_channels")],
    },
}
NULL_IS_NONE = ("num_key_value_heads", "head_dim", "bos_token_id", "eos_token_id", "pad_token_id")
PLACES = [
    (kind, path)
    for kind, raw in RAW.items()
    for path in numeric(raw)
    if path not in UNREAD.get(kind, ())
]


@pytest.mark.parametrize("kind", RAW)
def test_the_plain_configs_are_understood(kind):
    parse(kind, RAW[kind])


@pytest.mark.parametrize(
    ("kind", "path"), PLACES, ids=[f"{kind}-{'.'.join(path)}" for kind, path in PLACES]
)
def test_odd_numbers_are_named(kind, path):
    """Null, lists, texts, booleans, zero, negative, no number, too large: one line with the key."""
    key = path[-1]
    token, layer = key.endswith("_token_id"), key in ("select_layer", "vision_feature_layer")
    values = ["8", True, NAN, INF, -INF, {}, [], ["8"], [None]]
    values += [] if key in NULL_IS_NONE else [None]
    values += [] if token or layer else [0]
    values += [-1] if not layer else [99, [-1]]
    whole = key not in ("rms_norm_eps", "layer_norm_eps", "rope_theta", "initializer_range")
    values += [2.5, 1e400] if whole and key != "factor" else [10**400, 0.0]
    for value in values:
        with pytest.raises(UserError) as error:
            parse(kind, changed(RAW[kind], path, value))
        assert key in str(error.value) and "\n" not in str(error.value), (value, str(error.value))


SECTIONS = [
    (kind, (key,)) for kind, raw in RAW.items() for key, value in raw.items() if type(value) is dict
]


@pytest.mark.parametrize(("kind", "path"), SECTIONS)
@pytest.mark.parametrize("value", [None, [], "x", 3, {}])
def test_odd_sections_are_named(kind, path, value):
    if path == ("auto_map",) or path == ("rope_scaling",) and value in (None, {}):
        return
    expected = "LLM ''" if value == {} and path[-1] in ("llm_config", "text_config") else path[-1]
    with pytest.raises(UserError, match=expected):
        parse(kind, changed(RAW[kind], path, value))


@pytest.mark.parametrize(
    ("kind", "path", "value", "expected"),
    [
        (
            "llm",
            ("rope_parameters",),
            {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e4}},
            "rope_parameters: one rope per kind of layer is not supported",
        ),
        ("llm", ("rope_parameters",), [1], "rope_parameters: expected an object"),
        ("llm", ("partial_rotary_factor",), 0.5, "partial_rotary_factor: expected 1"),
        (
            "llm",
            ("rope_parameters",),
            {"rope_type": "default", "partial_rotary_factor": 0.25},
            "rope_parameters.partial_rotary_factor: expected 1",
        ),
        (
            "llm",
            ("layer_types",),
            ["full_attention", "sliding_attention"],
            "layer_types: expected 'full_attention' only",
        ),
        ("llm", ("use_sliding_window",), True, "use_sliding_window: attention is over"),
        ("internvl", ("text_config", "use_sliding_window"), True, "text_config.use_sliding"),
        ("llm", ("rope_scaling",), {"type": "linear"}, "rope_scaling: has no key 'factor'"),
        ("llm", ("rope_scaling",), {"type": ["linear"], "factor": 2}, "rope_scaling.type: expec"),
        ("llm", ("architectures",), "LlamaForCausalLM", "architectures: expected a list of names"),
        ("llm", ("head_dim",), 3, "head_dim 3 is odd"),
        ("llm", ("eos_token_id",), 50, "eos_token_id 50 is outside of vocab_size 50"),
        ("internvl", ("projector_hidden_act",), "relu", "projector_hidden_act 'relu' is not"),
        ("internvl", ("vision_feature_layer",), [-2, -1], "vision_feature_layer: expected an in"),
        ("internvl", ("vision_feature_select_strategy",), "full", "strategy 'full' is not"),
        ("chat", ("select_layer",), -4, "select_layer -4 is not a hidden state of 2 layers"),
        ("chat", ("vision_config", "image_size"), [28, 14], "image_size: [28, 14] is not square"),
        ("chat", ("downsample_ratio",), 0.4, "downsample_ratio: expected 1, 1/2"),
        ("chat", ("min_dynamic_patch",), 9, "min_dynamic_patch 9 is more than max_dynamic_pa"),
        ("hovle", ("template",), 3, "template: expected a text"),
        ("hovle", ("system_message",), ["x"], "system_message: expected a text"),
        ("hovle", ("use_thumbnail",), "yes", "use_thumbnail: expected true or false"),
        ("hovle", ("img_end_token_id",), 50, "img_end_token_id would be 50, which is outside"),
        ("fused", ("embedding_layers",), 4, "embedding_layers 4 leave no layer"),
    ],
)
def test_what_is_not_supported_is_refused(kind, path, value, expected):
    with pytest.raises(UserError) as error:
        parse(kind, changed(RAW[kind], path, value))
    assert expected in str(error.value)


def test_settings_without_effect_are_accepted():
    more = {
        "layer_types": ["full_attention"] * 2,
        "use_sliding_window": False,
        "partial_rotary_factor": 1.0,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
        "pad_token_id": None,
        "eos_token_id": [7, 2],
    }
    config = configs.llm_config(Section(llm_raw(**more)))
    assert config.decoder == configs.llm_config(Section(llm_raw())).decoder
    assert (config.eos_id, config.pad_id) == (7, 7)


# --- directories --------------------------------------------------------------------------------


def copied(target: pathlib.Path, change: dict | None = None) -> pathlib.Path:
    """A copy of the recorded model; a value of None in `change` removes a key of config.json."""
    target.mkdir(parents=True)
    shutil.copy(A_PRE / "model.safetensors", target)
    raw = json.loads((A_PRE / "config.json").read_text()) | (change or {})
    raw = {k: v for k, v in raw.items() if v is not None}
    (target / "config.json").write_text(json.dumps(raw))
    return target


def test_odd_values_from_the_command_line(tmp_path, one_line_error):
    for n, (key, value) in enumerate({"embedding_config": 3, "model_type": [], "x": NAN}.items()):
        source = copied(tmp_path / str(n), {key: value})
        if key != "embedding_config":
            raw = json.loads((source / "config.json").read_text())
            raw["llm_config"]["hidden_size" if key == "x" else "num_hidden_layers"] = None
            (source / "config.json").write_text(json.dumps(raw))
        assert str(source / "config.json") in one_line_error(
            ["import", str(source), str(tmp_path / "out")]
        )


@pytest.mark.parametrize("system", [None, "", "Answer in one word."])
@pytest.mark.parametrize("flavour", ["reference", "fused"])
def test_system_message_survives(system, flavour, tmp_path):
    """Export, import and export again: '' (no system turn) is not the template's default."""
    import_directory(A_PRE, tmp_path / "native")
    config, data = hovle_jax.load(tmp_path / "native")[0], DataConfig(system=system, max_tiles=5)
    checkpoint.write_config(tmp_path / "native", config, data)
    export(tmp_path / "native", tmp_path / "out", ExportOptions(flavour=flavour))
    assert json.loads((tmp_path / "out/config.json").read_text())["system_message"] == system
    assert checkpoint.open_stored(tmp_path / "out").data == data
    import_directory(tmp_path / "out", tmp_path / "again")
    assert checkpoint.open_stored(tmp_path / "again").data == data


def test_tile_limits_without_a_template(tmp_path):
    change = {"template": None, "max_dynamic_patch": 7, "min_dynamic_patch": 2}
    source = copied(tmp_path / "hf", change | {"use_thumbnail": False})
    expected = DataConfig(min_tiles=2, max_tiles=7, thumbnail=False)
    assert open_directory(source).data == expected
    import_directory(source, tmp_path / "native")
    assert checkpoint.open_stored(tmp_path / "native").data == expected


TOKENS = {IM_END: 290, IMG_START: 300, IMG_END: 301, IMG_CONTEXT: 302}
FILES = {
    "added_tokens.json": lambda ids: ids,
    "tokenizer_config.json": lambda ids: {
        "added_tokens_decoder": {str(i): {"content": token} for token, i in ids.items()}
    },
    "tokenizer.json": lambda ids: {
        "added_tokens": [{"id": i, "content": token} for token, i in ids.items()]
    },
}


@pytest.mark.parametrize("name", FILES)
def test_ids_come_from_the_tokenizer(name, tmp_path, one_line_error):
    """Where config.json names one of them; and files of another model are noticed everywhere."""
    source = copied(tmp_path / "hf")
    assert open_directory(source).parts["model"].config.im_end_id == 298  # the released order
    (source / name).write_text(json.dumps(FILES[name](TOKENS)))
    assert hovle_jax.load(source)[0].im_end_id == 290
    import_directory(source, tmp_path / "native")
    assert hovle_jax.load(tmp_path / "native")[0].im_end_id == 290
    wrong = FILES[name](TOKENS | {IMG_CONTEXT: 303})
    for directory in (source, tmp_path / "native/tokenizer"):
        (directory / name).write_text(json.dumps(wrong))
    expected = f"{IMG_CONTEXT} is 303 in the tokenizer's files, but 302"
    out = str(tmp_path / "out")
    for directory in (source, tmp_path / "native"):
        assert expected in one_line_error(["export", str(directory), out])
        with pytest.raises(UserError, match="is 303 in the tokenizer's files"):
            hovle_jax.load(directory)
    assert expected in one_line_error(["import", str(source), out])
    (source / name).write_text("{")
    assert f"{source / name}: malformed" in one_line_error(["import", str(source), out])
    (source / name).write_text(json.dumps(FILES[name](TOKENS)))
    other = next(k for k in FILES if k != name)
    (source / other).write_text(json.dumps(FILES[other](TOKENS | {IM_END: 1})))
    assert f"{IM_END} is " in one_line_error(["import", str(source), out])


def test_ids_of_an_llm_and_of_an_internvl_come_from_the_tokenizer():
    """Their config.json names none or one of them."""
    ids = {"im_end_id": 7, "img_context_id": 11}
    assert configs.llm_config(Section(llm_raw()), "x", ids).im_end_id == 7
    found = configs.internvl_llm(Section(RAW["chat"]), "x", ids)
    assert (found.im_end_id, found.img_context_id, found.img_end_id) == (7, 11, 10)


def test_assets_of_another_model(tmp_path, one_line_error):
    """Copied tokenizer files must have all four tokens, and the model's ids."""
    assets = tmp_path / "assets"
    assets.mkdir()
    argv = ["export", str(A_PRE), str(tmp_path / "out"), "--assets", str(assets)]
    assert f"{assets}: no tokenizer" in one_line_error(argv)
    (assets / "chat_template.jinja").write_text("x")
    assert f"{assets}: no tokenizer" in one_line_error(argv)
    (assets / "tokenizer.json").write_text(json.dumps(FILES["tokenizer.json"]({IM_END: 298})))
    assert f"the tokenizer has no token {IMG_START}" in one_line_error(argv)
    ids = TOKENS | {IM_END: 297}
    (assets / "tokenizer.json").write_text(json.dumps(FILES["tokenizer.json"](ids)))
    assert f"{IM_END} is 297 in the tokenizer's files, but 298" in one_line_error(argv)
    assert [p.name for p in tmp_path.iterdir()] == ["assets"]


def test_an_export_has_the_template_it_was_trained_with(tmp_path):
    """Not that of the LLM whose tokenizer files it takes."""
    assets, ids = tmp_path / "assets", TOKENS | {IM_END: 298}
    assets.mkdir()
    (assets / "tokenizer.json").write_text(json.dumps(FILES["tokenizer.json"](ids)))
    (assets / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x", "y": 1}))
    (assets / "chat_template.jinja").write_text("of the LLM")
    (assets / "chat_template.json").write_text('{"chat_template": "of the LLM"}')
    expected = chat_template(
        TEMPLATES["internlm2-chat"], open_directory(A_PRE).data.system, bos=True
    )
    for out, given, count in (
        (tmp_path / "one", assets, 3),
        (tmp_path / "two", tmp_path / "one", 0),
    ):
        remarks = export(A_PRE, out, ExportOptions(assets=str(given)))
        told = [r for r in remarks if r.startswith(f"{given}: another chat template in ")]
        assert len(told) == count and all("'internlm2-chat' takes its place" in r for r in told)
        assert (out / "chat_template.jinja").read_text() == expected
        assert not (out / "chat_template.json").exists()
        body = json.loads((out / "tokenizer_config.json").read_text())
        assert body == {"chat_template": expected, "y": 1}


@pytest.mark.parametrize("differs", [True, False])
def test_a_tied_config_with_a_head(differs, tmp_path, one_line_error):
    """Versions of transformers use the table or the head: only if they are the same is it clear."""
    source = copied(tmp_path / "hf")
    raw = json.loads((source / "config.json").read_text())
    raw["llm_config"]["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(raw))
    tensors = load_file(source / "model.safetensors")
    head, table = "language_model.output.weight", "language_model.model.tok_embeddings.weight"
    if not differs:
        tensors[head] = tensors[table].copy()
    save_file(tensors, source / "model.safetensors")
    argv = ["import", str(source), str(tmp_path / "out")]
    if differs:
        message = one_line_error(argv)
        assert "llm_config.tie_word_embeddings is true" in message and head in message
    else:
        import_directory(source, tmp_path / "out")
        found = hovle_jax.load(tmp_path / "out")[1]["decoder"]["head"]["kernel"]
        np.testing.assert_array_equal(found, tensors[table].T)
