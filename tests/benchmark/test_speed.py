"""Times by a clock that the test winds, of a tiny model's real step."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maeast_jax.benchmark import devices, measure
from maeast_jax.model import flops
from maeast_jax.runtime import memory
from maeast_jax.runtime.cli import NonFiniteError
from maeast_jax.training import pretraining


class Clock:
    """Stands until it is wound."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def tiny_config():
    config = tiny.get_config()
    config.total_steps, config.mesh.data = 1000, 2
    config.model.unroll = True
    config.data.update(source="synthetic", train="", eval="")
    return config


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return measure.compile_step(
        pretraining.check_run(tiny_config(), tmp_path_factory.mktemp("run"))
    )


@pytest.mark.parametrize(
    ("step_seconds", "steps_a_sample", "num_samples"),
    [(0.125, 4, 20), (0.001, 500, 20), (1.0, 1, 10), (5.0, 1, 3)],
)
def test_samples_share_the_time_and_are_three_at_least(step_seconds, steps_a_sample, num_samples):
    clock, counts = Clock(), []

    def advance(count):
        counts.append(count)
        clock.seconds += count * step_seconds

    samples = measure.time_steps(advance, 10.0, clock)
    assert abs(len(samples) - num_samples) <= 1  # the clock's own rounding
    np.testing.assert_allclose(samples, step_seconds)
    assert set(counts[measure.WARM_STEPS :]) == {steps_a_sample}
    assert len(counts) - len(samples) == measure.WARM_STEPS + (steps_a_sample > 1)


def test_a_sample_is_as_long_as_steps_are_once_they_are_warm():
    clock, counts = Clock(), []
    durations = iter([9.0, 5.0, 2.0, 0.25] + [0.125] * 1000)

    def advance(count):
        counts.append(count)
        clock.seconds += sum(next(durations) for _ in range(count))

    samples = measure.time_steps(advance, 10.0, clock)
    assert counts[:5] == [1, 1, 1, 1, 2] and set(counts[5:]) == {4}
    np.testing.assert_allclose(samples, 0.125)


def test_costs_are_those_on_paper_and_xlas_own(subject):
    costs = measure.costs(subject)
    paper = 3 * flops.pretrain_forward(subject.checked.model, 64)
    assert costs["flops_per_clip"] == paper
    assert costs["peak_memory_bytes"] == memory.planned_bytes(subject.step)
    # The program of one of two devices, for two of four clips.
    per_device = subject.step.cost_analysis()["flops"]
    assert costs["xla_flops_per_clip"] == round(per_device / 2) > paper
    looped = subject.checked.config.copy_and_resolve_references()
    looped.model.unroll = False
    checked = dataclasses.replace(subject.checked, config=looped)
    assert (
        measure.costs(dataclasses.replace(subject, checked=checked))["xla_flops_per_clip"] is None
    )


def test_operations_that_a_backend_does_not_count_are_none(subject):
    def refuse():
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no cost analysis")

    for analysis in (lambda: None, dict, lambda: {"bytes accessed": 1.0}, refuse):
        step = types.SimpleNamespace(
            cost_analysis=analysis, memory_analysis=subject.step.memory_analysis
        )
        costs = measure.costs(dataclasses.replace(subject, step=step))
        assert costs["xla_flops_per_clip"] is None and costs["flops_per_clip"] > 0


