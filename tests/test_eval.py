"""`hovle eval`: benchmark files in, prompts, scores with intervals out; a kill changes nothing."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hovle_jax.cli.main import main
from hovle_jax.errors import UserError
from hovle_jax.eval.examples import Example, ImageStore
from hovle_jax.eval.jsonl import read_answers, read_jsonl
from hovle_jax.eval.predictions import read_predictions
from hovle_jax.eval.prompts import LETTER, LETTER_CN, SHORT, with_images
from hovle_jax.eval.run import Run, read_examples, write_questions
from hovle_jax.eval.tally import Scored, mean
from hovle_jax.eval.tasks import DIALECTS, TASKS
from hovle_jax.eval.tsv import read_tsv

pytestmark = pytest.mark.usefixtures("quick_compilation")


def picture(i: int, size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def coded(i: int, **more: object) -> str:
    return base64.b64encode(picture(i, **more)).decode()  # type: ignore[arg-type]


def write_tsv(path: Path, rows: list[dict]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        out = csv.DictWriter(file, names, delimiter="\t")
        out.writeheader()
        out.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names_only(path: Path, root: str = "") -> list[Example]:
    return read_tsv(str(path), ImageStore(None), root)[0]


# Files


def test_images_of_a_tsv(tmp_path):
    """In the row, by the index of another row (before or after it), several, in files, missing."""
    several = str([coded(2), coded(3, kind="JPEG")])
    rows = [
        {"index": 7, "image": "9", "question": 'He said "a\tb"\nand left'},
        {"index": 9, "image": coded(1), "question": "q", "A": "None", "B": "x", "hint": "nan"},
        {"index": 11, "image": several, "question": "q", "answer": "None"},
        {"index": 12, "question": "no image"},
        {"index": 13, "image": "9", "question": "q"},
    ]
    path = write_tsv(tmp_path / "x.tsv", rows)
    store = ImageStore(tmp_path / "images")
    examples, empty = read_tsv(str(path), store, "")
    assert empty == 1 and [e.id for e in examples] == ["7", "9", "11", "13"]
    assert examples[0].images == examples[1].images == examples[3].images
    assert examples[0].field("question") == 'He said "a\tb"\nand left'
    assert examples[1].options == {"B": "x"} and "hint" not in examples[1].fields
    assert examples[2].answers == ["None"]  # an answer may be; an option is then none in pandas
    named = [name for e in examples[1:3] for name in e.images]
    assert [name.rsplit(".", 1)[1] for name in named] == ["png", "png", "jpg"]
    for name, i in zip(named[:2], (1, 2), strict=True):
        assert (tmp_path / "images" / name).read_bytes() == picture(i)
    assert len(list((tmp_path / "images").iterdir())) == 3  # each once


def test_images_of_a_tsv_in_files(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    rows = [{"index": 0, "image_path": "['a.png', 'b.png']", "question": "q"}]
    (example,) = names_only(write_tsv(tmp_path / "x.tsv", rows), str(tmp_path))
    assert example.images == (str(tmp_path / "a.png"), str(tmp_path / "b.png"))


def test_the_first_image_is_enlarged(tmp_path):
    rows = [{"index": 0, "image": str([coded(2), coded(3)]), "question": "q"}]
    path = write_tsv(tmp_path / "x.tsv", rows)
    ((example,), _) = read_tsv(str(path), ImageStore(tmp_path / "images", 2), "")
    sizes = [Image.open(tmp_path / "images" / name).size for name in example.images]
    assert sizes == [(80, 60), (40, 30)]
    assert TASKS["mmmu"].upscale == {"vlmevalkit": 2, "internvl": 2}


BAD_TSV = [
    ("index\tquestion\n1\tq\textra\n", "x.tsv:1: 3 cells, 2 columns"),
    ("index\timage\n1\tabc\n", "x.tsv:1: no 'question'; not a TSV of VLMEvalKit"),
    ("question\timage\nq\tabc\n", "x.tsv:1: no 'index'"),
    ("index\tquestion\timage\n1\tq\t5\n", "x.tsv:1: its image is that of row '5', which has none"),
    (f"index\tquestion\timage\n1\tq\t{'!' * 80}\n", "x.tsv:1: its image is not base64"),
    ("index\tindex\n", "x.tsv: a column is there twice"),
    ('index\tquestion\n1\t"q\n', None),  # a quote that does not end: the text is one cell
]


@pytest.mark.parametrize(("text", "message"), BAD_TSV)
def test_bad_tsv(tmp_path, text, message):
    (tmp_path / "x.tsv").write_text(text)
    if message is None:
        assert names_only(tmp_path / "x.tsv") == []
    else:
        with pytest.raises(UserError, match=message):
            names_only(tmp_path / "x.tsv")


def test_rows_of_jsonl(tmp_path):
    rows = [
        {"question_id": 5, "image": "a.png", "text": "q", "label": "yes"},
        {"image": ["a.png", "b.png"], "question": "q", "choices": ["x", "y"], "answer": 1},
        {"questionId": 6, "question": "q", "answer": ["a", "b"], "image": None},
    ]
    path = write_jsonl(tmp_path / "random.jsonl", rows)
    first, second, third = read_jsonl(str(path), ImageStore(None), "root")
    assert (first.id, first.answers, first.fields["file"]) == ("5", ["yes"], "random")
    assert (second.id, second.options, second.answers) == ("1", {"A": "x", "B": "y"}, ["B"])
    assert second.images == (os.path.abspath("root/a.png"), os.path.abspath("root/b.png"))
    assert (third.id, third.answers, third.images) == ("6", ["a", "b"], ())
    (tmp_path / "list.json").write_text(json.dumps(rows[:1]))
    (same,) = read_jsonl(str(tmp_path / "list.json"), ImageStore(None), "root")
    assert (same.id, same.images) == (first.id, first.images)


def test_answers_of_another_file(tmp_path):
    """TextVQA's annotators, DocVQA's accepted answers and SEED's letters come apart from them."""
    ten = [{"answer": "stop", "answer_id": i} for i in range(10)]
    body = {"annotations": [{"question_id": 5, "answers": ten}]}
    (tmp_path / "a.json").write_text(json.dumps(body))
    assert read_answers(str(tmp_path / "a.json")) == {"5": {"answer": ["stop"] * 10}}
    rows = [{"question_id": 5, "image": "a.png", "question": "q", "answer": "stop"}]
    data = write_jsonl(tmp_path / "x.jsonl", rows)
    run = Run("textvqa", "internvl", (str(data),), answers=str(tmp_path / "a.json"))
    assert read_examples(run, ImageStore(None))[0][0].answers == ["stop"] * 10
    rows[0]["question_id"] = 6
    write_jsonl(data, rows)
    with pytest.raises(UserError, match="x.jsonl:1: .*a.json has no answer to question '6'"):
        read_examples(run, ImageStore(None))
    (tmp_path / "a.json").write_text('{"data": [{"questionId": 6}]}')
    with pytest.raises(UserError, match="a.json:1: needs an answer and a question id of its own"):
        read_examples(run, ImageStore(None))


