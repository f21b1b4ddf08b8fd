"""Every format gives the same records, and blames the file and row of what it cannot read."""

import io
import json
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hovle_jax.data import (
    array_record,
    convert,
    image,
    json_list,
    parquet,
    readers,
    sources,
    webdataset,
)
from hovle_jax.data.records import Record
from hovle_jax.data.rows import PROMPT
from hovle_jax.errors import UserError

CAPTIONS = ("a red square", "猫, in blue", "two\nlines", "the last")
ASK = f"<image>\n{PROMPT}"
SUFFIXES = ("png", "jpg", "webp", "jpeg")


def pictures() -> list[bytes]:
    """Encoded images, one of each suffix."""
    rng = np.random.default_rng(0)
    encoded = []
    for i, kind in enumerate(("PNG", "JPEG", "WEBP", "JPEG")):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (9, 12 + i, 3), np.uint8)).save(out, kind)
        encoded.append(out.getvalue())
    return encoded


def talk(caption: str, key: str = "value") -> list[dict]:
    return [{"from": "human", key: ASK}, {"from": "gpt", key: caption}]


def messages(caption: str) -> list[dict]:
    ask = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": caption}]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, rows: list[dict], group: int = 3) -> Path:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def write_tfds(root: Path) -> Path:
    import tensorflow_datasets as tfds

    class TinyPairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = "__main__"  # or tfds looks for the package it came from
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(), "text": tfds.features.Text()}
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (data, text) in enumerate(zip(pictures(), CAPTIONS, strict=True)):
                yield i, {"image": io.BytesIO(data), "text": text}

    builder = TinyPairs(data_dir=str(root), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def make(kind: str, root: Path) -> Path:
    """Writes the four examples in a format; returns what `open_source` opens."""
    images = pictures()
    names = [f"im/{i}.{suffix}" for i, suffix in enumerate(SUFFIXES)]
    (root / "im").mkdir(exist_ok=True)
    for name, data in zip(names, images, strict=True):
        (root / name).write_bytes(data)
    rows = list(zip(names, images, CAPTIONS, strict=True))

    def lines(name: str, objects: list[dict]) -> Path:
        (root / name).write_text("".join(json.dumps(x) + "\n" for x in objects))
        return root / name

    match kind:
        case "value.jsonl" | "text.jsonl":
            key = kind.split(".")[0]
            return lines(kind, [{"image": n, "conversations": talk(c, key)} for n, _, c in rows])
        case "messages.jsonl":
            return lines(kind, [{"images": [n], "messages": messages(c)} for n, _, c in rows])
        case "llava.json":
            listed = [{"id": n, "image": n, "conversations": talk(c)} for n, _, c in rows]
            (root / kind).write_text(json.dumps(listed, indent=2, ensure_ascii=False))
            return root / kind
        case "pairs.tar":
            files = {}
            for n, data, c in rows:
                files |= {n: data, f"{Path(n).with_suffix('')}.txt": c.encode()}
            return write_tar(root / kind, files)
        case "json.tar":
            files = {}
            for n, data, c in rows:
                row = json.dumps({"caption": c, "status": "success"})
                files |= {f"{Path(n).with_suffix('')}.json": row.encode(), n: data}
            return write_tar(root / kind, files)
        case "tars":
            (root / kind).mkdir()
            for k in range(2):
                files = {}
                for n, data, c in rows[2 * k : 2 * k + 2]:
                    row = json.dumps({"image": n, "conversations": talk(c)})
                    files |= {n: data, f"{Path(n).with_suffix('')}.json": row.encode()}
                write_tar(root / kind / f"{k:05}.tar", files)
            return root / kind
        case "text.parquet":
            row = [{"image": {"bytes": d, "path": n}, "text": c} for n, d, c in rows]
            return write_parquet(root / kind, row)
        case "path.parquet":
            row = [{"image": {"bytes": None, "path": n}, "caption": c} for n, _, c in rows]
            return write_parquet(root / kind, row)
        case "talk.parquet":
            row = [{"images": [{"bytes": d}], "conversations": talk(c)} for _, d, c in rows]
            return write_parquet(root / kind, row)
        case "messages.parquet":
            row = [{"image": {"bytes": d}, "messages": messages(c)} for _, d, c in rows]
            for example in row:  # a column has one type
                example["messages"][1]["content"] = [
                    {"type": "text", "text": example["messages"][1]["content"]}
                ]
            return write_parquet(root / kind, row)
        case "tfds":
            return write_tfds(root / kind)
        case "records":
            convert.run_convert([str(make("llava.json", root))], str(root / kind), quiet=True)
            return root / kind
        case "im":
            return root / kind
    raise ValueError(kind)


KINDS = ("value.jsonl", "text.jsonl", "messages.jsonl", "llava.json", "pairs.tar", "json.tar")
KINDS += ("tars", "text.parquet", "path.parquet", "talk.parquet", "messages.parquet", "tfds")
KINDS += ("records",)


def content(record: Record) -> tuple:
    """What the model would see of a record."""
    pixels = [np.asarray(image.open_image(x, record.where)) for x in record.images]
    turns = [(t.role, t.text) for t in record.turns]
    return turns, [(p.shape, p.tobytes()) for p in pixels]


EXPECTED = [
    content(Record((), (data,), "expected"))[1]  # pixels only
    for data in pictures()
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_records(kind, tmp_path):
    source = sources.open_source(str(make(kind, tmp_path)), max_tiles=3)
    turns = [[("user", ASK), ("assistant", caption)] for caption in CAPTIONS]
    expected = list(zip(turns, EXPECTED, strict=True))
    assert [content(source[i]) for i in range(len(source))] == expected
    assert source.max_tiles == 3
    # Also in another process, in another order, and counted from the end.
    again = pickle.loads(pickle.dumps(source))
    assert [content(again[i]) for i in (3, -4, 2, -3)] == [expected[i] for i in (3, 0, 2, 1)]
    assert len({source[i].where for i in range(len(source))}) == 4
    with pytest.raises(IndexError):
        source[4]
    for i in range(4):  # nor does the conversion change anything
        record = source[i]
        data = array_record.encode_record(record.turns, convert._image_bytes(record, "full"))
        assert content(array_record.decode_record(data, "x")) == expected[i]


def test_image_folder_and_names(tmp_path):
    folder = sources.open_source(str(make("im", tmp_path)))
    assert isinstance(folder, readers.ImageFolder)
    assert [content(folder[i]) for i in range(4)] == [([], pixels) for pixels in EXPECTED]
    assert sources.open_source(str(make("pairs.tar", tmp_path))).name == "pairs"
    assert sources.open_source(str(tmp_path / "pai*.tar"), "mine").name == "mine"
    assert sources.default_name("tfds:coco/2014:1.1.0#train") == "2014_1.1.0"
    with pytest.raises(UserError, match="pairs.txt: no known format"):
        sources.open_source(str(tmp_path / "pairs.txt"))
    with pytest.raises(UserError, match=r"none\.tar: no such file"):
        sources.open_source(str(tmp_path / "none.tar"))
    (tmp_path / "im" / "a.tar").touch()
    (tmp_path / "im" / "a.parquet").touch()
    with pytest.raises(UserError, match=r"holds \.tar and \.parquet files"):
        sources.open_source(str(tmp_path / "im"))


def test_a_directory_of_a_format_of_ones_own(tmp_path, monkeypatch):
    """Whatever lies in it; a directory that is called .tar holds what it holds."""
    monkeypatch.setitem(sources.FORMATS, ".lake", lambda name, path, options: (name, path))
    (tmp_path / "a.lake").mkdir()
    (tmp_path / "a.lake" / "part.parquet").touch()
    (tmp_path / "a.lake" / "dataset_info.json").touch()
    assert sources.open_source(str(tmp_path / "a.lake")) == ("a", str(tmp_path / "a.lake"))
    pictures = make("im", tmp_path).rename(tmp_path / "im.tar")
    assert isinstance(sources.open_source(str(pictures)), readers.ImageFolder)


def test_a_hugging_face_data_set_is_named(tmp_path):
    (tmp_path / "one").mkdir()
    for name in ("one/dataset_info.json", "one/state.json", "dataset_dict.json"):
        (tmp_path / name).write_text("{}")
    for path in (tmp_path, tmp_path / "one"):
        with pytest.raises(UserError, match=r"a Hugging Face data set .* as parquet"):
            sources.open_source(str(path))


def open_list(root: Path, text: str | bytes) -> json_list.LlavaJson:
    data = text.encode() if isinstance(text, str) else text
    (root / "a.json").write_bytes(data)
    return json_list.LlavaJson("a", str(root / "a.json"), "")


def test_a_folder_of_pictures_and_one_tar_is_not_guessed(tmp_path):
    for i in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    with tarfile.open(tmp_path / "backup.tar", "w") as tar:
        tar.add(tmp_path / "0.png", "0.png")
    with pytest.raises(UserError, match=r"holds \.tar and \.png files; keep one"):
        sources.open_source(str(tmp_path))


def test_a_meta_file_may_name_a_glob_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("laion").mkdir()
    Path("metas").mkdir()
    Image.new("RGB", (4, 4)).save("0.png")
    Path("0.txt").write_text("white")
    with tarfile.open("laion/0.tar", "w") as tar:
        tar.add("0.png")
        tar.add("0.txt")
    Path("metas/meta.json").write_text(json.dumps({"laion": {"annotation": "laion/*.tar"}}))
    (entry,) = sources.open_meta("metas/meta.json")
    assert len(entry.source) == 1 and entry.fingerprint[0].split()[0] == str(
        tmp_path / "laion/0.tar"
    )


def test_a_folder_of_images_is_told_by_its_paths_also_in_a_meta_file(tmp_path):
    (tmp_path / "images/deep").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "images/deep/0.png")
    (tmp_path / "meta.json").write_text(json.dumps({"pictures": {"annotation": "images"}}))

    def state():
        return sources.open_meta(str(tmp_path / "meta.json"), images_only=True)[0].fingerprint

    before = state()
    (tmp_path / "images/deep/0.png").rename(tmp_path / "images/deep/1.png")
    assert state() != before


def test_list_elements_are_found_anywhere(tmp_path, monkeypatch):
    """Also across the windows the file is read in."""
    rows = [{"conversations": talk("é" * n)[1:], "n": n, "s": '[{"\\,]}'} for n in range(40)]
    for text in (json.dumps(rows), json.dumps(rows, indent=1, ensure_ascii=False), "\ufeff[1, 2]"):
        source = open_list(tmp_path, text)
        data = (tmp_path / "a.json").read_bytes()
        spans = list(zip(source._starts.tolist(), source._sizes.tolist(), strict=True))
        found = [json.loads(data[start : start + size]) for start, size in spans]
        assert found == json.loads(data.decode("utf-8-sig"))
        for step in (1, 7, 64):
            monkeypatch.setattr(json_list, "_WINDOW", step)
            starts, sizes = json_list._list_elements(str(tmp_path / "a.json"))
            assert list(zip(starts.tolist(), sizes.tolist(), strict=True)) == spans


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "a.json: the file has no rows"),
        ("[ ]", "a.json: the file has no rows"),
        ('{"a": 1}', "a.json: expected a JSON list"),
        ('[{"a": 1}, {"b" 2}]', "a.json:2: .* from byte 11 on .*':' delimiter"),
        ('[{"a": 1} {"b": 2}]', "a.json:1: .*no ',' or ']'"),
        ('[{"a": 1}', "a.json:1: .*no end"),
        ('[{"a": 1},', "a.json:2: .*Expecting value"),
        ('[{"a": 1}] []', "a.json:2?1?: the list ends here"),
        ("[" + "[" * 100_000, "a.json:1: .*recursion"),
        ("[" + "1" * 5000 + "]", "a.json:1: .*digits"),
    ],
)
def test_bad_lists(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        open_list(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row, message",
    [
        (7, "expected a JSON object, got int"),
        ({}, "no caption .* and no 'conversations'; its keys are"),
        ({"caption": "x"}, "a caption needs one image, the row has 0"),
        ({"caption": "", "image": "a"}, "assistant turn is empty"),
        ({"caption": "x", "image": "a", "status": "failed_to_download"}, "status is 'failed_"),
        ({"conversations": talk("x")}, "1 '<image>' in user turns but 0 images"),
        ({"conversations": talk("x"), "image": 7}, "'image' must be a path"),
        ({"conversations": talk("x"), "video": "v.mp4"}, "video is not supported"),
        ({"conversations": [{"from": [], "value": ""}]}, "role"),
        ({"conversations": talk("\ud800"), "image": "a"}, "not valid Unicode"),
        ({"conversations": talk("x"), "image": "\udfff"}, "not valid Unicode"),
    ],
)
def test_bad_rows_of_a_list(tmp_path, row, message):
    source = open_list(tmp_path, json.dumps([{"image": "a", "caption": "fine"}, row]))
    assert source[0].turns[0].text == ASK
    with pytest.raises(UserError, match=rf"a\.json:2: .*{message}") as error:
        source[1]
    assert "\n" not in str(error.value)


def test_a_list_that_is_not_utf8(tmp_path):
    source = open_list(tmp_path, b'[{"caption": "\xff", "image": "a"}]')
    with pytest.raises(UserError, match=r"a\.json:1: not valid JSON"):
        source[0]
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match=r"a\.json:1: the file ends early"):
        pickle.loads(pickle.dumps(source))[0]


