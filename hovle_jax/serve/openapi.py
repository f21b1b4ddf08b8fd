"""The server's own description, OpenAPI 3.1: paths, limits and shapes as `protocol` has them."""

from __future__ import annotations

from typing import Any

from hovle_jax import __version__
from hovle_jax.generation.questions import MAX_STOPS
from hovle_jax.generation.sampling import MAX_TOP
from hovle_jax.serve.protocol import IGNORED, NEUTRAL, Limits

Schema = dict[str, Any]


def document(name: str, limits: Limits, *, with_key: bool) -> Schema:
    """Of a server of the model `name`; with_key: /v1 wants an API key."""
    refusals = {
        "400": "the request cannot be answered; the message says why",
        "404": "another model",
        "413": f"more than {limits.body_bytes:,} bytes",
        "429": f"more than {limits.queue} answers waiting or running",
        "503": "the model is not running, or the server is stopping",
        "504": f"no answer within {limits.seconds:g} seconds",
    }
    secured: Schema = {}
    if with_key:
        refusals["401"] = "no valid API key"
        secured = {"security": [{"key": []}]}
    ask = {
        "operationId": "chat",
        "summary": "An answer to a conversation, as OpenAI's chat completions",
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref("Request")}},
        },
        "responses": {
            "200": {
                "description": "the answer; with stream: true, server-sent events",
                "content": {
                    "application/json": {"schema": _ref("Answer")},
                    "text/event-stream": {"schema": {"type": "string"}},
                },
            },
            **{status: _response(text, _ref("Error")) for status, text in refusals.items()},
        },
    }
    models: Schema = {
        "operationId": "models",
        "responses": {"200": _response("it", _ref("Models"))},
    }
    if with_key:
        models["responses"]["401"] = _response(refusals["401"], _ref("Error"))
    health = _object({"status": _STRING, "reason": _STRING}, ("status",))
    components: Schema = {
        "schemas": {
            "Request": _request(name, limits),
            "Answer": _answer(name),
            "Models": _models(),
            "Error": _object(
                {
                    "error": _object(
                        {
                            "message": _STRING,
                            "type": _STRING,
                            "param": {"type": "null"},
                            "code": {"type": "null"},
                        }
                    )
                }
            ),
        }
    }
    if with_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"hovle: {name}", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": ask | secured},
            "/v1/models": {"get": models | secured},
            "/health": {
                "get": {
                    "operationId": "health",
                    "responses": {
                        "200": _response("answers", health),
                        "503": _response("the model has failed", health),
                    },
                }
            },
            "/metrics": {"get": _page("metrics", "text/plain", "Prometheus text")},
            "/": {"get": _page("page", "text/html", "a chat page")},
            "/openapi.json": {
                "get": {
                    "operationId": "openapi",
                    "responses": {"200": _response("this document", {"type": "object"})},
                }
            },
        },
        "components": components,
    }


_STRING: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _response(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _page(operation: str, media: str, description: str) -> Schema:
    content = {media: {"schema": _STRING}}
    answer = {"description": description, "content": content}
    return {"operationId": operation, "responses": {"200": answer}}


def _object(properties: Schema, required: tuple[str, ...] | None = None) -> Schema:
    names = list(properties) if required is None else list(required)
    return {
        "type": "object",
        "properties": properties,
        "required": names,
        "additionalProperties": False,
    }


def _number(kind: str, low: float, high: float, **more: Any) -> Schema:
    return {"type": [kind, "null"], "minimum": low, "maximum": high} | more


def _request(name: str, limits: Limits) -> Schema:
    flag = {"type": ["boolean", "null"]}
    new = _number("integer", 1, limits.new_tokens)
    stop = {"type": "string", "minLength": 1}
    stops = {"type": "array", "items": stop, "maxItems": MAX_STOPS}
    properties: Schema = {
        "model": {"const": name},
        "messages": {"type": "array", "minItems": 1, "items": _message(limits)},
        "max_tokens": new,
        "max_completion_tokens": new,
        "n": _number("integer", 1, limits.choices),
        "stop": {"anyOf": [stop, stops, {"type": "null"}]},
        "stream": flag,
        "stream_options": {
            "type": ["object", "null"],
            "properties": {"include_usage": flag},
        },
        "logprobs": flag,
        "top_logprobs": _number("integer", 0, MAX_TOP),
        "seed": {"type": ["integer", "null"]},
        "temperature": _number("number", 0, 100),
        "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"type": ["integer", "null"], "minimum": 0},
        "min_p": _number("number", 0, 1),
        "repetition_penalty": _number("number", 0.01, 100),
    }
    properties |= {key: {"enum": list(values)} for key, values in NEUTRAL.items()}
    properties |= {key: {"description": "ignored"} for key in sorted(IGNORED)}
    return _object(properties, ("model", "messages"))


def _message(limits: Limits) -> Schema:
    text = _object({"type": {"const": "text"}, "text": _STRING})
    url = {"type": "string", "pattern": "^data:image/[a-z]+;base64,"}
    detail = {"enum": ["auto", "high", "low", None], "description": "low: one tile"}
    tiles = _number("integer", 1, limits.tiles, description="most tiles of each image")
    fields = {"url": url, "detail": detail, "max_dynamic_patch": tiles}
    where = {"anyOf": [url, _object(fields, ("url",))]}
    image = _object({"type": {"const": "image_url"}, "image_url": where})
    parts = {"type": "array", "minItems": 1, "items": {"anyOf": [text, image]}}
    texts = {"type": "array", "minItems": 1, "items": text}

    def message(role: str, items: Schema) -> Schema:
        return {
            "type": "object",
            "properties": {"role": {"const": role}, "content": {"anyOf": [_STRING, items]}},
            "required": ["role", "content"],
        }

    return {
        "anyOf": [message("user", parts), message("assistant", texts), message("system", texts)]
    }


def _answer(name: str) -> Schema:
    token = {
        "token": _STRING,
        "logprob": {"type": "number", "maximum": 0},
        "bytes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}},
    }
    best = {"type": "array", "items": _object(token), "maxItems": MAX_TOP}
    tokens = {"type": "array", "items": _object(token | {"top_logprobs": best})}
    logprobs = _object({"content": tokens, "refusal": {"type": "null"}})
    message = {"role": {"const": "assistant"}, "content": _STRING, "refusal": {"type": "null"}}
    choice = {
        "index": _COUNT,
        "message": _object(message),
        "logprobs": {"anyOf": [logprobs, {"type": "null"}]},
        "finish_reason": {"enum": ["stop", "length"]},
    }
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    return _object(
        {
            "id": _STRING,
            "object": {"const": "chat.completion"},
            "created": _COUNT,
            "model": {"const": name},
            "choices": {"type": "array", "items": _object(choice), "minItems": 1},
            "usage": _object(dict.fromkeys(counts, _COUNT)),
        }
    )


def _models() -> Schema:
    card = {"id": _STRING, "object": {"const": "model"}, "created": _COUNT, "owned_by": _STRING}
    models = {"type": "array", "items": _object(card)}
    return _object({"object": {"const": "list"}, "data": models})
