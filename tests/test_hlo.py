"""The estimator on a hand-made scheduled program, in the compiler's own spelling.

The expected figures are worked out by hand below.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hovle_jax.errors import UserError
from hovle_jax.tpu import chips, hlo
from hovle_jax.tpu.cost import collective_seconds, price

# Three trips of a loop that multiplies [64, 128] x [128, 256], with an all-gather inside a fusion,
# a blocking all-reduce and a reduce-scatter spelled as a fusion; an attention kernel each way.
TEXT = (Path(__file__).parent / "golden" / "scheduled.hlo").read_text()
V5E = chips.CHIPS["v5e"]
WEIGHT = 128 * 256 * 2  # bytes


@pytest.fixture(scope="module")
def cost():
    return price(hlo.parse(TEXT), V5E, 16)


def test_cycles_count_every_trip(cost):
    assert cost.matrix_seconds == pytest.approx(3 * 1000 / 1.5e9)
    assert cost.vector_seconds == pytest.approx((3 * 200 + 500) / 1.5e9)
    assert cost.matrix_flops == 3 * 2 * 64 * 128 * 256


def test_kernels_are_priced_by_their_shapes(cost):
    forward = 4 * (4 * 512 * 128) * 512 / 2  # two products, half of all pairs
    assert [k.flops for k in cost.kernels] == [forward, 2.5 * forward]
    assert cost.kernel_seconds == pytest.approx(3.5 * forward / (0.5 * 197e12))
    whole = cost.matrix_seconds + cost.vector_seconds + cost.kernel_seconds
    assert cost.step_seconds == pytest.approx(whole)


@pytest.mark.parametrize("stated", [0, 10**12])
def test_full_attention_counts_every_pair_and_what_it_pads(stated):
    text = TEXT.replace(
        "  %fusion.3 =",
        "  %tile_mha_fwd.1 = bf16[4,512,128]{2,1,0} custom-call(%q, %q, %q), "
        'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":'
        f'{{"cost_estimate":{{"flops":"{stated}"}}}}}}\n  %fusion.3 =',
    )
    kernels = price(hlo.parse(text), V5E, 16).kernels
    assert [k.flops for k in kernels[:2]] == [4 * (4 * 512 * 128) * 512 * x / 2 for x in (1, 2.5)]
    assert kernels[2].flops == max(stated, 4 * (4 * 512 * 128) * 512)


def test_collectives(cost):
    found = {c.kind: c for c in cost.collectives}
    assert set(found) == {"all-gather", "all-reduce", "reduce-scatter"}
    assert {c.group for c in cost.collectives} == {16}
    assert all(c.bytes == WEIGHT for c in cost.collectives)
    assert {k: c.times for k, c in found.items()} == {
        "all-gather": 3,
        "all-reduce": 3,
        "reduce-scatter": 1,
    }
    assert found["all-reduce"].source == "/src/losses.py:12"
    # 16 chips of a 4 x 4 grid that does not wrap: one direction on each of two axes.
    once = 15 / 16 * WEIGHT / (2 * 4.5e10)
    assert found["all-gather"].seconds == pytest.approx(3 * once)
    assert found["all-reduce"].seconds == pytest.approx(3 * 2 * once)
    beside = 3 * 200 / 1.5e9  # the fusion that carries the all-gather
    assert found["all-gather"].exposed == pytest.approx(3 * once - beside)
    assert cost.exposed_seconds == pytest.approx(10 * once - beside)
    assert cost.hidden_seconds == pytest.approx(beside)


@pytest.mark.parametrize(("size", "wraps"), [(4, False), (16, True)])
@pytest.mark.parametrize("axes", [1, 2])
def test_all_to_all_by_the_busiest_link(size, wraps, axes):
    """Every byte takes the shortest way along one axis after the other; W bytes/s a link."""
    group = size**axes
    links = [0.0] * size  # to the right from each place of one line of chips, in pieces
    for start in range(size):
        for end in range(size):
            ahead = (end - start) % size
            if wraps and 2 * ahead == size:
                way, share = range(start, start + ahead), 0.5  # as many go the other way
            elif (wraps and 2 * ahead < size) or (not wraps and start < end):
                way, share = range(start, start + ahead), 1.0
            else:
                continue
            for link in way:
                links[link % size] += share * size ** (axes - 1)
    # A line carries what its chips send along it: to every place of the other axis, too.
    expected = max(links) * 1e6 / group / V5E.ici_bandwidth
    devices = 256 if wraps else group  # closes into rings of 16
    found = collective_seconds("all-to-all", 1e6, group, V5E, devices)
    assert found == pytest.approx(expected)


def test_loops_start_and_step_as_they_like():
    program = hlo.parse(TEXT.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)"))
    assert price(program, V5E, 16).matrix_flops == 2 * 2 * 64 * 128 * 256


def test_slices_that_close_into_rings():
    assert chips.wraps(V5E, (4, 4)) == (False, False, False)
    assert chips.wraps(V5E, (16, 16)) == (True, True, False)
    assert chips.wraps(chips.CHIPS["v5p"], (4, 4, 8)) == (True, True, True)
    assert chips.wraps(chips.CHIPS["v5p"], (2, 2, 4)) == (False, False, False)


def test_every_option_has_a_reason():
    for options in chips.OPTIONS.values():
        assert all(option.reason for option in options)
    assert set(chips.OPTIONS) == set(chips.CHIPS)
    assert chips.compiler_options("TPU v5 lite")["xla_enable_async_all_reduce"] == "true"
    assert chips.compiler_options("cpu") == {}


def test_unknown_chip():
    with pytest.raises(UserError, match="chip 'v9' is not one of v4, v5e"):
        chips.get_chip("v9")


@pytest.mark.parametrize(
    ("chip", "num_chips", "hosts"),
    [("v5e", 1, 1), ("v5e", 8, 1), ("v5e", 16, 4), ("v5p", 4, 1), ("v5p", 8, 2), ("tpu7x", 64, 16)],
)
def test_hosts_of_a_slice(chip, num_chips, hosts):
    """As launch/slice.sh has it."""
    assert chips.num_hosts(chips.get_chip(chip), num_chips) == hosts


@pytest.mark.parametrize(("words", "hidden"), [(1000, True), (4000, False)])
def test_reductions_between_slices(words, hidden):
    """In the loop's body, over its 1,200 cycles: 0.8 microseconds are 2,500 bytes."""
    attributes = (
        "channel_id=9, is_host_transfer=true, frontend_attributes={"
        '_xla_host_transfer_rendezvous="sum_0",_xla_megascale_target="{1,2}x{0:15}",'
        '_xla_host_transfer_handler_name="xla_megascale_runtime"}'
    )
    shape = f"(bf16[{words}]{{0}}, u32[], token[])"
    text = TEXT.replace(
        "  %fusion.1 =", f"  %send.1 = {shape} send(%k), {attributes}\n  %fusion.1 ="
    )
    text = text.replace(
        "  %all-reduce.1 =",
        f"  %recv.1 = {shape} recv(%after), {attributes}\n"
        f"  %recv-done.1 = (bf16[{words}]{{0}}, token[]) recv-done(%recv.1), channel_id=9\n"
        "  %all-reduce.1 =",
    )
    found = price(hlo.parse(text), V5E, 16).collectives
    (network,) = (c for c in found if c.kind == "network reduction")
    assert (network.group, network.times, network.bytes) == (2, 3, 2 * words)
    assert network.seconds == pytest.approx(3 * 2 * words / 3.125e9)
    exposed = 3 * max(0.0, 2 * words / 3.125e9 - 1200 / 1.5e9)
    assert network.exposed == pytest.approx(exposed)
    assert (exposed == 0) == hidden


