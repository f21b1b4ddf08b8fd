"""What a stage may start from: nothing that would only show as bad results."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from hovle_jax import model
from hovle_jax.checkpoint import Stored, load, save_model
from hovle_jax.config import LayersConfig, MeshConfig, ModelConfig, RunConfig, TeacherConfig
from hovle_jax.errors import UserError
from hovle_jax.initialize import check_model, check_order, check_same_table, initial_params
from hovle_jax.nn.layers import MLPS, SwiGLU
from hovle_jax.sharding import make_mesh
from hovle_jax.stages import get_stage
from hovle_jax.tree import flatten
from tests import small

# Of a stack: what parameters show, by their shapes; what acts at the beginning, or past the trained
# length; and what is looked at, with another value.
SHOWN = {"num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"}
FREE = {"initializer_range", "max_positions"}
STACK = {
    "rms_norm_eps": 1e-2,
    "rope_theta": 7.0,
    "rope_scaling": "linear",
    "rope_factor": 4.0,
    "qkv_bias": True,
    "out_bias": True,
    "qk_norm": True,
    "mlp": "another",
    "layer_types": ("attention", "linear_attention"),
    "mask": "prefix",
    "positions": "2d",
}
WHOLE = {"shuffle_loc": "post", "shuffle": 1, "projector": False, "normalize_embeddings": True}


def changed(stack: str, key: str, value: object) -> ModelConfig:
    """small.PRE with another value, and what that needs."""
    base = dataclasses.replace(small.PRE, shuffle=1) if key == "projector" else small.PRE
    if not stack:
        return dataclasses.replace(base, **{key: value})
    more = {"rope_scaling": "linear"} if key == "rope_factor" else {}
    layers = dataclasses.replace(getattr(base, stack), **{key: value}, **more)
    return dataclasses.replace(base, **{stack: layers})


def paths_of(config: ModelConfig) -> set[str]:
    """Some of the model's, by hand: making it takes a second."""
    paths = {"embedding/vision/x", "embedding/text/table", "decoder/head/kernel"}
    paths |= {"embedding/projector/x"} if config.projector else set()
    paths |= {"embedding/text/special_table"} if config.special_tokens else set()
    for name in ("embedding", "decoder"):
        stack = getattr(config, name)
        of = {"qkv_bias": stack.qkv_bias, "out_bias": stack.out_bias, "qk_norm": stack.qk_norm}
        kinds = "/".join(stack.period)
        paths |= {f"{name}/layers/{kinds}/{x}" for x in ("q", *(k for k, v in of.items() if v))}
    return paths


def stored(config: ModelConfig | RunConfig, *parts: str) -> Stored:
    """A directory that has these parts of the model; nothing of it is read."""
    of = config.model if isinstance(config, RunConfig) else config
    paths = [path for path in paths_of(of) if path.startswith(parts)]
    return Stored("runs/before", config, None, trees=((epath.Path("x"), dict.fromkeys(paths)),))


def check(before: ModelConfig, after: ModelConfig, *parts: str) -> None:
    wanted = dict.fromkeys(paths_of(after))
    check_model(stored(before, *parts), RunConfig(stage="align", model=after), wanted)


def test_every_setting_of_a_stack_is_thought_of():
    assert {field.name for field in dataclasses.fields(LayersConfig)} == SHOWN | FREE | {*STACK}


@pytest.mark.parametrize(
    ("stack", "key", "value"),
    [(stack, *item) for stack in ("embedding", "decoder") for item in STACK.items()]
    + [("", *item) for item in WHOLE.items()],
)
def test_the_next_stage_keeps_what_no_parameter_tells(stack, key, value, monkeypatch):
    """Whichever of the two is the unusual one, and only where the part comes from there."""
    monkeypatch.setitem(MLPS, "another", SwiGLU)
    base = changed("", "shuffle", 1) if key == "projector" else small.PRE
    base = changed(stack, "rope_scaling", "linear") if key == "rope_factor" else base
    other = changed(stack, key, value)
    check(base, base, "embedding", "decoder")
    part = f"model.{stack}" if stack else "model"
    for before, after in ((base, other), (other, base)):
        with pytest.raises(UserError, match=f"^config.{part}.{key} is .* runs/before has ") as e:
            check(before, after, "embedding", "decoder")
        assert "\n" not in str(e.value)
        check(before, after, "decoder" if stack != "decoder" else "embedding")
        check(before, after, "embedding/text/")


def test_nothing_that_was_trained_is_left_out():
    before = dataclasses.replace(small.PRE, special_tokens=4)
    with pytest.raises(
        UserError, match="has embedding/text/special_table, but config.model has no"
    ):
        check(before, small.PRE, "embedding")
    check(before, small.PRE, "decoder")


def test_the_decoder_is_of_the_llm_whose_table_was_distilled():
    table, path = jnp.arange(small.PRE.vocab_size * 4.0).reshape(-1, 4), "embedding/text/table"
    table = jax.device_put(table, jax.sharding.NamedSharding(jax.make_mesh((1,), "x"), jax.P()))
    one = RunConfig(stage="distill", model=small.PRE, teacher=TeacherConfig(out_size=32))
    fewer = dataclasses.replace(small.PRE, vocab_size=91)  # the rest was made up
    decoder = {"decoder/head/kernel": None}

    def look(row: int, run: RunConfig = one, previous: dict = {}, llm: ModelConfig = fewer) -> None:  # noqa: B006
        of_llm = decoder | {path: table.at[row, 2].add(1e-3)}
        check_same_table(stored(llm), stored(run), of_llm, previous | {path: table})

    for row in (0, 90):
        with pytest.raises(UserError, match="^config.init.llm: .* has another text table than"):
            look(row)
    with pytest.raises(UserError, match="has another text table"):
        look(95, llm=small.PRE)
    look(91)
    look(0, previous=decoder)  # whose LLM is not read
    look(0, run=dataclasses.replace(one, stage="align"))  # which trains the table


def test_a_stage_goes_on_from_a_model(world, tmp_path):
    """As from the released one: whole and with the same settings, or not at all."""
    path = tmp_path / "released"
    save_model(path, world.model, model.init(jax.random.key(3), world.model))
    config = world.config("instruct", init__previous=str(path), init__llm="")
    stage, mesh = get_stage("instruct"), make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    check_order(config, stage)
    params = flatten(initial_params(config, stage, mesh))
    for name, x in flatten(load(path)[1]).items():
        np.testing.assert_array_equal(params[name], x)
    other = dataclasses.replace(world.model, shuffle_loc="post")
    with pytest.raises(UserError, match="^config.model.shuffle_loc is 'post', but"):
        initial_params(dataclasses.replace(config, model=other), stage, mesh)
    save_model(
        path, world.model, {"decoder": model.init(jax.random.key(3), world.model)["decoder"]}
    )
    with pytest.raises(UserError, match="no source has embedding/"):
        initial_params(config, stage, mesh)
