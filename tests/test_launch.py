"""The launch scripts: what they start, when they restart it, and their errors."""

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
# Words that a shell would split, expand or end at.
AWKWARD = ["--config.data.train=a*0.7,b c", '--name=it\'s "$HOME" `x` \\ &']
PROGRAM = ["python", "-m", "maeast_jax.train", *AWKWARD, "--workdir=gs://bucket/run"]

# Notes its words in starts_PROCESS, and then runs the Python statement that plan.json has for this
# process and this start.
STAND_IN = """
import json, os, signal, sys, time
from sys import exit
from time import sleep

folder, *words = sys.argv[1:]
process = ([w.split("=")[1] for w in words if w.startswith("--process_id=")] or ["0"])[0]
caught = []
signal.signal(signal.SIGTERM, lambda *_: caught.append(143))
signal.signal(signal.SIGINT, lambda *_: caught.append(130))


def wait():
    while not caught:
        sleep(0.05)
    open(f"{folder}/saved_{process}", "w").close()
    exit(caught[0])


print(f"process {process} here", flush=True)
seen = {name: os.environ.get(name) for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")}
with open(f"{folder}/starts_{process}", "a+") as file:
    file.write(json.dumps({"words": words, "pid": os.getpid(), **seen}) + "\\n")
    file.seek(0)
    starts = len(file.readlines())
exec(json.load(open(f"{folder}/plan.json"))[int(process)][starts - 1])
"""


def fake(folder, name, body):
    path = folder / "fakes" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def environment(folder, **more):
    """The variables of this process without those of a job around it; fakes come first in PATH."""
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "JAX_", "DRY_RUN"))
    }
    return own | {"PATH": f"{folder / 'fakes'}:{os.environ['PATH']}"} | more


def call(folder, script, *words, cwd=ROOT, **more):
    return subprocess.run(
        ["bash", LAUNCH / script, *words], cwd=cwd, env=environment(folder, **more),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def dry(folder, script, *words, **more):
    """The words of each command that a dry run prints. A call of gcloud would fail."""
    fake(folder, "gcloud", "exit 99")
    result = call(folder, script, *words, **more)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#")]


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    scripts = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
    result = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["local_multiprocess.sh", "tpu_vm.sh"])
def test_help(tmp_path, name):
    assert (LAUNCH / name).stat().st_mode & stat.S_IXUSR
    result = call(tmp_path, name, "--help")
    assert result.returncode == 0
    assert f"launch/{name}" in result.stdout and "set -euo" not in result.stdout


TPU = ("--name=mae", "--zone=z")


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("local_multiprocess.sh", [], "no program; write -- PROGRAM"),
        ("local_multiprocess.sh", ["--processes=08", "--", "x"], "--processes=08 must be a whole"),
        (
            "local_multiprocess.sh",
            ["--", "python", "-m", "maeast_jax.finetune"],
            "maeast_jax.finetune runs in one process: start it without a launcher",
        ),
        ("tpu_vm.sh", ["begin", *TPU], "begin is not a command; commands are: create install"),
        ("tpu_vm.sh", ["create", *TPU, "--type=v9-8"], "add --version=RUNTIME"),
        ("tpu_vm.sh", ["fetch", *TPU], "--from is missing"),
        ("tpu_vm.sh", ["create", *TPU, "--spt"], "--spt is not an option"),
        ("slurm.sbatch", [], "no program; write -- PROGRAM"),
        ("slurm.sbatch", ["--", "x"], "this is not a SLURM job"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, script, words, message):
    result = call(tmp_path, script, *words)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def common(code):
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source {LAUNCH}/common.sh; {code}", "bash", *AWKWARD],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def test_exit_codes_after_which_a_run_is_restarted():
    codes = common("for code in {0..255}; do ! restartable $code || echo $code; done")
    assert set(map(int, codes.split())) == {70, 75, *range(129, 256)} - {130}


def test_commands_are_quoted_for_a_shell():
    quoted = common('quote python "$@"')
    assert quoted.startswith("python ")
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {quoted}"], capture_output=True, text=True
    ).stdout
    assert printed.splitlines() == ["python", *AWKWARD] == shlex.split(quoted)


