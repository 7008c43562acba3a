"""Which rows there are, how they differ, and the search for a batch."""

import dataclasses
import itertools
import types

import pytest
import tiny

from maeast_jax import config as configuration
from maeast_jax.benchmark import cases, measure
from maeast_jax.benchmark.cases import Case
from maeast_jax.runtime import memory, sharding

# The first fields of a row; readers of --json rely on them.
PROMISED = (
    "model", "tokens", "encoder_layers", "batch", "dtype", "clips_per_second", "step_seconds",
    "flops_per_clip", "matrix_rate_share", "peak_memory_bytes", "compile_seconds", "device",
)  # fmt: skip
TINY = Case("mae_ast", "patch", 2, 4, "float32", 64)


def base_config():
    config = tiny.get_config()
    config.total_steps, config.mesh.data = 1000, 2
    config.data.update(source="synthetic", train="", eval="")
    return config


def test_lists_make_all_combinations_with_models_side_by_side():
    lists = {"tokens": ["patch", "frame"], "batch": [4, 8], "model": ["mae_ast", "ssast"]}
    assert cases.combinations(base_config(), lists | {"dtype": None}) == [
        Case(model, tokens, 2, batch, "float32", 64)
        for tokens in ("patch", "frame")
        for batch in (4, 8)
        for model in ("mae_ast", "ssast")
    ]
    assert cases.combinations(configuration.pretrain(), {}) == [
        Case(model, "patch", 12, 32, "bfloat16", 1024) for model in ("mae_ast", "ssast")
    ]


def test_a_case_changes_only_the_fields_it_names():
    def changes(old, new):
        changed = configuration.differences(old.to_dict(), new.to_dict())
        return {name: value for name, (_, value) in changed.items()}

    base = configuration.pretrain()
    case = Case("mae_ast", "frame", 6, 8, "float32", 512)
    config = cases.config_of(base, case)
    assert changes(base, config) == {
        "batch_size": 8, "num_frames": 512, "model.tokens": "frame", "model.encoder_layers": 6,
        "model.dtype": "float32",
    }  # fmt: skip
    ssast = cases.config_of(base, dataclasses.replace(case, model="ssast"))
    assert changes(config, ssast) == {"model.architecture": "ssast", "model.decoder_layers": 0}
    twice = cases.config_of(base, dataclasses.replace(case, model="ssast_two_passes"))
    assert changes(ssast, twice) == {"model.passes": 2}
    base.model.decoder_width = 384  # SSAST has no decoder that could be narrower
    assert cases.config_of(base, dataclasses.replace(case, model="ssast")) == ssast
    back = cases.config_of(ssast, case)
    assert (back.model.architecture, back.model.decoder_layers) == ("mae_ast", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "vit"}, "--model=vit is unknown; known: mae_ast, ssast, ssast_two_passes"),
        ({"batch": 3}, "batch_size=3 must be a multiple of 2"),
    ],
)
def test_a_case_that_cannot_work_is_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        cases.open_case(base_config(), dataclasses.replace(TINY, **change))
    assert "\n" not in str(error.value)


def test_a_search_begins_with_a_clip_per_device_and_part_of_the_batch():
    base = base_config()
    base.mesh.data, base.accumulation_steps = 4, 2
    assert cases.least_batch(base) == 8


@pytest.mark.parametrize("unit", [1, 2])
def test_small_batches_are_found_exactly(unit):
    for start, limit in itertools.product([2, 4, 40], [0, 2, 3, 7, 14, 16, 31]):
        tried = []

        def fits(batch, tried=tried, limit=limit):
            tried.append(batch)
            return batch <= limit

        found = cases.search(fits, start, unit, is_exact=True)
        assert found == limit // unit * unit
        assert len(set(tried)) == len(tried) and all(batch % unit == 0 for batch in tried)


def test_large_batches_are_found_to_a_sixteenth_and_by_doubling_to_the_power_of_two():
    for limit in (33, 100, 1000, 4097):
        fits = limit.__ge__
        found = cases.search(fits, 1, 1, is_exact=True)
        assert limit * 16 / 17 - 1 < found <= limit
        doubled = cases.search(fits, 1, 1, is_exact=False)
        assert doubled <= limit < 2 * doubled and doubled & (doubled - 1) == 0


@pytest.fixture
def plans(monkeypatch):
    """A step plans 10 bytes per clip, and takes a second; 14 clips do not fit in fact."""

    def measure_one(subject, seconds):
        batch = subject.training.config.batch_size
        if batch >= 14:
            raise memory.OutOfMemoryError("no room")
        return {"clips_per_second": float(batch), "step_seconds": 1.0}

    def costs(subject):
        return {"peak_memory_bytes": 10 * subject.training.config.batch_size}

    def open_case(base, case):
        data = types.SimpleNamespace(source="synthetic")
        config = types.SimpleNamespace(batch_size=case.batch, data=data)
        return types.SimpleNamespace(config=config, mesh=mesh)

    mesh = sharding.make_mesh(data=2)
    monkeypatch.setattr(cases, "open_case", open_case)
    monkeypatch.setattr(
        measure, "compile_step", lambda training: types.SimpleNamespace(training=training)
    )
    monkeypatch.setattr(measure, "costs", costs)
    monkeypatch.setattr(measure, "measure", measure_one)


@pytest.mark.parametrize(
    ("find", "memory_bytes", "batches", "largest"),
    [
        ("largest", 75, [2, 4, 8, 6], 6),  # the plan is the limit
        ("largest", 1_000, [2, 4, 8, 16, 12, 14], 12),  # the device is the limit
        ("fastest", 1_000, [2, 4, 8, 16], 8),
        ("largest", 10, [2], None),
    ],
)
def test_a_search_makes_a_row_per_batch_and_ends_where_memory_does(
    plans, find, memory_bytes, batches, largest
):
    base = base_config()
    case = dataclasses.replace(TINY, batch=cases.least_batch(base))
    rows = []
    cases.measure_all([case], base, 1.0, find, memory_bytes, rows.append)
    assert [row["batch"] for row in rows] == batches
    assert max((row["batch"] for row in rows if row["fits"]), default=None) == largest
    for row in rows:
        assert row["peak_memory_bytes"] == 10 * row["batch"]
        assert (row["clips_per_second"] is None) == (not row["fits"])


def test_a_row_has_all_its_fields_also_if_it_does_not_fit(plans):
    base = base_config()
    for batch in (4, 16):
        case = dataclasses.replace(TINY, batch=batch)
        row = cases.measure(cases.open_case(base, case), case, 1.0, None)
        assert tuple(row) == cases.FIELDS and cases.FIELDS[: len(PROMISED)] == PROMISED
        assert row["fits"] == (batch == 4)
        assert (row["device"], row["devices"], row["input"]) == ("cpu", 2, "none")
        assert Case(**{name: row[name] for name in cases.LISTS}) == case
