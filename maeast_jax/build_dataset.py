"""Turns audio files into a TFDS data set of 16 kHz mono 16-bit clips in array_record shards.

  python -m maeast_jax.build_dataset --audio_dir=DIR --data_dir=DATA --name=NAME
  python -m maeast_jax.build_dataset --layout=esc50 --audio_dir=ESC-50-master --data_dir=DATA \\
      --name=esc50

--layout takes a data set as its authors publish it, with its classes and splits: audioset, esc50,
speech_commands_v1 (12 classes; --test_dir), speech_commands_v2 (35 words), voxceleb1, iemocap;
layouts.py says of each what has to lie in the folder. Its clips stay whole.

A file that no decoder reads is skipped, and a clip that a layout's lists name may be missing: both
are counted, and listed in skipped.tsv in the data set's folder.
An interrupted build leaves nothing that opens: run it again. On Apache Beam it goes on with the
shards that are not done:

  python -m maeast_jax.build_dataset ... --beam_pipeline_options=direct

Recordings may lie on gs://, and on Beam the data set too.
"""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from absl import flags
from tqdm import tqdm

from maeast_jax.data import DecodePool, num_cores, writer
from maeast_jax.ingest import (
    SHORTEST_TAIL_SECONDS,
    AudioFile,
    Cut,
    Listing,
    ManifestError,
    Tally,
    assign_splits,
    beam,
    beam_runner,
    clips_of,
    fetched,
    layouts,
    list_folder,
    next_steps,
    read_manifest,
    shard_file,
)
from maeast_jax.runtime import cli, storage

_PIECE_SECONDS = 30.0


def build(
    *,
    data_dir: str | Path,
    name: str,
    audio_dir: str | Path | None = None,
    manifest: str | Path | None = None,
    layout: str | None = None,
    test_dir: str | Path | None = None,
    label_from_folder: bool = False,
    valid_percent: float = 5.0,
    piece_seconds: float | None = None,
    min_seconds: float = 0.0,
    num_processes: int | None = None,
    max_skipped_percent: float = 5.0,
    overwrite: bool = False,
    beam_pipeline_options: str | None = None,
) -> Path:
    """Builds the data set `data_dir/name`; the arguments are the program's flags.

    Decodes in `num_processes` other processes (None: one a core), or on Apache Beam where it is
    given options. The examples are the same whoever decodes.

    Returns:
      The directory of the data set's version.

    Raises:
      ManifestError, DataError, DecoderDiedError, OSError: and nothing was written, but the listing
        of skipped files where these are too many, and on Beam the shards that are done.
    """
    _check_source(audio_dir, manifest, layout, test_dir, label_from_folder)
    _check_percents(valid_percent, max_skipped_percent)
    if piece_seconds is None:
        # What is labelled for a task is scored a clip, not a piece.
        piece_seconds = 0.0 if layout else _PIECE_SECONDS
    _check_lengths(piece_seconds, min_seconds, num_processes)
    _check_places(data_dir, audio_dir, layout, beam_pipeline_options)
    options = None
    if beam_pipeline_options is not None:
        if num_processes is not None:
            raise ManifestError(
                f"--num_processes={num_processes} goes without --beam_pipeline_options: drop it, or"
                f" pass --beam_pipeline_options=direct_num_workers={num_processes}"
            )
        options = beam_runner.parse_options(beam_pipeline_options)
    data_dir = writer.resolve_data_dir(data_dir)
    if layout:
        listing = layouts.list_layout(layout, audio_dir, test_dir)
    elif manifest:
        listing = Listing.of(read_manifest(manifest, audio_dir))
    else:
        listing = Listing.of(list_folder(audio_dir, label_from_folder))
    # Nobody asked for the very files that are held out, so a few bad ones must not fail the build.
    may_be_empty = ["valid"] if listing.files[0].split is None else []
    files = assign_splits(listing.files, valid_percent)
    listing = dataclasses.replace(listing, files=files)
    by_split = {
        split: [file for file in files if file.split == split]
        for split in sorted({file.split for file in files})
    }
    writer.check_writable(name, data_dir, list(by_split), overwrite)
    if options is None:
        num_processes = min(num_processes or num_cores(), len(files))
        write = functools.partial(_write, num_processes=num_processes)
        workers = f"{num_processes} processes"
    else:
        write = functools.partial(beam.write, options=options)
        workers = beam_runner.describe(options)
    print(f"{len(files)} files from {manifest or audio_dir} to {data_dir / name}, {workers}")
    if listing.missing:
        print(f"not in the folder: {len(listing.missing)} more that the lists name")
    sys.stdout.flush()  # ahead of the progress bar, also in a pipe
    tally = Tally(listing)
    skipped = data_dir / f"{name}.skipped.tsv"
    skipped.unlink(missing_ok=True)
    directory = write(
        shard_file.Schema(name, listing.label_names, listing.is_multi_label),
        data_dir,
        by_split,
        Cut(piece_seconds, min_seconds),
        tally,
        check_skipped=functools.partial(tally.check_skipped, max_skipped_percent, skipped),
        description=f"{len(files)} audio files, built by maeast_jax.build_dataset.",
        overwrite=overwrite,
        may_be_empty=may_be_empty,
    )
    splits = [split for split in by_split if tally.clips[split]]
    print(tally.summary(directory))
    print(f"built {directory}; {next_steps(name, data_dir, splits, listing, layout)}", flush=True)
    return directory


