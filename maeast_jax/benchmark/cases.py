"""Rows of a benchmark: what each is of, how it differs from a configuration, what it measured."""

import copy
import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from maeast_jax import config as configuration
from maeast_jax.benchmark import measure as speed
from maeast_jax.runtime import memory, sharding
from maeast_jax.training import pretraining
from maeast_jax.training.pretraining import Run

Row = dict[str, Any]
# Name of a model -> model.architecture, model.passes.
MODELS = {"mae_ast": ("mae_ast", 1), "ssast": ("ssast", 1), "ssast_two_passes": ("ssast", 2)}
# A search for the largest batch ends where it is known to this share.
_KNOWN_TO = 16
# What a row has, whatever became of it; the first twelve are promised to those who read JSON.
_FIELDS = (
    "model", "tokens", "encoder_layers", "batch", "dtype", "clips_per_second", "step_seconds",
    "flops_per_clip", "matrix_rate_share", "peak_memory_bytes", "compile_seconds", "device",
    "num_frames", "devices", "fits", "input", "input_clips_per_second", "together_clips_per_second",
    "clips_per_second_p10", "clips_per_second_p90", "samples", "steps", "recompiles",
    "matrix_rate", "xla_flops_per_clip", "device_peak_bytes",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """What one row is of; the names are those of the flags and of the row."""

    model: str
    tokens: str
    encoder_layers: int
    batch: int
    dtype: str
    num_frames: int

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.encoder_layers} layers, {self.tokens}, batch {self.batch}, "
            f"{self.dtype}, {self.num_frames} frames"
        )


def combinations(base: ConfigDict, lists: Mapping[str, Sequence | None]) -> list[Case]:
    """All combinations, models side by side; a list that is None is the one value of `base`."""
    axes = {
        "num_frames": [base.num_frames],
        "tokens": [base.model.tokens],
        "encoder_layers": [base.model.encoder_layers],
        "dtype": [base.model.dtype],
        "batch": [base.batch_size],
        "model": ["mae_ast", "ssast"],
    } | {name: values for name, values in lists.items() if values is not None}
    return [
        Case(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())
    ]


def config_of(base: ConfigDict, case: Case) -> ConfigDict:
    """`base` as the case has it. Raises ValueError for an unknown model."""
    if case.model not in MODELS:
        raise ValueError(f"--model={case.model} is unknown; known: {', '.join(MODELS)}")
    config = copy.deepcopy(base)
    config.batch_size, config.num_frames = case.batch, case.num_frames
    model = config.model
    model.architecture, model.passes = MODELS[case.model]
    model.tokens, model.dtype = case.tokens, case.dtype
    model.encoder_layers = case.encoder_layers
    if model.architecture == "ssast":
        model.update(decoder_layers=0, decoder_width=model.width, decoder_projection=False)
    elif not model.decoder_layers:
        model.decoder_layers = configuration.pretrain().model.decoder_layers
    return config


def check(base: ConfigDict, case: Case) -> Run:
    """Raises ValueError, in one line, for what cannot work."""
    with tempfile.TemporaryDirectory() as workdir:
        return pretraining.check_run(config_of(base, case), workdir)


def least_batch(base: ConfigDict) -> int:
    """A clip for each of the devices that share a batch, and each part of it."""
    mesh = sharding.make_mesh(**base.mesh.to_dict())
    return sharding.batch_shares(mesh) * base.accumulation_steps


def measure_all(
    checked: Mapping[Case, Run],
    base: ConfigDict,
    *,
    seconds: float,
    find: str | None = None,
    memory_bytes: int | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Measures one case after the other; `on_row` gets each row as soon as it is there.

    Where `base.data` names data sets, the input is measured too, alone and with the steps.

    Args:
      checked: cases and what `check` made of them and `base`.
      seconds: a row is timed for; so are its input alone, and both together.
      find: "largest" or "fastest": a case's batch is where a search for the largest begins, by
        doubling alone for the fastest, and a row is what was tried.
      memory_bytes: a device's, that a search may fill; needed by `find`.

    Raises NonFiniteError.
    """
    rows: list[Row] = []

    def is_fitting(case: Case, case_run: Run) -> bool:
        rows.append(measure(case_run, case, seconds, memory_bytes))
        on_row(rows[-1])
        return rows[-1]["fits"]

    def try_batch(case: Case, batch: int) -> bool:
        case = dataclasses.replace(case, batch=batch)
        return is_fitting(case, check(base, case))

    for case, case_run in checked.items():
        if find is None:
            is_fitting(case, case_run)
        else:
            tried = functools.partial(try_batch, case)
            unit, is_exact = least_batch(base), find == "largest"
            search(tried, start=case.batch, unit=unit, is_exact=is_exact)
    return rows


def search(fits: Callable[[int], bool], *, start: int, unit: int, is_exact: bool) -> int:
    """The largest batch that fits: by doubling alone, or known to a sixteenth; 0 where none does.

    `start`, and so all that is tried, is a multiple of `unit`.
    """
    largest, too_large = 0, start
    while fits(too_large):
        largest, too_large = too_large, 2 * too_large
    while is_exact and too_large - largest > max(unit, largest // _KNOWN_TO):
        middle = (largest + too_large) // 2 // unit * unit
        if fits(middle):
            largest = middle
        else:
            too_large = middle
    return largest


def measure(checked: Run, case: Case, seconds: float, memory_bytes: int | None = None) -> Row:
    """One row: a case, costs and times as in speed.py. What was not measured is None.

    `fits` is False where the devices, or a plan within `memory_bytes` a device, have no room.
    """
    mesh = checked.mesh
    is_fed = checked.data.source != "synthetic"
    row = dict.fromkeys(_FIELDS) | dataclasses.asdict(case)
    row |= {
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "input": checked.data.fbank if is_fed else "none",
        "fits": False,
    }
    try:
        subject = speed.compile_step(checked)
        row |= speed.costs(subject)
        if memory_bytes is not None and row["peak_memory_bytes"] > memory_bytes:
            return row
        row |= speed.measure(subject, seconds)
        if is_fed:
            row |= speed.measure_input(subject, seconds)
    except memory.OutOfMemoryError:
        return row
    return row | {"fits": True}
