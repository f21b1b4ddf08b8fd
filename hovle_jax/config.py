"""Every setting of a run as frozen dataclasses; where a run starts.

`configs/*.py` build an `ml_collections.ConfigDict` from these defaults, the command line overrides
leaves of it (`--config.optim.lr=1e-4`), and `RunConfig.from_config_dict` turns it back into typed,
validated, immutable dataclasses. A key that no dataclass knows is an error, never ignored.
"""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, field
from typing import Any

import ml_collections

from hovle_jax.errors import UserError
from hovle_jax.teaching import IMAGE_MEAN as IMAGE_MEAN
from hovle_jax.teaching import IMAGE_STD as IMAGE_STD
from hovle_jax.teaching import DistillConfig, MoreTeacher, TeacherConfig
from hovle_jax.typed import ask, check_fraction, check_regex, from_dict, one_of, to_dict

IGNORE = -100  # label of a token that is not predicted


@dataclass(frozen=True)
class LayersConfig:
    """A stack of causal layers (InternLM2-1.8B's), all alike unless `layer_types` differ.

    The holistic embedding module and the LLM are both such stacks.
    """

    num_layers: int = 8
    hidden_size: int = 2048
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 8192
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    rope_scaling: str = "none"  # none | linear | dynamic (NTK)
    rope_factor: float = 1.0
    max_positions: int = 32768
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and of k before they are rotated (Qwen3)
    # Names in nn.layers.LAYER_TYPES, repeated to `num_layers`:
    layer_types: tuple[str, ...] = ("attention",)
    mlp: str = "swiglu"  # nn.layers.MLPS
    mask: str = "causal"  # masks.MASKS: who sees later tokens of images
    positions: str = "1d"  # positions.POSITIONS: where image tokens stand for rotary embedding
    initializer_range: float = 0.02  # std of random weights; small models want about 1/sqrt(width)

    @property
    def types(self) -> tuple[str, ...]:
        """The type of each layer, first to last."""
        return self.layer_types * (self.num_layers // len(self.layer_types))

    @property
    def period(self) -> tuple[str, ...]:
        """The shortest run of types that gives `types` when repeated."""
        types = self.types
        sizes = (n for n in range(1, len(types) + 1) if len(types) % n == 0)
        return next(
            (types[:n] for n in sizes if types[:n] * (len(types) // n) == types), self.layer_types
        )

    def params_per_layer(self, kind: str = "attention") -> int:
        d, mlp = self.hidden_size, ask("hovle_jax.nn.layers:MLPS", self.mlp)
        return _layer_type(kind).params(self) + mlp.params(self) + 2 * d

    def params(self) -> int:
        return sum(map(self.params_per_layer, self.types))

    def mixing_flops(self, context: int) -> float:
        """Forward FLOPs per token, of all layers, that take no weights: attention's scores."""
        return sum(_layer_type(kind).mixing_flops(self, context) for kind in self.types)


@dataclass(frozen=True)
class ModelConfig:
    """HoVLE: patch embedding + holistic layers in front of an LLM (paper section 3).

    `shuffle_loc` says where each `shuffle` x `shuffle` block of patches becomes one token: 'pre'
    (HoVLE) before the holistic layers, 'post' (HoVLE-HD) after them, on image positions only.
    """

    name: str = "hovle_2b"
    vocab_size: int = 92553
    embedding: LayersConfig = field(default_factory=LayersConfig)
    decoder: LayersConfig = field(default_factory=lambda: LayersConfig(num_layers=24))
    image_size: int = 448
    patch_size: int = 14
    shuffle: int = 2
    shuffle_loc: str = "pre"
    compressor: str = "pixel_shuffle"  # patches of a tile -> its tokens (nn.compressors)
    projector: bool = True  # two-layer MLP after the shuffle; without it `shuffle` must be 1
    table_rows: int = 0  # of the text table; 0 = vocab_size. Ids past it read the table below
    special_tokens: int = 0  # rows of the separate special-token table (0 = no such table)
    initializer_range: float = 0.02  # of everything outside the stacks
    normalize_embeddings: bool = False  # divide the LLM's input by its L2 norm per token
    llm_family: str = "internlm2"  # hf.families: names and flags in Hugging Face files
    tie_head: bool = False  # such files keep the head as the LLM's own input table
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = 2
    im_end_id: int = 92542  # ends an answer
    img_start_id: int = 92544
    img_end_id: int = 92545
    img_context_id: int = 92546
    # How it is computed, not what: none of these changes a parameter.
    dtype: str = "bfloat16"
    remat: str = "full"  # nn.stack.REMAT_POLICIES
    attention: str = "auto"  # attention.IMPLEMENTATIONS; auto: what suits the device
    loss_chunk: int = 512  # tokens per row whose logits exist at one time
    # Modules, or .py files, that register what this config names (registry.py):
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of("model.shuffle_loc", self.shuffle_loc, ("pre", "post"))
        one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        ask("hovle_jax.hf.families:FAMILIES", self.llm_family)
        for name, stack in self.stacks.items():
            one_of(f"model.{name}.rope_scaling", stack.rope_scaling, ("none", "linear", "dynamic"))
            if stack.num_heads % stack.num_kv_heads:
                raise UserError(f"model.{name}.num_heads must be a multiple of num_kv_heads")
            if not stack.layer_types or stack.num_layers % len(stack.layer_types):
                raise UserError(
                    f"model.{name}.num_layers {stack.num_layers} is not a multiple of the "
                    f"{len(stack.layer_types)} in layer_types"
                )
            kinds = [_layer_type(kind) for kind in stack.period]
            ask("hovle_jax.nn.layers:MLPS", stack.mlp)
            ask("hovle_jax.nn.positions:POSITIONS", stack.positions)
            mask = ask("hovle_jax.nn.masks:MASKS", stack.mask)
            if mask is not None and not any(kind.masked for kind in kinds):
                raise UserError(
                    f"model.{name}.mask={stack.mask!r}: no layer of layer_types {stack.period} "
                    "can see later tokens"
                )
            for key in sorted(set.intersection(*(set(kind.ignores) for kind in kinds))):
                if getattr(stack, key) != getattr(LayersConfig, key):
                    raise UserError(
                        f"model.{name}.{key}={getattr(stack, key)!r}: no layer of layer_types "
                        f"{stack.period} has a use for it"
                    )
        if self.embedding.hidden_size != self.decoder.hidden_size:
            raise UserError("model.embedding.hidden_size must equal model.decoder.hidden_size")
        if self.image_size % self.patch_size:
            raise UserError(
                f"model.image_size {self.image_size} is not a multiple of patch_size "
                f"{self.patch_size}"
            )
        if self.grid**2 % self.tokens_per_tile and self.shuffle_loc == "post":
            raise UserError(
                f"model.shuffle_loc='post' needs as many patches ({self.grid**2}) for each of "
                f"{self.tokens_per_tile} tokens"
            )

    @property
    def stacks(self) -> dict[str, LayersConfig]:
        return {"embedding": self.embedding, "decoder": self.decoder}

    @property
    def hidden_size(self) -> int:
        return self.decoder.hidden_size

    @property
    def text_rows(self) -> int:
        return self.table_rows or self.vocab_size

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """`<IMG_CONTEXT>` tokens of one tile in the LLM's sequence (256 for the release)."""
        return int(self._compressor.tokens_per_tile(self))

    @property
    def token_grid(self) -> int:
        """Tokens along one side of a tile, where they are a square.

        Raises:
          UserError: they are none.
        """
        side = math.isqrt(self.tokens_per_tile)
        if side**2 != self.tokens_per_tile:
            raise UserError(
                f"model.compressor={self.compressor!r}: {self.tokens_per_tile} tokens of a tile "
                "are no square, to be held against a teacher's"
            )
        return side

    @property
    def patches_per_token(self) -> int:
        """Places of 'post' models' long stream that an image token takes."""
        return self.grid**2 // self.tokens_per_tile

    @property
    def extra_places_per_tile(self) -> int:
        """By how much a tile is longer in the holistic layers ('post') than in the LLM."""
        return self.grid**2 - self.tokens_per_tile if self.shuffle_loc == "post" else 0

    @property
    def compressor_params(self) -> int:
        return int(self._compressor.params(self))

    @property
    def _compressor(self) -> Any:
        return ask("hovle_jax.nn.compressors:COMPRESSORS", self.compressor)

    def params(self) -> int:
        """Parameters of the native tree (the released file adds two tensors nothing reads)."""
        d = self.hidden_size
        vision = 3 * self.patch_size**2 * d + d + (self.grid**2 + 1) * d
        tables = (self.text_rows + self.special_tokens) * d
        head = self.vocab_size * d
        stacks = self.embedding.params() + self.decoder.params()
        return vision + self.compressor_params + tables + stacks + d + head

    def flops_per_token(self, context: int) -> dict[str, float]:
        """Forward matmul FLOPs per token: 'embedding', 'decoder' (with attention), 'head'.

        `context` is the length of the sequence the token sits in; causal attention counts half of
        it. A training step costs three times this where weights are trained.
        """

        def stack(s: LayersConfig) -> float:
            norms = 2 * s.num_layers * s.hidden_size
            return 2.0 * (s.params() - norms) + s.mixing_flops(context)

        return {
            "embedding": stack(self.embedding),
            "decoder": stack(self.decoder),
            "head": 2.0 * self.hidden_size * self.vocab_size,
        }


@dataclass(frozen=True)
class DataConfig:
    """What is read and how it becomes static batches.

    A batch is `rows` rows of `tokens` tokens and at most `tiles` image tiles each.
    """

    meta: str = ""  # InternVL meta.json: the conversations of stages II and III
    repeat_mode: str = "exact"  # of repeat_time in `meta`: exact | internvl (rounds down)
    images: tuple[str, ...] = ()  # unpaired images of stage I: folders, tars, parquet, ...
    text: str = ""  # stage I: token shards, or a txt or jsonl file; '' = uniformly random ids
    text_ratio: float = 1.0  # stage I: text tokens per image token
    tokenizer: str = ""  # directory with tokenizer.model and added_tokens.json
    template: str = "internlm2-chat"
    system: str | None = None  # in place of the template's, where a record has none; '' = none
    rows: int = 8  # global batch
    tokens: int = 4096
    tiles: int = 12
    min_tiles: int = 1
    max_tiles: int = 12  # per image, before the thumbnail
    thumbnail: bool = True
    tiler: str = "dynamic"  # data.tilers.TILERS
    window: int = 1024  # samples packed together; larger fills rows better
    max_sources: int = 64  # most data sources of a run; fixes the shape of per-source metrics
    too_long: str = "error"  # a record that no row can hold: error | cut (whole turns) | drop
    holdout: int = 0  # every n-th record of each source is kept for evaluation; 0 = none
    max_bad: float = 0.0  # fraction of unreadable records that are left out and not an error
    index: str = ""  # directory of measured lengths, for runs that share data; '' = WORKDIR/index
    timeout: float = 600.0  # seconds to wait for the slowest host's batch before the run ends
    workers: int = 0  # grain worker processes; 0 = threads of this process

    def __post_init__(self) -> None:
        for name in ("rows", "tokens", "window", "max_sources"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} must be at least 1")
        for name in ("tiles", "text_ratio", "workers"):
            if getattr(self, name) < 0:
                raise UserError(f"data.{name} must not be negative")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise UserError(
                f"data.min_tiles must be from 1 to data.max_tiles, which is {self.max_tiles}; got "
                f"{self.min_tiles}"
            )
        check_fraction("data.max_bad", self.max_bad)
        one_of("data.repeat_mode", self.repeat_mode, ("exact", "internvl"))
        one_of("data.too_long", self.too_long, ("error", "cut", "drop"))
        if self.holdout < 0 or self.holdout == 1:
            raise UserError("data.holdout must be 0, or at least 2")


@dataclass(frozen=True)
class GroupConfig:
    """An optimizer group: the parameters whose path fully matches `regex`."""

    regex: str
    lr_scale: float = 1.0
    weight_decay: float = 0.0
    name: str = ""  # of its gradient norm in the metrics; '' = its number, from 0


@dataclass(frozen=True)
class OptimConfig:
    """An optimizer with a schedule. Every trainable parameter must match exactly one group."""

    name: str = "adamw"  # optim.OPTIMIZERS
    lr: float = 4e-5
    end_lr: float = 0.0
    schedule: str = "cosine"  # cosine | wsd | constant
    warmup: float = 0.03  # fraction of the steps
    decay: float = 0.1  # wsd: fraction of the steps at the end
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    moments: str = "float32"  # as held: float32 | bfloat16 | int8 (the first; the second bfloat16)
    clip_norm: float = 1.0  # 0 = off
    accumulate: int = 1  # micro-batches per step
    skip_nonfinite: bool = True  # leave the state alone when loss or gradient is not finite
    groups: tuple[GroupConfig, ...] = (
        GroupConfig(r".*/(kernel|\w*table|position)", 1.0, 0.05, "matrices"),
        GroupConfig(r".*/(scale|bias)", 1.0, 0.0, "vectors"),
    )

    def __post_init__(self) -> None:
        one_of("optim.schedule", self.schedule, ("cosine", "wsd", "constant"))
        for name in ("warmup", "decay"):
            check_fraction(f"optim.{name}", getattr(self, name))
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise UserError("optim.warmup and optim.decay together are more than all steps")
        if self.accumulate < 1:
            raise UserError("optim.accumulate must be at least 1")
        if self.clip_norm < 0:
            raise UserError("optim.clip_norm must not be negative (0 = off)")
        one_of("optim.moments", self.moments, ("float32", "bfloat16", "int8"))
        if self.moments != "float32" and self.name != "adamw":
            raise UserError(f"optim.moments={self.moments!r} is for adamw, not {self.name!r}")
        if self.moments != "float32" and self.b2 > 0.99:
            raise UserError(
                f"optim.moments={self.moments!r} needs optim.b2 of at most 0.99: bfloat16 does not "
                f"see a second moment change by {1 - self.b2:.2g} of itself"
            )
        for i, group in enumerate(self.groups):
            check_regex(f"optim.groups[{i}].regex", group.regex)
        names = self.group_names
        if len(set(names)) < len(names):
            raise UserError(f"optim.groups: two of them are named alike ({', '.join(names)})")

    @property
    def group_names(self) -> list[str]:
        return [group.name or str(i) for i, group in enumerate(self.groups)]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen kernels (lora.py).

    With a rank, adapters train and whatever `RunConfig.trainable` names beside them; a kernel that
    has an adapter never does.
    """

    rank: int = 0  # 0 = off
    alpha: float = 16.0  # adapters count alpha / rank times
    targets: str = r"decoder/layers/.*/kernel"  # regex over parameter paths

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError("lora.rank must not be negative (0 = off)")
        check_regex("lora.targets", self.targets)


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis inside one TPU slice; one axis may be -1 (all the rest)."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1


@dataclass(frozen=True)
class InitConfig:
    """Where parameters come from before the first step (a resumed run never looks here).

    Directories may be native or Hugging Face ones. Later sources win: random values (stage I's
    embedding module, anything with `scratch`), then `llm`, then `previous`.
    """

    llm: str = ""  # directory of an LLM, HoVLE or InternVL: decoder/* and the text table
    grow_vocab: bool = False  # tokens `llm` lacks start as the mean of its rows, plus noise
    teacher: str = ""  # directory of a teacher or InternVL (stage I)
    previous: str = ""  # work directory of the stage before
    scratch: bool = False  # what no source gives starts random, and stage order is not checked


@dataclass(frozen=True)
class GuardConfig:
    """What a run watches itself for, so that it ends or warns before it wastes days."""

    max_nonfinite: int = 10  # it ends after that many non-finite steps in a row; 0 = never
    # Warns of a loss that many deviations (scaled median absolute ones) above the median of the
    # last `spike_window` losses; 0 = never.
    spike: float = 10.0
    spike_window: int = 128
    # After a spike: back to the last checkpoint, on with the batches that come now; at most so
    # often in a run. 0 = only warn
    rewind: int = 0
    every: int = 0  # steps between checks of the parameters' digests; 0 = with every checkpoint
    # Seconds without a finished step after which stacks are dumped and the process ends; 0 = never
    step_timeout: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("max_nonfinite", "spike", "rewind", "every", "step_timeout"):
            if getattr(self, name) < 0:
                raise UserError(f"guards.{name} must not be negative")
        if self.spike_window < 2:
            raise UserError("guards.spike_window must be at least 2")
        if self.rewind and not self.spike:
            raise UserError("guards.rewind: needs guards.spike, else nothing is a spike")


@dataclass(frozen=True)
class RunConfig:
    """One stage of one run."""

    stage: str = "distill"  # stages.STAGES
    trainable: str = ""  # regex over parameter paths; '' = the stage's own, with lora: no others
    steps: int = 1000
    seed: int = 0
    log_every: int = 10
    save_every: int = 500  # 0 = only at the end
    keep: int = 2  # newest checkpoints kept
    keep_every: int = 0  # every checkpoint of a multiple of so many steps is kept, too; 0 = none
    keep_best: int = 0  # those with the lowest held-out loss, too (eval_every divides save_every)
    storage: str = ""  # checkpoints and frozen parameters lie here, or gs://; '' = work directory
    eval_every: int = 0  # steps between evaluations: held-out records (data.holdout), eval_tasks
    eval_tasks: tuple[str, ...] = ()  # "TASK=FILE" or "TASK:DIALECT=FILE": answered and scored then
    eval_questions: int = 256  # of each of them, at most: the first, with all rows of theirs
    eval_tokens: int = 64  # of an answer, at most
    tensorboard: bool = False  # metrics also go to WORKDIR/tensorboard
    wandb: str = ""  # metrics also go to this project of Weights & Biases
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: tuple[MoreTeacher, ...] = ()  # beside it
    distill: DistillConfig = field(default_factory=DistillConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    init: InitConfig = field(default_factory=InitConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        if self.seed < 0:  # numpy knows no such seed
            raise UserError("seed must not be negative")
        for name in ("steps", "log_every", "eval_questions", "eval_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1")
        for name in ("save_every", "keep", "keep_every", "keep_best", "eval_every"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative")
        if self.eval_every and not (self.data.holdout or self.eval_tasks):
            raise UserError("eval_every: needs data.holdout or eval_tasks, else there is nothing")
        if self.eval_tasks and not self.eval_every:
            raise UserError("eval_tasks: needs eval_every, else they are never asked")
        if self.keep_best and not self.data.holdout:
            raise UserError("keep_best: needs data.holdout, else there is no loss to go by")
        if self.keep_best and not (self.eval_every and self.save_every % self.eval_every == 0):
            raise UserError("keep_best: needs an eval_every that divides save_every")
        check_regex("trainable", self.trainable)

    def to_config_dict(self) -> ml_collections.ConfigDict:
        """A mutable copy for configs/*.py and command-line overrides."""
        # None fields (data.system) must stay assignable, hence no type safety for those.
        return ml_collections.ConfigDict(to_dict(self), convert_dict=True)

    @classmethod
    def from_config_dict(cls, config: typing.Mapping[str, Any]) -> RunConfig:
        raw = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
        return from_dict(cls, raw, "config")


def _layer_type(kind: str) -> Any:
    return ask("hovle_jax.nn.stack:LAYER_TYPES", kind)
