"""Sets of labelled clips that have no score, and what makes a score worth less than it seems."""

import numpy as np
import pytest
from recordings import TONES, tones

from maeast_jax.data import labelled, writer
from maeast_jax.evaluation import checks

pytest.importorskip("tensorflow_datasets")


def of(samples, count=6):
    return lambda: ((str(i), np.full(samples, i, np.int16), TONES[i % 3]) for i in range(count))


def only(*names, count=12, seed=0):
    return lambda: (clip for clip in tones(count, seed) if clip[2] in names)


def several(clips, *names):
    """The same clips with any number of labels: none where the label is not among `names`."""
    return lambda: ((i, samples, {label} & set(names)) for i, samples, label in clips())


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    splits = {
        "train": only(*TONES),
        "valid": only(*TONES, count=6, seed=1),
        "high": only("high", seed=2),
        "pair": only("high", "low", seed=3),
        "silent": of(8_000),
        "short": of(399),
        "mixed": lambda: (*of(399)(), *tones(12, 0)),
    }
    writer.write("tones", folder, splits, label_names=TONES)
    splits = {
        "train": several(only(*TONES), *TONES),
        "nothing": several(only(*TONES, seed=4)),
        "high": several(only("high", seed=5), "high"),
        "some": several(only(*TONES, seed=6), "high"),
    }
    writer.write("several", folder, splits, label_names=TONES, multi_label=True)
    return folder


def check(data_dir, train, valid, *tests):
    train, valid, *tests = (
        labelled.open_labelled(text, "train", data_dir) for text in (train, valid, *tests)
    )
    return checks.check(train, valid, tests)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            ("tones@high", "tones@valid"),
            "all 4 training clips of 'tones@high' have the class 'high', so there is nothing to "
            "tell apart: add clips of another class",
        ),
        (
            ("several@high", "several"),
            "all 4 training clips of 'several@high' have the class 'high', so there is nothing to "
            "tell apart: add clips of another class",
        ),
        (
            ("tones@silent", "tones@valid"),
            "none of the 6 training clips of 'tones@silent' holds 25 ms of sound: name another "
            "set, or build it again from recordings that do",
        ),
        (("tones", "tones@short"), "none of the 6 validation clips of 'tones@short' holds 25 ms"),
        (
            ("several", "several@nothing"),
            "none of the 12 validation clips of 'several@nothing' has a class: name another set, "
            "or build it again with labels",
        ),
        (
            ("several", "several@some", "several@nothing"),
            "none of the 12 test clips of 'several@no",
        ),
        (
            ("several@nothing", "several"),
            "none of the 12 training clips of 'several@nothing' has a ",
        ),
    ],
)
def test_sets_without_a_score_are_refused_by_their_name(data_dir, texts, message):
    with pytest.raises(ValueError, match=message):
        check(data_dir, *texts)


def test_missing_classes_and_clips_without_sound_are_a_line_each(data_dir):
    assert check(data_dir, "tones", "tones@valid", "tones@valid") == [
        "6 of the 6 test clips of 'tones@valid' are validation clips too, on which settings are "
        "chosen: for a fair score name other clips",
    ]
    assert check(data_dir, "tones@pair", "tones@valid", "tones@high") == [
        "classes without a training clip in 'tones@pair': 1 of 3 (noise)",
        "classes without a test clip in 'tones@high': 2 of 3 (low, noise)",
    ]
    assert check(data_dir, "several@some", "several", "several@high") == [
        "classes without a training clip in 'several@some': 2 of 3 (low, noise)",
        "classes without a test clip in 'several@high': 2 of 3 (low, noise)",
    ]
    assert check(data_dir, "tones@mixed", "tones@valid") == [
        "training clips of 'tones@mixed' without 25 ms of sound: 6 of 18"
    ]


def test_clips_that_are_used_twice_are_counted(data_dir):
    def twice(*texts):
        return [line for line in check(data_dir, *texts) if "clips too" in line]

    assert twice("tones", "tones@train[:50%]", "tones@train[3:8]+valid") == [
        "6 of the 6 validation clips of 'tones@train[:50%]' are training clips too, which the "
        "model has learnt: for a fair score name other clips",
        "5 of the 11 test clips of 'tones@train[3:8]+valid' are training clips too, which the "
        "model has learnt: for a fair score name other clips",
        "3 of the 11 test clips of 'tones@train[3:8]+valid' are validation clips too, on which "
        "settings are chosen: for a fair score name other clips",
    ]
    assert twice("tones@train[:80%]", "tones@train[80%:90%]", "tones@train[90%:]") == []


def test_a_recording_that_was_copied_under_another_name_is_counted(data_dir):
    def copies():
        return (("copy-" + i, samples, label) for i, samples, label in tones(12, 0))

    writer.write("copies", data_dir, {"train": copies}, label_names=TONES)
    train = labelled.open_labelled("tones@mixed", "train", data_dir)
    copied = labelled.open_labelled("copies,tones@short,tones@valid", "train", data_dir)
    assert copied.count_shared(train) == train.count_shared(copied) == 12


def test_held_out_clips_that_are_scored_in_part_are_counted(data_dir):
    train, valid = (labelled.open_labelled(f"tones@{s}", s, data_dir) for s in ("train", "valid"))
    seconds = sorted(look.seconds for look in valid.looks)
    (line,) = checks.check(train, valid, longest_seconds=seconds[2])
    assert line == (
        f"3 of the 6 validation clips of 'tones@valid' are longer than {seconds[2]:g} s, and only "
        "their middle is scored: raise max_frames"
    )