def test_rows_that_do_not_count(tmp_path):
    rows = [
        {"index": i, "image": coded(0), "question": "q", "split": s, "question_type_id": 9 + i}
        for i, s in enumerate(("validation", "dev"))
    ]
    path = str(write_tsv(tmp_path / "x.tsv", rows))
    for task in ("mmmu", "seed_image"):
        examples, _ = read_examples(Run(task, "vlmevalkit", (path,)), ImageStore(None))
        assert [e.id for e in examples] == ["0"]
    path = str(write_tsv(tmp_path / "x.tsv", rows[1:]))
    with pytest.raises(UserError, match="no rows of MMMU val"):
        read_examples(Run("mmmu", "vlmevalkit", (path,)), ImageStore(None))


# Prompts and limits


def test_tile_limits_are_part_of_the_task():
    tiles = {name: task.max_tiles for name, task in TASKS.items() if task.max_tiles != 6}
    assert tiles == {"mmmu": 12, "chartqa": 12, "docvqa": 18, "infovqa": 24, "ocrbench": 24}


CHOICES = "\nA. x\nB. y"
HINTED = f"h\nq{CHOICES}\n{LETTER}"
CN = "请直接使用所提供的选项字母作为答案回答。"
# Of (vlmevalkit, lmms-eval, internvl); the question is 'q', the options 'x' and 'y', the hint 'h'.
PROMPTS = {
    "mme": (f"q {SHORT}", f"q\n{SHORT}", f"q {SHORT}"),
    "mmbench_en": (HINTED, f"h q There are several options:{CHOICES}\n\n{LETTER}", HINTED),
    "mmbench_cn": (
        HINTED,
        f"h q There are several options:{CHOICES}\n\n{CN}",
        f"h\nq{CHOICES}\n{LETTER_CN}",
    ),
    "mmmu": (HINTED, f"q{CHOICES}\n\n{LETTER}", HINTED),
    "seed_image": (HINTED, f"Context: h\nq{CHOICES}\n{LETTER}", HINTED),
    "scienceqa": (HINTED, f"Context: h\nq{CHOICES}\n{LETTER}", HINTED),
    "pope": ("q", f"q\n{SHORT}", f"q\n{SHORT}"),
    "hallusionbench": (f"q Please answer yes or no. {SHORT}", "q"),
    "gqa": (f"q\n{SHORT}", f"q\n{SHORT}", f"q {SHORT}"),
    "textvqa": (f"q\n{SHORT}", f"Q\n{SHORT}", f"q {SHORT}"),
    "chartqa": (f"q\n{SHORT}", "q\nAnswer the question with a single word.", f"q {SHORT}"),
    "docvqa": (f"q\n{SHORT}", f"q\n{SHORT}", f"q {SHORT}"),
    "ocrbench": (f"q\n{SHORT}", "q"),
    "mmvet": ("q",),
    "mathvista": ("q",),
}


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_prompts(name):
    fields = {"question": "q", "A": "x", "B": "y", "hint": "h", "answer": "A"}
    example = Example("1", fields, ("a.png",), "f:1")
    asked = [TASKS[name].prompt(example, dialect) for dialect in TASKS[name].dialects]
    assert asked == list(PROMPTS[name])
    assert TASKS[name].dialects == DIALECTS[: len(asked)]


