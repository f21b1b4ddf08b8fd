"""The public PyTorch code of HoVLE, step by step on demand; a process of its own, without jax.

    python torch_worker.py CODE_DIR HF_DIR BATCH.npz SETTINGS

CODE_DIR holds modeling_internvl_chat.py and what it imports, as published; HF_DIR config.json and
the weights. Every line of standard input, {"work", "steps"}, is answered by one line of JSON.
"""

import importlib
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import pdb
import sys
import time
import types

import numpy as np
import torch

_HF_WORKER = pathlib.Path(__file__).parent.parent / "hf" / "torch_worker.py"


def main(code: str, directory: str, batch: str, text: str) -> None:
    # The published code prints; what it prints must not come between our answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(text)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, raw = load(pathlib.Path(code), pathlib.Path(directory), settings["attention"])
    model = model.to(device)
    call = arguments(model, raw, np.load(batch), settings["attention"], device)
    steps = make_steps(model, call, settings, device)
    attention = settings["attention"]
    if attention == "flash":
        attention = getattr(sys.modules["flash_attn"], "__doc__", None) or "flash-attn"
    import transformers

    print(
        json.dumps(
            {
                "description": f"torch {torch.__version__}, transformers "
                f"{transformers.__version__}, {attention} attention, {device.type}, "
                f"{torch.get_num_threads()} threads"
            }
        ),
        file=answers,
        flush=True,
    )
    for line in sys.stdin:
        asked = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        losses = [steps[asked["work"]]() for _ in range(asked["steps"])]
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        answer = {
            "seconds": wall / asked["steps"],
            "cpu_seconds": cpu / asked["steps"],
            "loss": losses[0],
        }
        print(json.dumps(answer), file=answers, flush=True)


def load(code, directory, attention):  # type: ignore[no-untyped-def]
    """(model with the weights of HF_DIR in float32, its config.json)."""
    stand_ins()
    package = types.ModuleType("published")
    package.__path__ = [str(code)]
    sys.modules["published"] = package
    chat = importlib.import_module("published.modeling_internvl_chat")
    raw = json.loads((directory / "config.json").read_text())
    name = "flash_attention_2" if attention == "flash" else "eager"
    for section in ("embedding_config", "llm_config"):
        raw[section]["attn_implementation"] = name
    # Published as of another name; ours says that the code in an export is not theirs.
    config = chat.InternVLChatConfig(**{k: v for k, v in raw.items() if k != "model_type"})
    model = chat.InternVLChatModel(config)
    from safetensors.torch import load_file

    weights = {}
    for path in directory.glob("*.safetensors"):
        weights |= load_file(path)
    model.load_state_dict(weights, strict=True)
    return model.float(), raw


def stand_ins() -> None:
    """Empty modules for what the published code imports and does not need here.

    It also stops in the debugger on its only path without flash-attn.
    """
    # These look for flash-attn themselves, and must not find ours.
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM  # noqa: F401

    pdb.set_trace = lambda *args, **kwargs: None
    stand_in("peft", LoraConfig=None, get_peft_model=None)
    stand_in("timm.models.layers", DropPath=torch.nn.Identity)  # of rate 0: never made
    unused = dict.fromkeys(("pad_input", "index_first_axis", "unpad_input"))
    stand_in("flash_attn", flash_attn_func=fused, flash_attn_varlen_func=None)
    stand_in("flash_attn.bert_padding", **unused)


def stand_in(name, **members):  # type: ignore[no-untyped-def]
    try:
        importlib.import_module(name)
    except ImportError:
        module = types.ModuleType(name, "PyTorch's own fused" if name == "flash_attn" else None)
        module.__dict__.update(members, __spec__=importlib.machinery.ModuleSpec(name, None))
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent and parent in sys.modules:
            setattr(sys.modules[parent], child, module)


def fused(q, k, v, dropout=0.0, softmax_scale=None, causal=False):  # type: ignore[no-untyped-def]
    """flash_attn_func by PyTorch's kernel: [B, S, heads, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def arguments(model, raw, batch, attention, device):  # type: ignore[no-untyped-def]
    """What `forward` is called with."""
    spec = importlib.util.spec_from_file_location("hf_worker", _HF_WORKER)
    hf_worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hf_worker)
    call = {k: torch.from_numpy(batch[k]) for k in ("input_ids", "labels", "pixel_values")}
    call |= hf_worker.released_arguments(model, raw, call)
    # Their eager layers make the causal mask where they get a mask of ones; flash-attn needs none.
    if attention == "flash":
        call.pop("hd_attention_mask", None)
    else:
        call["attention_mask"] = torch.ones_like(call["input_ids"])
    if not call["pixel_values"].shape[0]:
        del call["pixel_values"]
    call = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in call.items()}
    # A list, as their collation gives it.
    return call | {"loss_weight": batch["loss_weight"].tolist(), "use_cache": False}


def make_steps(model, call, settings, device):  # type: ignore[no-untyped-def]
    """{work: function of nothing that does one step and returns its loss}."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["lr"], betas=tuple(settings["betas"]), fused=True
    )
    half = settings["dtype"] == "bfloat16"

    def loss():  # type: ignore[no-untyped-def]
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return model(**call).loss

    def forward() -> float:
        with torch.no_grad():
            return loss().item()

    def forward_backward() -> float:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return value.item()

    def train() -> float:
        value = forward_backward()
        if settings["clip_norm"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"])
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return value

    return {"forward": forward, "forward_backward": forward_backward, "train": train}


if __name__ == "__main__":
    main(*sys.argv[1:])
