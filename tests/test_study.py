"""A study runs nothing twice, shares what arms share, and its intervals are those of a textbook."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from hovle_jax import model
from hovle_jax.config import RunConfig
from hovle_jax.data.sources import open_meta
from hovle_jax.errors import UserError
from hovle_jax.nn import teacher
from hovle_jax.study import report, run
from hovle_jax.study.plan import STAGES, Arm, Sizes, Study, read_study
from hovle_jax.study.tasks import TASKS, Files, write
from hovle_jax.typed import changed

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SMALL = Sizes(train=24, unpaired=12, test=10, lm_steps=2, teacher_steps=2)
TWO = Study(
    "Does more of it help?",
    (Arm("captions", stages=("align",)), Arm("questions", stages=("align", "instruct"))),
    seeds=(3,),
    tasks=("words",),
    changes={"data.rows": 8, "align:steps": 2, "instruct:steps": 2},
    sizes=SMALL,
)


def untrained(module, config):
    rng = np.random.default_rng(0)
    shapes = module.abstract_params(config)
    return jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)


@pytest.mark.usefixtures("quick_compilation")
def test_a_study_goes_on_where_it_stopped_and_shares_stages(tmp_path, monkeypatch):
    """With stand-ins that were never trained: training those is in the demo's tests."""
    for name, module in (("fit_lm", model), ("fit_teacher", teacher)):
        monkeypatch.setattr(
            run.standins, name, lambda config, *_, m=module: (untrained(m, config), 0.5)
        )
    done: list[str] = []
    train = run.train

    def interrupted(config, workdir, **options):
        if done == ["align"]:
            raise KeyboardInterrupt
        done.append(config.stage)
        return train(config, workdir, **options)

    monkeypatch.setattr(run, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run_study(TWO, tmp_path, lambda line: None)
    monkeypatch.setattr(run, "train", lambda c, w, **k: done.append(c.stage) or train(c, w, **k))
    monkeypatch.setattr(run, "_standins", None)  # they are not made again
    lines: list[str] = []
    body = run.run_study(TWO, tmp_path, lines.append)
    assert done == ["align", "instruct"], "the second arm has the first one's stage II"
    assert [line for line in lines if line.startswith("[")][0] == "[1/2] words, seed 3: captions"
    monkeypatch.setattr(run, "train", None)
    monkeypatch.setattr(run, "_ask", None)
    assert run.run_study(TWO, tmp_path, lambda line: None) == body, "nothing is left to do"

    other = dataclasses.replace(TWO, sizes=dataclasses.replace(SMALL, train=30))
    with pytest.raises(UserError, match="has data of other sizes"):
        run.run_study(other, tmp_path, lambda line: None)

    found = body["results"]["words"]
    assert list(found) == ["captions", "questions"] and found["questions"]["questions"] == 10
    assert found["captions"]["interval"] is None, "one seed has none"
    assert body == json.loads((tmp_path / "report.json").read_text())
    root = tmp_path / "words" / "seed-3"
    parts = [p for p in (*root.glob("*/cpu.json"), *root.glob("answers/*"), root / "standins.json")]
    assert len(parts) == 5
    spent = sum(json.loads(p.read_text())["cpu_seconds"] for p in parts)
    assert body["cpu_seconds"] == pytest.approx(spent) and spent > 1
    assert "| questions |" in (tmp_path / "report.md").read_text()
    picture = tmp_path / "report.png"
    assert Image.open(picture).width > 300 and picture.stat().st_size < 100_000


def test_intervals_are_students(monkeypatch):
    """t of 2 degrees of freedom is 4.3027; the deviation of 0.5, 0.7, 0.9 is 0.2."""
    tables = {1: 12.7062, 2: 4.3027, 4: 2.7764, 9: 2.2622, 30: 2.0423}
    for freedom, t in tables.items():
        assert report.t_quantile(freedom) == pytest.approx(t, rel=2e-4)
    low, high = report.interval([0.5, 0.7, 0.9])
    assert (low, high) == pytest.approx((0.7 - 0.49684, 0.7 + 0.49684), abs=1e-4)


def test_differences_are_paired_by_seed():
    """Two arms that seeds move together differ by 0.2 each time but once by 0.3."""
    study = Study("?", (Arm("first"), Arm("second")), tasks=("words",))

    def of_seeds(*right: int) -> list[list[int]]:
        return [[1] * n + [0] * (10 - n) for n in right]

    correct = {"words": {"first": of_seeds(1, 5, 6), "second": of_seeds(3, 7, 9)}}
    body = report.summary(study, correct, 120.0)
    second = body["results"]["words"]["second"]
    assert second["accuracy"] == [0.3, 0.7, 0.9]
    assert second["difference"]["mean"] == pytest.approx(0.7 / 3)
    half = 4.3027 * np.std([0.2, 0.2, 0.3], ddof=1) / np.sqrt(3)
    expected = (0.7 / 3 - half, 0.7 / 3 + half)
    assert second["difference"]["interval"] == pytest.approx(expected, abs=1e-4)
    text = report.markdown(body)
    assert (
        "| second | 0.633 | -0.126 to 1.392 | +0.233 | +0.090 to +0.377 | 0.300, 0.700, 0.900 |"
        in text
    )
    assert "2 minutes of CPU in all" in text


def test_a_seed_counts_when_every_arm_has_it():
    study = Study("?", (Arm("first"), Arm("second")), tasks=("words", "digits"))
    correct = {"words": {"first": [[1], [0]], "second": [[1]]}, "digits": {"first": [[1]]}}
    results = report.summary(study, correct, 0.0)["results"]
    assert set(results) == {"words"}
    assert results["words"]["first"]["accuracy"] == [1.0]


@pytest.mark.parametrize("name", ["words", "digits"])
def test_files_of_a_task(tmp_path, name):
    task = TASKS.find(name)
    files, tokenizer = write(task, tmp_path / "a", 0, SMALL)
    again, _ = write(task, tmp_path / "b", 0, SMALL)
    for x, y in zip(files.labelled("train", "test"), again.labelled("train", "test"), strict=True):
        np.testing.assert_array_equal(x, y)
    images, labels = files.labelled("train")
    assert images.shape == (24, 32, 32, 3) and labels.shape == (24, 4)
    for symbol in task.symbols:  # what the LM reads is what the teacher learns to point at
        assert tokenizer.decode([tokenizer.encode_ordinary(symbol)[-1]]).strip() == symbol
    rows = [json.loads(line) for line in (tmp_path / "a" / "questions.jsonl").open()]
    assert len(rows) == 48
    question, answer = task.ask(labels[3].tolist(), 7)
    human, reply = rows[7]["conversations"]
    assert human["value"] == f"<image>\n{question}" and reply["value"] == answer
    assert rows[7]["image"] == "train/00003.png"
    entries = open_meta(files.places["{instruct_text}"])
    assert [entry.name for entry in entries] == ["questions", "text"]
    assert (
        sorted(p.name for p in (tmp_path / "a" / "unpaired").iterdir())[:5]
        == sorted(p.name for p in (Files(tmp_path / "a").root.joinpath("unpaired")).iterdir())[:5]
    )
    part = files.unpaired(5)
    assert len(list((tmp_path / "a" / "unpaired-5").iterdir())) == 5 and part.endswith("-5")
    with pytest.raises(UserError, match="asks for 13 of 12 unpaired images"):
        files.unpaired(13)


def test_words_of_the_test_are_in_nothing_else(tmp_path):
    task = TASKS.find("words")
    rng = np.random.default_rng(0)
    seen = {tuple(task.draw(rng, False)) for _ in range(3000)}
    asked = {tuple(task.draw(rng, True)) for _ in range(300)}
    assert len(asked) > 100 and not seen & asked
    assert {letter for word in asked for letter in word} <= {x for word in seen for x in word}
    answers = {task.text(rng, i, True)[1] for i in range(200)}
    words = {task.ask(list(word), 0)[1] for word in asked}
    assert not answers & words, "the stand-in LM has not read them either"
    _, tokenizer = write(task, tmp_path, 0, SMALL)
    for word in words:
        assert len(tokenizer.encode_ordinary(word)) == 4, "a word is its letters, and no unit"


def test_arms_share_what_they_do_not_change():
    study = Study(
        "?",
        (
            Arm("full"),
            Arm("other III", {"instruct:optim.lr": 1e-4}),
            Arm("other model", {"model.embedding.num_layers": 1}),
            Arm("less", images=3),
        ),
    )
    keys = [[study.key(arm, stage) for stage in STAGES] for arm in study.arms]
    assert keys[0][:2] == keys[1][:2] and keys[0][2] != keys[1][2]
    assert all(a != b for a, b in zip(keys[0], keys[2], strict=True))
    assert all(a != b for a, b in zip(keys[0], keys[3], strict=True))


def test_results_are_of_the_code_they_came_from(tmp_path):
    """An edited plug-in or study gives other keys to the arms that use it, and to no others."""

    def keys(version: int) -> list[str]:
        (tmp_path / "part.py").write_text(f"VERSION = {version}\n")
        (tmp_path / "own.py").write_text(
            "import dataclasses\n"
            "from hovle_jax.stages import STAGES\n"
            "from hovle_jax.study.plan import Arm, Study\n"
            f"STAGES.add('own')(dataclasses.replace(STAGES['distill'], name='{version}'))\n"
            "def get_study():\n"
            "    plug = {'model.plugins': ('PART',)}\n"
            "    own = {'distill:stage': 'own'}\n"
            "    arms = Arm('plain'), Arm('plugged', plug), Arm('own', own)\n"
            "    return Study('?', arms)\n".replace("PART", str(tmp_path / "part.py"))
        )
        code = (
            "from hovle_jax.study.plan import read_study; import sys\n"
            "study = read_study(sys.argv[1])\n"
            "print(*(study.key(arm, 'distill') for arm in study.arms))"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "own.py")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    before, after = keys(1), keys(2)
    assert len({*before}) == 3
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]


