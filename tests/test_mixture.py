"""Mixing: exact shares, places that follow from a number, mixtures that change in mid-run."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import types

import jax
import numpy as np
import pytest

from hovle_jax.config import IGNORE
from hovle_jax.data.chat import Encoded
from hovle_jax.data.mixture import Phase, Shares, Shuffled, Stream, phases_from
from hovle_jax.data.pipeline import Pipeline, Split, global_row
from hovle_jax.data.records import Record, Turn
from hovle_jax.data.samples import Conversations
from hovle_jax.data.sources import MetaEntry
from hovle_jax.data.stats import stats_report
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.run.hosts import DataBarrier
from hovle_jax.run.prepare import open_run
from hovle_jax.stages import open_pipeline
from tests.conftest import write_meta


@pytest.mark.parametrize(
    "weights", [[1], [3, 1], [2.5, 1, 0.004, 700, 1e-3], [1e-9, 3e-9], range(1, 30)]
)
def test_shares_are_exact_and_every_count_is_next(weights):
    shares = Shares(weights)
    counts: collections.Counter[int] = collections.Counter()
    off = 0.0
    expected = np.array(weights) / sum(weights)
    for n in range(5000):
        source, before = shares.locate(n)
        assert before == counts[source]
        counts[source] += 1
        now = [counts[k] for k in range(len(expected))]
        off = max(off, np.abs(now - (n + 1) * expected).max())
        if n % 499 == 0:
            assert shares.counts(n + 1) == now
    assert off < 1 + np.log2(len(expected))


def test_shares_hold_at_any_distance():
    shares = Shares([0.3, 500_000_000, 7])
    n = 10**15 + 12345
    source, before = shares.locate(n)
    counts, following = shares.counts(n), shares.counts(n + 1)
    assert before == counts[source] and following[source] == before + 1
    assert sum(counts) == n and sum(following) == n + 1


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_shuffling_permutes_every_epoch(size):
    order = Shuffled(size, seed=3)
    epochs = [[order[e * size + i] for i in range(size)] for e in range(4)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert size < 4 or len({tuple(epoch) for epoch in epochs}) > 1


def test_shuffling_has_no_pattern():
    """Places, neighbours, epochs and seeds: each statistic within five standard deviations."""
    size, epochs = 10, 3000
    seen = np.array([[Shuffled(size, s)[e * size + i] for i in range(size)]
                     for s in range(10) for e in range(epochs // 10)])  # fmt: skip
    places = np.array([np.bincount(seen[:, i], minlength=size) for i in range(size)])
    expected = epochs / size
    freedom = (size - 1) ** 2
    assert abs(((places - expected) ** 2 / expected).sum() - freedom) < 5 * (2 * freedom) ** 0.5
    big = np.array([[Shuffled(997, s)[i] for i in range(997)] for s in range(8)])
    for a, b in ((big[:, :-1], big[:, 1:]), (big[0], big[1]), (big[0], np.arange(997))):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)


def stream_of(sizes: dict[str, int], weights: dict[str, float] | None = None, seed: int = 5):
    weights = weights or {name: float(size) for name, size in sizes.items()}
    return Stream(list(sizes), [Phase(0, sizes, weights, {})], seed)


def test_every_record_is_seen_once_per_epoch_in_a_new_order():
    stream = stream_of({"a": 10})
    epochs = [[stream[10 * e + i].record for i in range(10)] for e in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_fractions_of_an_epoch_cover_all_records_in_the_end():
    """repeat_time 0.3: another third of the records in every epoch of the others, no prefix."""
    stream = stream_of({"a": 100, "b": 10}, {"a": 100.0, "b": 10 * 0.3})
    draws = [stream[n] for n in range(103 * 10)]
    of_b = [d.record for d in draws if d.source == 1]
    assert len(of_b) == 30 and sorted(of_b) == sorted([*range(10)] * 3)
    assert collections.Counter(d.record for d in draws if d.source == 0) == {
        i: 10 for i in range(100)
    }


def test_a_source_does_not_depend_on_the_others():
    """Its records come in the same order, whatever else is in the mixture."""
    alone = [stream_of({"a": 10})[n].record for n in range(40)]
    mixed = stream_of({"c": 7, "a": 10}, {"c": 2.0, "a": 0.5})
    assert [d.record for d in map(mixed.__getitem__, range(200)) if d.source == 1] == alone


def test_a_changed_mixture_goes_on_from_every_sources_place():
    sizes = {"a": 50, "b": 20}
    first = phases_from([], sizes, {"a": 5.0, "b": 2.0}, 0)
    old = Stream(["a", "b"], first, 1)
    stored = json.loads(json.dumps([vars(phase) for phase in first]))
    assert phases_from(stored, sizes, {"a": 5.0, "b": 2.0}, 64) == first
    turned = [
        {k: dict(reversed(v.items())) if isinstance(v, dict) else v for k, v in p.items()}
        for p in stored
    ]
    other = Stream(["b", "a"], phases_from(turned, {"b": 20, "a": 50}, {"b": 2.0, "a": 5.0}, 64), 1)
    assert [other[n].record for n in range(99)] == [old[n].record for n in range(99)], "no order"
    now = {"b": 20, "new": 9, "a": 50}
    second = phases_from(stored, now, {"b": 2.0, "new": 9.0, "a": 1.0}, 64)
    stream = Stream(list(now), second, 1)
    records: dict[str, list[int]] = {"a": [], "b": [], "new": []}
    for n in range(400):
        draw = stream[n]
        name = list(now)[draw.source]
        assert draw.seen == len(records[name]), "nothing twice, nothing left out"
        records[name].append(draw.record)
        if n < 64:
            assert (name, draw.record) == (["a", "b"][old[n].source], old[n].record)
    assert collections.Counter(list(now)[stream[n].source] for n in range(64, 400)) == {
        "b": 56, "new": 252, "a": 28,
    }  # fmt: skip
    assert stream.drawn(400) == {name: len(seen) for name, seen in records.items()}
    with pytest.raises(UserError, match="a: has 51 records, but had 50"):
        phases_from(stored, now | {"a": 51}, dict.fromkeys(now, 1.0), 64)


@pytest.mark.parametrize("size, holdout", [(10, 0), (10, 2), (11, 3), (100, 7), (5, 9)])
def test_held_out_records_are_the_others(size, holdout):
    trained, held = Split(size, holdout), Split(size, holdout, held=True)
    parts = [[split[i] for i in range(len(split))] for split in (trained, held)]
    assert sorted(parts[0] + parts[1]) == list(range(size))
    assert parts == [sorted(parts[0]), sorted(parts[1])]
    assert len(parts[1]) == (size // holdout if holdout else 0)


@pytest.mark.parametrize("hosts", [1, 3, 64, 1024])
def test_hosts_share_out_all_rows(hosts):
    rows = 3 * 1024
    parts = [
        {global_row(i, rows=rows, host=h, hosts=hosts) for i in range(2 * rows // hosts)}
        for h in range(hosts)
    ]
    assert set.union(*parts) == set(range(2 * rows)) and sum(map(len, parts)) == 2 * rows
    first = {global_row(i, rows=rows, host=hosts - 1, hosts=hosts) for i in range(rows // hosts)}
    assert max(first) == rows - 1, "a batch is read by all hosts before the next begins"


# Pipelines over three sources


@pytest.fixture(scope="module")
def three(world, tmp_path_factory):
    """A meta.json of images, of text alone and of several images a row: (path, entries)."""
    root = tmp_path_factory.mktemp("three")
    os.symlink(world.root / "images", root / "images")
    images = sorted(os.listdir(root / "images"))

    def rows(kind: str, n: int) -> list[dict]:
        def row(i: int) -> dict:
            shown = {"one": 1, "none": 0, "two": 2}[kind]
            text = "<image>\n" * shown + "Hello please " + "user " * (i % 7)
            turns = [
                {"from": "human", "value": text},
                {"from": "gpt", "value": "white " * (i % 3 + 1)},
            ]
            picked = [images[(i + k) % len(images)] for k in range(shown)]
            return {"conversations": turns} | ({"image": picked} if shown else {})

        return [row(i) for i in range(n)]

    entries = {}
    for name, kind, n, repeat in (
        ("a", "one", 60, 1),
        ("b", "none", 45, 1.5),
        ("c", "two", 21, 0.4),
    ):
        meta = write_meta(root, rows(kind, n), f"{name}.json")
        entries[name] = next(iter(json.loads(meta.read_text()).values())) | {"repeat_time": repeat}
    (root / "meta.json").write_text(json.dumps(entries))
    return root / "meta.json", entries


def open_three(world, meta, **changes) -> Pipeline:
    settings = {"data__rows": 24, "data__window": 16, "data__meta": str(meta)} | changes
    config = world.config("instruct", **settings)
    return open_pipeline(config, quiet=True)


def take(batches, count: int) -> list:
    return list(itertools.islice(batches, count))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def joined(parts: list[dict]) -> dict:
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def plan_of(pipeline: Pipeline, start) -> list[list[tuple[int, int]]]:
    """The next 24 rows as (source, record)."""
    reader, start = pipeline.reader(start)
    plan = reader.plan(start)
    return [[reader.origin(n) for n in plan[row]] for row in range(24)]


def test_global_batches_are_the_same_for_any_hosts_workers_and_restarts(world, three):
    """200 batches of 24 rows; hosts and the batch to restart at are drawn anew at each step."""
    pipeline = open_three(world, three[0])
    whole = take(pipeline.batches(), 201)
    assert {s for batch, _ in whole for s in np.unique(batch["source_ids"])} == {0, 1, 2}
    rng = np.random.default_rng(0)
    for _ in range(12):
        hosts, step = int(rng.choice([1, 2, 3, 4, 8])), int(rng.integers(0, 199))
        start = json.loads(json.dumps(whole[step - 1][1])) if step else pipeline.reader()[1]
        parts = [take(pipeline.batches(start, host=h, hosts=hosts), 2) for h in range(hosts)]
        for k in range(2):
            assert same(whole[step + k][0], joined([part[k][0] for part in parts])), (hosts, step)
            assert all(part[k][1] == whole[step + k][1] for part in parts)
    for workers, hosts, step in ((1, 2, 150), (4, 3, 77)):  # a process takes seconds to start
        other = open_three(world, three[0], data__workers=workers)
        rows = slice(24 - 24 // hosts, 24)
        last = other.batches(whole[step - 1][1], host=hosts - 1, hosts=hosts)
        for k, (batch, cursor) in enumerate(take(last, 5)):
            assert same(batch, {key: x[rows] for key, x in whole[step + k][0].items()})
            assert cursor == whole[step + k][1]


def test_a_mixture_may_change_while_a_run_goes_on(world, three, tmp_path):
    """Another weight, a source more, a source less: what stays goes on where it stood."""
    meta, entries = three
    entries = {k: dict(v) for k, v in entries.items()}
    for entry in entries.values():
        entry |= {k: str(meta.parent / entry[k]) for k in ("root", "annotation")}
    before = open_three(world, meta)
    _, cursor = take(before.batches(), 7)[-1]
    assert cursor["row"], "in the middle of a window"
    stream = before.reader(cursor)[0].stream
    boundary = (cursor["window"] + 1) * 16

    more = entries | {"d": dict(entries["b"])}
    more["a"]["repeat_time"] = 0.1
    (tmp_path / "more.json").write_text(json.dumps(more))
    after = open_three(world, tmp_path / "more.json")
    now = after.reader(cursor)[0].stream
    news, *lines = after.summary(cursor)
    assert news == f"another mixture from sample {boundary + 1} on: d begins"
    shares = {"a": 6.0, "b": 67.5, "c": 8.4, "d": 67.5}
    for line, (name, share) in zip(lines, shares.items(), strict=True):
        assert line.startswith(f"{name}: {share / 149.4:.2%} of the samples, "), line
    assert [now[n] for n in range(boundary)] == [stream[n] for n in range(boundary)]
    following = {name: stream.drawn(boundary).get(name, 0) for name in "abcd"}
    for n in range(boundary, boundary + 100):
        draw = now[n]
        assert draw.seen == following["abcd"[draw.source]]
        following["abcd"[draw.source]] += 1
    assert all(count > 3 for count in following.values())
    # The rest of the window is packed as it would have been, and a saved cursor goes on.
    old = plan_of(before, cursor)
    rest = len(before.reader(cursor)[0].plan(cursor).rows(cursor["window"])) - cursor["row"]
    assert plan_of(after, cursor)[:rest] == old[:rest]
    batches = take(after.batches(cursor), 3)
    again = take(open_three(world, tmp_path / "more.json").batches(batches[0][1]), 2)
    assert all(same(a, b) for (a, _), (b, _) in zip(batches[1:], again, strict=True))
    assert len(batches[-1][1]["mixture"]) == 1, "a phase that is past leaves the cursor"
    assert len(after.summary(batches[-1][1])) == 4, "a change is said once"

    (tmp_path / "less.json").write_text(json.dumps({k: entries[k] for k in "ac"}))
    less = open_three(world, tmp_path / "less.json")
    reader, start = less.reader(cursor)
    assert (start["window"], start["row"]) == (cursor["window"] + 1, 0)
    assert reader.news.endswith("b is gone; the rest of a window of 16 samples is not read")
    drawn = stream.drawn(boundary)
    first = {
        reader.stream[n].source: reader.stream[n].seen
        for n in range(boundary + 50, boundary - 1, -1)
    }
    assert first == {0: drawn["a"], 1: drawn["c"]}


def rest_of_window(pipeline: Pipeline, cursor) -> tuple[list[int], dict]:
    """Places that are still to be read of the cursor's window, and the cursor that is begun at."""
    reader, begun = pipeline.reader(cursor)
    rows = reader.plan(begun).rows(cursor["window"])[begun["row"] :]
    return (list(itertools.chain(*rows)) if begun["window"] == cursor["window"] else []), begun


