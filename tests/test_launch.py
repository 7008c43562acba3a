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
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
PROGRAMS = ["local_multiprocess.sh", "tpu_vm.sh", "worker.sh"]
# Words that a shell would split, expand or end at.
AWKWARD = ["--config.data.train=a*0.7,b c", '--name=it\'s "$HOME" `x` \\ &']

# What it does is told by plan.json, by process and start: a code to end with; "kill" itself; "wait"
# for a signal; "hang" in spite of one; end "late", with 75 once all others are gone, or "later",
# with 1 a while after that; "go 2": end with 2 once there is a file `go`.
STAND_IN = """
import json, os, signal, sys, time

folder = sys.argv[1]
process = ([w.split("=")[1] for w in sys.argv if w.startswith("--process_id=")] or ["0"])[0]
caught = []
signal.signal(signal.SIGTERM, lambda *_: caught.append(143))
signal.signal(signal.SIGINT, lambda *_: caught.append(130))
with open(f"{folder}/plan.json") as file:
    plan = json.load(file)


def starts(process):
    path = f"{folder}/starts_{process}"
    return [json.loads(line) for line in open(path)] if os.path.exists(path) else []


def gone(process, number):
    try:
        return len(starts(process)) >= number and os.kill(starts(process)[number - 1]["pid"], 0)
    except ProcessLookupError:
        return True


print(f"process {process} here", flush=True)
with open(f"{folder}/starts_{process}", "a") as file:
    seen = {name: os.environ.get(name) for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")}
    file.write(json.dumps({"words": sys.argv[2:], "pid": os.getpid(), **seen}) + "\\n")
number = len(starts(process))
action = plan[int(process)][number - 1]
if action == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
while action == "hang":
    time.sleep(0.05)
while action == "wait":
    time.sleep(0.05)
    if caught:
        open(f"{folder}/saved_{process}", "w").close()
        sys.exit(caught[0])
if action in ("late", "later"):
    while not all(gone(i, number) for i in range(len(plan)) if i != int(process)):
        time.sleep(0.05)
    time.sleep(1.5 if action == "later" else 0)
    action = 1 if action == "later" else 75
if str(action).startswith("go"):
    while not os.path.exists(f"{folder}/go"):
        time.sleep(0.05)
    open(f"{folder}/gone_{process}", "w").close()
    action = int(action.split()[1])
sys.exit(action)
"""


def environment(folder, **more):
    """Fakes first, so that no test reaches a real gcloud; nothing of a SLURM job around us."""
    fakes = folder / "fakes"
    fakes.mkdir(exist_ok=True)
    if not (fakes / "gcloud").exists():
        fake(folder, "gcloud", f"echo called >>{folder}/gcloud_called; exit 99")
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "JAX_", "DRY_RUN"))
    }
    return {**own, "PATH": f"{fakes}:{os.environ['PATH']}", **more}


