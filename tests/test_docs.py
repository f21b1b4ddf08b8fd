"""The pages against the code: links, commands and what runs them, config keys, messages, costs."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import math
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from hovle_jax.cli import plan
from hovle_jax.cli.main import _parser, load_config
from hovle_jax.config import RunConfig
from hovle_jax.tpu import aot, chips
from hovle_jax.tpu.cost import Cost

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *DOCS.rglob("*.md"),
        *ROOT.glob("launch/*.md"),
        *ROOT.glob("examples/*.md"),
    ]
)
RUN = (ROOT / "README.md", DOCS / "quickstart.md")  # every command of which says what runs it
name = lambda path: str(path.relative_to(ROOT))  # noqa: E731


def prose(text: str) -> str:
    """The page without code blocks and code in the line, where brackets are no links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^    .*$", "", text, flags=re.M))


def anchors(path: Path) -> set[str]:
    """What MkDocs and GitHub make of the headings."""
    found: set[str] = set()
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
    for title in re.findall(r"^#+ (.*)$", text, flags=re.M):
        slug = re.sub(r"[^\w\s-]", "", title).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", slug))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{name(page)}: no heading for {target}"


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": (\S+\.md)$", (DOCS / "site/mkdocs.yml").read_text(), flags=re.M))
    assert listed == {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(code, what follows it) of indented and fenced blocks; fenced python is not a command."""
    pattern = r"^ {4}.*\n(?:(?: {4}.*|[ ]*)\n)*^ {4}.*\n|^ {4}.*\n|^```\w*\n[\s\S]*?^```\n"
    text = page.read_text()
    for match in re.finditer(pattern, text, flags=re.M):
        if not match[0].startswith("```python"):
            yield match[0], text[match.end() :].lstrip("\n").partition("\n\n")[0]


def commands(code: str) -> Iterator[list[str]]:
    """The shell commands of a block, continued lines joined, comments and environment left out."""
    lines = re.sub(r"\\\n", " ", code).splitlines()
    for line in lines:
        if re.match(r" *(hovle|bash|pip|source|mkdocs|[A-Z]+=\S+ hovle) ", line):
            words = shlex.split(re.sub(r"\s#.*", "", line))  # a # in a word begins no comment
            yield [w for w in words if w != "&&"]


def hovle_commands(page: Path) -> Iterator[list[str]]:
    for code, _ in blocks(page):
        yield from (c for c in commands(code) if c[0] == "hovle")
    for line in re.findall(r"`(hovle [a-z][^`\n]*)`", page.read_text()):
        yield shlex.split(line)


def leaf(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser of a command and the words that are left for it."""
    parser = _parser()
    while words:
        nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not nested:
            break
        if words[0] in ("--debug", "--version", "...") or "|" in words[0]:
            return parser, []
        assert words[0] in nested[0].choices, f"no command {words[0]!r}"
        parser, words = nested[0].choices[words[0]], words[1:]
    return parser, words


def check_key(key: str) -> None:
    """`model.decoder.num_layers` leads through the dataclasses."""
    kind: object = RunConfig
    for part in key.split("."):
        assert dataclasses.is_dataclass(kind), f"config.{key}: {part!r} is in no section"
        hints = typing.get_type_hints(kind)
        assert part in hints, f"config.{key}: no key {part!r}"
        kind = hints[part]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page):
    for command in hovle_commands(page):
        parser, words = leaf(command[1:])
        flags = [w.partition("=")[0] for w in words if w.startswith("--")]
        for flag in flags:
            if not flag.startswith("--config."):
                assert flag in parser._option_string_actions, f"{name(page)}: {command}: {flag}"
        for spec in re.findall(r"--config[= ](configs/\S+?\.py)", " ".join(words)):
            mine = spec.endswith("deeper.py")  # the quick start writes it
            assert mine or (ROOT / spec).exists(), f"{name(page)}: {spec}"
    for command in (c for code, _ in blocks(page) for c in commands(code) if c[0] == "hovle"):
        if "..." not in command:  # exits if an argument is missing; N, K and I stand for numbers
            _parser().parse_known_args([re.sub(r"(^|=)[NKI]$", r"\g<1>1", w) for w in command[1:]])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_config_keys_exist(page):
    text = page.read_text()
    for key in re.findall(r"--config\.([a-z_][\w.]*\w)", text):
        if key != "a.b":  # any key
            check_key(key)
    for key in re.findall(r"`config\.([a-z_][\w.]*\w)[`=( ]", text):
        if not re.match(r"(json|py)\b", key):
            check_key(key)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_imports_in_examples_exist(page):
    for module, names in re.findall(
        r"^ *from (hovle_jax[\w.]*) import ([\w, ]+)", page.read_text(), flags=re.M
    ):
        found = importlib.import_module(module)
        for each in names.split(","):
            try:
                getattr(found, each.strip())
            except AttributeError:
                importlib.import_module(f"{module}.{each.strip()}")


def defined(file: Path) -> set[str]:
    return {n.name for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)}


