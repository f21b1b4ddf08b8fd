"""lmms-eval's way to a model here, through its entry point group `lmms_eval.models`:

    python -m lmms_eval --model hovle --model_args model_dir=runs/stage3 --tasks mme

Imports lmms-eval, so nothing else here imports this file.
"""

from __future__ import annotations

import io
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from hovle_jax.data.records import IMAGE_PLACEHOLDER
from hovle_jax.errors import UserError
from hovle_jax.eval.harness import MAX_TILES, Answerer

NEW_TOKENS = 1024  # where the task names no limit


def manifest() -> ModelManifest:
    """The entry point."""
    return ModelManifest(model_id="hovle", chat_class_path=f"{__name__}.Hovle")


class Hovle(lmms):  # type: ignore[misc]
    """One process; all requests of a task go through one engine. Greedy, whatever a task asks for.

    max_tiles: of an image; lmms-eval's tasks have no limit of their own.
    """

    is_simple = False

    def __init__(
        self,
        model_dir: str,
        max_tiles: int = MAX_TILES,
        slots: int = 8,
        context: int = 8192,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(kwargs) - {"batch_size", "max_batch_size", "device"})
        if unknown:
            raise UserError(f"--model_args: hovle has no {unknown[0]!r}")
        self._answerer = Answerer(model_dir, slots=int(slots), context=int(context))
        self._answerer.set_tiles(int(max_tiles))

    def generate_until(self, requests: list[Any]) -> list[str]:
        return self._answerer.answers(map(self._question, requests))

    def _question(self, request: Any) -> tuple[str, list[bytes], int]:
        _, doc_to_messages, options, doc_id, task, split = request.args
        text, images = "", []
        for message in doc_to_messages(self.task_dict[task][split][doc_id]):
            for part in message["content"]:
                if message["role"] != "user" or part["type"] not in ("text", "image"):
                    found = f"a {part['type']} of role {message['role']}"
                    raise UserError(f"{task}, row {doc_id}: {found}; only users' texts and images")
                if part["type"] == "text":
                    text += part["text"]
                else:
                    text += f"{IMAGE_PLACEHOLDER}\n"
                    images.append(_encoded(part["url"]))
        return text, images, int(options.get("max_new_tokens") or NEW_TOKENS)

    def loglikelihood(self, requests: list[Any]) -> Any:
        raise UserError("hovle answers in words: tasks that compare likelihoods are not supported")

    def generate_until_multi_round(self, requests: list[Any]) -> Any:
        raise UserError("hovle: tasks of several rounds are not supported")


def _encoded(picture: Any) -> bytes:
    out = io.BytesIO()
    picture.convert("RGB").save(out, "PNG")
    return out.getvalue()
