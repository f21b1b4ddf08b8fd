"""`hovle data tokenize`: the same ids from every kind of file, after a kill and in any process."""

import contextlib
import gzip
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem

from hovle_jax.cli.main import main
from hovle_jax.data import text_files, tokenize_text
from hovle_jax.data.token_shards import TokenShards
from hovle_jax.data.tokenizer import Tokenizer, train_tokenizer
from hovle_jax.errors import UserError

DOCUMENTS = [
    "Which colour? please Hello",
    "an <img> of <|im_start|> and </s> is text",
    "naïve 猫 \u2028 line",
    "  two  spaces ",
    *(f"document {n} " + "red green blue " * (n % 5) for n in range(40)),
]
EMPTY = ("", "  ", "\t")
KINDS = ("txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst", "parquet")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(DOCUMENTS, tmp_path_factory.mktemp("tokenizer"), 128)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(text_files, "_BATCH", 400)


def zstd(data: bytes) -> bytes:
    """Two frames, and one to be skipped between them, as parallel compressors write."""
    half = len(data) // 2
    skipped = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    return zstandard.compress(data[:half]) + skipped + zstandard.compress(data[half:])


def write(path: Path, documents=DOCUMENTS) -> str:
    """A file of the kind that its name says, with empty texts in between."""
    kind = path.name.partition(".")[2]
    texts = [x for n, text in enumerate(documents) for x in (text, EMPTY[n % 3])]
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"id": range(len(texts)), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
        return str(path)
    rows = [json.dumps({"text": x}) for x in texts] if kind.startswith("jsonl") else texts
    data = "\n".join(rows).encode()  # the last line has no end
    pack = {"gz": gzip.compress, "zst": zstd}.get(path.suffix[1:], bytes)
    path.write_bytes(pack(data))
    return str(path)


def run(inputs, out, tokenizer, **options):
    given = [str(x) for x in inputs]
    options = {"quiet": True, "shard_tokens": 60} | options
    return tokenize_text.tokenize_text(given, str(out), tokenizer, **options)


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def shards(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(out).items() if name.startswith("text-")}


def encoded(tokenizer, documents=DOCUMENTS) -> list[int]:
    return [i for text in documents for i in tokenizer.encode_ordinary(text)]


@pytest.fixture(scope="module")
def expected(tokenizer, tmp_path_factory):
    """The shards of DOCUMENTS."""
    root = tmp_path_factory.mktemp("expected")
    run([write(root / "x.txt")], root / "out", tokenizer)
    return shards(root / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_shards(tmp_path, tokenizer, expected, kind):
    path = write(tmp_path / f"x.{kind}")
    manifest = run([path], tmp_path / "out", tokenizer)
    assert shards(tmp_path / "out") == expected and len(expected) > 6
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["documents"], manifest["rejects"]) == (len(DOCUMENTS), 0)
    assert manifest["tokens"] == len(encoded(tokenizer))
    assert manifest["config"]["files"] == [[path, Path(path).stat().st_size]]
    for n, shard in enumerate(manifest["shards"]):
        assert shard["tokens"] <= 60
        names = (f"text-{n:05}.tokens", f"text-{n:05}.ends")
        assert shard["sha256"] == [hashlib.sha256(expected[x]).hexdigest() for x in names]


def test_spans_and_documents(tmp_path, tokenizer):
    run([write(tmp_path / "x.jsonl")], tmp_path / "out", tokenizer)
    opened = TokenShards(str(tmp_path / "out"), tokenizer)
    ids = encoded(tokenizer)
    assert tokenizer.special_ids.isdisjoint(ids)
    for source in (opened, pickle.loads(pickle.dumps(opened))):
        assert len(source) == len(ids)
        for start in (0, 1, 55, 65, len(ids) - 5, -5):
            for count in (0, 1, 20, 700, 2 * len(ids) + 3):
                span = source.span(start, count)
                assert span.dtype == np.int32
                np.testing.assert_array_equal(
                    span, np.roll(np.resize(ids, len(ids)), -start)[np.arange(count) % len(ids)]
                )
        assert source.num_documents == len(DOCUMENTS)
        found = [source.document(n).tolist() for n in range(len(DOCUMENTS))]
        assert found == [tokenizer.encode_ordinary(text) for text in DOCUMENTS]
    assert len(pickle.dumps(opened)) == len(
        pickle.dumps(TokenShards(str(tmp_path / "out"), tokenizer))
    )
    with pytest.raises(IndexError):
        opened.span(len(ids), 1)
    with pytest.raises(IndexError):
        opened.document(len(DOCUMENTS))


