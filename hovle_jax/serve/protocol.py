"""The OpenAI chat protocol: what a request may say, and what is answered."""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from hovle_jax.data.image import image_size_of
from hovle_jax.errors import UserError
from hovle_jax.generation.chat import Question
from hovle_jax.generation.engine import Progress
from hovle_jax.generation.questions import number, question_of, sampling_of, stop_of
from hovle_jax.generation.sampling import MAX_SEED, MAX_TOP, Sampling

# Accepted, because they change nothing that is answered.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
IGNORED |= {"parallel_tool_calls"}
# Understood by others; here only the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}
USED = {"model", "messages", "max_tokens", "max_completion_tokens", "n", "stop", "logprobs"}
USED |= {"stream", "stream_options", "temperature", "top_k", "top_p", "min_p"}
USED |= {"repetition_penalty", "seed", "top_logprobs"}
DEFAULT = Sampling(temperature=1.0)  # as OpenAI


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for, how many may wait, and how a message is read."""

    body_bytes: int = 32 * 2**20
    image_pixels: int = 50_000_000
    images: int = 32
    tiles: int = 64
    new_tokens: int = 4096
    choices: int = 8
    queue: int = 64  # choices waiting or running
    seconds: float = 600.0
    images_first: bool = False  # images of a message go before its text, wherever they stood


class Refused(Exception):
    """An answer that is an error: HTTP status, OpenAI's error type, one line."""

    def __init__(self, status: int, kind: str, message: str):
        super().__init__(message)
        self.status, self.kind = status, kind

    def body(self) -> dict[str, Any]:
        error = {"message": str(self), "type": self.kind, "param": None, "code": None}
        return {"error": error}


def invalid(message: str) -> Refused:
    return Refused(400, "invalid_request_error", message)


@dataclasses.dataclass(frozen=True)
class Ask:
    """A checked request."""

    question: Question
    max_new: int | None  # None: as many as the limits allow
    samplings: tuple[Sampling, ...]  # one per choice
    stop: tuple[str, ...]
    stream: bool
    usage: bool  # a last chunk of a stream counts the tokens
    logprobs: bool
    top: int  # of the likeliest tokens beside each


