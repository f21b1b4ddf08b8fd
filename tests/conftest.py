"""Eight simulated devices for every test; a small model; no accelerator, no network."""

import os
import shutil
import sys
import tempfile

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Processes that tests start need not compile what this one compiled already.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "JAX_COMPILATION_CACHE_DIR", ""
) or tempfile.mkdtemp(prefix="hovle-tests-")

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from hovle_jax import model, registry
from hovle_jax.checkpoint import save_model
from hovle_jax.config import (
    DataConfig,
    InitConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TeacherConfig,
)
from hovle_jax.data.tokenizer import IM_END, IMG_CONTEXT, IMG_END, IMG_START, train_tokenizer
from hovle_jax.generation import slots
from hovle_jax.nn import teacher
from tests import small

LAYERS = dataclasses.replace(
    small.LAYERS, intermediate_size=64, max_positions=32768, initializer_range=0.1
)
RELEASE = Path(__file__).parent / "golden" / "hovle" / "a_pre"
COLOURS = ("red", "green", "blue", "white")


def pytest_sessionfinish() -> None:
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if "hovle-tests-" in cache and "PYTEST_XDIST_WORKER" not in os.environ:  # workers share it
        shutil.rmtree(cache, ignore_errors=True)


def _tables() -> Iterator[dict]:
    """Every registry of the package, and what the registry module remembers of plug-ins."""
    for name, module in list(sys.modules.items()):
        if name.startswith("hovle_jax."):
            for key, value in list(vars(module).items()):
                own = module is registry and isinstance(value, dict) and not key.startswith("__")
                if own or isinstance(value, registry.Registry):
                    yield value


@pytest.fixture(scope="module", autouse=True)
def as_found() -> Iterator[None]:
    """What a file of tests registers, itself or by plug-ins, is gone after it; so are its compiled
    programs, of which another file uses few: a process kept gigabytes of them."""
    modules, found = set(sys.modules), [(table, dict(table)) for table in _tables()]
    yield
    jax.clear_caches()
    for table, contents in found:
        table.clear()
        table.update(contents)
    for name in set(sys.modules) - modules:
        if name.startswith("hovle_plugin_"):
            del sys.modules[name]
    for value in vars(registry).values():  # plug-in files run again
        if hasattr(value, "cache_clear"):
            value.cache_clear()


@dataclasses.dataclass(frozen=True)
class World:
    """A small data set on disk, an LLM and a teacher: everything a run can start from."""

    root: Path
    model: ModelConfig

    def config(self, stage: str, **changes: object) -> RunConfig:
        """A run of `stage`; keyword arguments replace fields, dotted ones with '__'."""
        paths = (
            {"images": (str(self.root / "images"),)}
            if stage == "distill"
            else {"meta": str(self.root / "meta.json")}
        )
        config = RunConfig(
            stage=stage,
            steps=6,
            log_every=100,
            save_every=0,
            model=self.model,
            teacher=TEACHER,
            data=DataConfig(
                tokenizer=str(self.root / "tokenizer"),
                system="",
                rows=8,
                tokens=96,
                tiles=4,
                max_tiles=2,
                window=32,
                **paths,
            ),
            optim=OptimConfig(lr=3e-3, warmup=0.2),
            mesh=MeshConfig(data=1, fsdp=1, tensor=1),
            init=InitConfig(llm=str(self.root / "llm"), teacher=str(self.root / "teacher")),
        )
        for key, value in changes.items():
            *parents, leaf = key.split("__")
            config = _replace(config, parents, leaf, value)
        return config


def _replace(config: object, parents: list[str], leaf: str, value: object) -> object:
    if not parents:
        return dataclasses.replace(config, **{leaf: value})
    child = _replace(getattr(config, parents[0]), parents[1:], leaf, value)
    return dataclasses.replace(config, **{parents[0]: child})


