"""`hovle bench data`: what a CPU core delivers, where its time goes, how many a host needs.

Rates per core are per CPU second, so other work on the machine does not count; with worker
processes they are per wall second and worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hovle_jax.bench import demand, synthetic
from hovle_jax.config import ModelConfig, RunConfig
from hovle_jax.data import image as image_lib
from hovle_jax.data.chat import encode_conversation
from hovle_jax.data.pack import assemble
from hovle_jax.data.pipeline import START, HostBatch, Pipeline
from hovle_jax.data.records import Record
from hovle_jax.data.samples import Tiler, get_template
from hovle_jax.data.sources import open_images, open_meta
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.stages import STAGES, get_stage, open_pipeline

PARTS = ("read", "decode", "resize", "tokenise", "plan", "assemble", "batch")
_SAMPLES = 48  # for the parts: enough for shares within a few hundredths


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the CPU seconds of the block, on this thread, to `seconds[name]`."""
    start = time.thread_time()
    yield
    seconds[name] += time.thread_time() - start


def contents(batch: HostBatch, model: ModelConfig) -> np.ndarray:
    """[rows, samples, images, tiles, tokens] of a host batch, padding not counted."""
    ids, segments = batch["input_ids"], batch["segment_ids"]
    valid = segments > 0
    tiles = np.sum(valid & (ids == model.img_context_id)) // model.tokens_per_tile
    images = np.sum(valid & (ids == model.img_start_id))
    return np.array([len(ids), segments.max(axis=1).sum(), images, tiles, valid.sum()], np.int64)


def throughput(config: RunConfig, pipeline: Pipeline, seconds: float) -> dict[str, Any]:
    """Rates of `Pipeline.batches` after its first batch, for at least `seconds`."""
    batches = pipeline.batches(START)
    next(batches)  # workers start, files open
    wall, cpu, steps = time.perf_counter(), time.process_time(), 0
    total, size = np.zeros(5, np.int64), 0
    while not steps or time.perf_counter() - wall < seconds:
        batch, _ = next(batches)
        total += contents(batch, config.model)
        size, steps = sum(array.nbytes for array in batch.values()), steps + 1
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    batches.close()  # type: ignore[attr-defined]
    core_seconds = wall * config.data.workers if config.data.workers else cpu
    rows, samples, images, tiles, tokens = (int(n) for n in total)
    counts = {"samples": samples, "images": images, "tiles": tiles, "tokens": tokens}
    return {
        "batches": steps,
        "seconds": wall,
        "core_seconds": core_seconds,
        "workers": config.data.workers,
        "batch_bytes": size,
        **counts,
        **{f"{name}_per_second": n / wall for name, n in counts.items()},
        **{f"{name}_per_core_second": n / core_seconds for name, n in counts.items()},
        "token_fill": tokens / (rows * config.data.tokens),
        "tile_fill": tiles / (rows * config.data.tiles) if config.data.tiles else 1.0,
        "tokens_per_sample": tokens / max(samples, 1),
        "tiles_per_row": tiles / rows,
    }


def _records(config: RunConfig, kind: str) -> list[Any]:
    """The raw sources behind the pipeline's, in its order."""
    data, unpaired = config.data, kind == "unpaired"
    if unpaired and data.images:
        return [open_images(path).source for path in data.images]
    entries = open_meta(data.meta, data.repeat_mode, images_only=unpaired)
    return [entry.source for entry in entries]


def parts(config: RunConfig, pipeline: Pipeline) -> dict[str, float]:
    """CPU seconds per row of every part, each called by itself, one thread.

    'read' is what a sample takes beyond decoding, resizing and tokenising: reading and checking the
    row, stage I's random text, stacking tiles.
    """
    stage, data = get_stage(config.stage), config.data
    sources, tokenizer = _records(config, stage.data), Tokenizer.load(data.tokenizer)
    seconds = dict.fromkeys((*PARTS, "sample"), 0.0)
    reader, _ = pipeline.reader()
    plan = reader.plan()
    plan.rows(0)  # opens what is opened once
    with timed(seconds, "plan"):
        planned = plan.rows(1)
    batch: list[HostBatch] = []
    rows = samples = 0
    for places in planned:
        draws = [n for n in places if reader.length(n) != (0, 0)]  # the others are left out
        row = []
        for draw in draws:
            source, i = reader.origin(draw)
            record, tiler = sources[source][i], Tiler(config.model, data, sources[source].max_tiles)
            counts = _pixels(seconds, record, tiler)
            if record.turns:
                with timed(seconds, "tokenise"):
                    _encode(config, tokenizer, record, counts)
            with timed(seconds, "sample"):
                row.append(pipeline.sources[source].sample(i, reader.stream[draw].seen))
        with timed(seconds, "assemble"):
            assembled = assemble(
                row,
                [reader.stream[draw].source for draw in draws],
                tokens=data.tokens,
                tiles=data.tiles,
                image_size=config.model.image_size,
                weights=stage.token_weights,
                pad_id=config.model.pad_id,
            )
        batch.append(assembled)
        rows, samples = rows + 1, samples + len(row)
        if len(batch) == min(data.rows, 4):  # as in training, memory is used again
            _stack(seconds, batch)
        if samples >= _SAMPLES:
            break
    _stack(seconds, batch)
    pixels_and_text = seconds["decode"] + seconds["resize"] + seconds["tokenise"]
    per_row = {part: seconds[part] / rows for part in PARTS}
    per_row["read"] = max(seconds["sample"] - pixels_and_text, 0.0) / rows
    per_row["plan"] = seconds["plan"] / len(planned)
    return per_row


