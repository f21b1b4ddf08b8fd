"""Remote files: a bucket on this disk behind the file system interface that gcsfs has too."""

import collections
import datetime
import http.server
import json
import pickle
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from etils.epath import backend
from fsspec.spec import AbstractBufferedFile

from hovle_jax.checkpoint import open_stored, read_config
from hovle_jax.data import convert, files, sources
from hovle_jax.data.records import Record
from hovle_jax.data.tokenize_text import tokenize_text
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.hf.directory import new_directory
from hovle_jax.train import train
from tests.test_formats import EXPECTED, content, make, pictures, talk, write_tar

REMOTE_KINDS = ("value.jsonl", "messages.jsonl", "llava.json", "pairs.tar", "json.tar", "tars")
REMOTE_KINDS += ("text.parquet", "path.parquet", "talk.parquet")


class Bucket(fsspec.AbstractFileSystem):
    """gs://bucket/x is root/bucket/x; counts requests; names in `broken` raise."""

    protocol = ("gs", "gcs")
    cachable = False

    def __init__(self, root: Path):
        super().__init__()
        self.root, self.requests, self.broken = root, collections.Counter(), {}

    def find_path(self, path):
        path = self._strip_protocol(path)
        for name, error in self.broken.items():
            if name in path:
                raise error
        if not (self.root / path).exists():
            raise FileNotFoundError(path)  # as gcsfs: without errno
        return path, self.root / path

    def info(self, path, **_):
        self.requests["info"] += 1
        name, local = self.find_path(path)
        time = datetime.datetime.fromtimestamp(local.stat().st_mtime)
        kind = "directory" if local.is_dir() else "file"
        return {"name": name, "size": local.stat().st_size, "type": kind, "mtime": time}

    def ls(self, path, detail=True, **_):
        name, local = self.find_path(path)
        entries = [self.info(f"{name}/{entry.name}") for entry in local.iterdir()]
        self.requests["list"] += 1
        return entries if detail else [entry["name"] for entry in entries]

    def _open(self, path, mode="rb", block_size=None, **_):
        assert mode == "rb"
        return Object(self, path, mode, block_size=4096)


class Object(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        self.fs.requests["get"] += 1
        data = self.fs.find_path(self.path)[1].read_bytes()
        return data[start:end]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    fake = Bucket(tmp_path)
    (tmp_path / "bucket").mkdir()
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: fake)
    return fake


def url(path: Path, bucket: Bucket) -> str:
    return f"gs://{path.relative_to(bucket.root)}"


def fetched(record: Record) -> tuple:
    """`content`, which knows no remote images."""
    images = [files.read_bytes(x, "x") if isinstance(x, str) else x for x in record.images]
    return content(Record(record.turns, tuple(images), record.where))


def test_paths():
    assert files.join("gs://b/dir", "x.jpg") == "gs://b/dir/x.jpg"
    assert files.join("gs://b/dir", "gs://c/x.jpg") == files.join("/d", "gs://c/x.jpg")
    assert files.join("/d", "/e/x.jpg") == "/e/x.jpg" and files.join("", "x") == "x"
    assert files.is_remote("hf://x") and not files.is_remote("tfds:x") and not files.is_remote("/a")