@pytest.mark.parametrize("page", RUN, ids=name)
def test_every_command_is_run_by_a_test_or_says_what_it_needs(page):
    """A block of commands is followed by `<!-- test: FILE::TEST ... -->`, `<!-- needs: ... -->`."""
    for code, after in blocks(page):
        called = list(commands(code))
        if not called:
            continue
        mark = re.match(r"<!-- (.*?) -->", after, flags=re.S)
        assert mark, f"{name(page)}: nothing says what runs {called[0]}"
        nodes = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", mark[1])
        for file, test in nodes:
            assert (ROOT / file).is_file(), file
            assert not test or test in defined(ROOT / file), f"{file}::{test}"
        assert re.match(r"test: tests/|needs: \w", mark[1]), mark[1]
        if mark[1].startswith("test:") and "test_the_quick_start" not in mark[1]:
            source = "".join((ROOT / file).read_text() for file, _ in nodes)
            for command in called:  # a named test runs this command and not another one
                word = command[2] if command[1] in ("data", "bench") else command[1]
                word = re.escape(word.removeprefix("launch/"))
                found = re.search(rf'"{word}"|run_{word}|hovle_jax\.{word}\b|\b{word}\(', source)
                assert found, f"{name(page)}: {word} is not in {mark[1]}"


def messages() -> list[str]:
    """Every string of the package, what is filled in as '...'."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(text(v) for v in node.values)
        return "..."

    return [
        text(node)
        for path in (ROOT / "hovle_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    ]


def test_messages_of_the_troubleshooting_page_are_in_the_code():
    known = [re.sub(r"\s+", " ", m) for m in messages()]
    quoted = re.findall(r"^\| `([^`]+)`", (DOCS / "faq.md").read_text(), flags=re.M)
    assert len(quoted) > 30
    for message in quoted:
        pieces = [p.strip(" .:();") for p in message.split("...")]
        pattern = ".*".join(re.escape(p) for p in pieces if p)
        if "_seconds" not in message:  # a metric
            assert any(re.search(pattern, m) for m in known), message


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def number(cell: str) -> float:
    return float(cell.replace(",", "").removesuffix("%").strip())


def test_costs_follow_from_configs_and_plans():
    """docs/stages.md, from the steps of configs/ and the plans of their rows."""
    performance, page = ((DOCS / f"{p}.md").read_text() for p in ("performance", "stages"))
    section = performance[performance.index("### Rows as configured") :]
    plans = {
        (row[1], row[2].partition(":")[0]): row
        for row in map(cells, re.findall(r"^\| hovle_2b .*$", section, flags=re.M))
    }
    assert len(plans) == 9
    summary = re.findall(r"^\| I+ `\w+` \|.*$", performance, flags=re.M)
    assert len(summary) == 3
    for stage, *found in map(cells, summary):
        rows = [plans[stage.split()[0], chip] for chip in ("v5e", "v5p", "v6e")]
        mfu = [row[9].partition(",")[0] for row in rows]
        assert found == [
            f"{row[6]} s, {x}, {row[5].split()[0]} GiB" for row, x in zip(rows, mfu, strict=True)
        ]
    table = {
        row[0]: row for row in map(cells, re.findall(r"^\| (?:I+|all) \|.*$", page, flags=re.M))
    }
    total = dict.fromkeys(("v5e", "v5p", "v6e"), 0.0)
    for stage, file in (("I", "1_distill"), ("II", "2_align"), ("III", "3_instruct")):
        config = load_config(str(ROOT / f"configs/stage{file}.py"))
        seconds, hours = {}, {}
        for chip in total:
            row = plans[stage, chip]
            rows, tokens, tiles = map(number, re.findall(r"[\d,]*\d", row[3]))
            assert (tokens, tiles) == (config.data.tokens, config.data.tiles)
            seconds[chip] = number(row[6]) / rows
            waiting = 1 + number(row[8]) / 100
            hours[chip] = config.steps * config.data.rows * seconds[chip] * waiting / 3600
            assert number(row[10].partition(", ")[2]) == pytest.approx(hours[chip], rel=0.01)
            total[chip] += hours[chip]
        expected = [seconds["v5e"], hours["v5e"], hours["v5e"] / 256, hours["v5p"], hours["v6e"]]
        assert [number(c) for c in table[stage][1:]] == pytest.approx(expected, rel=0.01)
        assert f"{config.steps:,} x {config.data.rows}" in page
    expected = [total["v5e"], total["v5e"] / 256, total["v5p"], total["v6e"]]
    assert [number(c) for c in table["all"][2:]] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("stage, which", [("1_distill", 1), ("2_align", 2), ("3_instruct", 2)])
def test_a_plan_counts_host_cores_as_they_were_measured(stage, which):
    page = (DOCS / "performance.md").read_text()
    rates = re.search(r"core delivered (\d+) tiles/s of stage I and (\d+) of stages II", page)
    assert rates
    config = load_config(str(ROOT / f"configs/stage{stage}.py:hovle_2b"))
    step = aot.Plan(aot.Memory(0.0, 0.0, 0.0, 1.0), 1.0, Cost(2.0, 0.0, 0.0, (), (), 0.0))
    target = aot.Topology("v5e:1x1", chips.CHIPS["v5e"], 1, (None,))
    tiles = config.data.rows * config.data.tiles / 2.0
    cores = plan.report(config, target, step)["host_cores"]
    assert cores == math.ceil(tiles / int(rates[which]))


def test_parameters_of_the_model_page():
    page = (DOCS / "model.md").read_text()
    counts = [
        number(c) for c in re.findall(r"^\| (?:`\w+/|all).*\| ([\d,]+) \|$", page, flags=re.M)
    ]
    config = load_config(str(ROOT / "configs/stage3_instruct.py:hovle_2b")).model
    assert sum(counts[:-1]) == counts[-1] == config.params()


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings_handlers.python", reason="pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/site/mkdocs.yml"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (
        "hovle_jax.model.apply"
        in (tmp_path / "site/reference/hovle_jax.model/index.html").read_text()
    )
    assert 'href="launch/"' in (tmp_path / "site/index.html").read_text()
    launch = (tmp_path / "site/launch/index.html").read_text()
    assert 'href="../performance/#method"' in launch