def fake(folder, name, body):
    path = folder / "fakes" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def call(folder, script, *words, cwd=ROOT, timeout=60, **more):
    return subprocess.run(
        ["bash", str(script if "/" in str(script) else LAUNCH / script), *words],
        cwd=cwd,
        env=environment(folder, **more),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def dry(folder, script, *words, **more):
    """The words of each command that a dry run prints, and that it ran none."""
    result = call(folder, script, *words, **more)
    assert result.returncode == 0, result.stderr
    assert not (folder / "gcloud_called").exists()
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
    result = subprocess.run(
        [shellcheck, "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_help(tmp_path, name):
    assert (LAUNCH / name).stat().st_mode & stat.S_IXUSR
    result = call(tmp_path, name, "--help")
    assert result.returncode == 0
    assert f"launch/{name}" in result.stdout
    assert "set -euo" not in result.stdout


TPU = ("--name=mae", "--zone=z")


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("local_multiprocess.sh", [], "no program; write -- PROGRAM"),
        ("local_multiprocess.sh", ["python"], "python is not an option"),
        ("local_multiprocess.sh", ["--processes=0", "--", "x"], "--processes=0 must be a whole"),
        ("local_multiprocess.sh", ["--processes=08", "--", "x"], "--processes=08 must be a whole"),
        ("local_multiprocess.sh", ["--restarts=-1", "--", "x"], "--restarts=-1 must be a whole"),
        ("local_multiprocess.sh", ["--port=70000", "--", "x"], "must be below 65536"),
        ("local_multiprocess.sh", ["--proceses=2", "--", "x"], "--proceses=2 is not an option"),
        ("tpu_vm.sh", ["begin", *TPU], "begin is not a command; there are: create wait"),
        ("tpu_vm.sh", ["wait", "--zone=z"], "--name is missing"),
        ("tpu_vm.sh", ["wait", "--name=mae"], "--zone is missing"),
        ("tpu_vm.sh", ["wait", "--name=My TPU", "--zone=z"], "must be lower-case"),
        ("tpu_vm.sh", ["create", *TPU], "--type is missing"),
        ("tpu_vm.sh", ["create", *TPU, "--type=v9-8"], "name it with --version=RUNTIME"),
        ("tpu_vm.sh", ["start", *TPU], "no program; write -- PROGRAM"),
        ("tpu_vm.sh", ["resume", *TPU, "--type=v4-8"], "no program; write -- PROGRAM"),
        ("tpu_vm.sh", ["fetch", *TPU], "no folder to fetch; write -- --workdir=DIR"),
        ("tpu_vm.sh", ["start", *TPU, "--spt"], "--spt is not an option"),
        (
            "local_multiprocess.sh",
            ["--", "python", "-m", "maeast_jax.finetune"],
            "maeast_jax.finetune runs in one process: start it by itself",
        ),
        ("tpu_vm.sh", ["start", *TPU, "--", "python", "-m", "maeast_jax.embed"], "runs in one"),
        ("slurm.sbatch", ["--", "python", "-m", "maeast_jax.finetune"], "runs in one process"),
        ("worker.sh", ["begin"], "begin is not a command"),
        ("worker.sh", ["start"], "no program; write -- PROGRAM"),
        ("slurm.sbatch", [], "no program; write -- PROGRAM"),
        ("slurm.sbatch", ["--nodes=2", "--", "x"], "--nodes=2 is not an option"),
        ("slurm.sbatch", ["--", "x"], "this is not a SLURM job"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, script, words, message):
    result = call(tmp_path, script, *words)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "gcloud_called").exists()


def common(code):
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source {LAUNCH}/common.sh; {code}", "bash", *AWKWARD],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_exit_codes_that_bring_a_run_back():
    told = common("for code in {0..255}; do ! restartable $code || echo $code; done")
    assert set(map(int, told.split())) == {70, 75, *range(129, 256)} - {130}


def test_commands_are_shown_as_a_shell_takes_them():
    shown = common('quote python "$@"')
    assert shlex.split(shown) == ["python", *AWKWARD]
    assert shown.startswith("python ")
    assert subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {shown}"], capture_output=True, text=True
    ).stdout.splitlines() == ["python", *AWKWARD]


class Local:
    """launch/local_multiprocess.sh on a program that does as it is told."""

    def __init__(self, folder, plan):
        self.folder = folder
        (folder / "stand_in.py").write_text(STAND_IN)
        (folder / "plan.json").write_text(json.dumps(plan))
        self.program = [sys.executable, str(folder / "stand_in.py"), str(folder)]
        self.processes = f"--processes={len(plan)}"

    def words(self, *options):
        return [self.processes, f"--log_dir={self.folder}/logs", *options, "--", *self.program]

    def run(self, *options):
        return call(self.folder, "local_multiprocess.sh", *self.words(*options), *AWKWARD)

    def popen(self, *options):
        return subprocess.Popen(
            ["bash", str(LAUNCH / "local_multiprocess.sh"), *self.words(*options)],
            env=environment(self.folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Where the tests run in the background, Ctrl-C is ignored, and bash keeps to that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            process_group=0,
        )

    def starts(self, process):
        path = self.folder / f"starts_{process}"
        return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []

    def saved(self):
        return sorted(path.name for path in self.folder.glob("saved_*"))


def port(start):
    return next(word for word in start["words"] if word.startswith("--coordinator="))


def test_local_dry_run(tmp_path):
    first, second = dry(
        tmp_path,
        "local_multiprocess.sh",
        *("--devices_per_process=2", "--port=4321", "--dry_run", "--", "python", *AWKWARD),
    )
    cpu = ["env", "JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=2"]
    together = ["--coordinator=127.0.0.1:4321", "--num_processes=2"]
    assert first == [*cpu, "python", *AWKWARD, *together, "--process_id=0"]
    assert second == [*cpu, "python", *AWKWARD, *together, "--process_id=1"]


def test_local_starts_all_and_ends_with_0(tmp_path):
    local = Local(tmp_path, [[0], [0], [0]])
    result = local.run("--devices_per_process=4")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "process 0 here\n"
    assert (tmp_path / "logs/process_2.log").read_text() == "process 2 here\n"
    (start,) = local.starts(2)
    assert start["words"] == [*AWKWARD, port(start), "--num_processes=3", "--process_id=2"]
    assert (start["JAX_PLATFORMS"], start["JAX_NUM_CPU_DEVICES"]) == ("cpu", "4")
    assert port(local.starts(0)[0]) == port(start)


def test_local_leaves_the_devices_to_jax_unless_told(tmp_path):
    local = Local(tmp_path, [[0]])
    assert local.run().returncode == 0
    assert local.starts(0)[0]["JAX_PLATFORMS"] is None


@pytest.mark.parametrize("first", [75, "late", "later"])
def test_local_starts_again_after_a_lost_process(tmp_path, first):
    local = Local(tmp_path, [[first, 0], ["kill", 0]])
    result = local.run()
    assert result.returncode == 0, result.stderr
    assert "starting again, 2 more restarts" in result.stderr
    assert len(local.starts(0)) == len(local.starts(1)) == 2
    assert port(local.starts(0)[1]) == port(local.starts(1)[1])


def test_local_gives_up(tmp_path):
    local = Local(tmp_path, [[75, 75, 75], [75, 75, 75]])
    result = local.run("--restarts=1")
    assert result.returncode == 75
    assert "code 75 again after 1 restarts: giving up" in result.stderr
    assert len(local.starts(0)) == 2


@pytest.mark.parametrize("code", [1, 2, 3, 130])
def test_local_stops_on_what_a_restart_does_not_mend(tmp_path, code):
    local = Local(tmp_path, [["late"], [code]])
    result = local.run()
    assert result.returncode == code
    assert f"process 1 ended with code {code}" in result.stderr
    assert "process 1 | process 1 here" in result.stderr
    assert len(local.starts(0)) == len(local.starts(1)) == 1


def test_local_takes_a_mistake_for_the_cause_of_what_is_found_with_it(tmp_path):
    local = Local(tmp_path, [["go 75"], ["go 2"]])
    launcher = local.popen()
    wait_for(lambda: local.starts(0) and local.starts(1))
    # Both end while the launcher does not look.
    launcher.send_signal(signal.SIGSTOP)
    (tmp_path / "go").touch()
    wait_for(lambda: len(list(tmp_path.glob("gone_*"))) == 2)
    time.sleep(1)
    launcher.send_signal(signal.SIGCONT)
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 2, output
    assert "process 1 ended with code 2" in output


def test_local_kills_what_does_not_end(tmp_path):
    local = Local(tmp_path, [["hang"], [2]])
    began = time.monotonic()
    result = local.run("--grace=1")
    assert result.returncode == 2
    assert "did not end within 1 s and are killed" in result.stderr
    assert 1 <= time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(local.starts(0)[0]["pid"], 0)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)]
)
@pytest.mark.parametrize("whole_group", [False, True])
def test_local_passes_signals_on(tmp_path, number, code, whole_group):
    """To the whole group, as a terminal and `timeout` send them, they end its sleep as well."""
    local = Local(tmp_path, [["wait"], ["wait"]])
    launcher = local.popen()
    wait_for(lambda: local.starts(0) and local.starts(1))
    launcher.send_signal(number)
    if whole_group:
        os.killpg(launcher.pid, number)
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == code, output
    assert local.saved() == ["saved_0", "saved_1"]
    assert len(local.starts(0)) == 1


