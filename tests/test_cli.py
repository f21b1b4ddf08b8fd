"""Bad input: one clear line each, exit status 1, naming the file, row or key."""

from __future__ import annotations

import argparse
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from hovle_jax.cli import main as cli
from hovle_jax.cli.main import load_config, main
from hovle_jax.config import RunConfig, to_dict
from hovle_jax.errors import UserError
from tests.conftest import write_meta


@pytest.fixture
def run(world, tmp_path, one_line_error):
    """`hovle train` of a stage with changes; returns its one line of error."""

    def train(stage: str, *overrides: str, **changes: object) -> str:
        changes = {"init__scratch": True} | changes
        return one_line_error(argv(world, tmp_path, stage, *overrides, **changes))

    return train


def argv(world, tmp_path: Path, stage: str, *overrides: str, **changes: object) -> list[str]:
    config = to_dict(world.config(stage, mesh__tensor=8, steps=1, **changes))
    path = tmp_path / "config.py"
    path.write_text(
        "import ml_collections\n"
        f"def get_config():\n    return ml_collections.ConfigDict({config!r})\n"
    )
    return ["train", f"--config={path}", f"--workdir={tmp_path / 'run'}", *overrides]


def turns(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]


@pytest.mark.parametrize(
    "override, expected",
    [
        ("--config.optim.lrr=1", "config.optim.lrr: unknown config key; did you mean 'lr'?"),
        ("--config.optimizer.lr=1", "unknown config key"),
        ("--config.optim.lr=fast", "config.optim.lr: expected float, got 'fast'"),
        ("--config.stage=stage9", "config.stage: 'stage9' is not one of distill, align, instruct"),
        ("--config.model.dtype=int8", "model.dtype: 'int8' is not one of"),
        ("--config.optim.accumulate=3", "config.data.rows 8 is not a multiple of 3"),
        ("--config.trainable='embedding/nothing'", "config.trainable"),
    ],
)
def test_config_errors_name_the_key(run, override, expected):
    assert expected in run("instruct", override)


def test_overrides_reach_the_config(world, tmp_path):
    args = argv(world, tmp_path, "instruct")
    path = args[1].removeprefix("--config=")
    config = load_config(path, ["--config.optim.lr=1e-5", "--config.data.system=hi"])
    assert config.optim.lr == 1e-5 and config.data.system == "hi"
    assert isinstance(config, RunConfig)


def test_missing_image(run, world):
    meta = write_meta(world.root, [{"image": "no.png", "conversations": turns("hi")}], "a.json")
    line = run("instruct", data__meta=str(meta))
    assert "a.jsonl:1" in line and "no.png" in line and "not found" in line


def test_placeholders_that_do_not_match_the_images(run, world):
    row = {"image": "00.png", "conversations": turns("<image>\n<image>\nhi")}
    ok = {"image": "00.png", "conversations": turns("hi")}
    line = run("instruct", data__meta=str(write_meta(world.root, [ok, row], "b.json")))
    assert "b.jsonl:2" in line and "<image>" in line


def test_corrupt_jpeg(run, world, tmp_path):
    whole = (world.root / "images" / "01.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    row = {"image": str(tmp_path / "cut.jpg"), "conversations": turns("hi")}
    line = run("instruct", data__meta=str(write_meta(world.root, [row], "c.json")))
    assert "c.jsonl:1" in line and "cut.jpg" in line


def test_stage_2_needs_stage_1_or_an_explicit_flag(run):
    line = run("align", init__scratch=False)
    assert "config.init.previous" in line and "'distill'" in line and "scratch" in line


def test_stage_3_does_not_start_from_stage_1(run, world, tmp_path):
    first = tmp_path / "first"
    args = argv(world, tmp_path, "distill")
    args[2] = f"--workdir={first}"
    assert main(args) == 0
    line = run("instruct", init__scratch=False, init__previous=str(first))
    assert "is stage 'distill'" in line and "starts from 'align'" in line


def test_a_tokenizer_of_another_model(run):
    line = run("instruct", "--config.model.img_context_id=5")
    assert "config.model.img_context_id is 5" in line


def test_no_llm(run):
    line = run("distill", init__llm="", init__scratch=False)
    assert "embedding/text/table" in line and "config.init.llm" in line


def test_a_workdir_of_another_run(world, tmp_path, one_line_error):
    assert main(argv(world, tmp_path, "instruct", init__scratch=True)) == 0
    again = argv(world, tmp_path, "align", init__scratch=True)
    assert "config.stage='instruct'" in one_line_error(again)
    again = argv(world, tmp_path, "instruct", init__scratch=True, data__window=64)
    assert "config.data.window=32" in one_line_error(again)


def test_chat_needs_a_model(one_line_error, tmp_path):
    assert "no config.json" in one_line_error(["chat", str(tmp_path), "--prompt", "hi"])


def test_unknown_arguments_are_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", f"--workdir={tmp_path}"])
    assert stop.value.code == 2
    capsys.readouterr()
    config = "--config=configs/stage3_instruct.py:tiny"
    for argv, message in (
        (["chat", "x", "--promt=hi"], "chat: unknown argument --promt=hi"),
        (["data", "tile", "a.png", "--nonsense"], "data tile: unknown argument --nonsense"),
        (["checkpoint", "ls", "run", "--all"], "checkpoint ls: unknown argument --all"),
        (["plan", "--tabulate", "x", "--fats"], "plan --tabulate: unknown argument --fats"),
        (["plan", config], "plan: --topology is missing"),
        (["bench", "data", "--second=1"], "bench data: unknown argument --second=1"),
        (["verify", "x"], "verify: needs recorded cases or --live HF_DIR"),
        (["data", "stats", config, "--row=1"], "unknown argument --row=1; overrides are"),
    ):
        assert main(argv) == 2, argv
        assert capsys.readouterr().err.startswith(f"hovle: {message}"), argv


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("README.md", "# Title", "README.md is no .py file"),
        ("a.py", "x = 1", "a.py has no function get_config"),
        ("b.py", "def get_config(:", "b.py: SyntaxError: "),
        ("c.py", "import nothing_of_this_name", "c.py, line 1: ModuleNotFoundError: No module"),
        ("d.py:big", "def get_config(): return {}", "d.py:big: get_config: too many positional"),
        ("e.py", "def get_config(): return 3", "config: expected a section of keys and values"),
        ("f.py", "def get_config(): return {'optim': 3}", "config.optim: expected a section"),
        (
            "g.py",
            "def get_config(): return {'teachers': ({'path': 'x'},)}",
            "config.teachers[0].name: is missing",
        ),
    ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, one_line_error, name, source, message):
    (tmp_path / name.partition(":")[0]).write_text(source)
    argv = ["train", f"--config={tmp_path / name}", f"--workdir={tmp_path / 'run'}"]
    assert message in one_line_error(argv)


