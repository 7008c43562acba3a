"""The edge of programs: flags go in, one-line errors and exit codes come out."""

import contextlib
import errno
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from maeast_jax.runtime import terminal

EXIT_SYSTEM = 1
EXIT_USAGE = 2
EXIT_NON_FINITE = 3
EXIT_INCOMPLETE = 4  # some of the named files could not be read
# Launchers start the run again after these two, which have their meaning from sysexits.h.
EXIT_UNKNOWN = 70  # an unexpected error: a device failed, or there is a bug
EXIT_PEER_LOST = 75
_EXIT_CTRL_C = 128 + signal.SIGINT
# All processes of a run end together with these codes.
_AGREED_ENDS = (0, 128 + signal.SIGTERM, EXIT_NON_FINITE)
_JOIN_FLAGS = ("coordinator", "num_processes", "process_id")
_STOPPED_EARLY = (
    "stopped before it could save: the same command starts it again, from its newest checkpoint if "
    "there is one"
)


class Interrupted(Exception):
    """A signal, such as SIGTERM or Ctrl-C, stopped the run after it saved its state.

    `exit_code` is the shell's: 128 + the signal's number.
    """

    def __init__(self, signal_number: int, step: int):
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} at step {step}, which is saved; "
            "the same command goes on from there"
        )
        self.exit_code = 128 + signal_number


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is not finite."""

    exit_code = EXIT_NON_FINITE


class PeerLostError(RuntimeError):
    """Another process of the run is gone, and its part of the state with it."""

    exit_code = EXIT_PEER_LOST


def run(
    main: Callable[..., int | None],
    join: Callable[[str | None, int | None, int | None], None] | None = None,
    workdir: bool = True,
    default_config: str | None = None,
) -> None:
    """Parses --config and --workdir, calls `main(config, workdir)`, and ends the process.

    A program may define flags of its own before. Each field that the command line sets is a flag
    too: `"config.batch_size" in flags.FLAGS`.

    Args:
      main: The program. It may return an exit code; None stands for 0.
      join: Joins the processes of a run, for a program that may run in several. It is called first,
        with --coordinator, --num_processes and --process_id, each of which may be None.
      workdir: False for a program without --workdir; then `main(config)` is called.
      default_config: The configuration file where --config is missing. None makes --config
        required.

    Exit codes: 0; 1 where the system refused something (a full disk, a folder, memory); 2 for a
    ValueError, which is a mistake in flags, configuration, data or checkpoint; 3 for a loss that is
    not finite; 70 for any other error, with its traceback; 75 where another process of the run was
    lost; 128 + its number after a signal: 143 SIGTERM, 130 Ctrl-C, 129 SIGHUP, 138 SIGUSR1.
    """
    names = ("config", "workdir") if workdir else ("config",)

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            _define_flags(default_config, names, join is not None)
            left = flags.FLAGS(argv)
            _check_given(names)
            flags.FLAGS.config.keys()  # ml_collections reports a missing file only when it is used
        except flags.Error as error:
            _fail(_flag_error(error))
        except Exception as error:
            _fail(_config_error(error, argv))
        if left[1:]:
            _fail(f"{left[1]!r} is not a flag; fields are set as --config.field=value")
        return left

    def call(argv: Sequence[str]) -> int:
        process = [flags.FLAGS[name].value for name in _JOIN_FLAGS] if join else []
        is_joined = bool(join) and (flags.FLAGS.distributed or any(v is not None for v in process))

        def program() -> int | None:
            if is_joined:
                join(*process)
            return main(*(flags.FLAGS[name].value for name in names))

        code = _call(program, _STOPPED_EARLY if workdir else "interrupted")
        if is_joined and code not in _AGREED_ENDS:
            _leave(code)  # jax's exit would wait for processes that wait for this one
        return code

    _start(call, parse)


def run_flags(main: Callable[[list[str]], int | None], required: Sequence[str]) -> None:
    """Parses the flags that are defined, calls `main(arguments)`, and ends the process.

    `required` names flags that must not be empty. Exit codes are those of `run`, or the code that
    `main` returns. After Ctrl-C the program says that nothing was written.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            left = flags.FLAGS(argv)
        except flags.Error as error:
            _fail(_flag_error(error))
        _check_given(required)
        return left

    def call(argv: Sequence[str]) -> int:
        return _call(lambda: main(list(argv[1:])), "interrupted, nothing was written")

    _start(call, parse)


