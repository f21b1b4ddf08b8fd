"""Packing and mixing are pure functions; any cursor, host count or worker count gives the same."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from PIL import Image

from hovle_jax.cli.main import main
from hovle_jax.config import IGNORE, DataConfig
from hovle_jax.data.index import Lengths, lengths_of
from hovle_jax.data.mixture import Phase, Stream
from hovle_jax.data.pack import Plan, assemble, best_fit
from hovle_jax.data.pipeline import Pipeline
from hovle_jax.data.samples import Length, Sample, check_tokenizer
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.stages import open_pipeline
from tests.conftest import write_meta


def lengths(n: int) -> tuple[int, int]:
    rng = np.random.default_rng((3, n))
    return int(rng.integers(5, 60)), int(rng.integers(0, 4))


def test_best_fit_places_every_sample_once_within_both_limits():
    samples = [lengths(n) for n in range(200)]
    rows = best_fit(samples, tokens=100, tiles=6)
    assert sorted(itertools.chain(*rows)) == list(range(200))
    totals = np.array([[sum(samples[i][k] for i in row) for k in (0, 1)] for row in rows])
    assert (totals <= (100, 6)).all()
    least = max(sum(s[0] for s in samples) / 100, sum(s[1] for s in samples) / 6)
    assert len(rows) <= 1.05 * least
    with pytest.raises(UserError, match="fits no row"):
        best_fit([(101, 0)], tokens=100, tiles=6)


def plan(start: tuple[int, int] = (0, 0)) -> Plan:
    return Plan(lengths, window=32, tokens=100, tiles=6, start=start)


def test_a_plan_continues_from_any_place_without_what_came_before():
    whole = plan()
    rows = [whole[i] for i in range(120)]
    assert sorted(itertools.chain(*rows))[:300] == list(range(300))
    for row in (0, 1, 17, 63, 100):
        resumed = plan(whole.locate(row))
        assert [resumed[i] for i in range(15)] == rows[row : row + 15]
    ahead = plan()
    assert ahead[100] == rows[100] and ahead[3] == rows[3], "rows may be read in any order"


def test_assembled_rows_restart_positions_and_weigh_answers():
    def sample(n: int, answers: int, tiles: int) -> Sample:
        labels = np.full(n, IGNORE, np.int32)
        labels[n - answers :] = 7
        return Sample(np.arange(n, dtype=np.int32), labels, np.full((tiles, 4, 4, 3), n, np.uint8))

    row = assemble(
        [sample(5, 1, 1), sample(6, 4, 2)],
        tokens=14,
        tiles=4,
        image_size=4,
        weights="square",
        pad_id=2,
    )
    assert row["segment_ids"].tolist() == [1] * 5 + [2] * 6 + [0] * 3
    assert row["position_ids"].tolist() == [*range(5), *range(6), 0, 0, 0]
    assert row["input_ids"].tolist()[11:] == [2, 2, 2]
    np.testing.assert_allclose(row["loss_weight"], [0] * 4 + [1] + [0] * 2 + [0.5] * 4 + [0] * 3)
    assert row["pixels"][:, 0, 0, 0].tolist() == [5, 6, 6, 0]


def make(world, stage: str, index=None, **changes) -> Pipeline:
    return pipeline_of(world.config(stage, **changes), index)


def take(batches, count: int) -> list:
    return list(itertools.islice(batches, count))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("stage", ["distill", "instruct"])
def test_batches_continue_from_a_cursor_bit_for_bit(world, stage):
    whole = take(make(world, stage).batches(), 9)
    for step in (1, 4, 7):
        resumed = take(make(world, stage).batches(whole[step - 1][1]), 9 - step)
        for (a, cursor_a), (b, cursor_b) in zip(whole[step:], resumed, strict=True):
            assert same(a, b) and cursor_a == cursor_b


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_disjoint_parts_of_the_same_global_batches(world, hosts):
    pipeline = make(world, "instruct")
    whole = take(pipeline.batches(), 5)
    parts = [take(pipeline.batches(host=h, hosts=hosts), 5) for h in range(hosts)]
    for step, (batch, cursor) in enumerate(whole):
        pieces = [part[step][0] for part in parts]
        joined = {k: np.concatenate([p[k] for p in pieces]) for k in batch}
        assert same(batch, joined)
        assert all(part[step][1] == cursor for part in parts)


def test_worker_processes_change_nothing(world):
    threads = take(make(world, "instruct").batches(), 3)
    workers = take(make(world, "instruct", data__workers=2).batches(), 3)
    assert all(same(a, b) and c == d for (a, c), (b, d) in zip(threads, workers, strict=True))


def test_a_signal_to_all_processes_costs_no_worker_and_a_dead_worker_is_named(world):
    before = set(multiprocessing.active_children())
    batches = make(world, "instruct", data__workers=1).batches()
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    take(batches, 30)
    worker.kill()
    with pytest.raises(UserError, match="config.data.workers: .* exit code -9"):
        take(batches, 1000)


ORPHAN = """
import multiprocessing, time
from hovle_jax.data.pipeline import _start_worker
if __name__ == "__main__":
    pool = multiprocessing.get_context("spawn").Pool(1, _start_worker)
    pid = pool.apply(multiprocessing.process.os.getpid)
    pool.apply_async(time.sleep, (600,))
    print(pid, flush=True)
    time.sleep(600)
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while pathlib.Path(f"/proc/{worker}/cmdline").is_file() and time.monotonic() < deadline:
        if not pathlib.Path(f"/proc/{worker}/cmdline").read_bytes():
            break  # a zombie, in a container without an init
        time.sleep(0.05)
    else:
        assert not pathlib.Path(f"/proc/{worker}").exists()


