"""`hovle data convert`: resumable, the same bytes again, and every rejected row accounted for."""

import hashlib
import json
import os
import pickle
import resource
from pathlib import Path

import pytest

from hovle_jax.data import array_record, convert, readers, sources
from hovle_jax.data.files import allow_many_open
from hovle_jax.data.records import Record, Turn
from hovle_jax.errors import UserError
from tests.conftest import write_meta
from tests.test_formats import CAPTIONS, EXPECTED, content, make, pictures, talk

TURNS = (Turn("user", "<image>\nq 猫"), Turn("assistant", "a"))


class Rows:
    """Text rows of known size; a row given as an exception raises it, once if it is a kill."""

    max_tiles = 3

    def __init__(self, name="rows", count=20, bad=()):
        self.name, self._count, self.bad, self.read = name, count, dict(bad), []

    def __len__(self):
        return self._count

    def __getitem__(self, i):
        self.read.append(i)
        if i in self.bad:
            raise self.bad[i]
        turns = (Turn("user", "q" * 40), Turn("assistant", f"{self.name} {i:03}"))
        return Record(turns, (), f"{self.name}:{i + 1}")


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def run(sources, out, **options):
    return convert.convert(sources, str(out), **{"quiet": True, "shard_bytes": 500} | options)


def answers(source) -> list[str]:
    return [source[i].turns[-1].text for i in range(len(source))]


def test_shards_manifest_and_parts(tmp_path):
    given = [Rows("a", 20), Rows("b", 5)]
    manifest = run(given, tmp_path / "out")
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["records"], manifest["rejects"]) == (25, 0)
    shards = manifest["sources"]["a"]["shards"]
    assert len(shards) == 5 and [s["first"] for s in shards[1:]] == [s["end"] for s in shards[:-1]]
    for shard in shards:
        data = (tmp_path / "out" / shard["file"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
    names = {s["file"] for part in manifest["sources"].values() for s in part["shards"]}
    assert set(files(tmp_path / "out")) == names | {"manifest.json", "meta.json", "rejects.jsonl"}
    whole = sources.open_source(str(tmp_path / "out"))
    assert (whole.name, whole.max_tiles, len(whole)) == ("out", 3, 25)
    everything = [f"a {i:03}" for i in range(20)] + [f"b {i:03}" for i in range(5)]
    assert answers(whole) == everything
    part = array_record.ArrayRecordSource("b", str(tmp_path / "out"), part="b")
    assert answers(pickle.loads(pickle.dumps(part))) == everything[20:]
    assert part[4].where == f"{tmp_path}/out/b-00001.array_record:1"
    alone = sources.open_source(str(tmp_path / "out" / "a-00001.array_record"))
    assert answers(alone) == everything[shards[1]["first"] : shards[1]["end"]]
    with pytest.raises(UserError, match="no part 'c'; there are a, b"):
        array_record.ArrayRecordSource("c", str(tmp_path / "out"), part="c")


def test_parts_keep_their_limits_and_how_often_they_come(tmp_path):
    """One entry for parts that differ would give all of them the run's own limit, once."""
    few, many = Rows("few", 4), Rows("many", 9)
    few.max_tiles, out = 1, tmp_path / "out"
    run([few, many], out, config={"repeat_time": {"few": 3.0, "many": 0.5}})

    def opened(**entry):
        (tmp_path / "meta.json").write_text(json.dumps({"x": entry}))
        (found,) = sources.open_meta(str(tmp_path / "meta.json"))
        return len(found.source), found.source.max_tiles, found.repeat

    for path in ("out", "out/*.array_record"):
        with pytest.raises(UserError, match="its parts have different tile limits .*DIRECTORY#PAR"):
            opened(annotation=path)
        with pytest.raises(UserError, match="its parts have different repeat_time"):
            opened(annotation=path, max_dynamic_patch=2)
        assert opened(annotation=path, max_dynamic_patch=2, repeat_time=1) == (13, 2, 1)
    assert opened(annotation="out#few") == opened(annotation="out/few-*.array_record") == (4, 1, 3)
    assert opened(annotation="out#many") == (9, 3, 0.5)
    assert opened(annotation="out#many", max_dynamic_patch=2, repeat_time=2) == (9, 2, 2)
    with pytest.raises(UserError, match="no part 'x'; there are few, many"):
        opened(annotation="out#x")
    images = sources.open_source(f"{out}#few")
    assert (images.name, len(images)) == ("few", 4)


def test_a_converted_mixture_is_the_mixture(tmp_path, monkeypatch):
    """Its meta.json says all that the one it was made of said, wherever the directory goes."""
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'conversations': turns})}\n" * 3)
    (tmp_path / "some.txt").write_text("one text\nanother\n")
    meta = {
        "few": {"max_dynamic_patch": 2, "weight": 3, "data_augment": True},
        "many": {"repeat_time": 2.5, "weight": 0.5},
        "text": {"annotation": "some.txt", "text": True, "weight": 1},
        "none": {"annotation": "bad.jsonl", "weight": 1},
    }
    (tmp_path / "bad.jsonl").write_text('{"conversations": []}\n')
    given = {k: {"annotation": "rows.jsonl", "root": str(tmp_path)} | v for k, v in meta.items()}
    (tmp_path / "meta.json").write_text(json.dumps(given))
    out = tmp_path / "out"
    convert.run_convert([str(tmp_path / "meta.json")], str(out), max_rejects=0.2, quiet=True)

    def said(path):
        found = [
            (e.name, len(e.source), e.source[0].turns, e.source.max_tiles, e.repeat, e.weight)
            + (e.augment,)
            for e in sources.open_meta(str(path))
        ]
        return {about[0]: about[1:] for about in found}

    del given["none"]  # of which every row was rejected
    (tmp_path / "meta.json").write_text(json.dumps(given))
    before = said(tmp_path / "meta.json")
    assert before["few"][2:] == (2, 1.0, 3.0, True)
    assert before["many"][2:] == (None, 2.5, 0.5, False)
    out = out.rename(tmp_path / "elsewhere")
    assert said(out / "meta.json") == before
    monkeypatch.chdir(out)
    assert said("meta.json") == before


