"""Adapters: nothing changes at step 0, nothing else moves, and every reader gets them merged."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import PartitionSpec as P

from hovle_jax import lora, model, sharding, train_step
from hovle_jax.checkpoint import load, open_stored, open_tree
from hovle_jax.config import LoraConfig, MeshConfig, RunConfig, from_dict, to_dict
from hovle_jax.errors import UserError
from hovle_jax.hf.export import export
from hovle_jax.hf.writer import ExportOptions
from hovle_jax.initialize import initial_params, placed
from hovle_jax.run.metrics import read_metrics
from hovle_jax.stages import get_stage, open_pipeline
from hovle_jax.tpu import aot
from hovle_jax.train import train
from hovle_jax.tree import flatten, merge, split, unflatten

ONE = MeshConfig(1, 1, 1)
EVERY_MATRIX = LoraConfig(rank=3, alpha=6.0, targets=r"(?!decoder/head/).*/kernel")
ADAPTERS = LoraConfig(rank=2, alpha=8.0, targets=r"decoder/layers/.*/(q|o|gate|down)/kernel")


@pytest.fixture(scope="module")
def config(world):
    return world.config(
        "align", steps=4, save_every=2, keep=9, init__scratch=True, lora=ADAPTERS, optim__lr=3e-2
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """Work directory of four steps that trained adapters and nothing else."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    train(config, workdir, devices=jax.devices()[:1], quiet=True)
    return workdir


def first_batch(config):
    pipeline = open_pipeline(config, quiet=True)
    return next(pipeline.batches())[0]


def arrays(tree) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in flatten(tree).items()}


def raw(config, run, mesh) -> tuple[dict, dict]:
    """(adapters, frozen parameters) as they lie in a work directory."""
    shapes = merge(model.abstract_params(config.model), lora.shapes(config))
    found = open_stored(run, merged=False).read(placed(config, shapes, mesh))
    assert set(found) == set(flatten(shapes))
    return split(unflatten(found), train_step.trainable_regex(config))


@pytest.fixture(scope="module")
def hidden(config):
    """(parameters) -> hidden states of one batch; trees of the same form share the program."""
    batch, mesh = first_batch(config), sharding.make_mesh(ONE, jax.devices()[:1])
    fn = jax.jit(lambda params: model.hidden(params, batch, config.model))

    def call(params) -> np.ndarray:
        with jax.set_mesh(mesh):
            return np.asarray(fn(params))

    return call


def test_step_0_is_the_model_without_adapters(config, run, hidden):
    mesh = sharding.make_mesh(ONE, jax.devices()[:1])
    _, frozen = raw(config, run, mesh)
    fresh = unflatten(lora.init(jax.random.key(0), config))
    assert all(np.std(x) > 0.1 for k, x in flatten(fresh).items() if "/lora_a/" in k)
    np.testing.assert_array_equal(hidden(lora.join(frozen, fresh, config.lora)), hidden(frozen))


def test_adapters_move_and_nothing_else(world, config, run):
    base = set(flatten(model.abstract_params(config.model)))
    assert set(open_tree(epath.Path(run) / "frozen")[1]) == base
    adapters, frozen = map(arrays, raw(config, run, sharding.make_mesh(ONE, jax.devices()[:1])))
    assert set(frozen) == base and set(adapters) == set(flatten(lora.shapes(config)))
    llm = arrays(load(world.root / "llm")[1])
    assert llm and all(np.array_equal(frozen[k], llm[k]) for k in llm)
    fresh = lora.init(jax.random.key(config.seed), config)
    for name, x in adapters.items():
        assert np.abs(x - fresh[name]).max() > 1e-3, name
    for item in ("params", "optimizer"):  # a checkpoint has adapters and their moments alone
        held = open_tree(epath.Path(run) / "checkpoints" / "4" / item)[1]
        assert held and all("/lora_" in k or x.size == 1 for k, x in held.items())


