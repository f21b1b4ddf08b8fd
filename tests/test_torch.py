"""The exported directories in PyTorch and transformers, in processes without jax and without us.

Marked `torch`: needs `pip install '.[hf]'` (torch 2.13.0 and any transformers from 4.56 on).
"""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax import model
from hovle_jax.checkpoint import open_stored
from hovle_jax.cli.main import main
from hovle_jax.data.chat import encode_prompt
from hovle_jax.data.records import Record, Turn
from hovle_jax.data.samples import Tiler, get_template
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.hf import live
from hovle_jax.hf.export import export
from hovle_jax.hf.verify import Verifier
from hovle_jax.hf.writer import ExportOptions
from hovle_jax.nn.embedding import normalize_pixels
from hovle_jax.train import train

GOLDEN = pathlib.Path(__file__).parent / "golden"
MODELS = {"pre": GOLDEN / "hovle/a_pre", "post": GOLDEN / "hovle/b_post"}

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(not live.available(), reason="needs torch and transformers"),
]


def run_alone(code: str, *args: object, cache: pathlib.Path) -> str:
    """Runs Python that must not import jax or this package; returns what it prints."""
    hide = "import sys; sys.modules.update(jax=None, flax=None, hovle_jax=None)\n"
    run = subprocess.run(
        [sys.executable, "-P", "-c", hide + code, *map(str, args)],
        env={"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
        cwd="/",
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.parametrize(
    ("name", "flavour"), [("pre", "reference"), ("post", "reference"), ("pre", "fused")]
)
def test_scores_and_greedy_tokens(name, flavour, tmp_path):
    """Text, one and three tiles: scores within 1e-4 of ours, `generate` with its cache the same."""
    out = tmp_path / "out"
    export(MODELS[name], out, ExportOptions(flavour=flavour), verify=True)
    report = (
        live.compare_live(Verifier(MODELS[name], "float32"), out)
        if flavour == "reference"
        else None
    )
    checks = json.loads((out / "verification.json").read_text())["checks"]
    assert max(checks["scores here, source and export, largest difference by tiles"].values()) == 0
    if report is not None:
        assert report.passed
        assert [a.name for a in report.arrays] == [
            f"{what}, {n} tiles" for n in (0, 1, 3) for what in ("logits", "greedy tokens")
        ]


STACKS = {
    "embedding_config": {"image_mask": "bidirectional", "image_positions": "3d"},
    "llm_config": {"image_mask": "prefix", "image_positions": "2d"},
}


def with_stacks(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """A copy of a directory whose embedding layers and LLM have other masks and positions."""
    shutil.copytree(source, target)
    raw = json.loads((target / "config.json").read_text())
    for name, keys in STACKS.items():
        raw[name] |= keys
    (target / "config.json").write_text(json.dumps(raw))
    return target


@pytest.mark.parametrize("name", MODELS)
def test_masks_and_positions(name, tmp_path):
    """As here: scores, and greedy tokens from the cache; they are not those of a causal model."""
    source = with_stacks(MODELS[name], tmp_path / "source")
    export(source, tmp_path / "out", ExportOptions(), verify=True)
    checks = json.loads((tmp_path / "out" / "verification.json").read_text())["checks"]
    assert max(checks["PyTorch against here"].values()) < 1e-4
    plain = live.compare_live(Verifier(MODELS[name], "float32"), tmp_path / "out")
    assert [a.passed for a in plain.arrays if a.name.startswith("logits")] == [True, False, False]


PADDED = """
import numpy as np, torch
from transformers import AutoModelForCausalLM
given = np.load(sys.argv[2])
def load(**how):
    here = dict(trust_remote_code=True, local_files_only=True)
    return AutoModelForCausalLM.from_pretrained(sys.argv[1], **here, **how).eval()
rows = [torch.from_numpy(given[f"ids.{n}"]) for n in (1, 3)]
pixels = [torch.from_numpy(given[f"pixels.{n}"]) for n in (1, 3)]
width = max(map(len, rows))
ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=2) for row in rows])
mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
model, options = load(), dict(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=2)
with torch.no_grad():
    whole = model(input_ids=ids, attention_mask=mask, pixel_values=torch.cat(pixels)).logits
    eager = load(attn_implementation="eager")
    also = eager(input_ids=ids, attention_mask=mask, pixel_values=torch.cat(pixels)).logits
    both = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=torch.cat(pixels), **options
    )
    for i, row in enumerate(rows):
        alone = model(input_ids=row[None], pixel_values=pixels[i]).logits[0]
        print(float((whole[i, width - len(row) :] - alone).abs().max()))
        print(float((also[i, width - len(row) :] - alone).abs().max()))
        one = model.generate(input_ids=row[None], pixel_values=pixels[i], **options)
        print(int((one[0, len(row) :] != both[i, width:]).sum()))
        # Its end repeats: guessed to go on as before, and what is refused is cut off the cache.
        again = dict(input_ids=torch.cat([row, row[-6:-2]])[None], pixel_values=pixels[i])
        guessed = model.generate(**again, prompt_lookup_num_tokens=2, **options)
        print(int((model.generate(**again, **options) != guessed).sum()))
model.config.embedding_config._attn_implementation = "flash_attention_2"
for call in (
    dict(input_ids=rows[0][None], pixel_values=pixels[0]),
    dict(inputs_embeds=torch.zeros(1, 4, model.config.embedding_config.hidden_size)),
):
    try:
        model(**call)
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("name", MODELS)
def test_padded_prompts_and_what_cannot_be_masked(name, tmp_path):
    source = with_stacks(MODELS[name], tmp_path / "source")
    export(source, tmp_path / "out", ExportOptions())
    np.savez(tmp_path / "in.npz", **live.made_up_prompts(open_stored(source).model))
    printed = run_alone(PADDED, tmp_path / "out", tmp_path / "in.npz", cache=tmp_path / "hf")
    *numbers, flash, embeds = printed.splitlines()[-10:]
    assert max(map(float, numbers)) < 1e-4
    assert "needs attn_implementation eager, sdpa or flex" in flash
    assert "follows from input_ids" in embeds


def test_live_from_the_command_line(tmp_path, capsys):
    export(MODELS["pre"], tmp_path / "out", ExportOptions())
    assert main(["verify", str(MODELS["pre"]), "--live", str(tmp_path / "out")]) == 0
    assert main(["verify", str(MODELS["post"]), "--live", str(tmp_path / "out")]) == 1
    assert "MISS" in capsys.readouterr().out


LLAMA = """
import numpy as np, torch
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained(sys.argv[1], local_files_only=True).eval()
ids = torch.from_numpy(np.load(sys.argv[2])["ids.0"])[None]
with torch.no_grad():
    np.save(sys.argv[3], model(input_ids=ids).logits[0].numpy())
"""


def test_fused_text_half_is_a_plain_llama(tmp_path):
    export(MODELS["pre"], tmp_path / "out", ExportOptions(flavour="fused"))
    config, params = Verifier(MODELS["pre"], "float32").whole_model()
    prompts = live.made_up_prompts(config)
    np.savez(tmp_path / "in.npz", **prompts)
    run_alone(
        LLAMA, tmp_path / "out", tmp_path / "in.npz", tmp_path / "out.npy", cache=tmp_path / "hf"
    )
    ids = jnp.asarray(prompts["ids.0"][None], jnp.int32)
    ours = np.asarray(model.apply(params, {"input_ids": ids}, config)["logits"])[0]
    assert np.abs(np.load(tmp_path / "out.npy") - ours).max() < 1e-4


ALL_OF_IT = """
import json
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
here = dict(trust_remote_code=True, local_files_only=True)
directory, image = sys.argv[1:3]
processor = AutoProcessor.from_pretrained(directory, **here)
tokenizer = AutoTokenizer.from_pretrained(directory, **here)
assert AutoModel.from_pretrained(directory, **here).config.model_type == "hovle"
model = AutoModelForImageTextToText.from_pretrained(directory, **here).eval()
content = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
text = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True
)
inputs = processor(images=[Image.open(image)], text=text, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=-1)
assert tokenizer("red")["input_ids"] == processor.tokenizer("red")["input_ids"]
import numpy as np
np.save(sys.argv[3], inputs["pixel_values"].numpy())
print(json.dumps({
    "ids": inputs["input_ids"][0].tolist(),
    "tiles": inputs["pixel_values"].shape[0],
    "tokens": output[0, inputs["input_ids"].shape[1]:].tolist(),
}))
"""


def test_processor_tokenizer_and_model_together(world, tmp_path):
    """A run's export, from picture and question to tokens, is what this package makes of them."""
    config = world.config("align", steps=2, init__scratch=True)
    train(config, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    export(tmp_path / "run", tmp_path / "out", ExportOptions())
    image = world.root / "images/03.jpg"
    pixels = tmp_path / "pixels.npy"
    printed = run_alone(ALL_OF_IT, tmp_path / "out", image, pixels, cache=tmp_path / "hf")
    theirs = json.loads(printed.splitlines()[-1])
    tokenizer = Tokenizer.load(tmp_path / "out")
    ids = encode_prompt(
        [Turn("user", "<image>\nWhich colour?")],
        [theirs["tiles"]],
        tokenizer,
        get_template(config.data.template),
        tokens_per_tile=world.model.tokens_per_tile,
        system=config.data.system,
    )
    assert theirs["ids"] == ids.tolist()
    record = Record((), (str(image),), "the image")
    (tiles,) = Tiler(world.model, config.data, None).tiles(record)
    normalised = np.moveaxis(np.asarray(normalize_pixels(jnp.asarray(tiles), jnp.float32)), -1, 1)
    np.testing.assert_allclose(np.load(tmp_path / "pixels.npy"), normalised, atol=1e-6)
    verifier = Verifier(tmp_path / "run", "float32")
    assert verifier.greedy([ids], [tiles], 6)[0] == theirs["tokens"]
