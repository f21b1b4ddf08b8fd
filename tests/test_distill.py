"""Stage I beyond its default: distances, adaptors, several teachers, hidden states."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax import distill, losses, model, train_step
from hovle_jax.checkpoint import latest_step, open_stored, save_model
from hovle_jax.config import DistillConfig, MeshConfig, MoreTeacher, RunConfig, TeacherConfig
from hovle_jax.errors import UserError
from hovle_jax.initialize import initial_params
from hovle_jax.nn import teacher
from hovle_jax.run.hosts import make_mesh
from hovle_jax.run.metrics import read_metrics
from hovle_jax.stages import get_stage
from hovle_jax.train import train
from hovle_jax.tree import flatten, unflatten
from tests.conftest import TEACHER as WORLD_TEACHER
from tests.test_stages import (
    IMAGE_PLACES,
    LOCATIONS,
    MODELS,
    TEACHER,
    compiled,
    embedding_only,
    make_batch,
    random_params,
    teacher_params,
)

DINO = TeacherConfig(
    kind="dinov3",
    num_layers=2,
    hidden_size=16,
    num_heads=2,
    intermediate_size=24,
    image_size=24,
    patch_size=8,
    shuffle=1,
    registers=2,
    key_bias=False,
    out_size=16,
    initializer_range=0.2,
    dtype="float32",
)
BOTH = DistillConfig("smooth_l1", image=0.5, text=2.0, layers="1:2,2:1", layer_weight=3.0)
TERMS = ["loss/image", "loss/image_vit", "loss/layers", "loss/text"]
MORE = (MoreTeacher("dino", "", DINO, weight=0.25),)


def test_distances():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 5, 8)).astype(np.float32)
    error = np.abs(a - b).astype(np.float64)
    squares = np.where(error < 1, error**2 / 2, error - 0.5)
    assert (error < 1).any() and (error > 1).any()
    for name, expected in (("mse", (error**2).mean(-1)), ("smooth_l1", squares.mean(-1))):
        found = losses.DISTANCES.find(name)(jnp.asarray(a, jnp.bfloat16), jnp.asarray(b))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=2e-2)
        np.testing.assert_allclose(losses.DISTANCES[name](a, b), expected, rtol=1e-5)


@pytest.mark.parametrize("name", losses.DISTANCES)
def test_every_distance_is_zero_at_its_target_and_smooth_everywhere(name):
    distance = losses.DISTANCES[name]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), jnp.float32)
    np.testing.assert_allclose(distance(x, x), 0, atol=1e-5)
    assert (distance(x, -x) > 0.1).all()
    for start in (x, -x, jnp.zeros_like(x)):  # padding is zero
        gradient = jax.grad(lambda a: distance(a, x).sum())(start)
        assert np.isfinite(gradient).all()


def config_of(loc: str = "pre", **changes) -> RunConfig:
    return RunConfig(model=MODELS[loc], teacher=TEACHER, **changes)


@pytest.mark.parametrize(
    ("layers", "pairs"), [("last", ()), ("all", ((1, 1),)), ("2:1, 1:2", ((2, 1), (1, 2)))]
)
def test_layer_pairs(layers, pairs):
    assert distill.layer_pairs(config_of(distill=DistillConfig(layers=layers))) == pairs


def test_all_layers_are_spread_over_the_teachers():
    deep = RunConfig(distill=DistillConfig(layers="all"))  # 8 layers, 24 of the teacher's
    assert distill.layer_pairs(deep) == tuple((n, 3 * n) for n in range(1, 8))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill": DistillConfig(layers="2")}, "'2' is not last, all"),
        ({"distill": DistillConfig(layers="3:1")}, "3:1 is not within the 2 layers"),
        ({"distill": DistillConfig(layers="1:1,1:2")}, "names a layer of the student twice"),
        ({"distill": DistillConfig(loss="cos")}, "config.distill.loss: 'cos' .* 'cosine'"),
        ({"teachers": MORE * 2}, "two of them are named alike"),
        ({"teachers": (dataclasses.replace(MORE[0], adaptor="none"),)}, "16 numbers .* 32; set"),
        ({"trainable": "heads/.*", "teachers": MORE}, "matches no parameter of stage"),
    ],
)
def test_settings_that_cannot_be_meant_fail_before_anything_is_read(changes, words):
    with pytest.raises(UserError, match=words):
        train_step.state_shapes(config_of(**changes))


@LOCATIONS
def test_terms_of_two_teachers_and_hidden_states(loc):
    """Against distances written out place by place; a tile of 'post' has 16 places, not 4."""
    config, batch = config_of(loc, distill=BOTH, teachers=MORE), make_batch()
    trees = [teacher_params(), random_params(teacher.abstract_params(DINO), 4)]
    shapes = {k: jax.ShapeDtypeStruct(s, np.float32) for k, s in distill.heads(config).items()}
    params = embedding_only() | {"heads": random_params(unflatten(shapes), 5)}
    patches = 4 if loc == "post" else 2

    def everything(params, trees):
        found = distill.terms(params, distill.teacher_tree(trees), batch, config)
        hidden = model.embed_layers(params, batch, config.model)
        targets = [
            teacher.targets(t, batch["pixels"], c, 4, layer_places=patches**2)
            for t, c in zip(trees, (TEACHER, DINO), strict=True)
        ]
        return found, hidden, targets

    found, (output, hidden, _), (vit, dino) = jax.tree.map(
        np.asarray, compiled(everything)(params, trees)
    )
    table = np.asarray(params["embedding"]["text"]["table"])
    heads = jax.tree.map(np.asarray, params["heads"])

    def smooth(a, b):
        error = np.abs(a - b)
        return np.where(error < 1, error**2 / 2, error - 0.5).mean(-1)

    def through(name, x):
        return x @ heads[name]["kernel"] + heads[name]["bias"]

    assert set(heads) == {"image_dino", "layer_1", "layer_2"}  # width 32 needs no adaptor
    text = smooth(output[0, 10:17], table[batch["input_ids"][0, 10:17]])
    np.testing.assert_allclose(found["text"][0, 10:17], 2.0 * text, rtol=1e-3)
    for row, tiles in IMAGE_PLACES.items():
        for start, tile in tiles:
            here = slice(start, start + 4)
            image = 0.5 * smooth(output[row, here], vit["features"][row, tile])
            np.testing.assert_allclose(found["image"][row, here], image, rtol=1e-3)
            other = smooth(through("image_dino", output[row, here]), dino["features"][row, tile])
            np.testing.assert_allclose(found["image_dino"][row, here], 0.125 * other, rtol=1e-3)
            # In the long stream every image token before this one has taken three places more.
            earlier = np.sum(batch["input_ids"][row, :start] == 90) * (patches**2 // 4 * 4 - 4) // 4
            places = slice(start + earlier, start + earlier + patches**2)
            pairs = [
                smooth(
                    through(f"layer_{n}", hidden[n - 1, row, places]),
                    vit["layers"][m - 1][row, tile],
                )
                for n, m in ((1, 2), (2, 1))
            ]
            expected = 3.0 * np.mean(pairs)
            np.testing.assert_allclose(found["layers"][row, here].mean(), expected, rtol=1e-3)
    weights = distill.weights(batch, config)
    assert weights.keys() == found.keys()
    for name in ("image_dino", "layers"):
        np.testing.assert_array_equal(weights[name], weights["image"])


@pytest.fixture(scope="module")
def dino_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("dino")
    save_model(root, DINO, compiled(lambda key: teacher.init(key, DINO))(jax.random.key(3)))
    return str(root)


def distill_config(world, dino_dir, **changes) -> RunConfig:
    """Of another size, grid and width than the student; the world's teacher beside it."""
    return world.config(
        "distill",
        steps=3,
        teacher=DINO,
        init__teacher=dino_dir,
        distill=DistillConfig(adaptor="linear", layers="1:2"),
        teachers=(MoreTeacher("vit", str(world.root / "teacher"), WORLD_TEACHER, "none"),),
        optim__schedule="constant",
        optim__warmup=0.0,
        **changes,
    )


