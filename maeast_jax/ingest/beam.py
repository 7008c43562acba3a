"""Builds a data set on Apache Beam: workers decode the files, and TFDS' Beam writer shards them.

Beam is imported inside the functions that need it: few users have it installed. Recordings and the
data set's folder must be visible to all workers under the same names.
"""

import contextlib
import dataclasses
import io
import logging
import os
import pickle
import shlex
import sys
import threading
from collections.abc import Callable, Iterable, Iterator

from etils import epath

from maeast_jax.data import DataError, DecodePool, num_cores, writer
from maeast_jax.ingest import examples, report
from maeast_jax.ingest.sources import AudioFile, Listing, ManifestError
from maeast_jax.runtime import storage

_DIRECT = "DirectRunner"


def write(
    name: str,
    data_dir: epath.Path,
    listing: Listing,
    cut: examples.Cut,
    check_skipped: Callable[[report.Tally], None],
    description: str,
    overwrite: bool,
    options,
) -> report.Tally:
    """Builds the data set `data_dir/name` and returns the tally of its files.

    Args:
      check_skipped: raises DataError where the tally has too many unreadable files. It is called
        before the data set appears.
      description, overwrite: as in `writer.write`.
      options: the result of `parse_options`.

    Raises:
      DataError: as `writer.write`; or the pipeline failed.
      ValueError: gs:// cannot be reached.
    """
    data_dir = storage.absolute(data_dir)  # workers have other working directories
    target = data_dir / name / writer.VERSION
    with (
        storage.reaching(data_dir, "written"),
        writer.locked(target.parent),
        writer.staged(target, overwrite) as folder,
    ):
        failure = _run(name, folder, listing, cut, options, description)
        tally = report.Tally()
        for file in folder.glob("*.tally"):
            tally.merge(pickle.loads(file.read_bytes()))
        check_skipped(tally)
        for split in listing.by_split:
            if tally.files[split]:  # none are counted where the pipeline failed before
                report.check_split(tally, split)
        if failure:
            raise DataError(f"Beam's pipeline failed: {failure}")
        report.write_lists(folder / name / writer.VERSION, tally, listing)
    return tally


def _run(name, folder, listing: Listing, cut, options, description) -> str | None:
    """Runs the pipeline that prepares the data set in `folder`; returns why it failed."""
    classes = writer.Classes(listing.label_names, listing.is_multi_label)

    def generators(pipeline) -> dict:
        return {
            split: _examples(pipeline, split, files, folder, cut, classes)
            for split, files in listing.by_split.items()
        }

    direct = _is_direct(options)
    runner = _direct_runner(options) if direct else None
    arguments = {"beam_runner": runner, "beam_options": options}
    try:
        with _quiet() if direct else contextlib.nullcontext():
            writer.prepare(name, folder, classes, description, generators, beam=arguments)
    except Exception as error:  # runners fail with errors of any type
        return _last_line(str(error)).removeprefix("RuntimeError: ") or type(error).__name__
    return None


def _examples(pipeline, split: str, files: list[AudioFile], folder: epath.Path, cut, classes):
    """Returns the PCollection of a split's (id, features); its tally goes to SPLIT.tally."""
    import apache_beam as beam

    class Decode(beam.DoFn):
        """AudioFile -> (id, features) of its clips, and a Tally of the file."""

        def setup(self):
            # A process of its own, so that a file that kills the decoder is skipped.
            self._pool = DecodePool(1)

        def process(self, file):
            (decoded,) = examples.decode(self._pool, [file.path])
            clips = examples.clips_of(file, decoded, cut)
            tally = report.Tally()
            tally.add(file, decoded, clips)
            yield beam.pvalue.TaggedOutput("tallies", tally)
            for clip in clips:
                yield clip[0], classes.encode(clip)

        def teardown(self):
            self._pool.__exit__()

    # A pipeline that held millions of names itself would be larger than runners accept.
    listed = folder / f"{split}.files"
    files = [dataclasses.replace(file, path=str(storage.absolute(file.path))) for file in files]
    listed.write_bytes(pickle.dumps(files))
    decoded = (
        pipeline
        | f"{split}: list" >> beam.Create([str(listed)])
        | f"{split}: read the list" >> beam.FlatMap(_read_files)
        | f"{split}: deal to workers" >> beam.Reshuffle()
        | f"{split}: decode" >> beam.ParDo(Decode()).with_outputs("tallies", main="clips")
    )
    counted = (
        decoded.tallies
        | f"{split}: count" >> beam.CombineGlobally(_total)
        | f"{split}: keep the counts" >> beam.Map(_keep, str(folder / f"{split}.tally"))
    )
    # The clips wait for the counts: TFDS fails the pipeline for a split without clips, and the
    # counts say why it has none.
    wait = beam.Map(lambda clip, _: clip, beam.pvalue.AsSingleton(counted))
    return decoded.clips | f"{split}: wait for the counts" >> wait


