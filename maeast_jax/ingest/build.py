"""Builds a data set from recordings: lists them, decodes them, writes the set and reports."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator

from etils import epath
from tqdm import tqdm

from maeast_jax.data import DecodePool, num_cores, writer
from maeast_jax.ingest import beam, examples, layouts, report, sources
from maeast_jax.ingest.sources import Listing, ManifestError
from maeast_jax.runtime import storage

PIECE_SECONDS = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The flags of `python -m maeast_jax.build_dataset`, whose help describes them.

    Attributes:
      piece_seconds: None is 30 s, and for a layout 0: its clips are scored whole.
      num_processes: processes that decode; None is one per core.
      beam_pipeline_options: None decodes in processes of this machine, without Beam.
    """

    data_dir: str | os.PathLike
    name: str
    audio_dir: str | os.PathLike | None = None
    manifest: str | os.PathLike | None = None
    layout: str | None = None
    test_dir: str | os.PathLike | None = None
    label_from_folder: bool = False
    valid_percent: float = 5.0
    piece_seconds: float | None = None
    min_seconds: float = 0.0
    num_processes: int | None = None
    max_skipped_percent: float = 5.0
    overwrite: bool = False
    beam_pipeline_options: str | None = None


def build_dataset(options: BuildOptions) -> epath.Path:
    """Builds the data set `data_dir/name` and returns the folder of its version.

    The examples are the same with and without Beam, and for any number of processes.

    Raises:
      ManifestError, DataError, DecoderDiedError, OSError: nothing was written, except the list of
        skipped files where these are too many.
    """
    _check(options)
    beam_options = None
    if options.beam_pipeline_options is not None:
        beam_options = beam.parse_options(options.beam_pipeline_options)
    name, data_dir = options.name, writer.resolve_data_dir(options.data_dir)
    listing = _list(options)
    # The user asked for a share of held-out files, not for these files: that all of them are bad
    # must not fail the build.
    may_be_empty = ["valid"] if listing.files[0].split is None else []
    files = sources.assign_splits(listing.files, options.valid_percent)
    listing = dataclasses.replace(listing, files=files)
    writer.check_writable(name, data_dir, list(listing.by_split), options.overwrite)

    num_processes = min(options.num_processes or num_cores(), len(files))
    workers = beam.describe(beam_options) if beam_options else f"{num_processes} processes"
    source = options.manifest or options.audio_dir
    print(f"{len(files)} files from {source} to {data_dir / name}, {workers}")
    if listing.missing:
        print(f"not in the folder: {len(listing.missing)} more that the lists name")
    sys.stdout.flush()  # before the progress bar, also in a pipe

    skipped = data_dir / f"{name}.skipped.tsv"
    skipped.unlink(missing_ok=True)
    write = (
        functools.partial(_write, num_processes=num_processes, may_be_empty=may_be_empty)
        if beam_options is None
        else functools.partial(beam.write, options=beam_options)
    )
    tally = write(
        name,
        data_dir,
        listing,
        examples.Cut(_piece_seconds(options), options.min_seconds),
        check_skipped=functools.partial(
            report.check_skipped,
            listing=listing,
            max_skipped_percent=options.max_skipped_percent,
            skipped=skipped,
        ),
        description=f"{len(files)} audio files, built by maeast_jax.build_dataset.",
        overwrite=options.overwrite,
    )
    directory = data_dir / name / writer.VERSION
    print(report.summary(tally, listing, directory))
    splits = [split for split in listing.by_split if tally.clips[split]]
    steps = report.next_steps(name, data_dir, splits, listing, options.layout)
    print(f"built {directory}; {steps}", flush=True)
    return directory


def _list(options: BuildOptions) -> Listing:
    if options.layout:
        return layouts.list_layout(options.layout, options.audio_dir, options.test_dir)
    if options.manifest:
        return Listing.of(sources.read_manifest(options.manifest, options.audio_dir))
    return Listing.of(sources.list_folder(options.audio_dir, options.label_from_folder))


def _piece_seconds(options: BuildOptions) -> float:
    if options.piece_seconds is not None:
        return options.piece_seconds
    return 0.0 if options.layout else PIECE_SECONDS