OK_JSON = json.dumps({"caption": "c"}).encode()


@pytest.mark.parametrize(
    "members, key, message",
    [
        ({"a.txt": b"c"}, "a", "no jpg/jpeg/png/webp member"),
        ({"a.jpg": b"i"}, "a", "no txt or json member"),
        ({"d/a.md": b"c"}, "d/a", "no jpg/jpeg/png/webp member"),
        ({"a.jpg": b"i", "a.png": b"i", "a.txt": b"c"}, "a", "several members"),
        ({"a.jpg": b"i", "a.txt": b"\xff"}, "a", r"\.txt is not UTF-8"),
        ({"a.jpg": b"i", "a.txt": b" "}, "a", "assistant turn is empty"),
        ({"a.jpg": b"i", "a.json": b"{"}, "a", "not valid JSON"),
        ({"a.jpg": b"i", "a.json": b"[]"}, "a", "expected a JSON object"),
        ({"a.jpg": b"i", "a.json": b"{}"}, "a", "no caption"),
        (
            {"a.txt": b"c", "a.json": b'{"status": "failed_to_download", "error_message": "x\\n"}'},
            "a",
            "status is 'failed_to_download'",
        ),
        (
            {"a.json": json.dumps({"image": "a.jpg", "conversations": talk("x")}).encode()},
            "a",
            "no jpg/jpeg/png/webp member",
        ),
        ({"a\nb.txt": b"c"}, r"a\\nb", "no jpg/jpeg/png/webp member"),
    ],
)
def test_bad_groups_of_a_tar(tmp_path, members, key, message):
    path = write_tar(
        tmp_path / "x.tar", {"ok.jpg": b"i", "ok.json": OK_JSON, ".hid": b""} | members
    )
    source = webdataset.Webdataset("x", str(path))
    assert len(source) == 2 and source[0].images == (b"i",)
    with pytest.raises(UserError, match=rf"x\.tar:{key}: .*{message}") as error:
        source[1]
    assert "\n" not in str(error.value)