def test_stage_1_rows_hold_images_and_random_text_in_both_orders(world):
    batch, _ = next(make(world, "distill").batches())
    c = world.model
    orders = set()
    for ids, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True):
        for s in range(1, segments.max() + 1):
            run = ids[segments == s]
            images = int((run == c.img_context_id).sum())
            assert run[0] == c.bos_id and images % c.tokens_per_tile == 0
            text = [i for i in run[1:] if i not in (c.img_start_id, c.img_end_id, c.img_context_id)]
            assert len(text) == images, "one text token per image token"
            orders.add(bool(run[1] == c.img_start_id))
    assert orders == {True, False}
    assert (batch["labels"] == IGNORE).all()


def test_stage_1_reads_a_text_file(world, tmp_path):
    (tmp_path / "text.txt").write_text("white please\n")
    batch, _ = next(make(world, "distill", data__text=str(tmp_path / "text.txt")).batches())
    tokenizer = Tokenizer.load(world.root / "tokenizer")
    expected = set(tokenizer.encode_ordinary("white please"))
    ids = set(batch["input_ids"][batch["segment_ids"] > 0].tolist())
    c = world.model
    assert ids - {c.bos_id, c.img_start_id, c.img_end_id, c.img_context_id} == expected


def test_a_text_without_a_token_does_not_hang(world, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": ""}\n' * 3)
    batches = make(world, "distill", data__text=str(tmp_path / "text.jsonl")).batches()
    with pytest.raises(UserError, match="config.data.text: no line of it has a token"):
        next(batches)


def test_a_record_longer_than_a_row_is_an_error(world):
    with pytest.raises(UserError, match=r"record \d+ has \d+ tokens .* a row holds 20"):
        make(world, "instruct", data__tokens=20)


class Counting:
    """A sample source that counts how often it is measured."""

    name, measured = "counted", 0

    def __init__(self, version: str = "1"):
        self.version = version

    def __len__(self) -> int:
        return 5

    def fingerprint(self) -> tuple[str, ...]:
        return (self.version,)

    def measure(self, i: int) -> Length:
        Counting.measured += 1
        return Length(10 + i, i % 3)

    def sample(self, i: int, seen: int):
        raise AssertionError("measuring reads no sample")


def limits(tokens: int, tiles: int) -> DataConfig:
    return DataConfig(tokens=tokens, tiles=tiles)


def test_records_are_measured_once(tmp_path):
    Counting.measured = 0
    first = lengths_of(Counting(), limits(20, 2), tmp_path, quiet=True)
    again = lengths_of(
        Counting(), limits(16, 2), tmp_path, quiet=True
    )  # other limits, same lengths
    assert Counting.measured == 5
    assert (
        [first[i] for i in range(5)]
        == [again[i] for i in range(5)]
        == [
            (10, 0),
            (11, 1),
            (12, 2),
            (13, 0),
            (14, 1),
        ]
    )
    lengths_of(Counting("2"), limits(20, 2), tmp_path, quiet=True)
    assert Counting.measured == 10
    lengths_of(Counting(), limits(20, 2), None, quiet=True)
    assert Counting.measured == 15
    with pytest.raises(UserError, match="record 4 has 13 tokens and 0 tiles; a row holds 12"):
        lengths_of(Counting(), limits(12, 2), tmp_path, quiet=True)
    with pytest.raises(UserError, match="record 3 has 12 tokens and 2 tiles"):
        lengths_of(Counting(), limits(20, 1), tmp_path, quiet=True)


def test_what_lengths_depend_on_is_in_the_fingerprint(world):
    """A stale index would pack rows from lengths that are not there."""
    seen = {make(world, "instruct").sources[0].fingerprint()}
    for change in ({"max_tiles": 1}, {"thumbnail": False}, {"system": "Be brief."}):
        changed = make(world, "instruct", **{f"data__{k}": v for k, v in change.items()})
        seen.add(changed.sources[0].fingerprint())
    assert len(seen) == 4
    assert make(world, "instruct", data__tokens=90).sources[0].fingerprint() in seen
    rows = [make(world, "distill", data__text_ratio=r).sources[0].fingerprint() for r in (1.0, 0.5)]
    assert rows[0] != rows[1]


def test_a_seed_that_numpy_does_not_know_is_refused(world):
    with pytest.raises(UserError, match="seed must not be negative"):
        world.config("instruct", seed=-1)


def test_an_exchanged_image_is_noticed(world, tmp_path):
    """The picture has another number of tiles than when it was measured."""
    shutil.copytree(world.root / "images", tmp_path / "images")
    config = world.config("distill", data__images=(str(tmp_path / "images"),))
    whole = take(pipeline_of(config, tmp_path / "index").batches(), 2)
    again = take(pipeline_of(config, tmp_path / "index").batches(), 2)
    assert all(same(a, b) for (a, _), (b, _) in zip(whole, again, strict=True))
    for path in (tmp_path / "images").iterdir():
        Image.new("RGB", (64, 32)).save(path)
    with pytest.raises(UserError, match="image was exchanged; delete the index"):
        take(pipeline_of(config, tmp_path / "index").batches(), 4)


def test_stage_1_refuses_what_only_conversations_have(world, tmp_path):
    with pytest.raises(UserError, match="config.data.too_long='cut': stage 'distill' has no turns"):
        make(world, "distill", data__too_long="cut")
    meta = json.loads((world.root / "meta.json").read_text())
    meta["colours"] |= {k: str(world.root / meta["colours"][k]) for k in ("root", "annotation")}
    rows = map(json.loads, pathlib.Path(meta["colours"]["annotation"]).read_text().splitlines())
    (tmp_path / "pictures.jsonl").write_text(json.dumps(next(rows)) + "\n")
    meta["colours"] |= {"annotation": str(tmp_path / "pictures.jsonl"), "data_augment": True}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    changes = {"data__meta": str(tmp_path / "meta.json"), "data__images": ()}
    with pytest.raises(UserError, match="meta.json: 'colours': data_augment: stage 'distill'"):
        make(world, "distill", **changes)
    with pytest.raises(UserError, match=r"a row holds 8 and 4 \(.*tokens, config.data.tiles\)$"):
        make(world, "distill", data__tokens=8)


def test_augmentation_is_a_function_of_the_draw(world, tmp_path):
    """JPEG noise on the pixels, nothing else; the same again after a restart, not every epoch."""
    meta = json.loads((world.root / "meta.json").read_text())
    meta["colours"] |= {k: str(world.root / meta["colours"][k]) for k in ("root", "annotation")}
    meta["colours"]["data_augment"] = True
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    changes = {"data__meta": str(tmp_path / "meta.json")}
    plain = take(make(world, "instruct").batches(), 4)
    noisy = take(make(world, "instruct", **changes).batches(), 4)
    for (a, _), (b, _) in zip(plain, noisy, strict=True):
        assert all(np.array_equal(a[k], b[k]) for k in a if k != "pixels")
        difference = np.abs(a["pixels"].astype(int) - b["pixels"])
        assert 0.5 < difference[a["pixels"] > 0].mean() < 20
    resumed = take(make(world, "instruct", **changes).batches(noisy[1][1]), 2)
    assert all(same(a, b) for (a, _), (b, _) in zip(noisy[2:], resumed, strict=True))
    source = make(world, "instruct", **changes).sources[0]
    first, second = (source.sample(0, draw).tiles for draw in (0, 1))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, source.sample(0, 0).tiles)


