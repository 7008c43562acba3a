"""Processes of one run: they agree, they end together, and a lost one is told from other errors."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jax.experimental import multihost_utils
from processes import ends, free_port
from recordings import clips_of_noise

from maeast_jax import checkpoint, train
from maeast_jax.data import writer
from maeast_jax.runtime import cli, distributed
from maeast_jax.runtime.cli import PeerLostError
from maeast_jax.training import metrics_writer

ROOT = Path(__file__).parents[2]
HEARTBEAT_SECONDS = 10


def start_processes(command, processes=2, devices=1):
    """Starts a program in so many processes of so many devices each; {} becomes their number."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT),
        "MAEAST_JAX_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS),
    }  # fmt: skip
    address = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={processes}"]
    return [
        subprocess.Popen(
            [sys.executable, *(word.replace("{}", str(i)) for word in command)]
            + ([*address, f"--process_id={i}"] if processes > 1 else []),
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(processes)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("UNAVAILABLE: Gloo AllReduce failed: Connection closed by peer"),
        ValueError("ABORTED: the other task died"),  # of an array that is waited for
        TimeoutError("ChainedFuture timed out"),  # Orbax's
    ],
)
def test_an_exchange_that_fails_tells_that_a_process_is_gone(monkeypatch, error):
    def fail():
        raise error

    def save():
        try:
            fail()
        except Exception as cause:
            raise RuntimeError("the save failed") from cause

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for exchange in (fail, save):
        with (
            pytest.raises(PeerLostError, match="another process of this run is gone"),
            distributed.others_alive(),
        ):
            exchange()
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with pytest.raises(RuntimeError, match="the save failed"), distributed.others_alive():
        save()


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory, ABORTED"),
        jax.errors.JaxRuntimeError("INTERNAL: core halted"),
        OSError("Gloo.array_record: No space left on device"),
    ],
)
def test_other_errors_of_an_exchange_pass(monkeypatch, error):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(type(error)) as raised, distributed.others_alive():
        raise error
    assert raised.value is error


def test_a_data_set_that_is_missing_is_no_lost_process_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda value: np.stack([value] * 2))
    config = tiny.get_config(str(tmp_path / "data"))
    config.batch_size = 8
    config.data.train = "Gloo-ABORTED"
    with pytest.raises(ValueError, match="Gloo-ABORTED"):
        train.train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("127.0.0.1:1", None, None), "Number of processes must be defined. Pass --coordinator"),
        (("localhost", 2, 0), "--coordinator=localhost must be HOST:PORT"),
        ((None, None, None), "Pass --coordinator=HOST:PORT .* or --distributed alone"),
        (("127.0.0.1:1", 2, 2), "with process_id < num_processes"),
    ],
)
def test_addresses_that_do_not_fit_are_refused(monkeypatch, given, message):
    # jax refuses to start where devices were used, as by other tests, before it looks further.
    monkeypatch.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: False)
    with pytest.raises(ValueError, match=message):
        distributed.initialize(*given)


def test_a_single_process_notes_signals_and_a_second_ctrl_c_acts_at_once():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with distributed.stopping() as asked:
        assert asked() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_window_and_slurm_stop_a_run_unless_they_are_ignored(number, monkeypatch):
    with distributed.stopping() as asked:
        os.kill(os.getpid(), number)
        assert asked() == number
    assert signal.getsignal(number) == signal.SIG_DFL
    signal.signal(number, signal.SIG_IGN)
    try:
        with distributed.stopping() as asked:
            os.kill(os.getpid(), number)
            assert asked() is None
    finally:
        signal.signal(number, signal.SIG_DFL)
    # In several processes jax agrees on the step where one of them got SIGTERM.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    passed_on = []
    with (
        cli.catching(lambda number, _: passed_on.append(number), signal.SIGTERM),
        distributed.stopping(),
    ):
        os.kill(os.getpid(), number)
    assert passed_on == [signal.SIGTERM]


def test_outside_of_the_main_thread_no_signal_is_noted():
    def enter():
        with distributed.stopping() as asked:
            seen.append(asked())

    seen = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None]


def test_one_process_agrees_with_itself():
    distributed.agree("anything", json.loads('{"a": 1}'))
    assert distributed.from_first(True) is True
    assert distributed.is_first()
    assert distributed.all_true(True) and not distributed.all_true(False)


