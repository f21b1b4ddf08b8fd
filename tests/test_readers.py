"""Readers of users' files: what they return and which line they blame."""

import json
import pickle

import pytest

from hovle_jax.data import readers, sources
from hovle_jax.data.records import Record, Turn
from hovle_jax.errors import UserError

QA = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.fixture
def write(tmp_path):
    """Writes rows (objects, or strings as they are) to a.jsonl and opens it."""

    def write(*rows, name="a.jsonl", newline="\n"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_bytes(newline.join(lines).encode())
        return readers.JsonlConversations("a", str(tmp_path / name), "root", max_tiles=4)

    return write


def test_conversation_rows(write, tmp_path):
    two = [{"from": "human", "value": "<image><image>q"}, {"from": "gpt", "text": "a"}]
    system = [{"from": "system", "value": "s"}, *QA]
    source = write(
        {"id": 0, "conversations": QA},
        "",
        {"image": "x.png", "width": 1, "conversations": system},
        {"image": ["x.png", "/abs/y.png"], "conversations": two},
        {"image": [], "conversations": QA},
    )
    q, a = Turn("user", "q"), Turn("assistant", "a")
    where = f"{tmp_path}/a.jsonl:"
    assert (source.name, source.max_tiles, len(source)) == ("a", 4, 4)
    assert source[0] == Record((q, a), (), f"{where}1")
    # One image without a placeholder: it comes first. Blank lines count as lines, not as rows.
    prefixed = (Turn("system", "s"), Turn("user", "<image>\nq"), a)
    assert source[1] == Record(prefixed, ("root/x.png",), f"{where}3")
    images = ("root/x.png", "/abs/y.png")
    assert source[2] == Record((Turn("user", "<image><image>q"), a), images, f"{where}4")
    assert source[-1] == source[3] == Record((q, a), (), f"{where}5")
    with pytest.raises(IndexError):
        source[4]


def test_crlf_and_unicode(write):
    turns = [{"from": "human", "value": "猫 é"}, {"from": "gpt", "value": "a"}]
    row = json.dumps({"conversations": turns}, ensure_ascii=False)
    source = write(row, row, newline="\r\n")
    assert source[1].turns[0].text == "猫 é"


def test_placeholder_in_a_later_turn_is_left_alone(write):
    turns = [*QA, {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]
    assert write({"image": "x.png", "conversations": turns})[0].turns[0].text == "q"


def test_openai_messages(write):
    parts = [{"type": "image"}, {"type": "text", "text": "q"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]
    record = write({"messages": messages, "images": ["x.png"]})[0]
    assert record.turns == (Turn("user", "<image>\nq"), Turn("assistant", "a"))
    assert record.images == ("root/x.png",)


def test_pickle(write):
    source = write({"conversations": QA}, {"conversations": QA})
    before = source[1]
    assert pickle.loads(pickle.dumps(source))[1] == before


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"conversations": ', "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ({"id": 1}, r"no caption .* and no 'conversations'; its keys are \['id'\]"),
        ({"conversations": "x"}, "'conversations' must be a list of turns, got 'x'"),
        ({"conversations": []}, "no turns"),
        ({"conversations": ["x"]}, "a turn must be a JSON object"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown role 'bot'"),
        ({"conversations": [{"from": "human"}]}, "human turn has no text"),
        ({"conversations": QA[:1]}, "last turn is from 'user'"),
        ({"conversations": [QA[0], {"from": "gpt", "value": " "}]}, "assistant turn is empty"),
        ({"conversations": [*QA, {"from": "system", "value": "s"}, *QA]}, "only the first turn"),
        ({"conversations": QA, "image": ["a", "b"]}, "0 '<image>' in user turns but 2 images"),
        ({"conversations": QA, "image": {"a": 1}}, "an image has neither bytes nor a path"),
        (
            {"conversations": QA, "image": ["a", 7]},
            "'image' must be a path or a list of paths, got 7",
        ),
        ({"conversations": QA, "video": "v.mp4"}, "video is not supported"),
        (
            {"conversations": [{"from": "human", "value": "<image>q"}, QA[1]]},
            "1 '<image>' in user turns but 0 images",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "neither a text nor an image",
        ),
    ],
)
def test_bad_rows_name_the_line(write, row, message):
    source = write({"conversations": QA}, row)
    assert source[0]
    with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{message}") as error:
        source[1]
    assert "\n" not in str(error.value)


def test_bad_encoding_names_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"x": "\xff"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: not valid JSON"):
        readers.JsonlConversations("a", str(tmp_path / "a.jsonl"), "")[0]
    (tmp_path / "a.txt").write_bytes(b"ok\n\xff\n")
    with pytest.raises(UserError, match=r"a\.txt:2: not UTF-8"):
        readers.TextLines(str(tmp_path / "a.txt"))[1]


def test_missing_and_empty_files(write, tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read \(No such file"):
        readers.JsonlConversations("a", str(tmp_path / "none.jsonl"), "")
    with pytest.raises(UserError, match=r"a\.jsonl: the file has no rows"):
        write("", " ")


def test_image_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.PNG", "a.jpg", "sub/c.webp", "notes.txt"):
        (tmp_path / name).touch()
    source = readers.ImageFolder("pool", str(tmp_path), max_tiles=1)
    paths = [str(tmp_path / name) for name in ("a.jpg", "b.PNG", "sub/c.webp")]
    assert [source[i] for i in range(len(source))] == [Record((), (p,), p) for p in paths]
    assert pickle.loads(pickle.dumps(source))[2] == source[2]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"pool: no \.png.* files below .*empty"):
        readers.ImageFolder("pool", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="pool: image directory not found: .*none"):
        readers.ImageFolder("pool", str(tmp_path / "none"))


def test_linked_folders_are_read_once(tmp_path):
    """As of a data set on several disks; and no link leads round in circles."""
    (tmp_path / "all" / "real").mkdir(parents=True)
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "beside.png").touch()
    for name in ("all/a.png", "all/real/b.png", "disk/c.png", "disk/deep/d.png", "all/._a.png"):
        (tmp_path / name).touch()
    links = {
        "all/disk": "disk",
        "all/z_again": "disk/deep",
        "all/a_latest": "all/real",
        "all/loop": "all",
        "disk/deep/up": "disk",
        "disk/deep/back": "all",
        "disk/deep/above": ".",
    }
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    for root in (tmp_path / "all", f"{tmp_path}/all/"):
        source = readers.ImageFolder("pool", str(root))
        found = [source[i].where.removeprefix(f"{tmp_path}/all/") for i in range(len(source))]
        assert found == ["a.png", "disk/c.png", "real/b.png", "z_again/d.png"]


def test_text_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one \n\n  two\n")
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ny"}\n{"txt": 1}\n')
    source = readers.TextLines(str(tmp_path / "a.txt"))
    assert [source[i] for i in range(len(source))] == ["one ", "  two"]
    source = pickle.loads(pickle.dumps(readers.TextLines(str(tmp_path / "a.jsonl"))))
    assert source[0] == "x\ny"
    with pytest.raises(UserError, match=r"a\.jsonl:2: no string under 'text'"):
        source[1]
    for name in ("a.json", "a.md", "a.txt.gz", "a"):  # markup and bytes are no text to train on
        (tmp_path / name).write_text('[{"text": "x"}]\n')
        with pytest.raises(UserError, match=f"{name}: text is a .txt of a document per line, or a"):
            readers.TextLines(str(tmp_path / name))


@pytest.fixture
def meta(write, tmp_path):
    write({"image": "x.png", "conversations": QA}, name="d.jsonl")

    def meta(**entry):
        path = tmp_path / "meta.json"
        path.write_text(json.dumps({"d": {"root": "img/", "annotation": "d.jsonl"} | entry}))
        return sources.open_meta(str(path))

    return meta


def test_meta(meta, tmp_path, monkeypatch):
    (entry,) = meta(repeat_time=1.7, max_dynamic_patch=12, data_augment=False, length=99)
    assert (entry.name, entry.repeat, entry.source.max_tiles) == ("d", 1.7, 12)
    assert (entry.source.name, entry.source.max_tiles, len(entry.source)) == ("d", 12, 1)
    assert entry.source[0].images == (f"{tmp_path}/img/x.png",)
    (entry,) = meta(root="/data")
    assert (entry.repeat, entry.source.max_tiles) == (1.0, None)
    assert entry.source[0].images == ("/data/x.png",)
    # The working directory comes first.
    (tmp_path / "cwd" / "img").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    assert meta()[0].source[0].images == ("img/x.png",)


def test_text_is_part_of_the_fingerprint(write, meta):
    """The same file as documents and as conversations has other lengths."""
    write({"text": "hello", "conversations": QA}, name="d.jsonl")
    whole, (text,), (no_text,) = meta(), meta(text=True), meta(text=False)
    assert whole[0].fingerprint == no_text.fingerprint != text.fingerprint


@pytest.fixture
def entries(tmp_path):
    """Opens a meta.json of data sets a, b, ... of ten rows each, with these keys."""
    rows = [[QA[0], {"from": "gpt", "value": f"row {i}"}] for i in range(10)]
    lines = [json.dumps({"conversations": turns}) for turns in rows]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))

    def entries(*keys, **options):
        meta = {"abc"[n]: {"annotation": "d.jsonl"} | more for n, more in enumerate(keys)}
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        return sources.open_meta(str(tmp_path / "meta.json"), **options)

    return entries


