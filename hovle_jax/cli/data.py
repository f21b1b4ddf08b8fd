"""`hovle data`: looking at data before and while training on it."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from hovle_jax.cli.common import add_command, add_group, load_config, no_more
from hovle_jax.output import write_json


def add_commands(commands: Any) -> None:
    commands = add_group(commands, "data", __doc__)

    add = functools.partial(add_command, commands)
    convert = add(
        "convert",
        _convert,
        "Anything readable -> ArrayRecord shards with the images inside; a kill costs one shard.",
        "hovle data convert meta.json shards/ --max-rejects 0.01",
    )
    convert.add_argument("inputs", nargs="+", metavar="INPUT", help="path, or NAME=PATH")
    convert.add_argument("out", metavar="OUT_DIR", help="of shards and a meta.json")
    convert.add_argument("--root", default=None, help="directory of relative image paths")
    convert.add_argument("--prompt", default="", help="user turn of a caption")
    convert.add_argument("--shard-mb", type=int, default=512, help="size of a shard")
    convert.add_argument("--max-rejects", type=float, default=0.01, help="fraction of all rows")
    convert.add_argument(
        "--check",
        choices=("none", "header", "full"),
        default="header",
        help="how images are looked at; full decodes each",
    )
    convert.add_argument("--json", default="", metavar="FILE", help="a copy of the manifest")

    tokenize = add(
        "tokenize",
        _tokenize,
        "Text of stage I -> memory-mapped token ids; a kill costs one shard.",
        "hovle data tokenize SlimPajama/train tokens/ --tokenizer internlm2-1_8b --workers 96",
    )
    tokenize.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help=".txt or .jsonl (also .gz, .zst), .parquet: files, globs, directories",
    )
    tokenize.add_argument("out", metavar="OUT_DIR", help="of token shards")
    tokenize.add_argument("--tokenizer", required=True, metavar="DIR", help="of tokenizer.model")
    tokenize.add_argument("--workers", type=int, default=0, help="processes; 0 = this one")
    tokenize.add_argument("--key", default="text", help="field or column of the text")
    tokenize.add_argument("--max-rejects", type=float, default=0.01, help="fraction of all rows")
    tokenize.add_argument("--shard-tokens", type=int, default=2**27, help="of a shard")

    tile = add(
        "tile",
        _tile,
        "How an image is cut: grid, tile order, a hash of every tile's pixels.",
        "hovle data tile photo.jpg --image-size 448 --max-tiles 12 --png tiles.png",
    )
    tile.add_argument("image", help="a file")
    tile.add_argument("--image-size", type=int, default=448, help="a tile's side, in pixels")
    tile.add_argument("--max-tiles", type=int, default=12, help="beside the thumbnail")

    prompt = add(
        "prompt",
        _prompt,
        "What the model reads for a question: the prompt, its ids, tiles per image.",
        "hovle data prompt --tokenizer HoVLE --image photo.jpg --prompt 'What is this?'",
    )
    prompt.add_argument("--config", default="", help="FILE.py[:VARIANT]")
    prompt.add_argument("--tokenizer", default="", help="directory; default: the config's")
    prompt.add_argument(
        "--image",
        action="extend",
        nargs="+",
        default=[],
        metavar="PATH",
        help="one for each <image>",
    )
    prompt.add_argument("--prompt", required=True, help="the question")

    index = add(
        "index",
        _index,
        "Measure every record once, before a pod waits for it; runs use it by config.data.index.",
        "hovle data index --config=configs/stage3_instruct.py:hovle_2b --out gs-mount/index",
    )
    index.add_argument("--config", required=True, help="FILE.py[:VARIANT]")
    index.add_argument("--out", required=True, metavar="DIR", help="becomes config.data.index")
    index.add_argument("--workers", type=int, default=0, help="processes that measure")

    inspect = add(
        "inspect",
        _inspect,
        "One packed row of any step: its tiles and tokens, by sample and by what is predicted.",
        "hovle data inspect --config=configs/stage3_instruct.py:tiny --step 100 --png row.png",
    )
    inspect.add_argument("--config", required=True, help="FILE.py[:VARIANT]")
    inspect.add_argument("--step", type=int, default=1, help="of the run, from 1")
    inspect.add_argument("--row", type=int, default=0, help="of the batch, from 0")
    inspect.add_argument(
        "--workdir",
        default="",
        metavar="DIR",
        help="of a run whose mixture or rows changed: go on from its checkpoint before the step",
    )

    stats = add(
        "stats",
        _stats,
        "Lengths and tiles of every source, and how well rows of this config fill.",
        "hovle data stats --config=configs/stage3_instruct.py:tiny --png stats.png",
    )
    stats.add_argument("--config", required=True, help="FILE.py[:VARIANT]")
    stats.add_argument("--windows", type=int, default=4, help="packing windows to plan")

    for command in (tile, prompt, inspect, stats):
        command.add_argument("--json", default="", metavar="FILE", help="what is printed, and more")
    for command in (tile, inspect, stats):
        command.add_argument("--png", default="", metavar="FILE", help="draw it")


def _convert(args: argparse.Namespace, rest: list[str]) -> int:
    no_more("data convert", rest)
    from hovle_jax.data.convert import run_convert

    options = {"prompt": args.prompt} if args.prompt else {}
    manifest = run_convert(
        args.inputs,
        args.out,
        root=args.root,
        shard_bytes=args.shard_mb * 2**20,
        max_rejects=args.max_rejects,
        check=args.check,
        **options,
    )
    for name, part in manifest["sources"].items():
        print(f"{name}: {sum(s['records'] for s in part['shards'])} records")
    if args.json:
        write_json(args.json, manifest)
    return 0


def _tokenize(args: argparse.Namespace, rest: list[str]) -> int:
    no_more("data tokenize", rest)
    from hovle_jax.data.tokenize_text import tokenize_text
    from hovle_jax.data.tokenizer import Tokenizer

    manifest = tokenize_text(
        args.inputs,
        args.out,
        Tokenizer.load(args.tokenizer),
        shard_tokens=args.shard_tokens,
        workers=args.workers,
        max_rejects=args.max_rejects,
        key=args.key,
    )
    counts = [f"{manifest[key]:,} {key}" for key in ("tokens", "documents", "rejects")]
    print(", ".join(counts))
    return 0


def _tile(args: argparse.Namespace, rest: list[str]) -> int:
    no_more("data tile", rest)
    from hovle_jax.data import inspect

    report = inspect.run_tile(args.image, args.image_size, args.max_tiles, args.json, args.png)
    print(inspect.tile_text(report))
    return 0


def _prompt(args: argparse.Namespace, rest: list[str]) -> int:
    from hovle_jax.data import inspect

    if not args.config:
        no_more("data prompt", rest)
    config = load_config(args.config, rest) if args.config else None
    report = inspect.run_prompt(args.prompt, args.image, config, args.tokenizer, args.json)
    print(inspect.prompt_text(report))
    return 0


def _index(args: argparse.Namespace, rest: list[str]) -> int:
    from hovle_jax.data import files
    from hovle_jax.stages import open_pipeline

    config = load_config(args.config, rest)
    files.check_local(args.out, "--out")
    out = Path(args.out)
    pipeline = open_pipeline(config, index=out, workers=args.workers)
    for source, lengths in zip(pipeline.sources, pipeline.lengths, strict=True):
        print(f"{source.name}: {len(lengths):,} records")
    print(f"use it by --config.data.index={out}")
    return 0


def _inspect(args: argparse.Namespace, rest: list[str]) -> int:
    from hovle_jax.checkpoint import cursor_before
    from hovle_jax.data import inspect
    from hovle_jax.data.pipeline import START

    config = load_config(args.config, rest)
    start = cursor_before(args.workdir, args.step) if args.workdir else (0, START)
    report = inspect.run_inspect(config, args.step, args.row, args.json, args.png, start)
    print(inspect.row_text(report))
    return 0


def _stats(args: argparse.Namespace, rest: list[str]) -> int:
    from hovle_jax.data import stats

    config = load_config(args.config, rest)
    report = stats.run_stats(config, args.windows, args.json, args.png)
    print(stats.stats_text(report))
    return 0
