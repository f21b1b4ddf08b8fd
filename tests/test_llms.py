"""LLM families against transformers' own modules: small random weights, scores within 1e-4.

The default run reads what transformers wrote and computed (tests/golden/llm, by MAKE below). Marked
`torch`: the same made anew, and exports with each family inside, in processes without jax.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hovle_jax
from hovle_jax import checkpoint, model
from hovle_jax.cli.main import main
from hovle_jax.errors import UserError
from hovle_jax.hf import live
from hovle_jax.hf.configs import llm_config
from hovle_jax.hf.families import FAMILIES
from hovle_jax.hf.section import Section
from hovle_jax.hf.verify import Verifier
from hovle_jax.hf.writer import ExportOptions, write_directory
from tests.test_combinations import BASE, EXAMPLES, config_of, params_of
from tests.test_torch import run_alone

GOLDEN = pathlib.Path(__file__).parent / "golden" / "llm"
RECORDED = ("llama", "qwen2", "qwen3")
COMMON = {
    **{"vocab_size": 48, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 32},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
}
# Name -> (transformers' name, its settings)
MADE = {
    "llama": ("Llama", {"attention_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3 with biases": ("Qwen3", {"head_dim": 10, "attention_bias": True}),
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": None}),
}
MAKE = """
import json, pathlib
import numpy as np, torch, transformers
kind, settings, out = sys.argv[1], json.loads(sys.argv[2]), pathlib.Path(sys.argv[3])
torch.manual_seed(0)
config = getattr(transformers, kind + "Config")(**settings)
model = getattr(transformers, kind + "ForCausalLM")(config).eval()
with torch.no_grad():
    for name, p in model.named_parameters():
        p.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    ids = torch.randint(3, 48, (2, 16))
    logits = model(input_ids=ids).logits
model.save_pretrained(out)
(out / "generation_config.json").unlink(missing_ok=True)
np.savez_compressed(out / "io.npz", ids=ids.numpy().astype(np.int32), logits=logits.numpy())
"""


def difference(directory: pathlib.Path) -> float:
    """Between our scores and those beside the weights."""
    config, params = hovle_jax.load(directory)
    config = dataclasses.replace(config, dtype="float32", remat="none")
    assert (
        config.params() > 0
        and config.decoder.head_dim
        == params["decoder"]["layers"]["attention"]["q"]["kernel"].shape[-1]
    )
    with np.load(directory / "io.npz") as z:
        x = model.language_hidden(params, {"input_ids": z["ids"]}, config)
        assert np.ptp(z["logits"]) > 1
        return float(np.abs(np.asarray(model.logits(params, x)) - z["logits"]).max())


@pytest.mark.parametrize("name", RECORDED)
def test_scores_of_transformers(name):
    config = checkpoint.open_stored(GOLDEN / name).model
    assert config.llm_family == name and config.tie_head == (name == "qwen3")
    flags = {"llama": (True, True, False), "qwen2": (True, False, False)}.get(
        name, (False, False, True)
    )
    assert (config.decoder.qkv_bias, config.decoder.out_bias, config.decoder.qk_norm) == flags
    assert difference(GOLDEN / name) < 1e-4


@pytest.mark.parametrize("name", MADE)
@pytest.mark.torch
@pytest.mark.skipif(not live.available(), reason="needs torch and transformers")
def test_scores_of_transformers_made_now(name, tmp_path):
    kind, settings = MADE[name]
    run_alone(MAKE, kind, json.dumps(COMMON | settings), tmp_path / "made", cache=tmp_path / "hf")
    assert difference(tmp_path / "made") < 1e-4
    if name in RECORDED:
        with np.load(tmp_path / "made/io.npz") as new, np.load(GOLDEN / name / "io.npz") as old:
            np.testing.assert_array_equal(new["ids"], old["ids"])
            np.testing.assert_allclose(new["logits"], old["logits"], atol=1e-5)


@pytest.mark.parametrize(
    "name", [k for k in (*FAMILIES, "qwen3, wide heads, norms in both stacks") if k != "internlm2"]
)
@pytest.mark.torch
@pytest.mark.skipif(not live.available(), reason="needs torch and transformers")
def test_exports_with_the_family_inside(name, tmp_path):
    """Scores within 1e-4 and the same greedy tokens, with transformers' cache."""
    checkpoint.save_model(tmp_path / "native", config_of(name), params_of(name))
    write_directory(tmp_path / "native", tmp_path / "out", ExportOptions())
    report = live.compare_live(Verifier(tmp_path / "native", "float32"), tmp_path / "out")
    assert report.passed, report