def test_local_starts_again_what_was_told_to_save_and_end(tmp_path):
    local = Local(tmp_path, [["wait", 0], ["wait", 0]])
    launcher = local.popen()
    wait_for(lambda: local.starts(0) and local.starts(1))
    for process in (1, 0):
        os.kill(local.starts(process)[0]["pid"], signal.SIGTERM)
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 0, output
    assert len(local.starts(0)) == len(local.starts(1)) == 2


@pytest.fixture
def worker(tmp_path):
    """A machine's folder, with launch/ as it is sent there, and what runs worker.sh in it."""
    clone = tmp_path / "maeast_jax"
    shutil.copytree(LAUNCH, clone / "launch")
    yield lambda *words: call(tmp_path, clone / "launch/worker.sh", *words, cwd=tmp_path)
    call(tmp_path, clone / "launch/worker.sh", "stop", cwd=tmp_path)


def test_worker_brings_a_program_back(tmp_path, worker):
    local = Local(tmp_path, [["kill", 75, 0]])
    result = worker("start", "--delay=0", "--", *local.program, *AWKWARD)
    assert result.returncode == 0, result.stderr
    status = tmp_path / "maeast_jax/.worker/status"
    wait_for(lambda: "ended with code 0" in status.read_text() if status.exists() else False)
    assert [start["words"] for start in local.starts(0)] == [AWKWARD] * 3
    log = (tmp_path / "maeast_jax/.worker/log").read_text()
    assert "ended with code 137" in log
    assert "starting again in 0 s, 18 more restarts" in log
    assert "ended with code 0" in worker("status").stdout


