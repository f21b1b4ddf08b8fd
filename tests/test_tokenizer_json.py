"""tokenizer.json gives SentencePiece's ids: by the rules it holds, and as transformers reads it."""

import io
import json
import random
import re
import struct
from typing import Any

import pytest
import sentencepiece

from hovle_jax.data import tokenizer as tokenizer_lib
from hovle_jax.data.chat import TEMPLATES, Template
from hovle_jax.data.records import Turn
from hovle_jax.data.tokenizer import ADDED_TOKENS, IM_START, IMG_CONTEXT, Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.generation.chat import first_question
from hovle_jax.hf.chat_template import chat_template
from hovle_jax.hf.tokenizer_json import tokenizer_files

LINES = [
    f"top-left:{i} top-right:{j}\nWhich  digit is {place}? {extra}"
    for i in range(10)
    for j in range(10)
    for place in ("top-left", "top-right")
    for extra in ("你是一个有用无害的助手。", "naïve 😀 ok", "a  b    c", "abab babba aabb bbaaab")
]
ALPHABETS = (
    *("abcdefghij ", "ab", "ab ", "0123456789", " \n\t", "\u2581 a", "top-left:digit "),
    *("你是一个有用无害的助手猫", "😀😃é️👨‍👩‍👧ï", "".join(map(chr, range(32, 127)))),
)
EDGE_CASES = (
    *("", " ", "  ", "\n", "\r\n", "a\r\nb", "\x00", "\x01", "\u2581", "<unk>", "<0x41>", "<s>"),
    *(LINES[0], f" {IM_START} user\n  hi {IMG_CONTEXT}{IMG_CONTEXT} \n</img>", "<img", "img>x"),
)


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    texts = list(EDGE_CASES)
    words = (*ADDED_TOKENS, "<s>", "</s>", "<unk>", "<0x0A>", "<unk", "[X_1]", *LINES[0].split(" "))
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 6)):
            if rng.random() < 0.3:
                parts.append(rng.choice(words))
            else:
                parts.append("".join(rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 12))))
        texts.append("".join(parts))
    return texts


def with_added(proto: bytes, config: dict[str, Any] | None = None) -> Tokenizer:
    size = sentencepiece.SentencePieceProcessor(model_proto=proto).GetPieceSize()
    added = {token: size + n for n, token in enumerate(ADDED_TOKENS)}
    for entry in (config or {}).get("added_tokens_decoder", {}).values():
        added.pop(entry["content"], None)
    added = {token: size + n for n, token in enumerate(added)}
    files = {"tokenizer.model": proto, "added_tokens.json": json.dumps(added).encode()}
    if config:
        files["tokenizer_config.json"] = json.dumps(config).encode()
    return Tokenizer(files, "test")


def train(**settings: Any) -> bytes:
    model = io.BytesIO()
    defaults = {"model_type": "bpe", "vocab_size": 400, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        **(defaults | settings),
        hard_vocab_limit=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=3,
    )
    return model.getvalue()


