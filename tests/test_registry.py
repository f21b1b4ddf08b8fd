"""Registries and the modules that add to them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from hovle_jax.checkpoint import read_config, write_config
from hovle_jax.config import ModelConfig, from_dict
from hovle_jax.data.samples import get_template
from hovle_jax.errors import UserError
from hovle_jax.losses import DISTANCES
from hovle_jax.registry import Registry, load_plugins

DOCS = Path(__file__).parent.parent / "docs"


def test_names_are_given_once_and_found():
    colours: Registry[int] = Registry("paint.colour")
    colours.add("red")(1)
    assert colours.find("red") == 1
    with pytest.raises(UserError, match=r"paint.colour: 'red' is registered already"):
        colours.add("red")(2)
    with pytest.raises(UserError, match=r"paint.colour: 'rot' is not one of red.*model.plugins"):
        colours.find("rot")


def test_a_file_is_loaded_once_and_before_the_rest_of_a_config(tmp_path):
    file = tmp_path / "fork.py"
    file.write_text("from pathlib import Path\nPath(__file__).with_suffix('.ran').touch(False)\n")
    raw = {"plugins": (str(file),)}
    for _ in range(2):  # touch fails where the file is there
        assert from_dict(ModelConfig, raw, "config.model").plugins == (str(file),)
    assert file.with_suffix(".ran").exists()
    assert from_dict(ModelConfig, {}, "config.model").plugins == ()


def test_a_chat_template_of_a_plugin(tmp_path):
    """The one of docs/extending.md."""
    text = (DOCS / "extending.md").read_text().partition("## A chat template")[2]
    file = tmp_path / "template.py"
    file.write_text("\n".join(x[4:] for x in text.splitlines() if x.startswith("    ")))
    load_plugins([str(file)])
    assert get_template("vicuna").user_prefix == "USER: "
    with pytest.raises(UserError, match=r"data.template: 'vicunna' is not .* mean 'vicuna'"):
        get_template("vicunna")


@pytest.mark.parametrize("name", ["no_such_module_anywhere", "no/such/file.py"])
def test_a_plugin_that_is_not_there_is_one_line(name):
    with pytest.raises(UserError, match=r"^model.plugins: .*no.such") as caught:
        load_plugins([name])
    assert "\n" not in str(caught.value)


def test_a_plugin_that_fails_says_where(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import math\n\nmath.nothing\n")
    with pytest.raises(UserError, match=r"broken.py, line 3: AttributeError: module 'math' has no"):
        load_plugins([str(file)])
    file.write_text("import math\n\ndef f(:\n")
    with pytest.raises(UserError, match=r"broken.py: SyntaxError: .*line 3"):
        load_plugins([str(file)])


def adds(name, value):
    return f"from hovle_jax.losses import DISTANCES\nDISTANCES.add({name!r})({value})\n"


def test_a_file_is_its_content(tmp_path, monkeypatch):
    for where, value in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / where).mkdir()
        (tmp_path / where / "own.py").write_text(adds("by_content", value))
        monkeypatch.chdir(tmp_path / where)
        if value == 1:
            load_plugins(["own.py"])
            continue
        with pytest.raises(UserError, match=r"'by_content' is registered.*a/own.py; .*c/own.py"):
            load_plugins(["own.py"])


def test_a_directory_keeps_its_plugins(tmp_path, monkeypatch, capsys):
    """From elsewhere, where the file is not there or another has its name; a changed one that
    this process has run goes on, with a line that says so."""
    for where in ("home", "empty", "other"):
        (tmp_path / where).mkdir()
    monkeypatch.chdir(tmp_path / "home")
    (tmp_path / "home" / "kept.py").write_text(adds("kept", 1))
    raw = {"plugins": ("kept.py",)}
    config = from_dict(ModelConfig, raw, "config.model")
    write_config(tmp_path / "model", config)
    (tmp_path / "other" / "kept.py").write_text("raise SystemExit('the wrong file')")
    for where, says in (("empty", ""), ("other", "is not the file that")):
        code = (
            "from hovle_jax.checkpoint import read_config as r; import sys\n"
            "r(sys.argv[1]); r(sys.argv[1])\n"
            "from hovle_jax.losses import DISTANCES; assert DISTANCES['kept'] == 1"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "model")],
            cwd=tmp_path / where,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("\n") == bool(says) and says in done.stderr

    kept = next((tmp_path / "model" / "plugins").iterdir())
    kept.write_text(adds("kept", 3))
    assert read_config(tmp_path / "model") == config and DISTANCES["kept"] == 1
    assert "home/kept.py runs, and has changed since" in capsys.readouterr().err
    kept.write_text(adds("kept", 4))
    monkeypatch.chdir(tmp_path / "empty")  # as if the file had moved to home
    assert read_config(tmp_path / "model") == config
    assert "home/kept.py runs, and has changed" not in capsys.readouterr().err  # said once
    write_config(tmp_path / "again", dataclasses.replace(config, name="x"))
    again = next((tmp_path / "again" / "plugins").iterdir())
    assert again.name == kept.name and again.read_text() == adds("kept", 1)