PROGRAM = """
import os, sys
import jax
from maeast_jax.runtime import cli, distributed

def main(config, workdir):
    index = jax.process_index()
    distributed.agree("the names", ["a", "b"])
    assert distributed.from_first(7 - index) == 7
    assert not distributed.all_true(index == 0) and distributed.all_true(True)
    try:
        distributed.agree("the seed", index)
    except ValueError as error:
        print(error, file=sys.stderr, flush=True)
    print("spoken", flush=True)
    if index == 1:
        os._exit(9)
    distributed.all_true(True)

cli.run(main, join=distributed.initialize)
"""


def test_two_processes_agree_until_one_of_them_dies(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'a': 1})"
    )
    command = ["-c", PROGRAM, f"--config={config}", "--workdir=x"]
    first, second = ends(start_processes(command), timeout=60)
    assert first[0] == 75 and second[0] == 9, first[2] + second[2]
    assert "error: another process of this run is gone" in first[2]
    for _, _, told in (first, second):
        assert "the processes of this run differ in the seed" in told
    assert "spoken" in first[1] and "spoken" not in second[1]


# What follows trains in two processes.


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    parts = {
        "train": lambda: clips_of_noise(11, 0, "ab"),
        "valid": lambda: clips_of_noise(5, 1, "ab"),
    }
    writer.write("sounds", folder, parts, label_names=["a", "b"])
    return folder


def start(workdir, data_dir, processes, devices, *overrides):
    """Starts training in so many processes of so many devices each."""
    command = [
        "-m", "maeast_jax.train", f"--config=tests/tiny.py:{data_dir}", f"--workdir={workdir}",
        "--config.total_steps=8", "--config.eval_every=4", "--config.eval.knn=sounds", *overrides,
    ]  # fmt: skip
    return start_processes(command, processes, devices)


# Noise in place of a data set where no curve is compared: the processes start in half the time.
SYNTHETIC = (
    "--config.data.source=synthetic", "--config.data.train=", "--config.data.eval=",
    "--config.eval.knn=", "--config.eval.max_clips=4", "--config.eval.pictures=0",
)  # fmt: skip


def curve(workdir):
    return {
        (row["step"], row["split"], name): row[name]
        for row in metrics_writer.read_metrics(workdir)
        for name in ("loss", "mse", "info_nce", "grad_norm", "knn_accuracy")
        if name in row
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data_dir):
    """One process with four devices."""
    folder = tmp_path_factory.mktemp("alone")
    ((code, _, told),) = ends(start(folder, data_dir, 1, 4))
    assert code == 0, told
    return folder


