"""The whole demo in miniature: every file it promises, chat with its model, honest controls."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from hovle_jax.cli.main import main
from hovle_jax.demo import run, settings, standins

ROOT = Path(__file__).parent.parent

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """`hovle demo` with a few steps of everything, on all eight simulated devices."""
    patch = pytest.MonkeyPatch()
    for name, value in (("TRAIN_CANVASES", 60), ("TEST_PER_TYPE", 20)):
        patch.setattr(run, name, value)
    patch.setattr(settings, "STEPS", {"distill": 30, "align": 2, "instruct": 2})
    patch.setattr(standins, "LM_STEPS", 2)
    patch.setattr(standins, "TEACHER_STEPS", 2)
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--out", str(out), "--seed", "3"]) == 0
    yield out
    patch.undo()


def test_report_json_has_the_promised_keys(demo):
    report = json.loads((demo / "report.json").read_text())
    assert report["seed"] == 3 and report["minutes"] > 0
    assert list(report["results"]) == ["full"]
    for kind in ("position", "comparison", "yes_no"):
        scores = report["results"]["full"][kind]
        assert set(scores) == {"accuracy", "blind", "shuffled", "majority", "n"}
        assert scores["n"] == 20
        assert all(0 <= scores[k] <= 1 for k in ("accuracy", "blind", "shuffled", "majority"))
    assert report["results"]["full"]["yes_no"]["majority"] == 0.5


def test_pictures_and_markdown_are_written(demo):
    text = (demo / "report.md").read_text()
    for name in ("curves.png", "samples.png", "cosine.png"):
        assert (demo / name).stat().st_size > 10_000 and name in text


def test_stage_1_already_moved_toward_the_teacher(demo):
    rows = [json.loads(x) for x in (demo / "full/distill/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss/image"] < 0.5 * rows[0]["loss/image"]


def test_chat_answers_about_any_image_file(demo, capsys):
    image = str(next((demo / "data/images/test").iterdir()))
    argv = ["chat", str(demo / "full/instruct"), "--image", image, "--prompt", "Is there a 7?"]
    capsys.readouterr()
    assert main([*argv, "--max-new-tokens", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_interactive_chat_keeps_history_and_ends_at_an_empty_line(demo, capsys, monkeypatch):
    image = str(next((demo / "data/images/test").iterdir()))
    lines = iter(["Is there a 7?", "Which digit is top-left?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    argv = ["chat", str(demo / "full/instruct"), "--image", image, "--max-new-tokens", "4"]
    assert main(argv) == 0
    assert capsys.readouterr().out.count("hovle> ") == 2


def test_a_directory_with_files_is_not_overwritten(demo, one_line_error):
    assert "is not empty" in one_line_error(["demo", "--out", str(demo)])


@pytest.mark.slow  # trains, asks and exports once more: a minute; run with `pytest -m slow`
def test_the_quick_start(demo, tmp_path, monkeypatch):
    """Every line of docs/quickstart.md that is marked with this test, as it stands there."""
    page = (ROOT / "docs/quickstart.md").read_text()
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(demo)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "STEPS", {"distill": 2, "align": 2, "instruct": 2})
    config, scoring = re.findall(r"^```python\n(.*?)^```", page, flags=re.S | re.M)
    (tmp_path / "configs/deeper.py").write_text(config)
    blocks = re.findall(
        r"((?:^    .*\n)+)\n<!-- test: .*test_the_quick_start -->", page, flags=re.M
    )
    commands = [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]
    assert [c[0] for c in commands].count("train") == 3 and len(commands) == 9
    for command in commands:
        assert main(command) == 0, command
    exec(scoring, {})
    made = json.loads((tmp_path / "runs/deeper/instruct/config.json").read_text())
    assert made["config"]["model"]["embedding"]["num_layers"] == 4
    for name in ("row.png", "distill.png", "compare.png", "exported/verification.json"):
        assert (tmp_path / name).stat().st_size > 100