def test_again_gives_the_same_bytes(tmp_path):
    bad = {3: UserError("rows:4: is bad")}
    for out in ("one", "two"):
        run([Rows(bad=bad), Rows("b", 5)], tmp_path / out, max_rejects=0.1)
    first = files(tmp_path / "one")
    assert files(tmp_path / "two") == first
    source = Rows(bad=bad)
    run([source, Rows("b", 5)], tmp_path / "one", max_rejects=0.1)  # finished: nothing to do
    assert not source.read and files(tmp_path / "one") == first


@pytest.mark.parametrize("at", range(0, 20, 3))
def test_resumes_after_a_kill(tmp_path, at):
    """Whatever row it dies at; finished shards are not read again."""
    bad = {
        1: UserError("rows:2: is bad"),
        8: UserError("rows:9: is bad"),
        19: UserError("rows:20: x"),
    }
    options = {"max_rejects": 0.5}
    run([Rows("a", 3), Rows(bad=bad)], tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run([Rows("a", 3), Rows(bad=bad | {at: KeyboardInterrupt()})], tmp_path / "out", **options)
    done = [path for path in files(tmp_path / "out") if path.endswith(".array_record")]
    stamps = {path: (tmp_path / "out" / path).stat().st_mtime_ns for path in done}
    with pytest.raises(UserError, match="an unfinished conversion"):
        sources.open_source(str(tmp_path / "out"))
    # A kill while the journal is written.
    (tmp_path / "out" / "journal.json.tmp").write_text('{"config": {')
    source = Rows(bad=bad)
    run([Rows("a", 3), source], tmp_path / "out", **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert {path: (tmp_path / "out" / path).stat().st_mtime_ns for path in done} == stamps
    assert len(source.read) < 20 + 5 or not done


def test_a_kill_between_naming_and_journal(tmp_path, monkeypatch):
    run([Rows()], tmp_path / "whole")
    journal = convert._Job._write_journal

    def dies(self, shards):
        if len(shards) == 2:
            raise KeyboardInterrupt
        journal(self, shards)

    with monkeypatch.context() as patch:
        patch.setattr(convert._Job, "_write_journal", dies)
        with pytest.raises(KeyboardInterrupt):
            run([Rows()], tmp_path / "out")
    assert (tmp_path / "out" / "rows-00001.array_record").exists()
    run([Rows()], tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_kill_just_before_the_end(tmp_path, monkeypatch):
    run([Rows()], tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, missing_ok: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run([Rows()], tmp_path / "out")
    source = Rows()
    run([source], tmp_path / "out")
    assert not source.read and files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_full_disk(tmp_path):
    """Not a reject: the row is fine, and is read again when the command is."""
    full = OSError(28, "No space left on device")
    with pytest.raises(UserError, match=r"out: stopped \(.*No space left.*same command") as error:
        run([Rows(bad={12: full})], tmp_path / "out")
    assert "\n" not in str(error.value)
    assert run([Rows()], tmp_path / "out")["rejects"] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"sources": []},
        {"sources": {"rows": {}}},
        {"sources": {"rows": {"max_tiles": "4", "shards": []}}},
        {"config": {"repeat_time": {"rows": []}}},
        {"sources": {"rows": {"max_tiles": 4, "shards": [{"file": "a", "records": -1}]}}},
        {"sources": {"rows": {"max_tiles": 4, "shards": [{"file": "a", "records": "1"}]}}},
    ],
)
def test_broken_manifests(tmp_path, change):
    manifest = run([Rows()], tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest of version 1"):
        sources.open_source(str(tmp_path / "out"))


def test_other_settings_or_contents_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run([Rows(bad={12: KeyboardInterrupt()})], tmp_path / "out")
    with pytest.raises(UserError, match="out: a conversion of other inputs or settings"):
        run([Rows()], tmp_path / "out", shard_bytes=501)
    shard = tmp_path / "out" / "rows-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"rows-00000\.array_record: missing or changed"):
        run([Rows()], tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"mine: not empty \(thesis\.txt\)"):
        run([Rows()], tmp_path / "mine")
    run([Rows()], tmp_path / "done")
    with pytest.raises(UserError, match="a conversion of other inputs"):
        run([Rows("b")], tmp_path / "done")
    (tmp_path / "done" / "rows-00001.array_record").unlink()
    with pytest.raises(UserError, match=r"rows-00001\.array_record: missing or changed"):
        run([Rows()], tmp_path / "done")
    with pytest.raises(UserError, match=r"rows-00001\.array_record: not readable .*no such file"):
        sources.open_source(str(tmp_path / "done"))[6]


def test_open_files_have_a_limit_which_is_raised(tmp_path):
    """Every shard stays open; a limit that is met is not called damage."""
    run([Rows(count=40)], tmp_path / "out", shard_bytes=10)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 10, limits[1]))
        source = sources.open_source(str(tmp_path / "out"))
        with pytest.raises(UserError, match=r"not readable as ArrayRecord .*Too many open files"):
            for i in range(len(source)):
                source[i]
        allow_many_open()
        assert answers(source) == [f"rows {i:03}" for i in range(40)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_rejects(tmp_path):
    bad = {i: UserError(f"rows:{i + 1}: reason {i}") for i in (2, 19)}
    with pytest.raises(UserError, match=r"2 of 20 rows were rejected.*rows:3: reason 2") as error:
        run([Rows(bad=bad)], tmp_path / "out", max_rejects=0.05)
    assert "\n" not in str(error.value)
    source = Rows(bad=bad)
    manifest = run([source], tmp_path / "out", max_rejects=0.1)  # nothing is done twice
    assert (manifest["records"], manifest["rejects"], source.read) == (18, 2, [])
    lines = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"source": "rows", "row": i + 1, "reason": f"rows:{i + 1}: reason {i}"} for i in bad
    ]
    every = {i: UserError(f"rows:{i + 1}: x") for i in range(3000)}
    source = Rows(count=3000, bad=every)
    with pytest.raises(UserError, match="1001 of 3000 rows were rejected"):
        run([source], tmp_path / "early")
    assert len(source.read) == 1001
    manifest = run([Rows(count=4, bad=every)], tmp_path / "none", max_rejects=1)
    assert manifest["records"] == 0 and manifest["sources"]["rows"]["shards"] == []
    with pytest.raises(UserError, match="none: no records"):
        sources.open_source(str(tmp_path / "none"))


