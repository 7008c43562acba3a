"""Speed of whole training steps: python -m maeast_jax.benchmark --model=mae_ast,ssast --batch=8,32

The program measures one row per combination of the lists --model --tokens --encoder_layers --batch
--dtype --num_frames; all other settings are those of --config (default: the paper's pretraining). A
row is a training step (forward pass, backward pass and optimiser), compiled and placed as in
training, on all devices that jax sees, on noise. The program prints a table in Markdown: clips per
second (the median of samples), operations per clip on paper and their share of the rate of plain
matrix products in that type, and the memory that XLA plans per device. Progress goes to standard
error.

Exit codes: 0, also if a batch does not fit, which is a row; 1 if the system refused something; 2
for a mistake in flags, configuration or data; 3 for a loss that is not finite; 130 after Ctrl-C.
--json holds what was measured until then.
"""

import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maeast_jax import config
from maeast_jax.benchmark import cases, measure, table
from maeast_jax.benchmark.cases import Case, Row
from maeast_jax.data import prepare_tensorflow, writer
from maeast_jax.evaluation import plots
from maeast_jax.runtime import cli, memory, sharding, storage, terminal

# The temporary data set: clips of ten seconds, which training's crops of 10.24 s loop.
_NOISE_CLIPS, _NOISE_SAMPLES = 256, 160_000
# More steps than a measurement takes, so that the stream of batches does not end.
_MANY_STEPS = 1_000_000


class _WholeNumbers(flags.ListParser):
    def parse(self, argument):
        try:
            return [int(word) for word in super().parse(argument)]
        except ValueError:
            raise ValueError("must be whole numbers") from None


def define() -> None:
    """Defines the program's flags beside --config."""

    def numbers(name: str, text: str) -> None:
        flags.DEFINE(_WholeNumbers(), name, None, text, serializer=flags.CsvListSerializer(","))

    default = "Default: that of --config."
    models = ",".join(cases.MODELS)
    flags.DEFINE_list("model", ["mae_ast", "ssast"], f"From {models}.")
    flags.DEFINE_list("tokens", None, f"Such as patch,frame. {default}")
    numbers("encoder_layers", f"Such as 6,12. {default}")
    numbers("batch", f"Clips per step on all devices together, such as 8,32. {default}")
    flags.DEFINE_list("dtype", None, f"The model computes in float32,bfloat16. {default}")
    numbers("num_frames", f"Lengths of clips in frames of 10 ms, such as 1024. {default}")
    flags.DEFINE_float(
        "seconds",
        10.0,
        "Time per row after compilation and warm-up; there are always three samples.",
        lower_bound=0.0,
    )
    flags.DEFINE_enum(
        "input",
        "none",
        ["none", "device", "host"],
        "none: only steps, on a batch that stays on the devices. device, host: also the clips per"
        " second of reading --config.data.train (default: noise, written for the purpose), with"
        " log-mel energies computed there, alone and together with the steps.",
    )
    flags.DEFINE_enum(
        "find",
        None,
        ["largest", "fastest"],
        "largest: the largest batch that fits, by doubling and halving, to a sixteenth. fastest:"
        " the batch with the most clips per second, by doubling as long as it fits. There is one"
        " row per batch tried, from --batch on; default: one clip per device.",
    )
    flags.DEFINE_float(
        "memory_gb",
        None,
        "1e9 bytes that XLA may plan per device. Default with --find: the memory that jax may use"
        " (XLA_PYTHON_CLIENT_MEM_FRACTION on a GPU); on a CPU, four fifths of the free memory.",
    )
    flags.DEFINE_bool(
        "keep_freed",
        True,
        "On a CPU, keep the memory that a step frees for the next step, as training does. With"
        " false the system gets it back.",
    )
    flags.DEFINE_string("json", None, "FILE for the list of rows, written anew after each row.")
    flags.DEFINE_string("picture", None, "FILE.png for bars of clips per second and memory.")
    flags.DEFINE_bool("overwrite", False, "Replace --json and --picture.")


def main(base: ConfigDict) -> int | None:
    """Measures and prints; returns the exit code after Ctrl-C.

    Raises:
      ValueError: a flag, a field or the data cannot work; nothing was compiled.
      NonFiniteError: a loss is not finite.
    """
    options = flags.FLAGS
    _check(options)
    if options.keep_freed:
        memory.share_heap()  # before anything starts jax's backend
    with _input(base, options):
        lists = {name: options[name].value for name in cases.LISTS}
        if options.find and options.batch is None:
            lists["batch"] = [cases.least_batch(base)]
        chosen = cases.combinations(base, lists)
        for case in chosen:
            cases.open_case(base, case)  # a mistake shows before the first compilation
        return _run(base, chosen, options)


