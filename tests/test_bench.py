"""Benchmarks report what they say they do; packing keeps its fills. No test looks at the clock."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from hovle_jax import model
from hovle_jax.bench import data, demand, generate, packing, reference, steps, synthetic
from hovle_jax.cli.main import main
from hovle_jax.config import IGNORE, ModelConfig, RunConfig, TeacherConfig, to_dict
from hovle_jax.data.pack import best_fit
from hovle_jax.data.records import Record
from hovle_jax.data.samples import Tiler
from hovle_jax.generation.generate import generate as hovle_generate
from hovle_jax.stages import open_pipeline
from hovle_jax.tpu import aot
from tests import small

STREAM = packing.synthetic_lengths(6000, seed=0)
TOKENS = 8192
TILES = packing.suggest_tiles(STREAM, TOKENS)


def config_file(tmp_path, config: RunConfig) -> str:
    path = tmp_path / "config.py"
    body = f"def get_config():\n    return ml_collections.ConfigDict({to_dict(config)!r})\n"
    path.write_text("import ml_collections\n" + body)
    return str(path)


def test_the_plan_fills_rows():
    """The promise of docs/performance.md, on a stream the default window was not chosen on."""
    fills = packing.compare(STREAM, TOKENS, TILES, window=RunConfig().data.window)
    plan = fills["plan"]
    assert plan["token_fill"] >= 0.97 and plan["tile_fill"] >= 0.90
    for other in ("first_fit", "buffer"):
        assert plan["rows"] <= fills[other]["rows"]
    assert fills["buffer"]["token_fill"] < plan["token_fill"] - 0.02


@pytest.mark.parametrize("tokens, tiles", [(8192, TILES), (6000, 18), (16384, 48)])
@pytest.mark.parametrize("packer", ["first_fit", "greedy_buffer", "best_fit"])
def test_packers_place_every_sample_once_within_both_limits(packer, tokens, tiles):
    pack = {"best_fit": best_fit}.get(packer) or getattr(packing, packer)
    lengths = STREAM[:700]
    rows = pack(lengths, tokens, tiles)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    totals = np.array([np.sum([lengths[i] for i in row], axis=0) for row in rows])
    assert (totals <= (tokens, tiles)).all()


def test_attention_visits_what_samples_see():
    """Rows of 4 blocks: one sample of all, two of half, one in each block and a bit."""
    lengths = [(2048, 0), (1024, 0), (512, 0), (513, 0)]
    share = functools.partial(packing.attention_share, lengths, tokens=2048)
    assert share([[0]]) == 1.0
    assert share([[1, 1]]) == (3 + 3) / 10
    assert share([[2, 2, 2, 2]]) == 4 / 10
    assert share([[3, 3, 3]]) == 7 / 10  # each reaches into the next block, the last is its own


def test_first_fit_takes_the_first_row():
    lengths = [(5, 1), (7, 1), (4, 0), (3, 1), (1, 3)]
    assert packing.first_fit(lengths, 10, 3) == [[0, 2], [1, 3], [4]]


def test_greedy_buffer_order_and_blank_tiles():
    """Rows with most tiles are tried first; text takes a tile; a full row leaves at once."""
    # 2 fills the tokens of row [1], tried before row [0]; 6 fills the tiles of row [0, 3, 5].
    lengths = [(10, 1), (95, 3), (5, 0), (50, 2), (50, 1), (20, 1), (15, 1)]
    rows = packing.greedy_buffer(lengths, 100, 5, size=20)
    assert rows == [[1, 2], [0, 3, 5, 6], [4]]
    assert packing.greedy_buffer([(60, 1), (60, 3), (60, 2)], 100, 5, size=1) == [[1], [2], [0]]


def test_rows_of_a_window_are_not_sorted_by_size():
    """Documents at the start of every window and captions at its end would be a curriculum."""
    lengths = STREAM[:1024]
    rows = best_fit(lengths, TOKENS, TILES)
    longest = np.array([max(lengths[i][0] for i in row) for row in rows])
    half = len(rows) // 2
    assert abs(longest[:half].mean() / longest[half:].mean() - 1) < 0.15


def test_suggested_tiles_follow_the_mixture():
    mean = np.mean(STREAM, axis=0)
    assert abs(TILES / (TOKENS * mean[1] / mean[0]) - 1) < 0.06
    assert packing.suggest_tiles([(100, 0), (900, 9)], 1000, margin=0.0) == 9
    assert packing.suggest_tiles([(100, 0), (100, 0)], 1000) == 0


def test_bench_packing_writes_its_table(tmp_path, capsys, one_line_error):
    out = tmp_path / "out.json"
    args = ["bench", "packing", "--samples=1500", "--tokens=8192", f"--json={out}"]
    assert main(args) == 0
    report = json.loads(out.read_text())
    assert set(report["packers"]) == {"plan", "first_fit", "buffer"}
    assert report["tiles"] == report["suggested_tiles"] and "token fill" in capsys.readouterr().out
    assert "the longest sample has" in one_line_error([*args, "--tiles=5"])
    assert "--window" in one_line_error([*args, "--window=0"])
    assert "--only: 'letter' is not one of caption, document" in one_line_error(
        [*args, "--only=letter"]
    )


@pytest.mark.parametrize("stage", ["distill", "instruct"])
def test_bench_data_reports_what_its_batches_hold(world, tmp_path, capsys, stage):
    path, out = config_file(tmp_path, world.config(stage)), tmp_path / "out.json"
    args = ["bench", "data", f"--config={path}", "--seconds=0.05", f"--json={out}"]
    assert main([*args, "--config.data.rows=4"]) == 0
    report = json.loads(out.read_text())
    (kind, measured), *rest = report["data"].items()
    assert not rest and kind == {"distill": "unpaired", "instruct": "conversations"}[stage]
    rows, (tokens, tiles) = measured["batches"] * 4, (96, 4)
    assert measured["batches"] >= 1 and measured["core_seconds"] > 0
    assert measured["token_fill"] == pytest.approx(measured["tokens"] / (rows * tokens))
    assert measured["tile_fill"] == pytest.approx(measured["tiles"] / (rows * tiles))
    assert 0 < measured["token_fill"] <= 1 and 0 < measured["tile_fill"] <= 1
    assert measured["images"] <= measured["tiles"] and measured["tokens"] > measured["tiles"] * 4
    rate = measured["tiles"] / measured["core_seconds"]
    assert measured["tiles_per_core_second"] == pytest.approx(rate)
    assert set(measured["shares"]) == set(data.PARTS)
    assert sum(measured["shares"].values()) == pytest.approx(1)
    assert measured["shares"]["decode"] > 0 and measured["shares"]["resize"] > 0
    assert (measured["shares"]["tokenise"] > 0) == (stage == "instruct")
    assert measured["batch_bytes"] > 4 * 4 * 32 * 32 * 3
    assert {tuple(r["from"]) for r in report["resize"]} == set(synthetic.SIZES)
    assert [host["host"] for host in report["hosts"]] == ["v5e-8", "v6e-8"]
    for host in report["hosts"]:
        assert "MFU 0.5" in host["step_time_from"]
        assert host["cores"] == pytest.approx(host["tiles_per_second"] / rate)
    assert "of each for 1 host " in capsys.readouterr().out


def test_bench_data_counts_cores_from_a_plan(world, tmp_path, one_line_error):
    config, plan, out = world.config("instruct"), tmp_path / "plan.json", tmp_path / "out.json"
    plan.write_text(json.dumps({"step_seconds": 2.0, "topology": "v5e:4x4", "slices": 2}))
    args = ["bench", "data", f"--config={config_file(tmp_path, config)}", "--seconds=0.05"]
    assert main([*args, f"--plan={plan}", f"--json={out}"]) == 0
    report = json.loads(out.read_text())
    (host,) = report["hosts"]
    tiles_per_row = report["data"]["conversations"]["tiles_per_row"]
    # 8 rows in two seconds on 32 chips, of which a host has 8.
    assert host["host"] == "v5e-8" and "hovle plan" in host["step_time_from"]
    assert host["tiles_per_second"] == pytest.approx(tiles_per_row * 8 / 2.0 / 4)
    # Each worker plans all 8 rows of a step, for all 4 hosts.
    planning = report["data"]["conversations"]["row_seconds"]["plan"] * 8 / 2.0
    assert host["hosts"] == 4 and host["planning"] == pytest.approx(planning)
    plan.write_text(json.dumps({"step_seconds": 2.0, "topology": "v5p:2x2x4"}))
    (host,) = demand.cores(config, 3.0, 100.0, planning_seconds=0.0, plan=str(plan))
    assert host["host"] == "v5p-8" and host["hosts"] == 4  # Google counts its cores
    assert host["tiles_per_second"] == pytest.approx(3.0 * 8 / 2.0 / 4)
    plan.write_text("{}")
    assert "topology" in one_line_error([*args, f"--plan={plan}"])
    assert "nowhere.json" in one_line_error([*args, "--plan=nowhere.json"])
    assert "--config" in one_line_error(["bench", "data", f"--plan={plan}"])
    assert "--seconds" in one_line_error([*args[:-1], "--seconds=0"])


def test_flops_of_the_released_sizes():
    """InternViT-300M's weights alone are 0.62 TFLOP a tile forward, attention 0.1 more."""
    teacher = TeacherConfig().flops_per_tile()
    assert 0.70e12 < teacher < 0.75e12
    base = RunConfig()
    one_tile = dataclasses.replace(base.data, tokens=256, tiles=1)
    one_tile = dataclasses.replace(one_tile, rows=1)
    stage1 = aot.model_flops(dataclasses.replace(base, data=one_tile))
    assert 1.45e12 < stage1 < 1.6e12  # 8 layers of 63M weights, 6 FLOPs each, 256 tokens: 0.77
    stage2, stage3 = (
        aot.model_flops(dataclasses.replace(base, stage=name, data=one_tile))
        for name in ("align", "instruct")
    )
    forward = ModelConfig().flops_per_token(256)
    attention = ModelConfig().decoder.mixing_flops(256)  # has no weights
    frozen = 256 * (forward["decoder"] + forward["head"] - attention)
    assert stage3 - stage2 == pytest.approx(frozen)  # weight gradients of the LLM
    thawed = dataclasses.replace(base, stage="align", trainable=".*", data=one_tile)
    assert aot.model_flops(thawed) == stage3


