"""The choices of a part compute the same, and each of them has a row."""

import itertools

import jax
import numpy as np
import pytest

from benchmarks import choices

SIZE = choices.Size(
    batch=2, tokens=64, kept=16, width=32, heads=4, optimizer_layers=2, dtype="float32"
)


@pytest.fixture(scope="module")
def parts():
    """{part: its choices}."""
    rows = choices.choices(SIZE)
    return {part: list(group) for part, group in itertools.groupby(rows, lambda row: row.part)}


def result(choice):
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(call(choice))]


def call(choice):
    return jax.jit(choice.call)(*choice.arguments)


def test_every_choice_has_a_row(parts):
    assert [len(rows) for rows in parts.values()] == [3, 2, 2, 2, 2, 3, 2, 1, 2]


def test_choices_of_a_part_compute_the_same(parts):
    for part, rows in parts.items():
        if "mask" in part:
            continue  # random
        first, *others = (result(choice) for choice in rows)
        if "attention" in part:
            # [heads, tokens] to the others' [tokens, heads].
            first[0] = first[0].swapaxes(1, 2)
        if "AdamW" in part:
            # One vector has one state, so only the new parameters are compared.
            first, *others = (values[:4] for values in (first, *others))
        for other in others:
            for ours, theirs in zip(first, other, strict=True):
                # The terms of a layer norm's gradient for its own result nearly cancel.
                np.testing.assert_allclose(
                    ours.ravel(), theirs.ravel(), rtol=1e-4, atol=1e-5, err_msg=part
                )


def test_dropout_masks_drop_a_tenth(parts):
    (rows,) = (rows for part, rows in parts.items() if "dropout's" in part)
    for choice in rows:
        assert abs(np.mean(call(choice)) - 0.9) < 0.01


def test_calls_are_queued_and_waited_for_once_per_sample(monkeypatch):
    """Each call moves the clock by 4 ms; a sample takes a tenth of the time."""
    now, calls, waits = [0.0], [], []

    def call():
        now[0] += 0.004
        calls.append(len(waits))

    monkeypatch.setattr(choices.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(choices.jax, "jit", lambda call: call)
    monkeypatch.setattr(choices.jax, "block_until_ready", waits.append)
    choice = choices.Choice("part", "name", call, ())
    assert choices.seconds_per_call(choice, 0.4) == pytest.approx(0.004)
    a_sample = [len(list(group)) for _, group in itertools.groupby(calls)]
    assert a_sample == [2, 1] + [10] * 10


def test_a_choice_that_fails_is_a_row_with_its_error():
    def fail():
        raise NotImplementedError("no cudnn | here\nand more")

    told = choices.row(choices.Choice("attention", "cudnn", fail, ()), 0.01)
    assert told == "| attention | cudnn | failed: NotImplementedError: no cudnn / here |"


def test_durations_have_three_digits():
    assert choices._duration(0.1451) == "145 ms" and choices._duration(0.0016) == "1.60 ms"
    assert choices._duration(0.000999) == "999 µs"


def test_table(capsys, monkeypatch, parts):
    monkeypatch.setattr(choices, "choices", lambda size: parts["a batch of masks"])
    choices.main(["--seconds=0.01", "--dtype=float32", "--batch=2"])
    device, _, *table = capsys.readouterr().out.splitlines()
    assert device.endswith("batch 2, float32") and len(table) == 3
    assert table[2].startswith("| a batch of masks | by sorting | ")