def test_worker_leaves_a_mistake_alone(tmp_path, worker):
    local = Local(tmp_path, [[2, 0]])
    worker("start", "--delay=0", "--", *local.program)
    status = tmp_path / "maeast_jax/.worker/status"
    wait_for(lambda: "ended with code 2" in status.read_text() if status.exists() else False)
    time.sleep(0.5)
    assert len(local.starts(0)) == 1


def test_worker_knows_a_program_that_need_not_start_again(tmp_path, worker):
    local = Local(tmp_path, [[2, "wait"]])
    assert worker("over", "--", *local.program).stdout == ""  # nothing was started
    status = tmp_path / "maeast_jax/.worker/status"
    worker("start", "--", *local.program, *AWKWARD)
    wait_for(lambda: "ended with code 2" in status.read_text() if status.exists() else False)
    wait_for(lambda: worker("over", "--", *local.program, *AWKWARD).stdout.startswith("ended with"))
    assert worker("over", "--", *local.program).stdout == ""  # another program
    worker("start", "--", *local.program, *AWKWARD)
    wait_for(lambda: len(local.starts(0)) == 2)
    assert worker("over", "--", *local.program, *AWKWARD).stdout == ""
    worker("stop")
    assert worker("over", "--", *local.program, *AWKWARD).stdout == ""  # it is to go on


def test_worker_stops_and_does_not_start_twice(tmp_path, worker):
    local = Local(tmp_path, [["wait", 0]])
    worker("start", "--", *local.program)
    wait_for(lambda: local.starts(0))
    assert worker("status").stdout.startswith("running since")
    again = worker("start", "--", *local.program)
    assert (again.returncode, "runs already" in again.stderr) == (0, True)
    other = worker("start", "--", "true")
    assert other.returncode == 2
    assert "another command runs here" in other.stderr
    result = worker("stop")
    assert "ended with code 143" in result.stdout, result.stderr
    assert local.saved() == ["saved_0"]
    assert len(local.starts(0)) == 1


