"""Whether an answer says yes or no, as each code base reads it.

The functions give 'yes', 'no' or '' (neither).
"""

from __future__ import annotations

import re

from hovle_jax.eval.short_answers import VLMEVALKIT_PERIOD, strip_punctuation

_CHINESE = re.compile("[\u4e00-\u9fa5]")
# InternVL's replacements for MME, in this order: one for 'is not' comes before the one for 'is'.
_IN_ENGLISH = (("\n", ""), ("不是", "no"), ("是", "yes"), ("否", "no"))


def vlmevalkit(answer: str) -> str:
    """One of the words, and not the other, anywhere in the answer."""
    words = strip_punctuation(answer.lower(), VLMEVALKIT_PERIOD).split()
    yes, no = "yes" in words, "no" in words
    return "" if yes == no else "yes" if yes else "no"


def _begins(text: str) -> str:
    head = text[:4]
    return "yes" if "yes" in head else "no" if "no" in head else ""


def mme_internvl(answer: str) -> str:
    """Within the first four letters, Chinese and true/false translated: 'now' says no."""
    for old, new in _IN_ENGLISH:
        answer = answer.replace(old, new)
    answer = answer.lower().replace("true", "yes").replace("false", "no")
    return _begins(_CHINESE.sub("", answer))


def mme_lmms_eval(answer: str) -> str:
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "")
    return _begins(text)


def pope_internvl(answer: str) -> str:
    """No if the first sentence has 'No', 'no' or 'not'; everything else, silence too, says yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def exactly(answer: str) -> str:
    text = answer.lower().strip()
    return text if text in ("yes", "no") else ""


def mentions_yes(answer: str) -> str:
    return "yes" if "yes" in answer.lower() else "no"
