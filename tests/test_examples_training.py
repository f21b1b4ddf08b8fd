"""Examples of what stages distil from, train on and with, loaded as a fork's files are."""

import dataclasses
import json
import multiprocessing
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from hovle_jax import train_step
from hovle_jax.cli.main import load_config
from hovle_jax.config import DistillConfig, MeshConfig
from hovle_jax.data.pipeline import Pipeline
from hovle_jax.data.tilers import TILERS, TileLimits
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.initialize import check_order
from hovle_jax.losses import DISTANCES
from hovle_jax.optim import OPTIMIZERS
from hovle_jax.registry import load_plugins
from hovle_jax.run.hosts import make_mesh
from hovle_jax.run.metrics import read_metrics
from hovle_jax.run.prepare import _check_same_run
from hovle_jax.stages import get_stage, open_pipeline
from hovle_jax.train import train

EXAMPLES = Path(__file__).parent.parent / "examples"
CONFIGS = EXAMPLES.parent / "configs"


def plug_in(*names: str) -> tuple[str, ...]:
    files = tuple(str(EXAMPLES / f"{name}.py") for name in names)
    load_plugins(files)
    return files


def test_stage_one_of_plugins(world, tmp_path):
    """A teacher without parameters, a loss, an optimizer, a format and a tiler, in one run."""
    plugins = plug_in("teacher", "distill_loss", "optimizer", "data_source", "tiler")
    images = sorted((world.root / "images").iterdir())
    table = tmp_path / "some.csv"
    table.write_text("image,caption\n" + "".join(f"{p},A picture\n" for p in images))
    config = world.config(
        "distill",
        steps=8,
        model__plugins=plugins,
        teacher__kind="edges",
        teacher__shuffle=1,
        teacher__out_size=11,
        init__teacher="",
        distill=DistillConfig("cosine_norm", adaptor="linear"),
        optim__name="lion",
        optim__lr=1e-3,
        data__images=(str(table),),
        data__tiler="strips",
    )
    train(config, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for name in ("loss/image", "loss/text"):
        assert rows[-1][name] < rows[0][name], name
    more = dataclasses.replace(config.model, plugins=(*plugins, *plug_in("stage")))
    _check_same_run(dataclasses.replace(config, model=more), tmp_path / "run")  # is taken
    with pytest.raises(UserError, match="belongs to a run with config.optim.name='lion'"):
        other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, name="adamw"))
        train(other, tmp_path / "run", devices=jax.devices()[:1], quiet=True)
    with pytest.raises(UserError, match="teacher 'edges' keeps no hidden states"):
        layers = dataclasses.replace(config.distill, layers="all")
        bad = dataclasses.replace(config, distill=layers)
        train(bad, tmp_path / "bad", devices=jax.devices()[:1], quiet=True)


def test_a_fourth_stage(world, tmp_path):
    config = load_config(f"{CONFIGS / 'stage2_late.py'}:tiny")
    assert config.stage == "late" and len(config.model.plugins) == 1
    trainable, frozen = train_step.stage_shapes(config)
    assert set(trainable) == {"embedding", "decoder"} and not frozen
    train_step.state_shapes(config)  # every parameter is in one group of optim.groups
    small = world.config("late", steps=1, init__scratch=True, model__plugins=plug_in("stage"))
    train(small, tmp_path / "late", devices=jax.devices()[:1], quiet=True)
    for name, fits in (("instruct", True), ("align", False)):
        after = world.config(name, init__previous=str(tmp_path / "late"))
        if fits:
            check_order(after, get_stage(name))
        else:
            with pytest.raises(UserError, match="is stage 'late', but stage 'align' starts from"):
                check_order(after, get_stage(name))


@pytest.mark.parametrize("variant", ["siglip2", "dinov3", "both", "layers"])
def test_configs_of_other_teachers(variant):
    config = load_config(f"{CONFIGS / 'stage1_teachers.py'}:{variant}")
    trainable, _ = train_step.stage_shapes(config)
    widths = {"siglip2": [1152], "dinov3": [1024], "both": [1152, 1024], "layers": [1024] * 3}
    kernels = [head["kernel"].shape for head in trainable["heads"].values()]
    assert sorted(kernels) == sorted((2048, width) for width in widths[variant])
    shapes = train_step.teacher_shapes(config)
    first = sum(
        x.size for k, x in jax.tree_util.tree_leaves_with_path(shapes) if "more" not in str(k)
    )
    millions = {"siglip2": 413, "dinov3": 303, "both": 413, "layers": 317}
    assert first / 1e6 == pytest.approx(millions[variant], abs=2)


