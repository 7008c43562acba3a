"""A benchmark's rows in Markdown: a table, and remarks that compare rows."""

from collections.abc import Iterable, Sequence

import numpy as np

from maeast_jax.benchmark.cases import Row
from maeast_jax.evaluation import plots
from maeast_jax.runtime.terminal import si

# Fields that must agree for two rows to be comparable; rows of one search agree in them too.
_SETTING = ("num_frames", "tokens", "encoder_layers", "dtype", "input", "devices", "device")
_MODEL_COLOURS = ("#4c78a8", "#e45756", "#f2a6a4")
_BAR_LABELS = {
    "model": lambda row: row["model"],
    "encoder_layers": lambda row: f"{row['encoder_layers']} layers",
    "tokens": lambda row: row["tokens"],
    "batch": lambda row: f"batch {row['batch']}",
    "dtype": lambda row: row["dtype"],
    "num_frames": lambda row: f"{row['num_frames']} frames",
    "device": lambda row: f"{row['devices']} x {row['device']}",
}


def table(rows: Sequence[Row]) -> str:
    """Returns one line per row; the input and the device's own count have columns if measured."""
    columns = {
        "model": lambda row: row["model"],
        "tokens": lambda row: row["tokens"],
        "layers": lambda row: str(row["encoder_layers"]),
        "batch": lambda row: str(row["batch"]),
        "type": lambda row: row["dtype"],
        "frames": lambda row: str(row["num_frames"]),
        "clips/s": lambda row: number(row["clips_per_second"]),
        "10 to 90 %": _spread,
        "step, s": lambda row: number(row["step_seconds"]),
        "GFLOP per clip": lambda row: number(row["flops_per_clip"], 1e-9),
        "of the matrix rate": _share,
        "memory, GB": lambda row: number(row["peak_memory_bytes"], 1e-9),
        "compilation, s": lambda row: number(row["compile_seconds"]),
    }
    if any(row["device_peak_bytes"] is not None for row in rows):
        columns["memory, device's count, GB"] = lambda row: number(row["device_peak_bytes"], 1e-9)
    if any(row["input_clips_per_second"] is not None for row in rows):
        columns["input alone, clips/s"] = lambda row: number(row["input_clips_per_second"])
        columns["together, clips/s"] = lambda row: number(row["together_clips_per_second"])
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[write(row) for write in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def remarks(rows: Sequence[Row], find: str | None = None) -> list[str]:
    """Returns the devices, their rates, a search's result, and MAE-AST beside the others."""
    lines = []
    for row in _first_of(rows, lambda row: (row["devices"], row["device"])):
        lines.append(f"{row['devices']} x {row['device']}")
    measured = [row for row in rows if row["matrix_rate"] is not None]
    for row in _first_of(measured, lambda row: row["dtype"]):
        lines.append(f"matrix products in {row['dtype']}: {si(row['matrix_rate'], 'FLOP/s')}")
    if find is not None:
        lines += _found(rows, find)
    lines += comparisons(rows)
    counted = [row["device_peak_bytes"] is not None for row in rows if row["fits"]]
    if any(counted) and not all(counted):
        lines.append(
            "memory, device's count: a dash if an earlier row held as much, because devices count "
            "for the whole process; name smaller rows first"
        )
    if recompiled := [row for row in rows if row["recompiles"]]:
        lines.append(f"rows slowed by a compilation meanwhile: {len(recompiled)} of {len(rows)}")
    return lines


def comparisons(rows: Sequence[Row]) -> list[str]:
    """Returns MAE-AST's speed and memory relative to each other model, at equal settings."""

    def setting(row: Row) -> tuple:
        return (*(row[name] for name in _SETTING), row["batch"])

    fitting = [row for row in rows if row["fits"]]
    ours = {setting(row): row for row in fitting if row["model"] == "mae_ast"}
    lines = []
    for other in fitting:
        own = ours.get(setting(other))
        if other["model"] == "mae_ast" or own is None:
            continue
        faster = own["clips_per_second"] / other["clips_per_second"]
        speed = f"{faster:#.2g}".rstrip(".")  # two digits, 1.0 with its zero
        memory = own["peak_memory_bytes"] / other["peak_memory_bytes"]
        lines.append(
            f"{_name(own, rows, own['batch'])}: {speed} x the clips/s of "
            f"{other['model']}, {memory:.2f} of its memory"
        )
    return lines


def chart(rows: Iterable[Row]) -> np.ndarray:
    """Draws the rows that fit as bars: clips per second, and the planned memory per device.

    Each model has its colour. A black line runs from the 10th to the 90th percentile of the speed.
    Settings that all rows share are in the title. At least one row must fit.

    Returns:
      uint8 [H, W, 3].
    """
    rows = [row for row in rows if row["fits"]]
    words = {name: [label(row) for row in rows] for name, label in _BAR_LABELS.items()}
    shared = [of_rows[0] for of_rows in words.values() if len(set(of_rows)) == 1]
    own = [of_rows for of_rows in words.values() if len(set(of_rows)) > 1]
    labels = [", ".join(of_row) for of_row in zip(*own, strict=True)] if own else [""]
    models = list(dict.fromkeys(row["model"] for row in rows))
    colours = [_MODEL_COLOURS[models.index(row["model"]) % len(_MODEL_COLOURS)] for row in rows]
    speed = np.array([row["clips_per_second"] for row in rows])
    ends = np.array([[row[f"clips_per_second_p{percent}"] for row in rows] for percent in (10, 90)])
    memory = [row["peak_memory_bytes"] / 1e9 for row in rows]

    picture = plots.figure(8.6, 0.32 * len(rows) + 1.2)
    left, right = picture.subplots(1, 2, sharey=True)
    for axis, values, farthest, heading, error in (
        (left, speed, ends.max(), "clips per second", np.abs(ends - speed)),
        (right, memory, max(memory), "planned memory per device, GB", None),
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
    picture.suptitle(", ".join(shared), fontsize=10)
    return plots.pixels(picture)


def number(value: float | None, scale: float = 1.0) -> str:
    """Returns `value * scale` to three digits; a dash for None."""
    if value is None:
        return "-"
    value *= scale
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")


def _found(rows: Sequence[Row], find: str) -> Iterable[str]:
    """Yields the best batch that a search tried, for each model and setting."""
    score = "batch" if find == "largest" else "clips_per_second"
    searched = lambda row: (row["model"], *(row[name] for name in _SETTING))  # noqa: E731
    for first in _first_of(rows, searched):
        name = f"{first['model']}, {_name(first, rows)}"
        tried = [row for row in rows if row["fits"] and searched(row) == searched(first)]
        if not tried:
            yield f"{name}: no batch fits"
            continue
        best = max(tried, key=lambda row: row[score])
        yield (
            f"{name}: the {find} batch is {best['batch']}, {number(best['clips_per_second'])} "
            f"clips/s, {si(best['peak_memory_bytes'], 'B')}"
        )


def _name(row: Row, rows: Sequence[Row], batch: int | None = None) -> str:
    """Returns a setting in words, with its frames only if the rows differ in them."""
    words = [f"{row['encoder_layers']} layers", row["tokens"]]
    if batch is not None:
        words.append(f"batch {batch}")
    words.append(row["dtype"])
    if len({other["num_frames"] for other in rows}) > 1:
        words.append(f"{row['num_frames']} frames")
    return ", ".join(words)


def _first_of(rows: Iterable[Row], key) -> list[Row]:
    """Returns the first row for each value of `key`."""
    first = {}
    for row in rows:
        first.setdefault(key(row), row)
    return list(first.values())


def _spread(row: Row) -> str:
    if row["clips_per_second"] is None:
        return "-" if row["fits"] else "does not fit"
    return f"{number(row['clips_per_second_p10'])} to {number(row['clips_per_second_p90'])}"


def _share(row: Row) -> str:
    share = row["matrix_rate_share"]
    return "-" if share is None else f"{100 * share:.0f} %"
