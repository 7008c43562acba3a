import importlib.util
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from maeast_jax.data import Recording
from maeast_jax.ingest import layouts, report
from maeast_jax.ingest.report import Tally
from maeast_jax.ingest.sources import AudioFile, Listing

REPOSITORY = Path(report.__file__).parents[2]


def next_steps(label, splits, layout=None, name="farm"):
    files = [AudioFile("a", "a", label), AudioFile("b", "b", label and label[:1])]
    return report.next_steps(name, Path("my data"), splits, Listing.of(files), layout)


@pytest.mark.parametrize(
    ("splits", "pretrain", "finetune"),
    [
        (["train", "valid"], "train=farm eval=farm", "train=farm valid=farm"),
        (["test", "train"], "train=farm eval=farm@test", "train=farm test=farm@test"),
        (
            ["test", "train", "valid"],
            "train=farm eval=farm",
            "train=farm valid=farm test=farm@test",
        ),
        (["dev"], "train=farm@dev", "train=farm@dev"),
        (["test", "valid"], "train=farm@test eval=farm", "train=farm@test valid=farm"),
        (["valid"], "train=farm@valid", "train=farm@valid"),
    ],
)
def test_the_next_commands_name_splits_that_exist(splits, pretrain, finetune):
    first, train_command, second, finetune_command = next_steps("cow", splits).split("\n")
    assert (first, second) == ("next:", "or, to fine-tune a checkpoint CKPT on its labels:")
    prefix = " --config.data."
    assert train_command == (
        "  python -m maeast_jax.train --config=configs/pretrain_small.py --workdir=runs/farm"
        f"{prefix}dir='my data'" + "".join(prefix + term for term in pretrain.split())
    )
    assert finetune_command == (
        "  python -m maeast_jax.finetune --config=configs/finetune_folder.py"
        f" --workdir=runs/farm_labels --config.init_from=CKPT{prefix}dir='my data'"
        + "".join(prefix + term for term in finetune.split())
    )


def test_sets_without_two_classes_are_not_fine_tuned():
    for label in (None, "c"):  # none, or one class
        assert "finetune" not in next_steps(label, ["train"])
    assert "finetune" in next_steps(("cow",), ["train"])  # any clip may be of the class, or not


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_a_layout_is_fine_tuned_by_its_own_configuration(layout):
    first, second, finetune = next_steps("cow", ["a", "b"], layout, layout).split("\n")
    assert first == "its splits: a, b"
    assert second == "next, to fine-tune a checkpoint CKPT on it:"
    file = re.search(r"--config=(\S+)", finetune)[1]
    spec = importlib.util.spec_from_file_location("layout_config", REPOSITORY / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"--layout={layout}" in module.__doc__
    assert module.get_config().data.train.partition("@")[0] == layout
    # The configuration opens the data set by the layout's name.
    assert next_steps("cow", ["a", "b"], layout, "other") == "its splits: a, b"


def test_what_a_file_holds_beside_its_clips_is_remarked(tmp_path):
    tally = Tally()
    for name, seconds, listed in [("cut", 10.9, 10), ("video", 60, 10), ("other", 60, None)]:
        file = AudioFile(name, name, (), "train", listed_seconds=listed)
        samples = np.arange(round(seconds * 16_000)).astype(np.int16)
        tally.add(file, Recording(samples), [(name, samples, ())])
    samples = np.arange(round(30.9 * 16_000)).astype(np.int16)
    tally.add(
        AudioFile("tail", "tail"), Recording(samples), [("tail#0000", samples[:480_000], None)]
    )
    assert tally.remarks == [
        ("video", "longer than the list says: 10 of 60.00 s are its clip"),
        ("tail", "last piece too short: 0.90 s left out"),
    ]


def test_tallies_of_parts_add_up_also_when_pickled():
    files = [AudioFile(name, name, None, split) for name, split in
             [("a", "train"), ("b", "train"), ("c", "train"), ("d", "valid")]]  # fmt: skip
    samples = np.arange(48_000, dtype=np.int16)
    silence = np.full(48_000, 3, np.int16)
    whole, first, second = Tally(), Tally(), Tally()
    for tally, file, decoded, lengths in (
        (first, files[0], Recording(samples, ("loud: 3", "odd")), [32_000, 16_000]),
        (second, files[1], Recording(samples[:100]), []),
        (first, files[2], "not found", []),
        (second, files[3], Recording(silence), [48_000]),
    ):
        clips = [(str(number), decoded.samples[:number], None) for number in lengths]
        tally.add(file, decoded, clips)
        whole.add(file, decoded, clips)
    assert whole.files == {"train": 3, "valid": 1}
    assert whole.clips == {"train": 2, "valid": 1}
    assert whole.samples == {"train": 48_000, "valid": 48_000}
    assert whole.unreadable == [("c", "not found")]
    assert whole.too_short == [("b", "0.01 s, shorter than --min_seconds")]
    assert whole.remarks == [("a", "loud: 3"), ("a", "odd"), ("48000", "no sound")]
    second.merge(pickle.loads(pickle.dumps(first)))
    assert sorted(second.remarks) == sorted(whole.remarks)
    second.remarks = whole.remarks
    assert second == whole
