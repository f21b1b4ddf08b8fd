"""What a study compares: arms, each a change to one recipe, over seeds and tasks.

    def get_study():
        return Study("Does stage I pay?", (Arm("full"), Arm("no_stage1", stages=STAGES[1:])))

Changes are keys of `RunConfig` and their values, "optim.b2", or of one stage, "distill:steps".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hovle_jax.config import to_dict
from hovle_jax.errors import UserError
from hovle_jax.modules import load_module
from hovle_jax.registry import code_digests

STAGES = ("distill", "align", "instruct")


@dataclass(frozen=True)
class Sizes:
    """How large a task is, and how long what it starts from is trained."""

    train: int = 2000  # canvases with a caption and two questions each
    unpaired: int = 2000  # canvases of stage I
    test: int = 200  # canvases with a question each
    lm_steps: int = 300
    teacher_steps: int = 500


@dataclass(frozen=True)
class Arm:
    """One variant of the recipe."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[str, ...] = STAGES  # any of stages.STAGES; one of a plug-in begins as `align`
    images: int = 0  # so many different canvases for stage I; 0 = all of `Sizes.unpaired`

    def __post_init__(self) -> None:
        where = f"arm {self.name!r}"
        if not self.stages or len(set(self.stages)) < len(self.stages):
            raise UserError(f"{where}: stages {self.stages} must be different, and at least one")
        for key in self.changes:
            stage, colon, _ = key.rpartition(":")
            if colon and stage not in self.stages:
                raise UserError(f"{where}: {key!r} changes stage {stage!r}, which it does not have")


@dataclass(frozen=True)
class Study:
    """A question, asked with every arm, seed and task; differences are from the first arm."""

    question: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    tasks: tuple[str, ...] = ("digits", "words")
    changes: Mapping[str, Any] = field(default_factory=dict)  # to all arms, theirs win
    sizes: Sizes = field(default_factory=Sizes)

    def __post_init__(self) -> None:
        for what, values in (
            ("arms", [arm.name for arm in self.arms]),
            ("seeds", list(self.seeds)),
            ("tasks", list(self.tasks)),
        ):
            if not values or len(set(values)) < len(values):
                raise UserError(f"study: {what} {values} must be different, and at least one")

    def of(self, arm: Arm, stage: str) -> dict[str, Any]:
        """{config key: value} of what an arm changes in a stage."""
        return _of(self.changes, stage) | _of(arm.changes, stage)

    def key(self, arm: Arm, upto: str) -> str:
        """The same for arms that are the same up to this stage: they share its result.

        The same code, too, of plug-ins and of whatever file registered a part that an arm names.
        """
        chain = []
        for stage in arm.stages[: arm.stages.index(upto) + 1]:
            images = arm.images if stage == "distill" else 0
            own = self.of(arm, stage)
            text = json.dumps([stage, own], default=to_dict)
            code = code_digests(own.get("model.plugins", ()), text)
            chain.append([stage, images, sorted(own.items()), *code])
        text = json.dumps([chain, to_dict(self.sizes)], default=to_dict)
        return f"{upto}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _of(changes: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Those of all stages, then those of this one."""
    start = f"{stage}:"
    own = {k.removeprefix(start): v for k, v in changes.items() if k.startswith(start)}
    return {k: v for k, v in changes.items() if ":" not in k} | own


def read_study(path: str | Path) -> Study:
    """What `get_study()` of a file returns."""
    module = load_module(path, "study")
    study = module.get_study() if hasattr(module, "get_study") else None
    if not isinstance(study, Study):
        raise UserError(f"{path}: needs a function get_study() that returns a hovle_jax Study")
    return study