def test_what_must_be_local_is_never_written_to_a_directory_named_gs(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, tokenizer = world.config("instruct"), Tokenizer.load(world.root / "tokenizer")
    remote = "gs://bucket/x"

    def new() -> None:
        with new_directory(remote, 0):
            raise AssertionError

    for call, what in (
        (lambda: train(config, remote), "--workdir"),
        (lambda: train(world.config("instruct", init__previous=remote), "run"), "init.previous"),
        (lambda: train(world.config("instruct", data__index=remote), "run"), "data.index"),
        (lambda: train(world.config("instruct", data__tokenizer=remote), "run"), "data.tokenizer"),
        (lambda: open_stored(remote), "model or work directory"),
        (lambda: read_config(remote), "model or work directory"),
        (lambda: Tokenizer.load(remote), "a tokenizer's directory"),
        (lambda: tokenize_text(["x.txt"], remote, tokenizer), "OUT_DIR"),
        (lambda: convert.convert([], remote), "OUT_DIR"),
        (new, "new directory"),
    ):
        with pytest.raises(UserError, match=f"{what}: gs://bucket/x must be local or mounted"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", REMOTE_KINDS)
def test_a_bucket_gives_the_same_records(kind, bucket, tmp_path):
    path = make(kind, tmp_path / "bucket")
    local = sources.open_source(str(path))
    remote = sources.open_source(url(path, bucket))
    assert (len(remote), remote.name) == (len(local), local.name)
    again = pickle.loads(pickle.dumps(remote))
    for i in range(len(local)):
        assert fetched(remote[i]) == fetched(again[i]) == content(local[i])
        assert fetched(remote[i])[1] == EXPECTED[i]
        assert remote[i].where == local[i].where.replace(f"{tmp_path}/", "gs://")
    with ThreadPoolExecutor(4) as pool:  # which share the open file
        found = list(pool.map(lambda i: fetched(remote[i % 4]), range(200)))
    assert found == [content(local[i % 4]) for i in range(200)]


def test_a_row_costs_few_requests(bucket, tmp_path):
    members = {}
    for i in range(50):
        members |= {f"{i:03}.jpg": bytes([i]) * 20_000, f"{i:03}.txt": b"caption %d" % i}
    write_tar(tmp_path / "bucket" / "x.tar", members)
    source = sources.open_source("gs://bucket/x.tar")
    assert source[7].turns[1].text == "caption 7"
    bucket.requests.clear()
    assert source[41].images == (bytes([41]) * 20_000,)
    # Image and caption, each with what its cache reads ahead.
    assert bucket.requests["get"] <= 4 and set(bucket.requests) == {"get"}
    lines = [json.dumps({"image": "a.jpg", "conversations": talk(str(i))}) for i in range(2000)]
    (tmp_path / "bucket" / "x.jsonl").write_text("\n".join(lines))
    bucket.requests.clear()
    source = sources.open_source("gs://bucket/x.jsonl")
    assert len(source) == 2000 and bucket.requests["get"] <= 3  # for 300 KB in one pass


def test_globs_folders_and_globbed_tars(bucket, tmp_path):
    make("tars", tmp_path / "bucket")
    source = sources.open_source("gs://bucket/t*rs/*.tar")
    assert [fetched(source[i])[1] for i in range(4)] == EXPECTED
    folder = sources.open_source("gs://bucket/im")
    assert [fetched(folder[i]) for i in range(4)] == [([], pixels) for pixels in EXPECTED]
    assert folder.fingerprint()[0] == "gs://bucket/im/0.png" == folder[0].where
    (tmp_path / "bucket" / "im" / "deep").mkdir()
    (tmp_path / "bucket" / "im" / "deep" / "z.jpg").write_bytes(pictures()[1])
    assert sources.open_source("gs://bucket/im")[4].images == ("gs://bucket/im/deep/z.jpg",)
    # A folder that cannot be listed is not an empty one.
    bucket.broken["im/deep"] = PermissionError("no storage.objects.list access")
    with pytest.raises(UserError, match=r"^gs://bucket/im: cannot be read \(no storage"):
        sources.open_source("gs://bucket/im")


def test_meta_and_its_fingerprint(bucket, tmp_path):
    path = make("value.jsonl", tmp_path / "bucket")
    entry = {"annotation": path.name, "root": ""}
    (tmp_path / "bucket" / "meta.json").write_text(json.dumps({"a": entry}))
    (found,) = sources.open_meta("gs://bucket/meta.json")
    assert found.source[0].images == ("gs://bucket/im/0.png",)
    assert fetched(found.source[2])[1] == EXPECTED[2]
    # A local meta file may point there, too.
    absolute = {"a": {"annotation": f"gs://bucket/{path.name}", "root": "gs://bucket"}}
    (tmp_path / "meta.json").write_text(json.dumps(absolute))
    (other,) = sources.open_meta(str(tmp_path / "meta.json"))
    assert other.source[0] == found.source[0]
    before = other.fingerprint
    path.write_text(path.read_text() + "\n")
    assert sources.open_meta(str(tmp_path / "meta.json"))[0].fingerprint != before


def test_convert_reads_a_bucket_and_writes_to_disk(bucket, tmp_path):
    path = make("value.jsonl", tmp_path / "bucket")
    manifest = convert.run_convert([f"n={url(path, bucket)}"], str(tmp_path / "out"), quiet=True)
    assert manifest["sources"]["n"]["records"] == 4
    local = convert.run_convert([f"n={path}"], str(tmp_path / "local"), quiet=True)
    shards = [m["sources"]["n"]["shards"][0]["sha256"] for m in (manifest, local)]
    assert shards[0] == shards[1]
    with pytest.raises(UserError, match=r"^OUT_DIR: gs://bucket/out must be local"):
        convert.run_convert([str(path)], "gs://bucket/out", quiet=True)
    assert not (tmp_path / "bucket" / "out").exists()


@pytest.mark.parametrize("kind", ["x.jsonl", "x.json", "x.tar", "x.parquet", "x/*.tar"])
@pytest.mark.parametrize(
    "error, message",
    [
        (None, "No such file|no such file"),
        (RuntimeError("403: denied,\nproject x"), r"\(403: denied,\)"),
        (ImportError("Please install gcsfs"), r"pip install hovle-jax\[gcs\]"),
    ],
)
def test_what_a_store_raises_is_one_line(bucket, kind, error, message):
    bucket.broken = {} if error is None else {"x": error}
    with pytest.raises(UserError, match=rf"^gs://bucket/x.*({message})") as caught:
        sources.open_source(f"gs://bucket/{kind}")
    assert "\n" not in str(caught.value)


def test_a_store_that_fails_later(bucket, tmp_path):
    path = make("value.jsonl", tmp_path / "bucket")
    source = sources.open_source(url(path, bucket))
    bucket.broken["value"] = TimeoutError("timed out")
    with pytest.raises(UserError, match=r"^gs://bucket/value\.jsonl:1: cannot be read \(timed out"):
        source[0]
    bucket.broken = {"0.png": ValueError("no\nthing")}
    with pytest.raises(UserError, match=r"^w: cannot read 'gs://bucket/im/0\.png' \(no\)$"):
        files.read_bytes("gs://bucket/im/0.png", "w")
    with pytest.raises(UserError, match=r"^w: cannot read 'gs://bucket/no' \(No such file"):
        files.read_bytes("gs://bucket/no", "w")
    with pytest.raises(UserError, match="cannot be read.*no known kind of remote path"):
        sources.open_source("https://example.com/x.jsonl")


@pytest.fixture
def endpoint(tmp_path, monkeypatch):
    """The few requests that array_record's own client makes, served from the same disk."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            place = urllib.parse.urlsplit(self.path).path.split("/b/")[1]
            path = tmp_path / urllib.parse.unquote(place.replace("/o/", "/"))
            data = path.read_bytes() if path.is_file() else b""
            total = len(data)
            first, last = self.headers.get("Range", "bytes=0-")[6:].split("-")
            start = int(first) if first else max(0, total - int(last))
            end = min(total, int(last) + 1) if first and last else total
            self.send_response(206 if data else 404)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{total}")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            self.wfile.write(data[start:end])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def test_array_records_in_a_bucket(bucket, tmp_path, endpoint):
    """Through array_record's reader, which knows gs:// (and nothing else remote) itself."""
    make("records", tmp_path / "bucket")
    source = sources.open_source("gs://bucket/records")
    assert [content(source[i])[1] for i in range(4)] == EXPECTED
    assert source[1].where == "gs://bucket/records/llava-00000.array_record:2"
    source = sources.open_source("gs://bucket/records/*.array_record", images_only=True)
    assert [content(source[i]) for i in range(4)] == [([], pixels) for pixels in EXPECTED]
    with pytest.raises(UserError, match=r"none\.array_record: no such file"):
        sources.open_source("gs://bucket/none.array_record")
    (tmp_path / "bucket" / "bad.array_record").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"bad\.array_record: not readable .*gcsfuse") as error:
        sources.open_source("gs://bucket/bad.array_record")
    assert "\n" not in str(error.value)


def test_tfds_in_a_bucket(bucket, tmp_path, endpoint):
    path = make("tfds", tmp_path / "bucket")
    source = sources.open_source(url(path, bucket))
    assert [content(source[i])[1] for i in range(4)] == EXPECTED