def field(number: int, value: bytes | int | float) -> bytes:
    """One field of a protobuf message; numbers stay below 128."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    wire, payload = (0, b"") if isinstance(value, int) else (2, value)
    size = value if isinstance(value, int) else len(value)
    return varint(number << 3 | wire) + varint(size) + payload


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def handmade(
    pieces: list[tuple[str, float, int]], trainer: bytes = b"", spec: bytes = b""
) -> bytes:
    """A BPE model of given (text, score, type), with plain normalisation."""
    head = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    out = b"".join(
        field(1, field(1, text.encode()) + field(2, score) + field(3, kind))
        for text, score, kind in head + pieces
    )
    plain = field(3, 0) + field(4, 0)
    return out + field(2, field(3, 2) + trainer) + field(3, plain + spec)


def letters(text: str) -> list[tuple[str, float, int]]:
    return [(char, -100.0 - n, 1) for n, char in enumerate(text)]


# Text of UNCUT always stops at 'a', 'bc', 'd', never at the piece 'abcd'.
UNCUT = [
    ("ab", -2.0, 1),
    ("cd", -3.0, 1),
    ("bc", -1.0, 1),
    ("abcd", -4.0, 1),
    *letters("abcdX_[]1"),
]
SYMBOL = ("[X_1]", 0.0, 4)

BPE: dict[str, dict[str, Any]] = {
    "plain": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "plain_bytes": {
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
    },
    "prefix": {"remove_extra_whitespaces": False, "byte_fallback": True},
    "strip": {"add_dummy_prefix": False},
    "prefix_strip": {"byte_fallback": True},
    "digits": {
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": [*"0123456789", "\n"],
    },
    "symbols": {"user_defined_symbols": ["[X", "[X_1]", "ab", "\n", "7"]},
    "symbols_plain": {
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "user_defined_symbols": ["[X", "[X_1]", "ab", "\n", "7"],
    },
}


def bpe_tokenizer(name: str) -> Tokenizer:
    return with_added(train(**BPE[name]))


def alias_tokenizer() -> Tokenizer:
    """As InternLM2: a piece that is called otherwise in the config, and a special <unk>."""
    proto = train(**BPE["symbols_plain"])
    piece = sentencepiece.SentencePieceProcessor(model_proto=proto).PieceToId("[X_1]")
    decoder = {"0": {"content": "<unk>"}, str(piece): {"content": IM_START}}
    return with_added(proto, {"added_tokens_decoder": decoder})


class Reference:
    """What tokenizer.json says, step by step, as far as these tests' BPE models use it."""

    def __init__(self, files: dict[str, bytes]):
        spec = json.loads(files["tokenizer.json"])
        self.spec, self.model = spec, spec["model"]
        self.vocab = self.model["vocab"]
        self.rank = {tuple(pair): n for n, pair in enumerate(self.model["merges"])}
        self.added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        longest_first = sorted(self.added, key=len, reverse=True)
        self.added_re = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, text: str) -> list[int]:
        post_processor = self.spec["post_processor"]
        first, text_place = post_processor["single"]
        assert text_place == {"Sequence": {"id": "A", "type_id": 0}}
        ids = list(post_processor["special_tokens"][first["SpecialToken"]["id"]]["ids"])
        for n, part in enumerate(self.added_re.split(text)):
            if n % 2:
                ids.append(self.added[part])
            elif part:
                for word in self.words(self.normalize(part)):
                    ids += self.bpe(word)
        return ids

    def normalize(self, text: str) -> str:
        for step in self.spec["normalizer"]["normalizers"]:
            if step["type"] == "Prepend":
                text = step["prepend"] + text if text else text
            elif "Regex" in step["pattern"]:
                pattern = step["pattern"]["Regex"].replace(r"\z", r"\Z")
                text = re.sub(pattern, step["content"], text)
            else:
                text = text.replace(step["pattern"]["String"], step["content"])
        return text

    def words(self, text: str) -> list[str]:
        splitter = self.spec["pre_tokenizer"]
        steps = splitter and splitter.get("pretokenizers", [splitter])
        words = [text]
        for step in steps or ():
            pattern = re.compile(step["pattern"]["Regex"].replace(r"\z", r"\Z"))
            words = [part for word in words for part in self.split(pattern, step["behavior"], word)]
        return [word for word in words if word]

    @staticmethod
    def split(pattern: re.Pattern[str], behavior: str, word: str) -> list[str]:
        parts, last = [], 0
        for match in pattern.finditer(word):
            if behavior == "Isolated":
                parts += [word[last : match.start()], match[0]]
            else:
                parts.append(word[last : match.end()])
            last = match.end()
        return [*parts, word[last:]]

    def bpe(self, word: str) -> list[int]:
        if self.model["ignore_merges"] and word in self.vocab:
            return [self.vocab[word]]
        parts = list(word)
        while True:
            ranks = [
                (self.rank[pair], n)
                for n, pair in enumerate(zip(parts, parts[1:], strict=False))
                if pair in self.rank
            ]
            if not ranks:
                break
            n = min(ranks)[1]
            parts[n : n + 2] = [parts[n] + parts[n + 1]]
        unk = self.vocab[self.model["unk_token"]]
        ids: list[int] = []
        for part in parts:
            if part in self.vocab:
                ids.append(self.vocab[part])
            elif self.model["byte_fallback"]:
                ids += [self.vocab[f"<0x{byte:02X}>"] for byte in part.encode()]
            elif not (self.model["fuse_unk"] and ids and ids[-1] == unk):
                ids.append(unk)
        return ids


