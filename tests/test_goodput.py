"""Where wall time went: the file, its arithmetic, and what a real run writes into it."""

from __future__ import annotations

import json

import pytest

from hovle_jax.run.goodput import PHASES, Clock, GoodputLog, goodput, split_time
from hovle_jax.run.metrics import read_metrics


class Hands:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time

    def pass_by(self, seconds: float) -> None:
        self.time += seconds


def simulate(path, hands: Hands, restored: int, steps: range, saves: set[int]) -> None:
    """A start of a run as train.py accounts for it: a step takes 4 s and waits 1 s for data, a
    save 3 s, initialising 10 s, compiling 20 s, an evaluation (of step 6) 2 s. No orderly end."""
    clock, log = Clock(hands), GoodputLog(path, hands)
    log.write(start=True)
    hands.pass_by(10)
    with clock.phase("compile"):
        hands.pass_by(20)
    clock.enter("step")
    log.write(restored=restored, seconds=clock.lap())
    for step in steps:
        with clock.phase("data"):
            hands.pass_by(1.5)
        clock.move(0.5, "data", "step")  # the devices were still at work in half a second of it
        hands.pass_by(3.5)
        log.write(step=step, seconds=clock.lap())
        if step == 6:
            with clock.phase("evaluation"):
                hands.pass_by(2)
            log.write(step=step, seconds=clock.lap())
        if step in saves:
            with clock.phase("checkpoint"):
                hands.pass_by(3)
            log.write(seconds=clock.lap())
    log.close()


def test_goodput_of_a_run_with_two_restarts_is_what_a_pencil_says(tmp_path):
    path, hands = tmp_path / "goodput.jsonl", Hands()
    simulate(path, hands, 0, range(1, 7), {4})  # killed 2 s into step 7; steps 5 and 6 are lost
    hands.pass_by(2 + 58)
    simulate(path, hands, 4, range(5, 8), set())  # killed at once after step 7: 5, 6, 7 are lost
    path.open("a").write('{"time": 12')  # in the middle of a row
    hands.pass_by(40)
    simulate(path, hands, 4, range(5, 11), {8, 10})
    seconds = split_time(read_metrics(path))
    assert seconds == pytest.approx(
        {
            "step": 10 * 4,
            "data": 10 * 1,
            "checkpoint": 3 * 3,  # also the one whose step was followed by lost ones
            "evaluation": 2,  # the one that counts
            "init": 3 * 10,
            "compile": 3 * 20,
            "lost": 2 * 5 + 2 + 3 * 5 + 2,
            "down": 60 + 40,
        }
    )
    assert tuple(seconds) == PHASES
    assert sum(seconds.values()) == pytest.approx(hands.time - 1000), "no second is lost or double"
    assert goodput(seconds) == pytest.approx(40 / 280)


def test_a_start_that_ends_before_its_first_step_costs_time_and_no_steps(tmp_path):
    path, hands = tmp_path / "goodput.jsonl", Hands()
    simulate(path, hands, 0, range(1, 3), {2})
    log = GoodputLog(path, hands)
    log.write(start=True)
    log.close()
    hands.pass_by(25)
    simulate(path, hands, 2, range(3, 4), set())
    seconds = split_time(read_metrics(path))
    assert (seconds["step"], seconds["lost"], seconds["down"]) == (12, 0, 25)


def test_a_row_that_a_kill_cut_short_spoils_no_other(tmp_path):
    path = tmp_path / "goodput.jsonl"
    path.write_text(json.dumps({"time": 1.0, "start": True}) + '\n{"time": 2.0, "sec')
    log = GoodputLog(path, lambda: 3.0)
    log.write(start=True)
    log.close()
    assert [row["time"] for row in read_metrics(path)] == [1.0, 3.0]
    assert goodput(split_time(read_metrics(tmp_path / "none.jsonl"))) == 0
