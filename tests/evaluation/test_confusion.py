"""The picture shows the matrix it was given: the pixels, and what matplotlib was handed."""

import matplotlib.axes
import numpy as np
import pytest

from maeast_jax.evaluation import confusion


@pytest.fixture
def drawn(monkeypatch):
    """What `draw` hands to matplotlib: the shares, the names of the rows, the numbers."""
    found = {"numbers": {}}
    for name in ("imshow", "set_yticks", "text", "set_title"):
        original = getattr(matplotlib.axes.Axes, name)

        def spy(axis, *args, _name=name, _original=original, **kwargs):
            if _name == "text":
                found["numbers"][args[1], args[0]] = args[2]
            else:
                found.setdefault(_name, args)
            return _original(axis, *args, **kwargs)

        monkeypatch.setattr(matplotlib.axes.Axes, name, spy)
    return found


def matrix(num_classes, errors=(), per_class=10):
    """Counts on the diagonal, and errors (true, predicted, count) taken off it."""
    counts = per_class * np.eye(num_classes, dtype=np.int64)
    for row, column, count in errors:
        counts[row, row] -= count
        counts[row, column] += count
    return counts


def test_rows_are_shares_and_cells_hold_counts(drawn):
    image = confusion.draw(np.array([[3, 1], [0, 0]]), ["cat", "dog"])
    np.testing.assert_array_equal(drawn["imshow"][0], [[0.75, 0.25], [0, 0]])
    assert drawn["set_yticks"][1] == ["cat", "dog"]
    assert drawn["numbers"] == {(0, 0): 3, (0, 1): 1}
    assert drawn["set_title"][0] == "4 examples, 75.0% right"
    assert image.dtype == np.uint8
    assert image.shape[2] == 3


@pytest.mark.parametrize("num_classes", [2, 14, 25, 26, 50])
def test_pictures_grow_with_the_classes_and_stay_of_a_size_to_look_at(num_classes, drawn):
    image = confusion.draw(matrix(num_classes), [f"class {i}" for i in range(num_classes)])
    assert 250 < image.shape[0] < 1600
    assert 250 < image.shape[1] < 1600
    assert image.shape[0] > 20 * num_classes  # a line of text fits in a row
    assert len(drawn["imshow"][0]) == num_classes
    assert bool(drawn["numbers"]) == (num_classes <= 25)


def test_dark_on_the_diagonal_and_true_down_the_side():
    right = confusion.draw(matrix(12), list("abcdefghijkl")).mean(axis=-1)
    taken = confusion.draw(matrix(12, [(0, 11, 10)]), list("abcdefghijkl")).mean(axis=-1)
    assert right.shape == taken.shape
    darker, lighter = np.nonzero(taken < right - 90), np.nonzero(taken > right + 90)
    height, width = right.shape
    # The first row's dark cell went from the left to the right of the top row.
    assert lighter[0].mean() < 0.25 * height
    assert lighter[1].mean() < 0.25 * width
    cells = darker[0] > 0.03 * height  # below the title, which changed too
    assert np.median(darker[0][cells]) < 0.25 * height
    assert np.median(darker[1][cells]) > 0.6 * width


def test_of_many_classes_the_most_confused_are_drawn(drawn):
    errors = [(3, 90, 5), (90, 3, 4), (17, 60, 6)]
    counts = matrix(100, errors)
    confusion.draw(counts, [f"class {i}" for i in range(100)])
    names = drawn["set_yticks"][1]
    assert len(names) == 50
    assert {"class 3", "class 90", "class 17", "class 60"} <= set(names)
    row, column = names.index("class 3"), names.index("class 90")
    assert drawn["imshow"][0][row, column] == 0.5
    assert "the 50 most confused of 100 classes" in drawn["set_title"][0]


def test_the_most_confused_come_in_pairs_by_how_often_then_by_size():
    counts = matrix(6, [(0, 4, 3), (4, 0, 3), (1, 5, 5)])
    counts[3, 3] = 50
    assert confusion.most_confused(counts, 2).tolist() == [0, 4]
    assert confusion.most_confused(counts, 4).tolist() == [0, 1, 4, 5]
    assert confusion.most_confused(counts, 5).tolist() == [0, 1, 3, 4, 5]
    assert confusion.most_confused(counts, 3).tolist() == [0, 1, 4]
    assert confusion.most_confused(counts, 9).tolist() == [0, 1, 2, 3, 4, 5]


def test_long_names_are_cut_and_odd_ones_drawn(drawn):
    confusion.draw(matrix(4), ["a" * 24, "b" * 25, "cash $ or $x_$", "a\ttab"])
    assert drawn["set_yticks"][1] == ["a" * 24, "b" * 23 + "…", "cash $ or $x_$", "a tab"]