def test_prompts_of_open_and_chinese_questions():
    open_question = Example("1", {"question": "q"}, (), "f:1")
    chinese = Example("1", {"question": "什么", "A": "x"}, (), "f:1")
    assert TASKS["mmmu"].prompt(open_question, "vlmevalkit") == "q\nAnswer the question directly."
    assert TASKS["mmmu"].prompt(open_question, "internvl") == f"q\n{SHORT}"
    assert TASKS["mmmu"].prompt(open_question, "lmms-eval") == f"q\n\n{SHORT}"
    assert TASKS["ccbench"].prompt(chinese, "vlmevalkit") == f"什么\nA. x\n{LETTER_CN}"
    asks = Example("1", {"question": "q Please answer yes or no."}, (), "f:1")
    assert TASKS["mme"].prompt(asks, "lmms-eval") == f"q\n{SHORT}"
    llava = Example("1", {"question": f"q\n{SHORT}"}, (), "f:1")
    assert TASKS["pope"].prompt(llava, "internvl") == f"q\n{SHORT}"


def test_where_images_stand():
    def placed(text: str, images: int) -> str:
        return with_images(text, Example("1", {}, ("a.png",) * images, "f:1"))

    assert placed("q", 0) == "q" and placed("q", 1) == "<image>\nq"
    assert placed("q", 2) == "Image-1: <image>\nImage-2: <image>\nq"
    assert placed("q <image 1>", 1) == "<image>\nq <image 1>"  # MMMU's are part of the text
    assert placed("a <image> b <image>", 2) == "a <image> b <image>"
    with pytest.raises(UserError, match="f:1: 1 '<image>' for 2 images"):
        placed("a <image>", 2)


