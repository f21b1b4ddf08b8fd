"""One optimizer step as a jitted function of (state, frozen parameters, batch).

Frozen parameters are a separate argument: they are never differentiated, have no optimizer state,
are not donated and not returned, so they cannot move.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hovle_jax import distill, heads, lora, losses, model, sharding
from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.nn import teacher
from hovle_jax.optim import group_norms, make_optimizer, make_schedule
from hovle_jax.stages import get_stage
from hovle_jax.tpu import chips
from hovle_jax.tree import flatten, merge, split, unflatten

Params = dict[str, Any]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: jax.Array  # int32: optimizer steps done
    skipped: jax.Array  # int32: of those, steps left out because they were not finite
    params: Params  # the trainable ones
    opt_state: optax.OptState


def trainable_regex(config: RunConfig) -> str:
    regex = config.trainable or get_stage(config.stage).trainable
    if config.lora.rank:
        regex = lora.trainable_regex(config)
    return f"(?:{regex})|{heads.PREFIX}.*" if heads.shapes(config) else regex


def stage_shapes(config: RunConfig) -> tuple[Params, Params]:
    """(trainable, frozen) trees of shapes: what the stage reads of the model, nothing more.

    Frozen parameters lie in memory in the dtype the model computes in: that is what every use casts
    them to.
    """
    stage = get_stage(config.stage)
    shapes = model.abstract_params(config.model)
    shapes = merge({part: shapes[part] for part in stage.parts}, lora.shapes(config))
    trainable, frozen = split(shapes | heads.shapes(config), trainable_regex(config))
    own = [path for path in flatten(trainable) if not path.startswith(heads.PREFIX)]
    if not own or (config.trainable and all(map(lora.is_adapter, own))):
        regex = config.trainable or stage.trainable
        raise UserError(f"config.trainable: {regex!r} matches no parameter of stage {stage.name!r}")
    text = next((path for path in own if path.startswith("embedding/text/")), None)
    if text and stage.teacher and "text" in _terms(config):
        regex = config.trainable or stage.trainable
        raise UserError(
            f"config.trainable: {regex!r} matches {text}, which stage {stage.name!r} has for its "
            "target: text and target would become all alike; leave it out"
        )
    dtype = jnp.dtype(config.model.dtype)
    return trainable, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), frozen)


def _terms(config: RunConfig) -> Any:
    """Names of the stage's losses."""
    return jax.eval_shape(
        lambda x: get_stage(config.stage).weights(x, config), batch_shapes(config)
    )