@pytest.mark.parametrize("change", ["tile limit", "annotation"])
def test_lengths_that_changed_make_nothing_be_read_twice(world, three, tmp_path, change):
    """The window in progress would be packed otherwise: what is left of it is given up."""
    meta, entries = three
    entries = {k: dict(v) for k, v in entries.items()}
    for entry in entries.values():
        entry |= {k: str(meta.parent / entry[k]) for k in ("root", "annotation")}

    def opened() -> Pipeline:
        (tmp_path / "meta.json").write_text(json.dumps(entries))
        limits = {"data__max_tiles": 4, "data__tiles": 12, "data__rows": 8, "data__window": 64}
        return open_three(world, tmp_path / "meta.json", **limits)

    before = opened()
    whole = take(before.batches(), 9)
    read = next(k for k, (_, c) in enumerate(whole, 1) if c["row"] > 3 and c["window"] > 0)
    cursor = json.loads(json.dumps(whole[read - 1][1]))
    again = opened()
    assert again.summary(cursor) == before.summary(cursor) and len(again.summary(cursor)) == 3
    for (a, _), (b, _) in zip(whole[read:], again.batches(cursor), strict=False):
        assert same(a, b)
    done = before.reader()[0].plan()
    done = set(itertools.chain(*(done[row] for row in range(8 * read))))

    name = "a" if change == "tile limit" else "b"
    if change == "tile limit":
        entries["a"]["max_dynamic_patch"] = 1
    else:
        rows = [json.loads(x) for x in (meta.parent / "b.jsonl").read_text().splitlines()]
        for row in rows[::3]:
            row["conversations"][1]["value"] = "white " * 20
        other = tmp_path / "b.jsonl"
        other.write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries["b"]["annotation"] = str(other)
    after = opened()
    left, begun = rest_of_window(after, cursor)
    assert not left and (begun["window"], begun["row"]) == (cursor["window"] + 1, 0)
    news = f"records of other lengths than before: {name}; "
    news += "the rest of a window of 64 samples is not read"
    assert after.summary(cursor)[0] == news and len(after.summary(cursor)) == 4
    ((_, following),) = take(after.batches(cursor), 1)
    assert len(after.summary(following)) == 3, "said once"
    boundary = cursor | {"row": 0}
    assert after.summary(boundary)[0] == news.partition(";")[0]
    assert after.reader(boundary)[1]["window"] == cursor["window"], "nothing of it was read"
    # As it was without the digests, which cursors of earlier versions have not.
    older = {k: v for k, v in cursor.items() if k != "lengths"}
    left, begun = rest_of_window(after, older)
    assert (begun["window"], begun["row"]) == (cursor["window"], cursor["row"])
    assert set(left) & done, "read twice: what the digests are for"


