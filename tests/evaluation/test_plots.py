"""Pictures show the values they were given: the tests look at pixels and at matplotlib's axes."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import fontTools.fontBuilder
import matplotlib.pyplot
import numpy as np
import pytest
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.image import imread

from maeast_jax.evaluation import plots

GREY = np.array(plots.MASKED_GREY)
TRAIN_BLUE, EVAL_RED = np.array([0x4C, 0x78, 0xA8]), np.array([0xE4, 0x57, 0x56])


@pytest.fixture
def drawn(monkeypatch):
    """The list of figures that a test draws; afterwards pyplot must know none of them."""
    figures = []
    original = plots.figure
    monkeypatch.setattr(
        plots, "figure", lambda *args, **kw: figures.append(original(*args, **kw)) or figures[-1]
    )
    yield figures
    assert not matplotlib.pyplot.get_fignums()


def spectrograms(rows=1, frames=64, bands=128):
    return np.random.default_rng(0).standard_normal((rows, frames, bands)).astype(np.float32)


def share(image, colour):
    return (image == colour).all(axis=-1).mean()


def columns_with(image, colour, more_than=0.0):
    """The first and last column of pixels with more than a share of a colour, 0 left to 1 right."""
    columns = np.flatnonzero((image == colour).all(axis=-1).mean(axis=0) > more_than)
    return columns.min() / image.shape[1], columns.max() / image.shape[1]


def test_only_masked_places_are_grey_and_only_in_the_middle(drawn):
    x = spectrograms(rows=2)
    half, whole = x.copy(), np.full_like(x, np.nan)
    half[:, 16:48] = np.nan
    none, half, whole = (plots.reconstructions(x, masked, x) for masked in (x, half, whole))
    assert share(none, GREY) < 1e-3  # the edge of a letter may be as grey
    assert share(half, GREY) == pytest.approx(share(whole, GREY) / 2, rel=0.03)
    left, right = columns_with(whole, GREY, more_than=0.5)
    assert 0.32 < left < 0.40
    assert 0.60 < right < 0.68
    headings = [figure.axes[1].get_title() for figure in drawn]
    assert headings == ["kept 100 %", "kept 50 %", "kept 0 %"]


def test_time_runs_right_and_bands_run_up(drawn):
    x = np.zeros((1, 64, 128), np.float32)
    x[0, 32:, 64:] = 1.0  # late and high
    image = plots.reconstructions(x, x, x).astype(int)
    bright = (image[..., 0] > 240) & (image[..., 1] > 240) & (image[..., 2] < 230)
    rows, columns = np.nonzero(bright[:, : image.shape[1] // 3])
    assert rows.mean() < 0.4 * image.shape[0]
    assert columns.mean() > 0.2 * image.shape[1]
    axis = drawn[0].axes[0]
    assert axis.get_xlim() == pytest.approx((-0.005, 0.635))
    assert axis.get_ylim() == (-0.5, 127.5)


def test_the_frequency_axis_has_the_bands_of_the_filter_bank():
    """A tone is loudest in the band whose frequency the axis names."""
    from maeast_jax import fbank

    to_hz, to_band = plots._band_scale(128)
    bands = np.arange(128)
    np.testing.assert_allclose(to_band(to_hz(bands)), bands, atol=1e-6)
    for frequency_hz in (1000, 2000, 4000, 7000):
        tone = np.sin(2 * np.pi * frequency_hz * np.arange(1600) / 16_000).astype(np.float32)
        loudest = np.asarray(fbank.fbank(tone)).mean(axis=0).argmax()
        assert abs(to_band(frequency_hz) - loudest) < 1


def test_librosas_compiled_programs_are_kept_where_every_user_can_write(tmp_path):
    """A container that runs under another user's number has no home, nor a writable package."""
    program = """
import numpy as np
from maeast_jax.evaluation import plots
x = np.zeros((1, 16, 128), np.float32)
plots.reconstructions(x, x, x)
"""
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    subprocess.run(
        [sys.executable, "-c", program], env=environment | {"TMPDIR": str(tmp_path)},
        cwd=Path(__file__).parents[2], check=True,
    )  # fmt: skip
    (kept,) = tmp_path.glob("numba-*")
    assert list(kept.iterdir())


