"""The edge of programs: flags in, one-line errors and exit codes out."""

import difflib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

EXIT_SYSTEM = 1
EXIT_USAGE = 2
EXIT_NON_FINITE = 3
# Of sysexits.h; launchers start the run again after both.
EXIT_UNKNOWN = 70  # an error that no line of ours explains: a device that failed, a bug
EXIT_PEER_LOST = 75


class Interrupted(Exception):
    """SIGTERM or Ctrl-C, after the state was saved; `exit_code` is the shell's 128 + signal."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} at step {step}, which is saved; "
            "the same command goes on from there"
        )
        self.exit_code = 128 + signal_number


class NonFiniteError(FloatingPointError):
    """A loss or a gradient that is not finite."""


class PeerLostError(RuntimeError):
    """Another process of the run is gone, and with it what only it held."""


@contextmanager
def catching(catch: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """`catch` handles these signals; nothing does outside of the main thread, where none can be."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that holds the signal once SIGTERM or Ctrl-C has come; a second Ctrl-C acts at once.

    Signals can be caught in the main thread only; elsewhere the list stays empty.
    """
    caught: list[int] = []

    def catch(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    with catching(catch, signal.SIGTERM, signal.SIGINT):
        yield caught


def run(
    main: Callable[[ConfigDict, str], None],
    join: Callable[[str | None, int | None, int | None], None] | None = None,
) -> None:
    """Parses --config and --workdir, calls `main(config, workdir)`, and ends the process.

    join: of a program that can be several processes, called first in each of them with
      --coordinator, --num_processes and --process_id, or with None where the cluster tells.

    Exit codes: 0; 1 for what the system refused (a full disk, a folder); 2 for a ValueError, a
    mistake in flags, configuration, data or checkpoint; 3 for a loss that is not finite; 70 for an
    error that is none of these, with its traceback; 75 where another process of the run was lost;
    143 or 130 after SIGTERM or Ctrl-C, once the state is saved.
    """
    config = config_flags.DEFINE_config_file(
        "config",
        lock_config=True,
        help_string="FILE[:ARG] with get_config(), such as those in configs/; each field is set as"
        " --config.FIELD=VALUE, such as --config.batch_size=64.",
    )
    workdir = flags.DEFINE_string(
        "workdir", None, "Folder the run lives in; with a run in it the same command goes on."
    )
    # absl's --help shows the flags of the main module alone.
    for name in ("config", "workdir", *(_define_join_flags() if join else ())):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def call(argv: Sequence[str]) -> None:
        if unread := argv[1:]:
            _fail(f"{unread[0]!r} is not a flag; fields are set as --config.field=value")
        if join is None or not _is_joined():
            _guard_alone(lambda: main(config.value, workdir.value), _STOPPED_EARLY)
            return
        try:
            _guard(lambda: _join_and_call(join, main, config.value, workdir.value), "stopped")
        except SystemExit as end:
            # The others wait in a computation for this one, and jax would wait here for them.
            if end.code in (0, *_AGREED_ENDS):
                raise
            _leave(end.code)

    _start(call, _parse_run)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_CTRL_C = 128 + signal.SIGINT
_STOPPED_EARLY = (
    "stopped before it could save: the same command starts it again, from its newest checkpoint if "
    "there is one"
)
# Ends that all processes come to together.
_AGREED_ENDS = (128 + signal.SIGTERM, EXIT_NON_FINITE)


def _define_join_flags() -> tuple[str, ...]:
    flags.DEFINE_bool(
        "distributed",
        False,
        "This is one of several processes, found from the cluster: a TPU pod, SLURM, Kubernetes,"
        " Open MPI.",
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of several processes.")
    flags.DEFINE_integer("num_processes", None, "How many they are; with --coordinator.")
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0; with --coordinator.")
    return ("distributed", *_JOIN_FLAGS)


_JOIN_FLAGS = ("coordinator", "num_processes", "process_id")


def _is_joined() -> bool:
    return flags.FLAGS.distributed or any(flags.FLAGS[n].value is not None for n in _JOIN_FLAGS)


def _join_and_call(join: Callable, main: Callable, config: ConfigDict, workdir: str) -> None:
    given = [flags.FLAGS[name].value for name in _JOIN_FLAGS]
    if any(value is not None for value in given) and None in given:
        raise ValueError(
            "--coordinator, --num_processes and --process_id go together; pass all three, or"
            " --distributed alone on a cluster"
        )
    join(*given)
    main(config, workdir)


def run_flags(main: Callable[[list[str]], int | None], required: Sequence[str]) -> None:
    """Parses the flags that are defined, calls `main(arguments)`, and ends the process.

    `required` names flags that must not be empty. Exit codes are those of `run`, or what `main`
    returns; a Ctrl-C is taken to have left nothing behind.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            left = flags.FLAGS(argv)
        except flags.Error as error:
            _fail(f"{' '.join(str(error).split())} (--help lists the flags)")
        _check_given(required)
        return left

    def call(argv: Sequence[str]) -> None:
        _guard_alone(lambda: sys.exit(main(list(argv[1:]))), "interrupted, nothing was written")

    _start(call, parse)


def _start(call: Callable, parse: Callable) -> None:
    # TensorFlow, which reads the data, greets with a page of its own unless told not to, and
    # announces oneDNN unless that is off; host fbank then also sums in one order on all machines.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    # Of the libraries that reach gs:// for epath, the one that works without TensorFlow too.
    os.environ.setdefault("EPATH_USE_TF", "false")
    try:
        app.run(call, flags_parser=parse)
    except SystemExit as end:
        # absl ends with 1 after --help.
        asked = any(word.lstrip("-").startswith("help") for word in sys.argv[1:])
        raise SystemExit(0 if end.code == 1 and asked else end.code) from None


