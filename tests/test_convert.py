"""Hugging Face directories in and out: nothing lost, nothing half-written, bad input named."""

import collections
import dataclasses
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hovle_jax
from hovle_jax import checkpoint, model
from hovle_jax.cli.main import main
from hovle_jax.config import DataConfig, InitConfig, LayersConfig, ModelConfig, TeacherConfig
from hovle_jax.errors import UserError
from hovle_jax.hf import config_json, live, names, shards
from hovle_jax.hf.export import export
from hovle_jax.hf.importer import import_directory
from hovle_jax.hf.reader import open_directory
from hovle_jax.hf.writer import ExportOptions, parse_size
from hovle_jax.initialize import check_order, initial_params, teacher_params
from hovle_jax.nn import teacher
from hovle_jax.sharding import make_mesh
from hovle_jax.stages import get_stage
from hovle_jax.train import train
from hovle_jax.tree import flatten, unflatten
from tests.conftest import TEACHER as TEACHER_CONFIG

GOLDEN = pathlib.Path(__file__).parent / "golden"
A_PRE, B_POST, TEACHER = GOLDEN / "hovle/a_pre", GOLDEN / "hovle/b_post", GOLDEN / "teacher"
PLAIN = ExportOptions()


def tensors_of(directory: pathlib.Path) -> dict[str, tuple]:
    """Every tensor as (dtype, shape, bytes), read by the safetensors library."""
    out = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, x in load_file(path).items():
            out[name] = (str(x.dtype), x.shape, x.tobytes())
    return out


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if a[k] != b[k]] == []


