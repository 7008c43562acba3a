"""Processes that work in turn: their order, the times of their turns, and their failures."""

import os
import threading
import time

import numpy as np
import pytest

from benchmarks import beside


def writer(path, letter):
    def run(count):
        with path.open("a") as file:
            file.write(letter * count)

    return beside.Work(run, {"letter": letter})


def sleeper(seconds, spins=False, device_bytes=None):
    if spins:
        threading.Thread(target=spin, daemon=True).start()
    return beside.Work(lambda count: time.sleep(count * seconds), {}, lambda: device_bytes)


def spin():
    while True:
        pass


def cores():
    return beside.Work(lambda count: None, {"cores": os.sched_getaffinity(0)})


def variables():
    return beside.Work(lambda count: None, {name: os.environ.get(name) for name in ("A", "B")})


def broken():
    raise ValueError("no such thing")


def killed():
    os._exit(3)


def test_sides_work_in_turn(tmp_path):
    sides = []
    with beside.ending(sides):
        for letter in "ab":
            settings = {"path": tmp_path / "log", "letter": letter}
            sides.append(beside.Side(letter, writer, settings))
        beside.take_turns(sides, rounds=2, count=3)
        assert [side.facts["letter"] for side in sides] == ["a", "b"]
    assert (tmp_path / "log").read_text() == "aaabbbaaabbb"
    assert [len(side.turns) for side in sides] == [2, 2]


@pytest.mark.slow
def test_a_turn_lasts_as_long_as_its_work_and_a_busy_waiting_side_is_seen():
    sides = []
    with beside.ending(sides):
        for spins in (False, True):
            sides.append(beside.Side("sleeper", sleeper, {"seconds": 0.1, "spins": spins}))
        beside.take_turns(sides, rounds=2, count=3)
    quiet, busy = sides
    assert all(0.3 <= turn.seconds < 3 for side in sides for turn in side.turns)
    np.testing.assert_allclose(
        beside.rates(quiet, 3), [3 / turn.seconds for turn in quiet.turns], rtol=1e-12
    )
    assert quiet.waiting_load < 0.1 < busy.waiting_load


@pytest.mark.slow
def test_memory_is_the_accelerators_if_there_is_one():
    sides = []
    with beside.ending(sides):
        for device_bytes in (None, 123):
            settings = {"seconds": 0, "device_bytes": device_bytes}
            sides.append(beside.Side("sleeper", sleeper, settings))
        on_cpu, on_device = (side.close() for side in sides)
    assert on_device == 123
    assert 1e7 < on_cpu < 1e10


@pytest.mark.slow
def test_a_side_has_the_cores_it_is_given():
    core = min(os.sched_getaffinity(0))
    side = beside.Side("cores", cores, {}, [core])
    side.close()
    assert side.facts == {"cores": {core}}


@pytest.mark.slow
def test_an_error_names_the_side_and_holds_its_error():
    with pytest.raises(beside.SideError, match=r"(?s)^theirs: .*ValueError: no such thing"):
        beside.Side("theirs", broken, {})
    with pytest.raises(beside.SideError, match=r"^theirs: its process ended with 3$"):
        beside.Side("theirs", killed, {})


def test_spread_is_median_and_tenths():
    assert beside.spread(np.arange(11.0)) == (5.0, 1.0, 9.0)


@pytest.mark.slow
def test_a_sides_environment_is_its_own(monkeypatch):
    monkeypatch.setenv("B", "before")
    monkeypatch.delenv("A", raising=False)
    sides = []
    with beside.ending(sides):
        for environment in ({"A": "1", "B": "2"}, None):
            sides.append(beside.Side("side", variables, {}, environment=environment))
        assert [side.facts for side in sides] == [{"A": "1", "B": "2"}, {"A": None, "B": "before"}]
    assert "A" not in os.environ and os.environ["B"] == "before"