def test_tar_groups(tmp_path):
    """Members of a key need not be neighbours; text-only conversations are rows too."""
    chat = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    members = {"b.JPG": b"1", "a.txt": b"A\n", "b.txt": b"B", "a.cls": b"7", "a.webp": b"2"}
    members["c.json"] = json.dumps({"conversations": chat}).encode()
    source = webdataset.Webdataset("x", str(write_tar(tmp_path / "x.tar", members)), prompt="?")
    found = [([t.text for t in r.turns], r.images) for r in (source[i] for i in range(3))]
    assert found == [
        (["<image>\n?", "B"], (b"1",)),
        (["<image>\n?", "A"], (b"2",)),
        (["q", "a"], ()),
    ]


def test_bad_tars(tmp_path):
    good = write_tar(tmp_path / "x.tar", {"a.jpg": b"i" * 5000, "a.txt": b"c"}).read_bytes()
    for data, message in ((good[:3000], "not a readable tar"), (b"\x1f\x8b123", "not a readable")):
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(UserError, match=rf"x\.tar: {message}"):
            webdataset.Webdataset("x", str(tmp_path / "x.tar"))
    members = {f"{i}.{kind}": b"c" for i in range(5) for kind in ("jpg", "txt")}
    good = write_tar(tmp_path / "x.tar", members).read_bytes()
    # To tarfile both are the end of the tar: half the rows would be gone without a word.
    for data in (good[:5120], good[:5120] + b"\xff" + good[5121:]):
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(UserError, match=r"x\.tar: .*no header and no end marker at byte 5120"):
            webdataset.Webdataset("x", str(tmp_path / "x.tar"))
    # So are the tars after the first in what `cat` made of several.
    (tmp_path / "x.tar").write_bytes(good + good)
    with pytest.raises(UserError, match=r"x\.tar: .*more follows the end marker at byte 10240"):
        webdataset.Webdataset("x", str(tmp_path / "x.tar"))
    (tmp_path / "x.tar").write_bytes(good + bytes(3_000_000))
    assert len(webdataset.Webdataset("x", str(tmp_path / "x.tar"))) == 5
    write_tar(tmp_path / "x.tar", {})
    with pytest.raises(UserError, match="the tars have no members"):
        webdataset.Webdataset("x", str(tmp_path / "x.tar"))


