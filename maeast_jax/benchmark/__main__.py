"""Speed of whole training steps: python -m maeast_jax.benchmark --model=mae_ast,ssast --batch=8,32

A row for each combination of the lists --model --tokens --encoder_layers --batch --dtype
--num_frames, all else as --config has it: forward pass, backward pass and optimiser, compiled ahead
and placed as in training, on all devices that jax sees, on noise. Standard output gets a table in
Markdown: clips a second (the median of samples), operations a clip on paper and their share of what
the devices reach in plain matrix products of that type, and the memory that XLA plans for a device.
Progress goes to standard error.

Exit codes: 0, also where a batch does not fit, which is a row; 1 for what the system refused; 2
for a mistake in flags, configuration or data; 3 for a loss that is not finite; 130 after Ctrl-C.
--json holds what was measured until then.
"""

import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from maeast_jax.benchmark import benchmark_config, devices, table
from maeast_jax.benchmark import cases as speed_rows
from maeast_jax.benchmark.cases import Case, Row
from maeast_jax.data import pipeline, writer
from maeast_jax.evaluation import plots
from maeast_jax.runtime import cli, memory, storage, terminal

# A temporary data set: ten seconds each, which training's crops of 10.24 s loop.
_NOISE_CLIPS, _NOISE_SAMPLES = 256, 160_000


def main(arguments: list[str]) -> int | None:
    if arguments:
        raise ValueError(f"unexpected argument {arguments[0]!r}; flags are --name=value")
    values = flags.FLAGS.flag_values_dict()
    if values["keep_freed"]:
        memory.share_heap()  # before anything asks for jax's backend
    benchmark_config.check(values)
    base = benchmark_config.base(values)
    with _input(base, values["input"], values["data_dir"], values["data"]):
        return _run(base, benchmark_config.cases(base, values), values)


def _run(base: ConfigDict, cases: list[Case], values: dict) -> int | None:
    """Says what it will do, measures, and says what came out."""
    memory_bytes = values["memory_gb"] and round(1e9 * values["memory_gb"])
    checked = [speed_rows.check(base, case) for case in cases]
    mesh = checked[0].mesh
    if values["find"] and not memory_bytes:
        memory_bytes = devices.memory_bytes(mesh)
    lines = {
        "rows": "\n".join(map(str, cases)),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}, jax {jax.__version__}",
        "time": f"{values['seconds']:g} s a row, and what its compilation takes"
        + ("" if values["input"] == "none" else ", as long for its input, and for both together"),
    }
    if values["find"]:
        held = terminal.si(memory_bytes, "B")
        lines["find"] = f"the {values['find']} batch in {held} a device, from those named on"
    lines |= {name: values[name] for name in ("json", "picture") if values[name]}
    _say(terminal.announce(lines))
    rows: list[Row] = []

    def on_row(row: Row) -> None:
        rows.append(row)
        if values["json"]:
            text = json.dumps(rows, indent=1)
            storage.write_whole(storage.path(values["json"]), f"{text}\n".encode())
        _say(_progress(row))

    try:
        speed_rows.measure_all(
            dict(zip(cases, checked, strict=True)), base, seconds=values["seconds"],
            find=values["find"], memory_bytes=memory_bytes, on_row=on_row,
        )  # fmt: skip
    except KeyboardInterrupt:
        _say(f"interrupted after {len(rows)} rows")
        return 128 + signal.SIGINT
    finally:
        if rows:
            print(f"{table.table(rows)}\n", flush=True)
            print("\n".join(table.remarks(rows, values["find"])), flush=True)
    if values["picture"] and any(row["fits"] for row in rows):
        plots.write_png(values["picture"], table.chart(rows))
    elif values["picture"]:
        _say(f"no picture {values['picture']}: no row fits; choose a smaller --batch")
    return None


def _progress(row: Row) -> str:
    case = Case(**{name: row[name] for name in benchmark_config.LISTS})
    if not row["fits"]:
        return f"{case}: does not fit"
    clips, seconds = (table.number(row[n]) for n in ("clips_per_second", "step_seconds"))
    return (
        f"{case}: {clips} clips/s, {seconds} s a step, {terminal.si(row['peak_memory_bytes'], 'B')}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _input(base: ConfigDict, place: str, data_dir: str | None, name: str | None) -> Iterator[None]:
    """Sets where batches of `base` come from, and what of training no step depends on."""
    base.init_from = base.eval.knn = base.data.eval = ""
    # A stream of so many steps: it does not end while it is timed.
    base.total_steps = max(base.total_steps, 1_000_000)
    if place == "none":
        base.data.update(source="synthetic", train="", dir="", fbank="device")
        yield
        return
    try:
        pipeline.prepare_tensorflow()
    except ValueError as error:
        raise ValueError(f"--input={place}: {error}, or pass --input=none") from None
    base.data.update(source="tfds", fbank=place)
    if name:
        base.data.update(train=name, dir=data_dir or "")
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        _say(f"writing {_NOISE_CLIPS} clips of noise of 10 s, in place of --data")
        writer.write("noise", folder, {"train": _noise})
        base.data.update(train="noise", dir=folder)
        yield


def _noise() -> Iterator[writer.Example]:
    random = np.random.default_rng(0)
    for index in range(_NOISE_CLIPS):
        yield str(index), random.integers(-8192, 8192, _NOISE_SAMPLES, np.int16), None


if __name__ == "__main__":
    benchmark_config.define()
    cli.run_flags(main, required=())