def test_worker_knows_a_program_that_outlived_its_loop(tmp_path, worker):
    local = Local(tmp_path, [["wait"]])
    worker("start", "--", *local.program)
    wait_for(lambda: local.starts(0))
    os.kill(int((tmp_path / "maeast_jax/.worker/pid").read_text()), signal.SIGKILL)
    assert "runs already" in worker("start", "--", *local.program).stderr
    assert worker("stop").stdout.startswith("ended unseen, running since")
    assert local.saved() == ["saved_0"]


PROGRAM = ["python", "-m", "maeast_jax.train", *AWKWARD, "--workdir=gs://bucket/run"]
VM = ["gcloud", "compute", "tpus", "tpu-vm"]
QUEUE = ["gcloud", "compute", "tpus", "queued-resources"]
PLACE = ["--zone=z", "--project=p"]
NEW = ["create", "mae", *PLACE]


def tpu_dry(folder, verb, *options, program=PROGRAM):
    return dry(
        folder, "tpu_vm.sh", verb, "--name=mae", *PLACE, *options, "--dry_run", "--", *program
    )


def remote(command):
    (text,) = (word for word in command if word.startswith("--command="))
    return shlex.split(text.removeprefix("--command="))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--type=v4-16"],
            [*VM, *NEW, "--version=tpu-ubuntu2204-base", "--accelerator-type=v4-16"],
        ),
        (
            ["--type=v6e-16", "--spot", "--create_flag=--network=my net"],
            [
                *(*VM, *NEW, "--version=v2-alpha-tpuv6e", "--accelerator-type=v6e-16"),
                *("--spot", "--network=my net"),
            ],
        ),
        (
            ["--type=v5litepod-16", "--spot", "--queued"],
            [
                *(*QUEUE, *NEW, "--node-id=mae", "--runtime-version=v2-alpha-tpuv5-lite"),
                *("--accelerator-type=v5litepod-16", "--spot"),
            ],
        ),
        (
            ["--type=v9-1", "--version=mine", "--queued"],
            [*QUEUE, *NEW, "--node-id=mae", "--runtime-version=mine", "--accelerator-type=v9-1"],
        ),
    ],
)
def test_tpu_create(tmp_path, options, expected):
    assert tpu_dry(tmp_path, "create", *options) == [expected]


def test_tpu_commands(tmp_path):
    pack, send, unpack = tpu_dry(tmp_path, "install", "--ssh_flag=--internal-ip")
    assert pack[:3] == ["git", "-C", str(ROOT)]
    (archive,) = (word.removeprefix("--output=") for word in pack if word.startswith("--output="))
    assert send == [*VM, "scp", archive, "mae:", *PLACE, "--worker=all", "--internal-ip"]
    assert unpack[:8] == [*VM, "ssh", "mae", *PLACE]
    assert unpack[8:10] == ["--worker=all", "--internal-ip"]
    assert remote(unpack)[-2:] == ["maeast_jax/launch/worker.sh", "install"]

    (start,) = tpu_dry(tmp_path, "start")
    assert start[:9] == [*VM, "ssh", "mae", *PLACE, "--worker=all"]
    program = ["maeast_jax/launch/worker.sh", "start", "--", *PROGRAM, "--distributed"]
    assert remote(start) == program

    (follow,) = tpu_dry(tmp_path, "follow")
    assert "--worker=0" in follow
    (stop,) = tpu_dry(tmp_path, "stop")
    assert "--worker=all" in stop
    assert remote(stop) == ["maeast_jax/launch/worker.sh", "stop"]
    *_, status = tpu_dry(tmp_path, "status", "--queued")
    assert "--worker=all" in status
    assert tpu_dry(tmp_path, "delete") == [[*VM, "delete", "mae", *PLACE]]
    assert tpu_dry(tmp_path, "delete", "--queued") == [[*QUEUE, "delete", "mae", *PLACE, "--force"]]


