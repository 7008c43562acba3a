"""Pictures as arrays of pixels: reconstructed spectrograms, a run's curves, confusion matrices.

Each picture is a `matplotlib.figure.Figure` on an Agg canvas. It needs no display, and pyplot keeps
no reference to it.
"""

import io
import os
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from maeast_jax import fbank
from maeast_jax.runtime import storage

MASKED_GREY = (160, 160, 160)  # the colour of dropped tokens in `reconstructions`
_SPLIT_STYLES = {
    "train": {"color": "#4c78a8", "linewidth": 1.2},
    "eval": {"color": "#e45756", "linewidth": 1.8, "marker": "o", "markersize": 3.5},
}
_CURVES = ("loss", "mse", "info_nce", "accuracy", "map", "knn_accuracy", "knn_map")
_FREQUENCY_TICKS_HZ = (250, 500, 1000, 2000, 4000, 7000)
_MOST_CLASSES = 50  # more names than these cannot be read in a confusion matrix
_MOST_NUMBERED_CLASSES = 25  # with more classes the cells are too small for their counts
_NAME_CHARACTERS = 24
_DPI = 110


def reconstructions(
    original: np.ndarray, masked: np.ndarray, reconstructed: np.ndarray
) -> np.ndarray:
    """Draws each spectrogram beside the part that the encoder saw and the model's reconstruction.

    There is one row per clip. The colours of a row run from the 1st to the 99.5th percentile of its
    original. Values that are not finite are drawn in MASKED_GREY. Bands are numbered on the left
    and given in Hz on the right.

    Args:
      original: float [n, frames, bands], log-mel energies of `fbank`.
      masked: float [n, frames, bands], NaN where a token was dropped.
      reconstructed: float [n, frames, bands], the decoder's output.

    Returns:
      uint8 [H, W, 3].
    """
    from matplotlib import colormaps

    librosa = _import_librosa()
    grey = tuple(level / 255 for level in MASKED_GREY)
    palette = colormaps["magma"].with_extremes(bad=grey)
    rows, frames, bands = original.shape
    panel_inches = min(max(frames / 85, 2.4), 8.0)  # at least a pixel per frame, up to 8 seconds
    picture = figure(3 * panel_inches + 1.1, 1.55 * rows + 0.6)
    axes = picture.subplots(rows, 3, sharex=True, sharey=True, squeeze=False)
    for row in range(rows):
        low, high = np.percentile(original[row], [1, 99.5])
        for axis, x in zip(axes[row], (original, masked, reconstructed), strict=True):
            bands_by_frames = np.asarray(x[row], np.float32).T
            # specshow fails where no value is finite, so it gets a value in their place.
            mesh = librosa.display.specshow(
                np.nan_to_num(bands_by_frames),
                ax=axis,
                sr=fbank.SAMPLE_RATE_HZ,
                hop_length=fbank.FRAME_SHIFT,
                x_axis="time",
                cmap=palette,
                vmin=low,
                vmax=max(high, low + 1e-6),  # a silent clip has one value
            )
            mesh.set_array(np.ma.masked_invalid(bands_by_frames))
            axis.set_xlabel("")
            axis.tick_params(labelsize=7, length=2)
        axes[row, 0].set_ylabel("mel band", fontsize=8)
        axes[row, 0].set_yticks(np.arange(0, bands, 32))
        frequency = axes[row, -1].secondary_yaxis("right", functions=_band_scale(bands))
        frequency.set_yticks(_FREQUENCY_TICKS_HZ, map(str, _FREQUENCY_TICKS_HZ))
        frequency.set_ylabel("Hz", fontsize=8)
        frequency.tick_params(labelsize=7, length=2)
    kept_percent = 100 * float(np.isfinite(masked).mean())
    headings = ("original", f"kept {kept_percent:.3g} %", "reconstructed")
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("seconds", fontsize=8)
    return pixels(picture)


def curves(rows: Iterable[Mapping]) -> np.ndarray:
    """Draws a run's losses and scores over its steps: a panel per value, a line per split.

    Args:
      rows: rows of metrics.jsonl: `step`, `split` ("train" or "eval") and values. A value that no
        row holds has no panel. None, NaN and infinity interrupt the line.

    Returns:
      uint8 [H, W, 3].
    """
    rows = sorted(rows, key=lambda row: row["step"])
    shown = [key for key in _CURVES if any(key in row for row in rows)] or ["loss"]
    picture = figure(3.6 * len(shown), 2.8)
    axes = picture.subplots(1, len(shown), squeeze=False)[0]
    for axis, key in zip(axes, shown, strict=True):
        for split, style in _SPLIT_STYLES.items():
            drawn = [row for row in rows if row["split"] == split and key in row]
            values = np.array([row[key] for row in drawn], float)  # None becomes NaN
            values[np.isinf(values)] = np.nan
            if drawn:
                axis.plot([row["step"] for row in drawn], values, label=split, **style)
        axis.set_title(key, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8, frameon=False)
    return pixels(picture)