def test_every_task_is_complete():
    for name, task in TASKS.items():
        for dialect in task.dialects:
            assert not task.readings or task.new_tokens[dialect] > 0, (name, dialect)
    assert [name for name, task in TASKS.items() if not task.readings] == ["mmvet", "mathvista"]


# Intervals


def test_a_part_of_a_benchmark_is_of_whole_questions():
    """Half of a question's rotations, or of a set of figures, would be scored as all of it."""

    def first(task: str, ids: list[str], most: int) -> list[str]:
        found = [Example(i, {"l2-category": "x"}, ("a.png",), f"f:{n}") for n, i in enumerate(ids)]
        return [example.id for example in TASKS[task].first(found, most)]

    rotations = [str(q + 1_000_000 * n) for n in range(3) for q in range(4)]
    chosen = first("mmbench_en", rotations, 2)
    assert chosen == ["0", "1", "1000000", "1000001", "2000000", "2000001"]
    sets = [f"VD_chart_0_{s}_{figure}_{q}" for figure in "01" for s in "012" for q in "01"]
    assert first("hallusionbench", sets, 1) == [i for i in sets if i.startswith("VD_chart_0_0_")]
    assert first("docvqa", ["0", "0", "1"], 2) == ["0", "0"]
    for task in ("mme", "ocrbench", "chartqa"):
        assert first(task, ["0", "1"], 2) == ["0", "1"]
        with pytest.raises(UserError, match="is scored as a whole, not on 1 of 2 questions; raise"):
            first(task, ["0", "1"], 1)