def test_a_weight_is_of_the_samples_that_come(world, tmp_path):
    """Four in five records of one source are left out; both give as much."""
    question = {"from": "human", "value": "Hello"}
    short, long = ({"from": "gpt", "value": "white " * n} for n in (1, 200))

    def opened(left_out: bool, **entry) -> Pipeline:
        rows = [[question, long if left_out and i % 5 else short] for i in range(100)]
        write_meta(tmp_path, [{"conversations": turns} for turns in rows], "a.json")
        write_meta(tmp_path, [{"conversations": [question, short]}] * 100, "b.json")
        entries = {n: {"annotation": f"{n}.jsonl", "root": "images"} | entry for n in "ab"}
        (tmp_path / "m.json").write_text(json.dumps(entries))
        settings = {"data__too_long": "drop", "data__rows": 4, "data__window": 64}
        return open_three(world, tmp_path / "m.json", **settings)

    pipeline = opened(True, weight=0.3)
    counts = collections.Counter[int]()
    for batch, _ in take(pipeline.batches(), 20):
        for segments, sources in zip(batch["segment_ids"], batch["source_ids"], strict=True):
            counts.update(sources[segments == s][0] for s in range(1, segments.max() + 1))
    assert counts.total() > 200 and abs(counts[0] - counts[1]) < 30
    a, b = pipeline.summary()
    assert a == (
        "a: 50.00% of the samples, 100 records, read 0.00 times so far; 80 of 100 are left out"
    )
    assert b == "b: 50.00% of the samples, 100 records, read 0.00 times so far"
    report = stats_report(pipeline, pipeline._config.data)
    assert [(s["left_out"], s["looked_at"]) for s in report["sources"]] == [(80, 20), (0, 100)]
    assert report["sources"][0]["tokens"]["min"] == report["sources"][1]["tokens"]["min"] > 0
    plan = report["plan"]
    assert plan["samples"] == sum(plan["draws"].values()) < 4 * 64
    assert abs(plan["draws"]["a"] - plan["draws"]["b"]) < 20
    # Without them the cursor's weights are those of the file, and repeats stay repeats of records.
    assert opened(False, weight=0.3).reader()[1]["mixture"][0]["weights"] == {"a": 0.3, "b": 0.3}
    assert opened(True).reader()[1]["mixture"][0]["weights"] == {"a": 100.0, "b": 100.0}
    assert opened(True).summary()[0].startswith("a: 16.67% of the samples, 100 records, ")


