"""Turns audio files into a TFDS data set of 16 kHz mono 16-bit clips in array_record shards.

  python -m maeast_jax.build_dataset --audio_dir=DIR --data_dir=DATA --name=NAME
  python -m maeast_jax.build_dataset --layout=esc50 --audio_dir=ESC-50-master --data_dir=DATA \\
      --name=esc50

--layout takes a data set as its authors publish it, with its classes and splits: audioset, esc50,
speech_commands_v1 (12 classes; --test_dir), speech_commands_v2 (35 words), voxceleb1, iemocap.
ingest/layouts.py lists the files that each folder has to hold. Clips of a layout stay whole.

Folders named train, valid and test (in any case; training, val, validation, dev, testing, eval and
evaluation as well) give the files below them their splits, where there are two of these. The build
says so, and what it leaves out by name.

A file that no decoder reads is skipped, and clips that a layout's lists name may be missing. Both
are counted, and listed in skipped.tsv in the data set's folder. Files that were read in part or
scaled down, and clips without sound, are counted too, and listed in remarks.tsv. An interrupted
build leaves nothing that opens: run it again.

On Apache Beam, on this machine or on a cluster:

  python -m maeast_jax.build_dataset ... --beam_pipeline_options=direct

Recordings may lie on gs://, and with Beam the data set too.
"""

import dataclasses

from absl import flags

from maeast_jax.ingest import LAYOUTS, PIECE_SECONDS, BuildOptions, ManifestError, build_dataset
from maeast_jax.runtime import cli


def _define_flags() -> None:
    flags.DEFINE_string(
        "audio_dir", None, "Folder with audio files, at any depth; may be gs://BUCKET/..."
    )
    flags.DEFINE_string(
        "manifest",
        None,
        "TSV or CSV with a column `path` (and optionally `split` and `label`, or `labels` with `;`"
        " between them), a bare list of paths, or fairseq's format; UTF-8."
        " Relative paths start at --audio_dir where given, else at the manifest's folder.",
    )
    flags.DEFINE_enum(
        "layout", None, list(LAYOUTS), "The published data set that --audio_dir holds."
    )
    flags.DEFINE_string("test_dir", None, "The separate test archive of speech_commands_v1.")
    flags.DEFINE_string(
        "data_dir",
        None,
        "Folder of data sets; this one goes to a subfolder. With Beam it may be gs://BUCKET/...",
    )
    flags.DEFINE_string("name", None, "The data set's name, lower snake case.")
    flags.DEFINE_bool(
        "label_from_folder",
        False,
        "A file's label is the name of its outermost folder below --audio_dir, apart from a split's"
        " and from folders that hold all files.",
    )
    flags.DEFINE_float(
        "valid_percent",
        BuildOptions.valid_percent,
        "Share of files in split `valid`, by a hash of the path; splits of a manifest, folders or a"
        " layout win.",
        lower_bound=0,
        upper_bound=100,
    )
    flags.DEFINE_float(
        "piece_seconds",
        None,
        f"Longer files are cut into pieces; 0: never. Default: {PIECE_SECONDS:g}; for a layout 0.",
        lower_bound=0,
    )
    flags.DEFINE_float(
        "min_seconds", BuildOptions.min_seconds, "Shorter clips are left out.", lower_bound=0
    )
    flags.DEFINE_integer(
        "num_processes", None, "Processes that decode. Default: one per core.", lower_bound=1
    )
    flags.DEFINE_float(
        "max_skipped_percent",
        BuildOptions.max_skipped_percent,
        "The build fails past this share of bad files.",
        lower_bound=0,
        upper_bound=100,
    )
    flags.DEFINE_bool("overwrite", False, "Replace the data set of that name, once built.")
    flags.DEFINE_string(
        "beam_pipeline_options",
        None,
        "Build on Apache Beam (pip install -r requirements-beam.txt): its options, such as"
        " runner=FlinkRunner,flink_master=HOST:8081. `direct`: processes of this machine.",
    )


def main(arguments: list[str]) -> None:
    if arguments:
        raise ManifestError(f"unexpected argument {arguments[0]!r}; flags are --name=value")
    names = [field.name for field in dataclasses.fields(BuildOptions)]
    build_dataset(BuildOptions(**{name: flags.FLAGS[name].value for name in names}))


if __name__ == "__main__":
    _define_flags()
    cli.run_flags(main, required=("data_dir", "name"))
