"""The public PyTorch code of HoVLE beside ours: a process that takes turns with this one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from hovle_jax.checkpoint import save_model
from hovle_jax.config import IMAGE_MEAN, IMAGE_STD, ModelConfig, RunConfig
from hovle_jax.errors import UserError
from hovle_jax.hf.writer import ExportOptions, write_directory

WORKER = Path(__file__).parent / "torch_worker.py"
_CODE = "modeling_internvl_chat.py"


class Reference:
    """PyTorch on the same weights and batch; idle but for its turns (`run`)."""

    def __init__(
        self,
        code: str | Path,
        config: RunConfig,
        params: Any,
        batch: dict[str, np.ndarray],
        *,
        python: str = "",
        attention: str = "eager",
    ) -> None:
        """Starts the process and loads the model.

        code: directory of the public modelling code. python: an interpreter with torch and the
        transformers that code wants (default: this one). attention: eager, or flash: flash-attn
        where it is installed, else PyTorch's own fused kernel in its place.

        Raises:
          UserError: work the public code cannot do; no such directory; it does not run.
        """
        _check(config, batch)
        settings = {
            "attention": attention,
            "dtype": config.model.dtype,
            "clip_norm": config.optim.clip_norm,
            "lr": config.optim.lr,
            "betas": [config.optim.b1, config.optim.b2],
        }
        self._start(WORKER, code, config.model, params, _arguments(batch), settings, python)

    def _start(
        self,
        worker: Path,
        code: str | Path,
        model: ModelConfig,
        params: Any,
        arrays: dict[str, np.ndarray],
        settings: dict[str, Any],
        python: str,
    ) -> None:
        if not (Path(code) / _CODE).is_file():
            raise UserError(f"--reference {code}: no {_CODE}; give HoVLE's public modelling code")
        self._code = str(code)
        self._files = tempfile.TemporaryDirectory()
        scratch = Path(self._files.name)
        with contextlib.redirect_stderr(io.StringIO()):  # progress of the export
            save_model(scratch / "native", model, params)
            write_directory(scratch / "native", scratch / "hf", ExportOptions())
        np.savez(scratch / "batch.npz", **arrays)  # type: ignore[arg-type]
        # -P: this package's folder must not come first on the worker's path.
        command = [python or sys.executable, "-P", str(worker), str(Path(code).absolute())]
        self._errors = (scratch / "stderr").open("w+")
        try:
            self._process = subprocess.Popen(
                [*command, str(scratch / "hf"), str(scratch / "batch.npz"), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )
        except OSError as error:
            raise UserError(f"--python {python}: cannot be run ({error.strerror})") from None
        self.description: str = self._answer()["description"]

    def run(self, work: str, steps: int) -> dict[str, Any]:
        """{"seconds", "cpu_seconds" per step, "loss" of the first} of so many steps."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_answer` finds out why
            self._process.stdin.write(json.dumps({"work": work, "steps": steps}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
            self.close()
            raise UserError(f"--reference {self._code}: does not run in PyTorch: {last}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process and removes what it was given."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()
        self._files.cleanup()


GENERATE_WORKER = Path(__file__).with_name("generate_torch_worker.py")


class GenerateReference(Reference):
    """PyTorch answering one prompt greedily: by the public code, or by transformers with a cache on
    our exported directory."""

    def __init__(
        self,
        code: str | Path,
        config: ModelConfig,
        params: Any,
        prompt: np.ndarray,
        tiles: np.ndarray,
        *,
        work: str,
        python: str = "",
        attention: str = "eager",
    ) -> None:
        """As `Reference`. prompt: int32 [n]. tiles: uint8 [t, H, W, 3]. work: "public" or
        "transformers"; `run` of it.

        Raises:
          UserError: work the public code cannot do; no such directory; it does not run.
        """
        if config.shuffle_loc == "post" or config.dtype != "float32":
            raise UserError("--reference: generates in float32 with 'pre' models only")
        arrays = {"input_ids": prompt.astype(np.int64), "pixel_values": _channels_first(tiles)}
        settings = {"work": work, "attention": attention}
        self._start(GENERATE_WORKER, code, config, params, arrays, settings, python)

    def run(self, work: str, steps: int) -> dict[str, Any]:
        """{"tokens": `steps` of them, "seconds" and "cpu_seconds": of the first, then of all}."""
        return super().run(work, steps)


def _check(config: RunConfig, batch: dict[str, np.ndarray]) -> None:
    """Refuses what the public code has no way to compute."""
    if config.stage != "instruct" or config.trainable:
        raise UserError("--reference: trains everything on the next token: stage 'instruct' only")
    if config.optim.accumulate != 1:
        raise UserError("--reference: config.optim.accumulate must be 1")
    if batch["segment_ids"].max() > 1:
        raise UserError("--reference: without flash-attn it packs no samples: config.data.tiles=1")
    if config.model.shuffle_loc == "post" and config.data.rows > 1:
        raise UserError("--reference: config.data.rows must be 1 for a model with a long stream")


def _arguments(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch as the public code's `forward` takes it; pixels normalised, channels first."""
    return {
        "input_ids": batch["input_ids"].astype(np.int64),
        "labels": batch["labels"].astype(np.int64),
        "loss_weight": batch["loss_weight"],
        "pixel_values": _channels_first(batch["pixels"].reshape(-1, *batch["pixels"].shape[2:])),
    }


def _channels_first(tiles: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] -> normalised float32 [N, 3, H, W]."""
    mean, std = (np.asarray(x, np.float32) for x in (IMAGE_MEAN, IMAGE_STD))
    return np.moveaxis((tiles / np.float32(255) - mean) / std, -1, 1)