def rows_of(scores: list[float], images: int = 1) -> list[Scored]:
    def row(i: int) -> Example:
        return Example(str(i), {"answer": ""}, (str(i // images),), "f")

    return [Scored(row(i), "", "", score) for i, score in enumerate(scores)]


def test_bootstrap_is_seeded_and_of_images():
    scores = [float(i % 3 == 0) for i in range(900)]
    alone, shared = (mean(rows_of(scores, images)) for images in (1, 3))
    low, high = alone.intervals(1000, 0)["Overall"]
    expected = 1.96 * 100 * np.sqrt(2 / 9 / 900)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)
    assert alone.intervals(1000, 0) == alone.intervals(1000, 0)
    assert alone.intervals(1000, 1) != alone.intervals(1000, 0)
    # One right answer about each image: whichever images are drawn, a third is right.
    assert shared.intervals(100, 0)["Overall"] == pytest.approx((100 / 3, 100 / 3))
    assert len(shared.units) == 300 and shared.score() == pytest.approx({"Overall": 100 / 3})


def test_categories_have_scores_of_their_own():
    rows = rows_of([1.0, 0.0, 1.0])
    kinds = ("b", "b", "a")
    rows = [
        Scored(Example(str(i), {"category": k, "split": "dev"}, (str(i),), "f"), "", "", r.score)
        for i, (r, k) in enumerate(zip(rows, kinds, strict=True))
    ]
    tally = mean(rows)
    assert list(tally.score()) == ["Overall", "a", "b"]
    assert tally.score()["b"] == 50 and np.isfinite(tally.intervals(200, 0)["a"]).all()


# Whole runs


def mme(directory: Path, images: int = 5) -> Path:
    rows = [
        {
            "index": 2 * i + k,
            "image": str(2 * i) if k else coded(i),
            "image_path": f"{i}.png",
            "question": f"Is it {'no' * k} {i}? Please answer yes or no.",
            "answer": ("Yes", "No")[k],
            "category": ("count", "OCR", "code_reasoning")[i % 3],
        }
        for i in range(images)
        for k in range(2)
    ]
    return write_tsv(directory / "MME.tsv", rows)


def arguments(release: Path, data: Path, out: Path, task: str = "mme") -> list[str]:
    argv = ["eval", str(release), "--task", task, "--data", str(data)]
    return [*argv, "--out", str(out), "--dialect", "internvl", "--slots", "2"]


def test_a_benchmark_from_file_to_table(release, tmp_path, capsys, one_line_error):
    """Ten rows with images; then the same after cuts at every kind of place, to the byte."""
    argv = arguments(release, mme(tmp_path), tmp_path / "out")
    assert main(argv) == 0
    own = tmp_path / "out" / "mme" / "internvl"
    questions, answers = read(own / "questions.jsonl"), read(own / "answers.jsonl")
    assert [q["id"] for q in questions] == [a["id"] for a in answers] == [str(i) for i in range(10)]
    assert questions[3]["image"] == questions[2]["image"]
    text = f"<image>\nIs it no 1? Please answer yes or no. {SHORT}"
    assert questions[3]["messages"] == [{"role": "user", "content": text}]
    assert all(a["completion_tokens"] <= 20 and "error" not in a for a in answers)
    found = json.loads((own / "results.json").read_text())
    assert found["rows"] == 10 and found["bootstrap"]["units"] == 5 and found["failed"] == 0
    assert found["values"]["sum"]["value"] == found["value"]
    assert found["published"][0]["source"] == "mmMamba, arXiv 2502.13145"
    table = (tmp_path / "out" / "results.md").read_text()
    assert table.splitlines()[2].startswith(f"| MME | sum | internvl | {found['value']:.1f} | ")
    assert "HoVLE 1433.5 perception (mmMamba" in table
    assert table.splitlines()[2] in capsys.readouterr().out

    files = ("questions.jsonl", "answers.jsonl", "scores.jsonl", "results.json", "predictions.tsv")
    whole = {name: (own / name).read_bytes() for name in files}
    lines = whole["answers.jsonl"]
    for cut in (0, 40, len(lines) // 2, lines.index(b"\n") + 1, len(lines)):
        (own / "answers.jsonl").write_bytes(lines[:cut])
        assert main(argv) == 0
        assert {name: (own / name).read_bytes() for name in files} == whole

    assert "with int8_kv None, not True; give the same, or a new --out" in one_line_error(
        [*argv, "--int8-kv"]
    )
    assert "--mesh 9x1 needs 9 devices" in one_line_error([*argv, "--mesh=9x1"])
    for flag in ("--out", "--data", "--images"):
        assert f"{flag}: gs://b/x must be local" in one_line_error([*argv, flag, "gs://b/x"])
    settings = json.loads((own / "settings.json").read_text())
    (own / "settings.json").write_text(json.dumps(settings | {"weights": "0"}))
    assert "were made with weights '0', not " in one_line_error(argv)


def test_tiles_follow_the_task(release, tmp_path):
    """A wide picture: MME cuts it into six tiles, DocVQA into more, two pictures share 64."""
    from hovle_jax.generation.chat import Assistant, PerImageTiler

    assistant = Assistant.load(release)
    config, own = assistant.config, assistant.tiler
    for task, images, most in (("mme", 1, 6), ("docvqa", 1, 18), ("mmmu", 2, 12), ("mmmu", 7, 9)):
        assert PerImageTiler(config, own, TASKS[task].max_tiles).limits(images)[1] == most
    assert PerImageTiler(config, own, 1).settings[3] == own.thumbnail


def test_failed_rows_count_as_wrong_and_are_counted(release, tmp_path, capsys):
    data = mme(tmp_path, 1)
    text = data.read_text().replace(coded(0), base64.b64encode(b"no picture" * 9).decode())
    data.write_text(text)
    assert main(arguments(release, data, tmp_path / "out")) == 1
    found = json.loads((tmp_path / "out" / "mme" / "internvl" / "results.json").read_text())
    assert (found["failed"], found["rows"], found["value"]) == (2, 2, 0)
    assert "| 2, 2 failed |" in capsys.readouterr().out
    [picture] = (tmp_path / "out" / "mme" / "images").iterdir()
    shutil.copy(release.parent / "image.png", picture)  # the same command asks again
    assert main(arguments(release, data, tmp_path / "out")) == 0
    assert "failed" not in (tmp_path / "out" / "results.md").read_text()


PREDICTIONS = {
    "answers.jsonl": '{"id": 0, "answer": "Yes"}\n{"id": 1, "answer": "no."}\n',
    "swapped.jsonl": '{"id": 1, "answer": "no."}\n{"id": 0, "answer": "Yes"}\n',
    "list.json": '[{"question_id": "0", "prediction": "Yes", "answer": "No"},'
    ' {"question_id": "1", "prediction": "no"}]',
    "vlmevalkit.tsv": "index\tprediction\n0\tYes\n1\tNo\n",
}


@pytest.mark.parametrize("name", sorted(PREDICTIONS))
def test_predictions_are_scored_without_a_model(tmp_path, name):
    data = mme(tmp_path, 1)
    (tmp_path / name).write_text(PREDICTIONS[name])
    argv = ["eval", "--predictions", str(tmp_path / name), "--task", "mme", "--data", str(data)]
    copy = tmp_path / "copy.json"
    assert main([*argv, "--out", str(tmp_path / "out"), f"--json={copy}"]) == 0
    own = tmp_path / "out" / "mme" / "vlmevalkit"
    assert json.loads((own / "results.json").read_text())["values"]["count"]["value"] == 200
    assert json.loads(copy.read_text()) == json.loads((own / "results.json").read_text())
    assert [row["read"] for row in read(own / "scores.jsonl")] == ["yes", "no"]
    assert not (tmp_path / "out" / "mme" / "images").exists()
    again, failed = read_predictions(str(own / "predictions.tsv"), names_only(data))
    assert failed == 0 and again[0] == "Yes"


def test_predictions_that_do_not_fit(tmp_path):
    examples = names_only(mme(tmp_path, 1))
    path = tmp_path / "p.jsonl"
    cases = [
        ('{"id": 0, "answer": "Yes"}\n', r"no answer to '1' \(.*MME.tsv:2\); 1 of 2 are missing"),
        ('{"id": 0, "answer": 1}\n', "p.jsonl:1: needs an id and a text"),
        ('{"id": 1, "answer": "a"}\n{"id": 0, "answer": "a"}\n' * 2, "ids are there twice"),
        ("{", "p.jsonl:1: not valid JSON"),
    ]
    for text, message in cases:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_predictions(str(path), examples)
    path.write_text('{"id": 0, "error": "x"}\n{"id": 1, "answer": "a"}\n')
    assert read_predictions(str(path), examples) == (["", "a"], 1)


@pytest.mark.parametrize(("task", "answer"), [("mmvet", "x"), ("docvqa", None)])
def test_a_judge_or_a_server_gets_the_predictions(tmp_path, capsys, task, answer):
    """MM-Vet has no rule, a test split no answers: the file to hand in is all there is."""
    row = {"index": 0, "image": coded(0), "question": "q\n2", "capability": "ocr"}
    data = write_tsv(tmp_path / "x.tsv", [row | ({"answer": answer} if answer else {})])
    (tmp_path / "p.jsonl").write_text('{"id": 0, "answer": "two\\nlines"}\n')
    argv = ["eval", "--predictions", str(tmp_path / "p.jsonl"), "--task", task]
    assert main([*argv, "--data", str(data), "--out", str(tmp_path / "out")]) == 0
    own = tmp_path / "out" / task / "vlmevalkit"
    assert "1 answers for a judge or server" in capsys.readouterr().out
    with open(own / "predictions.tsv", newline="") as file:
        (line,) = csv.DictReader(file, delimiter="\t")
    assert (line["prediction"], line["capability"], line["question"]) == (
        "two\nlines",
        "ocr",
        "q\n2",
    )
    assert not (own / "results.json").exists()


def test_errors_are_one_line(tmp_path, one_line_error):
    data = str(mme(tmp_path, 1))
    (tmp_path / "p.jsonl").write_text(PREDICTIONS["answers.jsonl"])
    start = ["eval", "--predictions", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out")]
    ask = [*start, "--task", "mme", "--data", data]
    assert "--task mm: not one of mme, mmbench_en" in one_line_error([*ask, "--task", "mm"])
    wrong = [*ask, "--task", "ocrbench", "--dialect", "internvl"]
    assert "--dialect internvl: ocrbench has vlmevalkit, lmms-eval" in one_line_error(wrong)
    assert "--data: no such file none.tsv" in one_line_error([*ask, "--data", "none.tsv"])
    assert "none.tsv: no such file" in one_line_error([*ask, "--predictions", "none.tsv"])
    assert "--resamples must be 1 or more" in one_line_error([*ask, "--resamples", "0"])
    assert "index '0' is not HallusionBench's" in one_line_error([*ask, "--task", "hallusionbench"])
    # 'Yes' is no rotation of anything here, and no MME has three questions about an image.
    text = Path(data).read_text()
    Path(data).write_text(text.replace("\n1\t", "\n1000001\t"))
    fixed = PREDICTIONS["answers.jsonl"].replace('"id": 1', '"id": 1000001')
    (tmp_path / "p.jsonl").write_text(fixed)
    lost = "MME.tsv:2: rotates row 1, which is not there"
    assert lost in one_line_error([*ask, "--task", "mmbench_en"])
    Path(data).write_text(text.replace("\tYes\t", "\t\t"))
    (tmp_path / "p.jsonl").write_text(PREDICTIONS["answers.jsonl"])
    assert "MME.tsv:1: no answer, and 1 other rows have one" in one_line_error(ask)
    Path(data).write_text(text.replace("\tYes\t", "\tMaybe\t"))
    assert "the answer is 'maybe', neither yes nor no" in one_line_error(ask)
    Path(data).write_text(text.replace("\tcount", "\tcounting"))
    assert "'counting' is no category of MME" in one_line_error(ask)


def test_one_question_of_an_image_is_missing(tmp_path, one_line_error):
    data = mme(tmp_path, 1)
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:2]))
    (tmp_path / "p.jsonl").write_text(PREDICTIONS["answers.jsonl"].splitlines()[0])
    argv = ["eval", "--predictions", str(tmp_path / "p.jsonl"), "--task", "mme"]
    argv += ["--data", str(data), "--out", str(tmp_path / "out")]
    assert "MME.tsv:1: 1 questions about its image in count, not two" in one_line_error(argv)


def test_questions_are_rows_of_generate(tmp_path):
    """The same bytes each time, and images that `hovle generate` finds."""
    from hovle_jax.generation.questions import question_of

    run = Run("mme", "vlmevalkit", (str(mme(tmp_path)),), out=str(tmp_path / "out"))
    store = ImageStore(run.directory.parent / "images")
    path = write_questions(run, read_examples(run, store)[0])
    first = path.read_bytes()
    assert write_questions(run, read_examples(run, store)[0]).read_bytes() == first
    asked = question_of(read(path)[0], "q", str(path.parent))
    assert Image.open(str(asked.images[0])).size == (40, 30)


@pytest.mark.slow  # three processes that load and compile; run with `pytest -m slow`
def test_killed_twice(release, tmp_path):
    data = mme(tmp_path, 30)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    argv = [sys.executable, "-m", "hovle_jax.cli", *arguments(release, data, whole)]
    subprocess.run(argv, check=True)
    argv = [sys.executable, "-m", "hovle_jax.cli", *arguments(release, data, cut)]
    own = cut / "mme" / "internvl"
    for lines in (1, 25):
        process = subprocess.Popen(argv)
        while process.poll() is None and (
            not (own / "answers.jsonl").exists()
            or (own / "answers.jsonl").read_bytes().count(b"\n") < lines
        ):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert 25 <= (own / "answers.jsonl").read_bytes().count(b"\n") < 60
    subprocess.run(argv, check=True)
    for name in ("questions.jsonl", "answers.jsonl", "scores.jsonl", "predictions.tsv"):
        assert (own / name).read_bytes() == (whole / "mme" / "internvl" / name).read_bytes()
