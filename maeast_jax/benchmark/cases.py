"""Rows of a benchmark: the model and batch of each row, and the search for a batch."""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from maeast_jax import config as configuration
from maeast_jax.benchmark import measure as speed
from maeast_jax.runtime import memory, sharding
from maeast_jax.training import PretrainConfig, Pretraining

Row = dict[str, Any]
# Name of a model -> model.architecture, model.passes.
MODELS = {"mae_ast": ("mae_ast", 1), "ssast": ("ssast", 1), "ssast_two_passes": ("ssast", 2)}
# A search for the largest batch ends when the answer is known to this share.
_KNOWN_TO = 16
# The fields of a row, in the order of --json.
FIELDS = (
    "model", "tokens", "encoder_layers", "batch", "dtype", "clips_per_second", "step_seconds",
    "flops_per_clip", "matrix_rate_share", "peak_memory_bytes", "compile_seconds", "device",
    "num_frames", "devices", "fits", "input", "input_clips_per_second", "together_clips_per_second",
    "clips_per_second_p10", "clips_per_second_p90", "samples", "steps", "recompiles",
    "matrix_rate", "device_peak_bytes",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """The settings of one row; its fields are named as the flags and as the row's fields."""

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


LISTS = tuple(field.name for field in dataclasses.fields(Case))


def combinations(base: ConfigDict, lists: Mapping[str, Sequence | None]) -> list[Case]:
    """Returns all combinations of the lists, with the models side by side.

    A list that is None or absent stands for the value of `base`, or for both models.
    """
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
    """Returns `base` with the settings of `case`; raises ValueError for an unknown model."""
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


def open_case(base: ConfigDict, case: Case) -> Pretraining:
    """Returns the run of a case, not compiled; raises ValueError if the case cannot work."""
    return Pretraining(PretrainConfig.of(config_of(base, case)))


def least_batch(base: ConfigDict) -> int:
    """Returns one clip for each device that shares a batch, and for each part of the batch."""
    mesh = sharding.make_mesh(**base.mesh.to_dict())
    return sharding.batch_shares(mesh) * base.accumulation_steps


def measure_all(
    chosen: Sequence[Case],
    base: ConfigDict,
    seconds: float,
    find: str | None,
    memory_bytes: int | None,
    on_row: Callable[[Row], None],
) -> None:
    """Measures the cases one after the other, and gives each row to `on_row` at once.

    If `base.data` names a data set, the input is measured too, alone and together with the steps.

    Args:
      seconds: Time per row, and as long again for its input alone and for both together.
      find: "largest" or "fastest" searches for a batch, and makes a row of each batch tried. The
        search begins at the batch of a case. "fastest" only doubles.
      memory_bytes: Memory per device that a plan may fill; None sets no limit.

    Raises NonFiniteError.
    """

    def fits(case: Case, batch: int) -> bool:
        case = dataclasses.replace(case, batch=batch)
        row = measure(open_case(base, case), case, seconds, memory_bytes)
        on_row(row)
        return row["fits"]

    for case in chosen:
        if find is None:
            fits(case, case.batch)
        else:
            of_batch = functools.partial(fits, case)
            search(of_batch, case.batch, least_batch(base), is_exact=find == "largest")


def search(fits: Callable[[int], bool], start: int, unit: int, *, is_exact: bool) -> int:
    """Returns the largest batch that fits, or 0.

    Args:
      fits: Whether a batch fits.
      start: The first batch to try, a multiple of `unit`.
      unit: All batches tried are multiples of it.
      is_exact: False only doubles; True goes on until the answer is known to a sixteenth.
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


def measure(training: Pretraining, case: Case, seconds: float, memory_bytes: int | None) -> Row:
    """Returns the row of a case: its settings, and costs and times as in measure.py.

    A field that was not measured is None. `fits` is False if the devices have no room, or if the
    plan per device exceeds `memory_bytes`.
    """
    data = training.config.data
    has_input = data.source != "synthetic"
    row = dict.fromkeys(FIELDS) | dataclasses.asdict(case)
    row |= {
        "device": training.mesh.devices.flat[0].device_kind,
        "devices": training.mesh.size,
        "input": data.fbank if has_input else "none",
        "fits": False,
    }
    try:
        subject = speed.compile_step(training)
        row |= speed.costs(subject)
        if memory_bytes is not None and row["peak_memory_bytes"] > memory_bytes:
            return row
        row |= speed.measure(subject, seconds)
        if has_input:
            row |= speed.measure_input(subject, seconds)
    except memory.OutOfMemoryError:
        return row
    return row | {"fits": True}
