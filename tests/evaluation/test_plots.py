"""Pictures show what they were given: the pixels are looked at, not only their number."""

import numpy as np
import pytest
from matplotlib.image import imread

from maeast_jax.evaluation import plots

GREY = np.array(plots.MASKED_GREY)
TRAIN_BLUE, EVAL_RED = np.array([0x4C, 0x78, 0xA8]), np.array([0xE4, 0x57, 0x56])


def spectrograms(rows=2, frames=64, bands=128):
    return np.random.default_rng(0).standard_normal((rows, frames, bands)).astype(np.float32)


def share(image, colour):
    return (image == colour).all(axis=-1).mean()


def columns_with(image, colour, more_than=0.0):
    """The first and last column of pixels with more than a share of a colour, 0 left to 1 right."""
    columns = np.flatnonzero((image == colour).all(axis=-1).mean(axis=0) > more_than)
    return columns.min() / image.shape[1], columns.max() / image.shape[1]


def test_only_masked_places_are_grey_and_only_in_the_middle():
    x = spectrograms()
    masked = x.copy()
    masked[:, 16:48] = np.nan
    none, half = plots.reconstructions(x, x, x), plots.reconstructions(x, masked, x)
    masked[:] = np.nan
    whole = plots.reconstructions(x, masked, x)
    assert share(none, GREY) < 1e-3  # the edge of a letter may be as grey
    assert share(half, GREY) == pytest.approx(share(whole, GREY) / 2, rel=0.03)
    left, right = columns_with(whole, GREY, more_than=0.5)
    assert 0.34 < left < 0.42
    assert 0.66 < right < 0.70


def test_time_runs_right_and_bands_run_up():
    x = np.zeros((1, 64, 128), np.float32)
    x[0, 32:, 64:] = 1.0  # late and high
    image = plots.reconstructions(x, x, x).astype(int)
    bright = (image[..., 0] > 240) & (image[..., 1] > 240) & (image[..., 2] < 230)
    rows, columns = np.nonzero(bright[:, : image.shape[1] // 3])
    assert rows.mean() < 0.4 * image.shape[0]
    assert columns.mean() > 0.22 * image.shape[1]


def test_a_row_has_the_colour_scale_of_its_original():
    x = spectrograms(rows=1)
    alone = plots.reconstructions(x, x, x)
    np.testing.assert_array_equal(alone, plots.reconstructions(5 * x, 5 * x, 5 * x))
    brighter = plots.reconstructions(x, x, 5 * x)
    third = alone.shape[1] // 3
    np.testing.assert_array_equal(alone[:, : 2 * third], brighter[:, : 2 * third])
    assert (alone[:, 2 * third :] != brighter[:, 2 * third :]).mean() > 0.2


def test_the_heading_says_what_was_kept():
    def heading(kept):
        x = spectrograms(rows=1)
        masked = np.where(kept, x, np.nan)
        return plots.reconstructions(x, masked, x)[:24]

    frames = np.arange(spectrograms(rows=1).shape[1])[:, None]
    measured = heading(frames < 24)
    np.testing.assert_array_equal(measured, heading(frames >= len(frames) - 24))
    assert (measured != heading(frames < 32)).any()


def test_a_silent_clip_and_a_reconstruction_that_blew_up_are_still_drawn():
    x = np.zeros((1, 32, 128), np.float32)
    assert share(plots.reconstructions(x, x, x + np.inf), GREY) > 0.15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((4, 8)),) * 3, r"original has shape \[4, 8\]; it must be \[n, frames, bands\]"),
        ((np.zeros((0, 4, 8)),) * 3, r"original has shape \[0, 4, 8\]"),
        (
            (np.zeros((1, 4, 8)), np.zeros((1, 4, 8)), np.zeros((1, 3, 8))),
            r"reconstructed has shape \[1, 3, 8\]; it must have that of original, \[1, 4, 8\]",
        ),
    ],
)
def test_wrong_shapes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        plots.reconstructions(*arguments)


