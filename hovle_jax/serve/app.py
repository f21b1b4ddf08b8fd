"""The ASGI application: the chat protocol under /v1, /health, /metrics, /openapi.json, a page."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from hovle_jax.data.records import Record
from hovle_jax.errors import UserError
from hovle_jax.generation.chat import Assistant
from hovle_jax.generation.engine import Engine, Progress, Request
from hovle_jax.generation.text_stream import TextStream
from hovle_jax.serve.openapi import document
from hovle_jax.serve.page import page
from hovle_jax.serve.protocol import (
    Ask,
    Limits,
    Refused,
    Reply,
    invalid,
    logprob_list,
    parse,
    usage,
)
from hovle_jax.serve.worker import Worker

CLOSED = 499  # the client left before its answer; nobody reads this status but the metrics


def create_app(
    assistant: Assistant, engine: Engine, *, name: str, limits: Limits, api_key: str = ""
) -> Starlette:
    """An application that answers with `assistant` through `engine`, which becomes its own.

    With an `api_key`, /v1 wants it as a bearer token.
    """
    server = _Server(assistant, engine, name, limits, api_key)
    routes = [
        Route("/", page),
        Route("/v1/models", server.models),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/health", server.health),
        Route("/metrics", server.metrics),
        Route("/openapi.json", server.openapi),
    ]
    handlers: Any = {Refused: _refused, HTTPException: _http_error, Exception: _failed}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=server.lifespan)
    app.state.engine = engine
    return app


class _Server:
    def __init__(
        self, assistant: Assistant, engine: Engine, name: str, limits: Limits, api_key: str
    ):
        self._assistant, self._engine = assistant, engine
        self._name, self._limits, self._api_key = name, limits, api_key
        self._created = int(time.time())
        self._load = 0  # choices waiting or running
        self._statuses: collections.Counter[int] = collections.Counter()
        self._prompt_tokens = 0
        self._seconds = 0.0

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._worker = Worker(self._engine)
        try:
            yield
        finally:
            await asyncio.to_thread(self._worker.close)

    async def models(self, http: HttpRequest) -> Response:
        self._authorize(http)
        card = {"id": self._name, "object": "model", "created": self._created, "owned_by": "hovle"}
        return JSONResponse({"object": "list", "data": [card]})

    async def health(self, http: HttpRequest) -> Response:
        if self._worker.failure:
            return JSONResponse({"status": "failed", "reason": self._worker.failure}, 503)
        return JSONResponse({"status": "ok"})

    async def openapi(self, http: HttpRequest) -> Response:
        described = document(self._name, self._limits, with_key=bool(self._api_key))
        return JSONResponse(described)

    async def metrics(self, http: HttpRequest) -> Response:
        lines = ["# TYPE hovle_requests_total counter"]
        for status, count in sorted(self._statuses.items()):
            lines.append(f'hovle_requests_total{{status="{status}"}} {count}')
        for metric, kind, value in (
            ("request_seconds_sum", "counter", round(self._seconds, 6)),
            ("prompt_tokens_total", "counter", self._prompt_tokens),
            ("generated_tokens_total", "counter", self._worker.tokens),
            ("choices_in_flight", "gauge", self._load),
            ("slots_busy", "gauge", self._worker.running),
            ("slots", "gauge", self._engine.slots),
            ("prefix_hits_total", "counter", self._engine.prefixes.hits),
            ("prefix_misses_total", "counter", self._engine.prefixes.misses),
            ("prefix_bytes", "gauge", self._engine.prefixes.bytes),
        ):
            lines += [f"# TYPE hovle_{metric} {kind}", f"hovle_{metric} {value}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def chat(self, http: HttpRequest) -> Response:
        start = time.monotonic()
        try:
            response = await self._chat(http, start)
        except Refused as refused:
            self._count(refused.status, start)
            raise
        except asyncio.CancelledError:  # the time to drain is over
            self._count(503, start)
            stopping = Refused(503, "server_error", "the server is stopping")
            return JSONResponse(stopping.body(), 503)
        except Exception:
            self._count(500, start)
            raise
        if not isinstance(response, _Events):  # which count themselves, when they end
            self._count(response.status_code, start)
        return response

    def _count(self, status: int, start: float) -> None:
        self._statuses[status] += 1
        self._seconds += time.monotonic() - start

    async def _chat(self, http: HttpRequest, start: float) -> Response:
        try:
            self._authorize(http)
            self._admit(1)  # before any work
        except Refused:
            # A client that is not heard out sees a broken connection instead of the reason.
            await self._body(http, keep=False)
            raise
        ask = await asyncio.to_thread(parse, await self._body(http), self._name, self._limits)
        count = len(ask.samplings)
        self._admit(count)
        self._load += count
        jobs: list[_Job] = []

        def close() -> None:
            for job in jobs:
                job.cancel()
            self._load -= count

        with contextlib.ExitStack() as stack:
            stack.callback(close)
            requests = await asyncio.to_thread(self._prepare, ask)
            self._prompt_tokens += len(requests[0].prompt)
            deadline = start + self._limits.seconds
            job = _Job(self._worker, requests, ask, self._assistant.tokenizer, deadline)
            jobs.append(job)
            reply = Reply(self._name)
            if not ask.stream:
                return await _unless_gone(http, _collect(job, reply, ask))
            stack.pop_all()  # the stream closes itself

        def end(status: int) -> None:
            close()
            self._count(status, start)

        return _Events(_events(job, reply, ask), job, end)

    def _authorize(self, http: HttpRequest) -> None:
        given = http.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self._api_key and not secrets.compare_digest(given, self._api_key.encode()):
            raise Refused(401, "authentication_error", "a valid API key is needed as bearer token")

    def _admit(self, count: int) -> None:
        if self._worker.failure:
            raise Refused(503, "server_error", "the model is not running; see /health")
        if self._load + count > self._limits.queue:
            raise Refused(429, "rate_limit_error", "too many requests are waiting; try again")

    async def _body(self, http: HttpRequest, keep: bool = True) -> bytes:
        most, size, body = self._limits.body_bytes, 0, bytearray()
        async for part in http.stream():
            size += len(part)
            if keep:
                body += part
            if size > most:
                raise Refused(
                    413, "invalid_request_error", f"the body has more than {most:,} bytes"
                )
        return bytes(body)

    def _prepare(self, ask: Ask) -> list[Request]:
        """Pixels to tiles and text to ids, one request per choice."""
        question = ask.question
        try:
            record = Record(question.turns, question.images, question.where)
            tiles = sum(self._assistant.tiler_of(question).counts(record))
            if tiles > self._limits.tiles:
                raise UserError(f"{tiles} image tiles are more than {self._limits.tiles}")
            first = self._assistant.request(question, max_new=1)
            room = self._engine.context - len(first.prompt)
            new = ask.max_new or max(1, min(self._limits.new_tokens, room))
            first = dataclasses.replace(first, max_new=new, top=ask.top)
            requests = [dataclasses.replace(first, sampling=s) for s in ask.samplings]
            self._worker.check(requests[0])
        except UserError as error:
            raise invalid(str(error)) from None
        return requests


@dataclasses.dataclass
class _Choice:
    text: TextStream
    ticket: int = 0
    finish: str = ""


class _Job:
    """The choices of one request on their way through the worker."""

    def __init__(
        self, worker: Worker, requests: list[Request], ask: Ask, tokenizer: Any, deadline: float
    ):
        self._worker, self._deadline, self._tokenizer = worker, deadline, tokenizer
        self._news: asyncio.Queue[tuple[int, Progress | Exception]] = asyncio.Queue()
        self.prompt_tokens = len(requests[0].prompt)
        self.choices = [_Choice(TextStream(tokenizer, ask.stop)) for _ in requests]
        loop = asyncio.get_running_loop()

        def report_of(i: int) -> Callable[[Progress | Exception], None]:
            def report(progress: Progress | Exception) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
                    loop.call_soon_threadsafe(self._news.put_nowait, (i, progress))

            return report

        try:
            for i, (choice, request) in enumerate(zip(self.choices, requests, strict=True)):
                choice.ticket = worker.submit(request, report_of(i))
        except RuntimeError as error:
            raise Refused(503, "server_error", str(error)) from None

    @property
    def usage(self) -> dict[str, int]:
        return usage(self.prompt_tokens, sum(choice.text.tokens for choice in self.choices))

    def cancel(self) -> None:
        for choice in self.choices:
            if choice.ticket and not choice.finish:
                self._worker.cancel(choice.ticket)

    async def events(self) -> AsyncIterator[tuple[int, str, dict[str, Any]]]:
        """(choice, new text, log-probabilities of new tokens) until all choices are finished."""
        while not all(choice.finish for choice in self.choices):
            left = self._deadline - time.monotonic()
            try:
                i, progress = await asyncio.wait_for(self._news.get(), max(left, 0))
            except TimeoutError:
                raise Refused(504, "server_error", "the answer took too long") from None
            if isinstance(progress, Exception):
                raise Refused(503, "server_error", "the model stopped; see /health")
            choice = self.choices[i]
            if choice.finish:
                continue
            before = choice.text.tokens
            piece = choice.text.push(progress.tokens)
            tokens = progress.tokens[: choice.text.tokens - before]  # none after a stop string
            if choice.text.stopped:
                choice.finish = "stop"
                self._worker.cancel(choice.ticket)
            elif progress.finish:
                choice.finish = progress.finish
                piece += choice.text.close()
            counted = dataclasses.replace(progress, tokens=tokens)
            yield i, piece, logprob_list(counted, self._tokenizer.piece_bytes)


async def _collect(job: _Job, reply: Reply, ask: Ask) -> Response:
    logprobs: list[Any] = [logprob_list(None, bytes) for _ in job.choices]
    async for i, _, found in job.events():
        logprobs[i]["content"] += found["content"]
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": choice.text.text, "refusal": None},
            "logprobs": logprobs[i] if ask.logprobs else None,
            "finish_reason": choice.finish,
        }
        for i, choice in enumerate(job.choices)
    ]
    return JSONResponse(reply.whole(choices, job.usage))


async def _unless_gone(http: HttpRequest, answer: Any) -> Response:
    """The answer, or an empty response once nobody waits for it."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else Response(status_code=CLOSED)
    finally:
        work.cancel()
        left.cancel()