@pytest.mark.slow  # `pytest -m slow`: three runs
def test_heads_train_alike_on_eight_devices_and_on_from_there(world, dino_dir, tmp_path):
    config = distill_config(world, dino_dir)
    train(config, tmp_path / "one", devices=jax.devices()[:1], quiet=True)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    half = dataclasses.replace(config, steps=2, mesh=mesh)
    train(half, tmp_path / "two", devices=jax.devices()[:8], quiet=True)
    train(config, tmp_path / "two", devices=jax.devices()[:1], quiet=True)
    rows, again = (read_metrics(tmp_path / d / "metrics.jsonl") for d in ("one", "two"))
    for a, b in zip(rows, again, strict=True):
        for name in ("loss", "grad_norm", *TERMS):
            assert a[name] == pytest.approx(b[name], rel=2e-3), (a["step"], name)


def test_heads_train_lie_in_checkpoints_and_in_no_model(world, dino_dir, tmp_path):
    config = distill_config(world, dino_dir)
    train(config, tmp_path / "one", devices=jax.devices()[:1], quiet=True)
    rows = read_metrics(tmp_path / "one" / "metrics.jsonl")
    assert sorted(k for k in rows[0] if k.startswith("loss/")) == TERMS
    assert all(rows[-1][name] < rows[0][name] for name in ["loss", *TERMS])
    state = train_step.state_shapes(config)
    heads = {k for k in flatten(state.params) if k.startswith("heads/")}
    names = ("image", "layer_1")
    assert heads == {f"heads/{n}/{leaf}" for n in names for leaf in ("kernel", "bias")}
    step = tmp_path / "one" / "checkpoints" / str(latest_step(tmp_path / "one"))
    assert (step / "params" / "_METADATA").read_text().count("heads") > 0
    stored = open_stored(tmp_path / "one")
    stored.check()
    assert stored.paths and not any("heads" in path for path in stored.paths)

    align = world.config("align", init__previous=str(tmp_path / "one"))
    on = make_mesh(align.mesh, jax.devices()[:1])
    with jax.set_mesh(on):
        found = flatten(initial_params(align, get_stage("align"), on))
    assert not any("heads" in path for path in found)
    path = "embedding/layers/attention/q/kernel"
    want = jax.ShapeDtypeStruct(found[path].shape, np.float32, sharding=found[path].sharding)
    np.testing.assert_array_equal(found[path], stored.read({path: want})[path])


def test_a_teacher_of_other_settings_is_refused(world, dino_dir, tmp_path):
    other = dataclasses.replace(DINO, mean=(0.5, 0.5, 0.5))
    config = distill_config(world, dino_dir, save_every=0)
    bad = dataclasses.replace(config, teacher=other)
    with pytest.raises(UserError, match=r"config.teacher.mean is \(0.5, 0.5, 0.5\), but"):
        train(bad, tmp_path / "a", devices=jax.devices()[:1], quiet=True)
    more = (MoreTeacher("vit", "", WORLD_TEACHER, "none"),)
    with pytest.raises(UserError, match=r"config.teachers\[0\].path: .* needs a teacher"):
        train(
            dataclasses.replace(config, teachers=more),
            tmp_path / "b",
            devices=jax.devices()[:1],
            quiet=True,
        )
