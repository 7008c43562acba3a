"""Pictures as arrays of pixels: spectrograms reconstructed, a run's curves, a benchmark's bars.

Every figure is its own `matplotlib.figure.Figure` on an Agg canvas: no display, no pyplot state.
"""

import io
import math
import os
from collections.abc import Iterable, Mapping

import numpy as np

from maeast_jax.runtime import storage

MASKED_GREY = (160, 160, 160)  # what `reconstructions` paints where there is no value
_SPLIT_STYLES = {
    "train": {"color": "#4c78a8", "linewidth": 1.2},
    "eval": {"color": "#e45756", "linewidth": 1.8, "marker": "o", "markersize": 3.5},
}
_CURVES = ("loss", "mse", "info_nce")
_OPTIONAL_CURVES = ("knn_accuracy", "knn_map")
_MODEL_COLOURS = ("#4c78a8", "#e45756", "#f2a6a4")
_ROW_LABELS = {
    "model": lambda row: row["model"],
    "encoder_layers": lambda row: f"{row['encoder_layers']} layers",
    "tokens": lambda row: row["tokens"],
    "batch": lambda row: f"batch {row['batch']}",
    "dtype": lambda row: row["dtype"],
    "num_frames": lambda row: f"{row['num_frames']} frames",
    "device": lambda row: f"{row['devices']} x {row['device']}",
}
_FRAME_SECONDS = 0.01
_DPI = 110


def reconstructions(
    original: np.ndarray, masked: np.ndarray, reconstructed: np.ndarray
) -> np.ndarray:
    """Draws spectrograms beside what the encoder saw of them and what the model made of that.

    A row a clip, and one colour scale a row: from the 1st to the 99.5th percentile of its original.
    Values that are not finite are drawn in MASKED_GREY.

    Args:
      original: float [n, frames, bands], log-mel energies.
      masked: the same, NaN where a token was dropped.
      reconstructed: the same, as the decoder gave it.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ValueError: no clips, or shapes that differ.
    """
    original, masked, reconstructed = (
        np.asarray(x, np.float32) for x in (original, masked, reconstructed)
    )
    if original.ndim != 3 or original.size == 0:
        raise ValueError(
            f"original has shape {list(original.shape)}; it must be [n, frames, bands], none of "
            "them 0: pass one clip as x[None]"
        )
    for name, x in (("masked", masked), ("reconstructed", reconstructed)):
        if x.shape != original.shape:
            raise ValueError(
                f"{name} has shape {list(x.shape)}; it must have that of original, "
                f"{list(original.shape)}: pass the three of the same clips"
            )
    rows, frames, bands = original.shape
    kept_percent = 100 * float(np.isfinite(masked).mean())

    panel_inches = min(max(frames / 85, 2.4), 8.0)  # a pixel a frame or more, up to 8 seconds
    figure = _figure(3 * panel_inches + 0.7, 1.55 * rows + 0.6)
    axes = figure.subplots(rows, 3, sharex=True, sharey=True, squeeze=False)
    palette = _palette()
    for row in range(rows):
        low, high = np.nanpercentile(_finite_or_nan(original[row]), [1, 99.5])
        for axis, x in zip(axes[row], (original, masked, reconstructed), strict=True):
            axis.imshow(
                _finite_or_nan(x[row]).T,
                cmap=palette,
                vmin=low,
                vmax=max(high, low + 1e-6),
                origin="lower",
                aspect="auto",
                interpolation="nearest",  # blending would smear the grey into the kept tokens
                extent=(0, frames * _FRAME_SECONDS, 0, bands),
            )
            axis.tick_params(labelsize=7, length=2)
        axes[row, 0].set_ylabel("mel band", fontsize=8)
        axes[row, 0].set_yticks(np.linspace(0, bands, 5))
    headings = ("original", f"kept {kept_percent:.3g} %", "reconstructed")
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("seconds", fontsize=8)
    return _pixels(figure)