def test_bad_parquet(tmp_path, monkeypatch):
    rows = [{"image": {"bytes": b"i", "path": None}, "text": "c"}] * 4
    bad = [
        ({"image": {"bytes": None, "path": None}, "text": "c"}, "neither bytes nor a path"),
        ({"image": None, "text": "c"}, "a caption needs one image"),
        ({"image": {"bytes": b"i", "path": None}, "text": None}, "no caption"),
    ]
    path = write_parquet(tmp_path / "x.parquet", rows + [row for row, _ in bad])
    source = parquet.Parquet("x", str(path), "")
    assert len(source) == 7 and source[3].where.endswith("x.parquet:4")
    for i, (_, message) in enumerate(bad, 4):
        with pytest.raises(UserError, match=rf"x\.parquet:{i + 1}: .*{message}"):
            source[i]
    write_parquet(tmp_path / "x.parquet", [{"label": 3}])
    with pytest.raises(UserError, match=r"x\.parquet: no column of .* only label"):
        parquet.Parquet("x", str(path), "")
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"x\.parquet: not readable as parquet"):
        parquet.Parquet("x", str(path), "")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'hovle-jax\[parquet\]'"):
        parquet.Parquet("x", str(path), "")


def test_tfds_labels_and_errors(tmp_path):
    path = make("tfds", tmp_path)
    with pytest.raises(UserError, match="Unknown split 'tset'"):
        sources.open_source(f"{path}#tset")
    with pytest.raises(UserError, match="tfds:no_such_data_set#train: Dataset no_such_data_set"):
        sources.open_source("tfds:no_such_data_set")
    source = sources.open_source(f"{path}#train[:2]")
    assert len(source) == 2 and source[1].where == f"{path}#train[:2]:2"
    source._source = [{"image": b"i", "label": 1}, {"image": b"i"}]
    source._labels = ["cat", "dog"]
    assert source[0].turns[1].text == "cat" or source[0].turns[1].text == "dog"
    with pytest.raises(UserError, match=r":2: no caption"):
        source[1]


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Damages bytes: JSON values swapped for others, and plain bytes changed, cut or doubled."""
    values = [
        b"null",
        b"7",
        b"[]",
        b"{}",
        b'""',
        b'"\\ud800"',
        b'"<image>"',
        b"1e999",
        b"[[[",
        b"-",
    ]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
            case 1:
                data = data[:at] + data[at + rng.randint(1, 9) :]
            case 2:
                data = data[:at] + data[at : at + 20] + data[at:]
            case 3:
                data = data[:at] + rng.choice(values) + data[at:]
            case _:
                ends = [i for i, byte in enumerate(data) if byte in b',:"[]{}']
                a, b = sorted(rng.choices(ends, k=2)) if ends else (0, 0)
                data = data[:a] + rng.choice(values) + data[b:]
    return data


def hurt_pair(rng: random.Random) -> dict[str, bytes]:
    """A tar's members with one of them damaged."""
    row = json.dumps({"image": "a", "conversations": talk("x")}).encode()
    members = {"a.json": row, "a.jpg": pictures()[1], "a.txt": "猫".encode()}
    damaged = rng.choice(list(members))
    return members | {damaged: mutate(rng, members[damaged])}


