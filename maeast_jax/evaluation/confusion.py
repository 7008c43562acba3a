"""Confusion matrices as pictures."""

from collections.abc import Sequence

import numpy as np

_MOST_DRAWN = 50  # classes in a picture whose names can still be read
_MOST_NUMBERED = 25  # and in one whose cells hold their counts
_NAME_CHARACTERS = 24
_DPI = 110


def draw(matrix: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Draws a confusion matrix: rows true, columns predicted, a row's colours its shares.

    Of more than 50 classes the most confused 50; their shares are still of all their examples.

    Args:
      matrix: int [C, C] of counts.
      class_names: [C].

    Returns:
      uint8 [H, W, 3].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    chosen = most_confused(matrix, _MOST_DRAWN)
    names = [_shortened(str(class_names[i])) for i in chosen]
    shares = (matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1))[np.ix_(chosen, chosen)]
    is_numbered = len(chosen) <= _MOST_NUMBERED
    inches = max(len(chosen) * (0.42 if is_numbered else 0.19), 2.0)
    name_inches = 0.075 * max(map(len, names))
    figure = Figure(
        figsize=(inches + name_inches + 1.1, inches + name_inches + 0.8),
        dpi=_DPI,
        layout="compressed",  # constrained, for axes of fixed aspect
    )
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    scale = PowerNorm(0.5, vmin=0, vmax=1)  # on a linear one errors of a few per cent are white
    image = axis.imshow(shares, cmap="Blues", norm=scale, interpolation="nearest")
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
    axis.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    axis.tick_params(length=0)
    axis.set_xlabel("predicted", fontsize=8)
    axis.set_ylabel("true", fontsize=8)
    right = np.trace(matrix) / max(matrix.sum(), 1)
    title = f"{matrix.sum():,} examples, {right:.1%} right"
    if len(chosen) < len(matrix):
        title += f"; the {len(chosen)} most confused of {len(matrix)} classes"
    axis.set_title(title, fontsize=9)
    if is_numbered:
        for row, column in zip(*np.nonzero(shares), strict=True):
            axis.text(
                column,
                row,
                matrix[chosen[row], chosen[column]],
                color="white" if shares[row, column] > 0.3 else "black",
                fontsize=7,
                ha="center",
                va="center",
            )
    bar = figure.colorbar(image, ax=axis, fraction=0.03, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("share of the row", fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def most_confused(matrix: np.ndarray, count: int) -> np.ndarray:
    """int [min(count, C)], ascending: the classes of the pairs that are confused most often.

    Pairs in order of how often either is taken for the other; when these are used up, the classes
    with most examples.
    """
    num_classes = len(matrix)
    if num_classes <= count:
        return np.arange(num_classes)
    first, second = np.triu_indices(num_classes, k=1)
    errors = (matrix + matrix.T)[first, second]
    order = np.argsort(-errors, kind="stable")[: np.count_nonzero(errors)]
    chosen: dict[int, None] = {}
    for pair in order:
        chosen.update({int(first[pair]): None, int(second[pair]): None})
        if len(chosen) >= count:
            break
    chosen.update(dict.fromkeys(map(int, np.argsort(-matrix.sum(axis=1), kind="stable"))))
    return np.sort(list(chosen)[:count])


def _shortened(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= _NAME_CHARACTERS else name[: _NAME_CHARACTERS - 1] + "…"