def test_curves_draw_a_line_a_split_in_the_panel_of_its_key():
    rows = [{"step": step, "split": "train", "loss": 5.0 - step} for step in range(4)]
    rows += [{"step": step, "split": "eval", "mse": 1.0 + step} for step in (0, 2)]
    image = plots.curves(rows)
    assert image.dtype == np.uint8
    left, right = columns_with(image, TRAIN_BLUE)
    assert right < 1 / 3
    left, right = columns_with(image, EVAL_RED)
    assert 1 / 3 < left < right < 2 / 3


def test_what_neighbours_tell_has_a_panel_where_it_was_asked():
    rows = [{"step": step, "split": "eval", "knn_accuracy": 0.1 * step} for step in (1, 2)]
    left, right = columns_with(plots.curves(rows), EVAL_RED)
    assert 3 / 4 < left < right


def test_curves_break_at_values_that_are_not_numbers_and_sort_by_step():
    rows = [
        {"step": step, "split": "train", "loss": value}
        for step, value in enumerate([3.0, 2.0, 1.0, 1.0, 2.0, 3.0])
    ]
    whole = plots.curves(rows)
    np.testing.assert_array_equal(whole, plots.curves(rows[::2] + rows[1::2]))
    rows[2]["loss"] = None
    broken = plots.curves(rows)
    assert share(broken, TRAIN_BLUE) < share(whole, TRAIN_BLUE)
    for value in (float("nan"), float("inf")):
        rows[2]["loss"] = value
        np.testing.assert_array_equal(broken, plots.curves(rows))


def test_curves_of_a_run_that_has_said_nothing_are_empty_panels():
    assert share(plots.curves([]), TRAIN_BLUE) == 0


def test_png_comes_back_as_it_was_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "picture.png"
    image = np.random.default_rng(1).integers(0, 256, (7, 5, 3), np.uint8)
    plots.write_png(path, 255 - image)
    plots.write_png(path, image)
    np.testing.assert_array_equal(np.rint(255 * imread(path)[..., :3]).astype(np.uint8), image)
    assert [child.name for child in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("image", [np.zeros((2, 2, 3)), np.zeros((2, 2), np.uint8)])
def test_png_of_another_type_is_refused(tmp_path, image):
    with pytest.raises(ValueError, match=r"it must be uint8 \[H, W, 3\]"):
        plots.write_png(tmp_path / "picture.png", image)
    assert not list(tmp_path.iterdir())


def speed_row(model, clips, memory, **changes):
    known = {
        "model": model, "encoder_layers": 12, "tokens": "patch", "batch": 8, "dtype": "float32",
        "num_frames": 1024, "device": "cpu", "devices": 1, "fits": True, "clips_per_second": clips,
        "clips_per_second_p10": clips, "clips_per_second_p90": clips, "peak_memory_bytes": memory,
    }  # fmt: skip
    return known | changes


def bar_lengths(image, colour):
    """Of the left and the right panel, in pixels of their longest row."""
    of_row = (image == colour).all(axis=-1)
    middle = image.shape[1] * 21 // 40  # between the panels
    return of_row[:, :middle].sum(axis=1).max(), of_row[:, middle:].sum(axis=1).max()


def test_bars_are_as_long_as_clips_a_second_and_memory():
    rows = [speed_row("mae_ast", 6.0, 1e9), speed_row("ssast", 2.0, 4e9)]
    image = plots.speeds(rows)
    ours, theirs = bar_lengths(image, TRAIN_BLUE), bar_lengths(image, EVAL_RED)
    assert ours[0] / theirs[0] == pytest.approx(3.0, rel=0.05)
    assert ours[1] / theirs[1] == pytest.approx(0.25, rel=0.05)


def test_what_did_not_fit_has_no_bar_and_nothing_measured_is_refused():
    fitting, unfit = speed_row("mae_ast", 6.0, 1e9), speed_row("ssast", None, 4e9, fits=False)
    image = plots.speeds([fitting, unfit])
    np.testing.assert_array_equal(image, plots.speeds([fitting]))
    assert share(image, EVAL_RED) == 0
    with pytest.raises(ValueError, match="no row to draw"):
        plots.speeds([unfit])