def assert_same_ids(tokenizer: Tokenizer, texts: list[str], **options: Any) -> Reference:
    reference = Reference(tokenizer_files(tokenizer, **options))
    for text in texts:
        assert reference.encode(text) == tokenizer.encode(text, bos=True), repr(text)
    return reference


@pytest.mark.parametrize("name", BPE)
def test_rules_give_sentencepiece_ids(name):
    tokenizer = bpe_tokenizer(name)
    reference = assert_same_ids(tokenizer, random_texts(400))
    assert len(reference.vocab) + len(ADDED_TOKENS) == tokenizer.vocab_size


def test_project_tokenizer(tmp_path):
    tokenizer = tokenizer_lib.train_tokenizer(LINES, tmp_path, vocab_size=300)
    reference = assert_same_ids(tokenizer, random_texts(400))
    # Digits and the newline need no added tokens, which would vanish from decoded text when what
    # transformers saved is read by `Tokenizer.load`.
    assert set(reference.added) == {"<s>", "</s>", *ADDED_TOKENS}
    assert not reference.model["ignore_merges"]


def test_files_fit_together_and_load_as_the_tokenizer(tmp_path):
    tokenizer = tokenizer_lib.train_tokenizer(LINES, tmp_path, vocab_size=300)
    files = tokenizer_files(tokenizer, "{{ 1 }}", model_max_length=77)
    assert list(files) == ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    config, roles = (json.loads(files[name]) for name in list(files)[1:])
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "additional_special_tokens": list(ADDED_TOKENS),
    }
    assert roles == names
    assert {key: config[key] for key in names} == names
    assert (config["chat_template"], config["model_max_length"]) == ("{{ 1 }}", 77)
    for token in json.loads(files["tokenizer.json"])["added_tokens"]:
        assert tokenizer.id_of(token.pop("content")) == token.pop("id")
        assert token.pop("special")
        assert not any(token.values())
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    again = Tokenizer.load(tmp_path)
    for text in random_texts(50):
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids) == tokenizer.decode(ids)


def test_another_name_of_a_special_token_is_text():
    tokenizer = alias_tokenizer()
    texts = [text for text in random_texts(300) if "[X_1]" not in text]
    reference = assert_same_ids(tokenizer, texts)
    start = tokenizer.id_of(IM_START)
    assert tokenizer.encode("[X_1]") == [start]
    assert start not in reference.encode("a[X_1]")
    assert reference.encode(IM_START) == [1, start]
    assert json.loads(tokenizer_files(tokenizer)["tokenizer_config.json"])["unk_token"] == "<unk>"


def test_symbols_that_would_need_ignore_merges_are_added_tokens():
    tokenizer = with_added(handmade([*UNCUT, SYMBOL]))
    assert [tokenizer.decode([i]) for i in tokenizer.encode("abcd")] == ["a", "bc", "d"]
    texts = ["abcd", "[X_1]", "abcd[X_1]abcd[X_1", "a[X_1]<img>[X_1]d", "[X_[X_1]]"]
    reference = assert_same_ids(tokenizer, texts)
    assert "[X_1]" in reference.added and not reference.model["ignore_merges"]
    # The project decodes it as text; it is not special.
    config = json.loads(tokenizer_files(tokenizer)["tokenizer_config.json"])
    assert "[X_1]" not in str(config)