def test_data_that_a_stage_does_not_read_is_refused(world, tmp_path):
    folder, meta = str(world.root / "images"), str(world.root / "meta.json")
    for stage, key, value in (
        ("distill", "meta", meta),
        ("align", "images", (folder,)),
        ("instruct", "text", "no.txt"),
    ):
        with pytest.raises(UserError, match=f"config.data.{key}: stage '{stage}' does not read it"):
            make(world, stage, **{f"data__{key}": value})
    rows = map(json.loads, (world.root / "meta.jsonl").read_text().splitlines())
    pictures = str(write_meta(world.root, [next(rows)] * 4, "pictures.json"))
    assert make(world, "distill", data__meta=pictures, data__images=()).names == ["colours"]


def test_the_tokenizer_begins_and_ends_as_the_model_does(world):
    for key in ("bos_id", "eos_id"):
        with pytest.raises(UserError, match=f"config.model.{key} is 7 but the tokenizer's is"):
            make(world, "instruct", **{f"model__{key}": 7})
    tokenizer = Tokenizer.load(world.root / "tokenizer")
    tokenizer._sp = types.SimpleNamespace(bos_id=lambda: -1, GetPieceSize=lambda: 9)
    tokenizer.special_ids = frozenset({1})
    with pytest.raises(UserError, match="the tokenizer has no bos_id, which config.model gives"):
        check_tokenizer(tokenizer, world.model)


