"""`hovle generate`: rows in order, bad rows in their place, a kill without duplicates or gaps."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hovle_jax.cli.main import main
from hovle_jax.data.records import Turn
from hovle_jax.errors import UserError
from hovle_jax.generation.batch import Settings, answer_file, check_parts, join, make_part, part_of
from hovle_jax.generation.chat import Assistant, Question
from hovle_jax.generation.text_stream import TextStream
from tests.test_hosts import free_port

pytestmark = pytest.mark.usefixtures("quick_compilation")
NEW = 6
SHAPES = ["--slots", "2", "--context", "1024"]  # those of `run`: nothing new to compile


@pytest.fixture(scope="module")
def assistant(release) -> Assistant:
    return Assistant.load(release)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(release: Path) -> list[dict]:
    uri = base64.b64encode((release.parent / "image.png").read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{uri}"}},
        {"type": "text", "text": "what is it"},
    ]
    told = [{"from": "human", "value": "<image>\nand that"}, {"from": "gpt", "value": "known"}]
    return [
        {"id": "a", "prompt": "a b"},
        {"id": "b", "question": "what is it", "image": "image.png"},
        {"messages": [{"role": "user", "content": parts}]},
        {"id": 3, "conversations": told, "image": ["image.png"]},
        {"prompt": "two", "images": ["image.png", "image.png"], "max_tokens": 2, "source": "x"},
        {"prompt": "a b", "temperature": 5.0, "seed": 3},
    ]


def run(assistant, source, target, slots=2) -> tuple[int, int, int]:
    engine = assistant.engine(slots=slots, context=1024)
    return answer_file(assistant, engine, str(source), str(target), Settings(NEW))


def test_rows_are_answered_in_order(assistant, release, tmp_path):
    rows = rows_of(release)
    source = write(release.parent / "in.jsonl", rows)  # image paths are relative to the file
    assert run(assistant, source, tmp_path / "out.jsonl") == (0, 6, 0)
    out = read(tmp_path / "out.jsonl")
    assert [o["row"] for o in out] == [1, 2, 3, 4, 5, 6]
    assert [o.get("id") for o in out] == ["a", "b", None, 3, None, None]
    image = str(release.parent / "image.png")
    asked = [
        Question((Turn("user", "a b"),)),
        Question((Turn("user", "<image>\nwhat is it"),), (image,)),
        Question((Turn("user", "<image>\nand that"),), (image,)),
    ]
    answers = [o["answer"] for o in out]
    expected = assistant.answer(asked, max_new=NEW)
    assert [answers[0], answers[1], answers[3]] == expected
    assert answers[2] == answers[1] and answers[5] != answers[0]
    assert out[4]["completion_tokens"] == 2 and out[4]["finish_reason"] == "length"
    assert out[0]["prompt_tokens"] < out[1]["prompt_tokens"] < out[4]["prompt_tokens"]


BAD = [
    ("{", "not valid JSON"),
    ("{}", "no question; put one under one of 'prompt'"),
    ('{"prompt": " "}', "no question"),
    ('{"prompt": "q", "image": "no.png"}', "image file not found: "),
    ('{"prompt": "q", "image": "https://host/x.png"}', "is not fetched; download the image"),
    ('{"prompt": "<image> <image>", "image": "image.png"}', "they must match one to one"),
    ('{"messages": []}', "the last message must be the user's"),
    ('{"messages": [{"role": "tool", "content": "x"}]}', "unknown role 'tool'"),
    ('{"prompt": "q", "max_new_tokens": 0}', "at least one new token"),
    ('{"prompt": "q", "max_new_tokens": 5000}', "more than the context of 1024"),
    ('{"prompt": "q", "max_tokens": 3, "max_new_tokens": 4}', "max_tokens differ; give one"),
    ('{"prompt": "q", "max_new_token": 3}', "did you mean 'max_new_tokens'?"),
    ('{"prompt": "q", "temprature": 1}', "'temprature': did you mean 'temperature'?"),
    ('{"prompt": "q", "Top-P": 0.5}', "'Top-P': did you mean 'top_p'?"),
    ('{"prompt": "q", "temperature": -1}', "temperature must be between 0 and 100"),
    ('{"prompt": "q", "top_k": 1.5}', "top_k must be an integer"),
    ('{"prompt": "q", "stop": [""]}', "stop must be a string or a list"),
]


def test_a_bad_row_keeps_its_place(assistant, release, tmp_path, capsys):
    source = release.parent / "bad.jsonl"
    good = json.dumps({"prompt": "a b"})
    lines = [line for bad, _ in BAD for line in (bad, "")] + [good]
    source.write_text("\n".join([good, *lines]))
    assert run(assistant, source, tmp_path / "out.jsonl") == (0, len(BAD) + 2, len(BAD))
    out = read(tmp_path / "out.jsonl")
    assert [o["row"] for o in out] == [1, *range(2, 2 * len(BAD) + 2, 2), 2 * len(BAD) + 2]
    assert out[0]["answer"] == out[-1]["answer"]
    errors = capsys.readouterr().err.splitlines()
    assert errors == [f"error: {o['error']}" for o in out[1:-1]]
    for o, (_, message) in zip(out[1:-1], BAD, strict=True):
        assert o["error"].startswith(f"{source}:{o['row']}: ") and message in o["error"]


def test_resume_after_any_cut(assistant, release, tmp_path):
    """The output cut at every kind of place: the file is in the end what it would have been."""
    source, target = write(release.parent / "cut.jsonl", rows_of(release)), tmp_path / "out.jsonl"
    run(assistant, source, target)
    whole = target.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in (0, 1, ends[0] - 1, ends[0], ends[2] + 30, ends[-1] - 1, ends[-1]):
        target.write_bytes(whole[:cut])
        before = sum(end <= cut for end in ends)
        assert run(assistant, source, target) == (before, 6 - before, 0)
        assert target.read_bytes() == whole


def test_another_input_is_refused(release, tmp_path, one_line_error):
    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    target = tmp_path / "out.jsonl"
    argv = ["generate", str(release), "--input", str(source), "--output", str(target)]
    argv += ["--max-new-tokens", "2", *SHAPES]
    assert main(argv) == 0
    write(source, [{"prompt": "a"}, {"prompt": "c"}])
    assert "out.jsonl:2: answers another row than" in one_line_error(argv)
    other = one_line_error([*argv, "--temperature", "0.5"])
    assert (
        "out.jsonl.settings.json: the answers there were made with temperature 0.0, not 0." in other
    )
    assert "with stop [], not ['x']; give the same" in one_line_error([*argv, "--stop", "x"])
    settings = tmp_path / "out.jsonl.settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"weights": "0"}))
    assert "were made with weights '0', not '" in one_line_error(argv)
    settings.unlink()
    write(source, [{"prompt": "a"}])
    assert "out.jsonl:2: answers another row than" in one_line_error(argv)
    target.write_text("no json\n")
    assert "out.jsonl:1: not valid JSON" in one_line_error(argv)
    argv[5] = str(source)
    assert "is the input" in one_line_error(argv)
    argv[3] = str(tmp_path / "none.jsonl")
    assert "--input: no such file" in one_line_error(argv)


def test_status_is_1_when_rows_failed(release, tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}, {}])
    argv = ["generate", str(release), "--input", str(source), "--output", str(tmp_path / "o")]
    assert main([*argv, "--max-new-tokens", "2", *SHAPES]) == 1
    said = capsys.readouterr()
    assert said.out.endswith("o: 2 rows, 1 of them errors\n") and said.err.count("\n") == 1
    assert main([*argv, "--max-new-tokens", "2", *SHAPES]) == 1
    assert capsys.readouterr().out.endswith("o: 0 rows (2 were there), 1 of them errors\n")
    assert main([*argv, "--max-new-tokens", "2", *SHAPES, "--retry-errors"]) == 1
    assert capsys.readouterr().out.endswith("o: 1 rows (1 were there), 1 of them errors\n")


def test_errors_are_answered_again_in_their_places(assistant, release, tmp_path):
    """Also after a kill in the middle of that; the file is in the end what it would have been."""
    rows = [{"prompt": "a"}, {"prompt": "b", "image": "later.png"}, {"prompt": "c"}]
    source = write(tmp_path / "in.jsonl", [*rows, {"prompt": "d", "image": "never.png"}])
    target, aside = tmp_path / "out.jsonl", tmp_path / "out.jsonl.before"
    engine = assistant.engine(slots=2, context=1024)

    def again(**options):
        found = answer_file(assistant, engine, str(source), str(target), Settings(NEW), **options)
        assert not aside.exists()
        return found

    assert again() == (0, 4, 2) and again() == (4, 0, 2)
    old = target.read_bytes()
    shutil.copy(release.parent / "image.png", tmp_path / "later.png")
    assert again() == (4, 0, 2)
    assert again(retry=True) == (2, 2, 1)
    whole = target.read_bytes()
    run(assistant, source, tmp_path / "fresh.jsonl")
    assert whole == (tmp_path / "fresh.jsonl").read_bytes() and old != whole
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for lines, cut in ((0, 0), (0, 10), (1, ends[0]), (2, ends[1] + 3), (4, ends[3])):
        aside.write_bytes(old)
        target.write_bytes(whole[:cut])
        before, now, errors = again()
        assert (before >= lines, before + now, errors) == (True, 4, 1)
        assert target.read_bytes() == whole


def test_places_that_cannot_be(release, tmp_path, monkeypatch, one_line_error):
    """No directory 'gs:' is made; parts that a host does not see are missed before the work."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", [{"prompt": "a"}])
    argv = ["generate", str(release), "--input", "in.jsonl", "--output", "gs://bucket/out.jsonl"]
    assert one_line_error(argv).startswith("error: --output: gs://bucket/out.jsonl must be local")
    argv[3] = "gs://bucket/in.jsonl"
    assert one_line_error(argv).startswith("error: --input: gs://bucket/in.jsonl must be local")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    make_part("d/out.jsonl.0-of-2")
    with pytest.raises(UserError, match=r"--output must be seen by all hosts: d/out.jsonl.1-of-2"):
        check_parts("d/out.jsonl", 2)
    make_part("d/out.jsonl.1-of-2")
    check_parts("d/out.jsonl", 2)
    assert part_of("d/out.jsonl", 0, 3) == "d/out.jsonl.0-of-3"  # empty ones hold nobody up