def test_merges_of_a_piece_are_tried_from_the_left():
    pieces = [("ab", -1.0, 1), ("aba", -2.0, 1), ("ba", -3.0, 1), ("aa", -4.0, 1), ("aaa", -5.0, 1)]
    tokenizer = with_added(handmade(pieces + letters("ab")))
    rng = random.Random(0)
    texts = ["".join(rng.choices("ab", k=rng.randint(1, 20))) for _ in range(500)]
    reference = assert_same_ids(tokenizer, texts)
    assert reference.model["merges"][:3] == [["a", "b"], ["ab", "a"], ["a", "ba"]]


NMT_NFKC = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc")

REFUSED = {
    "model_type": handmade(letters("ab"), trainer=field(3, 3)),
    "treat_whitespace_as_suffix": handmade(letters("ab"), trainer=field(24, 1)),
    "escape_whitespaces=false": handmade(letters("ab"), spec=field(5, 0)),
    "denormalizer_spec": handmade(letters("ab")) + field(5, NMT_NFKC.serialized_normalizer_spec()),
    "unused pieces": handmade([*letters("ab"), ("ab", -1.0, 5)]),
    "several pieces of the score -1.0": handmade(
        [("ab", -1.0, 1), ("ba", -1.0, 1), *letters("ab")]
    ),
    "the piece 'ac' but no piece 'c'": handmade([("ac", -1.0, 1), *letters("ab")]),
    "a user-defined symbol with a space": handmade([*letters("ab"), ("a b", 0.0, 4)]),
    "user-defined symbols together with normalisation": handmade(
        [*UNCUT, SYMBOL], spec=field(3, 1)
    ),
    "the user-defined symbol 'x<im' next to '<img>'": handmade([*UNCUT, ("x<im", 0.0, 4)]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_reproduced_is_named(what):
    with pytest.raises(UserError, match=re.escape(what)):
        tokenizer_files(with_added(REFUSED[what]))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model_type": "unigram", "vocab_size": 320}, "model_type=unigram"),
        ({"normalization_rule_name": "nmt_nfkc"}, "a character map such as nmt_nfkc"),
    ],
)
def test_what_would_differ_in_rare_texts_is_refused(settings, named):
    with pytest.raises(UserError, match=re.escape(named)):
        tokenizer_files(with_added(train(**settings, byte_fallback=True)))


def test_ids_that_have_no_place():
    proto = handmade(letters("ab"))
    gap = {"tokenizer.model": proto, "added_tokens.json": b'{"<a>": 5, "<b>": 7}'}
    with pytest.raises(UserError, match=r"ids \[5, 7\].*without a gap"):
        tokenizer_files(Tokenizer(gap, "test"))
    twice = {"tokenizer.model": proto, "added_tokens.json": b'{"<a>": 5, "<b>": 5}'}
    with pytest.raises(UserError, match="share the id 5"):
        tokenizer_files(Tokenizer(twice, "test"))
    piece = {"tokenizer.model": proto, "added_tokens.json": b'{"a": 5}'}
    with pytest.raises(UserError, match="'a' is the added token 5 and also piece 3"):
        tokenizer_files(Tokenizer(piece, "test"))


# --- Through transformers ----------------------------------------------------------------------

KINDS = [*BPE, "alias", "handmade"]
DECODED = ("plain", "plain_bytes", "digits", "symbols_plain", "alias", "handmade")
DECODED_WITH_SPECIAL = ("prefix", "prefix_strip")