class Local:
    """launch/local_multiprocess.sh on the stand-in program."""

    def __init__(self, folder, plan):
        self.folder = folder
        (folder / "stand_in.py").write_text(STAND_IN)
        (folder / "plan.json").write_text(json.dumps(plan))
        self.program = [sys.executable, str(folder / "stand_in.py"), str(folder)]
        self.options = [f"--processes={len(plan)}", f"--log_dir={folder}/logs"]

    def run(self, *options):
        words = [*self.options, *options, "--", *self.program, *AWKWARD]
        return call(self.folder, "local_multiprocess.sh", *words)

    def popen(self):
        """Starts the launcher, and returns once its first two processes have started."""
        launcher = subprocess.Popen(
            ["bash", LAUNCH / "local_multiprocess.sh", *self.options, "--", *self.program],
            env=environment(self.folder), text=True, process_group=0,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            # Tests that run in the background ignore Ctrl-C, and bash would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        wait_for(lambda: self.starts(0) and self.starts(1))
        return launcher

    def starts(self, process):
        path = self.folder / f"starts_{process}"
        return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def coordinator(start):
    return next(word for word in start["words"] if word.startswith("--coordinator="))


def test_local_dry_run(tmp_path):
    commands = dry(
        tmp_path, "local_multiprocess.sh", "--devices_per_process=2", "--dry_run", "--", "python",
        *AWKWARD,
    )  # fmt: skip
    cpu = ["env", "JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=2"]
    together = [commands[0][-3], "--num_processes=2"]
    assert commands == [
        [*cpu, "python", *AWKWARD, *together, f"--process_id={i}"] for i in range(2)
    ]


def test_local_starts_all_and_ends_with_0(tmp_path):
    local = Local(tmp_path, [["exit(0)"]] * 3)
    result = local.run("--devices_per_process=4")
    assert (result.returncode, result.stdout) == (0, "process 0 here\n"), result.stderr
    assert (tmp_path / "logs/process_2.log").read_text() == "process 2 here\n"
    (start,) = local.starts(2)
    address = coordinator(local.starts(0)[0])
    assert start["words"] == [*AWKWARD, address, "--num_processes=3", "--process_id=2"]
    assert (start["JAX_PLATFORMS"], start["JAX_NUM_CPU_DEVICES"]) == ("cpu", "4")


@pytest.mark.slow
def test_local_starts_again_after_a_lost_process(tmp_path):
    plan = [["sleep(1); exit(75)", "exit(0)"], ["os.kill(os.getpid(), 9)", "exit(0)"]]
    local = Local(tmp_path, plan)
    result = local.run()
    assert result.returncode == 0, result.stderr
    assert "starting again, 2 more restarts" in result.stderr
    assert len(local.starts(0)) == len(local.starts(1)) == 2
    assert coordinator(local.starts(0)[1]) == coordinator(local.starts(1)[1])
    assert local.starts(0)[0]["JAX_PLATFORMS"] is None


@pytest.mark.slow
def test_local_gives_up(tmp_path):
    local = Local(tmp_path, [["exit(75)"] * 3] * 2)
    result = local.run("--restarts=1")
    assert result.returncode == 75
    assert "code 75 again after 1 restarts: giving up" in result.stderr
    assert len(local.starts(0)) == 2


def test_local_does_not_restart_after_a_mistake(tmp_path):
    local = Local(tmp_path, [["sleep(1); exit(75)"], ["exit(2)"]])
    result = local.run()
    assert result.returncode == 2
    assert "process 1 ended with code 2" in result.stderr
    assert "process 1 | process 1 here" in result.stderr
    assert len(local.starts(0)) == len(local.starts(1)) == 1


@pytest.mark.slow
def test_local_blames_the_mistake_if_two_processes_end_at_the_same_time(tmp_path):
    local = Local(tmp_path, [["sleep(1); exit(75)"], ["sleep(1); exit(2)"]])
    launcher = local.popen()
    # Both processes end while the launcher is stopped.
    launcher.send_signal(signal.SIGSTOP)
    time.sleep(2)
    launcher.send_signal(signal.SIGCONT)
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 2, output
    assert "process 1 ended with code 2" in output


@pytest.mark.slow
def test_local_kills_a_process_that_does_not_end(tmp_path):
    local = Local(tmp_path, [["sleep(100)"], ["exit(2)"]])
    began = time.monotonic()
    result = local.run("--grace=1")
    assert result.returncode == 2
    assert "did not end within 1 s and are killed" in result.stderr
    assert 1 <= time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(local.starts(0)[0]["pid"], 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "whole_group"),
    # The second is Ctrl-C at a terminal.
    [(signal.SIGTERM, 143, False), (signal.SIGINT, 130, True)],
)
def test_local_passes_signals_on(tmp_path, number, code, whole_group):
    """A signal to the whole process group also ends the launcher's `sleep`."""
    local = Local(tmp_path, [["wait()"]] * 2)
    launcher = local.popen()
    launcher.send_signal(number)
    if whole_group:
        os.killpg(launcher.pid, number)
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == code, output
    assert len(list(tmp_path.glob("saved_*"))) == 2 and len(local.starts(0)) == 1


