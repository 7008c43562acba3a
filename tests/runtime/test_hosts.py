"""Two real processes over loopback: one curve, one stop, one end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from recordings import clips_of_noise

from maeast_jax import checkpoint
from maeast_jax.data import writer
from maeast_jax.runtime import distributed
from maeast_jax.training import metrics_writer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    parts = {
        "train": lambda: clips_of_noise(11, 0, "ab"),
        "valid": lambda: clips_of_noise(5, 1, "ab"),
    }
    writer.write("sounds", folder, parts, label_names=["a", "b"])
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(workdir, data_dir, processes, devices, *overrides):
    """The program in so many processes of so many devices each."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    common = [
        sys.executable, "-m", "maeast_jax.train", f"--config=tests/tiny.py:{data_dir}",
        f"--workdir={workdir}", "--config.total_steps=8", "--config.eval_every=4",
        "--config.eval.knn=sounds", *overrides,
    ]  # fmt: skip
    address = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={processes}"]
    return [
        subprocess.Popen(
            common + ([*address, f"--process_id={i}"] if processes > 1 else []),
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(processes)
    ]  # fmt: skip


# Noise in place of a data set, where no curve is compared: starts in half the time.
SYNTHETIC = (
    "--config.data.source=synthetic", "--config.data.train=", "--config.data.eval=",
    "--config.eval.knn=", "--config.eval.max_clips=4", "--config.eval.pictures=0",
)  # fmt: skip


def ends(started, timeout=300):
    outputs = [process.communicate(timeout=timeout) for process in started]
    return [(p.returncode, *output) for p, output in zip(started, outputs, strict=True)]


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


@pytest.mark.parametrize("mesh", ["data", "fsdp", "tensor"])
def test_two_processes_have_the_curve_of_one(tmp_path, data_dir, alone, mesh):
    """Along `tensor`, a device a process, both hold the same rows."""
    devices, sizes = {
        "data": (2, {"data": 4}),
        "fsdp": (2, {"data": 2, "fsdp": 2}),
        "tensor": (1, {"data": 1, "tensor": 2}),
    }[mesh]
    fields = [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
    first, second = ends(start(tmp_path, data_dir, 2, devices, *fields))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert_same_curve(tmp_path, alone)
    # The first alone speaks; gloo greets in both, from several threads at once.
    assert "held-out loss" in first[1] + first[2]
    lines = (second[1] + second[2]).splitlines()
    assert not [line for line in lines if not re.search("Gloo|Rank|peer ranks|^$", line)]


def reported(process, step):
    assert any(line.startswith(f"step {step}/") for line in process.stderr), "it ended before"


@pytest.mark.parametrize("signalled", [(1,), (0, 1, 0, 1)])
def test_sigterm_saves_one_step_on_both_and_one_goes_on(tmp_path, data_dir, alone, signalled):
    shared = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.checkpoint_every=100")
    started = start(tmp_path, data_dir, 2, 2, *shared)
    reported(started[0], 1)
    for process in signalled:
        started[process].send_signal(signal.SIGTERM)
    first, second = ends(started)
    assert (first[0], second[0]) == (143, 143), first[2] + second[2]
    (step,) = checkpoint.saved_steps(tmp_path)
    assert 0 < step < 8
    assert all(f"stopped by SIGTERM at step {step}, which is saved" in end[2] for end in
               (first, second))  # fmt: skip
    # Another number of processes, on another mesh, goes on from it, to the same end.
    ((code, _, told),) = ends(start(tmp_path, data_dir, 1, 4))
    assert code == 0, told
    assert_same_curve(tmp_path, alone)


def test_sigterm_stops_a_run_that_was_resumed_and_saves_at_every_step(tmp_path):
    always = (*SYNTHETIC, "--config.checkpoint_every=1", "--config.eval_every=100000")
    assert [code for code, *_ in ends(start(tmp_path, "", 2, 1, *always))] == [0, 0]
    started = start(tmp_path, "", 2, 1, *always, "--config.total_steps=100000")
    reported(started[0], 10)
    started[1].send_signal(signal.SIGTERM)
    first, second = ends(started)
    assert (first[0], second[0]) == (143, 143), first[2] + second[2]
    newest = checkpoint.saved_steps(tmp_path)[-1]
    assert f"stopped by SIGTERM at step {newest}, which is saved" in second[2]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("end", "checkpoint_every"), [(signal.SIGKILL, 100), (signal.SIGSTOP, 100), (signal.SIGKILL, 1)]
)
def test_a_process_that_is_lost_takes_the_other_down_in_time(
    tmp_path, victim, end, checkpoint_every
):
    """One that dies breaks a connection, in the middle of a save too; one that stands is silent."""
    fields = ("--config.total_steps=100000", f"--config.checkpoint_every={checkpoint_every}")
    started = start(tmp_path, "", 2, 1, *SYNTHETIC, *fields)
    reported(started[0], 1 if checkpoint_every > 1 else 7)
    started[victim].send_signal(end)
    # As long again for the process itself to end.
    _, told = started[1 - victim].communicate(timeout=2 * distributed.HEARTBEAT_SECONDS)
    assert started[1 - victim].returncode in (75, -signal.SIGABRT)
    assert "another process of this run is gone" in told or "another task died" in told
    started[victim].kill()
    started[victim].communicate()


def test_the_launcher_brings_back_a_run_of_which_a_process_was_killed(tmp_path, data_dir, alone):
    launcher = subprocess.Popen(
        ["launch/local_multiprocess.sh", "--processes=2", "--devices_per_process=2",
         f"--log_dir={tmp_path / 'logs'}", "--", sys.executable, "-m", "maeast_jax.train",
         f"--config=tests/tiny.py:{data_dir}", f"--workdir={tmp_path / 'run'}",
         "--config.total_steps=8", "--config.eval_every=4", "--config.eval.knn=sounds",
         "--config.checkpoint_every=2"],
        cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    reported(launcher, 3)
    (second,) = subprocess.run(
        ["pgrep", "--full", f"python.*{tmp_path}.*--process_id=1"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    os.kill(int(second), signal.SIGKILL)
    _, told = launcher.communicate(timeout=400)
    assert launcher.returncode == 0, told
    assert "process 1 ended with code 137" in told and "starting again" in told
    assert_same_curve(tmp_path / "run", alone)


def test_processes_that_differ_are_told_so(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "maeast_jax.train", "--config=tests/tiny.py",
             f"--workdir={tmp_path}", f"--config.seed={i}", f"--coordinator=127.0.0.1:{port}",
             "--num_processes=2", f"--process_id={i}", *SYNTHETIC],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    for code, _, told in ends(started):
        assert code == 2 and "the processes of this run differ in the configuration" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator=127.0.0.1:1"], "--process_id go together"),
        (["--distributed"], "on a cluster that jax does not know, pass --coordinator"),
        (
            ["--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=2"],
            "with process_id < num_processes",
        ),
        (
            ["--coordinator=localhost", "--num_processes=2", "--process_id=0"],
            "--coordinator=localhost must be HOST:PORT",
        ),
    ],
)
def test_flags_that_do_not_fit_are_one_line(tmp_path, flags, message):
    done = subprocess.run(
        [sys.executable, "-m", "maeast_jax.train", "--config=tests/tiny.py",
         f"--workdir={tmp_path}", *flags],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr


def test_one_process_that_joined_ends_on_sigterm_before_its_loop():
    """jax would note the signal for a question that is asked of several processes alone."""
    code = (
        "import os, signal, time\nfrom maeast_jax.runtime import distributed\n"
        f"distributed.initialize('127.0.0.1:{free_port()}', 1, 0)\n"
        "assert distributed.is_joined()\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(20)"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT).returncode == -15


def test_one_process_agrees_with_itself():
    distributed.agree("anything", json.loads('{"a": 1}'))
    assert (
        distributed.from_first(True) is True
        and distributed.is_first()
        and not distributed.is_joined()
    )
    assert (
        distributed.largest(3) == 3
        and distributed.all_true(True)
        and not distributed.all_true(False)
    )