def test_a_document_larger_than_a_shard_has_its_own(tmp_path, tokenizer):
    documents = ["red", "green " * 400, "blue"]
    manifest = run([write(tmp_path / "x.txt", documents)], tmp_path / "out", tokenizer)
    assert [shard["documents"] for shard in manifest["shards"]] == [1, 1, 1]
    opened = TokenShards(str(tmp_path / "out"), tokenizer)
    assert opened.span(0, len(opened)).tolist() == encoded(tokenizer, documents)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers(tmp_path, tokenizer, workers):
    path = tmp_path / "x.jsonl"
    write(path)
    path.write_bytes(b"no json\n" + path.read_bytes() + b'\n{"other": "key"}\n')
    run([path], tmp_path / "none", tokenizer, max_rejects=0.1)
    run([path], tmp_path / "some", tokenizer, max_rejects=0.1, workers=workers)
    assert files(tmp_path / "some") == files(tmp_path / "none")


def test_directories_and_globs_in_sorted_order(tmp_path, tokenizer):
    root = tmp_path / "corpus"
    for name in ("b/deep/1.txt", "b/0.jsonl.zst", "a.jsonl.gz", "c2.txt", "c10.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write(root / name, [f"file {name}"])
    (root / "README.md").write_text("no text")
    (root / "b/back").symlink_to(root)
    order = ["a.jsonl.gz", "b/0.jsonl.zst", "b/deep/1.txt", "c10.txt", "c2.txt"]
    out = root / "tokens"  # what is written here is no input
    for _ in range(2):
        manifest = run([root], out, tokenizer)
        assert [name for name, _ in manifest["config"]["files"]] == [str(root / x) for x in order]
    opened = TokenShards(str(out), tokenizer)
    assert opened.span(0, len(opened)).tolist() == encoded(tokenizer, [f"file {x}" for x in order])
    manifest = run([root / "c*", root / "[b]"], tmp_path / "other", tokenizer)
    found = [name for name, _ in manifest["config"]["files"]]
    assert found == [str(root / x) for x in ("c10.txt", "c2.txt", "b/0.jsonl.zst", "b/deep/1.txt")]
    with pytest.raises(UserError, match="c2.txt: named twice"):
        run([root, root / "c2.txt"], tmp_path / "twice", tokenizer)
    for nothing in ("*.parquet", "README.md", "missing", "missing.txt"):
        with pytest.raises(UserError, match=": no .txt, .*file there"):
            run([root / nothing], tmp_path / "nothing", tokenizer)


class Bucket(MemoryFileSystem):
    """A remote store as epath sees it."""

    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))