@contextlib.contextmanager
def catching(catch: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Handles these signals by `catch`, in the main thread; Python allows it nowhere else."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _ending_where_ctrl_c_is_ignored(message: str) -> Iterator[None]:
    """Ends the process where Python drops the KeyboardInterrupt of a Ctrl-C.

    Python drops exceptions raised in a callback of its garbage collector, and jax has such a
    callback: without this the program would run on to its end.
    """
    before = sys.unraisablehook

    def end(dropped: Any) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            _leave(_told(message, _EXIT_CTRL_C))
        # Tasks of Orbax that a damaged checkpoint left unfinished; the damage itself is told.
        if str(dropped.exc_value) != "Event loop is closed":
            before(dropped)

    sys.unraisablehook = end
    try:
        yield
    finally:
        sys.unraisablehook = before


def _define_flags(default_config: str | None, names: Sequence[str], may_join: bool) -> None:
    config_flags.DEFINE_config_file(
        "config",
        default_config,
        lock_config=True,
        help_string="FILE[:ARG] with get_config(), such as those in configs/; each field is set as"
        " --config.FIELD=VALUE, such as --config.batch_size=64.",
    )
    if "workdir" in names:
        flags.DEFINE_string(
            "workdir", None, "Folder of the run. The same command continues the run in it."
        )
    if may_join:
        names = (*names, "distributed", *_JOIN_FLAGS)
        flags.DEFINE_bool(
            "distributed",
            False,
            "This is one of several processes, found from the cluster: a TPU pod, SLURM,"
            " Kubernetes, Open MPI.",
        )
        flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of several processes.")
        flags.DEFINE_integer("num_processes", None, "Number of processes; with --coordinator.")
        flags.DEFINE_integer("process_id", None, "This process, from 0; with --coordinator.")
    # absl's --help shows only the flags of the main module.
    for name in names:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def _check_given(names: Sequence[str]) -> None:
    if missing := [f"--{name}" for name in names if not flags.FLAGS[name].value]:
        verb = "is" if len(missing) == 1 else "are"
        _fail(f"{' and '.join(missing)} {verb} missing (--help lists the flags)")


def _flag_error(error: flags.Error) -> str:
    # ml_collections puts a whole traceback behind the first line, and the reason into the last.
    first, *others = str(error).strip().splitlines()
    if file := next((w for w in sys.argv[1:] if w.startswith("-") and os.path.exists(w)), None):
        return f"{first}; to name the file, write ./{file}"
    name = getattr(error, "flagname", "")
    if "config" in flags.FLAGS and name in (flags.FLAGS["config"].value or ()):
        return f"{first}; the field is set as --config.{name}=VALUE"
    return f"{first} {others[-1] if others else '(--help lists the flags)'}"


def _config_error(error: Exception, argv: Sequence[str]) -> str:
    """The place and the last line of an error of the configuration file or of a field."""
    file = next((word for word in argv if word.startswith("--config=")), "--config")
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == "config_config"  # ml_collections' name of the file
    ]
    place = f"line {lines[-1]}: " if lines else ""
    name = type(error).__name__
    # ml_collections wraps a KeyError, whose text Python quotes, in an AttributeError.
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    reason = text.splitlines()[-1].strip()[:200] if text else "no reason given"
    where = "maeast_jax/config.py lists the fields, configs/ has examples"
    return f"{file}: {place}{name}: {reason}; {where}"


