"""Apache Beam: its options, its runners, and a pipeline that hands tasks to workers.

Beam is imported here alone, inside the functions that need it: few have it installed.
"""

import contextlib
import io
import logging
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from maeast_jax.data import DecodePool, num_cores
from maeast_jax.ingest.sources import ManifestError

_DIRECT = "DirectRunner"


def parse_options(text: str):
    """Beam's PipelineOptions from `key=value` words with commas or spaces between, dashes or none.

    Words that hold commas themselves go between spaces. Where no runner is named it is the direct
    one, in a process a core.

    Raises ManifestError for what Beam does not take, and where it is not installed.
    """
    told = io.StringIO()
    try:
        words = shlex.split(text) if len(text.split()) > 1 else text.split(",")
        words = [word.strip(" ,") for word in words if word.strip(" ,") not in ("", "direct")]
        words = [word if word.startswith("-") else f"--{word}" for word in words]
        with _quiet(), contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            return _checked_options(words)
    except ImportError as error:
        raise ManifestError(
            f"--beam_pipeline_options: {error}; pip install -r requirements-beam.txt (for Dataflow"
            ' also "apache-beam[gcp]")'
        ) from None
    except SystemExit:  # argparse's, which has told why
        reason = last_line(told.getvalue()).rpartition("error: ")[2]
        raise ManifestError(f"--beam_pipeline_options: {reason}") from None
    except Exception as error:  # Runners refuse in their own ways.
        raise ManifestError(f"--beam_pipeline_options: {' '.join(str(error).split())}") from None


def _checked_options(words: list[str]):
    import apache_beam as beam
    from apache_beam.options.pipeline_options import (
        DirectOptions,
        PipelineOptions,
        StandardOptions,
    )

    options = PipelineOptions(words)
    standard = options.view_as(StandardOptions)
    standard.runner = standard.runner or _DIRECT
    if _is_direct(options):
        known = options.get_all_options()
        unknown = options.get_all_options(retain_unknown_options=True).keys() - known.keys()
        if unknown:  # other runners have options of their own that Beam does not know of here
            raise ValueError(f"{sorted(unknown)[0]!r} is no option of Beam or its {_DIRECT}")
        standard.runner = _DIRECT
        direct = options.view_as(DirectOptions)
        given = {word.partition("=")[0] for word in words}
        if "--direct_running_mode" not in given:
            direct.direct_running_mode = "multi_processing"
        if "--direct_num_workers" not in given and direct.direct_running_mode != "in_memory":
            direct.direct_num_workers = 0
        if direct.direct_num_workers < 0:
            raise ValueError(f"direct_num_workers={direct.direct_num_workers}, expected 0 or more")
        direct.direct_num_workers = direct.direct_num_workers or num_cores()
    beam.Pipeline(options=options)  # refuses what does not go together
    return options


def _is_direct(options) -> bool:
    from apache_beam.options.pipeline_options import StandardOptions

    name = options.view_as(StandardOptions).runner.rpartition(".")[2].lower()
    return name in ("direct", _DIRECT.lower())


def describe(options) -> str:
    """Who builds."""
    from apache_beam.options.pipeline_options import DirectOptions, StandardOptions

    runner = f"Beam's {options.view_as(StandardOptions).runner.rpartition('.')[2]}"
    if not _is_direct(options):
        return runner
    direct = options.view_as(DirectOptions)
    return f"{runner} ({direct.direct_running_mode}, {direct.direct_num_workers} workers)"


def run(work: Callable[[str, DecodePool], None], tasks: list[str], options, log: Path) -> None:
    """Calls `work`, a module's function, for every task, in workers that have a pool each.

    Args:
      options: of `parse_options`.
      log: where the direct runner's processes write what they have to say.

    Raises:
      RuntimeError, or whatever the runner raises, of which the last line says what failed.
    """
    with _quiet():
        import apache_beam as beam

        class Work(beam.DoFn):
            def setup(self):
                # As programs have it: on other machines there is none around the worker.
                os.environ.setdefault("EPATH_USE_TF", "false")
                self._pool = DecodePool(1)

            def process(self, task):
                work(task, self._pool)

            def teardown(self):
                self._pool.__exit__()

        direct = _is_direct(options)
        pipeline = beam.Pipeline(_direct_runner(options, log) if direct else None, options)
        _ = pipeline | beam.Create(tasks) | beam.ParDo(Work())  # Create deals them to all workers
    with _quiet() if direct else contextlib.nullcontext():
        result = pipeline.run()
        try:
            state = result.wait_until_finish()
        except KeyboardInterrupt:
            with contextlib.suppress(Exception):
                result.cancel()  # on other machines it would go on
            raise
    if state != "DONE":
        raise RuntimeError(f"it ended as {state}")


def _direct_runner(options, log: Path):
    """Beam's runner for one machine, the output of its processes in a file.

    By the name DirectRunner Beam would first try Prism, a program that it downloads and that knows
    nothing of the options for several processes.
    """
    from apache_beam.options.pipeline_options import DirectOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    direct = options.view_as(DirectOptions)
    if direct.direct_running_mode != "multi_processing":
        return FnApiRunner()
    # In the mode of that name the runner would make its own environment, which greets and warns on
    # standard error, in the middle of the progress bar.
    direct.direct_running_mode = "in_memory"
    python_path = os.pathsep.join(path for path in sys.path if path)
    command = (
        f"PYTHONPATH={shlex.quote(python_path)} exec {shlex.quote(sys.executable)}"
        f" -m apache_beam.runners.worker.sdk_worker_main >> {shlex.quote(str(log))} 2>&1"
    )
    return FnApiRunner(default_environment=SubprocessSDKEnvironment.from_command_string(command))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without log messages and threads' last words.

    Beam warns of all that is not installed beside it, and tells what goes wrong in its error and
    once more in each of these.
    """
    disabled, excepthook = logging.root.manager.disable, threading.excepthook
    logging.disable(logging.CRITICAL)
    threading.excepthook = lambda arguments: None
    try:
        yield
    finally:
        logging.disable(disabled)
        threading.excepthook = excepthook


def last_line(text: str) -> str:
    """Where errors that hold a traceback say what they are."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