def test_images_are_checked_and_copied_unchanged(tmp_path):
    good = pictures()[1]
    data = {"good.jpg": good, "cut.jpg": good[:-90], "text.jpg": b"hello", "empty.jpg": b""}
    for name, content_ in data.items():
        (tmp_path / name).write_bytes(content_)
    (tmp_path / "dir.jpg").mkdir()
    names = [*data, "dir.jpg", "missing.jpg", "/dev/zero", "a\0b", "../" * 400]
    rows = [{"image": name, "conversations": talk("x")} for name in names]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for check, kept in (("header", 2), ("full", 1), ("none", 4)):
        out = tmp_path / check
        options = {"max_rejects": 1, "check": check, "quiet": True}
        manifest = convert.run_convert([str(tmp_path / "a.jsonl")], str(out), **options)
        assert manifest["records"] == kept
        assert sources.open_source(str(out))[0].images == (good,)
        for line in (out / "rejects.jsonl").read_text().splitlines():
            reject = json.loads(line)
            assert reject["reason"].startswith(f"{tmp_path}/a.jsonl:{reject['row']}: ")
            assert reject["row"] > 4 or "image" in reject["reason"]
            assert "\n" not in reject["reason"]


def test_run_convert_inputs(tmp_path, capsys):
    kinds = ("value.jsonl", "llava.json", "json.tar", "im")
    paths = [make(kind, tmp_path) for kind in kinds]
    row = {"image": "0.png", "conversations": talk(CAPTIONS[0])}
    (tmp_path / "images").symlink_to(tmp_path / "im")
    meta = write_meta(tmp_path, [row])
    inputs = [*map(str, paths[:2]), f"tar={paths[2]}", str(paths[3]), str(meta)]
    manifest = convert.run_convert(inputs, str(tmp_path / "out"))
    assert "converting 17/17  0 rejected" in capsys.readouterr().err
    counts = {name: part["records"] for name, part in manifest["sources"].items()}
    assert counts == {"value": 4, "llava": 4, "tar": 4, "im": 4, "colours": 1}
    for name in ("value", "llava", "tar"):
        source = array_record.ArrayRecordSource(name, str(tmp_path / "out"), part=name)
        assert [content(source[i])[1] for i in range(4)] == EXPECTED
        assert answers(source) == list(CAPTIONS)
    same = {
        part["shards"][0]["sha256"]
        for name, part in manifest["sources"].items()
        if name in ("value", "llava", "tar")
    }
    assert len(same) == 1  # equal content, equal bytes, whichever format it came in
    folder = array_record.ArrayRecordSource("im", str(tmp_path / "out"), part="im")
    assert [content(folder[i]) for i in range(4)] == [([], pixels) for pixels in EXPECTED]
    with pytest.raises(UserError, match="two sources are named 'pairs'"):
        convert.run_convert([str(make("pairs.tar", tmp_path))] * 2, str(tmp_path / "x"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shard_bytes": 0}, "shard_bytes must be positive"),
        ({"max_rejects": 2}, "max_rejects must be a fraction"),
        ({"check": "some"}, "check: 'some' is not one of none, header, full"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run([Rows()], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_bad_names(tmp_path):
    for given, message in (([], "nothing to"), ([Rows("a/b")], "'a/b' is no file name")):
        with pytest.raises(UserError, match=message):
            run(given, tmp_path / "out")


def test_record_encoding():
    images = [b"\x00\x01", b"", b"third"]
    turns = [Turn("user", "<image>" * 3), TURNS[1]]
    data = array_record.encode_record(turns, images)
    header = b'{"images":[2,0,5],"turns":[["user","<image><image><image>"],["assistant","a"]]}'
    assert data == b"HVR1" + len(header).to_bytes(4, "little") + header + b"\x00\x01third"
    assert array_record.decode_record(data, "x:1") == Record(tuple(turns), tuple(images), "x:1")
    for hurt, message in (
        (b"", "not one of"),
        (b"HVR2" + data[4:], "of a newer version"),
        (data[:-1], "damaged"),
        (data + b"x", "damaged"),
        (data.replace(b'"user"', b'"usre"'), "damaged"),
        (data.replace(b"[2,", b"[-,"), "damaged"),
        (array_record.encode_record(TURNS, []), "1 '<image>' in user turns but 0 images"),
        (array_record.encode_record([], []), "no turns"),
    ):
        with pytest.raises(UserError, match=f"^x:1: .*{message}"):
            array_record.decode_record(hurt, "x:1")


def test_array_records_of_others(tmp_path):
    from array_record.python import array_record_module

    path = str(tmp_path / "x.array_record")
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    writer.write(b"theirs")
    writer.close()
    with pytest.raises(UserError, match=r"x\.array_record:1: the record is not one of `hovle data"):
        sources.open_source(path)[0]
    (tmp_path / "x.array_record").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"x\.array_record: not readable as ArrayRecord"):
        sources.open_source(path)
    (tmp_path / "manifest.json").write_text('{"version": 9}')
    with pytest.raises(UserError, match="not a manifest of version 1"):
        sources.open_source(str(tmp_path))


def test_odd_json_is_a_reject(tmp_path):
    turns = [
        [{"from": [], "value": "x"}, *talk("x")],
        [{"from": "human", "value": "\ud800"}, {"from": "gpt", "value": "a"}],
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    ]
    rows = [json.dumps({"conversations": t}) for t in turns]
    (tmp_path / "a.jsonl").write_text("\n".join(["[" * 100_000, *rows]))
    out = str(tmp_path / "out")
    manifest = convert.run_convert([str(tmp_path / "a.jsonl")], out, max_rejects=1, quiet=True)
    assert (manifest["records"], manifest["rejects"]) == (1, 3)


def test_jsonl_reader_still_reads_what_convert_reads(tmp_path):
    """The converter and training see one and the same record of a row."""
    path = make("messages.jsonl", tmp_path)
    source = readers.JsonlConversations("m", str(path), str(tmp_path))
    convert.run_convert([str(path)], str(tmp_path / "out"), quiet=True)
    converted = sources.open_source(str(tmp_path / "out"))
    assert [content(converted[i]) for i in range(4)] == [content(source[i]) for i in range(4)]
