"""The edge of programs: what goes wrong is one line."""

import os
import re
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from maeast_jax.runtime import cli

# What Orbax does of a full disk: a page a thread, and then the exception itself.
PROGRAM = """
import threading
from absl import logging
from maeast_jax.runtime import cli

def write():
    try:
        raise OSError(28, "No space left on device")
    except OSError:
        logging.exception("a page of Orbax's")

def main(config, workdir):
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    logging.warning("a warning")
    raise OSError(28, "No space left on device")

cli.run(main)
"""


def run(*flags, config="tests/tiny.py"):
    return run_with(f"--config={config}", "--workdir=x", *flags)


def run_with(*flags):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *flags],
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_what_libraries_print_of_an_error_is_left_out_and_warnings_are_not():
    done = run()
    assert done.returncode == 1
    told = done.stderr.splitlines()
    assert told[-1] == "error: No space left on device"
    assert len(told) == 2 and "a warning" in told[0], done.stderr


def test_with_verbosity_all_of_it_is_there():
    done = run("--verbosity=0")
    assert done.returncode == 1 and "a page of Orbax's" in done.stderr


@pytest.mark.parametrize("verbosity", [None, "0"])
def test_a_mistake_has_a_traceback_with_verbosity_alone(capsys, verbosity):
    def fail():
        raise ValueError("shapes differ")

    with pytest.raises(SystemExit) as end, flagsaver.flagsaver():
        flags.FLAGS.mark_as_parsed()
        flags.FLAGS["verbosity"].present = int(verbosity is not None)
        cli._guard(fail, "interrupted")
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.endswith("error: shapes differ\n")
    assert ("Traceback" in told) == (verbosity is not None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "from maeast_jax import config\ndef get_config():\n    c = config.pretrain()\n"
            "    c.model.widht = 3\n    return c\n",
            "{file}, line 4: 'widht' is not a field; did you mean 'width'?",
        ),
        ("def get_config():\n    return 1 / 0\n", "{file}, line 2: ZeroDivisionError: division by"),
        ("import nothing_of_this_name\n", "{file}, line 1: ModuleNotFoundError: No module named"),
        ("x = 3\n\ndef get_config(:\n", "{file}, line 3: SyntaxError: invalid syntax\n"),
        ("x = 3\n", "--config={file} has no function get_config; see configs/"),
    ],
)
def test_a_mistake_in_a_configuration_file_is_one_line_that_names_its_place(tmp_path, text, told):
    file = tmp_path / "mine.py"
    file.write_text(text)
    done = run(config=file)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {told.format(file=file)}"), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--workdir=x"], "--config is missing (--help lists the flags)"),
        ([], "--config and --workdir are missing (--help lists the flags)"),
        (
            ["--config=tests/tiny.py", "--workdir=x", "--config.model.widht=3"],
            "'widht' is not a field; did you mean 'width'? known here: architecture, ",
        ),
        (
            ["--config=nowhere.py", "--workdir=x"],
            "error: --config=nowhere.py: No such file or directory; see configs/",
        ),
        (
            ["--config=tests/tiny.py", "--workdir=x", "total_steps=3"],
            "error: 'total_steps=3' is not a flag; fields are set as --config.field=value",
        ),
        (
            ["--config=tests/tiny.py", "--workdir=x", "--config.model.q=3"],
            "'q' is not a field; known here: architecture, ",
        ),
        (
            ["--config=tests/tiny.py", "--workdir=x", "--config.batch_size=abc"],
            "error: --config.batch_size=abc must be a whole number",
        ),
        (
            ["--config=tests/tiny.py", "--workdir=x", "--config.optimizer.b1=abc"],
            "error: --config.optimizer.b1=abc must be a number",
        ),
    ],
)
def test_flags_that_are_missing_or_unknown_are_one_line(flags, told):
    done = run_with(*flags)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1


def test_an_error_that_is_not_known_keeps_its_traceback_and_has_a_code_of_its_own(capsys):
    def fail(*_):
        raise RuntimeError("INTERNAL: core halted")

    with pytest.raises(SystemExit) as end, flagsaver.flagsaver():
        flags.FLAGS.mark_as_parsed()
        cli._guard(fail, "interrupted")
    assert end.value.code == 70
    assert "Traceback" in (told := capsys.readouterr().err) and "core halted" in told


def test_a_package_that_is_missing_is_one_line(capsys):
    def fail(*_):
        import nothing_of_this_name  # noqa: F401

    with pytest.raises(SystemExit) as end, flagsaver.flagsaver():
        flags.FLAGS.mark_as_parsed()
        cli._guard(fail, "interrupted")
    assert end.value.code == 2
    assert re.fullmatch(
        r"error: No module named 'nothing_of_this_name': pip install -r requirements.txt, .*\n",
        capsys.readouterr().err,
    )


def test_memory_that_does_not_suffice_is_one_line_of_the_system(capsys):
    def fail(*_):
        raise MemoryError("the devices are out of memory: lower batch_size")

    with pytest.raises(SystemExit) as end, flagsaver.flagsaver():
        flags.FLAGS.mark_as_parsed()
        cli._guard(fail, "interrupted")
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: the devices are out of memory: lower batch_size\n"