def _write(
    name: str,
    data_dir: epath.Path,
    listing: Listing,
    cut: examples.Cut,
    check_skipped: Callable[[report.Tally], None],
    num_processes: int,
    may_be_empty: list[str],
    description: str,
    overwrite: bool,
) -> report.Tally:
    """Writes the data set from this process, as `beam.write` does from Beam's workers."""
    tally = report.Tally()
    with DecodePool(num_processes) as pool, tqdm(total=len(listing.files), unit="file") as bar:

        def clips(split: str) -> Iterator[writer.Example]:
            files = listing.by_split[split]
            decoded = examples.decode(pool, [file.path for file in files])
            for file, samples in zip(files, decoded, strict=True):
                found = examples.clips_of(file, samples, cut)
                tally.add(file, samples, found)
                check_skipped(tally)
                yield from found
                bar.set_postfix_str(f"{tally.hours:.2f} h", refresh=False)
                bar.update()

        writer.write(
            name,
            data_dir,
            {split: functools.partial(clips, split) for split in listing.by_split},
            label_names=listing.label_names,
            multi_label=listing.is_multi_label,
            description=description,
            finish=lambda folder: report.write_skipped(folder / "skipped.tsv", tally, listing),
            overwrite=overwrite,
            may_be_empty=may_be_empty,
        )
    return tally


# --- options that do not go together ---------------------------------------------------------


def _check(options: BuildOptions) -> None:
    _check_source(options)
    _check_numbers(options)
    if options.beam_pipeline_options is None:
        if storage.is_remote(options.data_dir):
            raise ManifestError(
                f"--data_dir={options.data_dir} goes with Beam alone: add"
                " --beam_pipeline_options=direct, or build in a folder and copy it there"
            )
    elif options.num_processes is not None:
        raise ManifestError(
            f"--num_processes={options.num_processes} goes without --beam_pipeline_options: drop"
            f" it, or pass --beam_pipeline_options=direct_num_workers={options.num_processes}"
        )


def _check_source(options: BuildOptions) -> None:
    layout = options.layout
    if not options.audio_dir and not options.manifest:
        raise ManifestError("no source: pass --audio_dir=DIR, --manifest=FILE.tsv or both")
    if options.manifest and options.label_from_folder:
        raise ManifestError(
            "--label_from_folder goes with --audio_dir alone: in a manifest, labels are its column"
            " `label`"
        )
    if layout and (options.manifest or options.label_from_folder):
        raise ManifestError(
            f"--layout={layout} goes with --audio_dir alone: it has lists and labels of its own"
        )
    if options.test_dir and not layout:
        raise ManifestError("--test_dir goes with --layout=speech_commands_v1 alone: drop it")
    if layout and storage.is_remote(options.audio_dir):
        raise ManifestError(
            f"--audio_dir={options.audio_dir} goes without --layout, which reads a folder: copy it"
            " to a disk, or mount the bucket"
        )


def _check_numbers(options: BuildOptions) -> None:
    if not 0 <= options.valid_percent < 100:
        raise ManifestError(
            f"--valid_percent={options.valid_percent:g}, expected 0 or more, under 100"
        )
    if not 0 <= options.max_skipped_percent <= 100:
        raise ManifestError(
            f"--max_skipped_percent={options.max_skipped_percent:g}, expected 0 to 100"
        )
    piece_seconds, min_seconds = _piece_seconds(options), options.min_seconds
    if piece_seconds and not piece_seconds >= examples.SHORTEST_TAIL_SECONDS:
        raise ManifestError(
            f"--piece_seconds={piece_seconds:g}, expected 0 (never cut) or at least"
            f" {examples.SHORTEST_TAIL_SECONDS:g}"
        )
    if not min_seconds >= 0 or (piece_seconds and min_seconds > piece_seconds):
        raise ManifestError(
            f"--min_seconds={min_seconds:g}, expected 0 to --piece_seconds ({piece_seconds:g})"
        )
    if options.num_processes is not None and options.num_processes < 1:
        raise ManifestError(f"--num_processes={options.num_processes}, expected at least 1")
