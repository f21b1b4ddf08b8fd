"""PyTorch answering one prompt on demand; a process of its own, without jax.

    python generate_torch_worker.py CODE_DIR HF_DIR BATCH.npz SETTINGS

As torch_worker.py. SETTINGS name the "work": "public" runs CODE_DIR, "transformers" the code in
HF_DIR, each with the transformers it wants. BATCH holds `input_ids` int64 [n] and `pixel_values`
float32 [t, 3, H, W]. Every line of standard input, {"steps": tokens}, is answered by one line of
JSON: the tokens, and wall and CPU seconds until the first and until the last of them.
"""

import importlib.util
import json
import os
import pathlib
import sys
import time

import numpy as np
import torch


def main(code: str, directory: str, batch: str, text: str) -> None:
    # The published code prints; what it prints must not come between our answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings, given = json.loads(text), np.load(batch)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    ids = torch.from_numpy(given["input_ids"])[None]
    pixels = torch.from_numpy(given["pixel_values"]) if len(given["pixel_values"]) else None
    if settings["work"] == "public":
        run = public(code, directory, settings["attention"], ids, pixels)
        attention = f"{settings['attention']} attention, "
    else:
        run, attention = exported(directory, ids, pixels), ""
    import transformers

    words = f"torch {torch.__version__}, transformers {transformers.__version__}, {attention}"
    words += f"{torch.get_num_threads()} threads"
    print(json.dumps({"description": words}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        clock = Clock()
        with torch.no_grad():
            tokens = run(asked["steps"], clock)
        first, last = clock.ticks[0], clock.ticks[-1]
        answer = {
            "tokens": tokens,
            "seconds": [first[0], last[0]],
            "cpu_seconds": [first[1], last[1]],
        }
        print(json.dumps(answer), file=answers, flush=True)


class Clock:
    """(wall, CPU) seconds since it was made, at every token."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()
        self.ticks: list[tuple[float, float]] = []

    def tick(self) -> None:
        now = time.perf_counter(), time.process_time()
        self.ticks.append((now[0] - self._start[0], now[1] - self._start[1]))


def sibling(path):  # type: ignore[no-untyped-def]
    """A worker beside this one as a module: its folder must not come first on the path."""
    spec = importlib.util.spec_from_file_location(f"worker_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def public(code, directory, attention, ids, pixels):  # type: ignore[no-untyped-def]
    """Greedy tokens by the published code, whose `generate` drops the cache before every token:
    each is a forward pass over the image and all tokens so far."""
    here = pathlib.Path(__file__)
    worker = sibling(here.with_name("torch_worker.py"))
    hf_worker = sibling(here.parent.parent / "hf" / "torch_worker.py")
    model, raw = worker.load(pathlib.Path(code), pathlib.Path(directory), attention)
    model.eval()

    def run(steps, clock):  # type: ignore[no-untyped-def]
        sequence = ids
        for _ in range(steps):
            call = {"input_ids": sequence, "attention_mask": torch.ones_like(sequence)}
            if pixels is not None:
                call["pixel_values"] = pixels
            extra = hf_worker.released_arguments(model, raw, call)
            scores = model(**call, **extra, use_cache=False).logits
            sequence = torch.cat([sequence, scores[:, -1:].argmax(-1)], dim=1)
            clock.tick()
        return sequence[0, ids.shape[1] :].tolist()

    return run


def exported(directory, ids, pixels):  # type: ignore[no-untyped-def]
    """Greedy tokens by transformers' own `generate`, with a cache, of an exported directory."""
    from transformers import AutoModelForCausalLM, StoppingCriteria

    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, local_files_only=True, torch_dtype=torch.float32
    ).eval()
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if pixels is not None:
        call["pixel_values"] = pixels

    class Ticks(StoppingCriteria):
        """Never stops; it is asked after every token."""

        def __init__(self, clock):  # type: ignore[no-untyped-def]
            self._clock = clock

        def __call__(self, input_ids, scores, **kwargs):  # type: ignore[no-untyped-def]
            self._clock.tick()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def run(steps, clock):  # type: ignore[no-untyped-def]
        made = model.generate(
            **call,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
            max_new_tokens=steps,
            stopping_criteria=[Ticks(clock)],
        )
        return made[0, ids.shape[1] :].tolist()

    return run


if __name__ == "__main__":
    main(*sys.argv[1:])