@pytest.mark.parametrize("source", [A_PRE, B_POST], ids=lambda p: p.name)
@pytest.mark.parametrize("size", [5 * 10**9, 200_000], ids=["single", "sharded"])
def test_round_trip_is_byte_for_byte(source, size, tmp_path):
    assert main(["import", str(source), str(tmp_path / "native")]) == 0
    export(tmp_path / "native", tmp_path / "out", ExportOptions(max_shard_bytes=size))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 3) == (size == 200_000)
    assert_same(tensors_of(tmp_path / "out"), tensors_of(source))
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / shards.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(
            len(data) for _, _, data in tensors_of(source).values()
        )
        assert {f.name for f in files} == set(index["weight_map"].values())
        assert max(f.stat().st_size for f in files) < size + 20_000
    # And from the shards in again.
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    assert hovle_jax.load(tmp_path / "again")[0] == dataclasses.replace(
        hovle_jax.load(source)[0], name="out"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_round_trip(dtype, tmp_path):
    import ml_dtypes

    kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(A_PRE / "config.json", source)
    halves = {k: x.astype(kind) for k, x in load_file(A_PRE / "model.safetensors").items()}
    save_file(halves, source / "model.safetensors")
    import_directory(source, tmp_path / "native")
    _, params = hovle_jax.load(tmp_path / "native")
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {dtype}
    export(tmp_path / "native", tmp_path / "out", PLAIN)
    assert_same(tensors_of(tmp_path / "out"), tensors_of(source))
    described = json.loads((tmp_path / "out/config.json").read_text())
    assert described["torch_dtype"] == described["llm_config"]["torch_dtype"] == dtype


def test_a_tensor_of_several_parameters_has_the_widest_dtype(tmp_path):
    """As after training v alone, beside q and k that were kept in bfloat16."""
    import_directory(A_PRE, tmp_path / "native")
    config, params = hovle_jax.load(tmp_path / "native")
    wide = "decoder/layers/attention/v/kernel"
    flat = {k: x if k == wide else x.astype("bfloat16") for k, x in flatten(params).items()}
    assert wide in flat
    checkpoint.save_model(tmp_path / "mixed", config, unflatten(flat))
    export(tmp_path / "mixed", tmp_path / "out", PLAIN)
    again = flatten(hovle_jax.load(tmp_path / "out")[1])
    np.testing.assert_array_equal(again[wide], flat[wide])
    assert {k for k, x in again.items() if x.dtype == "float32"} == {
        k for k in flat if re.fullmatch("decoder/layers/attention/[qkv]/kernel", k)
    }


def test_unused_tensors_come_back(tmp_path):
    """They hold numbers nothing computes: only a copy can bring them back."""
    unused = ("embedding_model.vision_embeddings.class_embedding",)
    unused += ("language_model.model.tok_embeddings.weight",)
    import_directory(A_PRE, tmp_path / "native")
    kept = load_file(tmp_path / "native" / checkpoint.UNUSED)
    source = load_file(A_PRE / "model.safetensors")
    assert set(kept) == set(unused)
    for name in unused:
        assert np.ptp(source[name]) > 0
        np.testing.assert_array_equal(kept[name], source[name])
    assert not any("tok_embeddings" in p for p in flatten(hovle_jax.load(tmp_path / "native")[1]))


def test_export_of_a_run(world, tmp_path):
    """A model trained here, frozen parts and all, is read back as the same function.

    It never had the tensors nothing reads: the LLM's idle table is filled with the holistic one.
    """
    run = world.config("align", steps=1, init__scratch=True)
    train(run, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    export(tmp_path / "run", tmp_path / "out", PLAIN)
    config, params = hovle_jax.load(tmp_path / "run")
    theirs, exported = hovle_jax.load(tmp_path / "out")
    assert theirs == dataclasses.replace(
        config,
        name="out",
        **{k: getattr(theirs, k) for k in ("dtype", "remat", "initializer_range")},
    )
    params, exported = flatten(params), flatten(exported)
    assert params.keys() == exported.keys()
    for path, x in params.items():
        np.testing.assert_array_equal(x, exported[path])
    tensors = load_file(tmp_path / "out/model.safetensors")
    idle = tensors["language_model.model.tok_embeddings.weight"]
    np.testing.assert_array_equal(idle, params["embedding/text/table"])
    assert "Stage `align`, step 1 of 1" in (tmp_path / "out/README.md").read_text()


def test_stages_start_from_hugging_face_directories(world, tmp_path):
    """One config line each: an LLM directory with fewer tokens, and an InternVL's teacher."""
    c = world.model
    small = dataclasses.replace(c, vocab_size=c.vocab_size - 9, llm_family="llama")
    raw = config_json.hovle_json(
        dataclasses.replace(small, llm_family="llama"), DataConfig(), "float32"
    )
    llm = make_directory(tmp_path / "llm", raw["llm_config"], names.language_model(small))
    rows = names.teacher(TEACHER_CONFIG) + names.language_model(
        c, "language_model.model", "language_model."
    )
    vision = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
    }
    raw = {
        "model_type": "internvl_chat",
        "vision_config": vision,
        "llm_config": config_json.hovle_json(c, DataConfig(), "float32")["llm_config"],
        "ps_version": "v2",
    }
    internvl = make_directory(tmp_path / "internvl", raw, rows, seed=1)
    run = world.config(
        "distill",
        init__llm=str(tmp_path / "llm"),
        init__teacher=str(tmp_path / "internvl"),
    )
    mesh = make_mesh(run.mesh, jax.devices()[:1])
    stage = get_stage("distill")
    with pytest.raises(UserError, match="grow_vocab=True to add 9"):
        initial_params(run, stage, mesh)
    run = dataclasses.replace(run, init=dataclasses.replace(run.init, grow_vocab=True))
    params = flatten(initial_params(run, stage, mesh))
    table, old = np.asarray(params["embedding/text/table"]), llm["model.embed_tokens.weight"]
    np.testing.assert_array_equal(table[:-9], old)
    new = table[-9:]
    assert np.abs(new - old.mean(0)).max() < 0.6 * old.std() and np.ptp(new, axis=0).min() > 0
    found = flatten(teacher_params(run, mesh))
    scale = internvl["vision_model.encoder.layers.1.ls2"]
    np.testing.assert_array_equal(found["layers/ls2/scale"][1], scale)
    wrong = dataclasses.replace(run.model.decoder, rope_theta=1e4)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=wrong))
    with pytest.raises(UserError, match="config.model.decoder.rope_theta is 10000.0, but"):
        initial_params(run, stage, mesh)


def test_stages_go_on_from_a_released_model(world, tmp_path):
    """Stage III from all of it, imported; stage I from its LLM, which is a part of it."""
    native = str(tmp_path / "native")
    import_directory(A_PRE, native)
    config, params = hovle_jax.load(native)
    released = flatten(params)

    def start(name: str, **init: object) -> dict:
        sizes = {"model": config, "teacher__out_size": config.hidden_size}
        run = world.config(name, init=InitConfig(**init), **sizes)
        stage = get_stage(name)
        check_order(run, stage)
        return flatten(initial_params(run, stage, make_mesh(run.mesh, jax.devices()[:1])))

    for previous in (native, str(A_PRE)):
        found = start("instruct", previous=previous)
        assert found.keys() == released.keys()
        for path, x in found.items():
            np.testing.assert_array_equal(x, released[path])
    distil, table = start("distill", llm=str(A_PRE)), "embedding/text/table"
    np.testing.assert_array_equal(distil[table], released[table])
    layer = "embedding/layers/mlp/up/kernel"
    assert np.any(distil[layer] != released[layer]), "the module begins anew"


