"""Scores of short answers against lists of accepted ones, with each code base's normalisation."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

# Words with an apostrophe; the tables of VQA know each without any one of its apostrophes.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTED.split()
    for i, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}
_NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(n) for n, word in enumerate(_NUMBERS)} | {"zero": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# EvalAI's typo: meant to spare a dot after a digit ('(?<!'), it spares none of them.
EVALAI_PERIOD = re.compile(r"\.(?!\d)")
VLMEVALKIT_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIODS = 32  # at most so many: the originals pass the flag re.UNICODE where a count belongs


def strip_punctuation(text: str, period: re.Pattern[str]) -> str:
    """Each mark vanishes if it touches a space anywhere (or any comma stands between digits), and
    becomes a space otherwise."""
    out, numeric = text, _DIGIT_COMMA.search(text) is not None
    for mark in PUNCTUATION:
        gone = numeric or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if gone else " ")
    return period.sub("", out, count=_PERIODS)


def _words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def evalai(text: str) -> str:
    """EvalAI's processor, which TextVQA's script, InternVL and lmms-eval use."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _words(strip_punctuation(text, EVALAI_PERIOD))


def vlmevalkit(text: str) -> str:
    """VLMEvalKit's: marks are looked at before the words are in lower case."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _words(strip_punctuation(text, VLMEVALKIT_PERIOD))


def vqa_accuracy(answer: str, accepted: Sequence[str], normalise: Callable[[str], str]) -> float:
    """min(1, annotators who agree / 3), averaged over leaving each annotator out: with ten of them
    0.3, 0.6, 0.9 and 1 for one, two, three and more."""
    answer, total = normalise(answer), len(accepted)
    agree = sum(normalise(other) == answer for other in accepted)
    left_out, kept = min(1.0, max(agree - 1, 0) / 3), min(1.0, agree / 3)
    return (agree * left_out + (total - agree) * kept) / total


def anls(answer: str, accepted: Sequence[str]) -> float:
    """1 - edit distance / length, the best of all; below 0.5 it is 0.

    Case and runs of space do not count for the distance, but the lengths are those of the raw
    texts, as in every implementation in use.
    """
    return max(_similarity(answer, other) for other in accepted) if accepted else 0.0


def _similarity(answer: str, other: str) -> float:
    # Upper case is longer for some letters, and the originals measure that.
    length = max(len(answer.upper()), len(other.upper()))
    a, b = (" ".join(text.lower().split()) for text in (answer.strip(), other.strip()))
    value = 1 - edit_distance(a, b) / length if length else 1.0
    return value if value >= 0.5 else 0.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein: insertions, deletions and substitutions of one character."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
        previous = row
    return previous[-1]


def within_5_percent(answer: str, target: str) -> bool:
    """ChartQA's relaxed match: of numbers ('10%' is 0.1) 5% of the target, else equal text.

    A target of zero counts as text.
    """
    a, b = _number(answer), _number(target)
    if a is not None and b:
        return abs(a - b) / abs(b) <= 0.05
    return answer.lower() == target.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def without_punctuation(text: str) -> str:
    """lmms-eval's `ignore_case` and `ignore_punctuation`; spaces count."""
    return text.lower().translate(str.maketrans("", "", string.punctuation))


def contains(answer: str, accepted: Sequence[str], formula: bool, fold: bool) -> bool:
    """OCRBench: an accepted text is in the answer. Formulas keep case and lose spaces; `fold` makes
    full-width characters narrow ones."""

    def plain(text: str) -> str:
        if formula:
            return text.strip().replace("\n", " ").replace(" ", "")
        text = text.translate(_NARROW) if fold else text
        return text.lower().strip().replace("\n", " ")

    return any(plain(other) in plain(answer) for other in accepted)


_NARROW = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)} | {0x3000: " "}
