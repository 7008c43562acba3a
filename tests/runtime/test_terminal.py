"""What programs print: progress, tables, quantities and errors."""

import io

import numpy as np
import pytest

from maeast_jax.runtime import terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_progress_is_a_line_per_update():
    out = io.StringIO()
    progress = terminal.Progress(1500, start_step=100, stream=out)
    progress.update(110, np.float32(5.5))
    progress.update(200, 5.1234, 64.06, 1300.0)
    progress.say("saved step 200")
    progress.update(1499, 2.0, 64.0, 3603.2)
    progress.close()
    assert out.getvalue().splitlines() == [
        "step 110/1500  loss 5.500",
        "step 200/1500  loss 5.123  64.1 clips/s  21:40 left",
        "saved step 200",
        "step 1499/1500  loss 2.000  64.0 clips/s  1:00:03 left",
    ]


def test_progress_on_a_terminal_is_one_bar_with_lines_above():
    out = Terminal()
    progress = terminal.Progress(200, start_step=50, stream=out)
    progress.update(100, 5.0)
    progress.update(150, 4.0, 320.0, 10.0)
    progress.say("saved step 150")
    progress.close()
    shown = out.getvalue()
    assert shown.startswith("\r 25%|")
    assert "\r 75%|" in shown
    assert "step 150/200  loss 4.000  320.0 clips/s  00:10 left" in shown
    assert "\rsaved step 150\n" in shown
    assert shown.count("\n") == 2  # below the line that was said, and below the bar


def test_progress_goes_to_stderr(capsys):
    terminal.Progress(2).update(1, 1.0)
    assert capsys.readouterr() == ("", "step 1/2  loss 1.000\n")


def test_announcement_is_aligned():
    table = terminal.announce(
        {"model": "mae_ast", "tokens": "128 kept\n384 masked", "to": "/runs/1"}
    )
    assert table == ("model   mae_ast\ntokens  128 kept\n        384 masked\nto      /runs/1")


def test_quantities_have_three_digits():
    shown = [terminal.si(86_400_000), terminal.si(1.75e9, "B"), terminal.si(512, "B")]
    assert shown == ["86.4M", "1.75GB", "512B"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (OSError(28, "No space left on device", "file"), "No space left on device"),
        (FileNotFoundError("gs://bucket/file"), "not found"),
        (RuntimeError(), "RuntimeError"),
        (ValueError("x" * 300), "x" * 200),
    ],
)
def test_an_error_is_one_line(error, line):
    assert terminal.one_line(error) == line