@pytest.mark.parametrize("name", KINDS)
def test_transformers_encodes_the_same(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    texts = random_texts(1000, seed=1)
    if name == "alias":
        tokenizer = alias_tokenizer()
        texts = [text for text in texts if "[X_1]" not in text]
    elif name == "handmade":
        tokenizer = with_added(handmade([*UNCUT, SYMBOL]))
    else:
        tokenizer = bpe_tokenizer(name)
    for file, content in tokenizer_files(tokenizer).items():
        (tmp_path / file).write_bytes(content)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert fast.is_fast and len(fast) == tokenizer.vocab_size
    assert (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id) == (1, 2, 2)
    for text, ids in zip(texts, fast(texts)["input_ids"], strict=True):
        assert ids == tokenizer.encode(text, bos=True), repr(text)
        for skip in (True, False):
            if name in DECODED or (name in DECODED_WITH_SPECIAL and not skip):
                expected = tokenizer.decode(ids, skip_special=skip)
                assert fast.decode(ids, skip_special_tokens=skip) == expected


# --- Chat template -----------------------------------------------------------------------------


def prompt_of(
    turns: list[Turn], template: Template, system: str | None = None, *, generate: bool = True
) -> str:
    """The string that `data.chat` encodes piece by piece."""
    if turns and turns[0].role == "system":
        system, turns = turns[0].text, turns[1:]
    system = template.system_message if system is None else system
    text = template.system_prefix + system + template.separator if system else ""
    for turn in turns:
        prefix = template.user_prefix if turn.role == "user" else template.assistant_prefix
        text += prefix + turn.text + template.separator
    return text + template.assistant_prefix * generate


def render(text: str, messages: list[dict[str, Any]], **values: Any) -> str:
    jinja2 = pytest.importorskip("jinja2")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    # As transformers sets it up.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(text).render(messages=messages, **values)


def test_chat_template_names_are_filled_in():
    template = Template("t", "<sys>", "<1>", "<2>", "<3>", "<4>\n")
    for bos in (False, True):
        text = chat_template(template, bos=bos)
        assert not re.search("[A-Z]", text)
        assert text.startswith("{{- bos_token -}}") == bos
        for literal in ('"<sys>"', '"<1>"', '"<2>"', '"<3>"', '"<4>\\n"', '"<image>"'):
            assert literal in text
    assert "<sys>" not in chat_template(template, "own")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "", 'own {{ "SYSTEM" }}\n\\ 你'])
def test_chat_template_renders_the_prompt(name, system):
    template = TEMPLATES[name]
    text = chat_template(template, system)
    user, answer = Turn("user", " q\n{{ USER_PREFIX }}"), Turn("assistant", "a ")
    for turns in (
        [user],
        [user, answer, user],
        [Turn("system", "S"), user],
        [Turn("system", ""), user],
    ):
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        for generate in (True, False):
            expected = prompt_of(turns, template, system, generate=generate)
            for form in (messages, parts):
                assert render(text, form, add_generation_prompt=generate) == expected


def test_chat_template_places_images():
    template = TEMPLATES["internlm2-chat"]
    text = chat_template(template)
    image = {"type": "image"}

    def words(text: str) -> dict[str, str]:
        return {"type": "text", "text": text}

    for content, images in (
        ([image, words("q")], 1),
        ([image, image, words("q")], 2),
        ([image, words("<image> q")], 1),
        ([image, image, words("<image> q")], 2),
    ):
        question = first_question(content[-1]["text"], ["x"] * images)
        got = render(text, [{"role": "user", "content": content}], add_generation_prompt=True)
        assert got == prompt_of(list(question.turns), template)
    got = render(text, [{"role": "user", "content": [words("a"), image, words("b"), image]}])
    assert got == prompt_of([Turn("user", "a<image>\nb<image>\n")], template, generate=False)


def test_chat_template_errors_and_bos():
    template = TEMPLATES["chatml-plain"]
    user = {"role": "user", "content": "q"}
    with pytest.raises(Exception, match="parts are text or image, not video"):
        render(chat_template(template), [{"role": "user", "content": [{"type": "video"}]}])
    with pytest.raises(Exception, match="no turn of the role system here"):
        render(chat_template(template), [user, {"role": "system", "content": "s"}])
    got = render(chat_template(template, bos=True), [user], bos_token="<s>")
    assert got == "<s>" + prompt_of([Turn("user", "q")], template, generate=False)