TEACHER = TeacherConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    intermediate_size=64,
    image_size=32,
    patch_size=8,
    shuffle=2,
    out_size=32,
    initializer_range=0.1,
    dtype="float32",
)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    rows = []
    for i in range(24):
        colour = i % 4
        pixels = rng.integers(0, 60, (32, 32 if i % 3 else 64, 3)).astype(np.uint8)
        pixels[8:24, 8:24] = [(220, 20, 20), (20, 220, 20), (20, 20, 220), (240,) * 3][colour]
        name = f"{i:02}.{'jpg' if i % 2 else 'png'}"
        Image.fromarray(pixels).save(root / "images" / name)
        question = "<image>\nWhich colour?" + " please" * (i % 5)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": COLOURS[colour]}]
        rows.append({"id": i, "image": name, "conversations": turns})
    text_only = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "white"}]
    rows.append({"id": 24, "conversations": text_only})
    write_meta(root, rows)
    lines = ["Which colour? please Hello", "user system assistant\n", *COLOURS] * 4
    tokenizer = train_tokenizer(lines, root / "tokenizer", 90)
    config = dataclasses.replace(
        small.PRE,
        name="test",
        vocab_size=tokenizer.vocab_size,
        embedding=LAYERS,
        decoder=LAYERS,
        image_size=32,
        patch_size=8,
        im_end_id=tokenizer.id_of(IM_END),
        img_start_id=tokenizer.id_of(IMG_START),
        img_end_id=tokenizer.id_of(IMG_END),
        img_context_id=tokenizer.id_of(IMG_CONTEXT),
        initializer_range=0.1,
        loss_chunk=512,
    )
    params = model.init(jax.random.key(7), config)
    llm = {"decoder": params["decoder"], "embedding": {"text": params["embedding"]["text"]}}
    save_model(root / "llm", config, llm)
    save_model(root / "teacher", TEACHER, teacher.init(jax.random.key(8), TEACHER))
    return World(root, config)


def write_meta(root: Path, rows: list[dict], name: str = "meta.json") -> Path:
    """A meta.json with one jsonl of `rows`, images under root/images."""
    annotation = name.replace(".json", ".jsonl")
    (root / annotation).write_text("".join(json.dumps(r) + "\n" for r in rows))
    entry = {"root": "images", "annotation": annotation, "data_augment": False, "repeat_time": 1}
    (root / name).write_text(json.dumps({"colours": entry | {"length": len(rows)}}))
    return root / name


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded checkpoint with a tokenizer whose added tokens fall on the model's ids."""
    root = tmp_path_factory.mktemp("release") / "model"
    shutil.copytree(RELEASE, root)
    # A text that stays as it is: with other pieces, answers of these weights are other ones, and
    # some of those hang on the last bit.
    lines = [(RELEASE.parent.parent / "tokenizer_text.txt").read_text()]
    assert train_tokenizer(lines, root, 298).id_of(IM_END) == 298
    pixels = np.random.default_rng(0).integers(0, 256, (120, 60, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(root.parent / "image.png")
    return root


@pytest.fixture(scope="session")
def quick_compilation() -> None:
    """Compiles the engine without optimisation: its tests are all compilation, with many shapes."""
    for name, static in (
        ("prefill", ("room", "drawn", "top")),
        ("prefill_prefix", ("room",)),
        ("resume", ("drawn", "top")),
        ("decode", ("chunk", "windows", "drawn", "top")),
    ):
        quick = jax.jit(
            getattr(slots, name).__wrapped__,
            static_argnames=("config", *static),
            donate_argnames=() if name == "prefill_prefix" else "state",
            compiler_options={"xla_backend_optimization_level": 0},
        )
        setattr(slots, name, quick)


@pytest.fixture
def one_line_error(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Runs the command line, expects exit status 1 and one line of error; returns the line."""
    from hovle_jax.cli.main import main

    def run(argv: list[str]) -> str:
        capsys.readouterr()
        assert main(argv) == 1
        noise = ("WARNING", "measuring ")
        lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith(noise)]
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return run
