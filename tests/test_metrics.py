"""Metrics files and the progress line."""

from __future__ import annotations

import io
import json

import pytest
from etils import epath

from hovle_jax.checkpoint import REWINDS, add_rewind, read_rewinds
from hovle_jax.errors import UserError
from hovle_jax.run.metrics import MetricLog, Progress, read_metrics


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_resumed_log_has_no_duplicate_and_no_torn_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(1, 8)) + '{"step": 8, "l')
    assert [r["step"] for r in read_metrics(path)] == list(range(1, 8))
    log = MetricLog(path, start_step=5)
    log.write({"step": 6})
    log.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5, 6]


def test_what_follows_a_broken_row_is_not_lost_without_a_sound(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1}\n{"step\n{"step": 3}\n'
    path.write_text(whole)
    with pytest.raises(UserError, match=r"metrics.jsonl:2: is no row of JSON; mend or delete it"):
        MetricLog(path, start_step=3)
    assert path.read_text() == whole
    (tmp_path / REWINDS).write_text('{"step": 1}\n{"st')
    assert read_rewinds(epath.Path(tmp_path)) == [{"step": 1}]
    (tmp_path / REWINDS).write_text('{"step": 1}\n[]\n')
    with pytest.raises(UserError, match="rewinds.jsonl:2: is no row"):
        read_rewinds(epath.Path(tmp_path))


def test_a_crash_loses_no_rewind(tmp_path, monkeypatch):
    def crash(*_) -> None:
        raise KeyboardInterrupt

    storage = epath.Path(tmp_path)
    add_rewind(storage, {"step": 1})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.fsync", crash)
        add_rewind(storage, {"step": 2})
    assert read_rewinds(storage) == [{"step": 1}]
    add_rewind(storage, {"step": 3})
    assert read_rewinds(storage) == [{"step": 1}, {"step": 3}]


def test_progress_is_one_line_in_a_terminal():
    out = Terminal()
    progress = Progress("stage", 3, every=1, out=out)
    for i in (1, 2, 3):
        progress.update(i, f"loss {i}")
    assert out.getvalue().count("\n") == 1 and out.getvalue().endswith("\n")
    assert "stage 3/3  loss 3" in out.getvalue()


def test_progress_is_a_line_every_n_elsewhere():
    out = io.StringIO()
    progress = Progress("stage", 25, every=10, out=out)
    for i in range(1, 26):
        progress.update(i)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["10/25", "20/25", "25/25"]
