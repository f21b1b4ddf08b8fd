"""The letter that an answer to a multiple-choice question names, as each code base reads it.

`options` are the texts of the choices by letter. The functions give a letter or '' where the
original has none to give: it then asks a judge, guesses, or counts the answer as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Options = Mapping[str, str]

_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
# Answers that VLMEvalKit counts as refused: the letter is then 'Z', which is no option's.
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def vlmevalkit(answer: str, options: Options) -> str:
    """The only option letter among the words, if it is one of the last four ('Z' counts where no
    option's does); else what follows 'answer is', be it an article; else the only option whose
    text is in the answer."""
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1 and words.index(found[0]) > len(words) - 5:
        return found[0]
    if not found and "Z" in words:
        return "Z"
    match = _ANSWER_IS.search(answer)
    if match and match[1].upper() in options:
        return match[1].upper()
    return _only_text(answer, options, 2 * sum(map(len, options.values())))


def _only_text(answer: str, options: Options, longest: float = float("inf")) -> str:
    """The option whose text is in the answer, if just one is and the answer is not too long."""
    answer = answer.lower()
    found = [letter for letter, text in options.items() if text.lower() in answer]
    return found[0] if len(found) == 1 and len(answer) <= longest else ""


def internvl(answer: str, options: Options) -> str:
    """The first character, if it is an option's or all there is; else the first option whose text
    is in the answer; else the whole answer."""
    answer = answer.strip()
    if len(answer) == 1 or answer[:1] in options:
        return answer[:1]
    return next((k for k, text in options.items() if answer and text in answer), answer)


def internvl_scienceqa(answer: str, options: Options) -> str:
    """The same, and then 'F. ...' and '(B) ...' are read as what they begin with."""
    found = internvl(answer, options)
    if len(found) > 1 and found[1] == ".":
        found = found[0]
    if len(found) > 2 and found[0] == "(" and found[2] == ")":
        found = found[1]
    return found


def initial(answer: str) -> str:
    """SEED: the first character."""
    return answer.strip()[:1]


def lmms_eval_mmbench(answer: str, options: Options) -> str:
    """The prefetching rules of MMBench and then those of `mmbench_en_dev_static`.

    `options` are always A to D: where a choice is missing its text is 'nan', as in their data, and
    an answer with 'banana' in it names that choice.
    """
    answer = answer.strip()
    words = answer.split()
    letters = [letter for letter in "ABCDE" if letter in words]
    if len(letters) == 1 and not ("A" in words and len(words) > 3):  # that A may be an article
        return letters[0]
    for before, after in _DRESSED:
        found = [letter for letter in "ABCDE" if f"{before}{letter}{after}" in words]
        if len(found) == 1:
            return found[0]
    return _only_text(answer, options) or by_form(answer, sorted(options))


_DRESSED = (
    *(("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ").")),
    *((":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")),
)
# Each counts from where it first stands, so the shorter ones do not make the longer ones idle.
_PHRASES = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is"),
    *("the best answer is", "best answer is", "the correct option is", "correct option is"),
    *("the best option is", "best option is", "the choice is", "choice is"),
    *("the correct choice is", "correct choice is", "i choose", "i select", "i pick"),
    *("my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
_FORMS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
_AT_START, _AT_END, _AFTER_PHRASE = 10, 9, 7


def by_form(answer: str, letters: Iterable[str]) -> str:
    """The letter in the most telling form, and of several in that form the last one in the text.

    Telling, from the most: at the start, at the end, anywhere after a phrase as 'the answer is',
    then '(A)', 'A.', 'A:', 'A)', 'A '; if there is none of these, any such character.
    """
    letters, text = list(letters), answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    if not answer.strip():
        return ""
    found: list[tuple[int, int, str]] = []  # (how telling, where, letter); the first of equals wins
    for form, weight in _FORMS:
        shapes = ((letter, form.format(letter)) for letter in letters)
        found += [(weight, text.rfind(shape), x) for x, shape in shapes if shape in text]
    for phrase in _PHRASES:
        at = text.lower().find(phrase)
        if at >= 0:
            places = ((text.find(letter, at + len(phrase)), letter) for letter in letters)
            found += [(_AFTER_PHRASE, place, letter) for place, letter in places if place >= 0]
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((_AT_START, 0, letter))
    for letter in letters:
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((_AT_END, len(text), letter))
    found = found or [(0, text.rfind(x), x) for x in letters if x in text]
    return max(found, key=lambda entry: entry[:2])[2] if found else ""


_LEADING_LETTER = re.compile(r"\s*([A-Z])\.")


def lmms_eval_ai2d(answer: str) -> str:
    """The letter before a leading dot, else the answer itself."""
    match = _LEADING_LETTER.match(answer)
    return match[1] if match else answer


def lmms_eval_scienceqa(answer: str) -> str:
    """The answer if it is one letter, or the capital before a leading dot."""
    answer = answer.strip()
    if len(answer) >= 2 and answer[0].isupper() and answer[1] == ".":
        return answer[0].upper()
    return answer.upper() if len(answer) == 1 else ""


def mmmu(answer: str, options: Options) -> str:
    """lmms-eval's form of MMMU's parser; '' where it draws a letter at random.

    The last of all '(A)'; else of letters before a space, so the last of a word counts too; else of
    letters before a dot; else, in answers of more than five words, of the options' texts. Several
    letters are compared by where they stand between spaces, which they need not do.
    """
    text = answer
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in options if form.format(letter) in text]
        if found:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    if len(text.split()) > 5:
        lower = text.lower()
        found = [letter for letter, option in options.items() if option.lower() in lower]
        if found:
            return max(found, key=lambda letter: lower.rfind(options[letter].lower()))
    return ""
