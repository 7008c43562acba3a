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
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from maeast_jax import config as configuration
from maeast_jax import (
    data,
    devices,
    host_memory,
    logs,
    paths,
    plots,
    program,
    shard_writer,
    speed_rows,
    speed_table,
)
from maeast_jax.speed_rows import Case, Row

_INPUTS = ("none", "device", "host")
_FINDS = ("largest", "fastest")
_LISTS = ("model", "tokens", "encoder_layers", "batch", "dtype", "num_frames")
# Fields that rows differ by, or that the benchmark sets, and the flag that is theirs.
_OWN_FIELDS = {
    "model.architecture": "model", "model.passes": "model", "model.tokens": "tokens",
    "model.encoder_layers": "encoder_layers", "batch_size": "batch", "model.dtype": "dtype",
    "num_frames": "num_frames", "data.source": "input", "data.fbank": "input",
    "data.dir": "data_dir", "data.train": "data",
}  # fmt: skip
# Training's own affairs, which no step depends on.
_IDLE_FIELDS = ("init_from", "total_steps", "data.eval", "eval.knn")
_PARSERS = {
    bool: flags.BooleanParser, int: flags.IntegerParser, float: flags.FloatParser,
    str: flags.ArgumentParser,
}  # fmt: skip
# A temporary data set: ten seconds each, which training's crops of 10.24 s loop.
_NOISE_CLIPS, _NOISE_SAMPLES = 256, 160_000


def main(arguments: list[str]) -> int | None:
    if arguments:
        raise ValueError(f"unexpected argument {arguments[0]!r}; flags are --name=value")
    values = flags.FLAGS.flag_values_dict()
    _check(values)
    base = _load(values["config"])
    base.update_from_flattened_dict(_overrides(values))
    with _input(base, values["input"], values["data_dir"], values["data"]):
        lists = {name: _parsed(name, values[name]) for name in _LISTS}
        if values["find"] and lists["batch"] is None:
            lists["batch"] = [speed_rows.least_batch(base)]
        cases = speed_rows.combinations(base, lists)
        return _run(base, cases, values)


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
        "time": f"{values['seconds']:g} s a row once it is compiled"
        + ("" if values["input"] == "none" else ", as long for its input, and for both together"),
    }
    if values["find"]:
        held = logs.si(memory_bytes, "B")
        lines["find"] = f"the {values['find']} batch in {held} a device, from those named on"
    lines |= {name: values[name] for name in ("json", "picture") if values[name]}
    _say(logs.announce(lines))
    rows: list[Row] = []

    def on_row(row: Row) -> None:
        rows.append(row)
        if values["json"]:
            text = json.dumps(rows, indent=1)
            paths.write_whole(paths.path(values["json"]), f"{text}\n".encode())
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
            print(f"{speed_table.table(rows)}\n", flush=True)
            print("\n".join(speed_table.remarks(rows, values["find"])), flush=True)
    if values["picture"]:
        plots.write_png(values["picture"], plots.speeds(rows))
    return None


def _progress(row: Row) -> str:
    case = Case(**{name: row[name] for name in _LISTS})
    if not row["fits"]:
        return f"{case}: does not fit"
    clips, seconds = (speed_table.number(row[n]) for n in ("clips_per_second", "step_seconds"))
    return f"{case}: {clips} clips/s, {seconds} s a step, {logs.si(row['peak_memory_bytes'], 'B')}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- from flags to a configuration -----------------------------------------------------------


def _check(values: dict) -> None:
    """Raises ValueError for flags that do not go together, and for files that cannot be written."""
    for field, flag in _OWN_FIELDS.items():
        if values[f"config.{field}"] is not None:
            raise ValueError(f"--config.{field} is what --{flag} sets; use that")
    for field in _IDLE_FIELDS:
        if values[f"config.{field}"] is not None:
            raise ValueError(f"--config.{field} has no bearing on a step; leave it out")
    if not values["seconds"] > 0:
        raise ValueError(f"--seconds={values['seconds']:g} must be above 0")
    if values["memory_gb"] is not None and not (values["find"] and values["memory_gb"] > 0):
        raise ValueError(
            f"--memory_gb={values['memory_gb']:g} is for --find=largest and --find=fastest, above 0"
        )
    if values["find"] and len(values["batch"] or ()) > 1:
        raise ValueError(
            f"--batch={','.join(values['batch'])} with --find: one, where the search begins"
        )
    if values["input"] == "none" and (values["data"] or values["data_dir"]):
        raise ValueError("--data and --data_dir are for --input=device and --input=host; add one")
    if values["data_dir"] and not values["data"]:
        raise ValueError(f"--data_dir={values['data_dir']} without --data=NAME; add it")
    if values["picture"] and not values["picture"].endswith(".png"):
        raise ValueError(f"--picture={values['picture']} must end in .png")
    for name in ("json", "picture"):
        if values[name]:
            _check_output(f"--{name}={values[name]}", paths.path(values[name]), values["overwrite"])


