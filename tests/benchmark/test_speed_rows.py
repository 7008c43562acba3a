"""Which rows there are, how they differ, and how the search for a batch goes."""

import dataclasses
import types

import pytest
import tiny

from maeast_jax import config as configuration
from maeast_jax.benchmark import cases as speed_rows
from maeast_jax.benchmark import measure as speed
from maeast_jax.benchmark.cases import Case
from maeast_jax.model import ModelConfig
from maeast_jax.runtime import memory


def base_config():
    config = tiny.get_config()
    config.total_steps, config.mesh.data = 1000, 2
    config.data.update(source="synthetic", train="", eval="")
    return config


# What readers of --json rely on.
PROMISED = [
    "model", "tokens", "encoder_layers", "batch", "dtype", "clips_per_second", "step_seconds",
    "flops_per_clip", "matrix_rate_share", "peak_memory_bytes", "compile_seconds", "device",
]  # fmt: skip
TINY = Case("mae_ast", "patch", 2, 4, "float32", 64)


def test_lists_make_all_combinations_with_models_side_by_side():
    lists = {"tokens": ["patch", "frame"], "batch": [4, 8], "model": ["mae_ast", "ssast"]}
    cases = speed_rows.combinations(base_config(), lists | {"dtype": None})
    assert cases == [
        Case(model, tokens, 2, batch, "float32", 64)
        for tokens in ("patch", "frame")
        for batch in (4, 8)
        for model in ("mae_ast", "ssast")
    ]
    everything = {
        "model": list(speed_rows.MODELS), "tokens": ["patch", "frame"], "encoder_layers": [6, 12],
        "batch": [8, 32], "dtype": ["float32", "bfloat16"], "num_frames": [512, 1024],
    }  # fmt: skip
    assert len(set(speed_rows.combinations(base_config(), everything))) == 3 * 2**5


def test_without_lists_there_is_the_configuration_of_both_models():
    cases = speed_rows.combinations(configuration.pretrain(), {})
    assert cases == [
        Case(model, "patch", 12, 32, "bfloat16", 1024) for model in ("mae_ast", "ssast")
    ]


def test_a_case_changes_what_it_names_and_no_more():
    base = configuration.pretrain()
    case = Case("mae_ast", "frame", 6, 8, "float32", 512)
    config = speed_rows.config_of(base, case)
    changed = configuration.differences(base.to_dict(), config.to_dict())
    assert {name: new for name, (_, new) in changed.items()} == {
        "batch_size": 8, "num_frames": 512, "model.tokens": "frame", "model.encoder_layers": 6,
        "model.dtype": "float32",
    }  # fmt: skip
    ssast = speed_rows.config_of(base, dataclasses.replace(case, model="ssast"))
    assert {
        name: new
        for name, (_, new) in configuration.differences(config.to_dict(), ssast.to_dict()).items()
    } == {"model.architecture": "ssast", "model.decoder_layers": 0}
    twice = speed_rows.config_of(base, dataclasses.replace(case, model="ssast_two_passes"))
    assert configuration.differences(ssast.to_dict(), twice.to_dict()) == {"model.passes": (1, 2)}
    base.model.decoder_width = 384
    ModelConfig(**speed_rows.config_of(base, dataclasses.replace(case, model="ssast")).model)
    back = speed_rows.config_of(ssast, case)
    assert (back.model.architecture, back.model.decoder_layers) == ("mae_ast", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "vit"}, "--model=vit is unknown; known: mae_ast, ssast, ssast_two_passes"),
        ({"tokens": "word"}, "model.tokens='word'"),
        ({"dtype": "float8"}, "model.dtype='float8' is unknown"),
        ({"batch": 3}, "batch_size=3 must be a multiple of 2"),
        ({"num_frames": 65}, "num_frames=65 must be a multiple of 16"),
        ({"encoder_layers": 0}, "model.encoder_layers=0 must be at least 1"),
    ],
)
def test_a_case_that_cannot_work_is_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        speed_rows.check(base_config(), dataclasses.replace(TINY, **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize("start", [2, 4, 40])
@pytest.mark.parametrize("limit", [0, 2, 3, 7, 14, 16, 31])
def test_small_batches_are_found_exactly(unit, start, limit):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= limit

    found = speed_rows.search(fits, start=start, unit=unit, is_exact=True)
    assert found == limit // unit * unit
    assert len(set(tried)) == len(tried) and all(batch % unit == 0 for batch in tried)


def test_large_batches_are_found_to_a_sixteenth_and_by_doubling_to_the_power_of_two():
    for limit in (33, 100, 1000, 4097):
        fits = limit.__ge__
        found = speed_rows.search(fits, start=1, unit=1, is_exact=True)
        assert limit * 16 / 17 - 1 < found <= limit
        doubled = speed_rows.search(fits, start=1, unit=1, is_exact=False)
        assert doubled <= limit < 2 * doubled and doubled & (doubled - 1) == 0


@pytest.fixture
def plans(monkeypatch):
    """Steps that plan 10 bytes a clip, take a second, and have no room in fact for 14 clips."""

    def measure(subject, seconds):
        batch = subject.checked.config.batch_size
        if batch >= 14:
            raise memory.OutOfMemoryError("no room")
        return {"clips_per_second": float(batch), "step_seconds": 1.0}

    monkeypatch.setattr(speed, "compile_step", lambda run: types.SimpleNamespace(checked=run))
    monkeypatch.setattr(
        speed, "costs", lambda s: {"peak_memory_bytes": 10 * s.checked.config.batch_size}
    )
    monkeypatch.setattr(speed, "measure", measure)


@pytest.mark.parametrize(
    ("find", "memory_bytes", "batches", "largest"),
    [
        ("largest", 75, [2, 4, 8, 6], 6),  # by the plan
        ("largest", 1_000, [2, 4, 8, 16, 12, 14], 12),  # by the device
        ("fastest", 1_000, [2, 4, 8, 16], 8),
        ("largest", 10, [2], None),
    ],
)
def test_a_search_is_a_row_a_batch_and_ends_where_memory_does(
    plans, find, memory_bytes, batches, largest
):
    base = base_config()
    case = dataclasses.replace(TINY, batch=speed_rows.least_batch(base))
    checked = {case: speed_rows.check(base, case)}
    seen = []
    rows = speed_rows.measure_all(
        checked, base, seconds=1.0, find=find, memory_bytes=memory_bytes, on_row=seen.append
    )
    assert seen == rows and [row["batch"] for row in rows] == batches
    assert max((row["batch"] for row in rows if row["fits"]), default=None) == largest
    for row in rows:
        assert row["peak_memory_bytes"] == 10 * row["batch"]
        assert (row["clips_per_second"] is None) == (not row["fits"])


def test_a_row_has_all_its_fields_whatever_became_of_it(plans):
    base = base_config()
    kept = None
    for batch in (4, 16):
        case = dataclasses.replace(TINY, batch=batch)
        row = speed_rows.measure(speed_rows.check(base, case), case, 1.0)
        assert list(row)[: len(PROMISED)] == PROMISED
        assert kept is None or list(row) == kept
        kept = list(row)
        assert row["fits"] == (batch == 4)
        assert (row["device"], row["devices"], row["input"]) == ("cpu", 2, "none")
        assert Case(**{f.name: row[f.name] for f in dataclasses.fields(Case)}) == case