def test_hosts_must_have_the_same_lengths(world, three, tmp_path, monkeypatch):
    """One had a hiccup when it measured: it would plan other rows than the others."""
    facts: dict[str, object] = {}
    monkeypatch.setattr(DataBarrier, "agree", lambda self, new: facts.update(new))
    changes = {"data__meta": str(three[0]), "data__rows": 8, "init__scratch": True}
    config = world.config("instruct", **changes)
    open_run(config, tmp_path, jax.devices()[:1], quiet=True)
    digests = open_three(world, three[0]).digests
    assert digests.keys() == set("abc") and len(set(digests.values())) == 3
    for name, digest in digests.items():
        assert facts[f"measured lengths (config.data.index) of {name!r}"] == digest


def test_held_out_records_are_read_once_by_all_hosts_together(world, three):
    pipeline = open_three(world, three[0], data__holdout=4)
    held = [{i for i in range(n) if i % 4 == 3} for n in (60, 45, 21)]
    trained = pipeline.reader()[0]
    assert not any(trained.origin(n)[1] in held[trained.origin(n)[0]] for n in range(2000))
    whole = list(pipeline.held_out())
    assert sum(int(b["segment_ids"].max(axis=1).sum()) for b in whole) == sum(map(len, held))
    for hosts in (2, 8):
        parts = [list(pipeline.held_out(host=h, hosts=hosts)) for h in range(hosts)]
        assert all(len(part) == len(whole) for part in parts), "no host waits for another"
        for k, batch in enumerate(whole):
            assert same(batch, joined([part[k] for part in parts]))
    last = whole[-1]
    empty = last["segment_ids"].max(axis=1) == 0
    assert empty.any() and (last["labels"][empty] == IGNORE).all()
    with pytest.raises(UserError, match="config.data.holdout"):
        next(open_three(world, three[0]).held_out())


