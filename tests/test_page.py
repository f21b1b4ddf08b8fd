"""The chat page: what is served, and (slow) what a real browser does with it."""

from __future__ import annotations

import base64
import configparser
import hashlib
import html.parser
import re
import shutil
import threading
import time
from pathlib import Path

import pytest

from hovle_jax.data.records import Turn
from hovle_jax.generation.chat import Assistant, Question, first_question
from hovle_jax.serve.protocol import Limits

pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
testclient = pytest.importorskip("starlette.testclient")
app = pytest.importorskip("hovle_jax.serve.app")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def assistant(release) -> Assistant:
    return Assistant.load(release)


def application(assistant: Assistant, api_key: str = ""):
    engine = assistant.engine(slots=1, context=1024, tiles=16, chunk=2)
    limits = Limits(new_tokens=512)
    return app.create_app(assistant, engine, name="small", limits=limits, api_key=api_key)


class Tags(html.parser.HTMLParser):
    """What a page loads, and the text inside its scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded: list[str] = []
        self.inside: dict[str, str] = {}
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._tag = tag
        self.loaded += [v for k, v in attrs if k in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag):
        self._tag = ""

    def handle_data(self, data):
        if self._tag in ("script", "style"):
            self.inside[self._tag] = self.inside.get(self._tag, "") + data


def test_the_page_runs_nothing_but_itself(assistant):
    """Its script and style have the sums the policy allows; nothing comes from elsewhere. A page
    that asks for the key has to be there without one."""
    with testclient.TestClient(application(assistant, api_key="secret")) as client:
        response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    tags = Tags(response.text)
    for tag, text in tags.inside.items():
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert set(tags.inside) == {"script", "style"} and tags.loaded == ["data:,"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "unsafe" not in policy and "http" not in policy
    assert not re.search(r"https?://|innerHTML|document\.write|\son\w+=", response.text)
    assert response.headers["x-content-type-options"] == "nosniff"


def test_the_page_is_installed():
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parent.parent / "setup.cfg")
    assert "page.html" in settings["options.package_data"]["hovle_jax.serve"]


@pytest.fixture
def address(assistant):
    """A server with a key on a free port."""
    config = uvicorn.Config(application(assistant, "secret"), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(60)


@pytest.mark.slow  # by hand: needs playwright and a chromium on the path
def test_a_conversation_in_a_browser(address, assistant, release):
    """Key, two images, a streamed answer, history, a refusal, /reset; no error on the console."""
    playwright = pytest.importorskip("playwright.sync_api")
    expect = playwright.expect
    expect.set_options(timeout=60_000)
    chromium = shutil.which("chromium") or pytest.skip("no chromium")
    image = str(release.parent / "image.png")
    new = 24
    expected = assistant.answer([first_question("a b", [image] * 2)], max_new=new)[0]
    turns = (
        Turn("user", "<image>\n<image>\na b"),
        Turn("assistant", expected),
        Turn("user", "and now"),
    )
    second = assistant.answer([Question(turns, (image, image))], max_new=new)[0]
    plain = assistant.answer([first_question("a b", [])], max_new=new)[0]
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 800, "height": 400})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.goto(address)
        page.wait_for_selector(".error")  # no key yet
        assert "API key" in page.inner_text(".error")
        assert all("401" in problem for problem in problems)
        problems.clear()
        page.fill("#key", "secret")
        page.fill("#tokens", str(new))
        page.dispatch_event("#key", "change")
        expect(page).to_have_title("small")
        page.click("#reset")

        def ask(text: str) -> str:
            page.fill("#text", text)
            page.press("#text", "Enter")
            expect(page.locator("#send")).to_have_text("Send")
            return str(page.locator(".turn").last.text_content())

        page.set_input_files("#files", [image, image])
        expect(page.locator("#waiting img")).to_have_count(2)
        page.evaluate(
            """() => { window.seen = new Set(); new MutationObserver(() => window.seen.add(
                document.querySelector('.assistant')?.textContent)).observe(
                document.querySelector('#log'), {childList: true, subtree: true,
                characterData: true}); }"""
        )
        assert ask("a b") == expected
        assert page.evaluate("window.seen.size") > 4  # it came in pieces
        assert page.locator("#waiting img").count() == 0
        assert page.locator(".user img").count() == 2
        assert ask("and now") == second
        page.set_input_files("#files", [image])  # takes its room from the log
        expect(page.locator("#waiting img")).to_have_count(1)
        expect(page.locator(".turn").last).to_be_in_viewport(ratio=0.9)
        page.click("#waiting img")
        expect(page.locator("#waiting img")).to_have_count(0)
        page.fill("#tokens", "513")
        assert "must be 1 to 512" in ask("refused") and "error" in str(
            page.locator(".turn").last.get_attribute("class")
        )
        assert page.input_value("#text") == "refused"
        page.fill("#tokens", str(new))
        page.fill("#text", "/reset")
        page.press("#text", "Enter")
        expect(page.locator(".turn")).to_have_count(0)
        assert ask("a b") == plain
        page.fill("#tokens", "500")
        page.fill("#text", "a long one")
        page.press("#text", "Enter")
        expect(page.locator(".assistant").last).to_have_text(re.compile(".{10}", re.DOTALL))
        page.click("#send")  # stops it
        expect(page.locator("#send")).to_have_text("Send")
        assert all("400" in problem for problem in problems)
        browser.close()