def test_config_survives(tmp_path):
    for source in (A_PRE, B_POST):
        out = tmp_path / source.name
        import_directory(source, out)
        export(out, tmp_path / f"{source.name}_hf", PLAIN)
        ours = json.loads((tmp_path / f"{source.name}_hf/config.json").read_text())
        theirs = json.loads((source / "config.json").read_text())
        assert ours["model_type"] == "hovle"  # no engine may take it for an InternVL
        for section in ("embedding_config", "llm_config"):
            same = set(ours[section]) & set(theirs[section])
            different = {k for k in same if ours[section][k] != theirs[section][k]}
            assert different <= {"torch_dtype"}, (section, different)
        for key in ("template", "use_thumbnail", "max_dynamic_patch", "normalize_encoder_output"):
            assert ours[key] == theirs[key]


def make_directory(path: pathlib.Path, raw: dict, rows: list[names.Row], seed: int = 0) -> dict:
    """A Hugging Face directory of random tensors, as `rows` lay them out."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.standard_normal(row.shape).astype(np.float32)
        for row in rows
        for name in row.tensors
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    save_file(tensors, path / "model.safetensors")
    return tensors


LAYERS = LayersConfig(
    num_layers=2,
    hidden_size=24,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=40,
)
LLM = ModelConfig(vocab_size=50, decoder=LAYERS, embedding=LAYERS, image_size=28, img_context_id=43)


def llm_raw(family: str, **more: object) -> dict:
    """config.json as transformers writes it (key names of its config classes)."""
    classes = {
        "internlm2": "InternLM2ForCausalLM",
        "llama": "LlamaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
    }
    return {
        "architectures": [classes[family]],
        "model_type": family,
        "vocab_size": 50,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | more


# Tensors of one layer by family; q [24, 24], k and v [8, 24].
LLAMA_LAYER = {
    "input_layernorm.weight": (24,),
    "self_attn.q_proj.weight": (24, 24),
    "self_attn.k_proj.weight": (8, 24),
    "self_attn.v_proj.weight": (8, 24),
    "self_attn.o_proj.weight": (24, 24),
    "post_attention_layernorm.weight": (24,),
    "mlp.gate_proj.weight": (40, 24),
    "mlp.up_proj.weight": (40, 24),
    "mlp.down_proj.weight": (24, 40),
}
LLAMA_REST = {
    "model.embed_tokens.weight": (50, 24),
    "model.norm.weight": (24,),
    "lm_head.weight": (50, 24),
}
QWEN2_BIAS = {f"self_attn.{p}_proj.bias": (n,) for p, n in (("q", 24), ("k", 8), ("v", 8))}


def llm_tensors(layer: dict, rest: dict, prefix: str = "model.") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = rest | {f"{prefix}layers.{i}.{k}": v for i in range(2) for k, v in layer.items()}
    return {k: rng.standard_normal(v).astype(np.float32) for k, v in shapes.items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_tied"])
def test_llm_directories(family, tmp_path):
    """Imported twice: through the native directory and straight from the file, equal numbers."""
    name = family.split("_")[0]
    raw = llm_raw(name, tie_word_embeddings=family == "qwen2_tied")
    tensors = llm_tensors(LLAMA_LAYER | (QWEN2_BIAS if name == "qwen2" else {}), LLAMA_REST)
    if family == "qwen2_tied":
        del tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)  # ignored
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(raw))
    save_file(tensors, source / "model.safetensors")
    (directory,) = import_directory(source, tmp_path / "native")
    config, params = hovle_jax.load(directory)
    flat = {k: np.asarray(v) for k, v in flatten(params).items()}
    assert config.llm_family == name and config.decoder.num_layers == 2
    assert config.decoder.qkv_bias == (name == "qwen2") and not config.decoder.out_bias
    expected = {k for k in flatten(model.abstract_params(config)) if k.startswith("decoder/")}
    assert set(flat) == expected | {"embedding/text/table"}
    k1 = tensors["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(flat["decoder/layers/attention/k/kernel"][1][:, 1], k1[4:8].T)
    o0 = tensors["model.layers.0.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(flat["decoder/layers/attention/o/kernel"][0][5, 3], o0[:, 23])
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(flat["decoder/head/kernel"], head.T)
    np.testing.assert_array_equal(
        flat["embedding/text/table"], tensors["model.embed_tokens.weight"]
    )
    direct = flatten(hovle_jax.load(source)[1])
    for path, x in direct.items():
        np.testing.assert_array_equal(flat[path], x)


@pytest.mark.parametrize("layout", ["custom", "transformers", "transformers, outer model."])
def test_internvl_has_two_parts(layout, tmp_path):
    vision = TeacherConfig(
        num_layers=2,
        hidden_size=24,
        num_heads=4,
        intermediate_size=40,
        image_size=28,
        out_size=24,
        qk_norm=True,
    )
    if layout == "custom":
        rows = names.teacher(vision)
        rows += names.language_model(LLM, "language_model.model", "language_model.")
        raw = {
            "model_type": "internvl_chat",
            "llm_config": llm_raw("internlm2"),
            "vision_config": {"num_hidden_layers": 2, "qk_normalization": True},
            "ps_version": "v2",
        }
        raw["vision_config"] |= {"image_size": 28, "patch_size": 14}
    else:
        outer = layout.endswith("model.")
        llm = dataclasses.replace(LLM, llm_family="llama")
        body, head = ("model.language_model", "") if outer else ("language_model.model", "")
        head = "" if outer else "language_model."
        rows = names.teacher(
            vision, names.TEACHER_NAMES_TRANSFORMERS, "model." if outer else ""
        ) + names.language_model(llm, body, head)
        raw = {
            "model_type": "internvl",
            "text_config": llm_raw("llama"),
            "vision_config": {"num_hidden_layers": 2, "use_qk_norm": True, "attention_bias": True},
            "image_token_id": 43,
        }
        raw["vision_config"] |= {"image_size": [28, 28], "patch_size": [14, 14]}
    raw["vision_config"] |= {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40}
    tensors = make_directory(tmp_path / "hf", raw, rows)
    llm_dir, teacher_dir = sorted(import_directory(tmp_path / "hf", tmp_path / "native"))
    assert (llm_dir.name, teacher_dir.name) == ("llm", "teacher")
    stored, params = checkpoint.load(teacher_dir, "teacher")
    assert stored.config == vision
    flat = flatten(params)
    assert set(flat) == set(flatten(teacher.abstract_params(vision)))
    scale = next(k for k in tensors if k.endswith(("layers.1.ls1", "layer.1.lambda_1")))
    np.testing.assert_array_equal(flat["layers/ls1/scale"][1], tensors[scale])
    config, params = hovle_jax.load(llm_dir)
    assert config.img_context_id == 43
    assert "decoder/head/kernel" in flatten(params)


def copy_of(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".safetensors"):
            shutil.copy(path, target)
    return target


def edited(target: pathlib.Path, change) -> pathlib.Path:
    """A copy of A_PRE whose tensors `change` has edited."""
    copy_of(A_PRE, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


NORM = "language_model.model.norm.weight"


def missing(t: dict) -> None:
    del t[NORM]


def misshaped(t: dict) -> None:
    t[NORM] = t[NORM][:-1]


def extra(t: dict) -> None:
    t["lora_a"] = np.ones((3, 4), np.float32)


def integers(t: dict) -> None:
    t[NORM] = t[NORM].astype(np.int8)


def mixed(t: dict) -> None:
    name = "embedding_model.encoder.1.ffn_norm.weight"
    t[name] = t[name].astype(np.float16)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (missing, f"1 tensor missing: {NORM} (expected [64])"),
        (misshaped, f"1 tensor of another shape: {NORM} is [63], expected [64]"),
        (extra, "1 tensor not expected: lora_a [3, 4]"),
        (integers, f"1 tensor of another dtype: {NORM} is I8, expected F32, BF16 or F16"),
        (mixed, "encoder.{i}.ffn_norm.weight is F16 and F32, expected one dtype"),
    ],
)
def test_bad_tensors_are_named(change, expected, tmp_path, one_line_error):
    source = edited(tmp_path / "hf", change)
    assert expected in one_line_error(["import", str(source), str(tmp_path / "out")])
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def sharded(tmp_path: pathlib.Path) -> pathlib.Path:
    export(A_PRE, tmp_path / "hf", ExportOptions(max_shard_bytes=300_000))
    return tmp_path / "hf"


def test_truncated_shard(tmp_path, one_line_error):
    source = sharded(tmp_path)
    shard = sorted(source.glob("*.safetensors"))[1]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    message = one_line_error(["import", str(source), str(tmp_path / "out")])
    assert shard.name in message and "truncated" in message
    with shard.open("r+b") as file:
        file.truncate(5)
    assert "truncated" in one_line_error(["import", str(source), str(tmp_path / "out")])
    shard.unlink()
    assert f"{shard.name}: missing" in one_line_error(
        ["import", str(source), str(tmp_path / "out")]
    )
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


def test_files_that_contradict_each_other(tmp_path, one_line_error):
    """Which of two files is meant cannot be guessed; an adapter beside the weights is ignored."""
    source = copy_of(A_PRE, tmp_path / "hf")
    save_file({"lora": np.ones(3, np.float32)}, source / "adapter_model.safetensors")
    assert main(["import", str(source), str(tmp_path / "out")]) == 0
    (source / shards.INDEX).write_text("{}")
    message = one_line_error(["import", str(source), str(tmp_path / "again")])
    assert "both model.safetensors and model.safetensors.index.json" in message
    (source / shards.INDEX).unlink()
    shutil.copy(source / "model.safetensors", source / "a.safetensors")
    (source / "model.safetensors").rename(source / "b.safetensors")
    message = one_line_error(["import", str(source), str(tmp_path / "again")])
    assert "is also in a.safetensors" in message


@pytest.mark.parametrize("dtype", ["", "float32", "bfloat16"])
def test_verify_notices_a_wrong_export(dtype, tmp_path, monkeypatch):
    """One zeroed tensor in what was written: an error, and nothing is kept."""
    write = shards.ShardWriter.write

    def lossy(self, name, x):
        write(self, name, np.zeros_like(x) if name.endswith("1.attention.wo.weight") else x)

    monkeypatch.setattr(shards.ShardWriter, "write", lossy)
    with pytest.raises(UserError, match="scores differ"):
        export(A_PRE, tmp_path / "out", ExportOptions(dtype=dtype), verify=True)
    assert list(tmp_path.iterdir()) == []


def test_verify_reads_each_tensor_once(tmp_path, monkeypatch):
    """Beside the one reading that writes; PyTorch's part of the check included."""
    reads = collections.Counter()
    read = shards.read_tensor

    def counted(tensor):
        reads[tensor.file.parent.name, tensor.start] += 1
        return read(tensor)

    monkeypatch.setattr("hovle_jax.hf.reader.read_tensor", counted)
    monkeypatch.setattr(live, "available", lambda: True)

    def torch_outputs(directory, prompts):
        words = open_directory(directory).parts["model"].config.vocab_size
        zeros = {k: np.zeros((len(prompts[f"ids.{k}"]), words), np.float32) for k in live.TILES}
        return {f"logits.{k}": x for k, x in zeros.items()}

    monkeypatch.setattr(live, "torch_outputs", torch_outputs)
    with pytest.raises(UserError, match="PyTorch disagrees"):
        export(A_PRE, tmp_path / "out", PLAIN, verify=True)
    by_directory = {name: set() for name, _ in reads}
    for (name, _), count in reads.items():
        by_directory[name].add(count)
    assert by_directory == {"a_pre": {2}, "out.partial": {1}}


