"""HoVLE in JAX: monolithic vision-language pretraining for TPU pods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def load(model_dir: str | Path) -> tuple[Any, dict[str, Any]]:
    """(ModelConfig, parameters) of a native directory or a released HoVLE's Hugging Face one.

    Raises:
      UserError: the directory holds no model.
    """
    from hovle_jax import checkpoint
    from hovle_jax.config import ModelConfig, RunConfig
    from hovle_jax.errors import UserError
    from hovle_jax.hf import reader

    if reader.is_hugging_face(model_dir):
        return reader.read_hovle(model_dir)
    config, params = checkpoint.load(model_dir)
    model = config.model if isinstance(config, RunConfig) else config
    if not isinstance(model, ModelConfig):
        raise UserError(f"{model_dir}: holds a vision teacher, not a model")
    return model, params
