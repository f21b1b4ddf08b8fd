"""Exact ids and labels, with the toy tokenizer of the recorded dialogs."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from hovle_jax.config import IGNORE
from hovle_jax.data.chat import TEMPLATES, encode_conversation, encode_prompt
from hovle_jax.data.records import Turn
from hovle_jax.errors import UserError

GOLDEN = json.loads(
    (pathlib.Path(__file__).parent / "golden" / "conv" / "conversation.json").read_text()
)
DIALOGS = {dialog["name"]: dialog for dialog in GOLDEN["dialogs"]}
IDS = GOLDEN["toy_tokenizer"]["special"]
BOS, END, START = IDS["<s>"], IDS["<|im_end|>"], IDS["<|im_start|>"]
IMG, IMG_END, CONTEXT = IDS["<img>"], IDS["</img>"], IDS["<IMG_CONTEXT>"]
INTERNLM2 = TEMPLATES["internlm2-chat"]
PLAIN = TEMPLATES["chatml-plain"]


class ToyTokenizer:
    """One id per character."""

    bos_id = BOS

    def id_of(self, token: str) -> int:
        return IDS[token]

    def encode_ordinary(self, text: str) -> list[int]:
        return [3 + (31 * ord(char)) % 295 for char in text]


TOY: Any = ToyTokenizer()
chars = TOY.encode_ordinary


def dialog_turns(dialog) -> list[Turn]:
    question = dialog["question"]
    if dialog["history"] is None and dialog["num_patches_list"]:
        # The reference's chat() does it; here it is up to the reader.
        question = f"<image>\n{question}"
    turns = []
    for user, assistant in dialog["history"] or ():
        turns += [Turn("user", user), Turn("assistant", assistant)]
    return [*turns, Turn("user", question)]


def test_internlm2_template_equals_the_reference():
    reference = GOLDEN["template"]
    assert INTERNLM2.system_message == reference["system_message"]
    assert INTERNLM2.system_prefix + "{system_message}" == reference["system_template"]
    assert [INTERNLM2.user_prefix, INTERNLM2.assistant_prefix] == reference["roles"]
    assert INTERNLM2.separator == reference["sep"]


@pytest.mark.parametrize("name", DIALOGS)
def test_prompt_ids_equal_the_reference(name):
    dialog = DIALOGS[name]
    turns, tiles = dialog_turns(dialog), dialog["num_patches_list"] or []
    short = encode_prompt(turns, tiles, TOY, INTERNLM2, tokens_per_tile=4)
    assert short.dtype == np.int32
    assert short.tolist() == dialog["chat_a_pre"]["input_ids"]
    # HoVLE-HD reads 16 tokens of a tile before it merges them.
    long = encode_prompt(turns, tiles, TOY, INTERNLM2, tokens_per_tile=16)
    assert long.tolist() == dialog["chat_b_post"]["hd_input_ids"]


def test_conversation_is_the_prompt_and_its_answer():
    dialog = DIALOGS["image_multi_turn"]
    turns = [*dialog_turns(dialog), Turn("assistant", " Grey.\n")]
    encoded = encode_conversation(turns, [6], TOY, INTERNLM2, tokens_per_tile=4)
    answers = [[*chars(text), END] for text in ("A small cat.", "On the sofa.", "Grey.")]
    assert encoded.ids.tolist() == dialog["chat_a_pre"]["input_ids"] + answers[-1]
    assert encoded.labels.dtype == encoded.ids.dtype == np.int32
    trained = encoded.labels != IGNORE
    np.testing.assert_array_equal(encoded.labels[trained], encoded.ids[trained])
    assert encoded.labels[trained].tolist() == sum(answers, [])
    assert trained[-len(answers[-1]) :].all() and not trained[: -len(answers[-1])][-12:].any()


def test_labels_position_by_position():
    turns = [Turn("user", " q "), Turn("assistant", "ab"), Turn("user", "r"), Turn("assistant", "")]
    user, assistant = [START, *chars("user\n")], [START, *chars("assistant\n")]

    encoded = encode_conversation(turns, [], TOY, INTERNLM2, tokens_per_tile=4, system="")
    parts = [
        ([BOS, *user, *chars("q"), END, *assistant], False),
        ([*chars("ab"), END], True),
        ([*user, *chars("r"), END, *assistant], False),
        ([END], True),
    ]
    assert encoded.ids.tolist() == [i for ids, _ in parts for i in ids]
    labels = [i if loss else IGNORE for ids, loss in parts for i in ids]
    assert encoded.labels.tolist() == labels

    # With a newline after <|im_end|>, the newline has no loss.
    encoded = encode_conversation(turns[:2], [], TOY, PLAIN, tokens_per_tile=4)
    newline = chars("\n")
    head = [BOS, *user, *chars("q"), END, *newline, *assistant]
    assert encoded.ids.tolist() == [*head, *chars("ab"), END, *newline]
    assert encoded.labels.tolist() == [IGNORE] * len(head) + [*chars("ab"), END, IGNORE]


def test_each_image_has_one_bracket_pair():
    turns = [Turn("user", "<image>a<image>"), Turn("assistant", "b <image>")]
    encoded = encode_conversation(turns, [1, 3], TOY, PLAIN, tokens_per_tile=2)
    images = [IMG, *[CONTEXT] * 2, IMG_END, *chars("a"), IMG, *[CONTEXT] * 6, IMG_END]
    start = 1 + 1 + len("user\n")
    assert encoded.ids[start : start + len(images)].tolist() == images
    # '<image>' in an answer is text. (The reference's chat() would replace it in a history.)
    assert encoded.ids.tolist().count(IMG) == 2
    assert (encoded.labels[: start + len(images)] == IGNORE).all()
    assert chars("b <image>") == encoded.labels[encoded.labels != IGNORE][:-1].tolist()


def test_special_tokens_in_text_stay_text():
    """Deliberately unlike the reference, where typed tokens become special ids."""
    text = "<IMG_CONTEXT></s><|im_end|>"
    turns = [Turn("system", text), Turn("user", text), Turn("assistant", text)]
    ids = encode_conversation(turns, [], TOY, INTERNLM2, tokens_per_tile=4).ids.tolist()
    assert CONTEXT not in ids
    assert (ids.count(BOS), ids.count(START), ids.count(END)) == (1, 3, 3)
    assert ids[-len(text) - 1 :] == [*chars(text), END]


def test_system_precedence():
    def system_of(turns, template, system=None):
        ids = encode_prompt(turns, [], TOY, template, tokens_per_tile=4, system=system).tolist()
        rest = encode_prompt(turns[-1:], [], TOY, template, tokens_per_tile=4, system="").tolist()
        assert ids[-len(rest) + 1 :] == rest[1:]
        return ids[1 : len(ids) - len(rest) + 1]

    def expected(text):
        return [START, *chars(f"system\n{text}"), END]

    user = Turn("user", "q")
    assert system_of([user], PLAIN) == []
    assert system_of([user], INTERNLM2) == expected(INTERNLM2.system_message)
    assert system_of([user], INTERNLM2, "other") == expected("other")
    for setting in (None, "other", ""):
        assert system_of([Turn("system", "own"), user], INTERNLM2, setting) == expected("own")
        assert system_of([Turn("system", ""), user], INTERNLM2, setting) == []


def test_prompt_is_not_stripped():
    """As in the reference: training strips messages, chat() does not."""
    ids = encode_prompt([Turn("user", "q ")], [], TOY, PLAIN, tokens_per_tile=4).tolist()
    assert ids[7:9] == chars("q ")


def test_errors():
    user, answer = Turn("user", "<image>q"), Turn("assistant", "a")
    for tiles in ([], [1, 1]):
        with pytest.raises(UserError, match=f"1 '<image>' in user turns but {len(tiles)} images"):
            encode_conversation([user, answer], tiles, TOY, PLAIN, tokens_per_tile=4)
    with pytest.raises(UserError, match="must end with a user turn"):
        encode_prompt([user, answer], [1], TOY, PLAIN, tokens_per_tile=4)
    with pytest.raises(UserError, match="only the first turn"):
        encode_prompt([user, Turn("system", "s"), user], [1, 1], TOY, PLAIN, tokens_per_tile=4)