@pytest.mark.parametrize("edit", ["entry gone", "entry wrong", "not an index"])
def test_index_that_disagrees(edit, tmp_path, one_line_error):
    source = sharded(tmp_path)
    body = json.loads((source / shards.INDEX).read_text())
    if edit == "entry gone":
        del body["weight_map"][NORM]
    elif edit == "entry wrong":
        body["weight_map"]["made.up"] = body["weight_map"][NORM]
    else:
        body = {"weights": 1}
    (source / shards.INDEX).write_text(json.dumps(body))
    message = one_line_error(["import", str(source), str(tmp_path / "out")])
    assert shards.INDEX in message
    assert {"entry gone": NORM, "entry wrong": "made.up", "not an index": "index"}[edit] in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"embedding_config": None}, "neither embedding_config"),
        ({"embedding_config": None, "model_type": "llava"}, "model_type 'llava' is not HoVLE"),
        (
            {"embedding_config": None, "model_type": "llava", "vision_config": {}},
            "model_type 'llava' is not HoVLE, InternVL, ",
        ),
        ({"embedding_config.use_ls": True}, "use_ls"),
        ({"embedding_config.image_size": None}, "has no key 'image_size'"),
        ({"llm_config.rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"llm_config.hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"llm_config.architectures": ["Phi3ForCausalLM"]}, "'Phi3ForCausalLM'"),
    ],
)
def test_bad_configs_are_named(change, expected, tmp_path, one_line_error):
    source = copy_of(A_PRE, tmp_path / "hf")
    raw = json.loads((source / "config.json").read_text())
    for key, value in change.items():
        node, *rest = key.split(".")
        target, leaf = (raw[node], rest[0]) if rest else (raw, node)
        if value is None:
            del target[leaf]
        else:
            target[leaf] = value
    (source / "config.json").write_text(json.dumps(raw))
    message = one_line_error(["import", str(source), str(tmp_path / "out")])
    assert expected in message and "config.json" in message


