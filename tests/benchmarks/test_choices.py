"""What is compared computes the same, and each part has a row for each of its choices."""

import itertools

import jax
import numpy as np
import pytest

from benchmarks import choices

SIZE = choices.Size(
    batch=2, tokens=64, kept=16, width=32, heads=4, optimizer_layers=2, dtype="float32"
)
PARTS = {
    part: list(rows)
    for part, rows in itertools.groupby(choices.choices(SIZE), lambda row: row.part)
}


def result(choice):
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(call(choice))]


def call(choice):
    return jax.jit(choice.call)(*choice.arguments)


def test_parts():
    assert [len(rows) for rows in PARTS.values()] == [3, 2, 2, 2, 2, 3, 2, 1, 2]


@pytest.mark.parametrize("part", [part for part in PARTS if "mask" not in part])
def test_choices_of_a_part_compute_the_same(part):
    first, *others = (result(choice) for choice in PARTS[part])
    if "attention" in part:
        # [heads, tokens] to the others' [tokens, heads].
        first[0] = first[0].swapaxes(1, 2)
    if "AdamW" in part:
        # One vector has one state: what comes out of the step is what is compared.
        first, *others = (values[:4] for values in (first, *others))
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            # A layer norm's gradient for its own result is what is left of terms that cancel.
            np.testing.assert_allclose(ours.ravel(), theirs.ravel(), rtol=1e-4, atol=1e-5)


def test_dropout_masks_drop_a_tenth():
    (rows,) = (rows for part, rows in PARTS.items() if "dropout's" in part)
    for choice in rows:
        assert abs(np.mean(call(choice)) - 0.9) < 0.01


def test_calls_are_queued_and_waited_for_once_a_sample(monkeypatch):
    """By a clock that each call moves on by 4 ms, in samples of a tenth of the time."""
    now, calls, waits = [0.0], [], []

    def call():
        now[0] += 0.004
        calls.append(len(waits))

    monkeypatch.setattr(choices.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(choices.jax, "jit", lambda call: call)
    monkeypatch.setattr(choices.jax, "block_until_ready", waits.append)
    choice = choices.Choice("part", "name", call, ())
    assert choices.seconds_a_call(choice, 0.4) == pytest.approx(0.004)
    a_sample = [len(list(group)) for _, group in itertools.groupby(calls)]
    assert a_sample == [2, 1] + [10] * 10


def test_a_choice_that_fails_is_a_row_that_says_so():
    def fail():
        raise NotImplementedError("no cudnn | here\nand more")

    told = choices.row(choices.Choice("attention", "cudnn", fail, ()), 0.01)
    assert told == "| attention | cudnn | failed: NotImplementedError: no cudnn / here |"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.1451, "145 ms"), (0.0016, "1.60 ms"), (0.000999, "999 µs"), (2.5e-6, "2.50 µs")],
)
def test_durations_have_three_digits(seconds, text):
    assert choices._duration(seconds) == text


def test_table(capsys, monkeypatch):
    monkeypatch.setattr(choices, "choices", lambda size: PARTS["a batch of masks"])
    choices.main(["--seconds=0.01", "--dtype=float32", "--batch=2"])
    device, _, *table = capsys.readouterr().out.splitlines()
    assert device.endswith("batch 2, float32") and len(table) == 3
    assert table[2].startswith("| a batch of masks | by sorting | ")
