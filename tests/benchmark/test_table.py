"""The table and the remarks, of rows whose numbers the test chose."""

import numpy as np
import pytest

from maeast_jax.benchmark import table
from maeast_jax.benchmark.cases import FIELDS
from maeast_jax.runtime.terminal import si


def row(model, batch=8, clips=2.0, memory=4e9, **changes):
    known = {
        "model": model, "tokens": "patch", "encoder_layers": 12, "batch": batch,
        "dtype": "float32", "num_frames": 1024, "clips_per_second": clips,
        "clips_per_second_p10": 0.9 * clips, "clips_per_second_p90": 1.25 * clips,
        "step_seconds": batch / clips, "flops_per_clip": 86_400_000_000,
        "matrix_rate_share": 0.456, "peak_memory_bytes": memory, "compile_seconds": 31.4,
        "device": "cpu", "devices": 1, "fits": True, "input": "none", "recompiles": 0,
        "matrix_rate": 1.5e11,
    }  # fmt: skip
    return dict.fromkeys(FIELDS) | known | changes


def unfit(model, batch):
    changes = {"clips_per_second": None, "step_seconds": None, "matrix_rate": None}
    return row(model, batch) | changes | {"matrix_rate_share": None, "fits": False}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_a_line_per_row_with_its_numbers():
    rows = [row("mae_ast", clips=5.4321), unfit("ssast", 1024)]
    head, rule, *lines = table.table(rows).splitlines()
    assert set(cells(rule)) == {"---"} and len(lines) == 2
    first, second = (dict(zip(cells(head), cells(line), strict=True)) for line in lines)
    assert first == {
        "model": "mae_ast", "tokens": "patch", "layers": "12", "batch": "8", "type": "float32",
        "frames": "1024", "clips/s": "5.43", "10 to 90 %": "4.89 to 6.79", "step, s": "1.47",
        "GFLOP per clip": "86.4", "of the matrix rate": "46 %", "memory, GB": "4.00",
        "compilation, s": "31.4",
    }  # fmt: skip
    assert (second["clips/s"], second["10 to 90 %"]) == ("-", "does not fit")


def test_columns_of_the_input_and_of_the_devices_own_count_appear_if_measured():
    fed = row("mae_ast", input_clips_per_second=1925.0, together_clips_per_second=600.0)
    assert cells(table.table([fed]).splitlines()[-1])[-2:] == ["1,925", "600"]
    counted = row("mae_ast", device_peak_bytes=5e9)
    assert cells(table.table([counted]).splitlines()[-1])[-1] == "5.00"


def test_a_dash_in_place_of_the_devices_own_count_is_explained():
    counted, hidden = row("mae_ast", device_peak_bytes=5e9), row("mae_ast", batch=4)
    told = "memory, device's count: a dash if an earlier row held as much"
    assert any(line.startswith(told) for line in table.remarks([counted, hidden]))
    for rows in ([counted], [hidden], [counted, unfit("ssast", 99)]):
        assert not any(line.startswith(told) for line in table.remarks(rows))


def test_models_are_compared_only_at_equal_settings():
    rows = [
        row("mae_ast", clips=5.4, memory=1.6e9),
        row("ssast", clips=2.0, memory=4e9),
        row("ssast_two_passes", clips=1.0, memory=4e9),
        row("mae_ast", batch=16, clips=2.01, memory=4e9),
        row("ssast", batch=16),
        row("ssast", batch=16, dtype="bfloat16"),
        unfit("ssast", 16),
    ]
    assert table.comparisons(rows) == [
        "12 layers, patch, batch 8, float32: 2.7 x the clips/s of ssast, 0.40 of its memory",
        "12 layers, patch, batch 8, float32: 5.4 x the clips/s of ssast_two_passes, "
        "0.40 of its memory",
        "12 layers, patch, batch 16, float32: 1.0 x the clips/s of ssast, 1.00 of its memory",
    ]


def test_frames_are_named_if_they_differ():
    rows = [row(model, num_frames=n) for n in (512, 1024) for model in ("mae_ast", "ssast")]
    assert [line.split(":")[0] for line in table.comparisons(rows)] == [
        "12 layers, patch, batch 8, float32, 512 frames",
        "12 layers, patch, batch 8, float32, 1024 frames",
    ]


def test_remarks_name_the_devices_the_rates_and_what_a_search_found():
    rows = [
        row("mae_ast", 1, clips=3.0), row("mae_ast", 2, clips=5.0, memory=2e9),
        row("mae_ast", 4, clips=4.0, memory=3e9), unfit("mae_ast", 8), unfit("ssast", 1),
    ]  # fmt: skip
    fastest = table.remarks(rows, "fastest")
    assert fastest[:2] == ["1 x cpu", f"matrix products in float32: {si(1.5e11, 'FLOP/s')}"]
    setting = "12 layers, patch, float32"
    assert fastest[2:] == [
        f"mae_ast, {setting}: the fastest batch is 2, 5.00 clips/s, {si(2e9, 'B')}",
        f"ssast, {setting}: no batch fits",
    ]
    assert table.remarks(rows, "largest")[2] == (
        f"mae_ast, {setting}: the largest batch is 4, 4.00 clips/s, {si(3e9, 'B')}"
    )
    assert table.remarks(rows) == fastest[:2]


def test_a_row_that_a_compilation_slowed_down_is_counted():
    last = table.remarks([row("mae_ast", recompiles=2), row("ssast")])[-1]
    assert last == "rows slowed by a compilation meanwhile: 1 of 2"


BLUE, RED = (0x4C, 0x78, 0xA8), (0xE4, 0x57, 0x56)


def bar_lengths(image, colour):
    """The longest bar of a colour in the left and in the right panel, in pixels."""
    of_row = (image == np.array(colour)).all(axis=-1)
    middle = image.shape[1] * 21 // 40  # between the panels
    return of_row[:, :middle].sum(axis=1).max(), of_row[:, middle:].sum(axis=1).max()


def test_bars_are_as_long_as_speed_and_memory():
    steady = ("clips_per_second_p10", "clips_per_second_p90")
    rows = [
        row("mae_ast", clips=6.0, memory=1e9) | dict.fromkeys(steady, 6.0),
        row("ssast", clips=2.0, memory=4e9) | dict.fromkeys(steady, 2.0),
    ]
    image = table.chart(rows)
    ours, theirs = bar_lengths(image, BLUE), bar_lengths(image, RED)
    assert ours[0] / theirs[0] == pytest.approx(3.0, rel=0.05)
    assert ours[1] / theirs[1] == pytest.approx(0.25, rel=0.05)


def test_a_row_that_does_not_fit_has_no_bar():
    fitting = row("mae_ast", clips=6.0, memory=1e9)
    image = table.chart([fitting, unfit("ssast", 8)])
    np.testing.assert_array_equal(image, table.chart([fitting]))