def test_cores_follow_from_what_the_stage_trains(world):
    """Of the same rows, those of a frozen LLM are faster and need more cores to feed them."""
    rates = {}
    for stage in ("align", "instruct"):
        config = world.config(stage)
        host, _ = demand.cores(config, 2.0, 100.0, planning_seconds=1e-5, mfu=0.25)
        tiles = config.data.rows * 2.0 / aot.model_flops(config)
        assert host["tiles_per_second"] == pytest.approx(197e12 * 8 * 0.25 * tiles)
        assert host["cores"] == pytest.approx(host["tiles_per_second"] / 100.0)
        assert host["planning"] == pytest.approx(host["tiles_per_second"] / 2.0 * 1e-5)
        rates[stage] = host["tiles_per_second"]
    assert rates["align"] > 1.1 * rates["instruct"]


def test_pixels_are_timed_with_the_tiler_of_the_config(world, tmp_path):
    Image.new("RGB", (40, 32)).save(tmp_path / "wide.png")
    record = Record((), (str(tmp_path / "wide.png"),), "row")
    for name, tiles in (("dynamic", 1), ("native", 3)):
        config = world.config("instruct", data__tiler=name)
        tiler = Tiler(config.model, config.data, None)
        found = data._pixels({"decode": 0.0, "resize": 0.0}, record, tiler)
        assert found == tiler.counts(record) == [tiles]