def test_tpu_fetch(tmp_path):
    assert tpu_dry(tmp_path, "fetch", "--to=here")[1] == (
        ["gcloud", "storage", "rsync", "--recursive", "gs://bucket/run", "here/run"]
    )
    (_, copy) = tpu_dry(tmp_path, "fetch", program=["--workdir=runs/mine/"])
    assert copy[4:8] == ["scp", "--recurse", "mae:maeast_jax/runs/mine", "runs"]
    (_, copy) = tpu_dry(tmp_path, "fetch", program=["--workdir=/mnt/runs/mine"])
    assert copy[6] == "mae:/mnt/runs/mine"


def test_tpu_resume_dry(tmp_path):
    commands = tpu_dry(tmp_path, "resume", "--type=v6e-16", "--spot", "--queued")
    verbs = [command[4] if command[0] == "gcloud" else command[0] for command in commands]
    look = ["describe", "describe"]
    assert verbs == [*look, "delete", "create", *look, "git", "scp", *["ssh"] * 5]
    assert commands[2][-1] == "--quiet"


@pytest.mark.parametrize(
    ("queued", "states", "verbs"),
    [
        ([], ["READY"], ["describe", "ssh", "ssh", "ssh"]),
        (
            [],
            ["PREEMPTED", "READY"],
            ["describe", "delete", "create", "describe", "scp", "ssh", "ssh"],
        ),
        ([], ["NOT_FOUND", "READY"], ["describe", "create", "describe", "scp", "ssh", "ssh"]),
        ([], ["CREATING", "READY"], ["describe", "describe", "scp", "ssh", "ssh"]),
        (["--queued"], ["ACTIVE", "READY"], ["describe", "describe", "ssh", "ssh", "ssh"]),
        (
            ["--queued"],
            ["SUSPENDED", "ACTIVE", "READY"],
            ["describe", "delete", "create", "describe", "describe", "scp", "ssh", "ssh"],
        ),
        ([], ["denied"], ["describe"]),
        (["--queued"], ["denied"], ["describe"]),
    ],
)
def test_tpu_resume(tmp_path, queued, states, verbs):
    result, calls = resume(tmp_path, queued, states)
    assert [words[3] for words in calls] == verbs, result.stderr
    if states == ["denied"]:
        assert result.returncode == 1
        assert "PERMISSION_DENIED" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert "worker.sh start -- python -m maeast_jax.train" in " ".join(calls[-1])


def test_tpu_resume_leaves_alone_what_has_come_to_its_end(tmp_path):
    result, calls = resume(tmp_path, [], ["READY"], told="ended with code 0 at 2026-01-01 00:00:00")
    assert result.returncode == 4
    assert "the program has ended with code 0 at 2026" in result.stderr
    assert [words[3] for words in calls] == ["describe", "ssh", "ssh"]
    assert "worker.sh over -- python -m maeast_jax.train" in " ".join(calls[-1])


@pytest.mark.parametrize(
    ("queued", "states", "told"),
    [
        ([], ["CREATING"], ["CREATING"]),
        (["--queued"], ["WAITING_FOR_RESOURCES"], ["WAITING_FOR_RESOURCES"]),
        ([], ["READY"], ["READY", "running since"]),
    ],
)
def test_tpu_status(tmp_path, queued, states, told):
    result, _ = resume(tmp_path, queued, states, "status", told="running since")
    assert (result.returncode, result.stdout.splitlines()) == (0, told), result.stderr


def resume(tmp_path, queued, states, verb="resume", told=""):
    """Against a gcloud that tells one state after another, and workers that say `told`."""
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    fake(
        tmp_path,
        "gcloud",
        f"""
        cd {tmp_path}
        printf '%s ' "$@" >>calls; echo >>calls
        [[ $4 != ssh || -z "{told}" ]] || echo "{told}"
        [[ $4 == describe ]] || exit 0
        state=$(head -n 1 states)
        sed -i 1d states
        case $state in
          NOT_FOUND) echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2; exit 1 ;;
          denied) echo "ERROR: (gcloud) PERMISSION_DENIED" >&2; exit 1 ;;
        esac
        echo "$state"
        """,
    )
    fake(tmp_path, "git", 'echo "git $*" >>"$(dirname "$0")/../git_calls"; echo /nowhere')
    options = [*TPU, "--type=v6e-16", *queued]
    result = call(tmp_path, "tpu_vm.sh", verb, *options, "--", *PROGRAM)
    return result, [line.split() for line in (tmp_path / "calls").read_text().splitlines()]