# Records longer than a row


def test_long_conversations_are_cut_at_whole_turns(world, tmp_path):
    """What is left is the record without its last exchanges and their images."""
    os.symlink(world.root / "images", tmp_path / "images")
    ask = {"from": "human", "value": "<image>\nHello please"}
    answer = {"from": "gpt", "value": "white red"}
    many = {"image": ["00.png"] * 6, "conversations": [ask, answer] * 6}
    two = {"image": ["00.png"] * 2, "conversations": [ask, answer] * 2}
    long_answer = {
        "conversations": [
            {"from": "human", "value": "Hello"},
            {"from": "gpt", "value": "white " * 200},
        ]
    }
    long_question = {"conversations": [{"from": "human", "value": "Hello " * 200}, answer]}
    meta = write_meta(tmp_path, [many, long_answer, long_question, two])

    def source(policy: str, **changes):
        settings = {"data__meta": str(meta), "data__too_long": policy, "data__tiles": 3} | changes
        pipeline = open_three(world, meta, **settings)
        return pipeline.sources[0], pipeline.lengths[0]

    with pytest.raises(UserError, match="record 1 has .* tokens and 6 tiles; a row holds 96 and 3"):
        source("error")
    cut, lengths = source("cut")
    assert lengths[2] == (0, 0) and "before the first answer" in cut.measure(2).cut
    whole, _ = source("error", data__tokens=2000, data__tiles=20)
    images = whole.sample(0, 0).tiles
    kept, complete = cut.sample(0, 0), whole.sample(0, 0)
    exchanges = len(kept.tiles)
    assert 0 < exchanges <= 3 and f"{2 * exchanges} of 12 turns kept" in cut.measure(0).cut
    np.testing.assert_array_equal(kept.ids, complete.ids[: len(kept.ids)])
    np.testing.assert_array_equal(kept.labels, complete.labels[: len(kept.ids)])
    np.testing.assert_array_equal(kept.tiles, images[:exchanges])
    assert kept.ids[-1] == world.model.im_end_id, "ends with an answer"
    part = cut.sample(1, 0)
    assert len(part.ids) == 96 == lengths[1][0] and part.labels[-1] != IGNORE
    assert np.array_equal(cut.sample(3, 0).ids, whole.sample(3, 0).ids)
    dropping, lengths = source("drop")
    assert [lengths[i] == (0, 0) for i in range(4)] == [True, True, True, False]
    assert dropping.measure(0).cut.endswith("left out")
    fingerprints = {source(p)[0].fingerprint() for p in ("cut", "drop")} | {whole.fingerprint()}
    assert len(fingerprints) == 3


