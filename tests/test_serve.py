"""`hovle serve` in this process: the protocol, its errors, limits, cancellation."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
import threading
import time
from pathlib import Path

import pytest

from hovle_jax.cli.main import main
from hovle_jax.generation.chat import Assistant, first_question
from hovle_jax.serve import protocol
from hovle_jax.serve.protocol import Limits

httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
testclient = pytest.importorskip("starlette.testclient")
app = pytest.importorskip("hovle_jax.serve.app")

pytestmark = pytest.mark.usefixtures("quick_compilation")
NEW = 6
LIMITS = Limits(body_bytes=200_000, image_pixels=20_000, images=3, tiles=14, new_tokens=64, queue=4)


@pytest.fixture(scope="module")
def assistant(release) -> Assistant:
    return Assistant.load(release)


def open_client(assistant: Assistant, limits: Limits = LIMITS, api_key: str = ""):
    engine = assistant.engine(slots=2, context=1024, tiles=16)
    application = app.create_app(assistant, engine, name="hovle", limits=limits, api_key=api_key)
    return testclient.TestClient(application, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(assistant):
    with open_client(assistant) as client:
        yield client


def body(content="a b", **changes) -> dict:
    messages = [{"role": "user", "content": content}]
    return {"model": "hovle", "messages": messages, "max_tokens": NEW, "temperature": 0} | changes


def picture(release: Path) -> dict:
    data = base64.b64encode((release.parent / "image.png").read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def words(text: str) -> dict:
    return {"type": "text", "text": text}


def ask(client, path: str = "/v1/chat/completions", **changes) -> dict:
    response = client.post(path, json=body(**changes))
    assert response.status_code == 200, response.text
    return response.json()


def text_of(answer: dict, choice: int = 0) -> str:
    return answer["choices"][choice]["message"]["content"]


def events(response) -> list[dict]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_text_and_counts(client, assistant):
    answer = ask(client)
    question = first_question("a b", [])
    assert text_of(answer) == assistant.answer([question], max_new=NEW)[0]
    prompt = len(assistant.request(question, max_new=NEW).prompt)
    counts = {"prompt_tokens": prompt, "completion_tokens": NEW, "total_tokens": prompt + NEW}
    assert answer["usage"] == counts
    assert answer["object"] == "chat.completion" and answer["model"] == "hovle"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["logprobs"] is None
    assert client.get("/v1/models").json()["data"][0]["id"] == "hovle"


def test_images_and_history(client, assistant, release):
    path = str(release.parent / "image.png")
    image = picture(release)
    expected = assistant.answer([first_question("what", [path])], max_new=NEW)[0]
    assert text_of(ask(client, content=[image, words("what")])) == expected
    two = ask(client, content=[image, image, words("what")])
    assert text_of(two) == assistant.answer([first_question("what", [path] * 2)], max_new=NEW)[0]
    said = {"role": "assistant", "content": expected}
    first = body([image, words("what")])["messages"][0]
    system = {"role": "system", "content": "be brief"}
    more = {"role": "user", "content": "and now"}
    history = ask(client, messages=[system, first, said, more])
    assert history["usage"]["prompt_tokens"] > two["usage"]["prompt_tokens"] // 2
    assert text_of(history) != text_of(ask(client, messages=[system, more]))


def test_tiles_of_an_image_as_asked(client, assistant, release):
    """Twice as high as wide: two tiles and a thumbnail unless a request says less."""

    def tokens(*asked: dict) -> int:
        parts = [picture(release) for _ in asked]
        for part, fields in zip(parts, asked, strict=True):
            part["image_url"] |= fields
        return ask(client, content=[*parts, words("what")])["usage"]["prompt_tokens"]

    tile = assistant.config.tokens_per_tile
    whole = tokens({})
    assert tokens({"detail": "low"}) == tokens({"max_dynamic_patch": 1}) == whole - 2 * tile
    assert tokens({"detail": "high"}) == tokens({"max_dynamic_patch": 2}) == whole
    # A limit of its own for each image, where the model's would be shared.
    assert tokens(*[{"max_dynamic_patch": 2}] * 3) >= 9 * tile
    for fields, message in (
        ({"detail": "best"}, "detail must be auto, high or low"),
        ({"max_dynamic_patch": 0}, "max_dynamic_patch must be 1 to 14, not 0"),
        ({"size": 3}, "image_url has an unknown field 'size'"),
    ):
        part = picture(release)
        part["image_url"] |= fields
        response = client.post("/v1/chat/completions", json=body([part, words("q")]))
        assert response.status_code == 400 and message in response.json()["error"]["message"]
    both = [picture(release), picture(release)]
    both[0]["image_url"]["detail"] = "low"
    response = client.post("/v1/chat/completions", json=body([*both, words("q")]))
    assert "must have the same limit of tiles" in response.json()["error"]["message"]


def test_images_first(assistant, release):
    image = picture(release)
    limits = dataclasses.replace(LIMITS, images_first=True)
    with open_client(assistant, limits) as client:
        after, before = (
            ask(client, content=content)
            for content in ([words("what"), image], [image, words("what")])
        )
    with open_client(assistant) as client:
        as_sent = ask(client, content=[words("what"), image])
    assert text_of(after) == text_of(before) and after["usage"] == before["usage"]
    assert text_of(as_sent) != text_of(before)


def test_stream_equals_whole(client, release):
    for changes in (
        {},
        {"content": [picture(release), words("what")], "max_tokens": 20},
        {"temperature": 2.0, "seed": -3, "n": 2, "max_tokens": 20},
    ):
        whole = ask(client, **changes)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = client.post("/v1/chat/completions", json=body(**changes) | options)
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response)
        assert chunks[-1]["usage"] == whole["usage"] and not chunks[-1]["choices"]
        texts, finishes = {}, {}
        for chunk in chunks[:-1]:
            assert chunk["object"] == "chat.completion.chunk" and chunk["usage"] is None
            (choice,) = chunk["choices"]
            i = choice["index"]
            texts[i] = texts.get(i, "") + choice["delta"].get("content", "")
            assert i not in finishes
            if choice["finish_reason"]:
                finishes[i] = choice["finish_reason"]
        assert [texts[i] for i in sorted(texts)] == [
            text_of(whole, i) for i in range(len(whole["choices"]))
        ]
        assert set(finishes) == set(texts) and set(finishes.values()) == {"length"}
    assert text_of(whole, 0) != text_of(whole, 1)


def test_seed_stop_and_logprobs(client):
    drawn = {"temperature": 3.0, "max_tokens": 20}
    assert text_of(ask(client, **drawn, seed=7)) == text_of(ask(client, **drawn, seed=7))
    assert text_of(ask(client, **drawn)) != text_of(ask(client, **drawn))
    whole = text_of(ask(client, max_tokens=20))
    stop = whole[5:8].strip()  # a space may also open the answer, where it is not shown
    cut = ask(client, max_tokens=20, stop=[stop, "never there"])
    assert text_of(cut) == whole[: whole.index(stop)].strip()
    assert cut["choices"][0]["finish_reason"] == "stop"
    # Nothing of what came in the same step, but after the token that completed the stop string.
    found = ask(client, max_tokens=20, stop=[stop], logprobs=True)
    said = [bytes(f["bytes"]) for f in found["choices"][0]["logprobs"]["content"]]
    assert found["usage"] == cut["usage"] and found["usage"]["completion_tokens"] == len(said)
    assert stop.encode() in b"".join(said) and stop.encode() not in b"".join(said[:-1])
    found = ask(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert len(found) == NEW and all(f["logprob"] <= 0 for f in found)
    assert "".join(f["token"] for f in found).replace(" ", "") in whole.replace(" ", "")


def test_top_logprobs(client):
    """The likeliest first; greedy takes the first of them. The stream says the same."""
    asked = {"logprobs": True, "top_logprobs": 3}
    answer = ask(client, **asked)
    content = answer["choices"][0]["logprobs"]["content"]
    for found in content:
        best = found["top_logprobs"]
        assert len(best) == 3 and best[0] == {k: found[k] for k in ("token", "logprob", "bytes")}
        values = [b["logprob"] for b in best]
        assert values == sorted(values, reverse=True) and sum(map(math.exp, values)) < 1
    streamed = client.post("/v1/chat/completions", json=body(stream=True, **asked))
    pieces = [e["choices"][0]["logprobs"] for e in events(streamed)]
    assert [x for p in pieces if p for x in p["content"]] == content
    plain = ask(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [f["top_logprobs"] for f in plain] == [[]] * NEW


def test_openapi(client, release):
    """What is answered and what is refused is what the document says."""
    jsonschema = pytest.importorskip("jsonschema")
    described = client.get("/openapi.json").json()
    schemas = described["components"]["schemas"]

    def valid(schema: str, value) -> bool:
        whole = {"$ref": f"#/components/schemas/{schema}", "components": described["components"]}
        return not list(jsonschema.Draft202012Validator(whole).iter_errors(value))

    content = [picture(release), words("what")]
    good = body(content, n=2, seed=3, logprobs=True, top_logprobs=2, stop=["zzz"], tools=[])
    answer = client.post("/v1/chat/completions", json=good)
    assert answer.status_code == 200 and valid("Request", good) and valid("Answer", answer.json())
    assert valid("Models", client.get("/v1/models").json())
    assert set(schemas["Request"]["properties"]) == protocol.IGNORED | protocol.USED | set(
        protocol.NEUTRAL
    )
    responses = described["paths"]["/v1/chat/completions"]["post"]["responses"]
    unsaid = 0  # what a schema cannot say
    for changes, status, _ in WRONG:
        refused = client.post("/v1/chat/completions", json=body(**changes))
        assert str(status) in responses and valid("Error", refused.json())
        unsaid += valid("Request", body(**changes))
    assert unsaid <= 4 and not valid("Request", {"model": "hovle"})
    routes = {route.path for route in client.app.routes}
    assert routes == set(described["paths"])


def test_a_second_question_about_an_image(assistant, release):
    """The image is read once, and /metrics says so."""
    engine = assistant.engine(slots=2, context=1024, tiles=16, prefix_bytes=2**24)
    application = app.create_app(assistant, engine, name="hovle", limits=LIMITS)
    path = str(release.parent / "image.png")
    with testclient.TestClient(application) as client:
        for question in ("what", "which one"):
            answer = ask(client, content=[picture(release), words(question)])
            expected = assistant.answer([first_question(question, [path])], max_new=NEW)[0]
            assert text_of(answer) == expected
        found = client.get("/metrics").text
    assert "hovle_prefix_hits_total 1" in found and "hovle_prefix_misses_total 1" in found
    assert int(re.search(r"hovle_prefix_bytes (\d+)", found)[1]) > 0


WRONG = [
    ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs must be 0 to 20, not 21"),
    ({"model": "other"}, 404, "the model 'other' is not served"),
    ({"messages": []}, 400, "messages must be a list"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "the last message must be"),
    ({"messages": ["x"]}, 400, "a turn must be a JSON object"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "has no text"),
    ({"content": "<image>"}, 400, "must match one to one"),
    ({"content": [words("a"), {"type": "input_audio"}]}, 400, "must be of type text or image_url"),
    ({"max_tokens": 0}, 400, "max_tokens must be 1 to 64, not 0"),
    ({"max_tokens": 65}, 400, "max_tokens must be 1 to 64, not 65"),
    ({"content": "word " * 1200}, 400, "more than the context of 1024"),
    ({"temperature": "hot"}, 400, "temperature must be a number"),
    ({"temperature": -1}, 400, "temperature must be between"),
    ({"top_p": 0}, 400, "top_p must be over 0"),
    ({"n": 9}, 400, "n must be 1 to 8, not 9"),
    ({"n": True}, 400, "n must be an integer"),
    ({"seed": 1.5}, 400, "seed must be an integer"),
    ({"stop": [1]}, 400, "stop must be a string"),
    ({"stream": "yes"}, 400, "stream must be true or false"),
    ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
    ({"logit_bias": {"3": 1}}, 400, "logit_bias is not supported"),
    ({"max_token": 3}, 400, "unknown field 'max_token'"),
]


@pytest.mark.parametrize(("changes", "status", "message"), WRONG)
def test_refused(client, changes, status, message):
    response = client.post("/v1/chat/completions", json=body(**changes))
    error = response.json()["error"]
    assert (response.status_code, message in error["message"]) == (status, True), error
    assert "\n" not in error["message"] and error["type"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/a.png", "addresses are not fetched"),
        ("file:///etc/passwd", "addresses are not fetched"),
        ("/etc/passwd", "addresses are not fetched"),
        ({"no": "url"}, "addresses are not fetched"),
        ("data:image/png;base64,!!!", "is no image as"),
        ("data:image/png;base64,aGVsbG8=", "not an image"),
    ],
)
def test_no_image_from_elsewhere(client, url, message):
    for part in ({"url": url}, url):
        content = [{"type": "image_url", "image_url": part}, words("what")]
        response = client.post("/v1/chat/completions", json=body(content))
        assert response.status_code == 400 and message in response.json()["error"]["message"]
    content = [{"type": "image", "image": "/etc/passwd"}, words("what")]
    assert client.post("/v1/chat/completions", json=body(content)).status_code == 400


def test_limits(client, release):
    image = picture(release)
    for content, status, message in (
        ([image] * 4, 400, "4 images are more than 3"),
        ("x" * 200_000, 413, "more than 200,000 bytes"),
    ):
        response = client.post("/v1/chat/completions", json=body(content))
        assert response.status_code == status
        assert message in response.json()["error"]["message"]
    post = client.post("/v1/chat/completions", content=b"{")
    assert post.status_code == 400 and "not valid JSON" in post.json()["error"]["message"]
    assert client.get("/v1/chat/completions").status_code == 405
    assert client.get("/nothing").json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"image_pixels": 7199}, "60 x 120 pixels are more than"), ({"tiles": 2}, "tiles are more")],
)
def test_image_limits(assistant, release, changes, message):
    with open_client(assistant, dataclasses.replace(LIMITS, **changes)) as client:
        response = client.post("/v1/chat/completions", json=body([picture(release), words("q")]))
        assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_api_key(assistant):
    with open_client(assistant, api_key="secret") as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer \xe9"}):
            raw = {k: v.encode("latin-1") for k, v in headers.items()}
            assert client.get("/v1/models", headers=raw).status_code == 401
            answer = client.post("/v1/chat/completions", json=body(), headers=raw)
            assert answer.status_code == 401
        good = {"authorization": "Bearer secret"}
        assert client.get("/v1/models", headers=good).status_code == 200
        assert client.get("/health").status_code == 200


def test_many_at_once(client):
    """More clients than slots: each gets what it gets alone; the queue's end is 429, not less."""
    prompts = [f"{'a b ' * i} what" for i in range(12)]
    expected = [text_of(ask(client, content=p)) for p in prompts]
    found: dict[int, str] = {}
    refused = []

    def one(i: int) -> None:
        while i not in found:
            response = client.post("/v1/chat/completions", json=body(prompts[i]))
            if response.status_code == 429:
                assert response.headers["retry-after"] == "1"
                refused.append(i)
                time.sleep(0.02)
            else:
                found[i] = text_of(response.json())

    threads = [threading.Thread(target=one, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(12)] == expected
    assert client.post("/v1/chat/completions", json=body(n=5)).status_code == 429
    gauges = client.get("/metrics").text
    assert "hovle_choices_in_flight 0" in gauges and 'requests_total{status="200"}' in gauges
    assert 'requests_total{status="429"}' in gauges


def test_timeout(assistant):
    with open_client(assistant, dataclasses.replace(LIMITS, seconds=1e-6)) as client:
        response = client.post("/v1/chat/completions", json=body())
        assert response.status_code == 504
        streamed = client.post("/v1/chat/completions", json=body(stream=True))
        assert "took too long" in events(streamed)[-1]["error"]["message"]
        assert "hovle_choices_in_flight 0" in client.get("/metrics").text


def test_a_failing_engine_is_reported(assistant, monkeypatch):
    """Everybody who waits hears of it, later requests and /health too."""
    with open_client(assistant) as client:
        engine = client.app.state.engine

        def step():
            raise MemoryError("no room on the device")

        monkeypatch.setattr(engine, "step", step)
        assert client.post("/v1/chat/completions", json=body()).status_code == 503
        assert client.post("/v1/chat/completions", json=body()).status_code == 503
        health = client.get("/health")
        assert health.status_code == 503
        assert health.json()["reason"] == "no room on the device"


# Over a socket: what an in-process client cannot do


class Gate:
    """An engine that pauses before each step until it is opened."""

    def __init__(self, engine):
        self._engine, self.open = engine, threading.Event()
        self.open.set()

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def step(self):
        assert self.open.wait(60)
        return self._engine.step()


@pytest.fixture
def gated(assistant, request):
    """(engine behind a gate, server, its address): a real server on a free port. The parameter is
    how many seconds it gives to answers under way when it is told to stop."""
    engine = Gate(assistant.engine(slots=2, context=1024, tiles=16, chunk=1))
    application = app.create_app(assistant, engine, name="hovle", limits=LIMITS)
    config = uvicorn.Config(
        application,
        port=0,
        log_level="warning",
        timeout_graceful_shutdown=getattr(request, "param", 60),
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield engine, server, f"http://127.0.0.1:{port}"
    engine.open.set()
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(gated, stream):
    engine, _, url = gated
    engine.open.clear()
    asked = body(stream=stream, max_tokens=60, n=2)
    if stream:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked) as response:
            assert next(response.iter_lines()).startswith("data: ")
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=1.0)

    def metric(line: str) -> bool:
        return line in httpx.get(f"{url}/metrics").text

    wait_for(lambda: metric("hovle_choices_in_flight 0"))
    assert metric('hovle_requests_total{status="499"} 1')
    engine.open.set()
    wait_for(lambda: not engine.running and not engine.waiting)
    made = int(re.search(r"generated_tokens_total (\d+)", httpx.get(f"{url}/metrics").text)[1])
    assert made <= 2 * 2  # the step that was under way, of 120 tokens


