"""Runs a Hugging Face directory in PyTorch; started as a process of its own, without jax.

    python torch_worker.py HF_DIR IN.npz OUT.npz

IN holds, per prompt N, `ids.N` int64 [L] and, with images, `pixels.N` float32 [T, 3, H, W]; `new`
is how many tokens to generate. OUT gets `logits.N` float32 [L, V] and `tokens.N` int64 [new].
"""

import json
import pathlib
import sys

import numpy as np


def main(directory: str, inputs: str, outputs: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, local_files_only=True, torch_dtype=torch.float32
    ).eval()
    raw = json.loads((pathlib.Path(directory) / "config.json").read_text())
    released = raw["model_type"] != "hovle"
    given, out = np.load(inputs), {}
    for key in (k for k in given.files if k.startswith("ids.")):
        number = key.removeprefix("ids.")
        ids = torch.from_numpy(given[key])[None]
        call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if f"pixels.{number}" in given:
            call["pixel_values"] = torch.from_numpy(given[f"pixels.{number}"])
        with torch.no_grad():
            extra = released_arguments(model, raw, call) if released else {}
            logits = model(**call, **extra).logits
            if not released:
                options = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
                made = model.generate(**call, **options, max_new_tokens=int(given["new"]))
                out[f"tokens.{number}"] = made[0, ids.shape[1] :].numpy()
        out[f"logits.{number}"] = logits[0].float().numpy()
    np.savez(outputs, **out)


def released_arguments(model, raw, call):  # type: ignore[no-untyped-def]
    """What the released code wants beside ids and pixels: positions, and the long stream."""
    import torch

    embedding = raw["embedding_config"]
    image = embedding["img_context_token_id"]
    model.img_context_token_id = image
    ids = call["input_ids"]
    extra = {"position_ids": torch.arange(ids.shape[1])[None], "return_dict": True}
    if embedding.get("pixel_shuffle_loc", "pre") == "post":
        ratio = round(1 / embedding["downsample_ratio"]) ** 2
        long = ids[0].repeat_interleave(torch.where(ids[0] == image, ratio, 1))[None]
        extra |= {
            "hd_input_ids": long,
            "hd_attention_mask": torch.ones_like(long),
            "hd_position_ids": torch.arange(long.shape[1])[None],
        }
    return extra


if __name__ == "__main__":
    main(*sys.argv[1:])
