"""Flags of the benchmark, what they must not say, and the configuration that they make."""

import os
import runpy
from collections.abc import Iterator

from absl import flags
from ml_collections import ConfigDict

from maeast_jax import config as configuration
from maeast_jax.benchmark import cases as speed_rows
from maeast_jax.benchmark.cases import Case
from maeast_jax.runtime import storage

_INPUTS = ("none", "device", "host")
_FINDS = ("largest", "fastest")
LISTS = ("model", "tokens", "encoder_layers", "batch", "dtype", "num_frames")
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


def define() -> None:
    """Defines the program's flags."""
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
        " (XLA_PYTHON_CLIENT_MEM_FRACTION on a GPU), on CPU four fifths of what this machine has"
        " left.",
    )
    flags.DEFINE_bool(
        "keep_freed",
        True,
        "On a CPU keep the memory that a step frees for the next one, as training does; false gives"
        " it back to the system.",
    )
    flags.DEFINE_string("json", None, "FILE for a list of rows, written anew after each one.")
    flags.DEFINE_string("picture", None, "FILE.png for bars of clips/s, and of memory.")
    flags.DEFINE_bool("overwrite", False, "Replace files of those names.")


def check(values: dict) -> None:
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
            _check_output(
                f"--{name}={values[name]}", storage.path(values[name]), values["overwrite"]
            )


def _check_output(flag: str, path: os.PathLike, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ValueError(f"{flag} exists; choose another name or pass --overwrite")
    if not storage.is_remote(path) and not path.parent.is_dir():
        raise ValueError(f"{flag}: {path.parent} is not a folder; make it first")


def base(values: dict) -> ConfigDict:
    """The configuration of --config and --config.FIELD, locked; raises ValueError."""
    config = _load(values["config"])
    given = {field: values[f"config.{field}"] for field, _ in _fields(configuration.pretrain())}
    config.update_from_flattened_dict(
        {field: value for field, value in given.items() if value is not None}
    )
    return config


def cases(config: ConfigDict, values: dict) -> list[Case]:
    """What rows are of: all combinations of the lists, `config`'s value where a flag is absent."""
    lists = {name: _parsed(name, values[name]) for name in LISTS}
    if values["find"] and lists["batch"] is None:
        lists["batch"] = [speed_rows.least_batch(config)]
    return speed_rows.combinations(config, lists)


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
