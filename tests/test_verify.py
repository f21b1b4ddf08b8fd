"""`hovle verify` passes what is right and notices what is not."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hovle_jax.cli import main
from hovle_jax.hf.cases import GRADIENTS, LOSSES, STATES
from hovle_jax.hf.verify import Verifier

GOLDEN = pathlib.Path(__file__).parent / "golden"
A_PRE, B_POST = GOLDEN / "hovle/a_pre", GOLDEN / "hovle/b_post"
TEXT, IMAGE = GOLDEN / "hovle/full/a_pre_text.npz", GOLDEN / "hovle/full/b_post_img1.npz"


@pytest.fixture(scope="module")
def a_pre() -> Verifier:
    return Verifier(A_PRE)


@pytest.mark.parametrize(
    ("model", "case", "recorded"), [(A_PRE, TEXT, 17), (B_POST, IMAGE, 20)], ids=["pre", "post"]
)
def test_recorded_cases_pass(model, case, recorded, tmp_path, capsys):
    """From the command line, as the reference wrote them."""
    report = tmp_path / "report.json"
    assert main(["verify", str(model), str(case), "--json", str(report)]) == 0
    body = json.loads(report.read_text())
    (found,) = body["cases"]
    assert body["passed"] and found["passed"] and found["case"] == str(case)
    arrays = {a["name"]: a for a in found["arrays"]}
    names = {name.split("[")[0] for name in arrays}
    with np.load(case) as z:
        outputs = {k for k in z.files if k.startswith(("out.", "grad.full.", "gradw.full."))}
    assert outputs <= names and len(names) >= recorded
    assert {"grad.norms", "gradw.norms", "gen.tokens"} <= names
    assert arrays["out.logits"]["tolerance"] == STATES
    assert arrays["out.loss"]["tolerance"] == LOSSES
    assert all(a["tolerance"] == GRADIENTS for n, a in arrays.items() if "full" in n)
    assert arrays["gen.tokens"]["tolerance"] == 0
    assert found["skipped"] == []
    assert "MISS" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "key",
    [
        "out.embed_layer_0",
        "out.llm_layer_1",
        "out.logits",
        "out.loss",
        "out.loss_weighted",
        "out.loss_weighted_all",
        "grad.norms",
        "gradw.norms",
        "grad.full.embedding_model.encoder.0.attention.wqkv.weight",
        "gen.tokens",
    ],
)
def test_each_recorded_output_is_looked_at(key, a_pre, tmp_path):
    """Change one thing in the recording: that one misses, and nothing else."""
    with np.load(TEXT) as z:
        arrays = dict(z)
    kept = {k: v for k, v in arrays.items() if k.startswith("in.") or k in ("grad.names", key)}
    if key.startswith("gen"):
        kept |= {k: v for k, v in arrays.items() if k.startswith("gen.")}
    changed = kept[key].copy()
    if key == "gen.tokens":
        changed[0, -1] += 1
    elif changed.ndim:
        changed[(-1,) * changed.ndim] *= 1.5
    else:
        changed += np.float32(2e-5)
    path = tmp_path / "case.npz"
    np.savez(path, **(kept | {key: changed}))
    report = a_pre.case(path)
    missed = [a.name.split("[")[0] for a in report.arrays if not a.passed]
    assert missed == [key] and not report.passed


def test_a_gradient_where_none_belongs_is_a_miss(a_pre, tmp_path):
    with np.load(TEXT) as z:
        arrays = dict(z)
    norms = arrays["grad.norms"].copy()
    dead = np.flatnonzero(np.isnan(norms))
    alive = np.flatnonzero(~np.isnan(norms))[0]
    assert len(dead) >= 2
    norms[alive] = np.nan
    kept = {k: v for k, v in arrays.items() if k.startswith("in.")}
    np.savez(
        tmp_path / "c.npz", **kept, **{"grad.names": arrays["grad.names"], "grad.norms": norms}
    )
    report = a_pre.case(tmp_path / "c.npz")
    (missed,) = [a.name for a in report.arrays if not a.passed]
    assert missed == f"grad.norms[{arrays['grad.names'][alive]}]"


def test_a_wrong_weight_is_noticed(tmp_path, capsys):
    """Status 1, a table with the misses: one transposed head is enough."""
    source = tmp_path / "hf"
    source.mkdir()
    shutil.copy(A_PRE / "config.json", source)
    tensors = load_file(A_PRE / "model.safetensors")
    name = "language_model.model.layers.1.attention.wo.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    save_file(tensors, source / "model.safetensors")
    assert main(["verify", str(source), str(TEXT)]) == 1
    lines = capsys.readouterr().out.splitlines()
    verdict = {line.split()[0]: line.split()[-1] for line in lines if " <= " in line}
    assert verdict["out.llm_layer_0"] == "ok"
    assert verdict["out.llm_layer_1"] == verdict["out.logits"] == "MISS"


def test_native_directory(tmp_path):
    assert main(["import", str(A_PRE), str(tmp_path / "native")]) == 0
    assert Verifier(tmp_path / "native").case(TEXT).passed


def test_teacher(tmp_path):
    """Hidden states and features of a recorded teacher, in the file's channels."""
    with np.load(GOLDEN / "teacher/io.npz") as z:
        pixels = z["56.in.pixels"]
        features = z["56.out.extract_feature_v2"]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalised = ((pixels / 255 - mean) / std).astype(np.float32)
    case = {"56.in.pixel_values": np.moveaxis(normalised, -1, 1)}
    np.savez(tmp_path / "io.npz", **case, **{"56.out.extract_feature_v2": features})
    report = Verifier(GOLDEN / "teacher").case(tmp_path / "io.npz")
    assert [a.name for a in report.arrays] == ["56.out.extract_feature_v2"]
    assert report.passed or report.arrays[0].max_abs == np.inf


@pytest.mark.parametrize("content", ["nothing", "text", "foreign arrays"])
def test_bad_cases(content, tmp_path, one_line_error):
    path = tmp_path / "case.npz"
    if content == "text":
        path.write_text("not an archive")
    elif content == "foreign arrays":
        np.savez(path, a=np.zeros(3))
    message = one_line_error(["verify", str(A_PRE), str(path)])
    assert {"nothing": "no such file", "text": "not an .npz", "foreign arrays": "no recorded"}[
        content
    ] in message


def test_tiles_that_do_not_match(tmp_path, one_line_error):
    with np.load(IMAGE) as z:
        arrays = dict(z)
    arrays["in.pixel_values"] = np.repeat(arrays["in.pixel_values"], 2, axis=0)
    np.savez(tmp_path / "case.npz", **arrays)
    message = one_line_error(["verify", str(B_POST), str(tmp_path / "case.npz")])
    assert "1 tiles" in message and "holds 2" in message
