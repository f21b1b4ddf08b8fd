"""The LLM behind the holistic embedding: a Llama-shaped decoder (`hf.families`).

Token embedding is not here: HoVLE's LLM reads vectors, whatever modality they came from.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from hovle_jax.config import ModelConfig
from hovle_jax.nn.layers import Cache, LayerInputs, Linear, RMSNorm
from hovle_jax.nn.stack import layer_stack, run_stack


class Decoder(nn.Module):
    config: ModelConfig
    keep_cache: bool = False
    keep_hidden: bool = False
    cached: bool = False

    def setup(self) -> None:
        c = self.config
        self.layers = layer_stack(
            c.decoder,
            c.attention,
            c.remat,
            keep_cache=self.keep_cache,
            keep_hidden=self.keep_hidden,
            cached=self.cached,
        )
        self.norm = RMSNorm(c.decoder.rms_norm_eps)
        self.head = Linear((c.vocab_size,), ("embed", "vocab"), c.initializer_range)

    def __call__(
        self, x: jax.Array, inputs: LayerInputs, cache: Cache | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """LLM input [B, S, E] -> (hidden states after the final norm [B, S, E], extras)."""
        x, extras = run_stack(self.layers, x, inputs, cache)
        if self.is_initializing():
            self.head(x)  # the head is applied by losses and decoding, from its kernel
        return self.norm(x), extras