def test_synthetic_data_has_every_kind(tmp_path):
    """The made-up data set itself, with small pictures."""
    synthetic.write_data(tmp_path, rows=24, each=2, sizes=((64, 48), (96, 96)))
    model = dataclasses.replace(ModelConfig(), image_size=28, patch_size=14)
    config = synthetic.bench_config(tmp_path, "instruct", unpaired=False, model=model)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, tokens=4096, window=32)
    )
    pipeline = open_pipeline(config, index=tmp_path / "index", quiet=True)
    tiles = {s.name: [n[1] for n in map(s.measure, range(len(s)))] for s in pipeline.sources}
    assert set(tiles) == set(packing.KINDS)
    assert set(tiles["caption"]) == {1} and set(tiles["text"]) == {0}
    assert min(tiles["document"]) > 1 and max(tiles["several"]) > 1
    batch, _ = next(pipeline.batches())
    rows, samples, images, found, tokens = data.contents(batch, config.model)
    assert rows == 4 and samples > rows and found >= images > 0
    assert tokens == (batch["segment_ids"] > 0).sum()
    unpaired = synthetic.bench_config(tmp_path, "distill", unpaired=True, model=model)
    unpaired = dataclasses.replace(unpaired, data=dataclasses.replace(unpaired.data, window=32))
    first, _ = next(open_pipeline(unpaired, index=tmp_path / "index", quiet=True).batches())
    assert data.contents(first, unpaired.model)[2:4].tolist() == [32, 32]