def test_flags_of_a_family_are_read_and_written_back():
    for name, family in FAMILIES.items():
        flags = {flag: True for flag in family.flags}
        layers = dataclasses.replace(BASE.decoder, **flags)
        written = family.write(name, layers)
        assert {k: v for k, v in family.read(Section(written)).items() if v} == flags
        assert ("head_dim" in written) == family.head_dim
        wrong = dataclasses.replace(layers, qk_norm=not layers.qk_norm)
        with pytest.raises(UserError, match=rf"decoder.qk_norm is .* in an LLM of family '{name}'"):
            family.write(name, wrong)


def test_what_a_family_cannot_say_is_refused():
    raw = json.loads((GOLDEN / "qwen3/config.json").read_text())
    assert llm_config(Section(raw)).llm_family == "qwen3"
    mistral = raw | {"architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    with pytest.raises(UserError, match="^sliding_window: expected None, got 4096"):
        llm_config(Section(mistral))
    with pytest.raises(UserError, match="'GemmaForCausalLM' is not one of InternLM2.*Qwen3.*plug"):
        llm_config(Section(raw | {"architectures": ["GemmaForCausalLM"]}))
    wide = dataclasses.replace(BASE.decoder, head_dim=12)
    with pytest.raises(UserError, match="num_heads x head_dim is not hidden_size"):
        FAMILIES["internlm2"].write("internlm2", wide)


def test_a_family_of_a_plugin_is_imported(tmp_path, one_line_error):
    """The import is told the file, and the model remembers it."""
    source = tmp_path / "mistral"
    shutil.copytree(GOLDEN / "llama", source)
    raw = json.loads((source / "config.json").read_text())
    flags = {"attention_bias": False, "sliding_window": None}
    names = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (source / "config.json").write_text(json.dumps(raw | flags | names))
    tensors = load_file(source / "model.safetensors")
    plain = {k: x for k, x in tensors.items() if not k.endswith("bias")}
    save_file(plain, source / "model.safetensors")
    plugin = str(EXAMPLES / "llm_family.py")
    assert main(["import", str(source), str(tmp_path / "out"), "--plugin", plugin]) == 0
    stored = checkpoint.open_stored(tmp_path / "out")
    assert (stored.model.llm_family, stored.model.plugins) == ("mistral", (plugin,))
    nothing = one_line_error(["import", str(source), str(tmp_path / "x"), "--plugin", "no.py"])
    assert "model.plugins" in nothing


def test_norms_of_q_and_k_do_something():
    """They normalise: scaling the projections of q changes nothing, without them it does."""
    config, params = config_of("qwen3"), params_of("qwen3")
    ids = np.arange(3, 19, dtype=np.int32)[None]
    louder = jax.tree_util.tree_map_with_path(
        lambda path, x: 10 * x if "['attention']['q']" in jax.tree_util.keystr(path) else x, params
    )

    def hidden(params, config):
        return np.asarray(model.language_hidden(params, {"input_ids": ids}, config))

    plain = hidden(params, config)
    np.testing.assert_allclose(hidden(louder, config), plain, atol=1e-3)
    without = dataclasses.replace(
        config, decoder=dataclasses.replace(config.decoder, qk_norm=False)
    )
    assert np.abs(hidden(louder, without) - plain).max() > 0.1
