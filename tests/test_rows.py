"""What a row means, whichever format it came in: images, parts of messages, contradictions."""

import base64
import json

import pytest

from hovle_jax.data import rows, sources
from hovle_jax.data.records import Record, Turn
from hovle_jax.errors import UserError
from tests.test_formats import EXPECTED, content, make, talk, write_parquet, write_tar

QA = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PNG = "data:image/png;base64," + base64.b64encode(b"pixels").decode()


def record(row: dict, **options) -> Record:
    return rows.make_record(row, "f:3", **{"root": "root"} | options)


def asked(*parts: object, **more: object) -> dict:
    """A row of one question, made of content parts."""
    answer = {"role": "assistant", "content": "a"}
    return {"messages": [{"role": "user", "content": list(parts)}, answer]} | more


def text(text: str) -> dict:
    return {"type": "text", "text": text}


def image(value: object) -> dict:
    return {"type": "image", "image": value}


def link(value: object) -> dict:
    return {"type": "image_url", "image_url": value}


@pytest.mark.parametrize(
    "row, question, images",
    [
        (asked(image("x.png"), text("q")), "<image>\nq", ("root/x.png",)),
        (
            asked(text("A "), image("x.png"), text("B "), image("/y.png"), text("q")),
            "A <image>\nB <image>\nq",
            ("root/x.png", "/y.png"),
        ),
        (asked(link({"url": PNG}), text("q")), "<image>\nq", (b"pixels",)),
        (asked(link("gs://b/x.png"), text("q")), "<image>\nq", ("gs://b/x.png",)),
        (asked(image("file:///x y.png")), "<image>\n", ("/x y.png",)),
        # Said twice, but alike.
        (asked(image("x.png"), images=["x.png"]), "<image>\n", ("root/x.png",)),
        (asked(image({"bytes": b"p"}), image=b"p", images=[{"bytes": b"p"}]), "<image>\n", (b"p",)),
        # Parts that name nothing take the row's images in order.
        (
            asked({"type": "image"}, text("or"), {"type": "image"}, images=["1", "2"]),
            "<image>\nor<image>\n",
            ("root/1", "root/2"),
        ),
        ({"conversations": QA, "image": {"path": "x.png"}}, "<image>\nq", ("root/x.png",)),
        ({"conversations": QA, "image": PNG}, "<image>\nq", (b"pixels",)),
        ({"conversations": QA, "image": None, "images": []}, "q", ()),
        ({"conversations": None, "messages": QA}, "q", ()),
        ({"conversations": QA, "messages": QA, "videos": [], "status": None}, "q", ()),
        ({"caption": "a", "image": "x"}, f"<image>\n{rows.PROMPT}", ("root/x",)),
    ],
)
def test_images_of_a_row(row, question, images):
    assert record(row) == Record((Turn("user", question), Turn("assistant", "a")), images, "f:3")
    if images:
        assert record(row, images_only=True) == Record((), images, "f:3")