def test_a_report_is_written_where_it_is_asked_for_or_refused_before_the_work(
    tmp_path, one_line_error
):
    image = str(Path(__file__).parent / "golden/preproc/04_640x480_RGB.png")
    report = tmp_path / "not" / "there" / "tile.json"
    assert main(["data", "tile", image, f"--json={report}"]) == 0
    assert json.loads(report.read_text())["cols"]
    for place, reason in ((tmp_path, "it is a directory"), (report / "x.json", "")):
        for argv in (["data", "tile", "no.png"], ["bench", "packing"], ["plot", "no"]):
            line = one_line_error([*argv, f"--json={place}"])
            assert f"{place}: cannot be written ({reason}" in line


@pytest.mark.parametrize("command", ["train", "demo", "chat"])
def test_every_command_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "example:" in capsys.readouterr().out


def test_help_tells_defaults():
    def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
        nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for each in [p for a in nested for p in a.choices.values()]:
            yield from leaves(each)
        if not nested:
            yield parser

    commands = list(leaves(cli._parser()))
    assert len(commands) > 20
    for command in commands:
        assert not [a.dest for a in command._actions if not a.help], command.prog
        assert not re.search(r"default: (None|False|\[|\))", command.format_help()), command.prog
    text = next(c for c in commands if c.prog == "hovle serve").format_help()
    assert "where it listens (default: 8000)" in text and "0: none (default: 1024)" in " ".join(
        text.split()
    )


def test_config_files_build_and_round_trip():
    names = ["stage1_distill", "stage2_align", "stage3_instruct"]
    for name in names:
        for variant in ("hovle_2b", "hovle_hd", "tiny"):
            config = load_config(f"configs/{name}.py:{variant}")
            assert config.model.name == variant
            again = RunConfig.from_config_dict(json.loads(json.dumps(to_dict(config))))
            assert again == config
    with pytest.raises(UserError, match="hovle_9b"):
        load_config("configs/stage1_distill.py:hovle_9b")


def test_data_tile(tmp_path, capsys):
    """The contract other tools rely on: grid and one hash per tile, thumbnail last."""
    golden = Path(__file__).parent / "golden/preproc"
    image, report = golden / "04_640x480_RGB.png", tmp_path / "tile.json"
    command = ["data", "tile", str(image), "--image-size", "448", "--max-tiles", "6"]
    assert main([*command, "--json", str(report), "--png", str(tmp_path / "tile.png")]) == 0
    body = json.loads(report.read_text())
    assert (body["cols"], body["rows"], len(body["sha256"])) == (3, 2, 7)
    assert body["sha256"][-1] in capsys.readouterr().out
    assert (tmp_path / "tile.png").stat().st_size > 1000


def test_data_inspect_and_stats(world, tmp_path, capsys):
    config = tmp_path / "c.py"
    fields = to_dict(world.config("instruct"))
    config.write_text(
        "import ml_collections\n"
        f"def get_config():\n    return ml_collections.ConfigDict({fields!r})\n"
    )
    for name in ("inspect", "stats"):
        picture = tmp_path / f"{name}.png"
        assert main(["data", name, f"--config={config}", "--png", str(picture)]) == 0
        assert picture.stat().st_size > 1000
    assert "colours" in capsys.readouterr().out
    index = tmp_path / "index"
    assert main(["data", "index", f"--config={config}", "--out", str(index)]) == 0
    assert "colours: 25 records" in capsys.readouterr().out
    assert len(list(index.glob("colours-*.npy"))) == 1


@pytest.mark.parametrize(("hosts", "after"), [(1, signal.SIG_DFL), (2, signal.SIG_IGN)])
def test_sigterm_on_the_way_out(monkeypatch, tmp_path, hosts, after):
    """All is saved: hosts that meet once more to leave must not kill each other's exit status."""
    monkeypatch.setattr(cli, "_train_on", lambda args, config: 75)
    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        command = ["train", "--config=configs/stage3_instruct.py:tiny", f"--workdir={tmp_path}"]
        assert main(command) == 75
        assert signal.getsignal(signal.SIGTERM) == after
    finally:
        signal.signal(signal.SIGTERM, before)
