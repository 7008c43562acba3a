"""Whole runs: kill and resume, signals, refusals, and what they leave behind."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from recordings import clips_of_noise

from maeast_jax import checkpoint
from maeast_jax.data import writer
from maeast_jax.runtime.cli import Interrupted, NonFiniteError
from maeast_jax.train import train
from maeast_jax.training import PretrainConfig, Pretraining, metrics_writer, summary

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A data set `sounds` of noise of several lengths: 11 clips to train on, 5 held out."""
    folder = tmp_path_factory.mktemp("data")
    parts = {"train": lambda: clips_of_noise(11, 0), "valid": lambda: clips_of_noise(5, 1)}
    writer.write("sounds", folder, parts)
    return folder


def command(workdir, data_dir, *overrides):
    return [
        sys.executable, "-m", "maeast_jax.train", f"--config=tests/tiny.py:{data_dir}",
        f"--workdir={workdir}", *overrides,
    ]  # fmt: skip


def environment():
    """One CPU device, as a user has; two runs compare bit for bit on the same number."""
    return os.environ | {"JAX_PLATFORMS": "cpu"}


def run(workdir, data_dir, *overrides):
    return subprocess.run(
        command(workdir, data_dir, *overrides),
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip


def run_until(workdir, data_dir, step, signal_number):
    """Starts a run, sends the signal as soon as it reports `step`, returns its exit code."""
    with subprocess.Popen(
        command(workdir, data_dir),
        cwd=ROOT, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        reported = any(line.startswith(f"step {step}/") for line in process.stderr)
        assert reported, f"the run ended before step {step}"
        process.send_signal(signal_number)
        process.stderr.read()
        return process.wait()


def weights(workdir):
    folder = checkpoint.find(workdir)
    assert folder.name == "40"
    return jax.tree.leaves_with_path(
        [checkpoint.load_part(folder, name) for name in ("weights", "progress")]
    )


def timeless_rows(workdir):
    return [
        {key: value for key, value in row.items() if key != "clips_per_second"}
        for row in metrics_writer.read_metrics(workdir)
    ]


def test_killed_and_stopped_runs_end_bit_for_bit_as_one_that_was_not(tmp_path, data_dir):
    whole = run(tmp_path / "whole", data_dir)
    assert whole.returncode == 0, whole.stderr
    broken = tmp_path / "broken"
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    moment = draw.randrange(11, 18)
    print("moments drawn from", seed)
    assert run_until(broken, data_dir, moment, signal.SIGKILL) == -signal.SIGKILL
    saved = checkpoint.saved_steps(broken)[-1]
    # One save may be on its way to the disk, and a second one waits for it.
    assert saved % 5 == 0 and saved >= moment - 10
    moment = draw.randrange(saved + 1, max(saved + 2, 26))
    assert run_until(broken, data_dir, moment, signal.SIGTERM) == 128 + signal.SIGTERM
    stopped = checkpoint.saved_steps(broken)[-1]
    assert stopped >= moment, "SIGTERM did not save the step it stopped at"
    end = run(broken, data_dir)
    assert end.returncode == 0, end.stderr
    assert f"{stopped} -> 40, resumed" in end.stdout
    for fact in ("held-out loss", "a blind guess among 24 masked patches", "next"):
        assert fact in end.stdout
    for (path, got), (_, wanted) in zip(weights(broken), weights(tmp_path / "whole"), strict=True):
        np.testing.assert_array_equal(got, wanted, jax.tree_util.keystr(path))
    assert timeless_rows(broken) == timeless_rows(tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, data_dir):
    assert run_until(tmp_path, data_dir, 6, signal.SIGINT) == 128 + signal.SIGINT
    assert checkpoint.saved_steps(tmp_path)[-1] >= 6


@pytest.mark.slow
def test_a_mistake_in_a_field_is_one_clear_line(tmp_path, data_dir):
    result = run(tmp_path / "run", data_dir, "--config.data.train=absent")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "no data set 'absent'" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_help_names_the_flags_and_the_exit_codes():
    result = subprocess.run(
        [sys.executable, "-m", "maeast_jax.train", "--help"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    for words in ("--config", "--workdir", "Exit codes", "143 or 130"):
        assert words in result.stdout


def noise(config):
    """An endless stream of the caller's own, from any step."""

    def batches(start_step):
        samples = 400 + 160 * (config.num_frames - 1)
        step = start_step
        while True:
            random = np.random.default_rng(step)
            shape = (config.batch_size, samples)
            yield {"audio": random.integers(-9000, 9000, shape).astype(np.int16)}
            step += 1

    return batches


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of `short_config`, for copies to go on from."""
    workdir = tmp_path_factory.mktemp("finished")
    train(tiny.short_config(), workdir)
    return workdir


def test_training_takes_the_callers_batches_and_goes_on_where_they_were(tmp_path):
    config = tiny.short_config(checkpoint_every=2)
    train(config, tmp_path / "whole", batches=noise(config)(0))
    train(
        tiny.short_config(checkpoint_every=2, total_steps=4),
        tmp_path / "part",
        batches=noise(config),
    )
    for got, wanted in zip(*(final(tmp_path / name, 4) for name in ("part", "whole")), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_an_iterator_of_batches_is_refused_where_a_run_goes_on(tmp_path, finished):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    config = tiny.short_config(total_steps=8)
    with pytest.raises(ValueError, match=r"goes on from step 4, .* function of the first step"):
        train(config, tmp_path, batches=noise(config)(0))
    assert checkpoint.saved_steps(tmp_path) == [4]


def final(workdir, step):
    assert checkpoint.saved_steps(workdir)[-1] == step
    return jax.tree.leaves(checkpoint.load_part(checkpoint.find(workdir), "weights"))


def meshed(mesh, **changes):
    config = tiny.short_config(checkpoint_every=2, **changes)
    config.model.heads = 2
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
    return config


@pytest.fixture(scope="module")
def on_a_cube(tmp_path_factory):
    """A run on 2 x 2 x 2 devices that saved after 2 of its 4 steps."""
    workdir = tmp_path_factory.mktemp("cube")
    config = meshed((2, 2, 2))
    train(config, workdir, batches=noise(config))
    return workdir


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param((8, 1, 1), marks=pytest.mark.slow),
        pytest.param((1, 4, 2), marks=pytest.mark.slow),
        (1, 1, 1),
    ],
)
def test_a_run_goes_on_on_another_mesh(tmp_path, on_a_cube, mesh):
    config = meshed(mesh)
    shutil.copytree(on_a_cube / "checkpoints" / "2", tmp_path / "checkpoints" / "2")
    shutil.copy(on_a_cube / metrics_writer.METRICS_FILE, tmp_path)

    # Weights and both moments are bit for bit what was saved, and lie where this mesh wants them.
    wanted = Pretraining(PretrainConfig.of(config), noise(config)).abstract_state.parts()
    checkpoints = checkpoint.Checkpoints(tmp_path, 2, {})
    placed = checkpoints.restore(2, wanted)
    checkpoints.close()
    for part in ("weights", "progress"):
        saved = checkpoint.load_part(checkpoint.find(tmp_path), part)
        for got, bits in zip(*map(jax.tree.leaves, (placed[part], saved)), strict=True):
            np.testing.assert_array_equal(got, bits)
    for got, place in zip(*map(jax.tree.leaves, (placed, wanted)), strict=True):
        assert got.sharding == place.sharding

    train(config, tmp_path, batches=noise(config))
    for got, bits in zip(*(final(workdir, 4) for workdir in (tmp_path, on_a_cube)), strict=True):
        np.testing.assert_allclose(got, bits, rtol=2e-4, atol=2e-5)
    curves = [
        [row["loss"] for row in metrics_writer.read_metrics(workdir)]
        for workdir in (tmp_path, on_a_cube)
    ]
    np.testing.assert_allclose(*curves, rtol=1e-5)


def test_a_caller_may_fill_the_same_array_again():
    config = tiny.short_config()
    own = next(noise(config)(0))["audio"]
    # jax makes a view of an array at such an address.
    buffer = np.empty(own.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    reused = buffer[start : start + own.nbytes].view(np.int16).reshape(own.shape)
    reused[:] = own
    run = Pretraining(PretrainConfig.of(config), iter([{"audio": reused}]))
    placed = jax.block_until_ready(next(run.train_batches()))
    reused[:] = 0
    np.testing.assert_array_equal(placed["audio"], own)


def test_batches_that_end_or_do_not_fit_are_named(tmp_path):
    config = tiny.short_config()
    with pytest.raises(ValueError, match="the batches ended before step 2"):
        train(config, tmp_path / "a", batches=iter([next(noise(config)(0))] * 2))
    with pytest.raises(ValueError, match=r"'audio' is int16 \(8, 99\), but int16 \(8, 10480\)"):
        train(config, tmp_path / "b", batches=iter([{"audio": np.zeros((8, 99), np.int16)}]))
    with pytest.raises(ValueError, match=r"has the fields \['wave'\], but 'audio' is needed"):
        train(config, tmp_path / "c", batches=iter([{"wave": np.zeros((8, 99), np.int16)}]))


def test_silence_is_no_scale_to_start_from(tmp_path):
    config = tiny.short_config()
    silence = np.zeros_like(next(noise(config)(0))["audio"])
    with pytest.raises(
        ValueError, match="all 8 clips of the first batch of the caller are silent, so there is"
    ):
        train(config, tmp_path, batches=iter([{"audio": silence}]))
    assert not checkpoint.saved_steps(tmp_path) and not (tmp_path / "config.json").exists()


def test_held_out_clips_that_are_trained_on_are_said(data_dir):
    config = tiny.get_config(str(data_dir))
    config.mesh.data = 1
    for held_out, line in (("sounds", ""), ("sounds@train[8:]+valid", "3 of these clips are ")):
        config.data.eval = held_out
        said = summary.describe(Pretraining(PretrainConfig.of(config)), "run", 0, None)
        assert ("trained on too" in said) == bool(line) and line in said


def refuse(*_):
    raise AssertionError("compiled before the mistake was found")


def test_a_finished_run_is_left_alone_and_returns_its_evaluation(finished, monkeypatch, capsys):
    monkeypatch.setattr(Pretraining, "compile_step", refuse)
    evaluation = train(tiny.short_config(), finished)
    assert evaluation == metrics_writer.last_row(finished, "eval") and evaluation["loss"] > 0
    assert "has done its 4 steps already" in capsys.readouterr().out


def test_a_held_out_loss_that_is_not_finite_is_told_at_the_end(tmp_path, finished):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    rows = [
        json.loads(line)
        for line in (tmp_path / metrics_writer.METRICS_FILE).read_text().splitlines()
    ]
    rows[-1]["loss"] = None
    assert rows[-1]["split"] == "eval"
    (tmp_path / metrics_writer.METRICS_FILE).write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    assert "-> not finite" in summary.farewell(tmp_path)


def test_a_second_process_in_the_same_workdir_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Pretraining, "compile_step", refuse)
    with (
        checkpoint.held(tmp_path),
        pytest.raises(ValueError, match="another process is training in"),
    ):
        train(tiny.short_config(), tmp_path)


def test_a_checkpoint_that_another_process_saved_before_it_let_go_is_gone_on_from(
    tmp_path, finished, monkeypatch, capsys
):
    held = checkpoint.held

    @contextlib.contextmanager
    def held_later(workdir):
        shutil.copytree(finished, workdir, dirs_exist_ok=True)
        with held(workdir):
            yield

    monkeypatch.setattr(checkpoint, "held", held_later)
    train(tiny.short_config(), tmp_path)
    assert "has done its 4 steps already" in capsys.readouterr().out


def test_mistakes_are_found_before_anything_is_compiled(tmp_path, finished, monkeypatch):
    monkeypatch.setattr(Pretraining, "compile_step", refuse)
    (tmp_path / "foreign" / "checkpoints" / "12").mkdir(parents=True)
    broken, damaged = tmp_path / "broken", tmp_path / "damaged"
    shutil.copytree(finished, broken)
    shutil.copytree(finished, damaged)
    shutil.rmtree(damaged / "checkpoints" / "4" / "progress" / "d")
    (broken / "metrics.jsonl").write_text("not json\n{}\n")
    longer = tiny.short_config(total_steps=20)
    for workdir, config, message in (
        (tmp_path / "foreign", longer, r"12 is damaged, or is no checkpoint of this program"),
        (damaged, longer, r"4 is damaged, or is no checkpoint of this program"),
        (broken, longer, r"metrics.jsonl line 1 is b'not json'"),
        ("s3://bucket/run", longer, r"s3://bucket/run is unknown: name a folder of this machine"),
        (
            tmp_path / "new",
            tiny.short_config(num_frames=65),
            r"num_frames=65 must be a multiple of 16",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(config, workdir)


def test_a_data_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    config = tiny.short_config()
    config.data.source = "tfds"
    config.data.dir = str(tmp_path / "file" / "data")
    with pytest.raises(ValueError, match=r"file/data"):
        train(config, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_with_its_step_and_keeps_the_good_checkpoint(
    tmp_path, finished
):
    config = tiny.short_config(total_steps=40, checkpoint_every=4, log_every=10)
    config.optimizer.learning_rate = 1e30
    config.optimizer.clip_norm = 1e30
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = final(tmp_path, 4)
    with pytest.raises(NonFiniteError, match=r"at step \d+ \(step 4 is saved\); lower"):
        train(config, tmp_path, batches=noise(config))
    for got, wanted in zip(final(tmp_path, 4), before, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_run_says_that_its_data_set_was_built_anew(tmp_path, data_dir, capsys):
    shutil.copytree(data_dir, tmp_path / "data")
    config = tiny.get_config(str(tmp_path / "data"))
    config.update(total_steps=3, eval_every=3)
    config.mesh.data = 1
    train(config, tmp_path / "run")
    capsys.readouterr()
    clips = {name: lambda: clips_of_noise(6, 3) for name in ("train", "valid")}
    writer.write("sounds", tmp_path / "data", clips, overwrite=True)
    config.total_steps = 4
    train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "data set sounds/1.0.0@train was built anew since: 11 clips then, 6 now" in said
    assert "sounds/1.0.0@valid was built anew" in said


def test_another_architecture_is_refused_and_other_settings_are_said(tmp_path, finished, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = final(tmp_path, 4)
    config = tiny.short_config()
    config.model.width = 32
    with pytest.raises(checkpoint.CheckpointError, match=r"model\.width=16, the configuration 32"):
        train(config, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["width"] == 16
    with pytest.raises(ValueError, match="has reached step 4, past total_steps=3"):
        train(tiny.short_config(total_steps=3), tmp_path)
    capsys.readouterr()
    train(tiny.short_config(total_steps=6), tmp_path)
    out = capsys.readouterr().out
    assert "resuming with other settings than before: total_steps 4 -> 6" in out
    assert any(np.any(a != b) for a, b in zip(final(tmp_path, 6), before, strict=True))


def test_weights_come_from_another_run_and_the_count_starts_anew(tmp_path, finished, capsys):
    config = tiny.short_config(init_from=str(finished))
    config.optimizer.learning_rate = 1e-12
    train(config, tmp_path)
    assert "0 -> 4, from the start, weights of" in capsys.readouterr().out
    params = checkpoint.load_part(checkpoint.find(tmp_path), "weights")["params"]
    first = checkpoint.load_part(checkpoint.find(finished), "weights")["params"]
    for got, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(first), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-9)


def test_a_run_stopped_at_step_0_still_starts_from_the_weights_named(
    tmp_path, finished, monkeypatch
):
    config = tiny.short_config(init_from=str(finished))
    train(config, tmp_path / "whole")
    evaluate = Pretraining.evaluate

    def stop(self, state, asked_to_stop):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, state, asked_to_stop)

    monkeypatch.setattr(Pretraining, "evaluate", stop)
    with pytest.raises(Interrupted, match="step 0, which is saved"):
        train(config, tmp_path / "stopped")
    monkeypatch.undo()
    with pytest.raises(checkpoint.CheckpointError, match="is for the start of a run, but that in"):
        train(tiny.short_config(init_from=str(tmp_path / "whole")), tmp_path / "stopped")
    train(config, tmp_path / "stopped")
    for got, wanted in zip(*(final(tmp_path / n, 4) for n in ("stopped", "whole")), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_run_leaves_what_it_promises_and_says_what_it_will_do(tmp_path, data_dir, capsys):
    config = tiny.get_config(str(data_dir))
    config.total_steps, config.eval_every, config.mesh.data = 12, 6, 4
    evaluation = train(config, tmp_path)
    said = capsys.readouterr().out
    for fact in (
        "2 + 1 layers of 16",
        "32 patch tokens per clip of 0.64 s (4 x 8): 8 kept, 24 masked (chunk)",
        "4 x cpu",
        "sounds/1.0.0@train: 11 clips",
        "sounds/1.0.0@valid: 5 clips",
        "0 -> 12, from the start",
        "FLOP per clip",
        "B planned per device",
    ):
        assert fact in said
    assert checkpoint.saved_steps(tmp_path) == [10, 12]
    rows = metrics_writer.read_metrics(tmp_path)
    assert [r["step"] for r in rows if r["split"] == "eval"] == [0, 6, 12]
    train_rows = [r for r in rows if r["split"] == "train"]
    assert [r["step"] for r in train_rows] == list(range(1, 13))
    assert {"loss", "mse", "info_nce", "learning_rate", "grad_norm"} <= set(train_rows[-1])
    assert "clips_per_second" in train_rows[-1]
    last = train_rows[-1]
    np.testing.assert_allclose(last["loss"], 10 * last["mse"] + last["info_nce"], rtol=1e-5)
    assert evaluation == {k: v for k, v in rows[-1].items() if k not in ("step", "split")}
    for name in ("reconstructions.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert json.loads((tmp_path / "config.json").read_text()) == config.to_dict()
    config.total_steps = 13
    train(config, tmp_path)
    first, second = json.loads((tmp_path / "environment.json").read_text())
    assert (first["start_step"], second["start_step"]) == (0, 12)
    assert first["packages"]["jax"] == jax.__version__
    assert first["devices"] == {"kind": "cpu", "count": 8} and first["command"] == sys.argv
    assert second["config"]["total_steps"] == 13
    assert first["data"]["sounds/1.0.0@train"]["clips"] == 11


@pytest.mark.slow
def test_host_and_device_fbank_train_alike(tmp_path, data_dir):
    ends = []
    for place in ("device", "host"):
        config = tiny.get_config(str(data_dir))
        config.total_steps, config.eval_every, config.mesh.data = 3, 3, 1
        config.data.fbank = place
        ends.append(train(config, tmp_path / place)["loss"])
    np.testing.assert_allclose(*ends, rtol=1e-3)


HIDDEN = """
import sys
class Without:
    # A finder that does not see some packages, as where they are not installed.
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *where):
        if name.split(".")[0] not in ("tensorflow", "tensorflow_datasets", "torch"):
            return self.finder.find_spec(name, *where)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.path.insert(0, "tests")
from maeast_jax import train
import tiny
config = tiny.get_config()
config.total_steps = config.eval_every = 2
config.optimizer.warmup_steps = 1
try:
    train.train(config, sys.argv[1] + "/refused")
except ValueError as error:
    print(error)
config.data.train = config.data.eval = ""
config.data.source = "synthetic"
print(train.train(config, sys.argv[1] + "/trained")["loss"] > 0)
import numpy as np
from flax import nnx
from maeast_jax.model import MaeAst
from maeast_jax.model import ModelConfig
model = MaeAst(ModelConfig(**config.model.to_dict()), nnx.Rngs(0))
out = model.encode(np.zeros((1, 5360), np.float32), np.array([5360]))
print(out.hidden_states.shape == (2, 1, 16, 16))
"""


@pytest.mark.slow
def test_synthetic_training_runs_where_tensorflow_is_not_installed(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", HIDDEN, str(tmp_path)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "pip install tensorflow-cpu tensorflow-datasets" in lines[0]
    assert lines[-2:] == ["True", "True"]
    assert checkpoint.saved_steps(tmp_path / "trained") == [2]
    assert not (tmp_path / "refused").exists()
