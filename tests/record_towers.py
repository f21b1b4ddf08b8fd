"""Small random vision towers and their outputs, by transformers: python record_towers.py OUT SEED.

Writes OUT/NAME/ (config.json, preprocessor_config.json, model.safetensors in float16, io.npz) for
each tower. tests/golden/towers was made with SEED 0 under transformers 5.23; test_teachers.py reads
it, and with torch installed makes others. Imports neither jax nor the package.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

SIZE = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 3}
HALF = [0.5] * 3


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Away from the ones and zeros of a fresh model, to numbers that float16 holds."""
    generator = torch.Generator().manual_seed(seed)
    for x in model.parameters():
        noise = torch.randn(x.shape, generator=generator) * (0.3 if x.ndim == 1 else 0.15)
        x.data = (noise + (1 if torch.all(x == 1) and x.numel() else 0)).half().float()


def main(out: str, seed: int) -> None:
    siglip = SiglipVisionConfig(image_size=30, patch_size=7, **SIZE, **HEADS)
    naflex = Siglip2VisionConfig(
        patch_size=4, num_patches=16, vision_use_head=False, **SIZE, **HEADS
    )
    plain = DINOv3ViTConfig(
        image_size=24, patch_size=8, num_register_tokens=3, rope_theta=50.0, **SIZE, **HEADS
    )
    gated = DINOv3ViTConfig(
        **(plain.to_dict() | {"use_gated_mlp": True, "hidden_act": "silu"}),
    )
    towers = {
        "siglip": (SiglipVisionModel(siglip), 30, HALF, HALF),
        "naflex": (Siglip2VisionModel(naflex), 16, HALF, HALF),
        "dinov3": (DINOv3ViTModel(plain), 24, [0.4, 0.45, 0.5], [0.2, 0.25, 0.3]),
        "dinov3_gated": (DINOv3ViTModel(gated), 24, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    }
    for number, (name, (model, side, mean, std)) in enumerate(towers.items()):
        randomize(model, seed + number)
        model.eval()
        path = pathlib.Path(out) / name
        path.mkdir(parents=True)
        model.save_pretrained(path)  # for its names and config.json
        made = {k: x.half() for k, x in torch_tensors(path).items()}
        if name == "siglip":  # as the published files of both towers have them
            made = {f"vision_model.{k}": x for k, x in made.items()} | {
                "logit_scale": torch.zeros(1).half(),
                "text_model.head.bias": torch.zeros(2).half(),
            }
            raw = json.loads((path / "config.json").read_text())
            raw = {"model_type": "siglip", "vision_config": raw, "text_config": {}}
            (path / "config.json").write_text(json.dumps(raw, indent=1))
        save_file(made, path / "model.safetensors")
        normal = {"image_mean": mean, "image_std": std}
        (path / "preprocessor_config.json").write_text(json.dumps(normal))
        rng = np.random.default_rng(seed + number)
        pixels = rng.integers(0, 256, (2, side, side, 3)).astype(np.uint8)
        np.savez(path / "io.npz", pixels=pixels, **outputs(model, pixels, mean, std))


def torch_tensors(path: pathlib.Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


@torch.no_grad()
def outputs(model: torch.nn.Module, pixels: np.ndarray, mean: list, std: list) -> dict:
    x = torch.tensor((pixels / 255.0 - mean) / std, dtype=torch.float32)
    if isinstance(model, Siglip2VisionModel):
        patch = model.config.patch_size
        n, side = len(x), x.shape[1] // patch
        x = x.reshape(n, side, patch, side, patch, 3).swapaxes(2, 3).reshape(n, side**2, -1)
        out = model(
            pixel_values=x,
            pixel_attention_mask=torch.ones(n, side**2, dtype=torch.long),
            spatial_shapes=torch.tensor([[side, side]] * n),
            output_hidden_states=True,
        )
    else:
        out = model(pixel_values=x.permute(0, 3, 1, 2), output_hidden_states=True)
    last = out.last_hidden_state.numpy()
    return {"last": last, "hidden_1": out.hidden_states[1].numpy()}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
