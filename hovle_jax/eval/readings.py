"""(what an answer says, its score) for every metric and dialect: the rows of `tasks.TASKS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hovle_jax.errors import UserError
from hovle_jax.eval import mmmu, options, yes_no
from hovle_jax.eval import short_answers as short
from hovle_jax.eval.examples import LETTERS, Example

Reading = Callable[[Example, str], tuple[str, float]]


def _yes_no(read: Callable[[str], str]) -> Reading:
    def reading(example: Example, answer: str) -> tuple[str, float]:
        said = read(answer)
        return said, float(said == _truth(example))

    return reading


def _truth(example: Example) -> str:
    truth = example.field("answer").strip().rstrip(".").lower()
    truth = {"1": "yes", "0": "no"}.get(truth, truth)
    if truth not in ("yes", "no"):
        raise UserError(f"{example.where}: the answer is {truth!r}, neither yes nor no")
    return truth


def _letter(read: Callable[[str, options.Options], str]) -> Reading:
    def reading(example: Example, answer: str) -> tuple[str, float]:
        letter = read(answer, example.options)
        return letter, float(letter == example.field("answer"))

    return reading


def _lmms_eval_mmbench(answer: str, known: options.Options) -> str:
    return options.lmms_eval_mmbench(answer, {c: known.get(c, "nan") for c in "ABCD"})


def _text(read: Callable[[str], str], ignore_case: bool = True) -> Reading:
    """Equal after `read`, which the accepted text goes through as well."""

    def reading(example: Example, answer: str) -> tuple[str, float]:
        said, truth = read(answer), read(example.field("answer"))
        equal = said.lower() == truth.lower() if ignore_case else said == truth
        return said, float(equal)

    return reading


def _gqa_internvl(example: Example, answer: str) -> tuple[str, float]:
    said = answer.rstrip(".").lower()
    return said, float(said == example.field("answer"))


def _seed_internvl(example: Example, answer: str) -> tuple[str, float]:
    return answer[:1], float(answer[:1] == example.field("answer"))


def _ai2d_lmms_eval(example: Example, answer: str) -> tuple[str, float]:
    letter = options.lmms_eval_ai2d(answer)
    said, truth = short.without_punctuation(letter), example.field("answer")
    return letter, float(said == short.without_punctuation(truth))


def _vqa(normalise: Callable[[str], str]) -> Reading:
    def reading(example: Example, answer: str) -> tuple[str, float]:
        accepted = example.answers
        if len(accepted) != 10:  # with one, the formula gives nothing to anybody
            raise UserError(
                f"{example.where}: {len(accepted)} accepted answers; VQA accuracy is over those of "
                "ten annotators: add them with --answers"
            )
        return normalise(answer), short.vqa_accuracy(answer, accepted, normalise)

    return reading


def _anls(example: Example, answer: str) -> tuple[str, float]:
    return answer, short.anls(answer, example.answers)


def _relaxed(example: Example, answer: str) -> tuple[str, float]:
    said = answer.strip()
    return said, float(any(short.within_5_percent(said, other) for other in example.answers))


def _relaxed_internvl(example: Example, answer: str) -> tuple[str, float]:
    """Theirs calls the metric with the two the other way round: 5% of the *answer*."""
    said, accepted = answer.strip(), example.answers_as_written
    return said, float(any(short.within_5_percent(other, said) for other in accepted))


def _relaxed_lmms_eval(example: Example, answer: str) -> tuple[str, float]:
    accepted = example.answers_as_written
    return answer, float(any(short.within_5_percent(answer, other) for other in accepted))


FORMULAS = "Handwritten Mathematical Expression Recognition"


def _ocrbench(fold: bool) -> Reading:
    def reading(example: Example, answer: str) -> tuple[str, float]:
        formula = FORMULAS in (example.fields.get("category"), example.fields.get("question_type"))
        return answer, float(short.contains(answer, example.answers, formula, fold))

    return reading


def _mmmu_vlmevalkit(example: Example, answer: str) -> tuple[str, float]:
    """An open question becomes one of two options, its answer and 'Other Answers'."""
    known, truth = example.options, example.field("answer")
    if "A" not in known:
        known = {**known, "A": truth, "B": "Other Answers"}
    letter = options.vlmevalkit(answer, known) or "Z"  # theirs for none, so the answer 'Z' is given
    return letter, float(letter == (truth if truth and truth in LETTERS else "A"))


def _mmmu_internvl(example: Example, answer: str) -> tuple[str, float]:
    if not example.options:
        return answer, float(mmmu.open_match(answer, example.answers))
    letter = options.internvl(answer, {k: v.strip() for k, v in example.options.items()})
    return letter, float(letter in example.answers)


def _mmmu_lmms_eval(example: Example, answer: str) -> tuple[str, float]:
    """Where theirs draws a letter the score is the chance that it is right.

    Theirs compares open answers one character at a time, which no accepted text is: all are wrong.
    """
    if not example.options:
        return answer, 0.0
    letter = options.mmmu(answer, example.options)
    if not letter:
        return "?", 1 / len(example.options)
    return letter, float(letter in example.answers)


VLMEVALKIT_LETTER = _letter(options.vlmevalkit)
_VLMEVALKIT_YES_NO = _yes_no(yes_no.vlmevalkit)

MME = {
    "vlmevalkit": _VLMEVALKIT_YES_NO,
    "lmms-eval": _yes_no(yes_no.mme_lmms_eval),
    "internvl": _yes_no(yes_no.mme_internvl),
}
POPE = {
    "vlmevalkit": _VLMEVALKIT_YES_NO,
    "lmms-eval": _yes_no(yes_no.exactly),
    "internvl": _yes_no(yes_no.pope_internvl),
}
HALLUSION = {"vlmevalkit": _VLMEVALKIT_YES_NO, "lmms-eval": _yes_no(yes_no.mentions_yes)}
MMBENCH = {
    "vlmevalkit": VLMEVALKIT_LETTER,
    "lmms-eval": _letter(_lmms_eval_mmbench),
    "internvl": _letter(options.internvl),
}
MMMU = {
    "vlmevalkit": _mmmu_vlmevalkit,
    "lmms-eval": _mmmu_lmms_eval,
    "internvl": _mmmu_internvl,
}
SEED = {
    "vlmevalkit": VLMEVALKIT_LETTER,
    "lmms-eval": _text(options.initial),
    "internvl": _seed_internvl,
}
AI2D = {
    "vlmevalkit": VLMEVALKIT_LETTER,
    "lmms-eval": _ai2d_lmms_eval,
    "internvl": _text(str.strip),
}
SCIENCEQA = {
    "vlmevalkit": VLMEVALKIT_LETTER,
    "lmms-eval": _letter(lambda answer, _: options.lmms_eval_scienceqa(answer)),
    "internvl": _letter(options.internvl_scienceqa),
}
GQA: Mapping[str, Reading] = {
    "vlmevalkit": _text(str.strip),
    "lmms-eval": _text(short.without_punctuation),
    "internvl": _gqa_internvl,
}
TEXTVQA = {
    "vlmevalkit": _vqa(short.vlmevalkit),
    "lmms-eval": _vqa(short.evalai),
    "internvl": _vqa(short.evalai),
}
ANLS = {"vlmevalkit": _anls, "lmms-eval": _anls, "internvl": _anls}
CHARTQA = {
    "vlmevalkit": _relaxed,
    "lmms-eval": _relaxed_lmms_eval,
    "internvl": _relaxed_internvl,
}
OCRBENCH = {"vlmevalkit": _ocrbench(fold=False), "lmms-eval": _ocrbench(fold=True)}
