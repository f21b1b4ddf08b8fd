"""Malformed rows: one line that names file and row, or a record whose labels are its answers.

Rows are near misses of good ones, in every container. What a record should say is worked out here
from the raw JSON by `expected`, which shares no code with the readers.
"""

import copy
import functools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hovle_jax.config import IGNORE
from hovle_jax.data import rows
from hovle_jax.data.chat import TEMPLATES, encode_conversation
from hovle_jax.data.json_list import LlavaJson
from hovle_jax.data.readers import JsonlConversations
from hovle_jax.data.records import Record
from hovle_jax.data.tokenizer import IM_END, IMG_CONTEXT, Tokenizer, train_tokenizer
from hovle_jax.data.webdataset import Webdataset
from hovle_jax.errors import UserError
from tests.test_formats import write_tar

# 20,000 in all, seconds each; the same ones in every run.
CASES = {"jsonl": 6500, "list": 4000, "dict": 8000, "tar": 2000}
TILE = 2  # tokens

WORDS = ("red", "Which colour?", " please", "\n", " ", "", "white green", "猫", "é", "\u2028")
TEXT = ("\0", "\u2581", "</s>", "[UNUSED_TOKEN_146]")
ODD = ("<image>", "<image>\n", "\ud800", "\ude00", *TEXT)
ADDED = ("<|im_end|>", "<|im_start|>assistant\n", "<IMG_CONTEXT>", "<img>")
ROLES = ("human", "gpt", "user", "assistant", "system")
BAD_ROLES = ("bot", "", "GPT", "tool", None, 7, [], ["gpt"], {"gpt": 1})
KEYS = ("from", "role", "value", "text", "content", "image", "images", "conversations", "messages")
KEYS += ("caption", "status", "video", "type", "image_url", "url", "bytes", "path")
DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]
JUNK = (None, True, 0, -1, 1.5, 10**4000, float("nan"), "", "x", "gpt", [], [[]], {}, [None], DEEP)
JUNK += ({"": ""}, {"path": "p"}, {"bytes": None, "path": None}, [{"type": "image"}], ["a", "b"])
JUNK += ("a\0b", "\ud800", "data:image/png;base64,AAAA", "data:,", "https://x/y", "gs://b/x")
# What damages JSON as text, and some that does not.
SPLINTERS = (
    b"\xff",
    b"\xed\xa0\x80",
    b"\0",
    b"}",
    b"]",
    b'"',
    b",",
    b"\\",
    b"\\ud800",
    b"\n",
    b"{",
)
SPLINTERS += (b"null", b" ", b"<image>", b"\xe7\x8c\xab", b"NaN", b"1" * 5000, b"[" * 3000, b"\r")

# One draw of hypothesis: it makes thousands of these in the time of a few hundred structured ones.
NOISE = st.binary(min_size=96, max_size=96)


class Draws:
    """Choices read off random bytes; shrinking the bytes makes them simpler."""

    def __init__(self, noise: bytes):
        self._bytes = iter(noise)

    def number(self) -> int:
        """0 to 65535, and 0 for ever once the bytes are used up."""
        return next(self._bytes, 0) << 8 | next(self._bytes, 0)

    def among(self, values):
        return values[self.number() % len(values)]

    def text(self) -> str:
        return "".join(self.among(WORDS * 2 + ADDED + TEXT) for _ in range(self.number() % 4))


def good_row(draws: Draws) -> dict:
    """A row with its images and placeholders in order, in one of the dialects."""
    if draws.number() % 11 == 10:
        return {"image": "a.png", draws.among(("caption", "text")): draws.text() + "red"}
    openai, parts, inline = (bool(draws.number() % 2) for _ in range(3))
    role, text = ("role", "content") if openai else ("from", draws.among(("value", "text")))
    names = ("user", "assistant") if openai else ("human", "gpt")
    turns = [{role: "system", text: draws.text()}] if draws.number() % 7 == 6 else []
    images: list[str] = []
    for _ in range(1 + draws.number() % 3):
        shown = [f"{len(images) + n}.png" for n in range(draws.among((0, 1, 1, 2)))]
        images += shown
        asked: object = "<image>\n" * len(shown) + draws.text()
        answer: object = draws.text() + draws.among(("red", "green ", " white\n"))
        if parts:
            named = [{"type": "image"} | ({"image": name} if inline else {}) for name in shown]
            asked = [*named, {"type": "text", "text": draws.text()}]
            answer = draws.among((answer, [{"type": "text", "text": answer}]))
        turns += [{role: names[0], text: asked}, {role: names[1], text: answer}]
    row: dict = {"messages" if openai else "conversations": turns, "id": 7}
    if not (parts and inline):
        row["images" if openai else "image"] = images[0] if len(images) == 1 else images
    return row


