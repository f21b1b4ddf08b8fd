"""The layering of the package: a file imports only files above it in this list."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "hovle_jax"
ORDER = [
    "errors",
    "modules",
    "output",
    "registry",
    "run.preemption",
    "run.digests",
    "typed",
    "teaching",
    "config",
    "tree",
    "run.metrics",
    "run.goodput",
    "run.sinks",
    "run.plot",
    "run.array_digests",
    "run.agreement",
    "run.guards",
    "run.profiler",
    "run.watchdog",
    "tpu.chips",
    "tpu.hlo",
    "tpu.cost",
    "sharding",
    "nn.quantize",
    "run.hosts",
    "nn.flash",
    "nn.tile_attention",
    "nn.attention",
    "nn.images",
    "nn.masks",
    "nn.positions",
    "nn.layers",
    "nn.linear_attention",
    "nn.stack",
    "nn.compressors",
    "nn.text_table",
    "nn.embedding",
    "nn.decoder",
    "model",
    "nn.vit",
    "nn.internvit",
    "nn.siglip",
    "nn.dinov3",
    "nn.teacher",
    "losses",
    "distill",
    "data.records",
    "data.workers",
    "data.files",
    "data.image",
    "data.tokenizer",
    "data.chat",
    "data.rows",
    "data.journal",
    "data.readers",
    "data.json_list",
    "data.webdataset",
    "data.parquet",
    "data.tfds_source",
    "data.array_record",
    "data.sources",
    "data.tilers",
    "data.convert",
    "data.text_files",
    "data.token_shards",
    "data.tokenize_text",
    "data.samples",
    "data.index",
    "data.pack",
    "data.mixture",
    "data.pipeline",
    "data.draw",
    "stages",
    "data.inspect",
    "data.stats",
    "lora",
    "heads",
    "optim",
    "train_step",
    "tpu.aot",
    "tpu.search",
    "hf.rows",
    "hf.section",
    "hf.families",
    "hf.names",
    "hf.configs",
    "hf.config_json",
    "hf.shards",
    "hf.tokens",
    "hf.teachers",
    "hf.reader",
    "streaming",
    "checkpoint",
    "initialize",
    "generation.decode",
    "generation.sampling",
    "generation.slots",
    "generation.memory",
    "generation.prefix",
    "generation.engine",
    "generation.generate",
    "hf.cases",
    "hf.gradients",
    "hf.dynamic_rope",
    "hf.verify",
    "hf.live",
    "hf.directory",
    "hf.importer",
    "hf.sentencepiece_model",
    "hf.tokenizer_json",
    "hf.chat_template",
    "hf.card",
    "hf.writer",
    "hf.export",
    "generation.text_stream",
    "generation.chat",
    "generation.questions",
    "generation.batch",
    "eval.examples",
    "eval.tsv",
    "eval.jsonl",
    "eval.prompts",
    "eval.short_answers",
    "eval.yes_no",
    "eval.options",
    "eval.mmmu",
    "eval.readings",
    "eval.tally",
    "eval.tasks",
    "eval.predictions",
    "eval.report",
    "eval.run",
    "eval.harness",
    "eval.lmms_eval_model",
    "eval.vlmevalkit_runner",
    "serve.protocol",
    "serve.worker",
    "serve.page",
    "serve.openapi",
    "serve.app",
    "run.checkpoints",
    "run.checkpoint_tools",
    "run.prepare",
    "run.heldout",
    "run.tasks",
    "run.reporter",
    "run.replay",
    "train",
    "demo.digits",
    "demo.report",
    "demo.settings",
    "demo.standins",
    "demo.score",
    "demo.run",
    "study.plan",
    "study.tasks",
    "study.report",
    "study.run",
    "bench.packing",
    "bench.synthetic",
    "bench.demand",
    "bench.data",
    "bench.reference",
    "bench.steps",
    "bench.generate",
    "bench.overhead",
    "cli.common",
    "cli.data",
    "cli.bench",
    "cli.checkpoint",
    "cli.plan",
    "cli.serve",
    "cli.eval",
    "cli.main",
    "cli.__main__",
]


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, in dotted form without 'hovle_jax.'."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    names = {n.removeprefix("hovle_jax.") for n in found if n.startswith("hovle_jax.")}
    return names & set(ORDER)


def test_files_import_only_files_above_them():
    for name in ORDER:
        path = ROOT / (name.replace(".", "/") + ".py")
        late = {n for n in imports(path) if ORDER.index(n) >= ORDER.index(name)}
        assert not late, f"{name} imports {late}"


def test_the_list_is_complete():
    found = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in ROOT.rglob("*.py")
        if not p.name.endswith(("__init__.py", "torch_worker.py")) and p.parent.name != "remote"
    }
    assert found == set(ORDER)


def test_files_stay_short():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, path