def test_weights(entries):
    assert [e.weight for e in entries({"weight": 3}, {"weight": 0.5})] == [3.0, 0.5]
    assert [e.weight for e in entries({}, {})] == [None, None]
    with pytest.raises(UserError, match=r"meta\.json: 'b' has no weight; give one to all"):
        entries({"weight": 1}, {}, {})
    for bad in (0, -1, True, "1", [], 1e999, 10**400):
        with pytest.raises(UserError, match=r"meta\.json: 'a': weight must be a positive number"):
            entries({"weight": bad})


@pytest.mark.parametrize(
    "repeat, rows, times", [(0.39, 3, 1), (0.1, 1, 1), (1, 10, 1), (1.7, 10, 1), (2, 10, 2)]
)
def test_repeat_modes(entries, repeat, rows, times):
    """InternVL keeps the first rows, or rounds down; see `raw_data[:int(n * repeat_time)]`."""
    (exact,) = entries({"repeat_time": repeat})
    assert (exact.repeat, len(exact.source)) == (repeat, 10)
    (entry,) = entries({"repeat_time": repeat, "max_dynamic_patch": 3}, repeat_mode="internvl")
    assert (entry.repeat, len(entry.source), entry.source.max_tiles) == (times, rows, 3)
    source = pickle.loads(pickle.dumps(entry.source))
    answers = [source[i].turns[1].text for i in range(len(source))]
    assert answers == [f"row {i}" for i in range(rows)]
    assert source[-1] == source[rows - 1]
    with pytest.raises(IndexError):
        source[rows]


