"""Labelled clips: which stand in a step, how they are read, cut and padded."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest

from maeast_jax.data import labelled, writer
from maeast_jax.data.dataset import DataError
from maeast_jax.data.mixture import Clips

pytest.importorskip("tensorflow_datasets")

NAMES = ["bird", "cat", "dog"]


def clips(count, seed, names=NAMES):
    random = np.random.default_rng(seed)
    for index in range(count):
        samples = random.integers(-9000, 9000, 500 + 400 * index).astype(np.int16)
        yield f"{seed}-{index}", samples, names[index % len(names)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    writer.write(
        "animals",
        folder,
        {"train": lambda: clips(11, 0), "valid": lambda: clips(5, 1)},
        label_names=NAMES,
    )
    writer.write(
        "others",
        folder,
        {"train": lambda: clips(4, 2, ["dog", "bird"])},
        label_names=["dog", "bird"],
    )
    writer.write("bare", folder, {"train": lambda: ((i, a, None) for i, a, _ in clips(3, 3))})
    return folder


def open_one(data_dir, text="animals", **options):
    return labelled.open_labelled(text, "train", data_dir, **options)


def all_of(found):
    return list(found.read(np.arange(len(found))))


def wanted(count, seed, names=NAMES):
    return {name: (samples, names.index(label)) for name, samples, label in clips(count, seed)}


def test_clips_are_read_in_the_order_asked_for_with_their_classes(data_dir):
    animals = open_one(data_dir)
    assert (len(animals), animals.class_names, animals.is_multi_label) == (11, tuple(NAMES), False)
    everything = wanted(11, 0)
    order = np.array([7, 0, 10, 3])
    read = list(animals.read(order))
    ids = [clip.id for clip in all_of(animals)]
    assert sorted(ids) == sorted(everything)
    assert [clip.id for clip in read] == [ids[place] for place in order]
    for clip in read:
        samples, label = everything[clip.id]
        np.testing.assert_array_equal(clip.samples, samples)
        assert clip.classes.tolist() == [label]


def test_sets_of_another_numbering_are_renumbered_by_name(data_dir):
    both = open_one(data_dir, "animals,others")
    assert both.class_names == tuple(NAMES) and len(both) == 15
    by_id = {clip.id: clip.classes.tolist() for clip in all_of(both)}
    assert by_id["2-0"] == [2] and by_id["2-1"] == [0]
    tested = open_one(data_dir, "others", class_names=NAMES)
    assert tested.class_names == tuple(NAMES)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("bare", {}, "data set bare/1.0.0 has no feature `label` that is a ClassLabel"),
        ("animals*0.5", {}, "has weights, but every labelled clip counts once"),
        ("animals", {"class_names": ["dog", "cat"]}, "has the class 'bird', which is not among"),
    ],
)
def test_unsuitable_sets_are_refused_in_one_line(data_dir, text, options, message):
    with pytest.raises((DataError, ValueError), match=message):
        open_one(data_dir, text, **options)


class Records(list):
    def read(self, places):
        return [self[place] for place in places]


def test_an_unknown_label_is_an_error_that_names_its_clip(data_dir):
    animals = open_one(data_dir)
    (split,) = animals.clips.splits
    records = Records(map(split.decode, split.records.read(range(len(split)))))
    records[4]["label"] = -1
    decoded = dataclasses.replace(split, records=records, decode=lambda record: record)
    clips = Clips((decoded,), None)
    name = records[4]["id"]
    broken = dataclasses.replace(animals, clips=clips)
    assert len(list(broken.read(np.array([3])))) == 1
    with pytest.raises(DataError, match=rf"clip '{name}' .* has the label -1, .* 0 to 2;"):
        _ = broken.classes


def test_every_epoch_holds_each_clip_once_in_its_own_order():
    index = labelled.train_index(11, 4, seed=3)
    stream = np.concatenate([index(step) for step in range(11)])
    epochs = stream.reshape(4, 11)
    for epoch in epochs:
        assert sorted(epoch) == list(range(11))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = labelled.train_index(11, 4, seed=3)(7)
    np.testing.assert_array_equal(again, stream[28:32])
    assert np.any(labelled.train_index(11, 4, seed=4)(7) != again)


def test_rare_classes_are_drawn_as_often_as_common_ones():
    classes = [np.array([0])] * 5 + [np.array([1]), np.array([1, 2])]
    chances = labelled.rarity(classes, 3)
    np.testing.assert_allclose(chances * 3, [0.2] * 5 + [0.5, 1.5])
    index = labelled.train_index(7, 7, 0, chances)
    drawn = [index(step) for step in range(1000)]
    shares = np.bincount(np.concatenate(drawn), minlength=7) / 7000
    np.testing.assert_allclose(shares, chances, atol=0.02)


def test_clips_without_a_class_are_drawn_as_often_as_those_of_a_class():
    classes = [np.array([], int)] * 4 + [np.array([0]), np.array([0, 1])]
    np.testing.assert_allclose(labelled.rarity(classes, 2) * 3, [0.25] * 4 + [0.5, 1.5])


def looks(labels, pieces=1):
    """A recording per label, each of so many pieces."""
    return [
        labelled.Look(np.array([label]), index, f"recording {index}", 1.0)
        for index, label in enumerate(labels)
        for _ in range(pieces)
    ]


def test_a_share_has_every_class_and_depends_on_the_seed():
    clips = looks([index % 5 for index in range(200)])
    drawn = labelled.draw_share(clips, 10.0, seed=1)
    assert len(drawn) == 20 and len(set(drawn)) == 20
    assert np.bincount([clips[place].classes[0] for place in drawn]).tolist() == [4] * 5
    np.testing.assert_array_equal(drawn, labelled.draw_share(clips, 10.0, seed=1))
    assert np.any(drawn != labelled.draw_share(clips, 10.0, seed=2))
    assert len(labelled.draw_share(clips, 0.1, seed=1)) == 5


def test_a_share_holds_recordings_whole():
    clips = looks([index % 2 for index in range(20)], pieces=3)
    drawn = labelled.draw_share(clips, 20.0, seed=1)
    held_out = {clips[place].recording for place in drawn}
    assert len(drawn) == 12 and len(held_out) == 4
    rest = np.setdiff1d(np.arange(60), drawn)
    assert not held_out & {clips[place].recording for place in rest}


def test_pieces_that_a_build_has_cut_are_one_recording(tmp_path):
    ids = ["a.wav#0000", "a.wav#0001", "b#1.wav"]
    clips = [(name, np.arange(500, dtype=np.int16), "x") for name in ids]
    writer.write("pieces", tmp_path, {"train": lambda: clips}, label_names=["x"])
    opened = labelled.open_labelled("pieces", "train", str(tmp_path))
    found = sorted(look.recording for look in opened.looks)
    assert found == [f"pieces/1.0.0: {name}" for name in ("a.wav", "a.wav", "b#1.wav")]
    assert {look.seconds for look in opened.looks} == {500 / 16_000}


@pytest.mark.parametrize(("percent", "counts"), [(1.0, [0, 1, 1]), (99.0, [0, 1, 9])])
def test_a_held_out_share_leaves_every_class_a_clip(percent, counts):
    clips = looks([0] + [1] * 2 + [2] * 10)
    drawn = labelled.draw_share(clips, percent, seed=1, leave=1)
    drawn_classes = [clips[place].classes[0] for place in drawn]
    assert np.bincount(drawn_classes, minlength=3).tolist() == counts


def batches(data_dir, start=0, stop=1, **options):
    fixed = {"seed": 0, "batch_size": 4, "num_frames": 10, "max_frames": 64, "threads": 2}
    return list(
        labelled.train_batches(
            open_one(data_dir), start_step=start, total_steps=stop, **(fixed | options)
        )
    )


@pytest.mark.parametrize("num_frames", [10, 0])
def test_batches_resume_at_any_step(data_dir, num_frames):
    whole = batches(data_dir, 0, 8, num_frames=num_frames)
    rest = batches(data_dir, 5, 8, num_frames=num_frames)
    assert (len(whole), len(rest)) == (8, 3)
    for a, b in zip(whole[5:], rest, strict=True):
        assert list(a) == list(b) == ["audio", "num_samples", "target"]
        for name, values in a.items():
            np.testing.assert_array_equal(values, b[name])


def test_fixed_lengths_cut_and_pad(data_dir):
    (batch,) = batches(data_dir, batch_size=11)
    assert batch["audio"].shape == (11, 400 + 9 * 160)
    assert sorted(batch["num_samples"]) == [500, 900, 1_300, 1_700, *[400 + 9 * 160] * 7]
    np.testing.assert_array_equal(batch["target"].sum(axis=0), [4, 4, 3])


def test_own_lengths_are_padded_to_few_shapes_and_masked():
    lengths = [120, 500, 2_000, 9_000]
    batch = labelled.pad([np.ones(n, np.int16) for n in lengths], 0, 64, 1)
    assert batch["audio"].shape == (4, 400 + 63 * 160)
    np.testing.assert_array_equal(batch["num_samples"], [400, 500, 2_000, 9_000])
    np.testing.assert_array_equal(batch["audio"].sum(axis=1), lengths)
    shapes = {
        labelled.pad([np.ones(n, np.int16)], 0, 64, 1)["audio"].shape for n in range(1, 10_480, 37)
    }
    assert len(shapes) <= 9
    short = labelled.pad([np.ones(500, np.int16)], 0, 64, 16)  # a token of 16 frames
    assert short["audio"].shape == (1, 400 + 15 * 160)


def test_evaluation_takes_every_clip_once_and_its_middle(data_dir):
    held_out = labelled.open_labelled("animals", "valid", data_dir)
    found = list(labelled.eval_batches(held_out, batch_size=3, num_frames=4, max_frames=64))
    assert [len(real) for _, real in found] == [3, 2]
    assert all(batch["audio"].shape == (3, 880) for batch, _ in found)
    everything = wanted(5, 1)
    seen = {}
    for batch, real in found:
        for row, clip in zip(batch["audio"], real, strict=False):
            seen[clip.id] = row
    assert set(seen) == set(everything)
    samples, _ = everything["1-4"]  # 2,100 samples: the 880 in the middle
    np.testing.assert_array_equal(seen["1-4"], samples[610:1490])
    assert not found[-1][0]["audio"][2].any()


def test_embedded_clips_are_freed(data_dir, monkeypatch):
    """A view of one clip would keep the samples of a whole read in memory."""
    alive = []
    read = labelled.Labelled.read

    class Samples(np.ndarray):
        pass

    def watched(self, places):
        for clip in read(self, places):
            samples = clip.samples.view(Samples)
            alive.append(weakref.ref(samples))
            yield dataclasses.replace(clip, samples=samples)

    def embed(stream):
        for samples in stream:
            yield np.array([samples.size], np.float32)

    monkeypatch.setattr(labelled.Labelled, "read", watched)
    found = open_one(data_dir)
    vectors, truth, ids = labelled.embedded(found, embed)
    gc.collect()
    assert len(vectors) == len(truth) == len(ids) == len(found) == len(alive)
    assert not [reference for reference in alive if reference() is not None]


def test_classes_are_read_without_the_samples(data_dir, monkeypatch):
    found = open_one(data_dir)
    wanted = [clip.classes for clip in all_of(found)]
    monkeypatch.setattr(labelled.pipeline, "samples_of", None)
    np.testing.assert_array_equal(found.classes, wanted)
    np.testing.assert_array_equal(found.truth, np.concatenate(wanted))
    # A subset, and the whole again, read no record that was read before.
    monkeypatch.setattr(labelled.Clips, "read", None)
    np.testing.assert_array_equal(found.subset(np.array([7, 2])).truth, found.truth[[2, 7]])


def test_a_clip_that_is_constant_or_shorter_than_a_frame_holds_no_sound(tmp_path):
    lengths = {"long": 400, "short": 399, "constant": 9_000}

    def examples():
        for name, length in lengths.items():
            yield name, np.arange(length, dtype=np.int16) * (name != "constant") + 5, "dog"

    writer.write("three", tmp_path, {"train": examples}, label_names=NAMES)
    found = open_one(tmp_path, "three")
    ids = [clip.id for clip in all_of(found)]
    assert dict(zip(ids, found.has_sound, strict=True)) == {
        "long": True, "short": False, "constant": False
    }  # fmt: skip
    (split,) = found.clips.splits
    slow = dataclasses.replace(split, sample_rate_hz=8_000)  # 399 samples are 50 ms
    slow = dataclasses.replace(found, clips=Clips((slow,), None), known={})
    assert np.count_nonzero(slow.has_sound) == 2
