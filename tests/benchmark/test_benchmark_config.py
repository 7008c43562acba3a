"""From flags to a configuration and its rows; test_benchmark.py has what mistakes are told."""

import pytest
from absl import flags

from maeast_jax import config as configuration
from maeast_jax.benchmark import benchmark_config
from maeast_jax.benchmark.cases import Case


@pytest.fixture
def values():
    """The flags' values for the words of a command line; flags are taken back after the test."""
    before = set(flags.FLAGS)
    benchmark_config.define()

    def parse(*words):
        for name in flags.FLAGS:
            flags.FLAGS[name].unparse()
        flags.FLAGS(["benchmark", *words])
        return flags.FLAGS.flag_values_dict()

    yield parse
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def test_without_flags_it_is_the_papers_configuration_of_both_models(values):
    found = values()
    benchmark_config.check(found)
    base = benchmark_config.base(found)
    assert base.to_dict() == configuration.pretrain().to_dict() and base.is_locked
    assert benchmark_config.cases(base, found) == [
        Case(model, "patch", 12, 32, "bfloat16", 1024) for model in ("mae_ast", "ssast")
    ]


def test_fields_change_the_configuration_and_lists_the_cases(values):
    found = values(
        "--config.model.unroll=false", "--config.optimizer.b1=0.5", "--batch=2,4",
        "--model=ssast", "--dtype=float32",
    )  # fmt: skip
    base = benchmark_config.base(found)
    changed = configuration.differences(configuration.pretrain().to_dict(), base.to_dict())
    assert {name: new for name, (_, new) in changed.items()} == {
        "model.unroll": False, "optimizer.b1": 0.5,
    }  # fmt: skip
    assert benchmark_config.cases(base, found) == [
        Case("ssast", "patch", 12, batch, "float32", 1024) for batch in (2, 4)
    ]


def test_a_search_begins_with_a_clip_a_device(values):
    found = values("--find=fastest", "--model=mae_ast", "--config.mesh.data=4")
    (case,) = benchmark_config.cases(benchmark_config.base(found), found)
    assert case.batch == 4
