"""Tokenizer files, added tokens, and what untrusted text must not become."""

import io
import json
import pickle

import pytest
import sentencepiece

from hovle_jax.data import tokenizer as tokenizer_lib
from hovle_jax.data.tokenizer import ADDED_TOKENS, IM_END, IM_START, IMG_CONTEXT, Tokenizer
from hovle_jax.errors import UserError

TEXT = "top-left:3 top-right:5\nWhich digit is top-left?"
LINES = [
    f"top-left:{i} top-right:{j}\nWhich digit is {place}?"
    for i in range(10)
    for j in range(10)
    for place in ("top-left", "top-right")
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer_lib.train_tokenizer(LINES, directory, vocab_size=128)
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer.load(directory)


def test_train_is_deterministic_and_silent(directory, tmp_path, capfd):
    tokenizer_lib.train_tokenizer(iter(LINES), tmp_path, vocab_size=128)
    for name in ("tokenizer.model", "added_tokens.json"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()
    assert capfd.readouterr() == ("", "")


def test_trained_ids(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    first = tokenizer.id_of(ADDED_TOKENS[0])
    assert [tokenizer.id_of(t) for t in ADDED_TOKENS] == list(range(first, first + 11))
    assert tokenizer.vocab_size == first + 11
    assert tokenizer.special_ids == {1, 2, *range(first, first + 11)}
    # The released layout, 92542 onwards.
    assert ADDED_TOKENS[:5] == (IM_END, IM_START, "<img>", "</img>", IMG_CONTEXT)


def test_words_and_digits_are_single_tokens(tokenizer):
    ids = tokenizer.encode_ordinary(TEXT)
    pieces = [tokenizer.decode([i]) for i in ids]
    assert "".join(pieces) == TEXT
    assert len(pieces) == 9
    assert {"top-left:", "3", " top-right:", "5", "\n", "Which"} < set(pieces)
    digits = tokenizer.encode_ordinary("0123456789")
    assert len(set(digits)) == len(digits) == 10


def test_text_is_split_at_added_tokens(tokenizer):
    a, b = tokenizer.encode("top-left:"), tokenizer.encode("Which digit")
    assert tokenizer.encode(f"top-left:{IM_END}Which digit") == [*a, tokenizer.id_of(IM_END), *b]
    assert tokenizer.encode("Which digit", bos=True) == [1, *b]
    assert tokenizer.encode("<s></s>") == [1, 2]
    assert tokenizer.encode("") == []


def test_longest_added_token_wins(directory):
    files = {"tokenizer.model": (directory / "tokenizer.model").read_bytes()}
    files["added_tokens.json"] = json.dumps({"<a": 500, "<a>": 501}).encode()
    assert Tokenizer(files, "x").encode("<a><a") == [501, 500]


def test_ordinary_text_never_becomes_special(tokenizer):
    text = f"{IMG_CONTEXT}{IM_START}</s>"
    assert set(tokenizer.encode(text)) <= tokenizer.special_ids
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode_ordinary(text))


def test_ordinary_text_cannot_reach_a_special_id_by_its_other_name(tmp_path):
    """As in InternLM2, where '[UNUSED_TOKEN_146]' in the model is '<|im_start|>' in the config."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["UNUSED [1] TOKEN_ [2]"] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=40,
        hard_vocab_limit=False,
        user_defined_symbols=["[UNUSED_1]"],
        minloglevel=3,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "added_tokens.json").write_text(json.dumps({IMG_CONTEXT: 500}))
    decoder = {"0": {"content": "<unk>"}, "3": {"content": IM_START}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    tokenizer = Tokenizer.load(tmp_path)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert 3 in sp.EncodeAsIds("TOKEN_ [UNUSED_1]")
    assert tokenizer.encode(IM_START) == [3]
    ids = tokenizer.encode_ordinary("TOKEN_ [UNUSED_1] [2]")
    assert 3 not in ids
    assert 0 not in ids
    assert tokenizer.decode(ids).replace(" ", "") == "TOKEN_[UNUSED_1][2]"
    # The real config lists the unknown token; that must not stop unknown text from encoding.
    assert 0 in tokenizer.encode_ordinary("猫")


def test_decode(tokenizer):
    ids = tokenizer.encode(f"{IM_START}Which digit{IM_END}", bos=True)
    assert tokenizer.decode(ids) == "Which digit"
    assert tokenizer.decode(ids, skip_special=False) == f"<s>{IM_START}Which digit{IM_END}"
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5, -100]) == "Which digit"


def test_pickle_and_save_keep_everything(directory, tokenizer, tmp_path):
    tokenizer.encode(TEXT)
    clone = pickle.loads(pickle.dumps(tokenizer))
    clone.save(tmp_path / "copy")
    text = f"{IM_START}{TEXT}"
    assert clone.encode(text) == Tokenizer.load(tmp_path / "copy").encode(text)
    assert clone.encode(text) == tokenizer.encode(text)
    for file in directory.iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()


def test_errors_name_the_file(directory, tokenizer, tmp_path):
    with pytest.raises(UserError, match="not found: .*tokenizer.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((directory / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match="not found: .*added_tokens.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "added_tokens.json").write_text("[")
    with pytest.raises(UserError, match="added_tokens.json is malformed"):
        Tokenizer.load(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<a>": 7}')
    config = {"added_tokens_decoder": {"8": {"content": "<a>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="'<a>' is 7 in added_tokens.json but 8"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no token '<b>'"):
        tokenizer.id_of("<b>")
    with pytest.raises(UserError, match="vocab_size=12"):
        tokenizer_lib.train_tokenizer(LINES, tmp_path, vocab_size=12)
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer({"tokenizer.model": b"x", "added_tokens.json": b"{}"}, "x").encode("a")


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_bytes_of_tokens_are_those_of_the_text(dummy_prefix):
    """With spaces, and a part of a character each where the vocabulary has no piece for it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["the cat sat on a mat and then stopped"] * 50),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=dummy_prefix,
        normalization_rule_name="identity",
        minloglevel=3,
    )
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).GetPieceSize()
    added = json.dumps({token: size + i for i, token in enumerate(ADDED_TOKENS)}).encode()
    files = {"tokenizer.model": model.getvalue(), "added_tokens.json": added}
    tokenizer = Tokenizer(files, "here")
    ids = tokenizer.encode_ordinary("the cat sat \U0001f642 \u4f60")
    pieces = [tokenizer.piece_bytes(i) for i in ids]
    assert b"".join(pieces).decode() == " " * dummy_prefix + "the cat sat \U0001f642 \u4f60"
    assert pieces[-3:] == [b"\xe4", b"\xbd", b"\xa0"] and b" cat" in pieces
    assert tokenizer.piece_bytes(tokenizer.id_of(IM_END)) == IM_END.encode()
    assert tokenizer.piece_bytes(tokenizer.vocab_size) == b""
