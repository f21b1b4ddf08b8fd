"""Registries and the modules that add to them."""

import pytest

from hovle_jax.config import ModelConfig, from_dict
from hovle_jax.errors import UserError
from hovle_jax.registry import Registry, load_plugins


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


@pytest.mark.parametrize("name", ["no_such_module_anywhere", "no/such/file.py"])
def test_a_plugin_that_is_not_there_is_one_line(name):
    with pytest.raises(UserError, match=r"^model.plugins: .*no.such") as caught:
        load_plugins([name])
    assert "\n" not in str(caught.value)