@pytest.mark.parametrize("flag", [["--dry_run"], []])
def test_slurm_dry_run(tmp_path, flag):
    more = {} if flag else {"DRY_RUN": "1"}
    slurm = {"SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "6"}
    launch, requeue = dry(tmp_path, "slurm.sbatch", *flag, "--", *PROGRAM, **more, **slurm)
    assert launch[0] == "srun"
    options = launch[1 : launch.index("python")]
    assert set(options) >= {"--kill-on-bad-exit=0", "--gpu-bind=none", "--cpus-per-task=6"}
    assert options[-4:-2] == ["bash", "-c"] and options[-1].endswith("/.slurm_17")
    assert launch[launch.index("python") :] == [*PROGRAM, "--distributed"]
    assert requeue == ["scontrol", "requeue", "17"]


def test_slurm_asks_for_a_task_a_gpu():
    head = [
        line for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if "#SBATCH" in line
    ]
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in head)
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert asked["signal"] == "TERM@300"
    assert {"requeue", "open-mode"} <= set(asked)


def slurm(folder, code, state="RUNNING", srun=None, **more):
    fake(folder, "srun", srun or f"exit {code}")
    fake(folder, "squeue", f"echo {state}")
    fake(folder, "scontrol", f'echo "$*" >>{folder}/requeued')
    # From a folder without an environment of its own.
    (folder / "clone").mkdir()
    shutil.copytree(LAUNCH, folder / "clone/launch")
    words = ["--restarts=3", "--", *PROGRAM]
    script = LAUNCH / "slurm.sbatch"
    result = call(folder, script, *words, cwd=folder / "clone", SLURM_JOB_ID="17", **more)
    requeued = folder / "requeued"
    return result, requeued.read_text() if requeued.exists() else ""


@pytest.mark.parametrize("code", [75, 137, 143])
def test_slurm_queues_again(tmp_path, code):
    result, requeued = slurm(tmp_path, code)
    assert (result.returncode, requeued) == (code, "requeue 17\n")


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130])
def test_slurm_ends(tmp_path, code):
    result, requeued = slurm(tmp_path, code)
    assert (result.returncode, requeued) == (code, "")


# Runs what comes after srun's options as two tasks, PROGRAM in them standing for its end.
TWO_TASKS = """
while [[ $1 == --* ]]; do shift; done
bash -c "$3" "$4" bash -c "exit $FIRST" || first=$?
bash -c "$3" "$4" bash -c "exit $SECOND" || second=$?
exit $((first > second ? first : second))
"""


@pytest.mark.parametrize(
    ("ends", "code", "queued"),
    [((2, 75), 2, ""), ((134, 1), 1, ""), ((143, 75), 143, "requeue 17\n")],
)
def test_slurm_heeds_a_mistake_in_one_task(tmp_path, ends, code, queued):
    more = {"FIRST": str(ends[0]), "SECOND": str(ends[1])}
    result, requeued = slurm(tmp_path, None, srun=TWO_TASKS, **more)
    assert (result.returncode, requeued) == (code, queued), result.stderr
    assert not list((tmp_path / "clone").glob(".slurm_*"))


def test_slurm_waits_for_a_program_that_saves_on_sigterm(tmp_path):
    (tmp_path / "clone").mkdir()
    launch, _ = dry(tmp_path, "slurm.sbatch", "--dry_run", "--", *PROGRAM, SLURM_JOB_ID="17")
    task = launch[launch.index("-c") + 1]
    program = "trap 'sleep 0.5; exit 143' TERM; echo here; while :; do sleep 0.1; done"
    words = ["bash", "-c", task, str(tmp_path / "mistake"), "bash", "-c", program]
    started = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert started.stdout.readline() == "here\n"
    os.killpg(started.pid, signal.SIGTERM)  # as slurmstepd does
    assert started.wait(timeout=20) == 143
    assert not (tmp_path / "mistake").exists()