VM = ["gcloud", "compute", "tpus", "tpu-vm"]
QUEUE = ["gcloud", "compute", "tpus", "queued-resources"]
PLACE = ["mae", "--zone=z", "--project=p"]


def tpu(folder, command, *options, program=PROGRAM):
    options = (*TPU, "--project=p", *options, "--dry_run", "--", *program)
    return dry(folder, "tpu_vm.sh", command, *options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--type=v6e-16", "--spot", "--create_flag=--network=my net"],
            [*VM, "create", *PLACE, "--version=v2-alpha-tpuv6e", "--accelerator-type=v6e-16",
             "--spot", "--network=my net"],
        ),
        (
            ["--type=v9-1", "--version=mine", "--queued"],
            [*QUEUE, "create", *PLACE, "--node-id=mae", "--runtime-version=mine",
             "--accelerator-type=v9-1"],
        ),
    ],
)  # fmt: skip
def test_tpu_create(tmp_path, options, expected):
    assert tpu(tmp_path, "create", *options) == [expected]


def test_tpu_commands(tmp_path):
    pack, send, unpack = tpu(tmp_path, "install", "--ssh_flag=--internal-ip")
    archive = pack[-2].removeprefix("--output=")
    assert pack[:1] == ["git"] and pack[-1] == "HEAD"
    assert send == [*VM, "scp", archive, "mae:", *PLACE[1:], "--worker=all", "--internal-ip"]
    assert unpack[:9] == [*VM, "ssh", *PLACE, "--worker=all"] and unpack[9] == "--internal-ip"
    (_, copy) = tpu(tmp_path, "fetch", "--from=runs/mine", "--to=here")
    assert copy[4:7] == ["scp", "mae:maeast_jax/runs/mine", "here"] and "--recurse" in copy
    (_, copy) = tpu(tmp_path, "fetch", "--from=/mnt/mine")
    assert copy[5:7] == ["mae:/mnt/mine", "runs"]
    assert tpu(tmp_path, "delete", "--queued") == [[*QUEUE, "delete", *PLACE, "--force"]]


def test_tpu_run_and_stop_on_a_worker(tmp_path):
    local = Local(tmp_path, [["wait()"]])
    activate = tmp_path / "maeast_jax/.venv/bin/activate"
    activate.parent.mkdir(parents=True)
    activate.touch()

    def remote(command):
        """Runs the shell command that gcloud would run on each worker, in its home folder."""
        (words,) = tpu(tmp_path, command, program=[*local.program, *AWKWARD])
        assert "--worker=all" in words
        return subprocess.run(
            ["bash", "-c", words[-1].removeprefix("--command=")], cwd=tmp_path,
            env=environment(tmp_path), capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    assert remote("run").returncode == 0
    wait_for(lambda: local.starts(0))
    assert local.starts(0)[0]["words"] == [*AWKWARD, "--distributed"]
    again = remote("run")
    assert (again.returncode, again.stderr) == (2, "error: a program runs; stop it first\n")
    assert remote("stop").returncode == 0
    assert (tmp_path / "saved_0").exists() and len(local.starts(0)) == 1


SKY = LAUNCH / "sky.yaml"


def sky_part(folder, part, **variables):
    """Runs `setup` or `run` of the SkyPilot task with the fakes only; returns what it printed."""
    for name in ("bash", "head", "sh"):
        (folder / "fakes" / name).symlink_to(shutil.which(name))
    fake(folder, "curl", "")
    fake(folder, "uv", '[[ $1 != pip ]] || printf "%s " "$@"')
    (folder / "maeast_jax").mkdir()
    (folder / "maeast_jax/bin").symlink_to(folder / "fakes")
    fake(folder, "python", 'printf "%s\\n" "$@"')
    return subprocess.run(
        [shutil.which("bash"), "-c", yaml.safe_load(SKY.read_text())[part]], check=True, text=True,
        env={"HOME": str(folder), "PATH": str(folder / "fakes"), **variables}, capture_output=True,
    ).stdout  # fmt: skip


@pytest.mark.parametrize(
    ("driver", "extra"), [(None, "tpu"), ("570.86.15", "cuda12"), ("580.1", "cuda13")]
)
def test_sky_setup_installs_jax_for_the_accelerator(tmp_path, driver, extra):
    (tmp_path / "fakes").mkdir()
    if driver:
        fake(tmp_path, "nvidia-smi", f"echo {driver}")
    assert sky_part(tmp_path, "setup") == f"pip install -r requirements.txt jax[{extra}] gcsfs "


@pytest.mark.parametrize("has_gpus", [False, True])
def test_sky_run_joins_the_processes(tmp_path, has_gpus):
    (tmp_path / "fakes").mkdir()
    processes = ["--distributed"]
    if has_gpus:
        fake(tmp_path, "nvidia-smi", "")
        processes = ["--coordinator=10.0.0.1:8476", "--num_processes=2", "--process_id=1"]
    printed = sky_part(
        tmp_path, "run", BUCKET="gs://b", RUN="paper", ARGUMENTS="--config=c.py --workdir=w",
        SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1",
    )  # fmt: skip
    assert printed.split() == [
        "-m", "maeast_jax.train", "--workdir=gs://b/runs/paper", "--config.data.dir=gs://b/data",
        *processes, "--config=c.py", "--workdir=w",
    ]  # fmt: skip


@pytest.fixture
def sky_python(request):
    """An interpreter with SkyPilot: $SKY_PYTHON, or an environment that is kept between runs."""
    if given := os.environ.get("SKY_PYTHON"):
        return given
    folder = request.config.cache.mkdir("skypilot")
    python = folder / "bin/python"
    requirements = ROOT / "requirements-sky.txt"
    installed = folder / "installed.txt"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        done = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "-r", requirements],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"SkyPilot cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        shutil.copy(requirements, installed)
    return python