def test_a_row_is_the_median_of_its_samples_and_its_share_of_the_matrix_rate(subject, monkeypatch):
    monkeypatch.setattr(devices, "matrix_rate", lambda mesh, dtype: 1e9)
    clock = Clock()
    # Four steps that do not count, then samples of a step each.
    durations = [7.0, 9.0, 8.0, 1.0, 4.0, 1.0, 2.0, 1.0, 3.0]
    step = winding(subject.step, clock, durations)
    row = measure.measure(dataclasses.replace(subject, step=step), 11.0, clock)
    assert row["steps"] == len(durations) and row["samples"] == 5
    assert row["step_seconds"] == 2.0 and row["clips_per_second"] == 4 / 2.0
    low, high = np.percentile([4.0, 1.0, 2.0, 1.0, 3.0], [10, 90])
    assert row["clips_per_second_p10"] == pytest.approx(4 / high)
    assert row["clips_per_second_p90"] == pytest.approx(4 / low)
    work = 4 * 3 * flops.pretrain_forward(subject.checked.model, 64)
    assert row["matrix_rate_share"] == pytest.approx(work / 2.0 / 1e9)
    assert row["recompiles"] == 0 and row["device_peak_bytes"] is None


def winding(step, clock, durations):
    durations = iter(durations)

    def wound(state, batch):
        clock.seconds += next(durations)
        return step(state, batch)

    return wound


def test_what_is_compiled_while_steps_are_timed_is_counted(subject, monkeypatch):
    monkeypatch.setattr(devices, "matrix_rate", lambda mesh, dtype: 1e9)
    clock, shapes = Clock(), iter(range(3, 100))

    def step(state, batch):
        jax.jit(lambda x: x + 11.0)(jnp.zeros(next(shapes)))
        clock.seconds += 1.0
        return subject.step(state, batch)

    row = measure.measure(dataclasses.replace(subject, step=step), 1.0, clock)
    assert row["recompiles"] >= row["steps"]


def test_the_devices_own_peak_counts_where_this_row_raised_it(subject, monkeypatch):
    monkeypatch.setattr(devices, "matrix_rate", lambda mesh, dtype: 1e9)
    for peaks, wanted in (([100, 300], 300), ([300, 300], None)):
        left = iter(peaks)
        monkeypatch.setattr(devices, "peak_bytes", lambda device, left=left: next(left))
        clock = Clock()
        step = winding(subject.step, clock, [1.0] * 9)
        row = measure.measure(dataclasses.replace(subject, step=step), 1.0, clock)
        assert row["device_peak_bytes"] == wanted


def test_a_loss_that_is_not_finite_is_no_speed(subject, monkeypatch):
    monkeypatch.setattr(devices, "matrix_rate", lambda mesh, dtype: 1e9)
    clock = Clock()

    def step(state, batch):
        clock.seconds += 1.0
        return state, {"loss": (jnp.asarray(np.nan), jnp.ones(()))}

    with pytest.raises(NonFiniteError, match="the loss is nan after 7 steps"):
        measure.measure(dataclasses.replace(subject, step=step), 1.0, clock)


def test_input_is_timed_alone_and_with_steps_of_which_two_are_in_flight(subject, monkeypatch):
    clock, closed, issued, waited = Clock(), [], [], []
    batch = {"audio": np.zeros((4, 10_480), np.int16)}

    def stream(checked):
        try:
            while True:
                clock.seconds += 0.5
                yield batch
        finally:
            closed.append(True)

    def step(state, batch):
        clock.seconds += 0.25
        issued.append(len(issued))
        return state, {"loss": issued[-1]}

    block = jax.block_until_ready

    def wait(values):
        if isinstance(values, dict):
            waited.append((values["loss"], issued[-1]))
        return block(values)

    monkeypatch.setattr(pretraining, "train_stream", stream)
    monkeypatch.setattr(measure.jax, "block_until_ready", wait)
    rates = measure.measure_input(dataclasses.replace(subject, step=step), 3.0, clock)
    assert rates["input_clips_per_second"] == 4 / 0.5
    assert rates["together_clips_per_second"] == 4 / 0.75
    assert len(closed) == 3  # alone, one batch for the first step, together
    assert [last - first for first, last in waited] == [2] * (len(issued) - 3)


def test_no_room_for_a_step_is_said_as_such(subject):
    def step(state, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")

    with pytest.raises(memory.OutOfMemoryError, match="no room"):
        measure.measure(dataclasses.replace(subject, step=step), 1.0, Clock())