def batch_shapes(config: RunConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """One global batch, as `data.pipeline.Pipeline` makes it."""
    data, size = config.data, config.model.image_size
    shape = (data.rows, data.tokens)
    names = ("input_ids", "segment_ids", "position_ids", "labels", "source_ids")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    batch["loss_weight"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    batch["pixels"] = jax.ShapeDtypeStruct((data.rows, data.tiles, size, size, 3), jnp.uint8)
    return batch


def check_batch(config: RunConfig, mesh: jax.sharding.Mesh) -> None:
    """Refuses a batch that the mesh does not divide."""
    c, data = config.model, config.data
    sharding.check_rows(data.rows, config.optim.accumulate, mesh)
    sharding.check_length(data.tokens, "config.data.tokens", mesh)
    if c.shuffle_loc == "post":
        long = data.tokens + data.tiles * c.extra_places_per_tile
        sharding.check_length(long, "the long stream of config.data.tokens and tiles", mesh)


def param_shardings(config: RunConfig, shapes: Params, mesh: jax.sharding.Mesh) -> Params:
    """Shardings of any subtree of the model's parameters."""
    axes = _axes(config)
    flat = {
        path: jax.sharding.NamedSharding(mesh, sharding.spec(axes[path], x.shape, mesh))
        for path, x in flatten(shapes).items()
    }
    return unflatten(flat)


def _axes(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """{path: axis names} of all that may train."""
    return flatten(model.param_axes(config.model)) | lora.axes(config) | heads.axes(config)


def teacher_shardings(config: RunConfig, mesh: jax.sharding.Mesh) -> Params:
    """Of what `teacher_shapes` gives."""
    axes = [teacher.param_axes(t.config) for t in distill.run_teachers(config)]
    return sharding.tree_shardings(distill.teacher_tree(axes), teacher_shapes(config), mesh)


def teacher_shapes(config: RunConfig) -> Params:
    """All teachers of a run as shapes."""
    shapes = [teacher.abstract_params(t.config) for t in distill.run_teachers(config)]
    return distill.teacher_tree(shapes)


def state_shapes(config: RunConfig) -> TrainState:
    trainable, _ = stage_shapes(config)
    tx = make_optimizer(config.optim, config.steps, trainable)
    return jax.eval_shape(functools.partial(new_state, tx=tx), trainable)


def new_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    # Two arrays, not one: both are donated, and a buffer can be donated only once.
    return TrainState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), params, tx.init(params))


def state_shardings(config: RunConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Optimizer moments lie where their parameters lie; counters are replicated."""
    shapes = state_shapes(config)
    axes = _axes(config)

    def place(path: Any, x: Any) -> jax.sharding.NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        param = next((p for p in axes if name.endswith("/" + p)), None)
        if param and len(axes[param]) != x.ndim:
            param = None  # a summary of the parameter, as Adafactor's: small, so whole everywhere
        spec = sharding.spec(axes[param], x.shape, mesh) if param else jax.sharding.PartitionSpec()
        return jax.sharding.NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, shapes)


def make_loss(config: RunConfig) -> Callable[..., tuple[jax.Array, Metrics]]:
    """(trainable, frozen, teacher params, batch, total weights) -> (loss, its parts).

    Total weights: {term: sum of `Stage.weights`} of the whole batch, of which `batch` may be a
    part. Parts: {term: share of the loss} and {term/source: weighted losses, [max_sources]}; those
    of the parts of a batch add up.
    """
    stage = get_stage(config.stage)

    def loss(
        trainable: Params, frozen: Params, teacher_params: Params, batch: Any, totals: Metrics
    ) -> tuple[jax.Array, Metrics]:
        params = lora.join(frozen, trainable, config.lora)
        values = stage.terms(params, teacher_params, batch, config)
        weights = stage.weights(batch, config)
        _check_terms(config, values, weights)
        weighted = {k: values[k] * w for k, w in weights.items()}
        shares = {k: jnp.sum(x) / jnp.maximum(totals[k], 1e-6) for k, x in weighted.items()}
        by_source = {f"{k}/source": _by_source(x, batch, config) for k, x in weighted.items()}
        return jnp.sum(jnp.stack(list(shares.values()))), shares | by_source

    return loss


def _check_terms(config: RunConfig, values: Metrics, weights: Metrics) -> None:
    """A loss of another shape would be broadcast, one without a weight left out."""
    for term in sorted({*values, *weights}):
        loss, weight = (list(x[term].shape) if term in x else "none" for x in (values, weights))
        if loss != weight:
            raise UserError(
                f"config.stage {config.stage!r}, term {term!r}: shape of the losses {loss}, of "
                f"their weights {weight}; both must be [rows, tokens]"
            )


def make_step(config: RunConfig) -> Callable[..., tuple[TrainState, Metrics]]:
    """(state, frozen, teacher params, batch) -> (state, metrics). Pure; `jit_step` compiles it."""
    stage = get_stage(config.stage)
    trainable, _ = stage_shapes(config)
    tx = make_optimizer(config.optim, config.steps, trainable)
    schedule = make_schedule(config.optim, config.steps)
    grad_fn = jax.value_and_grad(make_loss(config), has_aux=True)

    def step(
        state: TrainState, frozen: Params, teacher_params: Params, batch: Any
    ) -> tuple[TrainState, Metrics]:
        # Weights depend on the batch alone, so every micro-batch can divide by the whole's.
        weights = stage.weights(batch, config)
        totals = jax.tree.map(jnp.sum, weights)

        def gradients(part: Any) -> Any:
            return grad_fn(state.params, frozen, teacher_params, part, totals)

        (loss, parts), gradient = sum_of_groups(gradients, config.optim.accumulate, batch)
        norm = optax.tree.norm(gradient)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        skipped = state.skipped
        if config.optim.skip_nonfinite:
            ok = jnp.isfinite(loss) & jnp.isfinite(norm)
            params, kept = jax.tree.map(
                lambda new, old: jnp.where(ok, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
            # Its last part is the schedule, which follows the steps, those left out among them.
            opt_state = (*kept[:-1], opt_state[-1])
            skipped = skipped + (~ok).astype(jnp.int32)
        metrics = {"loss": loss, "grad_norm": norm, "lr": schedule(state.step), "skipped": skipped}
        for name, part in group_norms(config.optim, gradient).items():
            metrics[f"grad_norm/{name}"] = part
        for name, weight in weights.items():
            metrics[f"loss/{name}"] = parts[name]
            of_source = jnp.maximum(_by_source(weight, batch, config), 1e-6)
            metrics[f"source/loss/{name}"] = parts[f"{name}/source"] / of_source
        metrics |= _counts(batch, config)
        return TrainState(state.step + 1, skipped, params, opt_state), metrics

    return step


def sum_of_groups(fn: Callable[[Any], Any], groups: int, batch: Any) -> Any:
    """What `fn` gives of a batch as a sum over its rows, `groups` parts one after the other."""
    if groups == 1:
        return fn(batch)

    def split_rows(x: jax.Array) -> jax.Array:
        # Strided, so that each group keeps its rows on the devices that already hold them.
        return x.reshape(x.shape[0] // groups, groups, *x.shape[1:]).swapaxes(0, 1)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, fn(part)), None

    parts = jax.tree.map(split_rows, batch)
    shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], parts))
    total, _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), parts)
    return total


def _by_source(values: jax.Array, batch: Any, config: RunConfig) -> jax.Array:
    """[max_sources] sums of [B, S]; a batch that names no sources is of the first one."""
    ids = batch.get("source_ids", jnp.zeros(values.shape, jnp.int32))
    return losses.sum_by_source(values, ids, config.data.max_sources)


def _counts(batch: Any, config: RunConfig) -> Metrics:
    """How much of the static shape is real: users tune data.tokens and data.tiles by these.

    Names in "source/" are per data source, [max_sources].
    """
    segments, ids = batch["segment_ids"], batch["input_ids"]
    image_tokens = jnp.sum((ids == config.model.img_context_id) & (segments > 0))
    out = {"tokens": jnp.sum(segments > 0), "tiles": image_tokens // config.model.tokens_per_tile}
    out["token_fill"] = out["tokens"] / segments.size
    first = (segments > 0) & (batch["position_ids"] == 0)
    out["source/samples"] = _by_source(first, batch, config)
    out["source/tokens"] = _by_source(segments > 0, batch, config)
    if "pixels" in batch:
        b, n = batch["pixels"].shape[:2]
        out["tile_fill"] = out["tiles"] / (b * n)
    return out


def jit_step(config: RunConfig, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    """The compiled step for `mesh`; call it under `jax.set_mesh(mesh)`. Donates the state."""
    _, frozen = stage_shapes(config)
    state = state_shardings(config, mesh)
    teach = teacher_shardings(config, mesh) if get_stage(config.stage).teacher else {}
    return jax.jit(
        make_step(config),
        donate_argnums=0,
        in_shardings=(
            state,
            param_shardings(config, frozen, mesh),
            teach,
            sharding.batch_sharding(mesh),
        ),
        out_shardings=(state, sharding.replicated(mesh)),
        compiler_options=chips.compiler_options(mesh.devices.flat[0].device_kind),
    )