@pytest.mark.slow  # three processes that load and compile; run with `pytest -m slow`
def test_killed_three_times(release, tmp_path):
    rows = [{"prompt": f"{'a b ' * (i % 7)} {i}", "id": i} for i in range(60)]
    source = write(tmp_path / "in.jsonl", rows)
    argv = [sys.executable, "-m", "hovle_jax.cli", "generate", str(release)]
    argv += ["--input", str(source), "--max-new-tokens", "40", "--context", "512", "--slots", "2"]
    whole, target = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    subprocess.run([*argv, "--output", str(whole)], check=True)
    for lines in (1, 20, 40):
        process = subprocess.Popen([*argv, "--output", str(target)])
        while process.poll() is None and (
            not target.exists() or target.read_bytes().count(b"\n") < lines
        ):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert lines <= target.read_bytes().count(b"\n") < 60  # it was killed before its end
    subprocess.run([*argv, "--output", str(target)], check=True)
    assert target.read_bytes() == whole.read_bytes()


def test_shares_of_hosts_become_one_file(assistant, release, tmp_path):
    rows = [{"prompt": f"{'a b ' * (i % 3)} {i}", "id": i} for i in range(7)]
    rows[4] = {"prompt": "where", "image": "nowhere.png"}
    source = write(tmp_path / "in.jsonl", rows)
    run(assistant, source, tmp_path / "whole.jsonl")
    target = str(tmp_path / "out.jsonl")
    engine = assistant.engine(slots=2, context=1024)
    shares = [part_of(target, host, 3) for host in range(3)]
    found = [
        answer_file(assistant, engine, str(source), part, Settings(NEW), (host, 3))
        for host, part in enumerate(shares)
    ]
    assert found == [(0, 2, 0), (0, 3, 0), (0, 2, 1)]
    whole, last = Path(shares[1]).read_bytes(), Path(shares[1]).read_bytes().splitlines(True)[:1]
    Path(shares[1]).write_bytes(b"".join(last) + b'{"ro')  # killed
    again = answer_file(assistant, engine, str(source), shares[1], Settings(NEW), (1, 3))
    assert again == (1, 2, 0) and Path(shares[1]).read_bytes() == whole
    with pytest.raises(UserError, match="is of another number of hosts than 2"):
        part_of(target, 0, 2)
    join(target, 3)
    assert Path(target).read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert part_of(target, 1, 3) == target and not list(tmp_path.glob("*-of-*"))