def assert_same_curve(workdir, other):
    got, wanted = curve(workdir), curve(other)
    assert got.keys() == wanted.keys()
    assert {split for _, split, _ in got} == {"train", "eval"}
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-5, err_msg=str(name))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data", "fsdp", "tensor"])
def test_two_processes_have_the_curve_of_one(tmp_path, data_dir, alone, mesh):
    """With one device per process along `tensor`, both processes hold the same rows."""
    devices, sizes = {
        "data": (2, {"data": 4}),
        "fsdp": (2, {"data": 2, "fsdp": 2}),
        "tensor": (1, {"data": 1, "tensor": 2}),
    }[mesh]
    fields = [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
    first, second = ends(start(tmp_path, data_dir, 2, devices, *fields))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert_same_curve(tmp_path, alone)
    # Only the first one prints; gloo greets in both, from several threads at once.
    assert "held-out loss" in first[1] + first[2]
    lines = (second[1] + second[2]).splitlines()
    assert not [line for line in lines if not re.search("Gloo|Rank|peer ranks|^$", line)]


def wait_for_step(process, step):
    assert any(line.startswith(f"step {step}/") for line in process.stderr), "it ended before"


@pytest.mark.slow
def test_sigterm_saves_the_same_step_on_both_and_one_process_goes_on(tmp_path, data_dir, alone):
    shared = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.checkpoint_every=100")
    started = start(tmp_path, data_dir, 2, 2, *shared)
    wait_for_step(started[0], 1)
    for process in (0, 1, 0, 1):
        started[process].send_signal(signal.SIGTERM)
    first, second = ends(started)
    assert (first[0], second[0]) == (143, 143), first[2] + second[2]
    (step,) = checkpoint.saved_steps(tmp_path)
    assert 0 < step < 8
    assert all(f"stopped by SIGTERM at step {step}, which is saved" in end[2] for end in
               (first, second))  # fmt: skip
    # Another number of processes on another mesh goes on from it to the same end.
    ((code, _, told),) = ends(start(tmp_path, data_dir, 1, 4))
    assert code == 0, told
    assert_same_curve(tmp_path, alone)


@pytest.mark.slow
def test_sigterm_of_one_process_stops_a_run_that_was_resumed_and_saves_at_every_step(tmp_path):
    always = (*SYNTHETIC, "--config.checkpoint_every=1", "--config.eval_every=100000")
    assert [code for code, *_ in ends(start(tmp_path, "", 2, 1, *always))] == [0, 0]
    started = start(tmp_path, "", 2, 1, *always, "--config.total_steps=100000")
    wait_for_step(started[0], 10)
    started[1].send_signal(signal.SIGTERM)
    first, second = ends(started)
    assert (first[0], second[0]) == (143, 143), first[2] + second[2]
    newest = checkpoint.saved_steps(tmp_path)[-1]
    assert f"stopped by SIGTERM at step {newest}, which is saved" in second[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "end", "checkpoint_every"),
    [
        (0, signal.SIGKILL, 100),
        (1, signal.SIGKILL, 1),
        (0, signal.SIGSTOP, 100),
        (1, signal.SIGSTOP, 100),
    ],
)
def test_a_process_that_is_lost_takes_the_other_down_in_time(
    tmp_path, victim, end, checkpoint_every
):
    """A dead process breaks a connection, also in the middle of a save; a stopped one is silent."""
    fields = ("--config.total_steps=100000", f"--config.checkpoint_every={checkpoint_every}")
    started = start(tmp_path, "", 2, 1, *SYNTHETIC, *fields)
    wait_for_step(started[0], 1 if checkpoint_every > 1 else 7)
    started[victim].send_signal(end)
    # The process itself needs some time to end, too.
    _, told = started[1 - victim].communicate(timeout=3 * HEARTBEAT_SECONDS)
    assert started[1 - victim].returncode in (75, -signal.SIGABRT)
    assert "another process of this run is gone" in told or "another task died" in told
    started[victim].kill()
    started[victim].communicate()


@pytest.mark.slow
def test_the_launcher_restarts_a_run_after_one_process_was_killed(tmp_path, data_dir, alone):
    launcher = subprocess.Popen(
        ["launch/local_multiprocess.sh", "--processes=2", "--devices_per_process=2",
         f"--log_dir={tmp_path / 'logs'}", "--", sys.executable, "-m", "maeast_jax.train",
         f"--config=tests/tiny.py:{data_dir}", f"--workdir={tmp_path / 'run'}",
         "--config.total_steps=8", "--config.eval_every=4", "--config.eval.knn=sounds",
         "--config.checkpoint_every=2"],
        cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for_step(launcher, 3)
    (second,) = subprocess.run(
        ["pgrep", "--full", f"python.*{tmp_path}.*--process_id=1"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    os.kill(int(second), signal.SIGKILL)
    _, told = launcher.communicate(timeout=400)
    assert launcher.returncode == 0, told
    assert "process 1 ended with code 137" in told and "starting again" in told
    assert_same_curve(tmp_path / "run", alone)


@pytest.mark.slow
def test_processes_whose_configurations_differ_are_refused(tmp_path):
    common = ["-m", "maeast_jax.train", "--config=tests/tiny.py", f"--workdir={tmp_path}"]
    started = start_processes([*common, "--config.seed={}", *SYNTHETIC], 2)
    for code, _, told in ends(started):
        assert code == 2 and "the processes of this run differ in the configuration" in told


@pytest.mark.slow
def test_one_process_that_joined_ends_on_sigterm_before_its_loop():
    """jax would only note the signal, for a question that is asked of several processes."""
    code = (
        "import os, signal, time\nfrom maeast_jax.runtime import distributed\n"
        f"distributed.initialize('127.0.0.1:{free_port()}', 1, 0)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(20)"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT).returncode == -15
