"""What a person asks of checkpoints: what is there, is it whole, what differs, what can go."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from hovle_jax import output
from hovle_jax.checkpoint import (
    finished_steps,
    open_stored,
    open_tree,
    read_config,
    read_meta,
    run_storage,
)
from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.run import digests
from hovle_jax.run.checkpoints import DAMAGED, delete, held_out_losses, kept
from hovle_jax.streaming import read_array

Arrays = dict[str, tuple[epath.Path, str, Any]]  # {shown name: (tree, name in it, TensorStore)}


@dataclasses.dataclass(frozen=True)
class Row:
    """One directory below `checkpoints`."""

    name: str
    written: str  # UTC
    size: int  # bytes
    samples: int | None  # where the data goes on
    state: str  # finished | not finished | damaged
    kept: str  # why


def rows(workdir: str) -> list[Row]:
    """Every checkpoint of a run, oldest first, then what is unfinished or was put aside."""
    config, root = _run(workdir)
    steps = finished_steps(root)
    losses = held_out_losses(workdir)
    reasons = kept(steps, config.keep, config.keep_every, config.keep_best, losses)
    out = [
        _row(root / str(step), config, reasons.get(step, "until the next save")) for step in steps
    ]
    others = [p for p in root.iterdir() if p.is_dir() and not p.name.isdigit()]
    aside = [q for p in others if p.name == DAMAGED for q in p.iterdir()]
    unfinished = [p for p in others if p.name != DAMAGED]
    out += [_row(p, config, "until the run goes on", "not finished") for p in sorted(unfinished)]
    return out + [_row(p, config, "put aside", "damaged") for p in sorted(aside)]


def _row(path: epath.Path, config: RunConfig, why: str, state: str = "finished") -> Row:
    sizes = [(path / name).stat() for name in digests.files(path)]
    written = max((stat.mtime for stat in sizes), default=0)
    if state == "finished" and digests.damage(path, contents=False):
        state = "damaged"
    samples = None
    if state == "finished":
        samples = read_meta(path)["cursor"]["window"] * config.data.window
    return Row(
        path.name,
        time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(written)),
        sum(stat.length for stat in sizes),
        samples,
        state,
        why,
    )


def table(found: list[Row]) -> str:
    lines = []
    for row in found:
        samples = "" if row.samples is None else f"{row.samples:,}"
        size = f"{row.size / 2**20:,.1f}"
        lines.append((row.name, row.written, size, samples, row.state, row.kept))
    return output.table(("step", "written (UTC)", "MiB", "samples", "state", "kept"), lines)


def verify(directory: str, step: int | None = None) -> dict[str, list[str]]:
    """{directory: damage, one line each} of all that belongs to a run (or to a model)."""
    if not isinstance(read_config(directory), RunConfig):
        trees = [epath.Path(directory).resolve() / "params"]
    else:
        _, root = _run(directory)
        steps = finished_steps(root) if step is None else [_existing(root, step)]
        trees = [root / str(s) for s in steps]
        if (root.parent / "frozen").is_dir():
            trees.append(root.parent / "frozen")
    return {str(tree): digests.damage(tree) for tree in trees}


@dataclasses.dataclass(frozen=True)
class Difference:
    """How one array of A differs from B's."""

    name: str
    what: str


def differences(a: str, b: str) -> tuple[list[Difference], int]:
    """Arrays that differ between two directories, and how many were compared.

    Each is a model or work directory (its newest checkpoint) or WORKDIR/checkpoints/STEP. The
    optimizer's arrays are compared where both have them.
    """
    first, second = _arrays(a), _arrays(b)
    if not all(any(k.startswith("optimizer/") for k in x) for x in (first, second)):
        first, second = (
            {k: v for k, v in x.items() if not k.startswith("optimizer/")} for x in (first, second)
        )
    found = []
    for name in sorted(first.keys() | second.keys()):
        if name not in second or name not in first:
            found.append(Difference(name, f"only in {a if name in first else b}"))
        elif what := _difference(first[name], second[name]):
            found.append(Difference(name, what))
    return found, len(first.keys() | second.keys())


def _difference(a: tuple[epath.Path, str, Any], b: tuple[epath.Path, str, Any]) -> str:
    if a[2].shape != b[2].shape or a[2].dtype != b[2].dtype:
        shown = (f"{list(x[2].shape)} {x[2].dtype.name}" for x in (a, b))
        return " against ".join(shown)
    x, y = (np.atleast_1d(read_array(*where)) for where in (a, b))
    # As bytes: NaN equals itself, and 0 does not equal -0.
    bits = f"u{x.dtype.itemsize}"
    unequal = np.ascontiguousarray(x).view(bits) != np.ascontiguousarray(y).view(bits)
    if not unequal.any():
        return ""
    with np.errstate(invalid="ignore"):
        most = np.abs(x.astype(np.float64) - y.astype(np.float64)).max()
    return f"{unequal.sum():,} of {x.size:,} values, by at most {most:.3g}"


def _arrays(directory: str) -> Arrays:
    path = epath.Path(directory)
    if (path / "config.json").is_file():
        stored = open_stored(directory)
        if stored.hub is not None:
            raise UserError(f"{directory}: a Hugging Face directory; `hovle import` it first")
        trees = [(tree, "", arrays) for tree, arrays in stored.trees]
        if stored.step is not None:
            trees.append(_optimizer(run_storage(directory) / "checkpoints" / str(stored.step)))
    elif (path / "params").is_dir():
        tree, arrays = open_tree(path.resolve() / "params")
        trees = [(tree, "", arrays), _optimizer(path.resolve())]
    else:
        raise UserError(f"{directory}: neither a model or work directory nor a checkpoint in one")
    return {f"{p}{name}": (t, name, x) for t, p, found in trees for name, x in found.items()}


def _optimizer(checkpoint: epath.Path) -> tuple[epath.Path, str, dict[str, Any]]:
    tree, arrays = open_tree(checkpoint / "optimizer")
    return tree, "optimizer/", arrays


def prune(
    workdir: str,
    keep: int,
    keep_every: int = 0,
    keep_best: int = 0,
    *,
    damaged: bool = False,
    dry_run: bool = False,
) -> list[str]:
    """Deletes all but the last `keep` checkpoints, every `keep_every`-th step and those with the
    `keep_best` lowest held-out losses; names them.

    damaged: also what a run has put aside. The newest one always stays.
    """
    if keep < 1:
        raise UserError(f"--keep {keep}: at least the newest checkpoint stays")
    _, root = _run(workdir)
    steps = finished_steps(root)
    stay = kept(steps, keep, keep_every, keep_best, held_out_losses(workdir))
    doomed = [step for step in steps if step not in stay]
    aside = sorted((root / DAMAGED).iterdir()) if damaged and (root / DAMAGED).is_dir() else []
    if not dry_run:
        for step in doomed:
            delete(root, step)
        for path in aside:
            path.rmtree()
    return [str(path) for path in itertools.chain((root / str(s) for s in doomed), aside)]


def _existing(root: epath.Path, step: int) -> int:
    if step not in (steps := finished_steps(root)):
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(f"{root}: no checkpoint of step {step}; there: {there}")
    return step


def _run(workdir: str) -> tuple[RunConfig, epath.Path]:
    config = read_config(Path(workdir))
    if not isinstance(config, RunConfig):
        raise UserError(f"{workdir}: is a model directory, not the work directory of a run")
    root = run_storage(workdir) / "checkpoints"
    if not root.is_dir():
        raise UserError(f"{root}: no such directory; the run has saved nothing yet")
    return config, root
