"""The directory that an import or export writes: all of it or nothing, and over nobody's files."""

import errno
import os
import shutil
import subprocess
import sys

import pytest

from hovle_jax.errors import UserError
from hovle_jax.hf import card
from hovle_jax.hf.directory import new_directory
from hovle_jax.hf.export import export
from tests.test_convert import A_PRE, PLAIN, assert_same, tensors_of


def test_disk_full(tmp_path, one_line_error, monkeypatch):
    """Too little space is seen before anything is written; running out leaves nothing."""
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        for command in ("import", "export"):
            message = one_line_error([command, str(A_PRE), str(tmp_path / "out")])
            assert "needs 0.00 GB" in message
    with (
        pytest.raises(UserError, match="no space left"),
        new_directory(tmp_path / "out", 0) as partial,
    ):
        (partial / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["import", "export"])
def test_file_size_limit_leaves_nothing(command, tmp_path):
    """A real failure of the kernel in the middle of writing, in a process of its own."""

    code = (
        "import signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from hovle_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "limited"]  # in 1024 bytes
    run = subprocess.run(
        [*limited, sys.executable, "-c", code, command, str(A_PRE), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in run.stderr, run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_stale_partial_directory_is_replaced(tmp_path):
    stale = tmp_path / "out.partial"
    stale.mkdir()
    (stale / "model.safetensors").write_text("half")
    export(A_PRE, tmp_path / "out", PLAIN)
    assert not stale.exists()
    assert_same(tensors_of(tmp_path / "out"), tensors_of(A_PRE))


def test_export_refuses_what_it_would_overwrite(tmp_path, one_line_error):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    assert "exists already" in one_line_error(["export", str(A_PRE), str(tmp_path / "out")])
    assert (tmp_path / "out/precious").read_text() == "x"


def test_a_new_directory_may_be_a_link_and_no_mount(tmp_path, monkeypatch):
    """A mounted disk cannot be replaced by the directory beside it, which was written whole."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with new_directory(tmp_path / "link", 0) as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "disk/file").read_text() == "x" and (tmp_path / "link").is_symlink()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("out"))
    with (
        pytest.raises(UserError, match="out: is where a disk is mounted"),
        new_directory(tmp_path / "out", 0),
    ):
        pass


def test_an_export_needs_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert card._commit() in ("unknown commit", "released package")