def test_what_is_wrong_with_a_study_is_one_line(tmp_path):
    with pytest.raises(UserError, match="arm 'x': stages .* must be different"):
        Arm("x", stages=("align", "align"))
    with pytest.raises(UserError, match="changes stage 'distill', which it does not have"):
        Arm("x", {"distill:steps": 3}, stages=("instruct",))
    with pytest.raises(UserError, match="arms .* must be different"):
        Study("?", (Arm("x"), Arm("x")))
    with pytest.raises(UserError, match=r"study.tasks: 'letters' is not one of words, digits"):
        run.run_study(Study("?", (Arm("x"),), tasks=("letters",)), tmp_path)
    config = RunConfig(stage="instruct")
    with pytest.raises(UserError, match=r"arm 'x': 'optim.lrr' is no key"):
        changed(config, {"optim.lrr": 1.0}, "arm 'x'")
    with pytest.raises(UserError, match="'optimizer' is no section"):
        changed(config, {"optimizer.lr": 1.0}, "arm 'x'")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match=r"needs a function get_study\(\)"):
        read_study(tmp_path / "empty.py")


def test_the_studies_of_the_repository_name_real_keys(pytestconfig):
    for path in sorted((pytestconfig.rootpath / "configs" / "studies").glob("*.py")):
        study = read_study(path)
        for arm in study.arms:
            for stage in arm.stages:
                places = {"{align}": "x", "{align_text}": "x", "{instruct_text}": "x"}
                own = {k: places.get(v, v) for k, v in study.of(arm, stage).items() if v != ()}
                changed(RunConfig(stage=stage), own, f"{path.name}, arm {arm.name!r}")