def test_drain(gated):
    """A server that is told to stop answers what it has begun, and takes nothing new."""
    engine, server, url = gated
    engine.open.clear()
    answers = []

    def client() -> None:
        answers.append(httpx.post(f"{url}/v1/chat/completions", json=body(), timeout=60))

    thread = threading.Thread(target=client)
    thread.start()
    wait_for(lambda: "hovle_choices_in_flight 1" in httpx.get(f"{url}/metrics").text)
    server.should_exit = True  # what SIGTERM sets

    def refused() -> bool:
        try:
            httpx.get(f"{url}/health", timeout=1)
        except httpx.TransportError:
            return True
        return False

    wait_for(refused)
    engine.open.set()
    thread.join(60)
    assert answers[0].status_code == 200 and text_of(answers[0].json())


@pytest.mark.parametrize("gated", [1], indirect=True)
@pytest.mark.parametrize("stream", [True, False])
def test_what_takes_longer_than_the_drain_is_told(gated, stream, caplog):
    engine, server, url = gated
    engine.open.clear()
    found = []

    def client() -> None:
        try:
            asked = body(stream=stream)
            found.append(httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60))
        except httpx.RemoteProtocolError as error:  # a stream has said 200 already
            found.append(error)

    thread = threading.Thread(target=client)
    thread.start()
    wait_for(lambda: "hovle_choices_in_flight 1" in httpx.get(f"{url}/metrics").text)
    server.should_exit = True
    thread.join(60)
    if stream:
        assert isinstance(found[0], httpx.RemoteProtocolError)
    else:
        assert found[0].status_code == 503 and "is stopping" in found[0].text
    assert not any(record.exc_info for record in caplog.records)


def test_a_refused_client_is_heard_out(gated):
    """An answer before the end of a large request would be a broken connection to its sender."""
    engine, _, url = gated
    engine.open.clear()
    threads = [
        threading.Thread(
            target=httpx.post,
            args=(f"{url}/v1/chat/completions",),
            kwargs={"json": body(), "timeout": 60},
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: "hovle_choices_in_flight 4" in httpx.get(f"{url}/metrics").text)
    for _ in range(5):
        response = httpx.post(f"{url}/v1/chat/completions", json=body("x" * 150_000))
        assert response.status_code == 429
    engine.open.set()
    for thread in threads:
        thread.join(60)


def test_a_server_drops_no_connection_that_its_clients_keep(release, monkeypatch):
    """Closed by both at once, an idle connection breaks with the next question on it."""
    settings = {}
    monkeypatch.setattr(uvicorn, "run", lambda application, **given: settings.update(given))
    assert main(["serve", str(release), "--context", "256", "--slots", "1"]) == 0
    assert uvicorn.Config(None, **settings).timeout_keep_alive > httpx.Limits().keepalive_expiry
