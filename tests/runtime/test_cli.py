"""The edge of programs: every end has its exit code, and every error is one line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from maeast_jax.runtime import cli

ROOT = Path(__file__).parents[2]
CONFIG = """
from ml_collections import ConfigDict

def get_config(batch_size="4"):
    config = ConfigDict({"batch_size": int(batch_size), "rate": 0.5, "model": {"width": 16}})
    return config.lock()
"""


@pytest.fixture
def config(tmp_path):
    """The path of a configuration file."""
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a program in this process; returns its exit code and standard error."""

    def run_once(call, flags_parser):
        sys.exit(call(flags_parser(sys.argv)))

    monkeypatch.setattr(cli.app, "run", run_once)  # absl's own parses the flags only once
    monkeypatch.setattr(cli, "_leave", sys.exit)

    def run(*argv, main=lambda *_: None, start=cli.run, **options):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
        # Loaded again, a module keeps the functions that its new text lacks.
        monkeypatch.delitem(sys.modules, "config_config", raising=False)
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as end:
            start(main, **options)
        return end.value.code, capsys.readouterr().err

    return run


def test_a_program_gets_its_configuration_with_the_fields_set(run, config):
    got = []
    code, told = run(
        f"--config={config}:8", "--workdir=x", "--config.model.width=32",
        main=lambda *given: got.extend(given),
    )  # fmt: skip
    assert (code, told) == (0, "")
    assert (got[0].batch_size, got[0].model.width, got[1]) == (8, 32, "x")


def test_a_program_may_have_a_default_configuration_flags_of_its_own_and_no_workdir(run, config):
    def main(got):
        assert (got.batch_size, got.model.width) == (4, 32)
        assert "config.model.width" in flags.FLAGS and "config.batch_size" not in flags.FLAGS
        return 5

    options = {"main": main, "workdir": False, "default_config": str(config)}
    assert run("--config.model.width=32", **options) == (5, "")
    assert run(f"--config={config}", "--config.model.width=32", **options) == (5, "")
    code, told = run("--config.model.widht=32", **options)
    assert code == 2 and 'Did you mean "width"' in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workdir=x"], "--config is missing (--help lists the flags)"),
        ([], "--config and --workdir are missing (--help lists the flags)"),
        (["--config={}", "--wrokdir=x"], "flag 'wrokdir'. Did you mean: workdir ?"),
        (["--config={}", "--config.model.widht=3"], 'Did you mean "width" instead of "widht"?'),
        (["--config={}", "--batch_size=8"], "; the field is set as --config.batch_size=VALUE"),
        (["--config={}", "--config.model.q=3"], "'q'; maeast_jax/config.py lists the fields"),
        (["--config={}", "--config.batch_size=abc"], "flag --config.batch_size=abc: invalid"),
        (["--config=nowhere.py", "--workdir=x"], "No such file or directory: 'nowhere.py'"),
        (["--config={}", "--workdir=x", "rate=3"], "'rate=3' is not a flag; fields are set as"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(run, config, argv, message):
    code, told = run(*(word.format(config) for word in argv))
    assert code == 2 and told.startswith("error: ") and message in told, told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"{CONFIG}\nmade = get_config\ndef get_config():\n    made().model.widht = 3\n",
            '{}: line 10: AttributeError: Did you mean "width" instead of "widht"?',
        ),
        ("def get_config():\n    return 1 / 0\n", "{}: line 2: ZeroDivisionError: division by"),
        ("x = 3\n\ndef get_config(:\n", "{}: SyntaxError: invalid syntax (config.py, line 3)"),
    ],
)
def test_a_mistake_in_a_configuration_file_is_one_line_that_names_its_place(
    run, config, text, message
):
    config.write_text(text)
    code, told = run(f"--config={config}", "--workdir=x")
    assert code == 2 and message.format(f"--config={config}") in told, told
    assert told.startswith("error: ") and told.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (cli.Interrupted(signal.SIGTERM, 3), 143, "stopped by SIGTERM at step 3, which is saved;"),
        (cli.NonFiniteError("loss is nan"), 3, "error: loss is nan\n"),
        (cli.PeerLostError("it is gone"), 75, "error: it is gone\n"),
        (ValueError("shapes differ"), 2, "error: shapes differ\n"),
        (MemoryError("the devices are full"), 1, "error: the devices are full\n"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device\n"),
        (OSError(13, "Permission denied", "f"), 1, "error: f Permission denied\n"),
        (KeyboardInterrupt(), 130, "error: stopped before it could save: the same command"),
        (ModuleNotFoundError("No module named 'x'"), 2, "error: No module named 'x': pip install"),
    ],
)
def test_every_end_has_its_exit_code_and_is_one_line(run, config, error, code, message):
    def fail(*_):
        raise error

    got, told = run(f"--config={config}", "--workdir=x", main=fail)
    assert got == code and told.startswith(message) and told.count("\n") == 1, told


