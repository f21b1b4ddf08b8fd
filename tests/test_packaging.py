"""What a wheel holds, and that bounds, constraints and the citation say the same."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import hovle_jax

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built offline by the installed setuptools, from a copy without what git ignores."""
    pytest.importorskip("setuptools", "70.1", reason="older ones need the package wheel for it")
    source = tmp_path_factory.mktemp("source")
    for name in ("hovle_jax", "tests", "configs", "launch"):
        ignored = shutil.ignore_patterns("__pycache__", "golden")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_a_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(wheel.namelist())
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"hovle_jax", f"hovle_jax-{hovle_jax.__version__}.dist-info"}
    files = {str(p.relative_to(ROOT)) for p in (ROOT / "hovle_jax").rglob("*") if p.is_file()}
    files = {f for f in files if "__pycache__" not in f}
    assert {n for n in names if n.startswith("hovle_jax/")} == files
    assert "hovle_jax/serve/page.html" in files and "hovle_jax/hf/remote/modeling_hovle.py" in files


def test_a_wheel_gives_the_command_and_the_licence(wheel):
    info = f"hovle_jax-{hovle_jax.__version__}.dist-info"
    assert "hovle = hovle_jax.cli.main:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert any(n.startswith(info) and n.endswith("LICENSE") for n in wheel.namelist())


def bounds() -> dict[str, str]:
    """Lower bounds of setup.cfg: what is always installed, and the extras of the tests."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    lines = [setup["options"]["install_requires"], *(extras[e] for e in ("demo", "serve", "text"))]
    found = re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)$", "\n".join(lines), flags=re.M)
    return {name.lower().replace("_", "-"): bound for name, bound in found}


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "launch" / f"constraints-{name}.txt").read_text()
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, flags=re.M))


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))


def test_every_dependency_has_a_bound_that_the_constraints_hold():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    always = setup["options"]["install_requires"].split()
    lowest, newest = pins("lowest"), pins("newest")
    assert len(always) == 14 and all(">=" in line for line in always)
    for name, bound in bounds().items():
        pinned = numbers(lowest[name])[: len(numbers(bound))]
        assert pinned == numbers(bound), f"{name}: bound {bound}, tested {lowest[name]}"
        assert not any(numbers(lowest[name])[len(pinned) :]), f"{name} {lowest[name]} is not lowest"
        assert numbers(newest[name]) >= numbers(lowest[name])


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == hovle_jax.__version__
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2412.16158" and len(paper["authors"]) == 11