def test_reductions_of_one_channel_all_count():
    """Those of a shard_map share a channel; with several slices none says where it is from."""

    def reductions(*origins: str) -> float:
        start = TEXT.index("  %all-reduce.1 =")
        line = TEXT[start : TEXT.index("\n", start) + 1]
        assert line.count("op_name=") == line.count("channel_id=") == 1
        text = TEXT
        for i, origin in enumerate(origins):
            more = line.replace("all-reduce.1 =", f"all-reduce.1{i} =")
            text = text.replace(line, re.sub('op_name="[^"]*"', f'op_name="{origin}"', more) + line)
        found = price(hlo.parse(text), V5E, 16).collectives
        return sum(c.seconds for c in found if c.kind == "all-reduce")

    assert reductions("a", "b") == pytest.approx(3 * reductions())
    assert reductions("", "") == pytest.approx(3 * reductions())


def test_what_starts_and_is_awaited_at_once_is_not_hidden():
    """An asynchronous name, or a start, is no overlap: only computation in between is."""
    groups = "replica_groups=[1,16]<=[16]"
    start = f"(bf16[128,256]{{1,0}}) all-gather-start(%k), channel_id=11, {groups}"
    done = "bf16[128,256]{1,0} all-gather-done(%all-gather-start.1)"
    begin, end = f"  %all-gather-start.1 = {start}\n", f"  %all-gather-done.1 = {done}\n"

    def exposed(text: str) -> float:
        found = price(hlo.parse(text), V5E, 16).collectives
        return next(c.exposed for c in found if c.name == "all-gather-start.1")

    once = 15 / 16 * WEIGHT / (2 * 4.5e10)
    at_once = TEXT.replace("  %fusion.1 =", begin + end + "  %fusion.1 =")
    assert exposed(at_once) == pytest.approx(3 * once)
    later = TEXT.replace("  %fusion.1 =", begin + "  %fusion.1 =")
    later = later.replace("  %all-reduce.1 =", end + "  %all-reduce.1 =")
    assert exposed(later) == pytest.approx(3 * max(0.0, once - 1200 / 1.5e9), abs=1e-12)
    named = TEXT.replace(
        "to_apply=%add, metadata", 'to_apply=%add, async_collective_name="x", metadata'
    )
    assert named != TEXT
    unnamed = price(hlo.parse(TEXT), V5E, 16).exposed_seconds
    assert price(hlo.parse(named), V5E, 16).exposed_seconds == unnamed