def curves(rows: Iterable[Mapping]) -> np.ndarray:
    """Draws loss, mse and info_nce of a run over its steps, and what neighbours tell where it was
    asked: a panel each, a line a split.

    Args:
      rows: as in metrics.jsonl: `step`, `split` ("train" or "eval") and values. A row that lacks a
        value is left out of that panel; None or a value that is not finite breaks the line.

    Returns:
      uint8 [H, W, 3].
    """
    rows = sorted(rows, key=lambda row: row["step"])
    asked = [key for key in _OPTIONAL_CURVES if any(key in row for row in rows)]
    shown = (*_CURVES, *asked)
    figure = _figure(3.6 * len(shown), 2.8)
    for axis, key in zip(figure.subplots(1, len(shown)), shown, strict=True):
        for split, style in _SPLIT_STYLES.items():
            drawn = [row for row in rows if row["split"] == split and key in row]
            values = [math.nan if row[key] is None else row[key] for row in drawn]
            if drawn:
                steps = [row["step"] for row in drawn]
                axis.plot(steps, _finite_or_nan(values), label=split, **style)
        axis.set_title(key, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8, frameon=False)
    return _pixels(figure)


def speeds(rows: Iterable[Mapping]) -> np.ndarray:
    """Draws a benchmark's rows as bars: clips a second, and the memory of a device beside it.

    A colour a model; a line from the 10th to the 90th percentile. What all rows share is said once,
    above.

    Args:
      rows: as `benchmark --json` writes them; those that did not fit are left out.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ValueError: no row was measured.
    """
    rows = [row for row in rows if row["fits"]]
    if not rows:
        raise ValueError("no row to draw: none was measured; choose a smaller --batch")
    told = {name: [write(row) for row in rows] for name, write in _ROW_LABELS.items()}
    shared = [words[0] for words in told.values() if len(set(words)) == 1]
    own = [words for words in told.values() if len(set(words)) > 1]
    labels = [", ".join(words) for words in zip(*own, strict=True)] if own else [""]
    models = list(dict.fromkeys(row["model"] for row in rows))
    colours = [_MODEL_COLOURS[models.index(row["model"]) % len(_MODEL_COLOURS)] for row in rows]
    speed = np.array([row["clips_per_second"] for row in rows])
    ends = np.array([[row[f"clips_per_second_p{percent}"] for row in rows] for percent in (10, 90)])
    memory = [row["peak_memory_bytes"] / 1e9 for row in rows]

    figure = _figure(8.6, 0.32 * len(rows) + 1.2)
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, values, farthest, heading, error in (
        (left, speed, ends.max(), "clips a second", np.abs(ends - speed)),
        (right, memory, max(memory), "memory planned a device, GB", None),
    ):
        axis.barh(range(len(rows)), values, xerr=error, color=colours, height=0.7)
        for place, value in enumerate(values):
            axis.annotate(
                f" {value:.3g}", (value, place), va="bottom", fontsize=7, annotation_clip=False
            )
        axis.set_xlabel(heading, fontsize=8)
        axis.set_xlim(0, 1.15 * farthest)
        axis.tick_params(labelsize=7)
    left.set_yticks(range(len(rows)), labels)
    left.invert_yaxis()
    figure.suptitle(", ".join(shared), fontsize=10)
    return _pixels(figure)


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes uint8 [H, W, 3] as a PNG file, whole or not at all: a reader never meets half a file.

    Raises:
      ValueError: `image` is of another type or shape.
      OSError: the file cannot be written.
    """
    from matplotlib.image import imsave

    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"image is {image.dtype} {list(image.shape)}; it must be uint8 [H, W, 3]: scale to "
            "0..255 and convert"
        )
    file = io.BytesIO()
    imsave(file, image, format="png")
    storage.write_whole(storage.path(path), file.getvalue())


def _figure(width_inches: float, height_inches: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), dpi=_DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)
    FigureCanvasAgg(figure)
    return figure


def _pixels(figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _palette():
    from matplotlib import colormaps

    return colormaps["magma"].with_extremes(bad=tuple(level / 255 for level in MASKED_GREY))


def _finite_or_nan(values) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return np.where(np.isfinite(values), values, np.nan)
