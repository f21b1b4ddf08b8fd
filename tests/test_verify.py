"""`hovle verify` passes what is right and notices what is not."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hovle_jax import checkpoint
from hovle_jax.cli.main import main
from hovle_jax.errors import UserError
from hovle_jax.hf.cases import GRADIENTS, LOSSES, NOT_COMPUTED, STATES, table
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


def inputs(path: pathlib.Path = TEXT) -> dict[str, np.ndarray]:
    with np.load(path) as z:
        return {k: z[k] for k in z.files if k.startswith("in.")}


def recorded(*keys: str, path: pathlib.Path = TEXT) -> dict[str, np.ndarray]:
    with np.load(path) as z:
        return {k: z[k] for k in keys}


def save(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> pathlib.Path:
    np.savez(path / "case.npz", **arrays)
    return path / "case.npz"


def test_what_nothing_computes_is_listed(a_pre, tmp_path):
    """A recording whose half is not looked at has not passed in silence."""
    unknown = {"out.embed_layer_9": np.zeros((1, 3, 64)), "out.made_up": np.zeros(3)}
    unknown |= {"flash.out.attentions": np.zeros(2), "other": np.zeros(1)}
    case = save(tmp_path, inputs() | recorded("out.llm_norm") | unknown)
    report = a_pre.case(case)
    assert report.passed and set(report.skipped) == {f"{k}: {NOT_COMPUTED}" for k in unknown}
    assert report.to_json()["skipped"] == list(report.skipped)
    text = table([report])
    assert NOT_COMPUTED in text and all(key in text for key in unknown)


@pytest.mark.parametrize("key", ["out.logits", "out.llm_layer_1", "out.embed_input"])
def test_wrong_shapes_fail_with_the_reason(key, a_pre, tmp_path):
    whole = recorded(key)[key]
    odd = {
        "fewer tokens": whole[:, :-1],
        "more tokens": np.repeat(whole, 2, axis=1),
        "narrower": whole[..., :-1],
        "flat": whole.reshape(-1),
        "a number": whole[0, 0, 0],
        "two rows": np.repeat(whole, 2, axis=0),
        "without rows": whole[0],
        "texts": whole.astype(str),
    }
    for name, x in odd.items():
        report = a_pre.case(save(tmp_path, inputs() | {key: x}))
        (found,) = report.arrays
        assert found.name == key and not report.passed and "recorded as" in found.reason, name
        assert found.reason in table([report]) and found.to_json()["reason"] == found.reason


def test_wrong_shapes_of_losses_gradients_and_tokens(a_pre, tmp_path):
    norm = "grad.full.language_model.model.norm.weight"
    with np.load(TEXT) as z:
        gen = {k: z[k] for k in z.files if k.startswith("gen.")}
    full = next(k for k in np.load(TEXT).files if k.startswith("grad.full."))
    for odd in (
        {"out.loss": np.zeros(3, np.float32)},
        {full: np.zeros((3, 2), np.float32)},
        {norm: np.zeros(63, np.float32)},
        gen | {"gen.tokens": gen["gen.tokens"][0]},
        gen | {"gen.tokens": np.repeat(gen["gen.tokens"], 2, axis=0)},
    ):
        report = a_pre.case(save(tmp_path, inputs() | odd))
        missed = [a for a in report.arrays if not a.passed]
        assert missed and all("recorded as" in a.reason for a in missed), list(odd)


def test_tokens_without_a_mask(a_pre, tmp_path):
    """Every place of the prompt counts."""
    gen = recorded("gen.input_ids", "gen.tokens")
    report = a_pre.case(save(tmp_path, gen))
    assert report.passed and [a.name for a in report.arrays] == ["gen.tokens"]


def test_weighted_norms_without_names(a_pre, tmp_path, one_line_error):
    """`gradw.norms` may bring its own names; without any, which tensors they are of is unknown."""
    case = save(tmp_path, inputs() | recorded("gradw.norms"))
    message = one_line_error(["verify", str(A_PRE), str(case)])
    assert f"{case}: gradw.norms: there is no gradw.names" in message
    names = recorded("grad.names")["grad.names"]
    weighted = inputs() | recorded("gradw.norms")
    assert a_pre.case(save(tmp_path, weighted | {"gradw.names": names})).passed
    with pytest.raises(UserError, match=r"gradw.norms: \[\d+\] for the 3 of gradw.names"):
        a_pre.case(save(tmp_path, weighted | {"gradw.names": names[:3]}))


@pytest.mark.parametrize("key", ["out.hidden_4", "out.extract_feature_v2_select-5"])
def test_hidden_states_that_a_teacher_has_not(key, tmp_path, one_line_error):
    case = {"56.in.pixel_values": np.zeros((1, 3, 56, 56), np.float32)}
    path = save(tmp_path, case | {f"56.{key}": np.zeros((1, 17, 48), np.float32)})
    message = one_line_error(["verify", str(GOLDEN / "teacher"), str(path)])
    assert f"{path}: 56.{key}: this teacher has hidden states up to 3" in message


@pytest.mark.parametrize(
    ("key", "change", "expected"),
    [
        ("in.input_ids", lambda x: x[0], "in.input_ids: expected integers [B, L]"),
        ("in.input_ids", lambda x: x / 2, "in.input_ids: expected integers [B, L]"),
        ("in.attention_mask", lambda x: x[:, 1:], "in.attention_mask: expected integers"),
        ("in.labels", lambda x: x[:, 1:], "in.labels: expected [1, "),
        ("in.pixel_values", lambda x: x[0], "in.pixel_values: expected floats [T, 3, H, W]"),
        ("in.pixel_values", lambda x: x[..., :-1], "in.pixel_values: expected floats"),
    ],
)
def test_odd_inputs(key, change, expected, tmp_path, one_line_error):
    arrays = inputs(IMAGE) | recorded("out.loss", path=IMAGE)
    case = save(tmp_path, arrays | {key: change(arrays[key])})
    assert f"{case}: {expected}" in one_line_error(["verify", str(B_POST), str(case)])


def test_report_without_a_place(tmp_path, one_line_error, monkeypatch):
    """Said before the model is read."""
    monkeypatch.setattr(Verifier, "__init__", None)
    message = one_line_error(["verify", str(A_PRE), str(TEXT), "--json", str(tmp_path)])
    assert f"{tmp_path}: cannot be written (it is a directory)" in message


def part_of_a_model(part: str, target: pathlib.Path) -> pathlib.Path:
    """What stage I and an LLM's import leave: the embedding module, or an LLM and its table."""
    stored, params = checkpoint.load(A_PRE)
    if part == "llm":
        params = {"decoder": params["decoder"], "embedding": {"text": params["embedding"]["text"]}}
    elif part == "stage I":
        params = {"embedding": params["embedding"]}
    checkpoint.save_model(target, stored.model, params)
    return target