def _write(
    schema: shard_file.Schema,
    data_dir: Path,
    by_split: Mapping[str, Sequence[AudioFile]],
    cut: Cut,
    tally: Tally,
    check_skipped: Callable[[], None],
    num_processes: int,
    **kwargs,
) -> Path:
    """Writes the data set from here, decoding in other processes; `beam_build.write` is another."""
    num_files = len(tally.listing.files)
    with DecodePool(num_processes) as pool, tqdm(total=num_files, unit="file") as bar:

        def examples(split: str) -> Iterator[writer.Example]:
            names = [file.path for file in by_split[split]]
            for file, decoded in zip(by_split[split], fetched.decode(pool, names), strict=True):
                clips = clips_of(file, decoded, cut)
                tally.add(file, decoded, clips)
                check_skipped()
                yield from clips
                bar.set_postfix_str(f"{tally.hours:.2f} h", refresh=False)
                bar.update()

        return writer.write(
            schema.name,
            data_dir,
            {split: functools.partial(examples, split) for split in by_split},
            label_names=schema.label_names,
            multi_label=schema.multi_label,
            finish=lambda staged: tally.write_skipped(staged / "skipped.tsv"),
            **kwargs,
        )


# --- command line ----------------------------------------------------------------------------


def _check_source(audio_dir, manifest, layout, test_dir, label_from_folder):
    if not audio_dir and not manifest:
        raise ManifestError("no source: pass --audio_dir=DIR, --manifest=FILE.tsv or both")
    if manifest and label_from_folder:
        raise ManifestError(
            "--label_from_folder goes with --audio_dir alone: in a manifest, labels are its column"
            " `label`"
        )
    if layout and (manifest or label_from_folder):
        raise ManifestError(
            f"--layout={layout} goes with --audio_dir alone: it has lists and labels of its own"
        )
    if test_dir and not layout:
        raise ManifestError("--test_dir goes with --layout=speech_commands_v1 alone: drop it")


def _check_percents(valid_percent, max_skipped_percent):
    if not 0 <= valid_percent < 100:
        raise ManifestError(f"--valid_percent={valid_percent:g}, expected 0 or more, under 100")
    if not 0 <= max_skipped_percent <= 100:
        raise ManifestError(f"--max_skipped_percent={max_skipped_percent:g}, expected 0 to 100")


def _check_lengths(piece_seconds, min_seconds, num_processes):
    if piece_seconds and not piece_seconds >= SHORTEST_TAIL_SECONDS:
        raise ManifestError(
            f"--piece_seconds={piece_seconds:g}, expected 0 (never cut) or at least"
            f" {SHORTEST_TAIL_SECONDS:g}"
        )
    if not min_seconds >= 0 or (piece_seconds and min_seconds > piece_seconds):
        raise ManifestError(
            f"--min_seconds={min_seconds:g}, expected 0 to --piece_seconds ({piece_seconds:g})"
        )
    if num_processes is not None and num_processes < 1:
        raise ManifestError(f"--num_processes={num_processes}, expected at least 1")


def _check_places(data_dir, audio_dir, layout, beam_pipeline_options):
    if storage.is_remote(data_dir) and beam_pipeline_options is None:
        raise ManifestError(
            f"--data_dir={data_dir} goes with Beam alone: add --beam_pipeline_options=direct, or"
            " build in a folder and copy it there"
        )
    if layout and storage.is_remote(audio_dir):
        raise ManifestError(
            f"--audio_dir={audio_dir} goes without --layout, which reads a folder: copy it to a"
            " disk, or mount the bucket"
        )


def _define_flags() -> None:
    flags.DEFINE_string(
        "audio_dir", None, "Folder with audio files, at any depth; may be gs://BUCKET/..."
    )
    flags.DEFINE_string(
        "manifest",
        None,
        "TSV with a column `path` (and, where there are, `split` and `label`, or `labels` with `;`"
        " between them), or fairseq's format."
        " Relative paths start at --audio_dir where given, else at the manifest's folder.",
    )
    flags.DEFINE_enum(
        "layout", None, list(layouts.LAYOUTS), "The data set that --audio_dir is, as published."
    )
    flags.DEFINE_string("test_dir", None, "Of speech_commands_v1: its separate test archive.")
    flags.DEFINE_string(
        "data_dir",
        None,
        "Where data sets are kept; this one goes to a subfolder. On Beam it may be gs://BUCKET/...",
    )
    flags.DEFINE_string("name", None, "The data set's name, lower snake case.")
    flags.DEFINE_bool("label_from_folder", False, "A file's label is the name of its folder.")
    flags.DEFINE_float(
        "valid_percent",
        5.0,
        "Share of files in split `valid`, by a hash of the path; splits of a manifest or layout"
        " win.",
    )
    flags.DEFINE_float(
        "piece_seconds",
        None,
        f"Longer files are cut into pieces; 0: never. Default: {_PIECE_SECONDS:g}; of a layout, 0.",
    )
    flags.DEFINE_float("min_seconds", 0.0, "Shorter clips are left out.")
    flags.DEFINE_integer("num_processes", None, "Processes that decode. Default: one a core.")
    flags.DEFINE_float("max_skipped_percent", 5.0, "The build fails past this share of bad files.")
    flags.DEFINE_bool("overwrite", False, "Replace the data set of that name, once built.")
    flags.DEFINE_string(
        "beam_pipeline_options",
        None,
        "Build on Apache Beam (pip install -r requirements-beam.txt): its options, such as"
        " runner=FlinkRunner,flink_master=HOST:8081. `direct`: processes of this machine.",
    )


def main(arguments: list[str]) -> int | None:
    if arguments:
        raise ManifestError(f"unexpected argument {arguments[0]!r}; flags are --name=value")
    try:
        build(**{name: flags.FLAGS[name].value for name in inspect.signature(build).parameters})
    except beam.BeamInterrupted as stop:
        print(f"error: {stop}", file=sys.stderr)
        return 130
    return None


if __name__ == "__main__":
    _define_flags()
    cli.run_flags(main, required=("data_dir", "name"))
