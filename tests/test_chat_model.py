"""`hovle chat` on a Hugging Face directory as the reference's save_pretrained() writes it."""

from __future__ import annotations

import pytest

import hovle_jax
from hovle_jax.cli.main import main
from hovle_jax.data.records import Turn
from hovle_jax.generation.chat import Assistant, Chat, Question, first_question, interactive

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_load_gives_config_and_parameters(release):
    config, params = hovle_jax.load(release)
    assert config.tokens_per_tile == 4 and config.img_context_id == 302
    assert params["decoder"]["head"]["kernel"].shape == (64, 309)


def test_a_release_answers(release, capsys):
    image = str(release.parent / "image.png")
    argv = ["chat", str(release), "--image", image, "--prompt", "a b", "--max-new-tokens", "6"]
    assert main(argv) == 0
    spoken = capsys.readouterr().out.strip()
    assistant = Assistant.load(release)
    asked = assistant.answer([first_question("a b", [image])], max_new=6)[0]
    assert spoken == asked.strip()
    assert asked != assistant.answer([first_question("a b", [])], max_new=6)[0]


# The terminal


@pytest.fixture
def chat(release):
    """(a conversation with a release, what it has written so far)."""
    assistant = Assistant.load(release)
    written: list[str] = []
    return Chat(assistant, [], 6, write=written.append), written, assistant


def reply(written: list[str]) -> str:
    """The answer of the last line, from its pieces."""
    text = "".join(written)
    written.clear()
    assert text.startswith("hovle> ") and text.endswith("\n")
    return text.removeprefix("hovle> ").removesuffix("\n")


def test_a_conversation(chat, release):
    """History, two images and starting over: each answer is the one to the whole conversation."""
    talk, written, assistant = chat
    image = str(release.parent / "image.png")
    assert talk.line("a b")
    turns = (Turn("user", "a b"),)
    first = reply(written)
    assert first == assistant.answer([Question(turns)], max_new=6)[0]
    assert talk.line(f"/image {image}") and talk.line(f"/image {image}")
    assert "".join(written).count("60 x 120 pixels") == 2
    written.clear()
    assert talk.line("which")
    turns = (*turns, Turn("assistant", first), Turn("user", "<image>\n<image>\nwhich"))
    second = reply(written)
    assert second == assistant.answer([Question(turns, (image, image))], max_new=6)[0]
    assert talk.line("and now")
    turns = (*turns, Turn("assistant", second), Turn("user", "and now"))
    assert reply(written) == assistant.answer([Question(turns, (image, image))], max_new=6)[0]
    assert talk.line("/reset")
    written.clear()
    assert talk.line("a b") and reply(written) == first
    assert not talk.line("")


def test_mistakes_do_not_end_a_conversation(chat):
    talk, written, _ = chat
    assert talk.line("a b")
    first = reply(written)
    for line, message in (
        ("/image no.png", "error: /image: image file not found: no.png"),
        ("/imagine", "/image PATH adds"),
        ("<image>", "error: the question: 1 '<image>' in user turns but 0 images"),
        ("word " * 9000, "more than the context of 8192"),
    ):
        assert talk.line(line)
        assert message in "".join(written)
        written.clear()
    assert talk.line("/reset")
    written.clear()
    assert talk.line("a b") and reply(written) == first


def test_an_interrupted_answer_is_part_of_the_conversation(chat):
    talk, written, assistant = chat
    pieces = []

    def write(text: str) -> None:
        written.append(text)
        pieces.append(text)
        if len(pieces) == 3:  # "hovle> ", the first piece, the second
            raise KeyboardInterrupt

    talk._write = write
    assert talk.line("a b")
    assert "".join(written).endswith(" ...\n")
    assert not talk._engine.running
    talk._write = written.append
    written.clear()
    turns = (Turn("user", "a b"), Turn("assistant", pieces[1]), Turn("user", "and now"))
    assert talk.line("and now")
    assert reply(written) == assistant.answer([Question(turns)], max_new=6)[0]


def test_interactive_reads_lines(chat, monkeypatch, capsys):
    talk, written, _ = chat
    lines = iter(["a b", "", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    interactive(talk)
    assert len("".join(written).splitlines()) == 1
    assert "/reset" in capsys.readouterr().out and next(lines) == "never read"
