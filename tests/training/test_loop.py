"""The loop's order of things, with steps that only count."""

import itertools
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from maeast_jax import config as configuration
from maeast_jax.runtime.cli import Interrupted, NonFiniteError
from maeast_jax.training import metrics_writer
from maeast_jax.training.loop import Loop
from maeast_jax.training.steps import TrainState


class Saved:
    """Stands in for the run's checkpoints: remembers, and looks at the log when it is called."""

    def __init__(self, workdir):
        self.workdir, self.steps, self.logged = workdir, [], []

    def save(self, step, parts):
        assert int(parts["progress"]["step"]) == step
        if step not in self.steps:
            self.steps.append(step)
            rows = metrics_writer.read_metrics(self.workdir)
            self.logged.append(max([row["step"] for row in rows], default=0))

    def latest_step(self):
        return self.steps[-1] if self.steps else None

    def wait(self):
        pass

    close = wait


def metrics(loss):
    one = jnp.ones(())
    names = ("loss", "mse", "info_nce", "grad_norm", "learning_rate")
    return {name: (jnp.asarray(loss), one) for name in names}


def run(
    workdir, saved, start_step=0, losses=(1.0,) * 10, during_evaluation=None, during_step=None,
    eval_batches=True, knn=None, **fields,
):  # fmt: skip
    config = configuration.pretrain()
    config.update(
        {"total_steps": 10, "log_every": 3, "eval_every": 4, "checkpoint_every": 5} | fields
    )
    config.eval.pictures = 0
    loss_of_step = iter(losses)

    def step(state, batch):
        if during_step and int(state.step) + 1 == during_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return TrainState(state.step + 1, {}, {}, {}), metrics(next(loss_of_step))

    def evaluate(state, batch, index):
        if during_evaluation and int(state.step) == during_evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics(0.5)

    held_out = {"mask": np.ones(1, bool)}
    return Loop(
        config=config,
        workdir=workdir,
        start_step=start_step,
        checkpoints=saved,
        step=step,
        eval_step=evaluate,
        reconstruct=None,
        calibrate=None,
        put=lambda batch: batch,
        put_eval=lambda batch: batch,
        eval_batches=(lambda: iter([held_out, held_out])) if eval_batches else None,
        knn=knn,
    ).run(TrainState(jnp.asarray(start_step), {}, {}, {}), itertools.repeat({}))


def rows(workdir):
    return [(row["step"], row["split"]) for row in metrics_writer.read_metrics(workdir)]


def test_lines_are_on_the_disk_before_the_checkpoint_they_belong_to(tmp_path):
    saved = Saved(tmp_path)
    assert run(tmp_path, saved)["loss"] == 0.5
    assert saved.steps == [5, 10]
    assert saved.logged == [5, 10]
    assert [step for step, split in rows(tmp_path) if split == "train"] == [3, 5, 6, 9, 10]
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
        run(tmp_path, saved, losses=losses, log_every=100)
    assert saved.steps == [5]


def test_a_stop_during_the_last_evaluation_is_made_up_for(tmp_path):
    saved = Saved(tmp_path)
    with pytest.raises(Interrupted, match="SIGTERM at step 10"):
        run(tmp_path, saved, during_evaluation=10)
    assert saved.steps[-1] == 10 and (10, "eval") not in rows(tmp_path)
    assert run(tmp_path, saved, start_step=10)["loss"] == 0.5
    assert rows(tmp_path)[-1] == (10, "eval")


def test_what_is_evaluated_in_another_process_is_evaluated(tmp_path):
    """Of several processes the first alone asks neighbours: the others have nothing to show."""
    saved = Saved(tmp_path)
    saved.wait = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert run(tmp_path, saved, eval_batches=False, knn=lambda state: {}) == {}
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
    assert losses == {3: 2.0, 5: 4.5, 6: 6.0, 9: 8.0, 10: 10.0}