@pytest.mark.parametrize(
    ("part", "expected"),
    [("llm", "holds an LLM alone"), ("stage I", "holds the embedding module"), ("", "a teacher")],
)
def test_parts_are_no_model(part, expected, tmp_path, one_line_error):
    """Neither a HoVLE's cases nor PyTorch beside them."""
    directory = part_of_a_model(part, tmp_path / "part") if part else tmp_path / "teacher"
    if not part:
        stored, params = checkpoint.load(GOLDEN / "teacher", "teacher")
        checkpoint.save_model(directory, stored.config, params)
    cases = [] if not part else [[str(TEXT)], [str(IMAGE)]]
    for more in (*cases, ["--live", str(A_PRE)]):
        message = one_line_error(["verify", str(directory), *more])
        assert expected in message and "no whole HoVLE" in message and str(directory) in message


def test_an_llm_by_itself(tmp_path, one_line_error):
    """Its own scores are compared; a stage I directory has none."""
    case = inputs()
    logits = {
        "in.input_ids": case["in.input_ids"],
        "out.logits": recorded("out.logits")["out.logits"],
    }
    path = save(tmp_path, logits)
    llm = Verifier(part_of_a_model("llm", tmp_path / "llm"))
    (found,) = llm.case(path).arrays
    assert found.name == "out.logits" and found.reason == "" and not found.passed
    wrong = logits | {"out.logits": logits["out.logits"][:, 1:]}
    (found,) = llm.case(save(tmp_path, wrong)).arrays
    assert "recorded as" in found.reason
    directory = part_of_a_model("stage I", tmp_path / "one")
    message = one_line_error(["verify", str(directory), str(path)])
    assert "holds no LLM" in message