def test_bad_repeat_modes(entries):
    with pytest.raises(UserError, match=r"'a': repeat_time 0\.05 of 10 rows leaves none"):
        entries({"repeat_time": 0.05}, repeat_mode="internvl")
    with pytest.raises(UserError, match="repeat_mode must be one of exact, internvl, got 'first'"):
        entries({}, repeat_mode="first")


def test_a_data_set_twice_is_an_error(tmp_path):
    (tmp_path / "meta.json").write_text('{"a": {"annotation": "x"}, "a": {"annotation": "y"}}')
    with pytest.raises(UserError, match=r"meta\.json: the key 'a' is there twice"):
        sources.open_meta(str(tmp_path / "meta.json"))


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"data_augment": 1}, "data_augment must be true or false, got 1"),
        ({"reptime": 1, "foo": 2}, r"unknown keys \['foo', 'reptime'\]"),
        ({"repeat_time": 0}, "repeat_time must be a positive number, got 0"),
        ({"repeat_time": "2"}, "repeat_time must be a positive number, got '2'"),
        ({"max_dynamic_patch": 0}, "max_dynamic_patch must be a positive integer"),
        ({"annotation": None}, "a path under 'annotation'"),
        ({"root": None}, "root must be a directory"),
    ],
)
def test_bad_meta_entries(meta, entry, message):
    with pytest.raises(UserError, match=rf"meta\.json: 'd': .*{message}"):
        meta(**entry)


def test_bad_meta_files(tmp_path):
    path = tmp_path / "meta.json"
    with pytest.raises(UserError, match=r"meta\.json: cannot be read"):
        sources.open_meta(str(path))
    for text, message in (("{", "not valid JSON"), ("[]", "expected a JSON object")):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"meta\.json: {message}"):
            sources.open_meta(str(path))