def test_converted_data_gives_the_same_batches(world, tmp_path):
    """ArrayRecord shards in place of jsonl and image files: every array of every batch is equal."""
    assert main(["data", "convert", str(world.root / "meta.json"), str(tmp_path / "shards")]) == 0
    entry = {"annotation": str(tmp_path / "shards")}
    (tmp_path / "meta.json").write_text(json.dumps({"colours": entry}))
    files = take(make(world, "instruct").batches(), 5)
    shards = take(make(world, "instruct", data__meta=str(tmp_path / "meta.json")).batches(), 5)
    for (a, cursor_a), (b, cursor_b) in zip(files, shards, strict=True):
        assert same(a, b) and cursor_a == cursor_b


@pytest.fixture
def with_bad_images(world, tmp_path):
    """120 images, six of them bad: (config, names of the bad). Three have no readable header."""
    folder = tmp_path / "images"
    folder.mkdir()
    files = sorted((world.root / "images").iterdir())
    names = [f"{i:03}{files[i % len(files)].suffix}" for i in range(120)]
    for i, name in enumerate(names):
        shutil.copy(files[i % len(files)], folder / name)
    bad = names[7::20]
    for i, name in enumerate(bad):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(b"no image" if i % 2 else whole[: len(whole) * 2 // 3])
    return world.config("distill", data__images=(str(folder),), data__max_bad=0.06), bad


def pipeline_of(config, index) -> Pipeline:
    rejects = index / "rejects.jsonl" if index else None
    return open_pipeline(config, index=index, rejects=rejects, quiet=True)


def samples_of(batches: list) -> list[bytes]:
    """Every sample's tokens, in order."""
    out = []
    for batch, _ in batches:
        for ids, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True):
            out += [ids[segments == s].tobytes() for s in range(1, segments.max() + 1)]
    return out


def test_bad_images_are_left_out_and_counted(world, with_bad_images, tmp_path):
    """Five in a hundred: the others come in the same order, and every bad one is on record."""
    config, bad = with_bad_images
    pipeline = pipeline_of(config, tmp_path / "index")
    steps = 12
    batches = take(pipeline.batches(), steps)
    listed = {}
    for path in (tmp_path / "index").glob("*rejects.jsonl"):
        for line in path.read_text().splitlines():
            reason = json.loads(line)["reason"]
            listed |= {name: reason for name in bad if name in reason}
    drawn, lost = pipeline.read
    assert drawn > 120 and set(listed) == set(bad)  # more than an epoch: each was drawn
    left_out = sum(length == (0, 0) for length in map(pipeline.lengths[0].__getitem__, range(120)))
    assert 0 < 6 - left_out <= lost < 0.05 * drawn
    assert len(samples_of(batches)) == drawn - lost
    again = take(pipeline_of(config, tmp_path / "index").batches(), steps)
    assert all(same(a, b) for (a, _), (b, _) in zip(batches, again, strict=True))
    workers = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=2))
    parallel = take(pipeline_of(workers, tmp_path / "index").batches(), steps)
    assert all(same(a, b) for (a, _), (b, _) in zip(batches, parallel, strict=True))


