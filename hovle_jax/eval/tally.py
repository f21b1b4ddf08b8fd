"""Scores of questions to the score of a benchmark, with bootstrap intervals.

A benchmark's score is a function of totals over independent units - an image with all its
questions, a question with all its rotations -, so that drawing units again is a matrix product.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from hovle_jax.errors import UserError
from hovle_jax.eval.examples import Example

Totals = Mapping[str, np.ndarray]  # sums over units by name; any shape, all the same
Values = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Scored:
    """One question with its answer, what was read out of it, and its score, 0 to 1."""

    example: Example
    answer: str
    read: str
    score: float


@dataclasses.dataclass(frozen=True)
class Tally:
    """units: totals of each; strata: of each, the part within which it is drawn again."""

    units: Sequence[Mapping[str, float]]
    strata: Sequence[str]
    values: Callable[[Totals], Values]

    def score(self) -> dict[str, float]:
        names, matrix = self._matrix()
        totals = dict(zip(names, matrix.sum(axis=0), strict=True))
        return {k: float(v) for k, v in self.values(totals).items()}

    def intervals(self, resamples: int, seed: int) -> dict[str, tuple[float, float]]:
        """The middle 95% of each value over samples of as many units, drawn with replacement."""
        names, matrix = self._matrix()
        rng = np.random.default_rng(seed)
        sums = np.zeros((resamples, len(names)))
        strata = np.array(self.strata)
        for stratum in sorted(set(self.strata)):
            own = matrix[strata == stratum]
            chances = np.full(len(own), 1 / len(own))
            for start in range(0, resamples, 64):  # draws of a whole benchmark take gigabytes
                some = sums[start : start + 64]
                some += rng.multinomial(len(own), chances, size=len(some)) @ own
        values = self.values({name: sums[:, i] for i, name in enumerate(names)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a rare category may never be drawn
            bounds = {k: np.nanpercentile(v, [2.5, 97.5]) for k, v in values.items()}
        return {k: (float(low), float(high)) for k, (low, high) in bounds.items()}

    def _matrix(self) -> tuple[list[str], np.ndarray]:
        names = sorted({name for unit in self.units for name in unit})
        column = {name: i for i, name in enumerate(names)}
        matrix = np.zeros((len(self.units), len(names)))
        for row, unit in enumerate(self.units):
            for name, value in unit.items():
                matrix[row, column[name]] = value
        return names, matrix


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, nan where nothing was drawn."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(a, float) / np.asarray(b, float)


def _sum(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.asarray(sum(arrays, np.zeros(())))


def _units(
    rows: Sequence[Scored], key: Callable[[Example], tuple[str, ...]]
) -> list[tuple[tuple[str, ...], list[Scored]]]:
    found: dict[tuple[str, ...], list[Scored]] = {}
    for row in rows:
        found.setdefault(key(row.example), []).append(row)
    return list(found.items())


def _picture(example: Example) -> tuple[str, ...]:
    """Questions about one image are not independent; those without any are."""
    return example.images or (example.id, example.where)


def mean(rows: Sequence[Scored]) -> Tally:
    """'Overall' and every category: the mean score in percent."""
    units = []
    for _, group in _units(rows, _picture):
        unit: dict[str, float] = collections.defaultdict(float)
        for row in group:
            for name in ("Overall", *_categories(row.example)):
                unit[f"n {name}"] += 1
                unit[f"sum {name}"] += row.score
        units.append(unit)
    return Tally(units, [""] * len(units), _means)


def _categories(example: Example) -> list[str]:
    """Names of the groups of a row, its split not among them."""
    found = (example.fields.get(key) for key in ("l2-category", "category"))
    return [str(name) for name in dict.fromkeys(found) if name is not None]


def _means(totals: Totals) -> Values:
    names = [key.removeprefix("n ") for key in totals if key.startswith("n ")]
    names.sort(key=lambda name: (name != "Overall", name))
    return {name: 100 * _ratio(totals[f"sum {name}"], totals[f"n {name}"]) for name in names}


def circular(rows: Sequence[Scored]) -> Tally:
    """MMBench: a question counts if the answers to all rotations of its options are right. Rows of
    one question share their index modulo a million."""
    units = []
    for key, group in _units(rows, rotated):
        first = next((row for row in group if str(_index(row.example)) == key[0]), None)
        if first is None:
            raise UserError(f"{group[0].example.where}: rotates row {key[0]}, which is not there")
        right = float(all(row.score == 1 for row in group))
        unit = {"n rotations": 1.0 * len(group), "sum rotations": sum(row.score for row in group)}
        for name in ("Overall", *_categories(first.example)):
            unit |= {f"n {name}": 1.0, f"sum {name}": right}
        units.append(unit)
    return Tally(units, [""] * len(units), _means)


def rotated(example: Example) -> tuple[str, ...]:
    """The question, whose options other rows have in another order."""
    return (str(_index(example) % 1_000_000),)


def _index(example: Example) -> int:
    try:
        return int(float(example.id))
    except (ValueError, OverflowError):
        raise UserError(f"{example.where}: index {example.id!r} is no integer") from None


PERCEPTION = (
    *("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position"),
    *("posters", "scene"),
)
COGNITION = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")


def mme(rows: Sequence[Scored]) -> Tally:
    """Per subtask the percentage of right answers plus that of images with both right; summed over
    ten subtasks (perception, 2000 at most), four (cognition, 800) and all."""
    units, strata = [], []
    for (task, *_), pair in _units(rows, lambda e: (e.field("category"), *_mme_image(e))):
        where = pair[0].example.where
        if task not in (*PERCEPTION, *COGNITION):
            raise UserError(f"{where}: {task!r} is no category of MME")
        if len(pair) != 2:
            raise UserError(f"{where}: {len(pair)} questions about its image in {task}, not two")
        right = sum(row.score for row in pair)
        units.append({f"n {task}": 2.0, f"sum {task}": right, f"both {task}": float(right == 2)})
        strata.append(task)
    return Tally(units, strata, _mme_values)


def _mme_image(example: Example) -> tuple[str, ...]:
    path = example.fields.get("image_path")
    return (str(path),) if path is not None else example.images


def _mme_values(totals: Totals) -> Values:
    tasks = {}
    for name in (*PERCEPTION, *COGNITION):
        if f"n {name}" in totals:
            n = totals[f"n {name}"]
            tasks[name] = 100 * _ratio(totals[f"sum {name}"], n)
            tasks[name] = tasks[name] + 100 * _ratio(totals[f"both {name}"], n / 2)
    perception = _sum(tasks[name] for name in PERCEPTION if name in tasks)
    cognition = _sum(tasks[name] for name in COGNITION if name in tasks)
    head = {"sum": perception + cognition, "perception": perception, "cognition": cognition}
    return head | tasks


def hallusion(rows: Sequence[Scored], by_category: bool) -> Tally:
    """aAcc, fAcc (figures with all questions right), qAcc (questions right about all figures) and
    their mean. An index is 'VD_chart_0_SET_FIGURE_QUESTION'; VLMEvalKit does not tell sets of one
    l2-category and different categories apart, others do."""

    def key(example: Example, part: int) -> tuple[str, ...]:
        category = (str(example.fields.get("category", "")),) if by_category else ()
        own = (_numbers(example)[part],) if part > 3 else ()
        return (*category, *figures(example), *own)

    units = []
    for _, group in _units(rows, functools.partial(key, part=3)):
        unit = {"n aAcc": 1.0 * len(group), "sum aAcc": sum(row.score for row in group)}
        for name, part in (("fAcc", 4), ("qAcc", 5)):
            parts = [own for _, own in _units(group, functools.partial(key, part=part))]
            unit[f"n {name}"] = 1.0 * len(parts)
            unit[f"sum {name}"] = 1.0 * sum(all(row.score == 1 for row in own) for own in parts)
        units.append(unit)

    def values(totals: Totals) -> Values:
        found = {k: 100 * _ratio(totals[f"sum {k}"], totals[f"n {k}"]) for k in _HALLUSION}
        return {"mean": _sum(found.values()) / 3, **found}

    return Tally(units, [""] * len(units), values)


def figures(example: Example) -> tuple[str, ...]:
    """The set of figures with all questions about them."""
    return str(example.fields.get("l2-category", "")), _numbers(example)[3]


def _numbers(example: Example) -> list[str]:
    parts = example.id.split("_")
    if len(parts) < 6:
        raise UserError(f"{example.where}: index {example.id!r} is not HallusionBench's")
    return parts


_HALLUSION = ("aAcc", "fAcc", "qAcc")


def pope(rows: Sequence[Scored], mean_of_parts: bool, strict: bool) -> Tally:
    """F1 of 'yes': over all rows, or the mean over random, popular and adversarial.

    A row may be in several of them ('popular,random') and counts in each. `strict`: only 'no' is a
    missed yes, not every other answer (lmms-eval).
    """
    units, names = [], set()
    for _, group in _units(rows, _picture):
        unit: dict[str, float] = collections.defaultdict(float)
        for row in group:
            example = row.example
            truth = example.field("answer").strip().lower() == "yes"
            said = row.read == "yes"
            missed = truth and (row.read == "no" if strict else not said)
            kinds = str(example.fields.get("category", example.fields.get("file", ""))).split(",")
            for kind in kinds:
                names.add(kind)
                unit[f"n {kind}"] += 1
                unit[f"right {kind}"] += row.score
                unit[f"tp {kind}"] += said and truth
                unit[f"fp {kind}"] += said and not truth
                unit[f"fn {kind}"] += missed
        units.append(unit)

    def part(totals: Totals, kinds: Sequence[str]) -> Values:
        t = {k: _sum(totals[f"{k} {x}"] for x in kinds) for k in ("n", "right", "tp", "fp", "fn")}
        precision = np.nan_to_num(_ratio(t["tp"], t["tp"] + t["fp"]))
        recall = np.nan_to_num(_ratio(t["tp"], t["tp"] + t["fn"]))
        f1 = np.nan_to_num(_ratio(2 * precision * recall, precision + recall))
        found = {"precision": precision, "recall": recall, "accuracy": _ratio(t["right"], t["n"])}
        return {"F1": 100 * f1} | {name: 100 * value for name, value in found.items()}

    def values(totals: Totals) -> Values:
        kinds = sorted(names)
        each = {kind: part(totals, [kind])["F1"] for kind in kinds}
        out = part(totals, kinds)
        if mean_of_parts:
            out["F1"] = _sum(each.values()) / len(each)
        return out | {f"F1 {kind}": value for kind, value in each.items()}

    return Tally(units, [""] * len(units), values)


def by_split(rows: Sequence[Scored]) -> Tally:
    """ChartQA: the mean over splits (human and augmented) of the mean score, and each of them."""
    units, strata = [], []
    for (split, *_), group in _units(rows, lambda e: (_split(e), *_picture(e))):
        units.append({f"n {split}": 1.0 * len(group), f"sum {split}": sum(r.score for r in group)})
        strata.append(split)

    def values(totals: Totals) -> Values:
        each = _means(totals)
        n, right = (_sum(v for k, v in totals.items() if k.startswith(x)) for x in ("n ", "sum "))
        average = _sum(each.values()) / len(each)
        return {"mean of splits": average, "Overall": 100 * _ratio(right, n), **each}

    return Tally(units, strata, values)


def _split(example: Example) -> str:
    found = (example.fields.get(key) for key in ("split", "type", "file"))
    return str(next((name for name in found if name is not None), ""))


def count(rows: Sequence[Scored]) -> Tally:
    """OCRBench: how many answers are right (of 1,000 in the whole file), and of each category."""
    means = mean(rows)

    def values(totals: Totals) -> Values:
        return {k.removeprefix("sum "): v for k, v in totals.items() if k.startswith("sum ")}

    return dataclasses.replace(means, values=values)
