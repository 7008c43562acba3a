"""What an evaluation leaves behind: predictions, numbers, a picture, and tables for the terminal.

| file            | content                                                                     |
|-----------------|-----------------------------------------------------------------------------|
| predictions.tsv | a row an example: id, label, prediction, probability; fields quoted as      |
|                 | Python's csv module does. With several labels an example: its labels, the 5 |
|                 | likeliest classes and their probabilities, each separated by ";"            |
| results.json    | metrics with interval, a row a class, the commonest confusions, settings;   |
|                 | null where a number is not defined or not finite                            |
| confusion.png   | counts, each row coloured by its own shares; not with several labels        |
"""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maeast_jax.evaluation import metrics, plots
from maeast_jax.evaluation.metrics import Evaluation

PREDICTIONS_FILE = "predictions.tsv"
RESULTS_FILE = "results.json"
CONFUSION_FILE = "confusion.png"

_SEPARATOR = ";"
_TOP_LABELS = 5
_CONFUSIONS = 20


def write(
    folder: str | os.PathLike,
    evaluation: Evaluation,
    ids: Sequence[str],
    probabilities: np.ndarray,
    targets: np.ndarray,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes the module's files into `folder`, which is made; each whole or not at all.

    results.json comes last: where it is, the others belong to it.

    Args:
      evaluation: of these `probabilities` (or scores that rank alike) and `targets`.
      ids: [n], what the examples are called.
      probabilities: float [n, C] in [0, 1].
      targets: int labels [n], or [n, C] of 0 and 1.
      settings: how the classifier came about; anything JSON holds.

    Raises:
      ValueError: another number of ids, or probabilities outside [0, 1].
      OSError: a file cannot be written.
    """
    probabilities, targets = metrics.checked(probabilities, targets)
    names = [row["name"] for row in evaluation.classes]
    if not len(ids) == len(targets) == evaluation.num_examples:
        raise ValueError(
            f"there are {len(ids)} ids and {len(targets)} targets for {evaluation.num_examples} "
            "examples evaluated: pass those of the same examples"
        )
    if probabilities.min() < 0 or probabilities.max() > 1:
        raise ValueError(
            f"probabilities run from {probabilities.min():g} to {probabilities.max():g}; they must "
            "be in [0, 1]: apply softmax or sigmoid"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS_FILE).unlink(missing_ok=True)
    _write_text(folder / PREDICTIONS_FILE, _predictions(ids, probabilities, targets, names))
    if evaluation.confusion is None:
        (folder / CONFUSION_FILE).unlink(missing_ok=True)
    else:
        plots.write_png(folder / CONFUSION_FILE, plots.confusion(evaluation.confusion, names))
    content = {**summary(evaluation), "settings": dict(settings or {})}
    text = json.dumps(_finite(content), indent=1, allow_nan=False, ensure_ascii=False)
    _write_text(folder / RESULTS_FILE, text + "\n")


def read(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of a folder's results.json; FileNotFoundError where there is none."""
    return json.loads((Path(folder) / RESULTS_FILE).read_text(encoding="utf-8"))


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as plain Python objects: results.json without the settings."""
    return {
        "metric": evaluation.metric,
        "value": evaluation.value,
        "interval": list(evaluation.interval),
        "confidence": metrics.CONFIDENCE,
        "num_examples": evaluation.num_examples,
        **evaluation.others,
        "empty_classes": evaluation.empty,
        "confusions": [
            {"label": label, "prediction": prediction, "count": count}
            for label, prediction, count in _confusions(evaluation, _CONFUSIONS)
        ],
        "classes": evaluation.classes,
    }


def report(evaluation: Evaluation, num_shown: int = 5) -> str:
    """For the terminal: the metrics, the worst and best classes, the commonest confusions.

    Classes rank by f1 or average precision. All are shown where they are few.
    """
    low, high = evaluation.interval
    size = f"{evaluation.num_examples:,} examples of {len(evaluation.classes)} classes"
    others = [f"{name} {_number(name, value)}" for name, value in evaluation.others.items()]
    parts = [
        f"{evaluation.metric} {100 * evaluation.value:.1f} % "
        f"[{100 * low:.1f}, {100 * high:.1f}], {size}\n" + ", ".join(others)
    ]
    if evaluation.empty:
        empty = f"{len(evaluation.empty)} ({_some(evaluation.empty)})"
        parts.append(f"classes without an example: {empty}")
    key = "average_precision" if evaluation.confusion is None else "f1"
    ranked = [row for row in evaluation.classes if row["count"]]
    ranked.sort(key=lambda row: row[key])
    if len(ranked) <= 2 * num_shown:
        parts.append(_class_table("classes, worst first", ranked))
    else:
        parts.append(_class_table("worst classes", ranked[:num_shown]))
        parts.append(_class_table("best classes", ranked[-num_shown:]))
    if pairs := _confusions(evaluation, num_shown):
        rows = [[label, prediction, str(count)] for label, prediction, count in pairs]
        parts.append(_aligned([["most confused", "taken for", "count"], *rows], left=2))
    return "\n\n".join(parts)


def table(
    rows: Mapping[str, Mapping[str, float | Sequence[float]]],
    number: Callable[[float], str] = lambda value: f"{100 * value:.1f}",
) -> str:
    """Several runs side by side: rows and columns by name, as aligned text.

    A cell of several values (folds, seeds) shows their mean ± standard deviation and, in brackets,
    how many they are. The deviation is the sample's (n - 1). What a row lacks, or is empty, is "–".

    Args:
      rows: {row: {column: value or values}}; columns come in the order they are first met.
      number: writes a value; by default a share as per cent.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *columns]]
    for name, row in rows.items():
        lines.append([name, *(_cell(row.get(column, ()), number) for column in columns)])
    return _aligned(lines)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the deviation of one value is NaN.

    Raises:
      ValueError: no values.
    """
    if not len(values):
        raise ValueError("there are no values to take the mean of: finish a fold or a seed first")
    mean = float(np.mean(values))
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _predictions(
    ids: Sequence[str], probabilities: np.ndarray, targets: np.ndarray, names: Sequence[str]
) -> str:
    text = io.StringIO()
    writer = csv.writer(text, dialect="excel-tab", lineterminator="\n")
    writer.writerow(["id", "label", "prediction", "probability"])
    if targets.ndim == 1:
        top = np.argmax(probabilities, axis=1)[:, None]
        labels = targets[:, None]
    else:
        top = np.argsort(-probabilities, axis=1, kind="stable")[:, :_TOP_LABELS]
        labels = [np.flatnonzero(target) for target in targets]
    for name, own, likeliest, row in zip(ids, labels, top, probabilities, strict=True):
        writer.writerow(
            [
                name,
                _SEPARATOR.join(names[i] for i in own),
                _SEPARATOR.join(names[i] for i in likeliest),
                _SEPARATOR.join(f"{row[i]:.6g}" for i in likeliest),
            ]
        )
    return text.getvalue()


def _confusions(evaluation: Evaluation, count: int) -> list[tuple[str, str, int]]:
    """(label, prediction, count) of the commonest errors."""
    if evaluation.confusion is None:
        return []
    errors = evaluation.confusion * ~np.eye(len(evaluation.confusion), dtype=bool)
    order = np.argsort(-errors, axis=None, kind="stable")[: min(count, np.count_nonzero(errors))]
    names = [row["name"] for row in evaluation.classes]
    pairs = zip(*np.unravel_index(order, errors.shape), strict=True)
    return [(names[i], names[j], int(errors[i, j])) for i, j in pairs]


def _class_table(heading: str, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [key for key in rows[0] if key != "name"]
    lines = [[heading, *(column.replace("_", " ") for column in columns)]]
    for row in rows:
        lines.append([row["name"], *(_number(column, row[column]) for column in columns)])
    return _aligned(lines)


def _number(name: str, value: float) -> str:
    """Shares as per cent, counts and d' as they are, "–" for what is not defined."""
    if math.isnan(value):
        return "–"
    if name == "count":
        return f"{value:,}"
    return f"{value:.2f}" if name == "d_prime" else f"{100 * value:.1f}"


def _cell(values: float | Sequence[float], number: Callable[[float], str]) -> str:
    values = np.atleast_1d(values)
    if not len(values):
        return "–"
    mean, deviation = mean_and_deviation(values)
    if len(values) == 1:
        return number(mean)
    return f"{number(mean)} ± {number(deviation)} ({len(values)})"


def _some(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _aligned(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns two spaces apart: the first `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON has no name for."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: a rename is atomic
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
