"""The benchmarks: one row each says how to ask, how to score, and what others scored."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from hovle_jax.errors import UserError
from hovle_jax.eval import prompts, readings, tally
from hovle_jax.eval.examples import Example

DIALECTS = ("vlmevalkit", "lmms-eval", "internvl")
# The paper's own tables were not at hand: its numbers as later papers of the field print them.
MMMAMBA = "mmMamba, arXiv 2502.13145"
NEO = "NEO, arXiv 2510.14979"


@dataclasses.dataclass(frozen=True)
class Published:
    model: str  # HoVLE or HoVLE-HD
    value: float
    source: str
    metric: str = ""  # where it is not the task's own


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
      title: Its name with its split.
      metric: The one that papers report: a key of the tally's values.
      prompt: The text of a question.
      max_tiles: Of an image, before the thumbnail. A score with other tiles is another score.
      new_tokens: Of an answer, by dialect.
      readings: What an answer scores, by dialect; none: a judge is needed, and only the answers are
        written.
      tally: Scores of questions to that of the benchmark, by dialect.
      keep: Which rows of the file count.
      upscale: The first image of a question is enlarged by this factor, by dialect.
      unit: What rows share that only count together; None: the score is one of the whole file.
    """

    title: str
    metric: str
    prompt: prompts.Prompt
    max_tiles: int
    new_tokens: Mapping[str, int]
    readings: Mapping[str, readings.Reading]
    tally: Callable[[Sequence[tally.Scored], str], tally.Tally]
    published: tuple[Published, ...] = ()
    keep: Callable[[Example], bool] = lambda example: True
    upscale: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unit: Callable[[Example], object] | None = lambda example: (example.where, example.id)

    def first(self, examples: Sequence[Example], most: int) -> list[Example]:
        """All rows of the first `most` questions, in the order of the file.

        Raises:
          UserError: there are more, and a part of them would have another kind of score.
        """
        if self.unit is None:
            if len(examples) > most:
                raise UserError(
                    f"{self.title} is scored as a whole, not on {most} of {len(examples)} "
                    "questions; raise config.eval_questions, or name a file of fewer"
                )
            return list(examples)
        units = set(list(dict.fromkeys(map(self.unit, examples)))[:most])
        return [example for example in examples if self.unit(example) in units]

    @property
    def dialects(self) -> tuple[str, ...]:
        return tuple(d for d in DIALECTS if d in self.readings) or ("vlmevalkit",)


def _tokens(internvl: int, lmms_eval: int) -> dict[str, int]:
    # VLMEvalKit's limit for these models was 1024 and is 4096 now; short answers reach neither.
    return {"vlmevalkit": 1024, "lmms-eval": lmms_eval, "internvl": internvl}


def _any(
    make: Callable[[Sequence[tally.Scored]], tally.Tally],
) -> Callable[[Sequence[tally.Scored], str], tally.Tally]:
    return lambda rows, dialect: make(rows)


def _hallusion(rows: Sequence[tally.Scored], dialect: str) -> tally.Tally:
    return tally.hallusion(rows, by_category=dialect == "lmms-eval")


def _pope(rows: Sequence[tally.Scored], dialect: str) -> tally.Tally:
    internvl, strict = dialect == "internvl", dialect == "lmms-eval"
    return tally.pope(rows, mean_of_parts=internvl, strict=strict)


_choice = functools.partial(Task, metric="Overall", max_tiles=6, tally=_any(tally.mean))
_circular = functools.partial(
    Task,
    metric="Overall",
    max_tiles=6,
    readings=readings.MMBENCH,
    tally=_any(tally.circular),
    unit=tally.rotated,
)
_anls = functools.partial(
    Task,
    metric="Overall",
    prompt=prompts.short,
    new_tokens=_tokens(100, 32),
    readings=readings.ANLS,
    tally=_any(tally.mean),
)
_judged = functools.partial(
    Task,
    metric="",
    prompt=prompts.as_is,
    max_tiles=6,
    new_tokens=_tokens(0, 0),
    readings={},
    tally=_any(tally.mean),
)