def _check_output(flag: str, path: os.PathLike, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ValueError(f"{flag} exists; choose another name or pass --overwrite")
    if not paths.is_remote(path) and not path.parent.is_dir():
        raise ValueError(f"{flag}: {path.parent} is not a folder; make it first")


def _load(config_file: str | None) -> ConfigDict:
    """The configuration of FILE[:ARG], checked; the paper's for None."""
    if config_file is None:
        return configuration.pretrain()
    path, _, argument = config_file.partition(":")
    try:
        get_config = runpy.run_path(path)["get_config"]
    except OSError as error:
        raise ValueError(f"--config={path}: {error.strerror}; see configs/") from None
    except KeyError:
        raise ValueError(f"--config={path} has no function get_config; see configs/") from None
    config = get_config(argument) if argument else get_config()
    configuration.check(config)
    return config.lock()


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name in config:
        if isinstance(config[name], ConfigDict):
            yield from _fields(config[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", config[name]


def _overrides(values: dict) -> dict[str, object]:
    given = {field: values[f"config.{field}"] for field, _ in _fields(configuration.pretrain())}
    return {field: value for field, value in given.items() if value is not None}


def _parsed(name: str, words: list[str] | None) -> list | None:
    """A list's values; whole numbers where the configuration has them."""
    if words == []:
        raise ValueError(f"--{name}= is empty; leave it out or name what to measure")
    if words is None or name in ("model", "tokens", "dtype"):
        return words
    try:
        return [int(word) for word in words]
    except ValueError:
        raise ValueError(f"--{name}={','.join(words)} must be whole numbers") from None


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
        data.prepare_tensorflow()
    except ValueError as error:
        raise ValueError(f"--input={place}: {error}, or pass --input=none") from None
    base.data.update(source="tfds", fbank=place)
    if name:
        base.data.update(train=name, dir=data_dir or "")
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        _say(f"writing {_NOISE_CLIPS} clips of noise of 10 s, in place of --data")
        shard_writer.write("noise", folder, {"train": _noise})
        base.data.update(train="noise", dir=folder)
        yield


def _noise() -> Iterator[shard_writer.Example]:
    random = np.random.default_rng(0)
    for index in range(_NOISE_CLIPS):
        yield str(index), random.integers(-8192, 8192, _NOISE_SAMPLES, np.int16), None


def _define_flags() -> None:
    flags.DEFINE_string(
        "config",
        None,
        "FILE[:ARG] with a configuration, such as configs/pretrain_frame.py; default: the paper's."
        " Its fields are set as --config.FIELD=VALUE, such as --config.model.unroll=false;"
        " --helpfull lists them.",
    )
    for field, default in _fields(configuration.pretrain()):
        text = f"Sets this field of --config; the paper's is {default!r}."
        flags.DEFINE(
            _PARSERS[type(default)](), f"config.{field}", None, text, module_name="--config"
        )
    models = ", ".join(speed_rows.MODELS)
    flags.DEFINE_list("model", None, f"Of {models}. Default: mae_ast,ssast.")
    flags.DEFINE_list("tokens", None, "Such as patch,frame. Default, here and below: --config's.")
    flags.DEFINE_list("encoder_layers", None, "Such as 6,12.")
    flags.DEFINE_list("batch", None, "Clips a step over all devices, such as 8,32.")
    flags.DEFINE_list("dtype", None, "What the model computes in: float32,bfloat16.")
    flags.DEFINE_list("num_frames", None, "Clips' lengths in frames of 10 ms, such as 1024.")
    flags.DEFINE_float(
        "seconds",
        10.0,
        "Each row is timed for, once it is compiled and warm; 3 samples at least.",
    )
    flags.DEFINE_enum(
        "input",
        "none",
        _INPUTS,
        "none: steps alone, on a batch that stays on the devices. device, host: also the clips/s of"
        " reading a data set, log-mel energies computed there, alone and together with the steps.",
    )
    flags.DEFINE_string("data", None, "Of --input: a data set's name. Default: noise, written.")
    flags.DEFINE_string("data_dir", None, "Of --input: where data sets lie. Default: TFDS' own.")
    flags.DEFINE_enum(
        "find",
        None,
        _FINDS,
        "largest: the batch that the devices just hold, by doubling and halving, to a sixteenth."
        " fastest: the one of most clips/s, by doubling as long as it fits. A row is what was"
        " tried; --batch is the first, by default one clip a device.",
    )
    flags.DEFINE_float(
        "memory_gb",
        None,
        "Of --find: 1e9 bytes that XLA may plan for a device. Default: what jax may use of it"
        " (XLA_PYTHON_CLIENT_MEM_FRACTION on a GPU), or this machine's memory on CPU.",
    )
    flags.DEFINE_string("json", None, "FILE for a list of rows, written anew after each one.")
    flags.DEFINE_string("picture", None, "FILE.png for bars of clips/s, and of memory.")
    flags.DEFINE_bool("overwrite", False, "Replace files of those names.")


if __name__ == "__main__":
    host_memory.share_heap()
    _define_flags()
    program.run_flags(main, required=())
