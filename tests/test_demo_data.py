"""The digit demo: balanced answers, honest splits, files as a user would bring them, a report."""

import collections
import hashlib
import json
import os

import numpy as np
import pytest
from PIL import Image

from hovle_jax.demo import digits as D
from hovle_jax.demo import report as R
from hovle_jax.errors import UserError
from hovle_jax.modules import require

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SIZE = {"train_canvases": 120, "qa_per_canvas": 3, "test_per_type": 60}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return D.write_dataset(str(tmp_path_factory.mktemp("digits")), seed=0, **SIZE)


def rows(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def qa_rows(data):
    return rows(data.instruct_qa) + rows(data.instruct_yes_no)


def qa(row):
    human, gpt = row["conversations"]
    assert (human["from"], gpt["from"]) == ("human", "gpt")
    image, question = human["value"].split("\n")
    assert image == "<image>"
    return question, gpt["value"]


def solve(question, digits):
    """Answers a question from the labels, independently of the code that asked it."""
    cells = sorted((c for c in D.CELLS if c in question), key=question.index)
    value = {c: int(d) for c, d in zip(D.CELLS, digits, strict=True)}
    if question.startswith("Which digit"):
        return str(value[cells[0]])
    if question.startswith("Which is larger"):
        assert value[cells[0]] != value[cells[1]]
        return max(cells, key=value.__getitem__)
    return "yes" if int(question[-2]) in value.values() else "no"


def kind_of(question):
    words = {"Which digit": "position", "Which is larger": "comparison", "Is there": "yes_no"}
    return next(kind for start, kind in words.items() if question.startswith(start))


def tree(root):
    found = {}
    for folder, _, files in os.walk(root):
        for name in files:
            path = os.path.join(folder, name)
            with open(path, "rb") as f:
                found[os.path.relpath(path, root)] = hashlib.sha256(f.read()).hexdigest()
    return found


def test_answers_match_labels(data):
    labels = {s: dict(zip(*data.labels(s), strict=True)) for s in D.SPLITS}
    for row in rows(data.align):
        assert qa(row) == (D.DESCRIBE, D.caption(labels["train"][row["image"]]))
    for row in qa_rows(data):
        question, answer = qa(row)
        assert answer == solve(question, labels["train"][row["image"]])
    for kind, path in data.tests.items():
        assert len(rows(path)) == SIZE["test_per_type"]
        for row in rows(path):
            question, answer = qa(row)
            assert kind_of(question) == kind
            assert answer == solve(question, labels["test"][row["image"]])


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_prior_to_exploit(data, split):
    if split == "train":
        pairs = [qa(r) for r in qa_rows(data)]
    else:
        pairs = [qa(r) for path in data.tests.values() for r in rows(path)]
    by_kind = {k: [p for p in pairs if kind_of(p[0]) == k] for k in D.QUESTION_TYPES}
    assert len({len(v) for v in by_kind.values()}) == 1

    asked = collections.Counter(by_kind["yes_no"])
    assert len({asked[f"Is there a {d}?", a] for d in range(10) for a in ("yes", "no")}) == 1

    compared = by_kind["comparison"]
    first = np.mean([min(D.CELLS, key=lambda c: (c not in q, q.find(c))) == a for q, a in compared])
    assert abs(first - 0.5) < 0.04
    cells = [sum(a == c for _, a in compared) / len(compared) for c in D.CELLS]
    assert max(cells) - min(cells) < 0.08
    for kind in ("comparison", "yes_no"):
        answers = collections.Counter(a for _, a in by_kind[kind])
        assert max(answers.values()) / len(by_kind[kind]) <= 0.55


def test_held_out_digits_never_train(data):
    with np.load(data.labels_npz) as f:
        used = {s: set(f[f"{s}_bitmaps"].ravel().tolist()) for s in D.SPLITS}
        target = D.load_bitmaps()[1]
        for split in D.SPLITS:
            np.testing.assert_array_equal(target[f[f"{split}_bitmaps"]], f[f"{split}_digits"])
    assert max(used["train"] | used["unpaired"]) < 1297 <= min(used["test"])
    trained = {r["image"] for r in rows(data.align) + qa_rows(data)}
    assert not trained & set(data.labels("unpaired")[0])


def test_images(data):
    for split in D.SPLITS:
        names, digits = data.labels(split)
        assert len(names) == len(digits) == len(os.listdir(os.path.join(data.images, split)))
        formats = set()
        for name in names:
            with Image.open(os.path.join(data.images, name)) as image:
                image.load()
                assert (image.size, image.mode) == ((32, 32), "RGB")
                formats.add(image.format)
        assert formats == {"PNG", "JPEG"}


def test_digits_stay_in_their_quadrant(monkeypatch):
    def blank_and_full(width, height, slant):
        return np.stack([np.full((height, width), value, np.uint8) for value in (0, 255)])

    monkeypatch.setattr(D, "_glyphs", blank_and_full)
    rng = np.random.default_rng(0)
    for cell in range(4):
        for _ in range(50):
            canvas = D.render([int(i == cell) for i in range(4)], rng, augment=True)[..., 0].astype(
                int
            )
            y, x = np.nonzero(canvas > canvas.min() + 40)
            assert set(zip(y // 16, x // 16, strict=True)) == {divmod(cell, 2)}


def test_a_seed_fixes_every_byte(data, tmp_path):
    again = D.write_dataset(str(tmp_path / "a"), seed=0, **SIZE)
    assert tree(again.root) == tree(data.root)
    other = D.write_dataset(str(tmp_path / "b"), seed=1, **SIZE)
    assert tree(other.root) != tree(data.root)


def test_rewriting_leaves_no_stale_image(data, tmp_path):
    D.write_dataset(str(tmp_path), seed=0, **SIZE | {"train_canvases": 200})
    small = D.write_dataset(str(tmp_path), seed=0, **SIZE)
    assert tree(small.root) == tree(data.root)


def test_meta_files(data):
    drawn = {}
    for path in (data.meta_align, data.meta_instruct):
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)
        for name, entry in meta.items():
            assert set(entry) == {
                "root", "annotation", "data_augment", "max_dynamic_patch", "repeat_time", "length"
            }  # fmt: skip
            assert isinstance(entry["repeat_time"], int)
            assert entry["data_augment"] is False and entry["max_dynamic_patch"] == 1
            found = rows(os.path.join(data.root, entry["annotation"]))
            assert len(found) == entry["length"]
            for row in found[:5]:
                assert set(row) == {"id", "image", "width", "height", "conversations"}
                assert os.path.exists(os.path.join(data.root, entry["root"], row["image"]))
            drawn[name] = entry["repeat_time"] * entry["length"]
    assert list(drawn) == ["digits_captions", "digits_qa", "digits_yes_no"]
    assert drawn["digits_yes_no"] == drawn["digits_qa"], "yes/no is half of the questions"


def test_text(data):
    rng = np.random.default_rng(0)
    for kind in (*D.QUESTION_TYPES, "caption"):
        user, answer = D.text_example([3, 5, 1, 7], kind, rng)
        shown, question = user.split("\n")
        assert shown == "top-left:3 top-right:5 bottom-left:1 bottom-right:7"
        assert answer == (shown if kind == "caption" else solve(question, [3, 5, 1, 7]))
    assert D.text_example([4] * 4, "comparison", rng)[1] == "4"
    with open(data.text, encoding="utf-8") as f:
        lines = f.read().splitlines()
    assert len(lines) == 2 * SIZE["train_canvases"] and all(lines)
    covered = {w for line in D.tokenizer_lines() for w in line.replace(":", " ").split()}
    assert {w for line in lines for w in line.replace(":", " ").split()} <= covered
    assert {"system", "user", "assistant", *"0123456789", "yes", "no"} <= covered
    assert any("\n" in line for line in D.tokenizer_lines())


@pytest.mark.parametrize(
    "wrong", [{"test_per_type": 30}, {"qa_per_canvas": 13}, {"train_canvases": 3}]
)
def test_bad_sizes_are_one_line(tmp_path, wrong):
    with pytest.raises(UserError) as e:
        D.write_dataset(str(tmp_path), seed=0, **SIZE | wrong)
    assert "\n" not in str(e.value)


def test_missing_extra_says_what_to_install():
    with pytest.raises(
        UserError, match=r"^digits: no_such_module_here is missing: pip install 'hovl"
    ):
        require("no_such_module_here.datasets", "demo", "digits")


def test_report(data, tmp_path):
    scores = {"accuracy": 0.9, "blind": 0.5, "shuffled": 0.51, "majority": 0.5, "n": 60}
    results = {"full": {k: scores for k in D.QUESTION_TYPES}, "no_stage1": {"yes_no": scores}}
    report = {"seed": 0, "minutes": 5.0, "results": results, "stand_ins": {"teacher": 0.98}}
    images = [os.path.join(data.images, n) for n in data.labels("test")[0][:3]]
    examples = [
        {"image": i, "type": "yes_no", "question": "Is there a 3?", "answer": a, "truth": "yes"}
        for i, a in zip(images, ("yes", "no", ""), strict=True)
    ]
    curves = {"full": {"I": [(1, 2.0), (2, 1.0)], "III": [(1, 1.0)]}, "no_stage1": {"III": []}}
    maps = {"images": images, "before": np.zeros((3, 4, 4)), "after": np.ones((3, 4, 4))}
    R.write_report(str(tmp_path), report, curves=curves, examples=examples, cosine_map=maps)
    with open(tmp_path / "report.json", encoding="utf-8") as f:
        assert json.load(f) == report
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| no_stage1 | yes_no | 0.900 | 0.500 | 0.510 | 0.500 | 60 |" in markdown
    assert "| teacher | 0.980 |" in markdown
    for name in ("curves", "samples", "cosine"):
        assert f"({name}.png)" in markdown
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 500
    table = R.table(results).splitlines()
    assert len(table) == 2 + 4 and len({len(line) for line in table}) == 1
