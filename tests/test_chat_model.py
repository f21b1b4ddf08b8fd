"""`hovle chat` on a Hugging Face directory as the reference's save_pretrained() writes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hovle_jax
from hovle_jax.chat import Assistant, first_question
from hovle_jax.cli import main
from hovle_jax.data.tokenizer import IM_END, train_tokenizer

RELEASE = Path(__file__).parent / "golden" / "hovle" / "a_pre"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The recorded checkpoint with a tokenizer whose added tokens fall on the model's ids."""
    root = tmp_path_factory.mktemp("release") / "model"
    shutil.copytree(RELEASE, root)
    lines = [Path(hovle_jax.__file__).with_name("stages.py").read_text()]
    assert train_tokenizer(lines, root, 298).id_of(IM_END) == 298
    pixels = np.random.default_rng(0).integers(0, 256, (120, 60, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(root.parent / "image.png")
    return root


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