@pytest.mark.slow
def test_skypilot_accepts_the_task(tmp_path, sky_python):
    program = f"""
import json, sky, yaml
config = yaml.safe_load(open({str(SKY)!r}))
task = sky.Task.from_yaml_config(config, env_overrides=[("BUCKET", "gs://bucket")])
task.validate()
(resources,) = task.resources
print(json.dumps([str(resources.cloud), resources.accelerators, resources.use_spot,
                  resources.job_recovery, task.envs["BUCKET"]]))
try:
    sky.Task.from_yaml({str(SKY)!r})
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sky_python, "-c", program], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *_, task, refused = done.stdout.splitlines()
    cloud, accelerators, is_spot, recovery, bucket = json.loads(task)
    assert (cloud, accelerators, is_spot) == ("GCP", {"tpu-v6e-16": 1}, True)
    assert bucket == "gs://bucket" and "Environment variable 'BUCKET' is None" in refused
    assert set(recovery["recover_on_exit_codes"]) == {70, 75, 134}


def test_slurm_dry_run(tmp_path):
    slurm = {"SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "6", "DRY_RUN": "1"}
    launch, requeue = dry(tmp_path, "slurm.sbatch", "--", *PROGRAM, **slurm)
    options = launch[1 : launch.index("python")]
    assert set(options) >= {"--kill-on-bad-exit=0", "--gpu-bind=none", "--cpus-per-task=6"}
    assert options[-4:-2] == ["bash", "-c"] and options[-1].endswith("/.slurm_17")
    assert launch[0] == "srun" and launch[-len(PROGRAM) - 1 :] == [*PROGRAM, "--distributed"]
    assert requeue == ["scontrol", "requeue", "17"]


def slurm(folder, srun, state="RUNNING", **more):
    """Runs the job with `srun` as the body of srun; returns the result and what was requeued."""
    fake(folder, "srun", srun)
    fake(folder, "squeue", f"echo {state}")
    fake(folder, "scontrol", f'echo "$*" >>{folder}/requeued')
    # This clone has no .venv.
    shutil.copytree(LAUNCH, folder / "clone/launch")
    words = ["--restarts=3", "--", *PROGRAM]
    more = {"SLURM_JOB_ID": "17", **more}
    result = call(folder, "slurm.sbatch", *words, cwd=folder / "clone", **more)
    requeued = folder / "requeued"
    return result, requeued.read_text() if requeued.exists() else ""


@pytest.mark.parametrize("code", [0, 2, 75])
def test_slurm_requeues_after_some_codes(tmp_path, code):
    result, requeued = slurm(tmp_path, f"exit {code}")
    assert result.returncode == code
    assert requeued == ("requeue 17\n" if code == 75 else "")


# Runs the words after srun's options as two tasks. Their programs end with $FIRST and $SECOND.
TWO_TASKS = """
while [[ $1 == --* ]]; do shift; done
bash -c "$3" "$4" bash -c "exit $FIRST" || first=$?
bash -c "$3" "$4" bash -c "exit $SECOND" || second=$?
exit $((first > second ? first : second))
"""


@pytest.mark.parametrize(
    ("ends", "code", "queued"),
    [((2, 75), 2, ""), ((143, 75), 143, "requeue 17\n")],
)
def test_slurm_does_not_requeue_after_a_mistake_in_one_task(tmp_path, ends, code, queued):
    result, requeued = slurm(tmp_path, TWO_TASKS, FIRST=str(ends[0]), SECOND=str(ends[1]))
    assert (result.returncode, requeued) == (code, queued), result.stderr
    assert not list((tmp_path / "clone").glob(".slurm_*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_slurm_waits_for_a_program_that_saves_on_a_signal(tmp_path, number, code):
    launch, _ = dry(tmp_path, "slurm.sbatch", "--dry_run", "--", *PROGRAM, SLURM_JOB_ID="17")
    task = launch[launch.index("-c") + 1]
    program = f"trap 'sleep 0.5; exit {code}' {number:d}; echo here; while :; do sleep 0.1; done"
    words = ["bash", "-c", task, str(tmp_path / "mistake"), "bash", "-c", program]
    started = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert started.stdout.readline() == "here\n"
    os.killpg(started.pid, number)  # as slurmstepd does
    assert started.wait(timeout=20) == code
    assert not (tmp_path / "mistake").exists()


@pytest.mark.parametrize(
    ("code", "state", "restarts", "message"),
    [
        (75, "RUNNING", "3", "giving up"),
        (143, "COMPLETING", "0", "the job is COMPLETING: not queueing again"),
    ],
)
def test_slurm_gives_up_and_heeds_scancel(tmp_path, code, state, restarts, message):
    result, requeued = slurm(tmp_path, f"exit {code}", state, SLURM_RESTART_COUNT=restarts)
    assert message in result.stderr and requeued == ""


def test_slurm_needs_a_task_per_gpu_and_the_clone(tmp_path):
    more = {"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "8"}
    result = call(tmp_path, "slurm.sbatch", "--dry_run", "--", "python", **more)
    assert result.returncode == 2 and "--ntasks-per-node=1 must be 8" in result.stderr
    result = call(tmp_path, "slurm.sbatch", "--dry_run", "--", "python", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: launch/common.sh is not in")


def test_jobset_agrees_with_itself():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    hosts = {entry["name"]: entry["value"] for entry in container["env"]}["HOSTS"]
    assert spec["parallelism"] == spec["completions"] == int(hosts)
    assert (jobset["kind"], spec["completionMode"]) == ("JobSet", "Indexed")
    (port,) = container["ports"]
    name = jobset["metadata"]["name"]
    address = f"{name}-{job['name']}-0-0.{name}:{port['containerPort']}"
    numbers = {"--num_processes=$(HOSTS)", "--process_id=$(JOB_COMPLETION_INDEX)"}
    assert {f"--coordinator={address}", *numbers} <= set(container["args"])
    assert "command" not in container
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in spec["template"]["spec"]["volumes"]
    }
    (rule,) = spec["podFailurePolicy"]["rules"]
    final = common("for code in {1..255}; do restartable $code || echo $code; done").split()
    assert set(rule["onExitCodes"]["values"]) <= set(map(int, final))
    # A Job's podFailurePolicy requires these two values.
    assert spec["template"]["spec"]["restartPolicy"] == "Never" and spec["backoffLimit"] == 0


def test_images_are_built_from_files_that_exist_and_from_beams_version():
    for name in ("Dockerfile", "beam.Dockerfile"):
        lines = (LAUNCH / f"{name}.dockerignore").read_text().splitlines()
        files = [line[1:] for line in lines if line.startswith("!")]
        assert files and all(list(ROOT.glob(file)) for file in files)
    beam = (LAUNCH / "beam.Dockerfile").read_text()
    (version,) = re.findall(r"^FROM apache/beam_python3\.12_sdk:(\d+\.\d+)\.0$", beam, re.M)
    assert f"apache-beam>={version}," in (ROOT / "requirements-beam.txt").read_text()
    assert f'"apache-beam[gcp]=={version}.0" gcsfs' in beam
    # The image starts as Beam's own does.
    assert "ENTRYPOINT" not in beam and "CMD" not in beam