def slowly_fitted(source: Conversations, record: Record, tiles: list[int]):
    """The rule itself: the longest beginning that ends with an answer and fits; else a part of the
    first."""
    encoded, images = source._encode(record, record.turns, tiles), len(tiles)
    if source._fits(encoded, tiles):
        return encoded, images
    for end in range(len(record.turns), 0, -1):
        if record.turns[end - 1].role == "assistant":
            turns = record.turns[:end]
            images = sum(t.text.count("<image>") for t in turns if t.role == "user")
            encoded = source._encode(record, turns, tiles[:images])
            if source._fits(encoded, tiles[:images]):
                return encoded, images
    answer, (row_tokens, row_tiles) = int(np.argmax(encoded.labels != IGNORE)), source._row
    if answer >= row_tokens or sum(tiles[:images]) > row_tiles:
        return None, 0
    return Encoded(encoded.ids[:row_tokens], encoded.labels[:row_tokens]), images


def test_cuts_are_found_by_halving(world, monkeypatch):
    """The same as by trying every answer from the last on, at a few encodings."""
    rng = np.random.default_rng(0)
    config = world.config("instruct", data__too_long="cut", data__tiles=5)
    tokenizer = Tokenizer.load(config.data.tokenizer)
    kinds = collections.Counter[str]()
    for _ in range(150):
        exchanges, system = int(rng.integers(1, 20)), bool(rng.integers(2))
        turns = [Turn("system", "Hello " * int(rng.integers(30)))] if system else []
        for _ in range(exchanges):
            shown = "<image>" * int(rng.integers(3) == 0)
            turns.append(
                Turn(
                    "user",
                    shown + "please " * int(rng.choice([1, 3, 12, 90], p=[0.3, 0.3, 0.3, 0.1])),
                )
            )
            turns.append(Turn("assistant", "white " * int(rng.choice([1, 5, 30]))))
        turns += [Turn("user", "Hello")] * int(rng.integers(2))
        tiles = rng.integers(1, 3, sum(t.text.count("<image>") for t in turns)).tolist()
        record = Record(tuple(turns), (b"",) * len(tiles), "here")
        entry = MetaEntry("x", types.SimpleNamespace(max_tiles=None), 1.0, None, False, ())
        source = Conversations(entry, tokenizer, config.model, config.data, 0)
        expected, expected_images = slowly_fitted(source, record, tiles)
        calls: list[int] = []
        encode = source._encode
        monkeypatch.setattr(
            source, "_encode", lambda *args, f=encode, calls=calls: (calls.append(1), f(*args))[1]
        )
        encoded, images, said = source._fit(record, tiles)
        assert images == expected_images and (encoded is None) == (expected is None)
        if encoded is not None:
            assert np.array_equal(encoded.ids, expected.ids)
            assert np.array_equal(encoded.labels, expected.labels)
        assert len(calls) <= 1 + np.ceil(np.log2(exchanges + 1))
        kinds["turns kept" if "turns kept" in said else said.rpartition(": ")[2]] += 1
    assert len(kinds) == 4 and min(kinds.values()) > 5, kinds


def test_a_small_weight_is_not_none():
    counts = Shares([1.0, 3e-7, 2e-7]).counts(10**10)
    assert abs(counts[1] - 3000) < 3 and abs(counts[2] - 2000) < 3
    assert Shares([1e-9, 3e-9]).counts(8) == [2, 6]


def test_a_source_that_comes_back_is_the_one_that_went():
    """Also after it has left the cursor's phases: with other records it would repeat some."""

    def stored(phases):
        return json.loads(json.dumps([dataclasses.asdict(phase) for phase in phases]))

    both, one = {"a": 100, "b": 50}, {"a": 100}
    phases = phases_from([], both, {"a": 1.0, "b": 1.0}, 0)
    phases = phases_from(stored(phases), one, {"a": 1.0}, 1000)[-1:]
    phases = phases_from(stored(phases), one, {"a": 2.0}, 2000)[-1:]
    with pytest.raises(UserError, match="b: has 70 records, but had 50"):
        phases_from(stored(phases), {"a": 100, "b": 70}, {"a": 1.0, "b": 1.0}, 3000)
    again = phases_from(stored(phases), both, {"a": 1.0, "b": 1.0}, 3000)[-1]
    assert again.drawn == {"a": 2500, "b": 500} and not again.gone
