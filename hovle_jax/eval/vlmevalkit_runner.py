"""VLMEvalKit with a model here. In a checkout of VLMEvalKit, whose `run.py` gets all arguments:

    HOVLE_MODEL=runs/stage3 python -m hovle_jax.eval.vlmevalkit_runner --data MME --model hovle

Imports VLMEvalKit, so nothing else here imports this file.
"""

from __future__ import annotations

import functools
import os
import runpy
from typing import Any

from vlmeval.config import supported_VLM
from vlmeval.vlm.base import BaseModel

from hovle_jax.errors import UserError
from hovle_jax.eval.examples import Example, enlarged
from hovle_jax.eval.harness import MAX_TILES, Answerer
from hovle_jax.eval.prompts import with_images
from hovle_jax.eval.tasks import TASKS, Task

DIALECT = "vlmevalkit"
# The beginnings of VLMEvalKit's names, the longer ones first.
DATASETS = {
    "MMBench_DEV_CN": "mmbench_cn",
    "MMBench_TEST_CN": "mmbench_cn",
    "MMBench_CN": "mmbench_cn",
    "MMBench": "mmbench_en",
    "CCBench": "ccbench",
    "MMMU": "mmmu",
    "MME": "mme",
    "SEEDBench_IMG": "seed_image",
    "POPE": "pope",
    "HallusionBench": "hallusionbench",
    "AI2D": "ai2d",
    "ScienceQA": "scienceqa",
    "GQA": "gqa",
    "TextVQA": "textvqa",
    "ChartQA_TEST": "chartqa",
    "DocVQA": "docvqa",
    "InfoVQA": "infovqa",
    "OCRBench": "ocrbench",
    "MMVet": "mmvet",
    "MathVista": "mathvista",
}


def task_of(dataset: str | None) -> Task | None:
    """Ours for one of VLMEvalKit's names, 'MME-RealWorld' and the like excepted."""
    for start, name in DATASETS.items():
        if (dataset or "").startswith(start) and (dataset or "")[len(start) :][:1] in ("", "_"):
            return TASKS[name]
    return None


class Hovle(BaseModel):  # type: ignore[misc]
    """Prompts, tile limit and answer length are the task's, where there is one."""

    INTERLEAVE = True

    def __init__(self, model_dir: str, slots: int = 1, context: int = 24576):
        super().__init__()
        self._answerer = Answerer(model_dir, slots=slots, context=context)

    def use_custom_prompt(self, dataset: str) -> bool:
        return task_of(dataset) is not None

    def build_prompt(self, line: Any, dataset: str) -> list[dict[str, str]]:
        task = task_of(dataset)
        assert task is not None  # VLMEvalKit asked `use_custom_prompt`
        fields = {str(k): v for k, v in dict(line).items() if k != "image" and v == v}  # not NaN
        example = Example(str(line["index"]), fields, (), f"{dataset}:{line['index']}")
        images = self.dump_image(line, dataset)
        text = {"type": "text", "value": task.prompt(example, DIALECT)}
        return [text, *({"type": "image", "value": path} for path in images)]

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        task = task_of(dataset)
        self._answerer.set_tiles(task.max_tiles if task else MAX_TILES)
        images: list[str | bytes] = [x["value"] for x in message if x["type"] == "image"]
        if task and images and (scale := task.upscale.get(DIALECT, 1)) > 1:
            images[0] = enlarged(images[0], "the question", scale)
        text = "\n".join(x["value"] for x in message if x["type"] == "text")
        text = with_images(text, Example("", {}, ("",) * len(images), dataset or "the question"))
        new = task.new_tokens[DIALECT] if task else 1024
        return self._answerer.answers([(text, images, new)])[0]


def main() -> None:
    model_dir = os.environ.get("HOVLE_MODEL", "")
    if not model_dir or not os.path.isfile("run.py"):
        raise UserError("set HOVLE_MODEL to a model directory, and start in VLMEvalKit's checkout")
    supported_VLM["hovle"] = functools.partial(Hovle, model_dir)
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