def _read_files(path: str) -> list[AudioFile]:
    return pickle.loads(storage.path(path).read_bytes())


def _total(tallies: Iterable[report.Tally]) -> report.Tally:
    total = report.Tally()
    for tally in tallies:
        total.merge(tally)
    return total


def _keep(tally: report.Tally, path: str) -> None:
    storage.write_whole(path, pickle.dumps(tally))


# --- options and runners ---------------------------------------------------------------------


def parse_options(text: str):
    """Returns Beam's PipelineOptions from `key=value` words with commas or spaces between.

    Words may start with dashes. Words that contain commas are separated by spaces. Without a runner
    it is the direct one, with one process per core.

    Raises ManifestError where Beam rejects the options, and where it is not installed.
    """
    told = io.StringIO()
    try:
        words = shlex.split(text) if len(text.split()) > 1 else text.split(",")
        words = [word.strip(" ,-") for word in words]
        words = [f"--{word}" for word in words if word not in ("", "direct")]
        with _quiet(), contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            return _checked_options(words)
    except ImportError as error:
        reason = (
            f'{error}; pip install -r requirements-beam.txt (for Dataflow also "apache-beam[gcp]")'
        )
    except SystemExit:  # argparse has printed the reason
        reason = _last_line(told.getvalue()).rpartition("error: ")[2]
    except Exception as error:  # runners raise errors of any type
        reason = " ".join(str(error).split())
    raise ManifestError(f"--beam_pipeline_options: {reason}")


def _checked_options(words: list[str]):
    import apache_beam as beam
    from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions

    words = [f"--runner={_DIRECT}", *words]  # later words win
    options = PipelineOptions(words)
    if _is_direct(options):
        # 0 workers are one per core.
        defaults = ["--direct_running_mode=multi_processing", "--direct_num_workers=0"]
        options = PipelineOptions([*defaults, *words])
        known = options.get_all_options()
        unknown = options.get_all_options(retain_unknown_options=True).keys() - known.keys()
        if unknown:  # other runners have options that Beam does not know on this machine
            raise ValueError(f"{sorted(unknown)[0]!r} is no option of Beam or its {_DIRECT}")
        direct = options.view_as(DirectOptions)
        direct.direct_num_workers = direct.direct_num_workers or num_cores()
    beam.Pipeline(options=options)  # raises an error for options that exclude each other
    return options


def _is_direct(options) -> bool:
    from apache_beam.options.pipeline_options import StandardOptions

    name = options.view_as(StandardOptions).runner.rpartition(".")[2].lower()
    return name in ("direct", _DIRECT.lower())


def describe(options) -> str:
    """Returns the name of the Beam runner and its worker count, for the progress line."""
    from apache_beam.options.pipeline_options import DirectOptions, StandardOptions

    if not _is_direct(options):
        return f"Beam's {options.view_as(StandardOptions).runner.rpartition('.')[2]}"
    direct = options.view_as(DirectOptions)
    return f"Beam's {_DIRECT} ({direct.direct_running_mode}, {direct.direct_num_workers} workers)"


def _direct_runner(options):
    """Returns Beam's runner for one machine; its worker processes are silent.

    For the name DirectRunner Beam would first try Prism, a program that it downloads and that does
    not know the options for several processes.
    """
    from apache_beam.options.pipeline_options import DirectOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    direct = options.view_as(DirectOptions)
    if direct.direct_running_mode != "multi_processing":
        return FnApiRunner()
    # In that mode Beam would start workers that log each connection to standard error. Their errors
    # reach this process by themselves.
    direct.direct_running_mode = "in_memory"
    python_path = os.pathsep.join(path for path in sys.path if path)
    command = (
        f"PYTHONPATH={shlex.quote(python_path)} exec {shlex.quote(sys.executable)}"
        " -m apache_beam.runners.worker.sdk_worker_main >/dev/null 2>&1"
    )
    return FnApiRunner(default_environment=SubprocessSDKEnvironment.from_command_string(command))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences log messages and the tracebacks of threads.

    Beam warns of each optional package that is missing, and logs each failure several times beside
    the error that it raises.
    """
    disabled, excepthook = logging.root.manager.disable, threading.excepthook
    logging.disable(logging.CRITICAL)
    threading.excepthook = lambda arguments: None
    try:
        yield
    finally:
        logging.disable(disabled)
        threading.excepthook = excepthook


def _last_line(text: str) -> str:
    """Returns the last line of an error that holds a traceback; it names the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