def test_two_hosts_answer_a_file(release, tmp_path):
    """Real processes; the second start finds everything there."""
    source = write(tmp_path / "in.jsonl", [{"prompt": f"a b {i}"} for i in range(5)])
    target = tmp_path / "out.jsonl"
    argv = ["generate", str(release), "--input", str(source), "--max-new-tokens", str(NEW), *SHAPES]
    assert main([*argv, "--output", str(tmp_path / "whole.jsonl")]) == 0

    def start(output: str = str(target), *where: Path) -> list[int]:
        join = [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"]
        command = [sys.executable, "-m", "hovle_jax.cli", *argv, "--output", output, *join]
        started = [
            subprocess.Popen([*command, f"--process={i}"], cwd=(where or (None, None))[i])
            for i in range(2)
        ]
        try:
            return [process.wait(300) for process in started]
        finally:
            for process in started:
                process.kill()

    assert start() == [0, 0]
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert start() == [0, 0] and len(list(tmp_path.iterdir())) == 5  # two with their settings
    disks = [tmp_path / "disk0", tmp_path / "disk1"]
    for disk in disks:
        disk.mkdir()
    assert start("out.jsonl", *disks) == [1, 1]  # they see their own parts only


# Text as it comes


TEXTS = ["one two  three", " spaced out \n", "naïve 你好 🙂 end", "a\n\nb", ""]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("stop", [(), ("two",), ("e",), ("\n\n", "out"), ("never", " t")])
def test_pieces_are_the_text(assistant, text, size, stop):
    """Whatever the pieces of tokens; never half a character, a stop string or part of one."""
    tokenizer = assistant.tokenizer
    ids = tokenizer.encode_ordinary(text)
    raw = tokenizer.decode(ids)
    ends = [raw.find(s) for s in stop if s in raw]
    stream, pieces = TextStream(tokenizer, stop), []
    for i in range(0, len(ids), size):
        pieces.append(stream.push(ids[i : i + size]))
    pieces.append(stream.close())
    assert "".join(pieces) == stream.text == raw[: min(ends, default=len(raw))].strip()
    assert stream.stopped == bool(ends)
    counts = (n for n in range(len(ids)) if any(s in tokenizer.decode(ids[:n]) for s in stop))
    assert stream.tokens == next(counts, len(ids))
    if ends:
        assert stream.push(ids) == "" and stream.close() == ""


def test_pieces_come_early(assistant):
    stream = TextStream(assistant.tokenizer, ("stop here",))
    ids = [assistant.tokenizer.encode_ordinary(t) for t in ("and then sto", "ry st")]
    assert stream.push(ids[0]) == "and then"
    assert stream.push(ids[1]) == " story"
    assert stream.close() == " st"