def _stack(seconds: dict[str, float], rows: list[HostBatch]) -> None:
    """Batches the rows and forgets them."""
    with timed(seconds, "batch"):
        {key: np.stack([row[key] for row in rows]) for key in (rows[0] if rows else ())}
    rows.clear()


def _pixels(seconds: dict[str, float], record: Record, tiler: Tiler) -> list[int]:
    """Decodes and tiles the images of a record; tiles of each."""
    limits, counts = tiler.limits_of(record), []
    for ref in record.images:
        with timed(seconds, "decode"):
            picture = image_lib.open_image(ref, record.where)
        with timed(seconds, "resize"):
            tiles = tiler.policy.cut(picture, limits)
        counts.append(len(tiles))
    return counts


def _encode(config: RunConfig, tokenizer: Tokenizer, record: Record, counts: list[int]) -> None:
    encode_conversation(
        record.turns,
        counts,
        tokenizer,
        get_template(config.data.template),
        tokens_per_tile=config.model.tokens_per_tile,
        system=config.data.system,
    )


def resize_ratios(image_size: int, max_tiles: int) -> list[dict[str, Any]]:
    """`image.resize` against Pillow's own single call, alternating; medians."""
    rng = np.random.default_rng(0)
    bicubic, report = Image.Resampling.BICUBIC, []
    for width, height in synthetic.SIZES:
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        cols, rows = image_lib.choose_grid(width, height, image_size, 1, max_tiles)
        for to in dict.fromkeys([(image_size, image_size), (cols * image_size, rows * image_size)]):
            runs = []
            for _ in range(7):
                once = {"ours": 0.0, "pillow": 0.0}
                with timed(once, "ours"):
                    image_lib.resize(picture, *to)
                with timed(once, "pillow"):
                    picture.resize(to, bicubic)
                runs.append((once["ours"], once["pillow"]))
            seconds, pillow = (float(t) for t in np.median(runs, axis=0))
            sides = {"from": [width, height], "to": list(to)}
            report.append(
                {**sides, "seconds": seconds, "pillow_seconds": pillow, "ratio": seconds / pillow}
            )
    return report


def measure(config: RunConfig, seconds: float, index: Path) -> dict[str, Any]:
    """Throughput and parts of one run's data."""
    pipeline = open_pipeline(config, index=index, quiet=True)
    per_row = parts(config, pipeline)
    total = sum(per_row.values())
    return {
        **throughput(config, pipeline, seconds),
        "row_seconds": per_row,
        "shares": {part: value / total for part, value in per_row.items()},
    }


def run_data(
    config: RunConfig | None, seconds: float, workers: int, mfu: float, plan: str
) -> dict[str, Any]:
    """The report of `hovle bench data`; without `config`, on the synthetic data set.

    Seconds, bytes, rates per second. 'data' has one entry per kind of data (unpaired images of
    stage I, conversations), 'hosts' one per stage and host.
    """
    if seconds <= 0 or workers < 0 or not 0 < mfu <= 1:
        raise UserError("--seconds must be positive, --workers not negative, --mfu in (0, 1]")
    if plan and config is None:
        raise UserError("--plan is of one config: give --config too")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        if config is None:
            synthetic.write_data(root)
            model = ModelConfig()
            configs = {
                s.name: synthetic.bench_config(
                    root, s.name, unpaired=s.data == "unpaired", model=model
                )
                for s in STAGES.values()
            }
        else:
            model, configs = config.model, {config.stage: config}
        measured: dict[str, dict[str, Any]] = {}
        hosts = []
        for stage, run in configs.items():
            run = dataclasses.replace(run, data=dataclasses.replace(run.data, workers=workers))
            kind = get_stage(stage).data
            if kind not in measured:
                measured[kind] = measure(run, seconds, root / "index")
            m = measured[kind]
            # The release's vocabulary, where the synthetic tokenizer is smaller.
            priced = dataclasses.replace(run, model=model)
            hosts += demand.cores(
                priced,
                m["tiles_per_row"],
                m["tiles_per_core_second"],
                planning_seconds=m["row_seconds"]["plan"],
                mfu=mfu,
                plan=plan,
            )
        image_size = model.image_size
        max_tiles = next(iter(configs.values())).data.max_tiles if config else 12
    return {
        "synthetic": config is None,
        "data": measured,
        "resize": resize_ratios(image_size, max_tiles),
        "hosts": hosts,
    }


def data_text(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = []
    for kind, m in report["data"].items():
        how = f"{m['workers']} workers" if m["workers"] else "CPU seconds of one process"
        lines += [
            f"{kind}: {m['batches']} batches in {m['seconds']:.1f} s ({how})",
            f"  per core and second   {m['images_per_core_second']:9.1f} images "
            f"{m['tiles_per_core_second']:9.1f} tiles {m['tokens_per_core_second']:11,.0f} tokens",
            f"  fill                  {m['token_fill']:9.3f} tokens {m['tile_fill']:9.3f} tiles",
            "  " + "  ".join(f"{part} {share:.1%}" for part, share in m["shares"].items()),
        ]
    lines.append("resize, against Pillow's single call")
    for r in report["resize"]:
        sides = " -> ".join("x".join(map(str, r[key])) for key in ("from", "to"))
        lines.append(f"  {sides:24} {1e3 * r['seconds']:8.2f} ms   ratio {r['ratio']:.2f}")
    lines.append("CPU cores a host needs; more of each worker's to plan the rows of all hosts")
    for host in report["hosts"]:
        lines.append(
            f"  {host['stage']:9} {host['host']:6} {host['tiles_per_second']:9,.0f} tiles/s "
            f"{host['cores']:7.1f} cores, planning {host['planning']:.1%} of each for "
            f"{host['hosts']} host{'s' * (host['hosts'] > 1)}   ({host['step_time_from']})"
        )
    return "\n".join(lines)