def test_the_default_workload():
    """Of design and docs: 61.6M parameters in the released tensors, one tile, 1,100 tokens."""
    config = steps.workload()
    c = config.model
    assert round((c.params() + c.text_rows * c.hidden_size) / 1e5) == 616
    batch = steps.made_up_batch(config)
    assert batch["input_ids"].shape == (1, 1100) and batch["pixels"].shape == (1, 1, 448, 448, 3)
    assert (batch["input_ids"] == c.img_context_id).sum() == 256


def test_made_up_batches_are_full_and_packed(world, one_line_error, tmp_path):
    config = world.config("instruct")
    batch, c = steps.made_up_batch(config), config.model
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in steps.aot.batch_shapes(config).items()
    }
    for ids, segments, positions in zip(
        batch["input_ids"], batch["segment_ids"], batch["position_ids"], strict=True
    ):
        starts = np.flatnonzero(positions == 0)
        assert list(segments[starts]) == [1, 2, 3, 4] and segments.min() == 1
        assert (ids[starts] == c.bos_id).all()
        assert (ids == c.img_context_id).sum() == 4 * c.tokens_per_tile
    answers = batch["labels"] != IGNORE
    assert (batch["loss_weight"] == answers).all() and 0 < answers.mean() < 1
    path = config_file(tmp_path, config)
    error = one_line_error(["bench", "train", f"--config={path}", *MESH, "--config.data.tokens=20"])
    assert "data.tokens" in error and "4 tiles" in error
    assert "--steps" in one_line_error(["bench", "train", f"--config={path}", "--steps=0", *MESH])


MESH = ("--config.mesh.fsdp=8",)  # all simulated devices