def _guard_alone(main: Callable[[], None], interrupted: str) -> None:
    """As `_guard`, of a process that no other one waits for."""
    try:
        _guard(main, interrupted)
    except SystemExit as end:
        if end.code == _CTRL_C:
            _leave(end.code)  # what XLA still compiles would crash an interpreter that ends
        raise


def _guard(main: Callable[[], None], interrupted: str) -> None:
    """Calls `main`; what goes wrong is one line and an exit code."""
    if not flags.FLAGS["verbosity"].present:
        # Orbax reports each file that it writes at INFO, which absl shows by default.
        logging.set_verbosity(logging.WARNING)
        # And its threads print, page after page, what is then raised here and told in one line.
        logging.get_absl_logger().addFilter(lambda record: not record.exc_info)
    try:
        main()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except NonFiniteError as error:
        _fail(error, EXIT_NON_FINITE)
    except PeerLostError as error:
        _fail(error, EXIT_PEER_LOST)
    except ValueError as error:
        if flags.FLAGS["verbosity"].present:
            traceback.print_exc()  # of one that is a bug, and no mistake of the user's
        _fail(error)
    except MemoryError as error:
        _fail(error, EXIT_SYSTEM)
    except OSError as error:
        _fail(f"{error.filename or ''} {error.strerror or error}".strip(), EXIT_SYSTEM)
    except KeyboardInterrupt:
        _fail(interrupted, _CTRL_C)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("maeast_jax"):
            raise
        _fail(f"{error}: pip install -r requirements.txt, into the environment of {sys.executable}")
    except Exception:
        traceback.print_exc()
        sys.exit(EXIT_UNKNOWN)


def _check_given(names: Sequence[str]) -> None:
    if missing := [f"--{name}" for name in names if not flags.FLAGS[name].value]:
        verb = "is" if len(missing) == 1 else "are"
        _fail(f"{' and '.join(missing)} {verb} missing (--help lists the flags)")


def _parse_run(argv: Sequence[str]) -> list[str]:
    """absl's parser, with one line where the configuration file or a field is wrong."""
    try:
        rest = flags.FLAGS(argv)
        _check_given(("config", "workdir"))
        flags.FLAGS.config.keys()  # a file that did not load is an error only when looked into
        return rest
    except OSError as error:
        # ml_collections wraps what the system says, in words alone.
        reason = re.sub(r"\[Errno \d+\] (.+): .*", r"\1", str(error).splitlines()[-1].strip())
        _fail(f"--config={_config_file(argv)}: {reason}; see configs/")
    except flags.IllegalFlagValueError as error:
        _fail(_illegal(error))
    except flags.Error as error:
        _fail(" ".join(str(error).split()))
    except Exception as error:
        file = _config_file(argv)
        if place := _place_in_file(error, file):
            _fail(f"{place}: {_reason(error)}")
        if "has no attribute 'get_config'" in str(error):
            _fail(f"--config={file} has no function get_config; see configs/")
        if isinstance(error, (AttributeError, KeyError)):
            _check_overrides(argv)
        raise


def _config_file(argv: Sequence[str]) -> str:
    """What --config names, the last one where there are several, without its argument."""
    file = ""
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        if flag in ("--config", "-config"):
            file = (value if equals else after).split(":")[0]
    return file


def _place_in_file(error: Exception, file: str) -> str | None:
    """FILE, line N, where an error went through this file or is of its syntax."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    path = os.path.abspath(file)
    lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == path]
    return f"{file}, line {lines[-1]}" if lines else None


def _illegal(error: flags.IllegalFlagValueError) -> str:
    """In our words, where they are Python's of a number."""
    text = " ".join(str(error).split())
    found = re.match(
        r"flag (--\S+?)=(.*): (invalid literal for int|could not convert string)", text
    )
    if not found:
        return text
    kind = "a whole number" if "int" in found[3] else "a number"
    return f"{found[1]}={found[2]} must be {kind}"


def _reason(error: Exception) -> str:
    """One line; ml_collections prints all fields where one is not known."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    if unknown := re.search(r'Key "(\w+)" does not exist', text):
        near = re.search(r'Did you mean "(\w+)"', text)
        return f"{unknown[1]!r} is not a field" + (f"; did you mean {near[1]!r}?" if near else "")
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def _check_overrides(argv: Sequence[str]) -> None:
    """Names an override of a field that does not exist; ml_collections does not say which do."""
    # It reads overrides from sys.argv, so the plain configuration is had by leaving them out.
    overrides = [word for word in argv if word.startswith("--config.")]
    sys.argv = [word for word in argv if word not in overrides]
    flags.FLAGS.unparse_flags()
    flags.FLAGS(sys.argv)
    for word in overrides:
        _check_field(flags.FLAGS.config, word.removeprefix("--config.").split("=")[0])


def _check_field(section: ConfigDict, path: str) -> None:
    for name in path.split("."):
        if not isinstance(section, ConfigDict) or name not in section:
            fields = sorted(section) if isinstance(section, ConfigDict) else []
            near = "".join(
                f"; did you mean {n!r}?" for n in difflib.get_close_matches(name, fields, 1)
            )
            known = ", ".join(fields) or "no fields"
            _fail(f"--config.{path}: {name!r} is not a field{near or ';'} known here: {known}")
        section = section[name]


def _fail(message: object, exit_code: int = EXIT_USAGE) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)