def test_remote_files(tmp_path, tokenizer, expected):
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, Bucket, clobber=True)
    bucket = Bucket()
    data = Path(write(tmp_path / "x.jsonl.zst")).read_bytes()
    bucket.pipe("/corpus/part/x.jsonl.zst", data)
    bucket.pipe("/corpus/part/notes", b"no text")
    for n, given in enumerate(
        ("gs://corpus/part", "gs://corpus/*/x*", "gs://corpus/part/x.jsonl.zst")
    ):
        manifest = run([given], tmp_path / f"{n}", tokenizer)
        assert manifest["config"]["files"] == [["gs://corpus/part/x.jsonl.zst", len(data)]]
        assert shards(tmp_path / f"{n}") == expected
    with pytest.raises(UserError, match="gs://corpus/other"):
        run(["gs://corpus/other"], tmp_path / "other", tokenizer)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("function", ["replace_json", "seal"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [2, 3, 8])
def test_continues_after_a_kill(tmp_path, monkeypatch, tokenizer, function, after, at):
    inputs = [write(tmp_path / "a.jsonl.gz"), write(tmp_path / "b.txt")]
    Path(inputs[1]).write_bytes(Path(inputs[1]).read_bytes() + b"\n\xff\nend")
    run(inputs, tmp_path / "whole", tokenizer, max_rejects=0.1)
    original, calls = getattr(tokenize_text, function), []

    def dies(*args):
        calls.append(1)
        if len(calls) == at and not after:
            raise Killed
        result = original(*args)
        if len(calls) == at:
            raise Killed
        return result

    monkeypatch.setattr(tokenize_text, function, dies)
    with pytest.raises(Killed):
        run(inputs, tmp_path / "out", tokenizer, max_rejects=0.1)
    with pytest.raises(UserError, match="unfinished"):
        TokenShards(str(tmp_path / "out"), tokenizer)
    kept = {x.name: x.stat().st_mtime_ns for x in (tmp_path / "out").glob("text-*[!p]")}
    journal = json.loads((tmp_path / "out/journal.json").read_text())
    calls.clear()
    monkeypatch.setattr(tokenize_text, function, original)
    run(inputs, tmp_path / "out", tokenizer, max_rejects=0.1)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    for n in range(len(journal["shards"])):
        name = f"text-{n:05}.tokens"
        assert (tmp_path / "out" / name).stat().st_mtime_ns == kept[name]


def test_a_kill_just_before_the_end(tmp_path, monkeypatch, tokenizer):
    path = write(tmp_path / "x.txt")

    def dies(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", dies)
        run([path], tmp_path / "out", tokenizer)
    assert (tmp_path / "out/journal.json").exists()
    before = shards(tmp_path / "out")
    run([path], tmp_path / "out", tokenizer)
    assert set(files(tmp_path / "out")) == {*before, "manifest.json", "rejects.jsonl"}


def test_a_killed_process_leaves_no_workers_and_continues(tmp_path, tokenizer, expected):
    path = write(tmp_path / "x.txt")
    code = """if True:
        import os, signal, sys
        from hovle_jax.data import convert, text_files, tokenize_text
        from hovle_jax.data.tokenizer import Tokenizer
        def dies(*args, original=tokenize_text.replace_json, calls=[]):
            calls.append(1)
            original(*args)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        tokenize_text.replace_json, text_files._BATCH = dies, 400
        tokenizer = Tokenizer.load(sys.argv[3])
        tokenize_text.tokenize_text(
            [sys.argv[1]], sys.argv[2], tokenizer, shard_tokens=60, workers=1, quiet=True
        )"""
    tokenizer.save(tmp_path / "tokenizer")
    out = tmp_path / "out"
    # Returns when nobody holds the pipes any more, workers included.
    killed = subprocess.run(
        [sys.executable, "-c", code, path, str(out), str(tmp_path / "tokenizer")],
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(json.loads((out / "journal.json").read_text())["shards"]) == 2
    run([path], out, tokenizer)
    assert shards(out) == expected


def test_rejects_are_listed(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(text_files, "MAX_ROW", 5000)
    bad = [
        b"not json",
        b'["a list"]',
        b'{"other": "x"}',
        b'{"text": 3}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": "' + b"x" * 12000 + b'"}',
    ]
    path = tmp_path / "x.jsonl"
    good = [json.dumps({"text": text}).encode() for text in DOCUMENTS]
    path.write_bytes(b"\n".join([*good[:5], b"", *bad, *good[5:]]))
    with pytest.raises(UserError) as error:
        run([path], tmp_path / "out", tokenizer)
    assert "7 of 51 rows were rejected" in str(error.value) and f"{path}:7" in str(error.value)
    manifest = run([path], tmp_path / "out", tokenizer, max_rejects=0.2)
    assert (manifest["rows"], manifest["rejects"]) == (51, 7)
    rejects = [json.loads(x) for x in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [reject["file"] for reject in rejects] == [str(path)] * 7
    assert [reject["row"] for reject in rejects] == list(range(7, 14))
    reasons = ("JSON", "object, got list", "no string", "no string", "surrogate", "JSON", "longer")
    for reject, reason in zip(rejects, reasons, strict=True):
        assert reason in reject["reason"] and "\n" not in reject["reason"]
    opened = TokenShards(str(tmp_path / "out"), tokenizer)
    assert opened.span(0, len(opened)).tolist() == encoded(tokenizer)


def test_rejects_of_parquet_and_txt(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    data = pyarrow.array([b"red", None, b"\xff", b"blue"], pyarrow.binary())
    table = pyarrow.table({"body": data.view(pyarrow.string()), "id": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "x.txt").write_bytes(b"red\r\n\n\xff\nblue")
    for name, rows in (("x.parquet", [2, 3]), ("x.txt", [3])):
        out = tmp_path / f"of-{name}"
        run([tmp_path / name], out, tokenizer, key="body", max_rejects=0.9)
        rejects = [json.loads(x) for x in (out / "rejects.jsonl").read_text().splitlines()]
        assert [reject["row"] for reject in rejects] == rows
        opened = TokenShards(str(out), tokenizer)
        assert opened.span(0, len(opened)).tolist() == encoded(tokenizer, ["red", "blue"])
    for key, reason in (
        ("text", "no column 'text'; the key must be one of body, id"),
        ("id", "is int64, not str"),
    ):
        with pytest.raises(UserError, match=reason):
            run([tmp_path / "x.parquet"], tmp_path / key, tokenizer, key=key)


def test_many_rejects_end_it_early(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(tokenize_text, "MANY", 5)
    path = tmp_path / "x.jsonl"
    path.write_text("no json\n" * 200 + '{"text": "red"}\n' * 200)
    with pytest.raises(UserError, match="rows were rejected") as error:
        run([path], tmp_path / "out", tokenizer)
    rejects, _, rows = str(error.value).split()[:3]
    assert 5 < int(rejects) == int(rows) < 100


@pytest.mark.parametrize("kind", ["txt.gz", "jsonl.zst", "parquet"])
def test_a_damaged_file_is_an_error_until_it_is_replaced(tmp_path, tokenizer, kind):
    inputs = [write(tmp_path / f"a.{kind}"), write(tmp_path / f"b.{kind}")]
    run(inputs, tmp_path / "whole", tokenizer)
    good = Path(inputs[1]).read_bytes()
    for cut in (good[:-9], good[: len(good) // 2], good[:-20] + bytes(20)):
        Path(inputs[1]).write_bytes(cut)
        with pytest.raises(UserError, match=f"b.{kind}.*put a good file in its place") as error:
            run(inputs, tmp_path / "out", tokenizer)
        assert "\n" not in str(error.value)
    assert len(list((tmp_path / "out").glob("*.tokens"))) >= 6
    Path(inputs[1]).write_bytes(good)
    run(inputs, tmp_path / "out", tokenizer)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_other_inputs_and_settings_are_refused(tmp_path, monkeypatch, tokenizer):
    inputs = [write(tmp_path / "x.txt"), write(tmp_path / "y.txt")]
    other_tokenizer = train_tokenizer(DOCUMENTS, tmp_path / "tokenizer", 110)
    run(inputs, tmp_path / "done", tokenizer)
    original, count = tokenize_text.replace_json, len(list((tmp_path / "done").glob("*.ends")))

    def dies(to, content):
        original(to, content)
        if len(content["shards"]) == count - 1:
            raise Killed

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(tokenize_text, "replace_json", dies)
        run(inputs, tmp_path / "begun", tokenizer)
    before = files(tmp_path / "begun")
    for out in (tmp_path / "done", tmp_path / "begun"):
        for change in ({"shard_tokens": 50}, {"key": "body"}):
            with pytest.raises(UserError, match="other inputs or settings"):
                run(inputs, out, tokenizer, **change)
        for other in (inputs[:1], inputs[::-1]):
            with pytest.raises(UserError, match="other inputs or settings"):
                run(other, out, tokenizer)
        with pytest.raises(UserError, match="other inputs or settings"):
            run(inputs, out, other_tokenizer)
        with Path(inputs[0]).open("ab") as f:
            f.write(b"more")
        with pytest.raises(UserError, match="x.txt: changed after"):
            run(inputs, out, tokenizer)
        write(Path(inputs[0]))
    assert files(tmp_path / "begun") == before
    (tmp_path / "begun/text-00001.ends").write_bytes(b"")
    with pytest.raises(UserError, match="text-00001.ends: missing or changed"):
        run(inputs, tmp_path / "begun", tokenizer)
    with pytest.raises(UserError, match=r"tokenizer: not empty \("):
        run(inputs, tmp_path / "tokenizer", tokenizer)


def test_a_file_that_shrank_leaves_no_shards_behind(tmp_path, monkeypatch, tokenizer):
    inputs = [write(tmp_path / "x.txt"), write(tmp_path / "y.txt")]

    def dies(self, vocab_size):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tokenize_text._Job, "finish", dies)
        run(inputs, tmp_path / "out", tokenizer)
    write(Path(inputs[1]), ["red"])
    run(inputs, tmp_path / "out", tokenizer)
    run(inputs, tmp_path / "whole", tokenizer)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_opening_refuses_what_it_cannot_trust(tmp_path, tokenizer):
    out = tmp_path / "out"
    run([write(tmp_path / "x.txt")], out, tokenizer)
    manifest = json.loads((out / "manifest.json").read_text())

    def refuses(reason):
        with pytest.raises(UserError, match=reason) as error:
            TokenShards(str(out), tokenizer)
        assert "\n" not in str(error.value)

    with pytest.raises(UserError, match="of another tokenizer"):
        TokenShards(str(out), train_tokenizer(DOCUMENTS, tmp_path / "tokenizer", 110))
    last = out / f"text-{len(manifest['shards']) - 1:05}.tokens"
    data = last.read_bytes()
    last.write_bytes(data[:-4])
    refuses(f"{last.name}: missing or changed")
    last.unlink()
    refuses(f"{last.name}: missing or changed")
    # What opening does not see, reading does.
    for damage in (tokenizer.vocab_size, -1):
        last.write_bytes(np.array(damage, "<i4").tobytes() + data[4:])
        opened = TokenShards(str(out), tokenizer)
        opened.span(0, 50)
        with pytest.raises(UserError, match=f"{last.name}: damaged"):
            opened.span(-len(data) // 4, 1)
    last.write_bytes(data)
    for broken in (
        {},
        {**manifest, "version": 2},
        {**manifest, "shards": []},
        {**manifest, "shards": [3]},
    ):
        (out / "manifest.json").write_text(json.dumps(broken))
        refuses("not a manifest of token shards")
    manifest["shards"][0]["max_id"] = tokenizer.vocab_size
    (out / "manifest.json").write_text(json.dumps(manifest))
    refuses("has ids up to")
    (out / "manifest.json").unlink()
    refuses("no manifest.json; make one with `hovle data tokenize`")


def test_a_worker_that_dies_is_one_line(tmp_path, tokenizer):
    class Dies(Tokenizer):
        def __reduce__(self):
            return os._exit, (9,)

    dying = Dies(tokenizer._files, "x")
    with pytest.raises(UserError, match="a worker died"):
        run([write(tmp_path / "x.txt")], tmp_path / "out", dying, workers=1)


def test_without_zstandard(tmp_path, monkeypatch, tokenizer):
    path = write(tmp_path / "x.txt.zst")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match=r"pip install 'hovle-jax\[text\]'"):
        run([path], tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_command(tmp_path, tokenizer, expected, capsys, one_line_error):
    tokenizer.save(tmp_path / "tokenizer")
    path = write(tmp_path / "x.jsonl.zst")
    command = ["data", "tokenize", path, str(tmp_path / "out")]
    command += ["--tokenizer", str(tmp_path / "tokenizer"), "--shard-tokens", "60"]
    assert main([*command, "--workers", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{len(encoded(tokenizer)):,} tokens, 44 documents, 0 rejects\n"
    assert printed.err.startswith("tokenizing 1/1  MB, 0 rejected")
    assert shards(tmp_path / "out") == expected
    assert "other inputs or settings" in one_line_error([*command, "--key", "body"])
    assert "max_rejects must be" in one_line_error([*command, "--max-rejects", "2"])


def test_nothing_to_tokenize(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text("\n \n")
    (tmp_path / "x.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(UserError, match="x.txt, .*x.jsonl: no text"):
        run([tmp_path / "x.txt", tmp_path / "x.jsonl"], tmp_path / "out", tokenizer)
    with pytest.raises(UserError, match="no text is named"):
        run([], tmp_path / "other", tokenizer)
