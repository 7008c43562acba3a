"""Tables of labels: file, label and probability, separated by tabs and quoted as by Python's csv.

A file, or a window of it, has one row per label, the likeliest first. Where no class is likely
enough it has one row with an empty label and an empty probability, so that it is not missing.
"""

import collections
import contextlib
import csv
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from maeast_jax.inference.classifier import Prediction
from maeast_jax.runtime import storage

STDOUT = "-"
SUFFIX = ".tsv"


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which classes become labels: the `top` likeliest with at least the probability `threshold`.

    `top` 0 takes any number. Raises ValueError, in one line, for values out of range.
    """

    top: int
    threshold: float

    def __post_init__(self):
        if self.top < 0:
            raise ValueError(f"--top={self.top} must not be negative; 0 takes any number")
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"--threshold={self.threshold:g} must be a probability, from 0 to 1")

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        """Returns the numbers of the chosen classes, the likeliest first, of [classes]."""
        order = np.argsort(-probabilities, kind="stable")[: self.top or None]
        return order[probabilities[order] >= self.threshold]

    def describe(self) -> str:
        """Returns the rule in words."""
        if self.top == 1:
            which = "the likeliest class"
        else:
            which = f"the {self.top} likeliest classes" if self.top else "every class"
        return which + (f" of at least {self.threshold:g}" if self.threshold else "")


class Writer:
    """Writes rows, and counts the labels of whole files in `counts`; "" counts files without."""

    def __init__(self, text: TextIO, class_names: Sequence[str], choice: Choice, per_window: bool):
        self._rows = csv.writer(text, dialect="excel-tab", lineterminator="\n")
        self._class_names, self._choice, self._per_window = class_names, choice, per_window
        self.counts: collections.Counter[str] = collections.Counter()
        times = ["start", "end"] if per_window else []
        self._rows.writerow(["file", *times, "label", "probability"])

    def add(self, file: str, prediction: Prediction) -> None:
        """Writes the rows of a file. With `per_window` start and end are seconds."""
        of_file = self._labels(prediction.probabilities)
        self.counts.update(label for label, _ in of_file)
        if not self._per_window:
            self._rows.writerows([file, *label] for label in of_file)
            return
        for seconds, probabilities in zip(prediction.seconds, prediction.of_windows, strict=True):
            times = [round(float(time), 3) for time in seconds]
            self._rows.writerows([file, *times, *label] for label in self._labels(probabilities))

    def _labels(self, probabilities: np.ndarray) -> list[tuple[str, str]]:
        chosen = self._choice(probabilities)
        found = [(self._class_names[i], f"{probabilities[i]:.6g}") for i in chosen]
        return found or [("", "")]


def check(path: str, overwrite: bool = False) -> None:
    """Raises ValueError, in one line, if `open_writer` could not write to `path`."""
    if path == STDOUT:
        return
    if not path.endswith(SUFFIX):
        raise ValueError(f"--output={path} must end in {SUFFIX}, or be {STDOUT} for the terminal")
    storage.check_local(path)
    storage.check_output(Path(path), overwrite)


@contextlib.contextmanager
def open_writer(
    path: str, class_names: Sequence[str], choice: Choice, per_window: bool
) -> Iterator[Writer]:
    """Yields a writer. The file appears, or replaces another one, when the `with` statement ends.

    No file appears after an exception or if nothing was added. On standard output (`STDOUT`) rows
    appear as they are added.
    """
    arguments = (class_names, choice, per_window)
    if path == STDOUT:
        yield Writer(sys.stdout, *arguments)
        sys.stdout.flush()
        return
    with contextlib.suppress(_NothingAddedError), storage.whole(path) as partial:
        with partial.open("w", encoding="utf-8", newline="") as text:
            writer = Writer(text, *arguments)
            yield writer
        if not writer.counts:
            raise _NothingAddedError


def how_to_read(path: str | os.PathLike) -> str:
    """Returns Python code that reads such a file into `rows`, a dict per row."""
    opened = f'open({os.fspath(path)!r}, encoding="utf-8", newline="")'
    return f'import csv; rows = list(csv.DictReader({opened}, dialect="excel-tab"))'


class _NothingAddedError(Exception):
    """Keeps `open_writer` from making a file."""
