"""Directories that are damaged or not what their config says: one line that names the place."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from etils import epath

import hovle_jax
from hovle_jax import checkpoint, model
from hovle_jax.errors import UserError
from hovle_jax.hf import importer, shards
from hovle_jax.hf.export import export
from hovle_jax.hf.importer import import_directory
from hovle_jax.hf.writer import ExportOptions
from hovle_jax.run import digests

A_PRE = pathlib.Path(__file__).parent / "golden/hovle/a_pre"


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    root = tmp_path_factory.mktemp("native") / "model"
    import_directory(A_PRE, root)
    return root


@pytest.fixture
def copy(native, tmp_path):
    return shutil.copytree(native, tmp_path / "copy")


def largest(directory: pathlib.Path) -> pathlib.Path:
    files = [p for p in directory.rglob("*") if p.is_file() and p.parent.name == "d"]
    return max(files, key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["cut", "missing", "no manifest", "half a manifest"])
def test_damaged_arrays(damage, copy, tmp_path, one_line_error):
    """By every reader: whole, in pieces and onto a mesh; also where the digests do not tell."""
    file = copy / "params/manifest.ocdbt" if "manifest" in damage else largest(copy / "params")
    if damage in ("missing", "no manifest"):
        file.unlink()
    else:
        with file.open("r+b") as f:
            f.truncate(file.stat().st_size // 2)
    message = one_line_error(["export", str(copy), str(tmp_path / "out")])
    assert str(file) in message and f"copy {copy / 'params'} again" in message
    with pytest.raises(UserError, match=file.name):
        hovle_jax.load(copy)
    digests.write(epath.Path(copy / "params"))
    message = one_line_error(["export", str(copy), str(tmp_path / "out")])
    assert str(copy / "params") in message and "copy it again" in message
    with pytest.raises(UserError) as error:
        hovle_jax.load(copy)
    assert "\n" not in str(error.value)
    if "manifest" not in damage:  # the largest file holds the patch kernel
        assert "cannot read embedding/vision/patch/kernel" in message
        stored = checkpoint.open_stored(copy)
        where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        name = "embedding/vision/patch/kernel"
        shape = model.abstract_params(stored.model)["embedding"]["vision"]["patch"]
        wanted = jax.ShapeDtypeStruct(shape["kernel"].shape, np.float32, sharding=where)
        with pytest.raises(UserError, match=f"cannot read {name}"):
            stored.read({name: wanted})


def test_a_flipped_bit(copy, tmp_path, one_line_error):
    """Of uncompressed weights: every reader would take it for a number."""
    file = largest(copy / "params")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    message = one_line_error(["export", str(copy), str(tmp_path / "out")])
    assert f"{file}: holds other bytes than were written" in message
    with pytest.raises(UserError, match="holds other bytes"):
        hovle_jax.load(copy)
    assert not (tmp_path / "out").exists()
    (copy / "params/digests.json").unlink()
    with pytest.raises(UserError, match="digests.json: missing"):
        hovle_jax.load(copy)


def edit_config(directory: pathlib.Path, **decoder: object) -> None:
    body = json.loads((directory / "config.json").read_text())
    body["config"]["decoder"] |= decoder
    (directory / "config.json").write_text(json.dumps(body))


def test_fewer_layers_than_arrays(copy, tmp_path, one_line_error):
    """The first layers alone would be a model too, and another one."""
    edit_config(copy, num_layers=2)
    message = one_line_error(["export", str(copy), str(tmp_path / "out")])
    assert "has shape (3, " in message and "the config says (2, " in message
    with pytest.raises(UserError, match="the config says"):
        hovle_jax.load(copy)


def test_arrays_that_the_config_has_not(copy):
    body = json.loads((copy / "config.json").read_text())
    body["config"] |= {"projector": False, "shuffle": 1, "image_size": 28}
    (copy / "config.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match="holds embedding/projector/.*, which the config has not"):
        hovle_jax.load(copy)


def test_missing_unused_tensors_are_said(copy, tmp_path):
    assert not any("class_embedding" in r for r in export(copy, tmp_path / "1", ExportOptions()))
    (copy / checkpoint.UNUSED).unlink()
    remarks = export(copy, tmp_path / "2", ExportOptions())
    (remark,) = [r for r in remarks if checkpoint.UNUSED in r]
    assert "class_embedding" in remark and "tok_embeddings" in remark and str(copy) in remark
    assert not any(
        checkpoint.UNUSED in r for r in export(copy, tmp_path / "3", ExportOptions(flavour="fused"))
    )


def test_unused_tensors_of_another_shape(copy, tmp_path, one_line_error):
    name = "embedding_model.vision_embeddings.class_embedding"
    importer.ShardWriter(copy, {name: ((1, 1, 3), np.dtype(np.float32))}, None, checkpoint.UNUSED)
    message = one_line_error(["export", str(copy), str(tmp_path / "out")])
    assert f"{checkpoint.UNUSED}: {name} is F32 [1, 1, 3], expected [1, 1, 64]" in message


def export_plain(source: pathlib.Path, out: pathlib.Path) -> None:
    export(source, out, ExportOptions())


@pytest.mark.parametrize("command", [import_directory, export_plain], ids=["import", "export"])
def test_read_errors_are_the_sources(command, tmp_path, monkeypatch):
    """Not 'OUT cannot be written'."""
    source, out = shutil.copytree(A_PRE, tmp_path / "hf"), tmp_path / "out"
    (source / "added_tokens.json").mkdir()  # a file that cannot be read, for root too
    (source / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError) as error:
        command(source, out)
    assert str(error.value) == f"{source / 'added_tokens.json'}: cannot be read (Is a directory)"
    (source / "added_tokens.json").rmdir()
    (source / "tokenizer.model").unlink()
    read = shards.read_tensor

    def failing(tensor):
        if tensor.start > 100_000:
            tensor.file.unlink(missing_ok=True)
        return read(tensor)

    for module in ("importer", "reader", "writer"):
        monkeypatch.setattr(f"hovle_jax.hf.{module}.read_tensor", failing)
    with pytest.raises(UserError) as error:
        command(source, out)
    assert f"{source / 'model.safetensors'}: cannot be read (No such file" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_broken_link(tmp_path, one_line_error):
    """What a cleaned cache leaves."""
    (tmp_path / "hf").mkdir()
    shutil.copy(A_PRE / "config.json", tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").symlink_to("../blobs/abc")
    message = one_line_error(["import", str(tmp_path / "hf"), str(tmp_path / "out")])
    assert "model.safetensors: cannot be read (a broken link to ../blobs/abc)" in message
