"""Measured lengths: by processes that die, in blocks that stay, told apart by a digest."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from hovle_jax.config import DataConfig
from hovle_jax.data import index
from hovle_jax.data.index import Lengths, lengths_of
from hovle_jax.data.samples import Length
from hovle_jax.errors import UserError

DATA = DataConfig(tokens=100, tiles=4, max_bad=0.5)


@dataclasses.dataclass
class Records:
    """Record i has i % 7 + 1 tokens; every tenth is bad; one kills its process the first time."""

    count: int
    log: Path  # a byte per measured record
    deadly: int = -1
    killed: Path | None = None
    name: str = "records"

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> tuple[str, ...]:
        return ("records",)

    def measure(self, i: int) -> Length:
        if i == self.deadly and self.killed and not self.killed.exists():
            self.killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with self.log.open("ab") as file:
            file.write(b".")
        if i % 10 == 9:
            raise UserError(f"record {i}: bad")
        return Length(i % 7 + 1, i % 3, f"record {i}: cut" if i % 20 == 0 else "")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(index, "_CHUNK", 10)
    monkeypatch.setattr(index, "_BLOCK", 50)


def test_a_worker_that_is_killed_is_an_error_and_the_same_command_continues(tmp_path):
    """As the kernel does where memory ends; it must not wait for the rest for ever."""
    count = 3 * index._CHUNK
    source = Records(count, tmp_path / "log", count - 5, tmp_path / "killed")
    with pytest.raises(UserError, match=r"measuring records: stopped \(a worker died: too little"):
        lengths_of(source, DATA, tmp_path / "index", quiet=True, workers=2)
    measured = lengths_of(source, DATA, tmp_path / "index", quiet=True, workers=2)
    alone = lengths_of(source, DATA, None, quiet=True)
    assert measured.summary == alone.summary and measured.summary.left_out == count // 10


def test_a_kill_costs_one_block(tmp_path, small_blocks):
    source, directory = Records(333, tmp_path / "log"), tmp_path / "index"

    class Killed(BaseException):
        pass

    class Stopping(Records):
        def measure(self, i: int) -> Length:
            if i == 120:
                raise Killed
            return super().measure(i)

    with pytest.raises(Killed):
        lengths_of(Stopping(333, tmp_path / "first"), DATA, directory, quiet=True)
    (parts,) = directory.glob("records-*.parts")
    assert sorted(p.name for p in parts.glob("*.npy")) == ["00000.npy", "00001.npy"]
    (parts / "00001.npy").write_bytes(b"half")  # of a broken disk: measured again
    measured = lengths_of(source, DATA, directory, quiet=True)
    assert len((tmp_path / "log").read_bytes()) == 333 - 50
    assert [p.suffix for p in sorted(directory.iterdir())].count(".npy") == 1
    assert not parts.exists() and not list(directory.rglob("*.tmp"))
    whole = lengths_of(source, DATA, tmp_path / "other", quiet=True)
    assert measured.summary == whole.summary
    for kind in ("rejects.jsonl", "cut.jsonl", "json", "npy"):
        (one,), (other,) = (d.glob(f"*[0-9a-f].{kind}") for d in (directory, tmp_path / "other"))
        assert one.read_bytes() == other.read_bytes()


def test_the_start_says_where_records_left_out_are_listed(tmp_path, capsys):
    for _ in range(2):  # measured, opened
        lengths_of(Records(40, tmp_path / "log"), DATA, tmp_path / "index")
        said = capsys.readouterr().out
        (table,) = (tmp_path / "index").glob("*.npy")
        listed = table.with_suffix(".rejects.jsonl")
        assert "records: 4 records cannot be read and are left out (record 9: bad; " in said
        assert f"all in {listed}; once they are repaired, delete {table} to measure again" in said
        assert f"all in {table.with_suffix('.cut.jsonl')}" in said
    table.unlink()
    lengths_of(Records(40, tmp_path / "log"), DATA, tmp_path / "index", quiet=True)
    assert len((tmp_path / "log").read_bytes()) == 80
    table.with_suffix(".json").write_text("{}")
    with pytest.raises(UserError, match=r"damaged .* delete it to measure again"):
        lengths_of(Records(40, tmp_path / "log"), DATA, tmp_path / "index", quiet=True)


def test_a_digest_tells_lengths_apart():
    table = np.array([[3, 1], [0, 0], [5, 0], [5, 1]], np.int32)
    other = table.copy()
    other[2] = 4, 1
    assert Lengths(table).summary.left_out == Lengths(other).summary.left_out == 1
    assert Lengths(table).summary.digest != Lengths(other).summary.digest
    assert Lengths(table).summary == Lengths(table.copy()).summary


def test_a_source_of_which_nothing_is_left_is_an_error(tmp_path):
    class Bad(Records):
        def measure(self, i: int) -> Length:
            raise UserError(f"record {i}: bad")

    everything = dataclasses.replace(DATA, max_bad=1.0)
    with pytest.raises(UserError, match="records: all of its 12 records are left out"):
        lengths_of(Bad(12, tmp_path / "log"), everything, None, quiet=True)
