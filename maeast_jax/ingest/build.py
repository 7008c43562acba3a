"""Builds a data set from recordings: lists them, decodes them, writes the set and reports."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator

from etils import epath
from tqdm import tqdm

from maeast_jax.data import DecodePool, num_cores, writer
from maeast_jax.ingest import beam, examples, layouts, manifests, report, sources
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
    files = sources.assign_splits(listing.files, options.valid_percent)
    listing = dataclasses.replace(listing, files=files)
    writer.check_writable(name, data_dir, list(listing.by_split), options.overwrite)

    num_processes = min(options.num_processes or num_cores(), len(files))
    workers = beam.describe(beam_options) if beam_options else f"{num_processes} processes"
    source = options.manifest or options.audio_dir
    print(f"{len(files)} files from {source} to {data_dir / name}, {workers}")
    if listing.missing:
        print(f"not in the folder: {len(listing.missing)} more that the lists name")
    for note in listing.notes:
        print(note)
    sys.stdout.flush()  # before the progress bar, also in a pipe

    skipped = data_dir / f"{name}.skipped.tsv"
    skipped.unlink(missing_ok=True)

    def check_skipped(tally: report.Tally) -> None:
        report.check_skipped(tally, listing, options.max_skipped_percent, skipped)

    piece_seconds = options.piece_seconds
    if piece_seconds is None:
        piece_seconds = 0.0 if options.layout else PIECE_SECONDS
    cut = examples.Cut(piece_seconds, options.min_seconds)
    description = f"{len(files)} audio files, built by maeast_jax.build_dataset."
    arguments = (name, data_dir, listing, cut, check_skipped, description, options.overwrite)
    if beam_options is None:
        tally = _write(*arguments, num_processes)
    else:
        tally = beam.write(*arguments, beam_options)
    directory = data_dir / name / writer.VERSION
    print(report.summary(tally, listing, directory))
    steps = report.next_steps(name, data_dir, list(listing.by_split), listing, options.layout)
    print(f"built {directory}; {steps}", flush=True)
    return directory


def _check(options: BuildOptions) -> None:
    """Raises ManifestError for options that do not go together."""
    if not options.audio_dir and not options.manifest:
        raise ManifestError("no source: pass --audio_dir=DIR, --manifest=FILE.tsv or both")
    if options.layout and options.manifest:
        raise ManifestError(f"--layout={options.layout} has lists of its own: drop --manifest")
    if options.label_from_folder and (options.layout or options.manifest):
        raise ManifestError(
            "--label_from_folder goes with --audio_dir alone: in a manifest, labels are its column"
            " `label`, and a layout has labels of its own"
        )
    if options.test_dir and options.layout != "speech_commands_v1":
        raise ManifestError("--test_dir goes with --layout=speech_commands_v1 alone: drop it")
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


def _list(options: BuildOptions) -> Listing:
    if options.layout:
        return layouts.list_layout(options.layout, options.audio_dir, options.test_dir)
    if options.manifest:
        return manifests.read_manifest(options.manifest, options.audio_dir)
    return sources.list_folder(options.audio_dir, options.label_from_folder)


def _write(
    name: str,
    data_dir: epath.Path,
    listing: Listing,
    cut: examples.Cut,
    check_skipped: Callable[[report.Tally], None],
    description: str,
    overwrite: bool,
    num_processes: int,
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
            report.check_split(tally, split)

        writer.write(
            name,
            data_dir,
            {split: functools.partial(clips, split) for split in listing.by_split},
            label_names=listing.label_names,
            multi_label=listing.is_multi_label,
            description=description,
            finish=lambda folder: report.write_lists(folder, tally, listing),
            overwrite=overwrite,
        )
    return tally