@pytest.mark.parametrize(
    "kind", ["llava.json", "json.tar", "text.parquet", "sidecar", "row", "shard", "record"]
)
def test_fuzz_raises_nothing_but_user_errors(kind, tmp_path):
    rng = random.Random(kind)
    wrong = 0
    file = {"sidecar": "json.tar", "row": "llava.json", "shard": "records"}.get(kind, kind)
    path = make("llava.json" if kind == "record" else file, tmp_path)
    if kind == "shard":
        path = path / "llava-00000.array_record"
    data = path.read_bytes()
    row = json.dumps({"image": ["a"], "conversations": talk("x"), "caption": "c"}).encode()
    one = sources.open_source(str(path))[0]
    encoded = array_record.encode_record(one.turns, convert._image_bytes(one, "none"))
    for _ in range(150):
        try:
            match kind:
                case "record":
                    array_record.decode_record(mutate(rng, encoded), f"{path}:1")
                    continue
                case "sidecar":
                    write_tar(path, hurt_pair(rng))
                case "row":
                    path.write_bytes(b"[" + mutate(rng, row) + b"]")
                case _:
                    path.write_bytes(
                        mutate(rng, data) if rng.random() < 0.98 else rng.randbytes(99)
                    )
            source = sources.open_source(str(path))
        except UserError as e:
            assert "\n" not in str(e) and str(e).startswith(str(path))
            wrong += 1
            continue
        for i in range(len(source)):
            try:
                record = source[i]
                array_record.encode_record(record.turns, convert._image_bytes(record, "header"))
            except UserError as e:
                assert "\n" not in str(e) and str(e).startswith(f"{path}:")
                wrong += 1
    assert wrong > 20  # the damage was damage
