"""Labels audio files with a classifier that maeast_jax.finetune made, in any of its modes.

  python -m maeast_jax.predict FILE... --checkpoint=WORKDIR --output=labels.tsv

FILE is an audio or video file of any format and length, or a folder of such files at any depth. The
output is a table with a row per file: file, label, probability. A file longer than a window is cut
into windows, and its probabilities are the means over them; --per_window writes them with the start
and the end of each window in seconds. The program reports a file that it cannot read, labels the
others and ends with exit code 4. The output appears once it is whole.
"""

import inspect
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags
from tqdm import tqdm

from maeast_jax.data import DecodePool, Outcome, files, num_cores
from maeast_jax.ingest import sources
from maeast_jax.runtime import cli, terminal

if TYPE_CHECKING:  # Each decoding process imports this file, and does not need jax.
    from maeast_jax.inference import LabelClassifier

_MULTI_LABEL_THRESHOLD = 0.5
_MUCH_LONGER = 1.5  # a window this much longer than all training clips deserves a remark
_SHOWN = 8  # classes in the plan and in the summary


def predict(
    paths: Sequence[str | os.PathLike],
    *,
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    top: int | None = None,
    threshold: float | None = None,
    per_window: bool = False,
    window_seconds: float | None = None,
    stride_seconds: float | None = None,
    batch_tokens: int | None = None,
    num_processes: int | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Labels files and folders of files in `output`; the arguments are the program's flags.

    If no file can be read, nothing is written.

    Raises:
      ValueError: one line, before any file is decoded.
      OSError: the output cannot be written; nothing of it is left.
    """
    from maeast_jax.inference import label_file, load_classifier
    from maeast_jax.runtime import memory

    output = os.path.expanduser(os.fspath(output))
    label_file.check(output, overwrite)
    paths, notes = sources.list_named(paths)
    classifier = load_classifier(
        checkpoint,
        window_seconds=window_seconds,
        stride_seconds=stride_seconds,
        batch_tokens=batch_tokens,
    )
    # Several classes may hold: by default as many as are likelier than not, unless --top asks.
    takes_any = classifier.is_multi_label and top is None
    choice = label_file.Choice(
        (0 if takes_any else 1) if top is None else top,
        (_MULTI_LABEL_THRESHOLD if takes_any else 0.0) if threshold is None else threshold,
    )
    # Standard output is for the table alone where it goes there.
    stream = sys.stderr if output == label_file.STDOUT else sys.stdout
    plan = {
        "files": "\n".join([str(len(paths)), *notes]),
        **_describe(classifier),
        "labels": f"{choice.describe()}, per {'window' if per_window else 'file'}",
        "output": output,
    }
    print(terminal.announce(plan), file=stream, flush=True)
    outcome, num_cut = Outcome(), 0
    start = time.monotonic()
    with (
        memory.out_of_memory("pass a smaller --batch_tokens or --window_seconds"),
        label_file.open_writer(output, classifier.class_names, choice, per_window) as writer,
        DecodePool(min(num_processes or num_cores(), len(paths))) as decode_pool,
        tqdm(total=len(paths), unit="file") as bar,
    ):
        clips = files.decoded(paths, decode_pool, outcome, bar)
        for index, prediction in enumerate(classifier(clips)):
            writer.add(outcome.done[index], prediction)
            num_cut += len(prediction.of_windows) > 1
            bar.update()
    summary = outcome.summary("labelled", time.monotonic() - start)
    if outcome.done:
        counted = [f"{name or 'none'} {count}" for name, count in writer.counts.most_common()]
        summary["labels"] = _listed(counted)
    summary["output"] = output if outcome.done else "none: no file could be read"
    if outcome.done and output != label_file.STDOUT:
        summary["read it"] = label_file.how_to_read(output)
    if num_cut and not per_window:
        summary["next"] = (
            f"files longer than a window: {num_cut}; when each label holds in them:\n"
            "the same command with --per_window and another --output"
        )
    print(terminal.announce(summary), file=stream, flush=True)
    return outcome


def _describe(classifier: "LabelClassifier") -> dict[str, str]:
    """Returns lines of the plan."""
    number = "any number" if classifier.is_multi_label else "one"
    window = "none: files are never cut"
    if classifier.window_seconds:
        window = f"{classifier.window_seconds:g} s every {classifier.stride_seconds:g} s"
    longest = classifier.longest_seconds
    # A classifier of words hears ten of them at once where a window is so much longer.
    if longest and not 0 < classifier.window_seconds < _MUCH_LONGER * longest:
        window += (
            f"\ntraining clips are at most {longest:.2f} s long: longer files may need "
            f"--window_seconds={longest:.2f}"
        )
    names = _listed(classifier.class_names)
    return {
        "checkpoint": "\n".join([classifier.path, *classifier.notes]),
        "model": classifier.about,
        "classes": f"{len(classifier.class_names)}, {number} per clip: {names}",
        "windows": window,
    }


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:_SHOWN]) + (", ..." if len(words) > _SHOWN else "")


def _define_flags() -> None:
    flags.DEFINE_string(
        "checkpoint",
        None,
        "The workdir of a run of maeast_jax.finetune (of one of its folds),"
        " WORKDIR/checkpoints/STEP, a folder for transformers, or hf://ORG/NAME.",
    )
    flags.DEFINE_string(
        "output",
        None,
        "FILE.tsv, or - for standard output, where rows appear as they are computed.",
    )
    flags.DEFINE_integer(
        "top",
        None,
        "Rows per file: so many of the likeliest classes; 0: all. Default: 1, and all that reach"
        " the threshold where clips may have several labels.",
    )
    flags.DEFINE_float(
        "threshold",
        None,
        "Least probability of a label. A file without any has one row with an empty label."
        " Default: 0, and 0.5 where clips may have several labels and --top is not given.",
    )
    flags.DEFINE_bool(
        "per_window", False, "A row per window and label, with start and end in seconds."
    )
    flags.DEFINE_float(
        "window_seconds",
        None,
        "Longer files are cut into windows; 0: never. Default: the longest clip that the run takes"
        " whole. Rounded down to whole tokens, like the stride.",
    )
    flags.DEFINE_float(
        "stride_seconds",
        None,
        "Time from one window to the next. Default: the window. Where windows overlap, each moment"
        " counts for the window with the nearest middle.",
    )
    flags.DEFINE_integer(
        "batch_tokens",
        None,
        "Tokens per batch. Default: 1024 on a CPU, 16384 elsewhere.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "num_processes", None, "Processes that decode. Default: one per core.", lower_bound=1
    )
    flags.DEFINE_bool("overwrite", False, "Replace the output when the new one is complete.")
    flags.FLAGS.set_gnu_getopt()  # flags may follow files


def main(arguments: list[str]) -> int:
    names = [name for name in inspect.signature(predict).parameters if name != "paths"]
    outcome = predict(arguments, **{name: flags.FLAGS[name].value for name in names})
    return cli.EXIT_INCOMPLETE if outcome.failed else 0


if __name__ == "__main__":
    _define_flags()
    cli.run_flags(main, required=("checkpoint", "output"))