@pytest.mark.parametrize(
    ("error", "flag", "code"),
    [(RuntimeError("core halted"), (), 70), (ValueError("shapes differ"), ("--verbosity=0",), 2)],
)
def test_an_unexpected_error_and_with_verbosity_a_mistake_keep_their_traceback(
    run, config, error, flag, code
):
    def fail(*_):
        raise error

    got, told = run(f"--config={config}", "--workdir=x", *flag, main=fail)
    assert got == code and "Traceback" in told and str(error) in told


@pytest.mark.parametrize("platform", ["cuda", "gpuu"])
def test_a_device_that_is_not_there_is_one_line(platform):
    program = "import jax; from maeast_jax.runtime import cli; cli.run_flags(jax.devices, ())"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": platform},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = f"error: JAX_PLATFORMS={platform}, but jax finds no such device"
    assert result.returncode == 1 and result.stderr.startswith(told)
    assert result.stderr.count("\n") == 1


def test_a_program_of_several_processes_joins_them_first(run, config):
    calls = []
    options = {"main": lambda *_: calls.append("main"), "join": lambda *given: calls.append(given)}
    argv = [f"--config={config}", "--workdir=x"]
    assert run(*argv, **options) == (0, "") and calls == ["main"]
    calls.clear()
    assert run(*argv, "--distributed", **options) == (0, "")
    assert calls == [(None, None, None), "main"]
    calls.clear()
    address = ["--coordinator=h:1", "--num_processes=2", "--process_id=0"]
    assert run(*argv, *address, **options) == (0, "") and calls == [("h:1", 2, 0), "main"]


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (None, True),
        (cli.Interrupted(signal.SIGTERM, 3), True),
        (cli.NonFiniteError("loss is nan"), True),
        (ValueError("no such file"), False),
        (cli.PeerLostError("it is gone"), False),
    ],
)
def test_a_joined_process_waits_for_the_others_only_at_an_end_they_share(
    run, config, monkeypatch, error, waits
):
    def main(*_):
        if error:
            raise error

    left = []
    monkeypatch.setattr(cli, "_leave", left.append)
    argv = [f"--config={config}", "--workdir=x", "--distributed"]
    code, _ = run(*argv, main=main, join=lambda *_: None)
    assert left == ([] if waits else [code])


def test_a_program_of_flags_alone_gets_the_other_arguments(run, monkeypatch, tmp_path):
    def start(main, required):
        flags.DEFINE_string("output", None, "")
        cli.run_flags(main, required)

    def main(arguments):
        return 0 if arguments == ["a.wav", "b.wav"] else 9

    options = {"main": main, "start": start, "required": ["output"]}
    assert run("a.wav", "--output=x", "b.wav", **options) == (0, "")
    missing = (2, "error: --output is missing (--help lists the flags)\n")
    assert run("a.wav", **options) == missing
    assert run("a.wav", "--output=", **options) == missing
    code, told = run("--ouptut=x", **options)
    assert code == 2 and "'ouptut'. Did you mean: output ? (--help lists the flags)\n" in told
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-a.wav").touch()
    code, told = run("-a.wav", "--output=x", **options)
    assert code == 2 and told.endswith("'a.wav'; to name the file, write ./-a.wav\n")


def run_program(text, *argv, **variables):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-c", text, *map(str, argv)]
    return subprocess.run(
        command,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=60,
    )


def test_ctrl_c_ends_a_program_where_python_drops_its_exception():
    """Python drops what a callback of its garbage collector raises, and jax has such a callback."""
    done = run_program("""
import gc, os, signal
from maeast_jax.runtime import cli

def collected(phase, info):
    os.kill(os.getpid(), signal.SIGINT)

def main(arguments):
    gc.callbacks.append(collected)
    gc.collect()
    print("the program ran on")

cli.run_flags(main, required=())
""")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == "error: interrupted, nothing was written"