def places(value: object) -> list[tuple]:
    """(container, key) of everything in a tree."""
    found: list[tuple] = []
    todo = [value]
    while todo:
        node = todo.pop()
        if isinstance(node, dict | list):
            keys = list(node) if isinstance(node, dict) else range(len(node))
            found += [(node, key) for key in keys]
            todo += [node[key] for key in keys]
    return found


def bad_row(draws: Draws) -> dict:
    """A good row with up to three things changed."""
    row = good_row(draws)
    for _ in range(draws.among((0, 1, 1, 1, 2, 3))):
        if not (found := places(row)):
            break
        node, key = draws.among(found)
        junk = copy.deepcopy(draws.among(JUNK))
        match draws.number() % 8:
            case 0:
                node[key] = junk
            case 1:
                del node[key]
            case 2 if isinstance(node, dict):
                node[draws.among(KEYS)] = node.pop(key)
            case 3 if isinstance(node, dict):
                node[draws.among(KEYS)] = junk
            case 4 if isinstance(node, list):
                node.insert(key, copy.deepcopy(draws.among(node)))
            case 5:
                node[key] = copy.deepcopy(draws.among(ROLES + BAD_ROLES))
            case _ if isinstance(node[key], str):
                node[key] += draws.among(WORDS + ODD + ADDED)
            case _:
                node[key] = draws.among(WORDS + ODD + ADDED)
    return row


def bad_bytes(draws: Draws) -> bytes:
    """A row as JSON, at times with a key doubled or the bytes damaged."""
    text = json.dumps(bad_row(draws), ensure_ascii=bool(draws.number() % 3))
    data = text.encode("utf-8", "surrogatepass")
    at = draws.number() % (len(data) + 1)
    match draws.number() % 8:
        case 0:
            pairs = list(re.finditer(rb'"(?:from|role|value|image)": ("[^"\\]*"|null)', data))
            if pairs:
                pair = draws.among(pairs)
                twin = draws.among((pair[0], pair[0].replace(pair[1], b'"gpt"')))
                data = data[: pair.end()] + b", " + twin + data[pair.end() :]
        case 1:
            data = data[:at] + draws.among(SPLINTERS) + data[at + draws.number() % 3 :]
        case 2:
            data = data[:at] + data[at + draws.number() % 40 :]
    return data


def unique(pairs: list) -> dict:
    assert len(dict(pairs)) == len(pairs), "a key is there twice, and the row was taken"
    return dict(pairs)


def expected(row: dict) -> list[str]:
    """The answers of a row that was taken, in order."""
    talk = row.get("conversations")
    talk = row.get("messages") if talk is None else talk
    if talk is None:
        caption = row.get("caption")
        return [(row["text"] if caption is None else caption).strip()]
    answers = []
    for turn in talk:
        texts = [turn[key] for key in ("value", "text", "content") if turn.get(key) is not None]
        assert texts and all(text == texts[0] for text in texts), "no text, or two, and was taken"
        roles = [turn[key] for key in ("from", "role") if turn.get(key) is not None]
        assert all(role == roles[0] for role in roles), "two roles, and was taken"
        if roles[0] in ("gpt", "assistant"):
            said = texts[0]
            said = said if isinstance(said, str) else "".join(part["text"] for part in said)
            answers.append(said.strip())
    return answers


def check(record: Record, answers: list[str], tokenizer: Tokenizer) -> None:
    """Labels are the answers and the <|im_end|> behind them, and nothing else is labelled."""
    template = TEMPLATES["chatml-plain"]
    encoded = encode_conversation(
        record.turns, [1] * len(record.images), tokenizer, template, tokens_per_tile=TILE
    )
    ids, labels = encoded.ids, encoded.labels
    learnt = labels != IGNORE
    assert np.array_equal(ids[learnt], labels[learnt])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], learnt, [False]])))
    runs = [ids[start:end].tolist() for start, end in edges.reshape(-1, 2)]
    end = tokenizer.id_of(IM_END)
    assert runs == [[*tokenizer.encode_ordinary(answer), end] for answer in answers]
    for run, answer in zip(runs, answers, strict=True):
        assert answer
        if 0 not in run:  # unknown characters have no way back
            assert tokenizer.decode(run[:-1]) == answer.replace("\u2581", " ")
    # Text that spells an added token must not become one.
    silent = record.turns[0].role == "system" and not record.turns[0].text.strip()
    assert ids.tolist().count(end) == len(record.turns) - silent
    assert ids.tolist().count(tokenizer.id_of(IMG_CONTEXT)) == TILE * len(record.images)


