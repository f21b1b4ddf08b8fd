"""Lengths and fills: what to choose config.data.tokens, tiles and window by."""

from __future__ import annotations

import numpy as np
from PIL import Image

from hovle_jax import output
from hovle_jax.config import DataConfig, RunConfig
from hovle_jax.data import draw
from hovle_jax.data.inspect import Report, write
from hovle_jax.data.pipeline import Pipeline
from hovle_jax.stages import open_pipeline

# Histograms look at this many records of a source, evenly spread: a table of 500 million lengths
# on a network disk is not read to draw 40 bars.
_MOST_RECORDS = 100_000
_BINS = 40


def stats_report(pipeline: Pipeline, data: DataConfig, windows: int = 4) -> Report:
    """Lengths and fills: what to choose config.data.tokens, tiles and window by.

    Lengths are those of the index; no image is read. Records that are left out count nowhere but in
    left_out.

    Args:
      windows: How many windows of the plan, from the first on.

    Returns:
      sources: per source name, records, left_out, looked_at (of at most 100,000 of them, evenly
      spread), and tokens and tiles, each {min, mean, median, p95, max, edges [n + 1], counts [n]};
      plan: of the first windows windows, samples, rows, samples_per_row, token_fill, tile_fill,
      row_token_fill and row_tile_fill [rows], draws {source: samples}, balanced_tiles (the tile
      limit at which this mixture would fill tokens and tiles alike).
    """
    sources = []
    for source, lengths in zip(pipeline.sources, pipeline.lengths, strict=True):
        count = min(len(lengths), _MOST_RECORDS)
        looked = np.array([lengths[i * len(lengths) // count] for i in range(count)])
        looked = looked[looked.any(axis=1)]
        about = {"name": source.name, "records": len(lengths), "looked_at": len(looked)}
        about["left_out"] = lengths.summary.left_out
        spreads = {what: _spread(looked[:, k]) for k, what in enumerate(("tokens", "tiles"))}
        sources.append(about | spreads)
    reader, _ = pipeline.reader()
    places = range(windows * data.window)
    drawn = np.array([reader.length(n) for n in places])
    plan = reader.plan()
    rows = [np.array(r) for w in range(windows) for r in plan.rows(w)]
    fills = np.array([drawn[r].sum(axis=0) for r in rows]) / (data.tokens, max(data.tiles, 1))
    come = [n for n in places if drawn[n].any()]
    names = [pipeline.names[reader.origin(n)[0]] for n in come]
    drawn = drawn[come]
    planned = {
        "windows": windows,
        "samples": len(drawn),
        "rows": len(rows),
        "samples_per_row": len(drawn) / len(rows),
        "token_fill": float(fills[:, 0].mean()),
        "tile_fill": float(fills[:, 1].mean()),
        "row_token_fill": fills[:, 0].tolist(),
        "row_tile_fill": fills[:, 1].tolist(),
        "draws": {s.name: names.count(s.name) for s in pipeline.sources},
        "balanced_tiles": float(data.tokens * drawn[:, 1].sum() / drawn[:, 0].sum()),
    }
    limits = {"tokens": data.tokens, "tiles": data.tiles, "window": data.window}
    return {**limits, "sources": sources, "plan": planned}


def _spread(values: np.ndarray) -> Report:
    """Whole numbers: every bin is equally many of them wide, the last may reach beyond the most."""
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // _BINS)
    edges = np.arange(low, high + width + 1, width)
    median, p95 = map(float, np.percentile(values, (50, 95)))
    counts = np.bincount((values - low) // width, minlength=len(edges) - 1).tolist()
    words = {"min": low, "mean": float(values.mean()), "median": median, "p95": p95, "max": high}
    return {**words, "edges": edges.tolist(), "counts": counts}


def run_stats(config: RunConfig, windows: int = 4, json_file: str = "", png: str = "") -> Report:
    """`hovle data stats`: see `stats_report`."""
    report = stats_report(open_pipeline(config), config.data, windows)
    return write(report, json_file, png, lambda: draw_stats(report))


def _stats_words(report: Report) -> list[str]:
    plan = report["plan"]
    draws = ", ".join(f"{name} {count}" for name, count in plan["draws"].items())
    return [
        f"rows of {report['tokens']:,} tokens and {report['tiles']} tiles, windows of "
        f"{report['window']} samples",
        f"first {plan['windows']} windows: {plan['samples']:,} samples in {plan['rows']:,} rows "
        f"({plan['samples_per_row']:.1f} per row), token fill {plan['token_fill']:.1%}, "
        f"tile fill {plan['tile_fill']:.1%}",
        f"samples drawn: {draws}",
        f"tokens and tiles would fill alike with tiles={plan['balanced_tiles']:.1f}",
    ]


def stats_text(report: Report) -> str:
    """A report of `stats_report` for a terminal."""
    rows = []
    for s in report["sources"]:
        for what in ("tokens", "tiles"):
            numbers = [round(s[what][k], 1) for k in ("min", "mean", "median", "p95", "max")]
            rows.append((s["name"], s["records"], what, *numbers))
    head = ("source", "records", "of each", "min", "mean", "median", "p95", "max")
    return "\n".join([output.table(head, rows), "", *_stats_words(report)])


def draw_stats(report: Report) -> Image.Image:
    """Histograms of a report of `stats_report`: lengths per source, fills of rows."""
    panels = []
    for n, s in enumerate(report["sources"], start=1):
        for what in ("tokens", "tiles"):
            title = f"{s['name']}: {what} of {s['looked_at']:,} of {s['records']:,} records, "
            title += f"median {s[what]['median']:g}, most {s[what]['max']:,}"
            colour = draw.segment_colour(n)
            panels.append(draw.Panel(title, s[what]["edges"], s[what]["counts"], colour))
    for what in ("token", "tile"):
        counts, edges = np.histogram(report["plan"][f"row_{what}_fill"], 40, (0.0, 1.0))
        title = f"{what} fill of the planned rows, mean {report['plan'][f'{what}_fill']:.1%}"
        panels.append(draw.Panel(title, edges.tolist(), counts.tolist(), draw.INK))
    return draw.draw_panels("lengths and fills", _stats_words(report), panels)
