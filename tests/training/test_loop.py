"""The loop's order of things, with steps that only count."""

import dataclasses
import itertools
import os
import signal

import jax
import jax.numpy as jnp
import pytest

from maeast_jax.runtime.cli import Interrupted, NonFiniteError
from maeast_jax.training import Evaluation, LoopConfig, MetricsWriter, loop, metrics_writer
from maeast_jax.training.loop import Pace


class Saved:
    """Stands in for the run's checkpoints: remembers, and looks at the log when it is called."""

    def __init__(self, workdir):
        self.workdir, self.steps, self.logged = workdir, [], []

    def save(self, step, parts):
        assert parts == {"step": step}
        if step not in self.steps:
            self.steps.append(step)
            rows = metrics_writer.read_metrics(self.workdir)
            self.logged.append(max([row["step"] for row in rows], default=0))

    def latest_step(self):
        return self.steps[-1] if self.steps else None

    def wait(self):
        pass

    close = wait


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counter:
    """A training state that knows its step alone."""

    step: jax.Array

    def parts(self):
        return {"step": int(self.step)}


def metrics(loss):
    one = jnp.ones(())
    return {name: (jnp.asarray(loss), one) for name in ("loss", "grad_norm", "learning_rate")}


def when(**changes):
    every = {"log_steps": 3, "eval_steps": 4, "checkpoint_steps": 5} | changes
    total = every.pop("total_steps", 10)
    return {
        "total_steps": total,
        **{name: range(0 if name == "eval_steps" else n, total, n) for name, n in every.items()},
    }


def run(
    workdir, saved, start_step=0, losses=(1.0,) * 10, during_evaluation=None, during_step=None,
    values=None, **changes,
):  # fmt: skip
    loss_of_step = iter(losses)

    def step(state, batch):
        if during_step and int(state.step) + 1 == during_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return Counter(state.step + 1), metrics(next(loss_of_step))

    def evaluate(state, asked_to_stop):
        if during_evaluation and int(state.step) == during_evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        if asked_to_stop():
            return None
        return Evaluation(state, {"loss": 0.5} if values is None else values)

    return loop.run(
        Counter(jnp.asarray(start_step)),
        step,
        (batch for batch in itertools.repeat({})),
        evaluate,
        saved,
        MetricsWriter(workdir, start_step),
        LoopConfig(start_step=start_step, batch_size=8, **when(**changes)),
    )[1]


def rows(workdir):
    return [(row["step"], row["split"]) for row in metrics_writer.read_metrics(workdir)]


def test_lines_are_on_the_disk_before_the_checkpoint_they_belong_to(tmp_path):
    saved = Saved(tmp_path)
    assert run(tmp_path, saved)["loss"] == 0.5
    assert saved.steps == [5, 10]
    assert saved.logged == [5, 10]
    assert [step for step, split in rows(tmp_path) if split == "train"] == [3, 4, 5, 6, 8, 9, 10]
    assert [step for step, split in rows(tmp_path) if split == "eval"] == [0, 4, 8, 10]


def test_a_stop_during_an_evaluation_saves_at_once_and_it_is_made_up_for(tmp_path):
    saved = Saved(tmp_path)
    with pytest.raises(Interrupted, match="SIGTERM at step 8") as stop:
        run(tmp_path, saved, during_evaluation=8)
    assert stop.value.exit_code == 143
    assert saved.steps[-1] == 8 and (8, "eval") not in rows(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run(tmp_path, saved, start_step=8)
    assert rows(tmp_path)[-4:] == [(8, "eval"), (9, "train"), (10, "train"), (10, "eval")]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_state_past_a_loss_that_is_not_finite_is_never_saved(tmp_path, bad):
    saved = Saved(tmp_path)
    losses = [1.0] * 8 + [bad] + [1.0] * 9
    with pytest.raises(NonFiniteError, match=r"at step 9 \(step 5 is saved\)"):
        run(tmp_path, saved, losses=losses, log_steps=100)
    assert saved.steps == [5]


def test_a_stop_during_the_last_evaluation_is_made_up_for(tmp_path):
    saved = Saved(tmp_path)
    with pytest.raises(Interrupted, match="SIGTERM at step 10"):
        run(tmp_path, saved, during_evaluation=10)
    assert saved.steps[-1] == 10 and (10, "eval") not in rows(tmp_path)
    assert run(tmp_path, saved, start_step=10)["loss"] == 0.5
    assert rows(tmp_path)[-1] == (10, "eval")


def test_an_evaluation_without_values_is_an_evaluation(tmp_path):
    """Of several processes only the first asks neighbours; the others have no values to show."""
    saved = Saved(tmp_path)
    saved.wait = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert run(tmp_path, saved, values={}) == {}
    assert saved.steps[-1] == 10


def test_lines_of_steps_come_before_the_word_of_saving(tmp_path, capsys):
    with pytest.raises(Interrupted, match="SIGTERM at step 5"):
        run(tmp_path, Saved(tmp_path), during_step=5)
    told = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert told[-2:] == ["step 5/10", "asked to stop: saving step 5"]


def test_rows_are_means_of_their_steps(tmp_path):
    run(tmp_path, Saved(tmp_path), losses=[float(n) for n in range(1, 11)])
    losses = {
        r["step"]: r["loss"] for r in metrics_writer.read_metrics(tmp_path) if r["split"] == "train"
    }
    assert losses == {3: 2.0, 4: 4.0, 5: 5.0, 6: 6.0, 8: 7.5, 9: 9.0, 10: 10.0}


def loop_config(batch_size, **changes):
    return LoopConfig(start_step=0, batch_size=batch_size, **when(**changes))


class Clock:
    """A clock that is set by hand."""

    seconds = 0.0

    def __call__(self):
        return self.seconds


def test_pace_is_between_two_calls():
    clock = Clock()
    pace = Pace(loop_config(batch_size=32, total_steps=1000, eval_steps=1000), clock)
    assert pace.rate(100) is None
    clock.seconds = 4.0
    assert pace.rate(110) == 80.0
    clock.seconds = 5.0
    assert pace.rate(115) == 160.0
    assert pace.rate(120) is None  # no time has passed
    clock.seconds = 6.0
    assert pace.rate(120) is None  # nor a step
    clock.seconds = 8.0
    assert pace.rate(121) == 16.0


def test_time_left_has_the_steps_and_the_evaluations_ahead():
    clock = Clock()
    pace = Pace(loop_config(batch_size=8, total_steps=100, eval_steps=30), clock)
    with pace.evaluation():  # before the clock of the steps starts
        clock.seconds = 5.0
    clock.seconds = 300.0  # compilation
    pace.rate(10)
    assert pace.seconds_left(10) is None
    clock.seconds = 320.0
    pace.rate(20)
    # 80 steps of 2 s; evaluations after steps 30, 60, 90 and 100.
    assert pace.seconds_left(20) == 80 * 2.0 + 4 * 5.0
    clock.seconds = 340.0
    pace.rate(30)
    assert pace.seconds_left(30) == 70 * 2.0 + 4 * 5.0  # the one at 30 is still to come
    with pace.evaluation():
        clock.seconds = 347.0
    clock.seconds = 367.0
    assert pace.rate(40) == 8 * 10 / 20.0  # the evaluation's 7 s are not the steps'
    assert pace.seconds_left(40) == 60 * 2.0 + 3 * 7.0
    assert pace.seconds_left(100) == 7.0
