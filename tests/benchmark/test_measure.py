"""Times by a clock that the test sets, of a step that only moves the clock."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maeast_jax.benchmark import measure
from maeast_jax.model import flops
from maeast_jax.runtime import memory, sharding
from maeast_jax.runtime.cli import NonFiniteError
from maeast_jax.training import PretrainConfig, Pretraining

BATCH = 4
FLOPS_PER_CLIP = 3 * flops.pretrain_forward(tiny.model_config(), 64)


class Clock:
    """Shows the seconds that the test has set."""

    seconds = 0.0


@pytest.fixture
def clock(monkeypatch):
    """A clock that `measure` reads and the test sets; matrix products have 1e9 FLOP/s."""
    clock = Clock()
    monkeypatch.setattr(measure, "matrix_rate", lambda mesh, dtype: 1e9)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.seconds)
    return clock


def subject(step, batches=lambda: iter(())):
    """A run whose step and batches are the test's, on two devices."""
    training = types.SimpleNamespace(
        config=types.SimpleNamespace(
            model=tiny.model_config(), num_frames=64, batch_size=BATCH, accumulation_steps=1
        ),
        mesh=sharding.make_mesh(data=2),
        initial_state=lambda: 0,
        train_batches=batches,
    )
    return measure.Subject(training, step, compile_seconds=1.0)


def endless():
    while True:
        yield "a batch"


def stepping(clock, durations, loss=1.0):
    """A subject whose steps take these seconds."""
    durations = iter(durations)

    def step(state, batch):
        clock.seconds += next(durations)
        return state + 1, {"loss": (np.float32(loss), 1)}

    return subject(step, endless)


@pytest.mark.parametrize(
    ("step_seconds", "steps_per_sample", "num_samples"),
    [(0.125, 4, 20), (1.0, 1, 10), (5.0, 1, 3)],
)
def test_samples_share_the_time_and_are_three_at_least(
    step_seconds, steps_per_sample, num_samples, clock
):
    counts = []

    def advance(count):
        counts.append(count)
        clock.seconds += count * step_seconds

    samples = measure.time_steps(advance, 10.0)
    assert len(samples) == num_samples
    np.testing.assert_allclose(samples, step_seconds)
    assert set(counts[measure.WARM_STEPS :]) == {steps_per_sample}
    assert len(counts) - len(samples) == measure.WARM_STEPS + (steps_per_sample > 1)


def test_the_length_of_a_sample_is_measured_on_warm_steps(clock):
    counts = []
    durations = iter([9.0, 5.0, 2.0, 0.25] + [0.125] * 1000)

    def advance(count):
        counts.append(count)
        clock.seconds += sum(next(durations) for _ in range(count))

    samples = measure.time_steps(advance, 10.0)
    assert counts[:5] == [1, 1, 1, 1, 2] and set(counts[5:]) == {4}
    np.testing.assert_allclose(samples, 0.125)


@pytest.fixture(scope="module")
def compiled():
    config = tiny.get_config()
    config.mesh.data, config.batch_size = 2, BATCH
    config.model.update(encoder_layers=1, unroll=True)
    config.data.update(source="synthetic", train="", eval="")
    return measure.compile_step(Pretraining(PretrainConfig.of(config)))


def test_costs_are_those_on_paper_and_those_that_xla_plans(compiled):
    config = compiled.training.config
    costs = measure.costs(compiled)
    paper = 3 * flops.pretrain_forward(config.model, 64)
    assert costs["flops_per_clip"] == paper
    assert costs["peak_memory_bytes"] == memory.planned_bytes(compiled.step)
    assert costs["compile_seconds"] == compiled.compile_seconds > 0


def test_a_row_is_the_median_of_its_samples_and_its_share_of_the_matrix_rate(clock):
    # Four warm steps, and then samples of one step each.
    durations = [7.0, 9.0, 8.0, 1.0, 4.0, 1.0, 2.0, 1.0, 3.0]
    row = measure.measure(stepping(clock, durations), 11.0)
    assert row["steps"] == len(durations) and row["samples"] == 5
    assert row["step_seconds"] == 2.0 and row["clips_per_second"] == BATCH / 2.0
    low, high = np.percentile([4.0, 1.0, 2.0, 1.0, 3.0], [10, 90])
    assert row["clips_per_second_p10"] == pytest.approx(BATCH / high)
    assert row["clips_per_second_p90"] == pytest.approx(BATCH / low)
    assert row["matrix_rate_share"] == pytest.approx(BATCH * FLOPS_PER_CLIP / 2.0 / 1e9)
    assert row["recompiles"] == 0 and row["device_peak_bytes"] is None