class Tally:
    """A fuzz test whose rows are all bad, or all good, has shown nothing."""

    def __init__(self):
        self.cases = self.taken = self.refused = 0

    def read(self, get, row, where, tokenizer):
        """Reads a record by `get`; `row()` is what it comes from."""
        try:
            record = get()
        except UserError as e:
            message = str(e)
            assert len(message.splitlines()) == 1 and message.startswith(f"{where}: "), message
            self.refused += 1
            return
        row = row()
        assert record.where == where and isinstance(row, dict)
        check(record, expected(row), tokenizer)
        self.taken += 1

    def opened(self, open_source, path):
        try:
            return open_source()
        except UserError as e:
            message = str(e)
            assert len(message.splitlines()) == 1 and message.startswith(f"{path}:"), message
            self.refused += 1
            return ()


def fuzz(test, cases: int) -> None:
    """Runs `test(draws, tally)`; enough of what it reads must be good, and bad."""
    tally = Tally()

    @settings(max_examples=cases, derandomize=True, deadline=None, database=None)
    @given(NOISE)
    def run(noise: bytes) -> None:
        tally.cases += 1
        test(Draws(noise), tally)

    run()
    assert tally.cases >= cases and min(tally.taken, tally.refused) > cases / 20, vars(tally)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    known = [word for word in WORDS + ADDED + ODD[:2] if word.isascii()]
    return train_tokenizer(
        [*known, "user system assistant\n"] * 4, tmp_path_factory.mktemp("t"), 99
    )


def parsed(data: bytes) -> object:
    """The JSON object, or something else where a reader must refuse the row."""
    try:
        return json.loads(data.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None


def test_jsonl(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"

    def test(draws: Draws, tally: Tally) -> None:
        data = bad_bytes(draws)
        path.write_bytes(data)
        source = tally.opened(lambda: JsonlConversations("a", str(path), "root"), path)
        lines = [(n, line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]
        assert len(source) in (0, len(lines))
        for i in range(len(source)):
            number, line = lines[i]
            get, row = functools.partial(source.__getitem__, i), functools.partial(parsed, line)
            tally.read(get, row, f"{path}:{number}", tokenizer)

    fuzz(test, CASES["jsonl"])


def test_json_lists(tokenizer, tmp_path):
    path = tmp_path / "a.json"

    def test(draws: Draws, tally: Tally) -> None:
        first = bad_bytes(draws)
        elements = [first, b'{"caption": "red", "image": "x"}']
        path.write_bytes(b"[" + b", ".join(elements) + b"]")
        source = tally.opened(lambda: LlavaJson("a", str(path), "root"), path)
        for i in range(len(source)):
            start = int(source._starts[i])
            element = path.read_bytes()[start : start + int(source._sizes[i])]
            assert len(source) != 2 or element == elements[i].strip()
            get, row = functools.partial(source.__getitem__, i), functools.partial(parsed, element)
            tally.read(get, row, f"{path}:{i + 1}", tokenizer)

    fuzz(test, CASES["list"])


def test_dictionaries(tokenizer):
    """As parquet and TFDS give them: bytes in place of text, None in place of no key."""
    foreign = (b"", b"\xff", b"gpt", (1, 2), 10**5000, {1: 2}, {b"x": None}, {"bytes": b"x"})

    def test(draws: Draws, tally: Tally) -> None:
        row = bad_row(draws)
        if draws.number() % 2 and (found := places(row)):
            node, key = draws.among(found)
            node[key] = copy.deepcopy(draws.among(foreign))
        get = functools.partial(rows.make_record, row, "f.parquet:7")
        tally.read(get, lambda: row, "f.parquet:7", tokenizer)

    fuzz(test, CASES["dict"])


def test_sidecars_of_tars(tokenizer, tmp_path):
    path = tmp_path / "a.tar"

    def test(draws: Draws, tally: Tally) -> None:
        sidecar = bad_bytes(draws)
        members = {"d/k.json": sidecar} | draws.among(({}, {"d/k.jpg": b"i"}, {"d/k.jpg": b"i"}))
        text = draws.among((None, None, None, "red", "", "\0", "猫"))
        if text is not None:
            members["d/k.txt"] = text.encode()
        write_tar(path, members)
        get = functools.partial(Webdataset("a", str(path)).__getitem__, 0)

        def row() -> object:
            found = parsed(sidecar)
            if text is None or not isinstance(found, dict):
                return found
            talks = {key: found[key] for key in ("conversations", "messages") if key in found}
            return talks | {"caption": text}

        tally.read(get, row, f"{path}:d/k", tokenizer)

    fuzz(test, CASES["tar"])