def test_state_of_any_optimizer_is_laid_out_as_its_parameters(world):
    plug_in("optimizer")
    if "adafactor" not in OPTIMIZERS:
        OPTIMIZERS.add("adafactor")(lambda c: optax.scale_by_factored_rms(min_dim_size_to_factor=8))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    for name in ("lion", "adafactor"):
        config = world.config("align", optim__name=name)
        where = jax.tree_util.tree_leaves_with_path(train_step.state_shardings(config, mesh))
        of = {jax.tree_util.keystr(k, simple=True, separator="/"): s.spec for k, s in where}
        path = "embedding/layers/attention/q/kernel"
        states = [k for k in of if k.endswith(path) and not k.startswith("params/")]
        assert len(states) == {"lion": 1, "adafactor": 3}[name]
        if name == "lion":
            assert of[states[0]] == of[f"params/{path}"] != jax.sharding.PartitionSpec()
        trainable, _ = train_step.stage_shapes(config)
        tx = train_step.make_optimizer(config.optim, 3, trainable)
        ones = jax.tree.map(lambda x: jnp.ones(x.shape), trainable)
        updates, _ = jax.eval_shape(tx.update, ones, jax.eval_shape(tx.init, ones), ones)
        assert jax.tree.structure(updates) == jax.tree.structure(ones)


def test_a_loss_that_sees_lengths():
    plug_in("distill_loss")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), jnp.float32)
    near, far = (DISTANCES["cosine_norm"](x, x * factor) for factor in (1.0, np.e))
    np.testing.assert_allclose(near, 0, atol=1e-5)
    np.testing.assert_allclose(far, 0.1, rtol=1e-3)
    grad = jax.grad(lambda x: DISTANCES["cosine_norm"](x, jnp.ones(8)))(jnp.zeros(8))
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("name", ["dynamic", "native", "strips"])
def test_every_tiler_cuts_as_many_tiles_as_it_counts(name):
    plug_in("tiler")
    tiler, rng = TILERS.find(name), np.random.default_rng(1)
    for width, height in [(32, 32), (1, 1), (300, 20), (20, 300), (97, 161), (64, 33)]:
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))
        for most, thumbnail in ((1, True), (4, False), (6, True)):
            limits = TileLimits(32, 1, most, thumbnail)
            tiles = tiler.cut(picture, limits)
            assert tiles.shape == (tiler.count(width, height, limits), 32, 32, 3)
            assert tiles.dtype == np.uint8 and len(tiles) <= most + thumbnail
            assert most > 1 or len(tiles) == 1


def _rows(pickled: bytes, results) -> None:
    source = pickle.loads(pickled)
    results.put([source[i].turns[1].text for i in range(len(source))])


def test_a_source_of_a_file_reaches_processes_that_never_loaded_it(world, tmp_path):
    (plugin,) = plug_in("data_source")
    (tmp_path / "a.csv").write_text('image,caption\nx.png,One\ny.png,"Two, too"\n')
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"table": {"annotation": "a.csv"}}))
    from hovle_jax.data.sources import open_meta

    (entry,) = open_meta(str(meta))
    assert entry.source[0].images == (str(tmp_path / "x.png"),)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=_rows, args=(pickle.dumps(entry.source), results))
    child.start()
    assert results.get(timeout=120) == ["One", "Two, too"]
    child.join()
    (tmp_path / "empty.csv").write_text("image,caption\n")
    meta.write_text(json.dumps({"table": {"annotation": "empty.csv"}}))
    with pytest.raises(UserError, match="empty.csv: the file has no rows"):
        open_meta(str(meta))


def test_text_in_the_mixture_of_the_next_token_stages(world, tmp_path):
    """Documents become BOS and their tokens, all predicted, and pack beside conversations."""
    (tmp_path / "text.txt").write_text("Which colour? please Hello\n\nwhite red green blue\n" * 8)
    entry = json.loads((world.root / "meta.json").read_text())["colours"]
    entry |= {k: str(world.root / entry[k]) for k in ("root", "annotation")}
    meta = tmp_path / "meta.json"
    meta.write_text(
        json.dumps({"colours": entry, "text": {"annotation": "text.txt", "text": True}})
    )
    config = world.config("instruct", data__meta=str(meta))
    tokenizer = Tokenizer.load(config.data.tokenizer)
    pipeline = open_pipeline(config, tokenizer, quiet=True)
    assert pipeline.names == ["colours", "text"]
    sample = pipeline.sources[1].sample(1, 0)
    words = tokenizer.encode_ordinary("white red green blue")
    assert sample.ids.tolist() == [tokenizer.bos_id, *words] and not len(sample.tiles)
    assert sample.labels.tolist() == [-100, *words]
    batch, _ = next(pipeline.batches())
    assert set(np.unique(batch["source_ids"][batch["segment_ids"] > 0])) == {0, 1}
    with pytest.raises(UserError, match="'text': text has no images"):
        Pipeline(
            dataclasses.replace(config, data=dataclasses.replace(config.data, images=())),
            "unpaired",
            "token",
            tokenizer,
            quiet=True,
        )