TASKS: dict[str, Task] = {
    "mme": Task(
        title="MME",
        metric="sum",
        prompt=prompts.mme,
        max_tiles=6,
        new_tokens=_tokens(20, 16),
        readings=readings.MME,
        tally=_any(tally.mme),
        unit=None,
        published=(Published("HoVLE", 1433.5, MMMAMBA, metric="perception"),),
    ),
    "mmbench_en": _circular(
        title="MMBench-EN",
        prompt=prompts.mmbench,
        new_tokens=_tokens(100, 1024),
        published=(Published("HoVLE", 71.9, MMMAMBA), Published("HoVLE-HD", 73.3, NEO)),
    ),
    "mmbench_cn": _circular(
        title="MMBench-CN", prompt=prompts.mmbench_cn, new_tokens=_tokens(100, 256)
    ),
    "ccbench": _circular(title="CCBench", prompt=prompts.mmbench_cn, new_tokens=_tokens(100, 256)),
    "mmmu": _choice(
        title="MMMU val",
        prompt=prompts.mmmu,
        max_tiles=12,
        new_tokens=_tokens(10, 128),
        readings=readings.MMMU,
        keep=lambda example: example.fields.get("split", "validation") == "validation",
        upscale={"vlmevalkit": 2, "internvl": 2},
        published=(Published("HoVLE", 33.7, MMMAMBA), Published("HoVLE-HD", 32.2, NEO)),
    ),
    "seed_image": _choice(
        title="SEED-Image",
        prompt=prompts.seed,
        new_tokens=_tokens(10, 16),
        readings=readings.SEED,
        keep=lambda example: str(example.fields.get("question_type_id", 1)) in set("123456789"),
        published=(Published("HoVLE", 70.7, MMMAMBA), Published("HoVLE-HD", 70.9, NEO)),
    ),
    "pope": Task(
        title="POPE",
        metric="F1",
        prompt=prompts.pope,
        max_tiles=6,
        new_tokens=_tokens(100, 128),
        readings=readings.POPE,
        tally=_pope,
        published=(Published("HoVLE", 87.6, MMMAMBA), Published("HoVLE-HD", 87.4, NEO)),
    ),
    "hallusionbench": Task(
        title="HallusionBench",
        metric="mean",
        prompt=prompts.hallusion,
        max_tiles=6,
        new_tokens=_tokens(0, 128),
        readings=readings.HALLUSION,
        tally=_hallusion,
        unit=tally.figures,
        published=(Published("HoVLE-HD", 38.4, NEO),),
    ),
    "ai2d": _choice(
        title="AI2D test",
        prompt=prompts.seed,
        new_tokens=_tokens(10, 16),
        readings=readings.AI2D,
        published=(Published("HoVLE-HD", 73.0, NEO),),
    ),
    "scienceqa": _choice(
        title="ScienceQA-IMG test",
        prompt=prompts.choice,
        new_tokens=_tokens(100, 16),
        readings=readings.SCIENCEQA,
        published=(Published("HoVLE", 94.8, MMMAMBA),),
    ),
    "gqa": _choice(
        title="GQA testdev-balanced",
        prompt=prompts.short,
        new_tokens=_tokens(10, 16),
        readings=readings.GQA,
        published=(Published("HoVLE", 60.9, MMMAMBA),),
    ),
    "textvqa": _choice(
        title="TextVQA val",
        prompt=prompts.textvqa,
        new_tokens=_tokens(10, 1024),
        readings=readings.TEXTVQA,
        published=(Published("HoVLE", 66.0, MMMAMBA), Published("HoVLE-HD", 70.9, NEO)),
    ),
    "chartqa": Task(
        title="ChartQA test",
        metric="mean of splits",
        prompt=prompts.chartqa,
        max_tiles=12,
        new_tokens=_tokens(100, 16),
        readings=readings.CHARTQA,
        tally=_any(tally.by_split),
        unit=None,
        published=(Published("HoVLE-HD", 78.6, NEO),),
    ),
    "docvqa": _anls(
        title="DocVQA",
        max_tiles=18,
        published=(Published("HoVLE-HD", 86.1, f"{NEO} (test)"),),
    ),
    "infovqa": _anls(
        title="InfoVQA",
        max_tiles=24,
        published=(Published("HoVLE-HD", 55.7, f"{NEO} (test)"),),
    ),
    "ocrbench": Task(
        title="OCRBench",
        metric="Overall",
        prompt=prompts.ocrbench,
        max_tiles=24,
        new_tokens=_tokens(0, 128),
        readings=readings.OCRBENCH,
        tally=_any(tally.count),
        unit=None,
        published=(Published("HoVLE-HD", 740, f"{NEO} (printed as 74.0)"),),
    ),
    "mmvet": _judged(
        title="MM-Vet",
        published=(Published("HoVLE", 44.3, MMMAMBA), Published("HoVLE-HD", 43.8, NEO)),
    ),
    "mathvista": _judged(title="MathVista testmini"),
}


def check(task: str, dialect: str) -> None:
    """UserError: no such task, or it has no such dialect."""
    if task not in TASKS:
        raise UserError(f"--task {task}: not one of {', '.join(TASKS)}")
    if dialect not in TASKS[task].dialects:
        raise UserError(f"--dialect {dialect}: {task} has {', '.join(TASKS[task].dialects)}")