def test_fused_is_the_same_function(tmp_path):
    """Both stacks under Llama's names; read back, every parameter is where it was."""
    export(A_PRE, tmp_path / "fused", ExportOptions(flavour="fused"))
    found = set(load_file(tmp_path / "fused/model.safetensors"))
    assert {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(5)} <= found
    assert "model.layers.5.self_attn.q_proj.weight" not in found
    assert not [n for n in found if "class_embedding" in n or "tok_embeddings" in n]
    config, params = hovle_jax.load(tmp_path / "fused")
    theirs, expected = hovle_jax.load(A_PRE)
    assert config == dataclasses.replace(theirs, name="fused")
    expected = flatten(expected)
    for path, x in flatten(params).items():
        np.testing.assert_array_equal(x, expected[path])
    assert flatten(params).keys() == expected.keys()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shuffle_loc": "post"}, "shuffle_loc"),
        ({"normalize_embeddings": True}, "normalize_embeddings"),
        ({"special_tokens": 3}, "special-token table"),
        ({"decoder": dataclasses.replace(LAYERS, rope_scaling="dynamic")}, "dynamic rope"),
        ({"decoder": dataclasses.replace(LAYERS, rope_theta=1e4)}, "rope_theta is 1000000.0"),
        ({"decoder": dataclasses.replace(LAYERS, rms_norm_eps=1e-6)}, "rms_norm_eps"),
        ({"decoder": dataclasses.replace(LAYERS, qkv_bias=True)}, "biases"),
        ({"decoder": dataclasses.replace(LAYERS, num_kv_heads=6)}, "num_kv_heads"),
        ({"embedding": dataclasses.replace(LAYERS, mask="prefix")}, "attention is causal"),
        ({"decoder": dataclasses.replace(LAYERS, positions="2d")}, "positions are 1-D"),
    ],
)
def test_fused_refuses_what_is_not_exact(change, reason):
    config = dataclasses.replace(LLM, **change)
    with pytest.raises(UserError, match="not exact") as error:
        config_json.fused_json(config, DataConfig(), "float32")
    assert reason in str(error.value)