def test_too_many_bad_images_stop_the_run(with_bad_images, tmp_path):
    config, bad = with_bad_images

    def limited(most: float) -> Pipeline:
        data = dataclasses.replace(config.data, max_bad=most)
        return pipeline_of(dataclasses.replace(config, data=data), tmp_path / "index")

    with pytest.raises(UserError, match=bad[0]):  # strict: the first that cannot be measured
        limited(0.0)
    with pytest.raises(UserError, match=r"5 of 120 records cannot be read, more than .*0\.01"):
        limited(0.01)
    # Enough when measured; most are found broken only when their pixels are read.
    folder = pathlib.Path(config.data.images[0])
    pipeline = limited(0.06)
    for path in folder.glob("*.jpg"):
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"samples could not be read.*rejects.jsonl: .*\d\.jpg: "):
        take(pipeline.batches(), 12)


def test_a_folder_that_is_gone_stops_a_long_run_soon(with_bad_images, tmp_path):
    """Not only when it is one in a hundred of all that was read before."""
    config, _ = with_bad_images
    pipeline = pipeline_of(config, tmp_path / "index")
    for _ in range(1000):
        pipeline._count(np.array([1000, 59]))
    pipeline._count(np.array([200, 20]))  # chance
    with pytest.raises(UserError, match="of the last .* samples could not be read"):
        for _ in range(6):
            pipeline._count(np.array([200, 100]))


def test_records_left_out_when_measured_are_not_bad_samples(world, tmp_path):
    """Left out by config.data.too_long="drop", which says nothing about broken files."""
    os.symlink(world.root / "images", tmp_path / "images")
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "white"}]
    long = [turns[0], {"from": "gpt", "value": "white " * 200}]
    rows = [{"conversations": long if i % 2 else turns} for i in range(40)]
    meta = str(write_meta(tmp_path, rows))
    pipeline = make(world, "instruct", data__meta=meta, data__too_long="drop")
    batches = take(pipeline.batches(), 10)
    assert pipeline.read.tolist() == [len(samples_of(batches)), 0]
    assert pipeline.read[0] > 100


def test_half_a_billion_records_open_at_once(tmp_path):
    """Open and pack in the middle: the file is 4 GB, what is read of it a few pages."""
    path, records = tmp_path / "index.npy", 500_000_000
    header = np.lib.format.header_data_from_array_1_0(np.zeros((1, 2), np.int32))
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header | {"shape": (records + 1, 2)})
        start = file.tell()
        window = np.array([[100 + i % 50, i % 4] for i in range(256)], np.int32)
        for number in (0, 977_000):
            file.seek(start + number * 256 * 8)
            file.write(window.tobytes())
        file.truncate(start + (records + 1) * 8)  # sparse: the disk holds two windows

    def resident() -> int:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    lengths = Lengths(path)
    assert len(lengths) == records and len(pickle.dumps(lengths)) < 1000
    limits = {"window": 256, "tokens": 1000, "tiles": 12}
    first = Plan(lengths.__getitem__, **limits, start=(0, 0))
    later = Plan(lengths.__getitem__, **limits, start=(977_000, 0))
    shift = 977_000 * 256
    assert [[i - shift for i in later[r]] for r in range(20)] == [first[r] for r in range(20)]
    # The same through a mixture, at the three-billionth sample.
    sizes = {"big": records, "small": 1000}
    stream = Stream(list(sizes), [Phase(0, sizes, {"big": 5e8, "small": 3e5}, {})], seed=0)

    def length(n: int) -> tuple[int, int]:
        draw = stream[n]
        lengths[draw.record]
        return 100 + draw.record % 50, draw.record % 4

    plan = Plan(length, **limits, start=(12_000_000, 3))
    assert sum(map(len, (plan[r] for r in range(100)))) > 500
    assert resident() - before < 100e6


def test_hosts_that_share_an_index_may_save_it_at_once(world, tmp_path, monkeypatch):
    """Both have the same process id, as in containers, and one saves between two steps of other."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    replace, others = os.replace, [3, 2, 1]

    def interrupted(source, target):
        if others and others.pop():
            make(world, "instruct", index=tmp_path)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    make(world, "instruct", index=tmp_path)
    assert not others and not list(tmp_path.glob("*.tmp"))
    assert len(list(tmp_path.glob("*.npy"))) == 1
