"""Mixing: exact shares, places that follow from a number, mixtures that change in mid-run."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os

import numpy as np
import pytest

from hovle_jax.config import IGNORE
from hovle_jax.data.mixture import Phase, Shares, Shuffled, Stream, phases_from
from hovle_jax.data.pipeline import Pipeline, Split, global_row
from hovle_jax.data.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.stages import get_stage
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
    stage, tokenizer = get_stage("instruct"), Tokenizer.load(config.data.tokenizer)
    return Pipeline(config, stage.data, stage.token_weights, tokenizer, quiet=True)


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
