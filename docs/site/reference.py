"""MkDocs hook: pages of what lies outside docs/: modules, the files of examples/, launch/."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
LEFT_OUT = {"cli", "bench", "demo", "remote"}  # commands and exported code, not an interface


def _modules():
    """Dotted names: `hovle_jax`, the modules beside it, then package by package."""
    for path in sorted(ROOT.glob("hovle_jax/**/*.py"), key=lambda p: (len(p.parts), p)):
        parts = path.relative_to(ROOT).with_suffix("").parts
        inner = parts[-1].startswith("__") or parts[-1].endswith("torch_worker")
        if not inner and not LEFT_OUT & set(parts):
            yield ".".join(parts)


def _examples():
    return sorted(path.stem for path in ROOT.glob("examples/*.py"))


def on_config(config):
    groups = {"": [{"hovle_jax": "reference/hovle_jax.md"}]}
    for module in _modules():
        _, *package, _ = module.split(".")
        title = module.removeprefix("hovle_jax.")
        groups.setdefault(".".join(package), []).append({title: f"reference/{module}.md"})
    top = groups.pop("")
    place = next(i for i, page in enumerate(config.nav) if "stages.md" in page.values())
    config.nav.insert(place + 1, {"Launch": "launch.md"})
    config.nav.append({"Examples": [{name: f"examples/{name}.md"} for name in _examples()]})
    config.nav.append({"API reference": top + [{name: pages} for name, pages in groups.items()]})
    return config


def on_files(files, config):
    for module in ("hovle_jax", *_modules()):
        body = f"---\ntitle: {module}\n---\n\n::: {module}\n"
        if module == "hovle_jax":
            body += "    options:\n      members: [load]\n"
        files.append(File.generated(config, f"reference/{module}.md", content=body))
    for name in _examples():
        body = f"# {name}\n\n```python\n{(ROOT / f'examples/{name}.py').read_text()}```\n"
        files.append(File.generated(config, f"examples/{name}.md", content=body))
    launch = (ROOT / "launch/README.md").read_text()
    files.append(File.generated(config, "launch.md", content=launch))
    return files


def _page(path):
    """The page of a file outside docs/ (or, seen from launch/, in it); "" if it has none."""
    for file, page in (
        (r"examples/(\w+)\.py", r"examples/\1.md"),
        (r"launch/README\.md(#.*)?", r"launch.md\1"),
        (r"docs/(.*)", r"\1"),
    ):
        if match := re.fullmatch(file, path):
            return match.expand(page)
    return ""


def on_page_markdown(markdown, page, **_):
    """Links that leave docs/ lead to the pages made above; of other files the name stays."""
    depth = page.file.src_uri.count("/")

    def link(match):
        text, up, path = match.groups()
        if up.count("/") <= depth:
            return match[0]
        return f"[{text}]({'../' * depth}{_page(path)})" if _page(path) else text

    return re.sub(r"\[([^\]]+)\]\(((?:\.\./)+)([^)\s]+)\)", link, markdown)