def bench_steps(world, tmp_path, kind: str, stage: str, *arguments: str) -> dict:
    path, out = config_file(tmp_path, world.config(stage)), tmp_path / "out.json"
    args = ["bench", kind, f"--config={path}", "--rounds=2", "--steps=1", f"--json={out}"]
    assert main([*args, *MESH, *arguments]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    "kind, stage",
    [
        pytest.param("train", "distill", marks=pytest.mark.slow),  # a minute of compiling
        ("train", "instruct"),
        ("forward", "align"),
    ],
)
def test_bench_steps_report(world, tmp_path, capsys, kind, stage):
    report = bench_steps(world, tmp_path, kind, stage)
    assert set(report["work"]) == set(steps.WORK[kind])
    assert report["stage"] == stage and report["reference"] is None
    assert report["peak_flops"] > 0 and "measured here" in report["peak_flops_from"]
    for work in report["work"].values():
        assert len(work["round_seconds"]) == 2 and work["compile_seconds"] > 0
        seconds = work["step_seconds"]
        assert seconds == pytest.approx(np.median(work["round_seconds"]))
        assert work["tokens_per_second"] == pytest.approx(8 * 96 / seconds)
        expected = work["model_flops"] / seconds / report["peak_flops"] / 8
        assert work["mfu"] == pytest.approx(expected)
        assert np.isfinite(work["loss"])
    if kind == "forward":
        forward, both = (report["work"][name] for name in steps.WORK[kind])
        assert forward["loss"] == pytest.approx(both["loss"], abs=1e-6)
        assert 2 * forward["model_flops"] < both["model_flops"] <= 3 * forward["model_flops"]
    out = capsys.readouterr().out
    assert "MFU" in out and "PyTorch" not in out


WORKER = """
import json, sys
import numpy as np
code, directory, batch, settings = sys.argv[1:]
assert json.load(open(directory + "/config.json"))["embedding_config"]["num_hidden_layers"] == 2
batch = np.load(batch)
assert batch["pixel_values"].shape == (8, 3, 32, 32) and batch["pixel_values"].min() < 0
print(json.dumps({"description": "a stand-in"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if LOSS is None:
        raise RuntimeError("out of luck")
    print(json.dumps({"seconds": 2.0, "cpu_seconds": 3.0, "loss": LOSS}), flush=True)
"""


def test_bench_takes_turns_with_a_reference(world, tmp_path, monkeypatch, capsys, one_line_error):
    """The protocol, with a process and a program that only say what they were told to."""
    loss = 4.5
    made = {"train": steps.Program(lambda: loss, 1e9, 0.1, None)}
    monkeypatch.setattr(steps, "programs", lambda *args: made)
    params = model.init(jax.random.key(0), world.model)
    monkeypatch.setattr(steps, "initial_params", lambda *args: params)
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(reference, "WORKER", worker)
    code = tmp_path / "code"
    code.mkdir()
    (code / "modeling_internvl_chat.py").touch()
    arguments = ["--config.data.tiles=1", f"--reference={code}"]

    worker.write_text(WORKER.replace("LOSS", repr(loss + 5e-5)))
    report = bench_steps(world, tmp_path, "train", "instruct", *arguments)
    beside = report["work"]["train"]["reference"]
    assert report["reference"] == "a stand-in" and "PyTorch" in capsys.readouterr().out
    assert beside["step_seconds"] == 2.0 and beside["cpu_seconds"] == 3.0
    ours = report["work"]["train"]["round_seconds"]
    assert beside["ratios"] == pytest.approx([2.0 / seconds for seconds in ours])
    assert beside["ratio"] == pytest.approx(np.median(beside["ratios"]))

    def error(*more: str, stage: str = "instruct") -> str:
        path = config_file(tmp_path, world.config(stage))
        return one_line_error(["bench", "train", f"--config={path}", *MESH, *arguments, *more])

    worker.write_text(WORKER.replace("LOSS", repr(loss + 2e-4)))
    assert "not the same work" in error()
    worker.write_text(WORKER.replace("LOSS", "float('nan')"))
    assert "not the same work" in error()
    worker.write_text(WORKER.replace("LOSS", "None"))
    assert "out of luck" in error()
    assert "packs no samples" in error("--config.data.tiles=2")
    assert "instruct" in error(stage="align")
    assert "nowhere" in error("--reference=nowhere")
    assert "cannot be run" in error("--python=nowhere/python")


