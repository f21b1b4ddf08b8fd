"""Families of LLMs: the same layer under other names, with other flags, in another config.json.

A family is everything that differs: what its tensors are called, which flags of `LayersConfig` its
layers have, and how config.json says so. Its name is config.json's `model_type`. `FAMILIES` is read
in both directions: import and export know no family by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hovle_jax.config import LayersConfig
from hovle_jax.errors import UserError
from hovle_jax.hf.rows import Arrays, Row, linear, reshaped, same
from hovle_jax.hf.section import Section
from hovle_jax.registry import Registry

# Fields of LayersConfig that families differ in.
FLAGS = ("qkv_bias", "out_bias", "qk_norm")


@dataclass(frozen=True)
class Family:
    architecture: str  # the class in config.json; transformers' own, or InternLM2's in hf/remote
    # (prefix of the names, native path of the stack, its config) -> a row per tensor of a layer
    layers: Callable[[str, str, LayersConfig], list[Row]]
    table: str = "embed_tokens"  # the input table
    head: str = "lm_head"
    flags: Mapping[str, bool] = field(default_factory=dict)  # of FLAGS, those that are true
    bias_key: str = ""  # of config.json: biases in q, k, v and o; '' = as `flags` say
    head_dim: bool = True  # config.json may say it; else it is hidden_size / heads
    keys: Mapping[str, Any] = field(default_factory=dict)  # of config.json; no other value is read
    unread: Mapping[str, Any] = field(default_factory=dict)  # what only its own code reads

    def read(self, raw: Section) -> dict[str, Any]:
        """config.json -> FLAGS.

        Raises:
          UserError: a setting that the layers here do not have.
        """
        for key, value in self.keys.items():
            if key in raw and raw[key] != value:
                raise raw.expected(key, repr(value))
        found: dict[str, Any] = {flag: self.flags.get(flag, False) for flag in FLAGS}
        if self.bias_key:
            bias = raw.flag(self.bias_key, False)
            found |= {"qkv_bias": bias, "out_bias": bias}
        return found

    def write(self, name: str, c: LayersConfig) -> dict[str, Any]:
        """What config.json says of a stack beside what all families say alike.

        Raises:
          UserError: a stack that this family cannot have.
        """
        allowed = {flag: self.flags.get(flag, False) for flag in FLAGS}
        out = {**self.keys, **self.unread}
        if self.bias_key:
            allowed |= {"qkv_bias": c.qkv_bias, "out_bias": c.qkv_bias}
            out[self.bias_key] = c.qkv_bias
        for flag, value in allowed.items():
            if getattr(c, flag) != value:
                raise UserError(
                    f"model.decoder.{flag} is {getattr(c, flag)}, but {value} in an LLM of family "
                    f"{name!r}"
                    + (" with such q, k and v" if self.bias_key and flag == "out_bias" else "")
                )
        if self.head_dim:
            out["head_dim"] = c.head_dim
        elif c.head_dim * c.num_heads != c.hidden_size:
            raise UserError("model.decoder: num_heads x head_dim is not hidden_size")
        return out


FAMILIES: Registry[Family] = Registry("model.llm_family")


def family_of(architecture: str, model_type: str) -> str:
    """The name of the family that config.json means; by the class where it names one.

    Raises:
      UserError: none that is registered.
    """
    found = {family.architecture: name for name, family in FAMILIES.items()}
    name = found.get(architecture, "" if architecture else model_type)
    if name not in FAMILIES:
        raise UserError(
            f"LLM {(architecture or model_type)!r} is not one of {', '.join(found)}, nor of a "
            "family that a plug-in adds"
        )
    return name


def internlm2_layers(hf: str, native: str, c: LayersConfig) -> list[Row]:
    """`wqkv` rows are grouped per kv head: [its query heads..., key, value] x head size."""
    group = c.num_heads // c.num_kv_heads
    e, dh, kv, n = c.hidden_size, c.head_dim, c.num_kv_heads, c.num_layers

    def split(x: np.ndarray) -> Arrays:
        x = x.reshape(kv, group + 2, dh, *x.shape[1:])
        q = x[:, :-2].reshape(c.num_heads, dh, *x.shape[3:])
        return tuple(np.moveaxis(y, (0, 1), (-2, -1)) for y in (q, x[:, -2], x[:, -1]))

    def join(arrays: Arrays) -> np.ndarray:
        q, k, v = (np.moveaxis(y, (-2, -1), (0, 1)) for y in arrays)
        q = q.reshape(kv, group, dh, *q.shape[2:])
        x = np.concatenate([q, k[:, None], v[:, None]], axis=1)
        return x.reshape(-1, *x.shape[3:])

    def qkv(leaf: str) -> tuple[str, ...]:
        return tuple(f"{native}/attention/{p}/{leaf}" for p in "qkv")

    width = kv * (group + 2) * dh
    attention = f"{hf}.attention"
    rows = [
        same(f"{hf}.attention_norm.weight", f"{native}/attention_norm/scale", (e,), n),
        Row(f"{attention}.wqkv.weight", qkv("kernel"), (width, e), split, join, n),
        linear(
            f"{attention}.wo.weight", f"{native}/attention/o/kernel", (c.num_heads, dh, e), 2, n
        ),
        same(f"{hf}.ffn_norm.weight", f"{native}/mlp_norm/scale", (e,), n),
        *_mlp(f"{hf}.feed_forward", ("w1", "w3", "w2"), native, c),
    ]
    if c.qkv_bias:
        rows.append(Row(f"{attention}.wqkv.bias", qkv("bias"), (width,), split, join, n))
    if c.out_bias:
        rows.append(same(f"{attention}.wo.bias", f"{native}/attention/o/bias", (e,), n))
    return rows + _qk_norms(attention, native, c)


def llama_layers(hf: str, native: str, c: LayersConfig) -> list[Row]:
    """Llama, Qwen and their like: separate projections, heads in order."""
    e, dh, n = c.hidden_size, c.head_dim, c.num_layers
    attention, ours = f"{hf}.self_attn", f"{native}/attention"
    rows = [
        same(f"{hf}.input_layernorm.weight", f"{native}/attention_norm/scale", (e,), n),
        linear(f"{attention}.o_proj.weight", f"{ours}/o/kernel", (c.num_heads, dh, e), 2, n),
        same(f"{hf}.post_attention_layernorm.weight", f"{native}/mlp_norm/scale", (e,), n),
        *_mlp(f"{hf}.mlp", ("gate_proj", "up_proj", "down_proj"), native, c),
    ]
    for p, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
        name = f"{attention}.{p}_proj"
        rows.append(linear(f"{name}.weight", f"{ours}/{p}/kernel", (e, heads, dh), 1, n))
        if c.qkv_bias:
            shape = (heads, dh)
            rows.append(reshaped(f"{name}.bias", f"{ours}/{p}/bias", (heads * dh,), shape, n))
    if c.out_bias:
        rows.append(same(f"{attention}.o_proj.bias", f"{ours}/o/bias", (e,), n))
    return rows + _qk_norms(attention, native, c)


def _mlp(hf: str, parts: Sequence[str], native: str, c: LayersConfig) -> list[Row]:
    e, f, n = c.hidden_size, c.intermediate_size, c.num_layers
    kernels = {"gate": (e, f), "up": (e, f), "down": (f, e)}
    return [
        linear(f"{hf}.{part}.weight", f"{native}/mlp/{ours}/kernel", kernel, 1, n)
        for part, (ours, kernel) in zip(parts, kernels.items(), strict=True)
    ]


def _qk_norms(hf: str, native: str, c: LayersConfig) -> list[Row]:
    """Norms over each head of q and of k, where the stack has them."""
    names = ("q_norm", "k_norm") if c.qk_norm else ()
    return [
        same(f"{hf}.{x}.weight", f"{native}/attention/{x}/scale", (c.head_dim,), c.num_layers)
        for x in names
    ]


FAMILIES.add("internlm2")(
    Family(
        "InternLM2ForCausalLM",
        internlm2_layers,
        table="tok_embeddings",
        head="output",
        bias_key="bias",
        head_dim=False,
        unread={"attn_implementation": "eager"},  # ours takes an argument
    )
)
FAMILIES.add("llama")(
    Family("LlamaForCausalLM", llama_layers, bias_key="attention_bias", keys={"mlp_bias": False})
)
FAMILIES.add("qwen2")(
    Family(
        "Qwen2ForCausalLM",
        llama_layers,
        flags={"qkv_bias": True},
        keys={"use_sliding_window": False},
    )
)
FAMILIES.add("qwen3")(
    Family(
        "Qwen3ForCausalLM",
        llama_layers,
        flags={"qk_norm": True},
        bias_key="attention_bias",
        keys={"use_sliding_window": False},
    )
)
