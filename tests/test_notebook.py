"""docs/tour.ipynb: every cell as it stands, without Jupyter; committed without outputs."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs/tour.ipynb"


def test_every_cell_runs(monkeypatch):
    monkeypatch.chdir(NOTEBOOK.parent)
    space: dict = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [] and cell["execution_count"] is None
        exec(compile(ast.parse("".join(cell["source"])), cell["id"], "exec"), space)
    try:
        made = {p.name for p in (space["OUT"] / "exported").iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= made
        assert space["out"]["logits"].shape == (8, 64, space["tokenizer"].vocab_size)
        rows = (space["OUT"] / "run/metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [1, 2]
        assert json.loads(rows[-1])["loss"] == pytest.approx(json.loads(rows[0])["loss"], rel=1)
    finally:
        shutil.rmtree(space["OUT"])
