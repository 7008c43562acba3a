import pytest

from maeast_jax import build_report


@pytest.mark.parametrize(
    ("splits", "train", "evaluation"),
    [
        (["train", "valid"], "farm", "farm"),
        (["test", "train", "valid"], "farm", "farm"),
        (["test", "train"], "farm", "farm@test"),
        (["train"], "farm", None),
        (["dev", "test"], "farm@dev", "farm@test"),
        (["dev", "valid"], "farm@dev", "farm"),
        (["test", "valid"], "farm@test", "farm"),
        (["valid"], "farm@valid", None),
    ],
)
def test_the_next_command_names_splits_that_exist(splits, train, evaluation):
    expected = f"--config.data.train={train}"
    expected += f" --config.data.eval={evaluation}" if evaluation else ""
    assert build_report.sources_of("farm", splits) == expected