def confusion(matrix: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Draws a confusion matrix: true classes as rows, predicted classes as columns.

    Colours are the shares of a row's examples; numbers are counts. With more than 50 classes only
    the 50 most confused are drawn; their shares are still of all their examples. A name with a
    character that no font of the machine has is drawn as its place in `classes` of results.json.

    Args:
      matrix: int [C, C], counts.
      class_names: [C].

    Returns:
      uint8 [H, W, 3].
    """
    from matplotlib.colors import PowerNorm
    from sklearn.metrics import ConfusionMatrixDisplay

    chosen = _most_confused(matrix, _MOST_CLASSES)
    names = [_shortened(str(class_names[i])) for i in chosen]
    families, undrawable = _fonts(names)
    names = [
        name if undrawable.isdisjoint(name) else f"classes[{i}]"
        for i, name in zip(chosen, names, strict=True)
    ]
    counts = matrix[np.ix_(chosen, chosen)]
    shares = counts / np.maximum(matrix[chosen].sum(axis=1, keepdims=True), 1)
    is_numbered = len(chosen) <= _MOST_NUMBERED_CLASSES
    inches = max(len(chosen) * (0.42 if is_numbered else 0.19), 2.0)
    name_inches = 0.075 * max(map(_columns, names))
    picture = figure(
        inches + name_inches + 1.1,
        inches + name_inches + 0.8,
        layout="compressed",  # keeps the colour bar beside a matrix of square cells
    )
    axis = picture.subplots()
    display = ConfusionMatrixDisplay(shares, display_labels=names)
    display.plot(
        ax=axis,
        include_values=is_numbered,
        xticks_rotation="vertical",
        colorbar=False,
        # On a linear scale a share of a few per cent would look white.
        im_kw={"cmap": "Blues", "norm": PowerNorm(0.5, vmin=0, vmax=1)},
        text_kw={"fontsize": 7},
    )
    if is_numbered:
        for text, count, share in zip(display.text_.flat, counts.flat, shares.flat, strict=True):
            text.set(text=count or "", color="white" if share > 0.3 else "black")
    axis.tick_params(labelsize=7, length=0, labelfontfamily=families)
    axis.set_xlabel("predicted", fontsize=8)
    axis.set_ylabel("true", fontsize=8)
    count = matrix.sum()
    title = f"{count:,} examples, {np.trace(matrix) / count:.1%} right"
    if len(chosen) < len(matrix):
        title += f"; the {len(chosen)} most confused of {len(matrix)} classes"
    if undrawable:
        title += "\nno font here for classes[N] of results.json"
    axis.set_title(title, fontsize=9)
    bar = picture.colorbar(display.im_, ax=axis, fraction=0.03, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("share of the row", fontsize=8)
    return pixels(picture)


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes uint8 [H, W, 3] as a PNG file, here or on gs://, whole or not at all.

    Raises:
      OSError: the file cannot be written.
    """
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, image, format="png")
    storage.write_whole(storage.path(path), file.getvalue())


def figure(width_inches: float, height_inches: float, layout: str = "constrained"):
    """Returns a matplotlib Figure that pyplot does not know, for `pixels`."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width_inches, height_inches), dpi=_DPI, layout=layout)
    made.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)
    return made


def pixels(picture) -> np.ndarray:
    """Returns a matplotlib Figure as uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _import_librosa():
    """Returns librosa, for which numba keeps programs in a folder that every user can write.

    Without this, importing it fails where neither its package nor a home can be written, as in a
    container that runs under another user's number.
    """
    folder = os.path.join(tempfile.gettempdir(), f"numba-{os.getuid()}")
    os.environ.setdefault("NUMBA_CACHE_DIR", folder)
    import librosa

    return librosa


def _band_scale(num_bands: int):
    """Returns two functions of arrays: the centre in Hz of a band's number, and its inverse."""
    librosa = _import_librosa()
    lowest, highest = librosa.hz_to_mel([fbank.LOWEST_HZ, fbank.SAMPLE_RATE_HZ / 2], htk=True)
    step = (highest - lowest) / (num_bands + 1)

    def to_hz(band):
        return librosa.mel_to_hz(lowest + step * (np.asarray(band) + 1), htk=True)

    def to_band(frequency_hz):
        return (librosa.hz_to_mel(frequency_hz, htk=True) - lowest) / step - 1

    return to_hz, to_band


def _most_confused(matrix: np.ndarray, count: int) -> np.ndarray:
    """Returns int [min(count, C)], ascending: the classes of the most often confused pairs."""
    errors = np.triu(matrix + matrix.T, k=1)  # how often either of a pair is taken for the other
    pairs = np.argsort(-errors, axis=None, kind="stable")
    classes = np.stack(np.unravel_index(pairs, errors.shape), axis=1).ravel()
    _, places = np.unique(classes, return_index=True)
    return np.sort(classes[np.sort(places)[:count]])


def _fonts(texts: Iterable[str]) -> tuple[list[str], set[str]]:
    """Returns font families that draw texts, and the characters that no font of the machine has.

    The first family is matplotlib's own; the others draw characters that it lacks.
    """
    from matplotlib import font_manager

    usual = font_manager.FontProperties()
    families = list(usual.get_family())
    own = font_manager.get_font(font_manager.findfont(usual)).get_charmap()
    lacking = {character for character in "".join(texts) if ord(character) not in own}
    fonts = []
    for path in font_manager.findSystemFonts() if lacking else ():
        try:
            font = font_manager.get_font(path)
        except (OSError, RuntimeError):  # a damaged file, or a kind that matplotlib cannot read
            continue
        # Fonts "Last Resort" draw a box for any character; those of bitmaps have one size.
        if font.scalable and "lastresort" not in os.path.basename(path).lower():
            charmap = font.get_charmap()
            has = {character for character in lacking if ord(character) in charmap}
            fonts.append((len(has), font.style_name == "Regular", path, font.family_name, has))
    for *_, path, family, has in sorted(fonts, reverse=True):
        if has & lacking:
            font_manager.fontManager.addfont(path)  # matplotlib's list may be older than the font
            families.append(family)
            lacking -= has
    return families, lacking


def _columns(text: str) -> int:
    """Returns the width of a text in Latin letters: characters of East Asia are twice as wide."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def _shortened(name: str) -> str:
    name = " ".join(name.split())
    if len(name) > _NAME_CHARACTERS:
        name = name[: _NAME_CHARACTERS - 1] + "…"
    return name.replace("$", r"\$")  # matplotlib would read text between two $ as a formula
