import importlib.util
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from maeast_jax.ingest import layouts, report
from maeast_jax.ingest.report import Tally
from maeast_jax.ingest.sources import AudioFile, Listing

CONFIGS = Path(report.__file__).parents[2] / "configs"


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
    assert report.sources_of("farm", splits) == expected


def fields(command):
    """Returns {field of data: its value} from a fine-tuning command."""
    return {
        match[1]: match[2]
        for match in re.finditer(r"--config\.data\.(?!dir)(\w+)=([^ ']+)", command or "")
    }


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (["train", "valid"], {"train": "farm", "valid": "farm"}),
        (["test", "train", "valid"], {"train": "farm", "valid": "farm", "test": "farm@test"}),
        (["train"], {"train": "farm"}),
        (["dev", "test"], {"train": "farm@dev", "test": "farm@test"}),
        (["valid"], {"train": "farm@valid"}),
        (["test", "valid"], {"train": "farm@test", "valid": "farm"}),
    ],
)
def test_the_fine_tuning_command_names_splits_that_exist(splits, expected):
    command = report.finetune_command("farm", Path("my data"), splits)
    assert fields(command) == expected
    assert command.startswith(
        "python -m maeast_jax.finetune --config=configs/finetune_folder.py"
        " --workdir=runs/farm_labels --config.init_from=CKPT --config.data.dir='my data' "
    )


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_a_layout_is_fine_tuned_by_its_own_configuration(layout):
    file, needed, _ = report._FINETUNE[layout]
    spec = importlib.util.spec_from_file_location("layout_config", CONFIGS / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data = module.get_config().data
    assert f"--layout={layout}" in module.__doc__
    terms = {name: data[name] for name in ("train", "valid", "test") if data[name]}
    named = {"train"} if not data.folds else set(data.folds.split("+"))
    named |= set(re.findall(r"@(\w+)", " ".join(terms.values())))
    assert named == set(needed)

    splits = [*needed, "unbalanced"]
    assert fields(report.finetune_command(layout, Path("data"), splits, layout)) == {}
    command = report.finetune_command("other", Path("data"), splits, layout)
    assert f"--config=configs/{file} " in command
    assert fields(command) == {name: term.replace(layout, "other") for name, term in terms.items()}
    # Without one of its splits it is not the result of the paper.
    assert report.finetune_command(layout, Path("data"), splits[1:], layout) is None


def next_steps(label, splits, layout=None):
    files = [AudioFile("a", "a", label), AudioFile("b", "b", label and label[:1])]
    return report.next_steps("farm", Path("data"), splits, Listing.of(files), layout)


def test_what_comes_next_depends_on_the_labels():
    splits = ["train", "valid"]
    for label in (None, "c"):  # none, or one class
        assert "finetune" not in next_steps(label, splits)
    for label in ("cow", ("cow", "crow"), ("cow",)):
        first, pretrain, second, finetune = next_steps(label, splits).split("\n")
        assert (first, second) == ("next:", "or, to fine-tune a checkpoint CKPT on its labels:")
        assert pretrain.startswith("  python -m maeast_jax.train ")
        assert finetune.startswith("  python -m maeast_jax.finetune ")


def test_layouts_are_not_pretrained_on():
    folds = [f"fold{number}" for number in range(1, 6)]
    first, second, finetune = next_steps("cow", folds, "esc50").split("\n")
    assert first == "its splits: fold1, fold2, fold3, fold4, fold5"
    assert second == "next, to fine-tune a checkpoint CKPT on it:"
    assert finetune.startswith("  python -m maeast_jax.finetune --config=configs/finetune_esc50.py")
    assert next_steps("cow", folds[1:], "esc50") == "its splits: fold2, fold3, fold4, fold5"


def test_tallies_of_parts_add_up_also_when_pickled():
    files = [AudioFile(name, name, None, split) for name, split in
             [("a", "train"), ("b", "train"), ("c", "train"), ("d", "valid")]]  # fmt: skip
    samples = np.zeros(48_000, np.int16)
    whole, first, second = Tally(), Tally(), Tally()
    for tally, file, decoded, lengths in (
        (first, files[0], samples, [32_000, 16_000]),
        (second, files[1], samples[:100], []),
        (first, files[2], "not found", []),
        (second, files[3], samples, [48_000]),
    ):
        clips = [(str(number), samples[:number], None) for number in lengths]
        tally.add(file, decoded, clips)
        whole.add(file, decoded, clips)
    assert whole.files == {"train": 3, "valid": 1}
    assert whole.clips == {"train": 2, "valid": 1}
    assert whole.samples == {"train": 48_000, "valid": 48_000}
    assert whole.unreadable == [("c", "not found")]
    assert whole.too_short == [("b", "0.01 s, shorter than --min_seconds")]
    second.merge(pickle.loads(pickle.dumps(first)))
    assert second == whole
