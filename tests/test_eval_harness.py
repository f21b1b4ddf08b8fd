"""Adaptors for lmms-eval and VLMEvalKit, with stand-ins for what they import of them."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from hovle_jax.data.records import Turn
from hovle_jax.errors import UserError
from hovle_jax.eval.harness import Answerer
from hovle_jax.eval.prompts import SHORT
from hovle_jax.generation.chat import Assistant, Question

pytestmark = pytest.mark.usefixtures("quick_compilation")
NEW = 4


@pytest.fixture
def module(monkeypatch):
    """Imports an adaptor with modules that have the given names."""

    def load(name: str, **stubs: dict) -> types.ModuleType:
        for path, contents in stubs.items():
            parts = path.split("__")
            for i in range(1, len(parts) + 1):
                stub = types.ModuleType(".".join(parts[:i]))
                monkeypatch.setitem(sys.modules, stub.__name__, stub)
            vars(stub).update(contents)
        monkeypatch.delitem(sys.modules, f"hovle_jax.eval.{name}", raising=False)
        return importlib.import_module(f"hovle_jax.eval.{name}")

    return load


class Lmms:
    def __init__(self) -> None:
        self.task_dict: dict = {}


class Manifest:
    def __init__(self, model_id: str, chat_class_path: str):
        self.model_id, self.chat_class_path = model_id, chat_class_path


class Base:
    def __init__(self) -> None:
        self.dump_image_func = None

    def dump_image(self, line, dataset):
        return self.dump_image_func(line)


@pytest.fixture(scope="module")
def expected(release) -> list[str]:
    """Of two questions about the image, and one without it."""
    image = str(release.parent / "image.png")
    asked = [
        Question((Turn("user", "<image>\na thing"),), (image,)),
        Question((Turn("user", f"<image>\ncan it fly {SHORT}"),), (image,)),
        Question((Turn("user", "a b"),)),
    ]
    return Assistant.load(release).answer(asked, max_new=NEW)


def test_answers_come_in_the_order_of_the_questions(release, expected):
    image = str(release.parent / "image.png")
    answerer = Answerer(str(release), slots=2, context=1024)
    questions = [
        ("<image>\na thing", [image], NEW),
        (f"<image>\ncan it fly {SHORT}", [image], NEW),
        ("a b", [], NEW),
    ]
    answerer.set_tiles(12)  # as the model's own limit
    assert answerer.answers(questions * 2) == expected * 2
    assert answerer.answers([("a b", [], 1)])[0] != expected[2]
    with pytest.raises(UserError, match="question 1: 1 images are not all in its text"):
        answerer.answers([("a b", [image], NEW)])


def test_what_cannot_be_asked_is_answered_by_nothing(release, expected, capsys):
    """A broken picture and a prompt too long cost their questions, and no other."""
    answerer = Answerer(str(release), slots=2, context=1024)
    asked = [("a b", [], NEW), ("<image>\na", [b"broken"], NEW), ("a " * 2000, [], NEW)]
    assert answerer.answers([*asked, asked[0]]) == [expected[2], "", "", expected[2]]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: question 2: ")
    assert second.startswith("error: question 3: ") and "context of 1024" in second


def test_lmms_eval_finds_a_model(release, expected, module):
    made = module(
        "lmms_eval_model",
        lmms_eval__models__registry_v2={"ModelManifest": Manifest},
        lmms_eval__api__model={"lmms": Lmms},
    )
    path, name = made.manifest().chat_class_path.rsplit(".", 1)
    model_class = getattr(importlib.import_module(path), name)
    assert issubclass(model_class, Lmms) and not model_class.is_simple
    setup = (Path(__file__).parent.parent / "setup.cfg").read_text()
    assert f"hovle = {made.__name__}:manifest" in setup

    model = model_class(str(release), max_tiles="12", slots="2", context="1024", batch_size=1)
    image = Image.open(release.parent / "image.png")
    model.task_dict = {"t": {"test": [("a thing", image), (f"can it fly {SHORT}", image)]}}

    def messages(doc):
        parts = [{"type": "image", "url": doc[1]}, {"type": "text", "text": doc[0]}]
        return [{"role": "user", "content": parts}]

    def request(i, ask=messages):
        return types.SimpleNamespace(args=("", ask, {"max_new_tokens": NEW}, i, "t", "test"))

    assert model.generate_until([request(0), request(1)]) == expected[:2]
    sound = [{"role": "user", "content": [{"type": "audio"}]}]
    with pytest.raises(UserError, match="t, row 0: a audio of role user; only users' texts"):
        model.generate_until([request(0, lambda doc: sound)])
    with pytest.raises(UserError, match="hovle has no 'pretrained'"):
        model_class(str(release), pretrained="x")


def test_vlmevalkit_runs_a_model(release, expected, module, monkeypatch, tmp_path):
    known: dict = {}
    made = module(
        "vlmevalkit_runner",
        vlmeval__vlm__base={"BaseModel": Base},
        vlmeval__config={"supported_VLM": known},
    )
    with pytest.raises(UserError, match="set HOVLE_MODEL to a model directory, and start in"):
        made.main()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOVLE_MODEL", str(release))
    (tmp_path / "run.py").write_text("assert __name__ == '__main__'\n")
    made.main()
    model = known["hovle"](context=1024)
    model.dump_image_func = lambda line: [str(release.parent / "image.png")]

    assert model.use_custom_prompt("MME") and model.use_custom_prompt("MMBench_DEV_CN_V11")
    assert not model.use_custom_prompt("MME-RealWorld") and not model.use_custom_prompt("BLINK")
    tasks = {name: made.task_of(name).title for name in ("MMBench_DEV_CN", "MMBench_DEV_EN")}
    assert tasks == {"MMBench_DEV_CN": "MMBench-CN", "MMBench_DEV_EN": "MMBench-EN"}

    monkeypatch.setitem(made.TASKS["mme"].new_tokens, "vlmevalkit", NEW)
    line = {"index": 1, "image": "...", "question": "can it fly", "hint": float("nan")}
    message = model.build_prompt(line, "MME")
    assert message[0] == {"type": "text", "value": f"can it fly {SHORT}"} and len(message) == 2
    assert model.generate_inner(message, "MME") == expected[1]
    monkeypatch.setitem(made.TASKS["mmmu"].new_tokens, "vlmevalkit", NEW)
    assert isinstance(model.generate_inner(message, "MMMU_DEV_VAL"), str)  # twice as large
