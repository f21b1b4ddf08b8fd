"""A directory of ours against a Hugging Face directory run by PyTorch, on prompts made up here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hovle_jax import model
from hovle_jax.config import ModelConfig
from hovle_jax.errors import UserError
from hovle_jax.hf.cases import STATES, CaseReport, Comparison
from hovle_jax.hf.verify import Verifier

NEW_TOKENS = 12
TILES = (0, 1, 3)  # of the prompts
_WORKER = Path(__file__).parent / "torch_worker.py"


def available() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def made_up_prompts(config: ModelConfig) -> dict[str, np.ndarray]:
    """Random ids around 0, 1 and 3 random tiles: {"ids.N", "pixels.N"} as `torch_worker` reads."""
    rng = np.random.default_rng(0)
    words = np.setdiff1d(np.arange(3, config.vocab_size), [config.img_context_id])
    out: dict[str, np.ndarray] = {"new": np.array(NEW_TOKENS)}
    for tiles in TILES:
        ids = rng.choice(words, 20)
        if tiles:
            places = np.full(tiles * config.tokens_per_tile, config.img_context_id)
            ids = np.concatenate(
                [ids[:4], [config.img_start_id], places, [config.img_end_id], ids[4:]]
            )
            size = config.image_size
            pixels = rng.standard_normal((tiles, 3, size, size)).astype(np.float32)
            out[f"pixels.{tiles}"] = pixels
        out[f"ids.{tiles}"] = ids.astype(np.int64)
    return out


def torch_outputs(directory: str | Path, prompts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What PyTorch makes of the prompts, in a process that cannot see this package.

    Raises:
      UserError: torch or transformers is missing, or the directory does not run.
    """
    if not available():
        raise UserError("comparing with PyTorch needs torch and transformers: pip install '.[hf]'")
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch) / "in.npz", Path(scratch) / "out.npz"
        np.savez(given, **prompts)  # type: ignore[arg-type]
        # -P: this package's folder must not come first on the worker's path.
        command = [sys.executable, "-P", str(_WORKER), str(directory), str(given), str(made)]
        environment = os.environ | {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            last = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{directory}: does not run in PyTorch: {last}")
        with np.load(made) as z:
            return dict(z)


def batch_of(prompts: dict[str, np.ndarray], tiles: int) -> dict[str, Any]:
    """The made-up prompt with so many tiles as a batch of one row."""
    batch = {"input_ids": jnp.asarray(prompts[f"ids.{tiles}"][None], jnp.int32)}
    if tiles:
        batch["pixels"] = jnp.asarray(np.moveaxis(prompts[f"pixels.{tiles}"], 1, -1)[None])
    return batch


def compare_live(verifier: Verifier, hf_dir: str | Path) -> CaseReport:
    """Logits (and, of exports, greedy tokens) of both for 0, 1 and 3 tiles.

    verifier: computes in float32.
    """
    config, params = verifier.whole_model()
    prompts = made_up_prompts(config)
    theirs = torch_outputs(hf_dir, prompts)
    found = []
    for tiles in TILES:
        ids = prompts[f"ids.{tiles}"]
        batch = batch_of(prompts, tiles)
        empty = np.zeros((1, 0, config.image_size, config.image_size, 3), np.float32)
        own = np.asarray(batch.get("pixels", empty))[0]
        logits = np.asarray(model.apply(params, batch, config)["logits"])[0]
        difference = float(np.abs(logits - theirs[f"logits.{tiles}"]).max())
        found.append(Comparison(f"logits, {tiles} tiles", difference, STATES))
        if f"tokens.{tiles}" in theirs:
            expected = theirs[f"tokens.{tiles}"].tolist()
            ours = verifier.greedy([ids.astype(np.int32)], [own], len(expected))[0]
            wrong = float(sum(a != b for a, b in zip(ours, expected, strict=True)))
            found.append(Comparison(f"greedy tokens, {tiles} tiles", wrong, 0.0))
    return CaseReport(f"PyTorch {hf_dir}", tuple(found), ())