@pytest.mark.parametrize("cycles", [400, 1100])
def test_what_fusions_carry_is_hidden_as_far_as_they_compute(cycles):
    """Between the fusion that starts it and the one that waits for it, both of which do nothing."""
    start = TEXT.index("%async_collective_fusion.1")
    body = TEXT[start : TEXT.index("\n}\n", start) + 3]
    bodies = [body.replace("fusion.1 ", f"fusion.{i} ", 1) for i in (2, 3, 4)]
    bodies = [re.sub(r"%all-gather\.1", f"%all-gather.{i}", b) for i, b in enumerate(bodies, 2)]
    (line,) = (x for x in TEXT.splitlines() if "fusion.2 =" in x)
    lines = [
        line.replace("fusion.2 =", f"carrying.{i} =")
        .replace("fusion.1,", f"fusion.{i + 1},")
        .replace('"200"', f'"{n}"')
        for i, n in enumerate((0, cycles, 0), 1)
    ]
    text = TEXT.replace(body, "\n".join(bodies)).replace(line, "\n".join(lines))
    (gather,) = (c for c in price(hlo.parse(text), V5E, 16).collectives if c.kind == "all-gather")
    once = 15 / 16 * WEIGHT / (2 * 4.5e10)
    assert gather.seconds == pytest.approx(3 * once)
    assert gather.exposed == pytest.approx(3 * max(0.0, once - cycles / 1.5e9), abs=1e-15)
    assert (gather.exposed == 0) == (cycles == 1100)