def _run(base: ConfigDict, chosen: Sequence[Case], options: flags.FlagValues) -> int | None:
    mesh = sharding.make_mesh(**base.mesh.to_dict())
    memory_bytes = options.memory_gb and round(1e9 * options.memory_gb)
    if options.find and not memory_bytes:
        memory_bytes = measure.memory_bytes(mesh)
    _say(terminal.announce(_plan(chosen, options, mesh, memory_bytes)))
    rows: list[Row] = []

    def on_row(row: Row) -> None:
        rows.append(row)
        if options.json:
            text = json.dumps(rows, indent=1)
            storage.write_whole(storage.path(options.json), f"{text}\n".encode())
        _say(_progress(row))

    try:
        cases.measure_all(chosen, base, options.seconds, options.find, memory_bytes, on_row)
    except KeyboardInterrupt:
        _say(f"interrupted after {len(rows)} rows")
        return 128 + signal.SIGINT
    finally:
        if rows:
            print(f"{table.table(rows)}\n", flush=True)
            print("\n".join(table.remarks(rows, options.find)), flush=True)
    if options.picture and any(row["fits"] for row in rows):
        plots.write_png(options.picture, table.chart(rows))
    elif options.picture:
        _say(f"no picture {options.picture}: no row fits; choose a smaller --batch")
    return None


def _check(options: flags.FlagValues) -> None:
    """Raises ValueError for flags that cannot work, and makes the folders of the output files."""
    if empty := [name for name in cases.LISTS if options[name].value == []]:
        raise ValueError(f"--{empty[0]}= is empty; leave it out or name what to measure")
    for name in filter(None, (options.json, options.picture)):
        path = storage.path(name)
        if path.exists() and not options.overwrite:
            raise ValueError(f"{name} exists; choose another name or pass --overwrite")
        path.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def _input(base: ConfigDict, options: flags.FlagValues) -> Iterator[None]:
    """Sets the source of batches in `base`, and clears the fields that no step depends on."""
    base.init_from = base.eval.knn = base.data.eval = ""
    base.total_steps = max(base.total_steps, _MANY_STEPS)
    if options.input == "none":
        base.data.update(source="synthetic", train="", dir="", fbank="device")
        yield
        return
    prepare_tensorflow()
    base.data.update(source="tfds", fbank=options.input)
    if base.data.train:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        _say(f"no --config.data.train: writing {_NOISE_CLIPS} clips of 10 s of noise")
        writer.write("noise", folder, {"train": _noise})
        base.data.update(train="noise", dir=folder)
        yield


def _noise() -> Iterator[writer.Example]:
    random = np.random.default_rng(0)
    for index in range(_NOISE_CLIPS):
        yield str(index), random.integers(-8192, 8192, _NOISE_SAMPLES, np.int16), None


def _plan(
    chosen: Sequence[Case], options: flags.FlagValues, mesh: Mesh, memory_bytes: int | None
) -> dict[str, str]:
    """Returns what will be measured in words, by the name of the line."""
    device = mesh.devices.flat[0].device_kind
    with_input = "" if options.input == "none" else ", as long for its input, and for both together"
    lines = {
        "rows": "\n".join(map(str, chosen)),
        "devices": f"{mesh.size} x {device}, jax {jax.__version__}",
        "time": f"compilation and {options.seconds:g} s per row{with_input}",
        "json": options.json,
        "picture": options.picture,
    }
    if options.find:
        held = terminal.si(memory_bytes, "B")
        lines["find"] = f"the {options.find} batch in {held} per device, from these rows on"
    return {name: line for name, line in lines.items() if line}


def _progress(row: Row) -> str:
    case = Case(**{name: row[name] for name in cases.LISTS})
    if not row["fits"]:
        return f"{case}: does not fit"
    clips, seconds = (table.number(row[name]) for name in ("clips_per_second", "step_seconds"))
    held = terminal.si(row["peak_memory_bytes"], "B")
    return f"{case}: {clips} clips/s, {seconds} s per step, {held}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    define()
    cli.run(main, workdir=False, default_config=config.__file__)