def test_a_row_has_the_colour_scale_of_its_original():
    x = spectrograms()
    alone = plots.reconstructions(x, x, x)
    np.testing.assert_array_equal(alone, plots.reconstructions(4 * x, 4 * x, 4 * x))
    brighter = plots.reconstructions(x, x, 4 * x)
    panel = alone.shape[1] * 5 // 8
    np.testing.assert_array_equal(alone[:, :panel], brighter[:, :panel])
    assert (alone[:, panel:] != brighter[:, panel:]).mean() > 0.2


def test_a_silent_clip_and_a_reconstruction_that_is_infinite_are_still_drawn():
    x = np.zeros((1, 32, 128), np.float32)
    assert share(plots.reconstructions(x, x, x + np.inf), GREY) > 0.15


def test_curves_draw_a_line_per_split_in_the_panel_of_its_value():
    rows = [{"step": step, "split": "train", "loss": 5.0 - step} for step in range(4)]
    rows += [{"step": step, "split": "eval", "mse": 1.0 + step} for step in (0, 2)]
    image = plots.curves(rows)
    assert columns_with(image, TRAIN_BLUE)[1] < 1 / 2 < columns_with(image, EVAL_RED)[0]


@pytest.mark.parametrize(
    "panels",
    [("loss", "mse", "info_nce", "knn_accuracy", "knn_map"), ("loss", "accuracy"), ("loss", "map")],
)
def test_each_value_that_a_run_wrote_has_a_panel(drawn, panels):
    others = {"learning_rate": 1.0}
    plots.curves([{"step": 1, "split": "eval"} | others | dict.fromkeys(reversed(panels), 1.0)])
    assert [axis.get_title() for axis in drawn[0].axes] == list(panels)


def test_curves_break_at_values_that_are_not_finite_and_sort_by_step():
    rows = [
        {"step": step, "split": "train", "loss": value}
        for step, value in enumerate([3.0, 2.0, 1.0, 1.0, 2.0, 3.0])
    ]
    whole = plots.curves(rows)
    np.testing.assert_array_equal(whole, plots.curves(rows[::2] + rows[1::2]))
    rows[2]["loss"] = None
    broken = plots.curves(rows)
    assert share(broken, TRAIN_BLUE) < share(whole, TRAIN_BLUE)
    rows[2]["loss"] = float("inf")
    np.testing.assert_array_equal(broken, plots.curves(rows))


def test_curves_of_a_run_without_rows_are_an_empty_panel():
    assert share(plots.curves([]), TRAIN_BLUE) == 0


def counts_of(num_classes, errors=(), per_class=10):
    """A confusion matrix: counts on the diagonal, and (true, predicted, count) errors off it."""
    counts = per_class * np.eye(num_classes, dtype=np.int64)
    for row, column, count in errors:
        counts[row, row] -= count
        counts[row, column] += count
    return counts


def cells(axis):
    """The numbers that a confusion matrix shows, by (row, column)."""
    texts = {(text.get_position()[1], text.get_position()[0]): text for text in axis.texts}
    return {place: text.get_text() for place, text in texts.items() if text.get_text()}


def names(axis):
    return [label.get_text() for label in axis.get_yticklabels()]


def test_rows_are_shares_and_cells_hold_counts(drawn):
    plots.confusion(np.array([[3, 1], [0, 0]]), ["cat", "dog"])
    axis = drawn[0].axes[0]
    np.testing.assert_array_equal(axis.images[0].get_array(), [[0.75, 0.25], [0, 0]])
    assert names(axis) == ["cat", "dog"]
    assert (axis.get_ylabel(), axis.get_xlabel()) == ("true", "predicted")
    assert cells(axis) == {(0, 0): "3", (0, 1): "1"}
    assert axis.get_title() == "4 examples, 75.0% right"


