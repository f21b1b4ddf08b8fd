"""HoVLE in JAX: monolithic vision-language pretraining for TPU pods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def load(model_dir: str | Path) -> tuple[Any, dict[str, Any]]:
    """(ModelConfig, parameters) of a native or Hugging Face directory, in the files' dtypes.

    Raises:
      UserError: the directory holds no model.
    """
    from hovle_jax import checkpoint

    stored, params = checkpoint.load(model_dir)
    return stored.model, params