def test_slurm_gives_up_and_heeds_scancel(tmp_path):
    (tmp_path / "a").mkdir()
    result, requeued = slurm(tmp_path / "a", 75, SLURM_RESTART_COUNT="3")
    assert "giving up" in result.stderr
    assert requeued == ""
    (tmp_path / "b").mkdir()
    result, requeued = slurm(tmp_path / "b", 143, state="COMPLETING")
    assert "the job is COMPLETING: not queueing again" in result.stderr
    assert requeued == ""


def test_slurm_says_what_is_missing(tmp_path):
    script = LAUNCH / "slurm.sbatch"
    more = {"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "8"}
    result = call(tmp_path, script, "--dry_run", "--", "python", **more)
    assert result.returncode == 2
    assert "--ntasks-per-node=1 must be the node's 8 GPUs" in result.stderr
    result = call(tmp_path, script, "--dry_run", "--", "python", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: launch/common.sh is not in")


def test_jobset_agrees_with_itself():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    name = jobset["metadata"]["name"]
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    hosts = {entry["name"]: entry["value"] for entry in container["env"]}["HOSTS"]
    assert spec["parallelism"] == spec["completions"] == int(hosts)
    assert spec["completionMode"] == "Indexed"
    args = container["args"]
    (coordinator,) = (word for word in args if word.startswith("--coordinator="))
    (at,) = container["ports"]
    address = f"{name}-{job['name']}-0-0.{name}:{at['containerPort']}"
    assert coordinator == f"--coordinator={address}"
    assert {"--num_processes=$(HOSTS)", "--process_id=$(JOB_COMPLETION_INDEX)"} <= set(args)
    assert "command" not in container
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in spec["template"]["spec"]["volumes"]
    }


def test_jobset_stops_where_the_launchers_stop():
    spec = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["values"] == [1, 2, 3, 130]
    assert rule["onExitCodes"]["containerName"] == "maeast"
    # What a Job's podFailurePolicy asks for.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["backoffLimit"] == 0
    (policy,) = spec["failurePolicy"]["rules"]
    assert policy == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}


def test_dockerfile():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    steps = [line for line in lines if line and not line.startswith(("#", " "))]
    order = ["COPY requirements.txt", "RUN python -m pip install", "COPY . .", "USER maeast"]
    places = [next(i for i, step in enumerate(steps) if step.startswith(s)) for s in order]
    assert places == sorted(places)
    assert '-r /tmp/requirements.txt "jax[cuda13]"' in steps[places[1]]
    kept = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in kept if line.startswith("!")]
    assert {"configs", "maeast_jax", "requirements.txt"} <= set(kept)
    assert all((ROOT / name).exists() for name in kept)


def test_dockerfile_of_beams_workers():
    """It starts as Beam's image does, has its version, and is given what it copies."""
    lines = (LAUNCH / "beam.Dockerfile").read_text().splitlines()
    steps = [line for line in lines if line and not line.startswith(("#", " "))]
    (version,) = re.findall(r"^FROM apache/beam_python3\.12_sdk:(\d+\.\d+)\.0$", steps[0])
    assert f"apache-beam>={version}," in (ROOT / "requirements-beam.txt").read_text()
    assert f'    "apache-beam[gcp]=={version}.0" gcsfs' in lines
    assert not [step for step in steps if step.startswith(("ENTRYPOINT", "CMD"))]
    kept = (LAUNCH / "beam.Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in kept if line.startswith("!")}
    copied = {name for step in steps if step.startswith("COPY") for name in step.split()[1:-1]}
    assert copied - {"requirements.txt"} == kept
    assert all(list(ROOT.glob(name)) for name in kept)
