"""The edge of programs: what goes wrong is one line."""

import os
import subprocess
import sys

# What Orbax does of a full disk: a page a thread, and then the exception itself.
PROGRAM = """
import threading
from absl import logging
from maeast_jax import program

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

program.run(main)
"""


def run(*flags):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, "--config=tests/tiny.py", "--workdir=x", *flags],
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