def test_ctrl_c_lets_a_program_clean_up_and_stays_ignored_where_the_shell_says_so():
    text = """
import os, signal, sys
from maeast_jax.runtime import cli

def main(arguments):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        print("cleaned up")

if sys.argv[1:]:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
cli.run_flags(main, required=())
"""
    done = run_program(text)
    assert (done.returncode, done.stdout) == (130, "cleaned up\n")
    assert done.stderr == "error: interrupted, nothing was written\n"
    assert run_program(text, "ignored").returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_ends_no_program(encoding):
    done = run_program(
        """
import sys
import tqdm
from maeast_jax.runtime import cli

def main(arguments):
    for _ in tqdm.tqdm(range(3), desc="folds"):
        print("日本  84.5 ± 1.0 (5)")
    raise ValueError("no class 日本")

cli.run_flags(main, required=())
""",
        PYTHONIOENCODING=encoding,
    )
    sign = "±".encode(encoding, "backslashreplace").decode("utf-8", "replace")
    assert done.stdout == rf"\u65e5\u672c  84.5 {sign} 1.0 (5)" "\n" * 3
    assert done.returncode == 2 and "3/3" in done.stderr
    assert done.stderr.endswith("error: no class \\u65e5\\u672c\n")


def test_a_run_goes_on_where_its_terminal_or_the_reader_of_its_pipe_is_gone():
    text = """
import sys
from maeast_jax.runtime import cli

def main(arguments):
    print("ready", flush=True)
    sys.stdin.read(1)
    for step in range(3):
        print("step", step, file=sys.stderr)
    print("to standard output", flush=True)
    raise cli.Interrupted(15, 3)

cli.run_flags(main, required=())
"""
    for reading, writing in (os.openpty(), os.pipe()):
        with subprocess.Popen(
            [sys.executable, "-c", text], env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE, stdout=writing, stderr=writing,
        ) as program:  # fmt: skip
            os.close(writing)
            assert os.read(reading, 5) == b"ready"
            os.close(reading)
            program.stdin.write(b"x")
        assert program.returncode == 143


def test_other_failures_to_print_are_errors():
    with open("/dev/full", "w") as full:
        text = (
            "from maeast_jax.runtime import cli; cli.run_flags(lambda _: print(1, flush=True), ())"
        )
        command = [sys.executable, "-c", text]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.stderr.startswith("error: No space left on device\n") and done.returncode


@pytest.mark.parametrize("is_imported", [True, False])
def test_jax_computes_alike_whatever_the_shell_says(is_imported):
    done = run_program(
        f"""
import sys
from maeast_jax.runtime import cli
{"import jax" if is_imported else ""}

def main(arguments):
    import jax
    print(jax.numpy.ones(1, float).dtype, jax.config.jax_threefry_partitionable)

cli.run_flags(main, required=())
""",
        JAX_ENABLE_X64="1",
        JAX_THREEFRY_PARTITIONABLE="0",
    )
    assert done.stdout == "float32 True\n", done.stderr


# Orbax logs a page per thread about a full disk, and then raises the exception itself.
FULL_DISK = """
from absl import logging
from maeast_jax.runtime import cli

def main(config, workdir):
    try:
        raise OSError(28, "No space left on device")
    except OSError:
        logging.exception("a page of Orbax's")
    logging.warning("a warning")
    raise OSError(28, "No space left on device")

cli.run(main)
"""


def test_pages_that_libraries_log_about_an_error_are_left_out_and_warnings_are_not(config):
    argv = [f"--config={config}", "--workdir=x"]
    done = run_program(FULL_DISK, *argv)
    told = done.stderr.splitlines()
    assert done.returncode == 1 and told[-1] == "error: No space left on device"
    assert len(told) == 2 and "a warning" in told[0], done.stderr
    assert "a page of Orbax's" in run_program(FULL_DISK, *argv, "--verbosity=0").stderr


def test_help_lists_the_flags_and_is_no_error():
    done = run_program(FULL_DISK, "--help")
    assert done.returncode == 0 and "--workdir" in done.stdout and "--config" in done.stdout