class _Output(io.TextIOWrapper):
    """Standard output or error, where what cannot be shown or has no reader ends no run.

    A character that the encoding lacks is written as its number. After a terminal or the reader of
    a pipe is gone, nothing is written.
    """

    @classmethod
    def of(cls, stream: io.TextIOWrapper) -> "_Output":
        return cls(
            stream.buffer, stream.encoding, "backslashreplace",
            line_buffering=stream.line_buffering, write_through=stream.write_through,
        )  # fmt: skip

    def write(self, text: str) -> int:
        with _no_reader_needed():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with _no_reader_needed():
            super().flush()


@contextlib.contextmanager
def _no_reader_needed() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise


def _start(call: Callable[[Sequence[str]], int], parse: Callable) -> None:
    for name in ("stdout", "stderr"):
        if type(stream := getattr(sys, name)) is io.TextIOWrapper:  # a notebook has others
            setattr(sys, name, _Output.of(stream))
    # TensorFlow, which reads the data, prints a page at its import unless this is set. It
    # announces oneDNN unless that is off; host fbank then also sums in one order on all machines.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    # epath then reaches gs:// by a library that works without TensorFlow.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # Both change a run's numbers, and a run that goes on elsewhere would mix the two.
    for name, value in (("jax_enable_x64", False), ("jax_threefry_partitionable", True)):
        os.environ[name.upper()] = str(value)
        if jax := sys.modules.get("jax"):  # it has read the environment
            jax.config.update(name, value)

    def call_and_leave(argv: Sequence[str]) -> int:
        code = call(argv)
        if code == _EXIT_CTRL_C:
            _leave(code)  # XLA may still compile, and an interpreter that ends would crash in it
        return code

    try:
        app.run(call_and_leave, flags_parser=parse)
    except SystemExit as end:
        # absl ends with 1 after --help.
        asked = any(re.fullmatch("--?help(short|full|xml)?", word) for word in sys.argv[1:])
        raise SystemExit(0 if end.code == 1 and asked else end.code) from None


def _call(main: Callable[[], int | None], interrupted: str) -> int:
    """Calls `main` and returns the exit code; prints what goes wrong as one line."""
    is_verbose = flags.FLAGS["verbosity"].present
    if not is_verbose:
        # absl shows INFO by default, at which Orbax reports each file that it writes.
        logging.set_verbosity(logging.WARNING)
        # Orbax and asyncio log pages about an error that is then raised here and told in one line.
        logging.get_absl_handler().addFilter(lambda record: not record.exc_info)
    try:
        with _ending_where_ctrl_c_is_ignored(interrupted):
            return main() or 0
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except (NonFiniteError, PeerLostError) as error:
        return _told(error, error.exit_code)
    except ValueError as error:
        if is_verbose:
            traceback.print_exc()  # it may be a bug and not the user's mistake
        return _told(error, EXIT_USAGE)
    except MemoryError as error:
        return _told(error, EXIT_SYSTEM)
    except OSError as error:
        return _told(f"{error.filename or ''} {terminal.one_line(error)}".strip(), EXIT_SYSTEM)
    except KeyboardInterrupt:
        return _told(interrupted, _EXIT_CTRL_C)
    except ModuleNotFoundError as error:
        remedy = f"pip install -r requirements.txt, into the environment of {sys.executable}"
        return _told(f"{error}: {remedy}", EXIT_USAGE)
    except Exception:
        if reason := _missing_device():
            return _told(reason, EXIT_SYSTEM)
        traceback.print_exc()
        return EXIT_UNKNOWN


def _missing_device() -> str | None:
    """Returns a message if JAX_PLATFORMS names a device that jax does not find, else None."""
    platforms, jax = os.environ.get("JAX_PLATFORMS"), sys.modules.get("jax")
    if not platforms or jax is None:
        return None
    try:
        jax.devices()
    except Exception as error:  # AssertionError without a word where there is no GPU
        reason = f" ({terminal.one_line(error)})" if str(error) else ""
        return (
            f"JAX_PLATFORMS={platforms}, but jax finds no such device{reason}; unset it, or "
            "install the driver and jax's package for that device"
        )
    return None


def _told(message: object, exit_code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return exit_code


def _fail(message: str) -> NoReturn:
    sys.exit(_told(message, EXIT_USAGE))


def _leave(code: int) -> NoReturn:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
