"""Files of an evaluation: predictions, metrics, a picture; and tables for the terminal.

| file            | content                                                                      |
|-----------------|------------------------------------------------------------------------------|
| predictions.tsv | one row per example: id, label, prediction, probability; quoted as by        |
|                 | Python's csv module. Where an example has several labels: its labels, the 5  |
|                 | likeliest classes and their probabilities, each separated by ";"             |
| results.json    | metrics with interval, one row per class, the commonest confusions, settings,|
|                 | and warnings: what makes the metrics worth less than they seem (checks.py);  |
|                 | null where a number is not defined or not finite                             |
| confusion.png   | counts, coloured by their share of the row; not with several labels          |
"""

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maeast_jax.evaluation import metrics, plots
from maeast_jax.evaluation.metrics import Evaluation
from maeast_jax.runtime import storage

_TOP_LABELS = 5
_CONFUSIONS = 20  # pairs of classes in results.json
_SHOWN = 5  # rows of each table in the terminal


def write(
    folder: str | os.PathLike,
    evaluation: Evaluation,
    ids: Sequence[str],
    probabilities: np.ndarray,
    targets: np.ndarray,
    settings: Mapping[str, Any],
    warnings: Sequence[str],
) -> None:
    """Writes the files of an evaluation into `folder`, and makes the folder where it is missing.

    Each file is written whole or not at all. results.json is written last: where it exists, the
    other files belong to it.

    Args:
      evaluation: the result of `metrics.evaluate` for these probabilities and targets.
      ids: [n], names of the examples.
      probabilities: float [n, C] in [0, 1].
      targets: int labels [n], or [n, C] of 0 and 1.
      settings: how the classifier was made; anything that JSON can hold.
      warnings: what makes the metrics worth less than they seem, a line each.

    Raises:
      OSError: a file cannot be written.
    """
    names = [row["name"] for row in evaluation.classes]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").unlink(missing_ok=True)
    predictions = _predictions(ids, probabilities, targets, names)
    storage.write_whole(folder / "predictions.tsv", predictions.encode())
    if evaluation.confusion is not None:
        plots.write_png(folder / "confusion.png", plots.confusion(evaluation.confusion, names))
    content = {
        "metric": evaluation.metric,
        "value": evaluation.value,
        "interval": list(evaluation.interval),
        "confidence": metrics.CONFIDENCE,
        "num_examples": evaluation.num_examples,
        **evaluation.others,
        "warnings": warnings,
        "empty_classes": evaluation.empty,
        "confusions": [
            {"label": label, "prediction": prediction, "count": count}
            for label, prediction, count in _confusions(evaluation, _CONFUSIONS)
        ],
        "classes": evaluation.classes,
        "settings": settings,
    }
    text = json.dumps(_finite(content), indent=1, allow_nan=False, ensure_ascii=False)
    storage.write_whole(folder / "results.json", f"{text}\n".encode())


def report(evaluation: Evaluation) -> str:
    """Returns metrics, worst and best classes and the commonest confusions for the terminal.

    Classes are ordered by f1 or average precision. Up to ten classes are all shown.
    """
    low, high = evaluation.interval
    size = f"{evaluation.num_examples:,} examples of {len(evaluation.classes)} classes"
    others = [f"{name} {_number(name, value)}" for name, value in evaluation.others.items()]
    parts = [
        f"{evaluation.metric} {100 * evaluation.value:.1f} % "
        f"[{100 * low:.1f}, {100 * high:.1f}], {size}\n" + ", ".join(others)
    ]
    if empty := evaluation.empty:
        more = ", …" if len(empty) > _SHOWN else ""
        shown = ", ".join(empty[:_SHOWN])
        parts.append(f"classes without an example: {len(empty)} ({shown}{more})")
    key = "average_precision" if evaluation.confusion is None else "f1"
    ranked = [row for row in evaluation.classes if row["count"]]
    ranked.sort(key=lambda row: row[key])
    if len(ranked) <= 2 * _SHOWN:
        parts.append(_class_table("classes, worst first", ranked))
    else:
        parts.append(_class_table("worst classes", ranked[:_SHOWN]))
        parts.append(_class_table("best classes", ranked[-_SHOWN:]))
    if pairs := _confusions(evaluation, _SHOWN):
        rows = [[label, prediction, str(count)] for label, prediction, count in pairs]
        parts.append(_aligned([["most confused", "taken for", "count"], *rows], left=2))
    return "\n\n".join(parts)


def table(rows: Mapping[str, Mapping[str, float | Sequence[float]]]) -> str:
    """Returns shares of several runs side by side in per cent, as aligned text.

    A cell of several values (folds, seeds) shows their mean ± sample standard deviation (n - 1) and
    their number in brackets. A cell without a value shows "–".

    Args:
      rows: {row: {column: value or values}}; columns appear in the order of their first row.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *columns]]
    for name, row in rows.items():
        lines.append([name, *(_cell(row.get(column, ())) for column in columns)])
    return _aligned(lines)


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
                ";".join(names[i] for i in own),
                ";".join(names[i] for i in likeliest),
                ";".join(f"{row[i]:.6g}" for i in likeliest),
            ]
        )
    return text.getvalue()


def _confusions(evaluation: Evaluation, count: int) -> list[tuple[str, str, int]]:
    """Returns (label, prediction, count) of the commonest errors."""
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
    """Returns a share in per cent, a count or d' as it is, and "–" for NaN."""
    if math.isnan(value):
        return "–"
    if name == "count":
        return f"{value:,}"
    return f"{value:.2f}" if name == "d_prime" else f"{100 * value:.1f}"


def _cell(values: float | Sequence[float]) -> str:
    values = 100 * np.atleast_1d(values)
    if not len(values):
        return "–"
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} ({len(values)})"


def _aligned(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns lines of columns; the first `left` columns are aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _finite(value: Any) -> Any:
    """Returns `value` with None in place of NaN and infinity, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