def parse(body: bytes, model: str, limits: Limits) -> Ask:
    """Request body -> what is asked. Refused: the reason."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise invalid("the body is not valid JSON") from None
    if not isinstance(fields, dict):
        raise invalid("the body must be a JSON object")
    try:
        return _parse(fields, model, limits)
    except UserError as error:
        raise invalid(str(error)) from None


def _parse(fields: Mapping[str, Any], model: str, limits: Limits) -> Ask:
    for key, value in fields.items():
        if key in NEUTRAL and value not in NEUTRAL[key]:
            raise UserError(f"{key} is not supported; leave it out")
        if key not in NEUTRAL and key not in IGNORED and key not in USED:
            raise UserError(f"unknown field {key[:80]!r}")
    if fields.get("model") != model:
        asked = str(fields.get("model"))[:80]
        raise Refused(404, "not_found_error", f"the model {asked!r} is not served; {model!r} is")
    n = _between(fields, "n", 1, limits.choices) or 1
    new = _between(fields, "max_completion_tokens", 1, limits.new_tokens)
    new = new or _between(fields, "max_tokens", 1, limits.new_tokens)
    logprobs, top = _flag(fields, "logprobs"), _between(fields, "top_logprobs", 0, MAX_TOP) or 0
    if top and not logprobs:
        raise UserError("top_logprobs needs logprobs: true")
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise UserError("stream_options must be an object")
    seed = fields.get("seed")
    first = secrets.randbits(32) if seed is None else number(seed, True, "seed")
    sampling = sampling_of({**fields, "seed": None}, DEFAULT, "request")
    choices = tuple(
        dataclasses.replace(sampling, seed=(first + i) % (MAX_SEED + 1)) for i in range(n)
    )
    return Ask(
        _question(fields.get("messages"), limits),
        new,
        choices,
        stop_of(fields.get("stop"), "request"),
        _flag(fields, "stream"),
        _flag(options, "include_usage"),
        logprobs,
        top,
    )


def _between(fields: Mapping[str, Any], key: str, low: int, high: int) -> int | None:
    value = fields.get(key)
    if value is None:
        return None
    found: int = number(value, True, key)
    if not low <= found <= high:
        raise UserError(f"{key} must be {low} to {high}, not {found}")
    return found


def _flag(fields: Mapping[str, Any], key: str) -> bool:
    value = fields.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{key} must be true or false")
    return bool(value)


def _question(messages: Any, limits: Limits) -> Question:
    """Messages -> question. Images come inside the request only: a server that opened paths or
    addresses for its clients would lend them its files and its network."""
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list of at least one message")
    most: set[int | None] = set()
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            if not isinstance(part, dict) or part.get("type") not in ("text", "image_url"):
                raise UserError("messages: a content part must be of type text or image_url")
            if part["type"] == "image_url":
                url = part.get("image_url")
                fields = url if isinstance(url, dict) else {}
                url = fields.get("url") if fields else url
                if not isinstance(url, str) or url[:5].lower() != "data:":
                    raise UserError(
                        "messages: image_url must be a 'data:image/...;base64,...' URI; addresses "
                        "are not fetched"
                    )
                most.add(_max_tiles(fields, limits))
    if len(most) > 1:
        raise UserError("messages: images of one request must have the same limit of tiles")
    question = question_of({"messages": _plain(messages, limits.images_first)}, "messages")
    question = dataclasses.replace(question, max_tiles=most.pop() if most else None)
    if len(question.images) > limits.images:
        raise UserError(f"{len(question.images)} images are more than {limits.images}")
    for i, image in enumerate(question.images):
        width, height = image_size_of(image, f"image {i}")
        if width * height > limits.image_pixels:
            raise UserError(
                f"image {i}: {width} x {height} pixels are more than {limits.image_pixels:,}"
            )
    return question


def _max_tiles(image_url: Mapping[str, Any], limits: Limits) -> int | None:
    """Of OpenAI's `detail` and LMDeploy's `max_dynamic_patch`; None: the model's own."""
    unknown = sorted(image_url.keys() - {"url", "detail", "max_dynamic_patch"})
    if unknown:
        raise UserError(f"messages: image_url has an unknown field {unknown[0][:80]!r}")
    detail = image_url.get("detail")
    if detail not in (None, "auto", "high", "low"):
        raise UserError("messages: detail must be auto, high or low")
    most = _between(image_url, "max_dynamic_patch", 1, limits.tiles)
    return 1 if detail == "low" else most


def _plain(messages: list[Any], images_first: bool) -> list[Any]:
    """Messages by the keys that mean something here; some clients send a name or a refusal."""
    found = []
    for message in messages:
        if isinstance(message, dict):
            message = {k: message[k] for k in ("role", "content") if k in message}
            if images_first and isinstance(message.get("content"), list):
                parts = message["content"]
                message["content"] = sorted(parts, key=lambda part: part["type"] == "text")
        found.append(message)
    return found


# Answers


@dataclasses.dataclass(frozen=True)
class Reply:
    """What all parts of one answer share."""

    model: str
    id: str = dataclasses.field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        return self._body("chat.completion", choices) | {"usage": usage}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._body("chat.completion.chunk", choices)

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def logprob_list(progress: Progress | None, bytes_of: Callable[[int], bytes]) -> dict[str, Any]:
    """Tokens, each as the text and the bytes it has by itself, with log-probabilities; None: no
    tokens.

    Natural ones, of the model's own distribution: temperature, penalty and filters do not change
    them, so that the token that was drawn may be less likely than all of `top_logprobs`.
    """

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = bytes_of(token)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

    content: list[dict[str, Any]] = []
    for i, token in enumerate(progress.tokens if progress else ()):
        assert progress is not None
        best = [entry(*pair) for pair in progress.best[i]] if progress.best else []
        content.append(entry(token, progress.logprobs[i]) | {"top_logprobs": best})
    return {"content": content, "refusal": None}