@pytest.mark.parametrize("num_classes", [2, 50])
def test_a_confusion_matrix_grows_with_its_classes_and_still_fits_a_screen(num_classes, drawn):
    image = plots.confusion(counts_of(num_classes), [f"class {i}" for i in range(num_classes)])
    assert 250 < image.shape[0] < 1600
    assert 250 < image.shape[1] < 1600
    assert image.shape[0] > 20 * num_classes  # a line of text fits in a row
    assert bool(cells(drawn[0].axes[0])) == (num_classes <= 25)


def test_only_the_most_confused_of_many_classes_are_drawn(drawn):
    errors = [(3, 90, 5), (90, 3, 4), (17, 60, 6)]
    plots.confusion(counts_of(100, errors), [f"class {i}" for i in range(100)])
    axis = drawn[0].axes[0]
    shown = names(axis)
    assert len(shown) == 50
    assert {"class 3", "class 90", "class 17", "class 60"} <= set(shown)
    row, column = shown.index("class 3"), shown.index("class 90")
    assert axis.images[0].get_array()[row, column] == 0.5
    assert "the 50 most confused of 100 classes" in axis.get_title()


def test_the_most_confused_classes_come_in_pairs():
    counts = counts_of(6, [(0, 4, 3), (4, 0, 3), (1, 5, 5)])
    assert plots._most_confused(counts, 2).tolist() == [0, 4]
    assert plots._most_confused(counts, 4).tolist() == [0, 1, 4, 5]
    assert plots._most_confused(counts, 9).tolist() == [0, 1, 2, 3, 4, 5]


def test_long_names_are_cut_and_dollars_are_no_formulas(drawn):
    plots.confusion(counts_of(4), ["a" * 24, "b" * 25, "cash $ or $x_$", "a\ttab"])
    assert names(drawn[0].axes[0]) == ["a" * 24, "b" * 23 + "…", r"cash \$ or \$x_\$", "a tab"]


NAMES = ["cow", "日本", "🐶"]


def test_a_name_that_no_font_draws_is_its_place_in_results_json(drawn, monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    with warnings.catch_warnings(action="error"):
        plots.confusion(counts_of(3), NAMES)
    axis = drawn[0].axes[0]
    assert names(axis) == ["cow", "classes[1]", "classes[2]"]
    assert axis.get_title().endswith("right\nno font here for classes[N] of results.json")


def test_a_name_that_matplotlibs_font_lacks_is_drawn_in_a_font_of_the_machine(
    drawn, monkeypatch, tmp_path
):
    squares = write_font(tmp_path / "squares.ttf", "Squares", "日本")
    # macOS has a font with a box for any character.
    boxes = write_font(tmp_path / "LastResort.otf", "Boxes", "日本🐶")
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    fonts = [boxes, str(tmp_path / "damaged.ttf"), squares]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: fonts)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist])
    with warnings.catch_warnings(action="error"):
        image = plots.confusion(counts_of(3), NAMES)
    axis = drawn[0].axes[0]
    assert names(axis) == ["cow", "日本", "classes[2]"]
    # Each of the two characters is a black square, beside the row and below the column.
    label = axis.get_yticklabels()[1].get_window_extent()
    top, bottom = (image.shape[0] - round(y) for y in (label.y1, label.y0))
    drawn_label = image[top:bottom, round(label.x0) : round(label.x1)]
    assert share(drawn_label, (0, 0, 0)) > 0.5
    assert label.width > 1.5 * label.height


def write_font(path, family, characters):
    """Writes a font in which each of these characters is a black square; returns its path."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    font = fontTools.fontBuilder.FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "square"])
    font.setupCharacterMap({ord(character): "square" for character in characters})
    square = pen.glyph()
    font.setupGlyf({".notdef": square, "square": square})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    font.setupHorizontalHeader(ascent=1000, descent=0)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    return str(path)


def test_a_png_file_holds_the_image_and_nothing_lies_beside_it(tmp_path):
    path = tmp_path / "picture.png"
    image = np.random.default_rng(1).integers(0, 256, (7, 5, 3), np.uint8)
    plots.write_png(path, 255 - image)
    plots.write_png(path, image)
    np.testing.assert_array_equal(np.rint(255 * imread(path)[..., :3]).astype(np.uint8), image)
    assert [child.name for child in tmp_path.iterdir()] == ["picture.png"]
