"""MkDocs hook: a page for every module, from its docstrings, and for every file of examples/."""

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
    return files


def on_page_markdown(markdown, page, **_):
    """Links that leave docs/ lead to the pages of examples; of other files the name stays."""
    depth = page.file.src_uri.count("/")

    def link(match):
        text, up, path = match.groups()
        if up.count("/") <= depth:
            return match[0]
        example = re.fullmatch(r"examples/(\w+)\.py", path)
        return f"[{text}]({'../' * depth}examples/{example[1]}.md)" if example else text

    return re.sub(r"\[([^\]]+)\]\(((?:\.\./)+)([^)\s]+)\)", link, markdown)