@pytest.mark.parametrize(
    "row, message",
    [
        (asked(image("x"), images=["y"]), "the image parts name other images than 'image'"),
        (asked(image("x"), {"type": "image"}), "some image parts name their image and some do"),
        (asked(image("x"), text("<image>")), "2 '<image>' in user turns but 1 images"),
        (asked(image(7)), "'image' must be a path"),
        (asked(image("")), "'image' must be a path"),
        (asked(link({"link": "x"})), "neither a text nor an image"),
        (asked(text("q") | {"image": "x"}), "neither a text nor an image"),
        (asked({"type": "text"}), "neither a text nor an image"),
        (asked(None), "neither a text nor an image"),
        (asked(link("https://example.com/x.png")), "is not fetched; download the image"),
        (asked(link("data:image/png;base64,###")), "no image as 'data:image"),
        (asked(link("data:image/png," + "A" * 9999)), "no image as 'data:image"),
        (asked(image("x\0y")), "has a zero byte"),
        (asked(image("\ud800")), "half a surrogate pair"),
        ({"conversations": talk("\udfff"), "image": "x"}, "half a surrogate pair"),
        ({"caption": "\udfff", "image": "x"}, "half a surrogate pair"),
        ({"conversations": QA, "image": "x", "images": ["y"]}, "'image' and 'images' differ"),
        ({"conversations": QA, "messages": talk("x")}, "'conversations' and 'messages' differ"),
        ({"conversations": [QA[0] | {"text": "x"}, QA[1]]}, "'value' and 'text' differ"),
        ({"conversations": [QA[0] | {"role": "assistant"}, QA[1]]}, "'from' and 'role' differ"),
        ({"conversations": QA, "image": {"bytes": "x"}}, "neither bytes nor a path"),
        ({"conversations": QA, "image": True}, "'image' must be a path"),
        ({"conversations": QA, "videos": ["v.mp4"]}, "videos is not supported"),
        ({"messages": [{"role": "assistant", "content": [image("x")]}]}, "only user turns may"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"unknown role \['user'\]"),
        ({"caption": 7, "image": "x"}, "no caption"),
        ({"caption": "a", "images": ["x", "y"]}, "a caption needs one image, the row has 2"),
        ({"caption": "a", "image": "x", "status": "failed"}, "status is 'failed'"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(UserError, match=f"^f:3: .*{message}") as error:
        record(row)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_images_beside_the_row():
    assert record({"caption": "a"}, beside=[b"p"]).images == (b"p",)
    assert record(asked(image("x")), beside=[b"p"]).images == (b"p",)
    assert record({"conversations": QA}, beside=[]).images == ()
    assert record(asked(link(PNG)), beside=[]).images == (b"pixels",)
    for row, beside, message in (
        (asked(image("x"), image("y")), [b"p"], "names 2 images, 1 come with it"),
        (asked(image("x")), [], "names 1 images, 0 come with it"),
        (asked(link(PNG)), [b"p"], "another one comes with it"),
    ):
        with pytest.raises(UserError, match=f"^f:3: .*{message}"):
            record(row, beside=beside)


def test_json_of_a_row():
    assert rows.load_json(b'\xef\xbb\xbf{"a": [{"b": 1}, {"b": 2}]}', "f") == {
        "a": [{"b": 1}, {"b": 2}]
    }
    for data, message in (
        (b'{"a": 1, "b": {"from": 1, "from": 2}}', "the key 'from' is there twice"),
        (b'{"a": "\xed\xa0\x80"}', "not valid JSON .*utf-8"),  # a surrogate, encoded
        ('{"a": 1}'.encode("utf-16"), "not valid JSON .*utf-8"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not valid JSON .*digits"),
        (b"[" * 100_000, "not valid JSON .*recursion"),
        (b"null", "expected a JSON object, got NoneType"),
    ):
        with pytest.raises(UserError, match=f"^f: {message}") as error:
            rows.load_json(data, "f")
        assert "\n" not in str(error.value)


IMAGE_KINDS = ("value.jsonl", "llava.json", "pairs.tar", "json.tar", "text.parquet")
IMAGE_KINDS += ("messages.parquet", "records", "tfds", "im")


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_images_only(kind, tmp_path):
    source = sources.open_source(str(make(kind, tmp_path)), images_only=True)
    assert [content(source[i]) for i in range(4)] == [([], pixels) for pixels in EXPECTED]


def test_images_only_needs_images_but_no_text(tmp_path):
    lines = [{"image": "a"}, {"images": ["a", "b"], "conversations": 7}, {"conversations": QA}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    jsonl = sources.open_source(str(tmp_path / "a.jsonl"), root="", images_only=True)
    assert [(jsonl[i].turns, jsonl[i].images) for i in range(2)] == [((), ("a",)), ((), ("a", "b"))]
    tar = write_tar(
        tmp_path / "a.tar", {"a.jpg": b"i", "b.txt": b"t", "c.jpg": b"", "c.json": b"?"}
    )
    tars = sources.open_source(str(tar), images_only=True)
    assert tars[0].images == (b"i",) and tars[2].turns == ()
    table = write_parquet(tmp_path / "a.parquet", [{"image": b"i"}, {"image": None}])
    parquet = sources.open_source(str(table), images_only=True)
    assert parquet[0] == Record((), (b"i",), f"{table}:1")
    for source, i, message in (
        (jsonl, 2, r"a\.jsonl:3: no image; its keys are \['conversations'\]"),
        (tars, 1, r"a\.tar:b: no jpg/jpeg/png/webp member"),
        (parquet, 1, r"a\.parquet:2: no image"),
    ):
        with pytest.raises(UserError, match=message):
            source[i]


def test_captions_in_jsonl(tmp_path):
    """As in every other container."""
    (tmp_path / "a.jsonl").write_text('{"image": "x.png", "caption": "a cat"}\n')
    found = sources.open_source(str(tmp_path / "a.jsonl"), prompt="What?")[0]
    assert found.turns == (Turn("user", "<image>\nWhat?"), Turn("assistant", "a cat"))
    assert found.images == (f"{tmp_path}/x.png",)