def test_bench_generate(tmp_path, capsys, monkeypatch, one_line_error):
    """Every key of the contract, of a made-up model."""
    monkeypatch.setattr(generate, "DEFAULT", small.PRE)
    out = tmp_path / "report.json"
    argv = ["bench", "generate", "--prompt", "30", "--new", "4", "--batch", "2", "--repeats", "1"]
    assert main([*argv, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    workload = report["workload"]
    assert workload["parameters"] == small.PRE.params() and workload["new_tokens"] == 4
    assert report["decode_seconds_per_token"] > 0 and report["prefill_seconds"] > 0
    rate = 2 / report["decode_seconds_per_token"]
    assert report["decode_tokens_per_second"] == pytest.approx(rate)
    assert report["prefill_tokens_per_second"] == pytest.approx(60 / report["prefill_seconds"])
    assert "ms a token" in capsys.readouterr().out
    assert "--new must be 2 or more" in one_line_error([*argv, "--new", "1"])
    assert "1 tiles alone take 7 tokens" in one_line_error([*argv, "--prompt", "6"])


GENERATE_WORKER = """
import json, sys
import numpy as np
code, directory, batch, settings = sys.argv[1:]
batch = np.load(batch)
assert batch["input_ids"].shape == (30,) and batch["pixel_values"].shape == (1, 3, 28, 28)
print(json.dumps({"description": "a stand-in"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    tokens, slow = TOKENS[: asked["steps"]], json.loads(settings)["work"] == "public"
    assert len(tokens) == (3 if slow else 6)
    last = 1 + (len(tokens) - 1) * (10 if slow else 2)
    answer = {"tokens": tokens, "seconds": [1, last], "cpu_seconds": [2, 2 * last]}
    print(json.dumps(answer), flush=True)
"""


def test_bench_generate_beside_a_reference(tmp_path, capsys, monkeypatch, one_line_error):
    """The protocol, the ratios turn by turn, and the refusal to time other work."""
    monkeypatch.setattr(generate, "DEFAULT", small.PRE)
    params = model.init(jax.random.key(0), small.PRE)
    asked = generate._request(small.PRE, 30, 6, 1, 0)
    prompts = {"max_new": 6, "stop_ids": ()}
    tokens = hovle_generate(params, small.PRE, [asked.prompt], [asked.tiles], **prompts)[0]
    worker, code, out = tmp_path / "worker.py", tmp_path / "code", tmp_path / "report.json"
    monkeypatch.setattr(reference, "GENERATE_WORKER", worker)
    code.mkdir()
    (code / "modeling_internvl_chat.py").touch()
    argv = ["bench", "generate", "--prompt=30", "--new=6", "--repeats=2", f"--reference={code}"]

    worker.write_text(GENERATE_WORKER.replace("TOKENS", repr(tokens)))
    assert main([*argv, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    found = report["reference"]
    for name, token in (("transformers", 2.0), ("public", 10.0)):
        assert found[name]["prefill"]["seconds"] == 1.0
        assert found[name]["token"]["seconds"] == token
        assert found[name]["token"]["cpu_seconds"] == 2 * token
        assert found[name]["answer"]["seconds"] == 1 + 5 * token
        assert len(found[name]["answer"]["ratios"]) == 2
    ours = [10 / ratio for ratio in found["public"]["token"]["ratios"]]
    assert np.median(ours) == pytest.approx(report["decode_seconds_per_token"])
    assert "a stand-in" in capsys.readouterr().out

    assert "answers one prompt at a time" in one_line_error([*argv, "--batch", "2"])
    worker.write_text(GENERATE_WORKER.replace("TOKENS", repr([*tokens[:-1], tokens[-1] ^ 1])))
    assert "transformers answers" in one_line_error(argv)


def test_the_default_workload_is_the_documented_one():
    """61.6M in the released tensors, which hold an input table of the LLM that nothing reads."""
    config = generate.DEFAULT
    unread = config.vocab_size * config.hidden_size
    assert round((config.params() + unread) / 1e6, 1) == 61.6
    assert (config.embedding.num_layers, config.decoder.num_layers) == (4, 8)
    assert config.tokens_per_tile == 256 and config.dtype == "float32"
