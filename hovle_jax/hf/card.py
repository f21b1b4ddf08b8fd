"""The model card of an export: what the model is and how it was made."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import hovle_jax
from hovle_jax.checkpoint import Stored
from hovle_jax.config import ModelConfig, RunConfig, to_dict
from hovle_jax.run.metrics import read_metrics

_CARD = """\
---
license: {license}
library_name: transformers
pipeline_tag: image-text-to-text
tags: [hovle, vision-language]
---

# {name}

HoVLE ([arXiv 2412.16158](https://arxiv.org/abs/2412.16158)): one holistic embedding module of
{embedding} causal layers turns image patches and text tokens into the vectors an LLM of {decoder}
layers reads. {parameters:,} parameters, {dtypes}; image tokens are merged {place} the embedding's
layers ({tokens} tokens per {size} x {size} tile).

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

path = "{name}"
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True).eval()
content = [{{"type": "image"}}, {{"type": "text", "text": "What is in the image?"}}]
text = processor.apply_chat_template(
    [{{"role": "user", "content": content}}], add_generation_prompt=True
)
inputs = processor(images=[Image.open("image.png")], text=text, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
answer = output[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```

{made}

## Checks

`verification.json` says what was compared when this directory was written:

{checks}

The code in this directory imports only torch and transformers. Written by
hovle_jax {version} ({commit}).
"""


def model_card(
    stored: Stored,
    config: ModelConfig,
    report: dict[str, Any],
    license_name: str,
) -> str:
    """README.md with the front matter the Hub reads."""
    checks = "\n".join(f"* {name}: {_text(result)}" for name, result in report["checks"].items())
    return _CARD.format(
        license=license_name,
        name=config.name,
        embedding=config.embedding.num_layers,
        decoder=config.decoder.num_layers,
        parameters=report["parameters"],
        dtypes=" and ".join(report["dtypes"]),
        place="before" if config.shuffle_loc == "pre" else "after",
        tokens=config.tokens_per_tile,
        size=config.image_size,
        made=_how_it_was_made(stored),
        checks=checks,
        version=hovle_jax.__version__,
        commit=_commit(),
    )


def _how_it_was_made(stored: Stored) -> str:
    run = stored.config
    if not isinstance(run, RunConfig):
        return f"## Origin\n\nConverted from the model directory `{Path(stored.directory).name}`."
    rows = read_metrics(Path(stored.directory) / "metrics.jsonl")
    last = {k: v for k, v in (rows[-1] if rows else {}).items() if isinstance(v, (int, float))}
    data = {k: v for k, v in to_dict(run.data).items() if v not in ("", (), None)}
    sections = [
        f"## Training\n\nStage `{run.stage}`, step {stored.step} of {run.steps}.",
        f"Data:\n\n```json\n{json.dumps(data, indent=2)}\n```",
        f"Metrics of the last logged step:\n\n```json\n{json.dumps(last, indent=2)}\n```",
        "The whole configuration:\n\n```json\n" + json.dumps(to_dict(run), indent=2) + "\n```",
    ]
    return "\n\n".join(sections)


def _text(result: Any) -> str:
    return result if isinstance(result, str) else json.dumps(result)


def _commit() -> str:
    """The project's commit if it runs from a checkout."""
    root = Path(hovle_jax.__file__).parent.parent
    if not (root / ".git").exists():
        return "released package"
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return "unknown commit"
    return f"commit {found.stdout.strip()}" if found.returncode == 0 else "unknown commit"