@pytest.mark.parametrize("change", [{"mask": "bidirectional"}, {"positions": "3d"}])
def test_transformers_own_llm_is_plain(change):
    config = dataclasses.replace(
        LLM, llm_family="llama", decoder=dataclasses.replace(LAYERS, **change)
    )
    with pytest.raises(UserError, match="exports of family 'llama' run transformers' own LLM"):
        config_json.hovle_json(config, DataConfig(), "float32")


def test_fused_head_is_never_tied():
    """The files of a tied LLM keep its head as its table; a fused one has both matrices."""
    body = config_json.fused_json(dataclasses.replace(LLM, tie_head=True), DataConfig(), "float32")
    assert body["text_config"]["tie_word_embeddings"] is False


def test_dtype_option(tmp_path):
    """Rounded, and by `verify` the same function as the source rounded."""
    export(A_PRE, tmp_path / "out", ExportOptions(dtype="bfloat16"), verify=True)
    out = shards.open_shards(tmp_path / "out")
    assert {t.code for t in out.values()} == {"BF16"}
    source = load_file(A_PRE / "model.safetensors")
    x = shards.read_tensor(out[NORM])
    np.testing.assert_array_equal(x, source[NORM].astype(x.dtype))


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("200mb", 2 * 10**8), ("0.5 GB", 5 * 10**8)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


def test_bad_sizes():
    for text in ("5", "GB", "5TB", ""):
        with pytest.raises(UserError, match="max-shard-size"):
            parse_size(text)


def test_hub_directory_says_what_it_holds():
    hub = open_directory(TEACHER)
    assert set(hub.parts) == {"teacher", "model"}
    with pytest.raises(UserError, match="no teacher"):
        open_directory(A_PRE).part("teacher")