def test_merged_kernels_are_what_was_trained(config, run, hidden):
    stored, merged = load(run)
    assert set(flatten(merged)) == set(flatten(model.abstract_params(config.model)))
    adapters, frozen = raw(config, run, sharding.make_mesh(ONE, jax.devices()[:1]))
    trained = hidden(lora.join(frozen, adapters, config.lora))
    np.testing.assert_allclose(hidden(merged), trained, atol=2e-5)
    again = arrays(lora.whole(frozen, adapters, config.lora))  # as benchmarks ask it in mid-run
    assert sorted(again) == sorted(flatten(merged))
    for path, x in arrays(merged).items():
        np.testing.assert_allclose(again[path], x, atol=1e-6, err_msg=path)
    assert np.abs(hidden(frozen) - trained).max() > 1e-2
    path = "decoder/layers/mlp/gate/kernel"
    layer = stored.pieces((path,), 1)[0]
    np.testing.assert_array_equal(layer, np.asarray(flatten(merged)[path])[1])
    assert stored.dtype_of(path) == np.float32


def test_the_next_stage_starts_from_merged_kernels_on_any_mesh(world, run):
    config = world.config("instruct", init__llm="", init__previous=str(run), mesh__fsdp=8)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        params = arrays(initial_params(config, get_stage("instruct"), mesh))
    merged = arrays(load(run)[1])
    assert set(params) == set(merged)
    for path, x in params.items():
        np.testing.assert_allclose(x, merged[path], atol=1e-6, err_msg=path)


def test_an_export_has_the_adapters(run, tmp_path):
    export(run, tmp_path / "exported", ExportOptions())
    merged, exported = arrays(load(run)[1]), arrays(load(tmp_path / "exported")[1])
    assert all(np.array_equal(exported[k], merged[k]) for k in merged)


def test_a_resumed_run_is_the_same_bit_for_bit(config, run, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "4")
    train(config, again, devices=jax.devices()[:1], quiet=True)
    names = ("step", "loss", "grad_norm", "lr")
    rows = [read_metrics(d / "metrics.jsonl") for d in (run, again)]
    assert [[r[k] for k in names] for r in rows[0]] == [[r[k] for k in names] for r in rows[1]]
    first, second = (arrays(load(d)[1]) for d in (run, again))
    assert all(np.array_equal(first[k], second[k]) for k in first)
    other = from_dict(RunConfig, to_dict(config) | {"lora": to_dict(EVERY_MATRIX)}, "config")
    with pytest.raises(UserError, match=r"belongs to a run with config\.lora\.alpha=8\.0"):
        train(other, again, devices=jax.devices()[:1], quiet=True)


def gradients(world, mesh_config: MeshConfig, devices: int) -> dict[str, np.ndarray]:
    """Of adapters beside every matrix, neither of whose factors is zero."""
    config = world.config("instruct", init__scratch=True, lora=EVERY_MATRIX, mesh=mesh_config)
    stage, mesh = get_stage("instruct"), sharding.make_mesh(mesh_config, jax.devices()[:devices])
    batch = first_batch(config)
    with jax.set_mesh(mesh):
        flat = flatten(initial_params(config, stage, mesh))
        rng = np.random.default_rng(0)
        for path, x in flat.items():
            if path.endswith("/lora_b/kernel"):
                flat[path] = jax.device_put(0.1 * rng.normal(size=x.shape).astype("f"), x.sharding)
        trainable, frozen = split(unflatten(flat), train_step.trainable_regex(config))
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        totals = jax.tree.map(jnp.sum, stage.weights(batch, config))
        grad = jax.jit(jax.grad(train_step.make_loss(config), has_aux=True))
        return arrays(grad(trainable, frozen, {}, batch, totals)[0])


def test_every_adapter_gets_the_gradient_of_one_device_on_eight(world):
    """An adapter beside a kernel that something reads by itself would get none."""
    one, eight = gradients(world, ONE, 1), gradients(world, MeshConfig(1, 2, 2, 2), 8)
    assert len(one) == 2 * 17 and sorted(one) == sorted(eight)
    for path, want in one.items():
        assert np.abs(want).max() > 1e-6, path
        np.testing.assert_allclose(eight[path], want, atol=1e-5, err_msg=path)