async def _events(job: _Job, reply: Reply, ask: Ask) -> AsyncIterator[str]:
    """Server-sent events: chunks of all choices, the counts if asked for, [DONE]."""

    def chunk(i: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> str:
        choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        body = reply.chunk([choice])
        return _event(body | {"usage": None} if ask.usage else body)

    try:
        for i in range(len(job.choices)):
            yield chunk(i, {"role": "assistant", "content": ""}, None, None)
        async for i, piece, logprobs in job.events():
            finish = job.choices[i].finish or None
            if piece or finish or ask.logprobs:
                delta = {"content": piece} if piece else {}
                yield chunk(i, delta, logprobs if ask.logprobs else None, finish)
        if ask.usage:
            yield _event(reply.chunk([]) | {"usage": job.usage})
    except Refused as refused:
        yield _event(refused.body())
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class _Events(StreamingResponse):
    """A stream that gives its places back however it ends, even before it began."""

    def __init__(self, stream: AsyncIterator[str], job: _Job, end: Callable[[int], None]):
        super().__init__(stream, media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        self._job, self._end = job, end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):  # the time to drain is over
                await super().__call__(scope, receive, send)
        finally:
            complete = all(choice.finish for choice in self._job.choices)
            self._end(200 if complete else CLOSED)


async def _refused(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {"retry-after": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    body = Refused(error.status_code, kind, f"{http.method} {http.url.path}: {error.detail}").body()
    return JSONResponse(body, error.status_code, error.headers)


async def _failed(http: HttpRequest, error: Exception) -> Response:
    logging.getLogger(__name__).error("%s %s", http.method, http.url.path, exc_info=error)
    return JSONResponse(Refused(500, "server_error", "an error of the server").body(), 500)