def test_programs_that_are_compiled_while_steps_are_timed_are_counted(clock):
    shapes = iter(range(3, 100))

    def step(state, batch):
        jax.jit(lambda x: x + 11.0)(jnp.zeros(next(shapes)))
        clock.seconds += 1.0
        return state, {"loss": (1.0, 1)}

    row = measure.measure(subject(step, endless), 1.0)
    assert row["recompiles"] >= row["steps"]


def test_programs_that_only_run_or_are_compiled_later_are_not_counted():
    x = jnp.arange(7.0)
    known = jax.jit(lambda x: x * 3.0)
    known(x)
    with measure.counting_compiles() as compiled:
        known(x)
        assert compiled == []
        jax.jit(lambda x: x * 5.0 - 1.0)(x)
        assert len(compiled) == 1
    jax.jit(lambda x: x * 7.0 - 1.0)(x)
    assert len(compiled) == 1


@pytest.mark.parametrize(("peaks", "wanted"), [([100, 300], 300), ([300, 300], None)])
def test_the_devices_own_count_is_given_if_this_row_raised_it(monkeypatch, peaks, wanted, clock):
    left = iter(peaks)
    monkeypatch.setattr(measure, "peak_bytes", lambda device: next(left))
    row = measure.measure(stepping(clock, [1.0] * 9), 1.0)
    assert row["device_peak_bytes"] == wanted


def test_a_loss_that_is_not_finite_is_an_error(clock):
    with pytest.raises(NonFiniteError, match="the loss is nan after 7 steps"):
        measure.measure(stepping(clock, [1.0] * 9, loss=np.nan), 1.0)


def test_a_step_without_room_is_an_error_of_memory(clock):
    def step(state, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")

    with pytest.raises(memory.OutOfMemoryError, match="no room"):
        measure.measure(subject(step, endless), 1.0)


def test_input_is_timed_alone_and_with_two_steps_in_flight(monkeypatch, clock):
    closed, issued, waited = [], [], []

    def batches():
        try:
            while True:
                clock.seconds += 0.5
                yield "a batch"
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

    monkeypatch.setattr(measure.jax, "block_until_ready", wait)
    rates = measure.measure_input(subject(step, batches), 3.0)
    assert rates["input_clips_per_second"] == BATCH / 0.5
    assert rates["together_clips_per_second"] == BATCH / 0.75
    assert len(closed) == 3  # alone, one batch for the first step, together
    assert [last - first for first, last in waited] == [2] * (len(issued) - 3)


def test_the_matrix_rate_is_the_best_of_the_products_of_all_devices(monkeypatch):
    monkeypatch.setattr(measure, "MATRIX_SIDES", (16, 32, 64, 128))
    # Three timings per side. The chain of 0.5 s is slow, so the side of 128 is not tried.
    seconds = iter([1.0, 0.2, 1.0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7])
    times = (time for taken in seconds for time in (10.0, 10.0 + taken))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(times))
    mesh = sharding.make_mesh(data=2)
    measure.matrix_rate.cache_clear()
    rate = measure.matrix_rate(mesh, "bfloat16")
    flops = {side: 2 * 8 * 2 * side**3 for side in (16, 32, 64)}
    assert rate == pytest.approx(max(flops[16] / 0.2, flops[32] / 0.1, flops[64] / 0.5))
    assert next(times, None) is None
    assert measure.matrix_rate(mesh, "bfloat16") == rate  # cached: the clock has run out
    measure.matrix_rate.cache_clear()


def test_memory_is_the_devices_limit_or_a_share_of_the_machines_free_memory(monkeypatch):
    def mesh_of(stats, size=4):
        device = types.SimpleNamespace(memory_stats=lambda: stats)
        return types.SimpleNamespace(devices=np.array([device] * size), size=size)

    counting = mesh_of({"bytes_limit": 123, "peak_bytes_in_use": 45})
    assert measure.memory_bytes(counting) == 123
    assert measure.peak_bytes(counting.devices[0]) == 45
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    assert measure.memory_bytes(mesh_of(None)) == 250
    assert measure.peak_bytes(jax.devices()[0]) is None