def test_factors_are_split_as_their_kernels(world):
    config = world.config("instruct", lora=EVERY_MATRIX)
    mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
    shapes = lora.shapes(config)
    where = flatten(train_step.param_shardings(config, shapes, mesh))
    state = train_step.state_shardings(config, mesh)
    a, b = lora.factors("decoder/layers/attention/q/kernel")
    assert flatten(shapes)[a].shape == (2, 32, 3) and flatten(shapes)[b].shape == (2, 3, 4, 8)
    assert where[a].spec == P(None, ("fsdp", "context"), None)
    assert where[b].spec == P(None, None, ("tensor",), None)
    moments = flatten(state.opt_state[1].mu)
    assert moments[a].spec == where[a].spec


def test_no_gradient_of_a_frozen_kernel_is_made(world):
    """The positive control is the same search in the step that trains kernels."""

    def products(config) -> set[tuple[int, ...]]:
        shapes = train_step.stage_shapes(config)
        batch = first_batch(config)
        totals = {k: jnp.ones(()) for k in get_stage("instruct").weights(batch, config)}
        grad = jax.grad(train_step.make_loss(config), has_aux=True)
        return set(_products(jax.make_jaxpr(grad)(*shapes, {}, batch, totals).jaxpr))

    kernel, turned = (32, 64), (64, 32)  # of mlp/gate, of mlp/down
    full, low = (
        products(world.config("instruct", lora=chosen)) for chosen in (LoraConfig(), ADAPTERS)
    )
    assert {kernel, turned} <= full
    assert not {kernel, turned} & low and (32, 2) in low


def _products(jaxpr):
    """Shapes of the results of all matrix products, inside scans too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.outvars[0].aval.shape
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _products(inner)


def test_a_kernel_with_an_adapter_is_frozen_whatever_trains_beside_it(world):
    config = world.config("instruct", lora=ADAPTERS, trainable=r"embedding/projector/.*|decoder/.*")
    trainable, frozen = (set(flatten(tree)) for tree in train_step.stage_shapes(config))
    adapters = {k for k in trainable if lora.is_adapter(k)}
    assert len(adapters) == 8
    assert "embedding/projector/fc1/kernel" in trainable
    assert {"decoder/layers/mlp/up/kernel", "decoder/norm/scale"} <= trainable
    assert {"decoder/layers/mlp/gate/kernel", "embedding/text/table"} <= frozen


def test_flops_count_what_trains(world):
    whole, align = (aot.model_flops(world.config(s)) for s in ("instruct", "align"))
    low = aot.model_flops(world.config("instruct", lora=ADAPTERS))
    more = aot.model_flops(world.config("instruct", lora=LoraConfig(4, 8.0, ADAPTERS.targets)))
    assert whole / 3 < low < align < whole  # no gradient goes back into the embedding module
    shapes = flatten(lora.shapes(world.config("instruct", lora=ADAPTERS))).values()
    config = world.config("instruct")
    assert more - low == 6 * config.data.rows * config.data.tokens * sum(x.size for x in shapes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "decoder/layer/.*"}, r"lora\.targets: 'decoder/layer/\.\*' matches no"),
        ({"targets": "decoder/.*kernel"}, "matches decoder/head/kernel, which is not the matrix"),
        ({"targets": "embedding/text/.*"}, "matches embedding/text/table, which is not"),
        ({"targets": "(q|k"}, r"lora\.targets: '\(q\|k' is no regular expression"),
        ({"rank": -1}, r"lora\.rank must not be negative"),
    ],
)
def test_a_bad_choice_of_targets_is_one_line(world, changes, message):
    with pytest.raises(UserError, match=message):
        train_step.stage_shapes(
            world.config("instruct", lora=LoraConfig(**({"rank": 2} | changes)))
        )


def test_what_trains_is_never_silently_less_than_asked_for(world):
    for changes in ({}, {"lora": ADAPTERS}):
        with pytest.raises(UserError, match="'decoder/nrom/.*' matches no parameter"):
            train_step.stage_shapes(
                world.config("instruct", trainable="decoder/nrom/.*", **changes)
            )
    with pytest.raises(UserError, match=r"trainable: '\*' is no regular expression"):
        world.config("instruct", trainable="*")
