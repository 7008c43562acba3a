"""Metrics of a run on disk: metrics.jsonl, TensorBoard events, and pictures."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping

import numpy as np
from etils import epath

from maeast_jax.evaluation import plots
from maeast_jax.runtime import distributed, storage
from maeast_jax.training.trackers import Tracker

METRICS_FILE = "metrics.jsonl"
CURVES = "curves"


class MetricsWriter:
    """Appends metrics to `workdir/metrics.jsonl` and to TensorBoard's event files beside it.

    Of several processes only the first one writes. On gs:// there are no event files, and
    metrics.jsonl is written anew every half a minute and by `flush`.

    A run that was killed has written lines for steps after its last checkpoint, perhaps half a line
    at the end. Opening drops both, so that after the resumed run every step is there once.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        resume_step: int = 0,
        tracker: Tracker | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Opens the files for a run that has done `resume_step` steps; 0 is a run from the start.

        `tracker` gets each line too.

        Raises:
          ValueError: metrics.jsonl holds a line, other than the last, that is not a metrics row.
          OSError: `workdir` cannot be written.
        """
        self._workdir = storage.path(workdir)
        self._tracker = tracker
        self._written: set[tuple[int, str]] = set()
        self._file = self._events = None
        if not distributed.is_first():
            return
        path = self._workdir / METRICS_FILE
        self._workdir.mkdir(parents=True, exist_ok=True)
        # A run from the start evaluates before step 1 again, so it keeps no row.
        rows = _read_rows(path) if resume_step > 0 and path.exists() else []
        rows = [row for row in rows if row["step"] <= resume_step]
        self._written = {(row["step"], row["split"]) for row in rows}
        lines = "".join(map(_json_line, rows)).encode("ascii")
        storage.write_whole(path, lines)
        if storage.is_remote(path):
            self._file = storage.Rewritten(path, lines, clock)
            return
        self._file = open(path, "ab")  # noqa: SIM115 (closed by close)
        import tensorboardX

        # TensorBoard hides the events at purge_step and later that came before this one.
        self._events = tensorboardX.SummaryWriter(
            str(workdir),
            purge_step=resume_step + 1 if resume_step > 0 else 0,
            flush_secs=5,  # a kill loses what waits in memory
            filename_suffix=f".from{resume_step}",  # else a resume within a second would overwrite
        )

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends one line, flushed at once on a disk, and one TensorBoard scalar per value.

        `split` is "train" or "eval". A line that is already there for this step and split stays: a
        resumed run that evaluates again at the step of its checkpoint computes the same numbers.
        """
        step = int(step)
        if self._file is None or (step, split) in self._written:
            return
        self._written.add((step, split))
        values = {key: float(value) for key, value in values.items()}
        self._file.write(_json_line({"step": step, "split": split, **values}).encode("ascii"))
        if self._tracker is not None:
            self._tracker.log(step, split, values)
        if self._events is None:
            return
        self._file.flush()
        for key, value in values.items():
            self._events.add_scalar(f"{split}/{key}", value, step)

    def flush(self) -> None:
        """Returns once no kill can lose a line."""
        if self._file is not None:
            self._file.flush()

    def has(self, step: int, split: str) -> bool:
        """Returns whether that line is written; False in all processes but the first."""
        return (step, split) in self._written

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes uint8 [height, width, 3] to `workdir/NAME.png` and to TensorBoard."""
        if self._file is None:
            return
        plots.write_png(self._workdir / f"{name}.png", image)
        if self._events is not None:
            self._events.add_image(name, image, int(step), dataformats="HWC")

    def draw_curves(self) -> None:
        """Draws the curves of all lines so far to `workdir/curves.png`."""
        if self._file is not None:
            plots.write_png(
                self._workdir / f"{CURVES}.png", plots.curves(read_metrics(self._workdir))
            )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()
        if self._tracker is not None:
            self._tracker.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
    """Returns the rows of `workdir/metrics.jsonl`; a value that was not finite is None.

    A last line that is still being written, or was cut short by a kill, is left out.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line other than the last is not a metrics row.
    """
    return _read_rows(storage.path(workdir) / METRICS_FILE)


def has_row(workdir: str | os.PathLike, step: int, split: str) -> bool:
    """Returns whether metrics.jsonl is there and holds that row."""
    path = storage.path(workdir) / METRICS_FILE
    return path.exists() and any(
        (row["step"], row["split"]) == (step, split) for row in _read_rows(path)
    )


def last_row(workdir: str | os.PathLike, split: str) -> dict[str, float]:
    """Returns the values of the last row of a split; {} where there is none."""
    rows = [row for row in read_metrics(workdir) if row["split"] == split]
    return (
        {name: value for name, value in rows[-1].items() if name not in ("step", "split")}
        if rows
        else {}
    )


def _read_rows(path: epath.Path) -> list[dict]:
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            whole = isinstance(row, dict) and isinstance(row["step"], int) and "split" in row
        except (ValueError, KeyError):
            whole = False
        if whole:
            rows.append(row)
        elif number < len(lines):  # what follows the last newline is empty, or was cut short
            raise ValueError(
                f"{path} line {number} is {line[:60]!r}; it must be a JSON object with step and "
                "split: repair or remove that line"
            )
    return rows


def _json_line(row: Mapping) -> str:
    # JSON has no NaN or infinity. Strict readers (jq, browsers, pandas) refuse Python's names for
    # them; null means "no number here" to all of them.
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
