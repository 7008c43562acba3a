"""Classifiers loaded from runs, against the model on each window alone; and what is refused."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import tiny

import maeast_jax
from maeast_jax import checkpoint, fbank
from maeast_jax.evaluation import probe
from maeast_jax.export import export
from maeast_jax.inference import (
    Embedder,
    EncoderFeatures,
    batching,
    classifier,
    features,
    load_classifier,
    pretrained,
)

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["bell", "drum", "whistle"]
# The run takes 64 frames whole, 4 steps of 16. Samples: one frame, less than a step, one sample
# less than two steps, a window, a window and most of a step, and several windows.
LENGTHS = [400, 2_000, 5_359, 10_480, 13_000, 40_000]


def clips():
    """Noise of several levels and colours, so that clips differ in class."""
    for seed, length in enumerate(LENGTHS):
        random = np.random.default_rng(seed)
        samples = random.normal(0, 500 * (seed + 1), length)
        yield np.convolve(samples, np.ones(seed + 1), "same").astype(np.int16)


def parts_of(samples, window_frames=64, stride_frames=64):
    """The clip's windows by the rule itself: (samples, steps that it is nearest to, seconds)."""
    steps = max(1, fbank.num_frames(len(samples)) // 16)
    last = 16 * steps - window_frames
    starts = [0] if last <= 0 else [*range(0, last, stride_frames), last]
    length = min(window_frames, 16 * steps)
    middles = np.array(starts) / 16 + (length / 16 - 1) / 2
    nearest = [int(np.argmin(np.abs(middles - step))) for step in range(steps)]
    for number, start in enumerate(starts):
        stop = len(samples) if start == starts[-1] else 160 * start + fbank.num_samples(length)
        end = len(samples) / 16_000 if start == starts[-1] else (start + length) / 100
        yield samples[160 * start : stop], nearest.count(number), (start / 100, end)


def assert_is_mean_of_windows(prediction, samples, wanted, *window):
    weights, seconds = zip(*((count, times) for _, count, times in parts_of(samples, *window)),
                           strict=True)  # fmt: skip
    np.testing.assert_allclose(prediction.of_windows, wanted, atol=2e-6)
    np.testing.assert_allclose(prediction.seconds, seconds, atol=1e-9)
    mean = np.average(wanted, axis=0, weights=weights)
    np.testing.assert_allclose(prediction.probabilities, mean, atol=2e-6)
    assert prediction.probabilities.dtype == np.float32


def alone(module, samples, loss):
    run = jax.jit(lambda *inputs: module.probabilities(*inputs, loss))
    return np.asarray(run(samples[None], np.array([fbank.num_frames(len(samples))])))[0]


@pytest.mark.parametrize(
    ("loss", "head", "is_multi_label"),
    [
        ("cross_entropy", {"layer": "-2", "pool": "mean"}, False),
        # A run on clips with several labels trains with binary cross-entropy whatever is set.
        ("cross_entropy", {"kind": "superb", "layer": "weighted"}, True),
        ("binary_cross_entropy", {}, False),
    ],
)
def test_windows_are_scored_as_the_model_scores_them_alone(tmp_path, loss, head, is_multi_label):
    module = runs.write_classifier(
        tmp_path / "run", NAMES, loss=loss, head=head, is_multi_label=is_multi_label
    )
    model = load_classifier(tmp_path / "run")
    assert model.class_names == tuple(NAMES) and model.is_multi_label == is_multi_label
    assert (model.window_seconds, model.stride_seconds, model.notes) == (0.64, 0.64, ())
    found = list(model(clips()))
    loss = "binary_cross_entropy" if is_multi_label else loss
    for samples, prediction in zip(clips(), found, strict=True):
        wanted = [alone(module, part[:10_480], loss) for part, *_ in parts_of(samples)]
        assert_is_mean_of_windows(prediction, samples, wanted)
    sums = np.sum([prediction.probabilities for prediction in found], axis=1)
    assert np.allclose(sums, 1, atol=1e-5) == (loss == "cross_entropy")
    assert np.std([prediction.probabilities for prediction in found], axis=0).max() > 0.02


def test_a_batch_of_waveforms_gives_each_clips_own_probabilities(tmp_path):
    runs.write_classifier(tmp_path / "run", NAMES)
    model = maeast_jax.load_classifier(tmp_path / "run")
    waveforms = np.random.default_rng(0).integers(-9000, 9000, (6, 40_000)).astype(np.int16)
    for row, clip in zip(waveforms, clips(), strict=True):
        row[: len(clip)] = clip  # noise past a clip's length
    found = model.predict(waveforms, LENGTHS)
    assert found.dtype == np.float32 and found.shape == (6, 3)
    for row, clip in zip(found, clips(), strict=True):
        np.testing.assert_allclose(model.predict(clip[None])[0], row, atol=2e-6)
        np.testing.assert_array_equal(
            model.predict(clip[None] / np.float32(32_768)), model.predict(clip[None])
        )
    assert model.predict(waveforms[:0]).shape == (0, 3)


def test_a_folder_for_transformers_labels_as_the_run_it_was_made_of(tmp_path):
    for name, changes in (("one", {}), ("several", {"is_multi_label": True})):
        runs.write_classifier(tmp_path / name, NAMES, head={"kind": "superb"}, **changes)
        export(tmp_path / name, tmp_path / f"{name}-exported")
        model, exported = map(load_classifier, (tmp_path / name, tmp_path / f"{name}-exported"))
        assert exported.class_names == model.class_names and exported.notes == ()
        assert exported.is_multi_label == model.is_multi_label == (name == "several")
        assert exported.window_seconds == model.window_seconds
        waveforms = np.stack([np.resize(clip, 20_000) for clip in clips()])
        np.testing.assert_array_equal(exported.predict(waveforms), model.predict(waveforms))


def test_windows_may_be_longer_overlap_or_never_be_cut(tmp_path):
    module = runs.write_classifier(tmp_path / "run", NAMES)
    *_, samples = clips()
    for options, window in (
        ({"window_seconds": 0.99, "stride_seconds": 0.33}, (96, 32)),
        ({"window_seconds": 0}, (10_000, 1)),
    ):
        model = load_classifier(tmp_path / "run", batch_tokens=64, **options)
        (prediction,) = model([samples])
        wanted = [
            alone(module, part[: fbank.num_samples(min(window[0], 240))], "cross_entropy")
            for part, *_ in parts_of(samples, *window)
        ]
        assert_is_mean_of_windows(prediction, samples, wanted, *window)
    assert (model.window_seconds, model.stride_seconds) == (0, 0)


# --- probes -----------------------------------------------------------------------------------


def encoder_features(path=GOLDEN / "tiny_patch.pt", **changes):
    """Features of a checkpoint, or of an encoder at its initial values if `path` is None."""
    source = pretrained.read(path).encoder_only() if path else None
    fields = {
        "checkpoint": str(path or ""), "stamp": source.stamp if source else "", "seed": 3,
        "model": source.config if source else tiny.model_config(**tiny.get_config().model),
        "normalize": None if source else (-6.0, 4.0), "pool": "moments", "layer": 1, "phases": 4,
        "window_frames": 32,
    }  # fmt: skip
    return EncoderFeatures(**fields | changes), source


def fitted(extract, kind="linear", several=False):
    """A probe on features of parts of the clips; D is then the extractor's."""
    vectors = np.stack(list(extract(samples[:5_000] for samples in clips())))
    random = np.random.default_rng(0)
    labels = np.arange(60) % 6 % 3
    x = np.tile(vectors, (10, 1))
    x = x + 0.5 * random.normal(size=x.shape) * vectors.std(axis=0)
    y = np.eye(3, dtype=int)[labels] | np.eye(3, dtype=int)[labels[::-1]] if several else labels
    options = {"components": [8]} if kind == "knn" and several else {}
    return getattr(probe, kind)(x, y, x, y, 3, **options).fitted


def write_probe(folder, fitted, of, is_multi_label=False):
    classifier.write_probe(
        folder, fitted, of, class_names=NAMES, is_multi_label=is_multi_label, longest_seconds=0.485
    )
    return folder


@pytest.mark.parametrize(
    ("kind", "several", "source"),
    [("linear", True, "checkpoint"), ("knn", True, "initial"), ("linear", False, "fbank"),
     ("knn", False, "fbank")],
)  # fmt: skip
def test_a_probe_scores_the_features_of_each_window(tmp_path, kind, several, source):
    if source == "fbank":
        of, extract = None, features.fbank_moments
    else:
        of, start = encoder_features(*([] if source == "checkpoint" else [None]))
        extract = of.extractor(start)
        assert isinstance(extract, Embedder)
    fit = fitted(extract, kind, several)
    model = load_classifier(write_probe(tmp_path / "run", fit, of, several))
    assert (
        model.longest_seconds == 0.485
        and model.is_multi_label == several
        and model.class_names == tuple(NAMES)
    )
    # The longest training clip fills less than 49 frames: 4 whole steps of 16, or 49 of 1.
    if of:
        assert (model.window_seconds, model.stride_seconds) == (0.64, 0.64)
    else:
        assert model.window_seconds == 0.49
    for samples, prediction in zip(clips(), model(clips()), strict=True):
        if of:
            vectors = np.stack(list(extract(part for part, *_ in parts_of(samples))))
            assert_is_mean_of_windows(prediction, samples, fit.scores(vectors))
        elif len(samples) < fbank.num_samples(49):
            (vector,) = extract([samples])
            np.testing.assert_array_equal(prediction.of_windows, fit.scores(vector[None]))
    assert np.std([p.probabilities for p in model(clips())], axis=0).min() > 0.01


def test_a_window_is_at_least_the_encoders_own(tmp_path):
    of, start = encoder_features(window_frames=1_024)
    model = load_classifier(write_probe(tmp_path / "run", fitted(of.extractor(start)), of))
    assert model.window_seconds == 10.24


def test_a_saved_probe_scores_bit_for_bit(tmp_path):
    x = np.random.default_rng(1).normal(size=(40, 256))
    for kind in ("linear", "knn"):
        for several in (False, True):
            fit = fitted(features.fbank_moments, kind, several)
            again = type(fit).from_arrays(fit.arrays(), 3, several)
            np.testing.assert_array_equal(again.scores(x), fit.scores(x))


# --- what is refused --------------------------------------------------------------------------


def refusal(path):
    with pytest.raises(checkpoint.CheckpointError) as caught:
        load_classifier(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_without_classes_names_the_remedy(tmp_path):
    run = runs.write(tmp_path / "run")
    assert "run is a pretraining run, without classes; fine-tune it first: " in refusal(run)
    assert f"maeast_jax.finetune --config=configs/finetune_folder.py --config.init_from={run}" in (
        refusal(run)
    )
    message = refusal(GOLDEN / "tiny_patch.pt")
    assert "tiny_patch.pt is an encoder without classes; fine-tune it first: " in message
    assert "gone does not exist" in refusal(tmp_path / "gone")


def test_checkpoints_of_earlier_versions(tmp_path):
    runs.write_classifier(tmp_path / "unnamed", NAMES, class_names=None)
    message = refusal(tmp_path / "unnamed")
    assert "saved by an earlier version of this program, which did not keep the names" in message
    for loss, is_multi_label, said in (
        ("cross_entropy", False, "one label, because its loss is cross_entropy"),
        ("binary_cross_entropy", True, "several labels, because its loss is binary_cross_entropy"),
    ):
        runs.write_classifier(tmp_path / loss, NAMES, loss=loss, is_multi_label=None)
        model = load_classifier(tmp_path / loss)
        assert model.is_multi_label == is_multi_label
        (note,) = model.notes
        assert model.longest_seconds is None
        assert said in note


def test_the_encoder_of_a_probe_must_be_there_and_the_same(tmp_path):
    path = tmp_path / "encoder"
    runs.write(path)
    of, _ = encoder_features(str(checkpoint.find(path)))
    size = of.extractor(pretrained.read(path)).embedding_size
    x = np.random.default_rng(0).normal(size=(9, size))
    labels = np.arange(9) % 3
    write_probe(tmp_path / "run", probe.linear(x, labels, x, labels, 3).fitted, of)
    load_classifier(tmp_path / "run")
    shutil.rmtree(path)
    message = refusal(tmp_path / "run")
    assert f"probe.npz needs the encoder {path}/checkpoints/0, which cannot be read (" in message
    assert "put it back, or fit again on another one" in message
    runs.write(path, seed=1)
    assert "was fitted on another encoder than" in refusal(tmp_path / "run")


def test_a_workdir_without_its_own_classifier(tmp_path):
    checkpoint.write_config(tmp_path, {"mode": "knn"})
    assert "is a run of mode knn without probe.npz: it did not end, or an earlier version" in (
        refusal(tmp_path)
    )
    checkpoint.write_config(tmp_path, {"mode": "linear", "data": {"folds": "a+b"}})
    message = refusal(f"{tmp_path}/")
    assert message == (
        f"{tmp_path}/ holds a classifier per fold; name one of {tmp_path}/a, {tmp_path}/b"
    )
    load_classifier(write_probe(tmp_path / "a", fitted(features.fbank_moments), None))


@pytest.mark.parametrize("damage", ["cut", "empty", "field", "kind"])
def test_a_damaged_probe_is_one_line(tmp_path, damage):
    file = write_probe(tmp_path, fitted(features.fbank_moments), None) / "probe.npz"
    content = file.read_bytes()
    if damage in ("cut", "empty"):
        file.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    else:
        with np.load(file) as saved:
            arrays = dict(saved)
        about = json.loads(str(arrays["about"])) | {"kind": "forest"}
        if damage == "kind":
            arrays["about"] = np.array(json.dumps(about))
        else:
            del arrays["weights"]
        np.savez(file, **arrays)
    assert "probe.npz is damaged, or another version of this program wrote it" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("waveforms", "lengths", "message"),
    [
        (np.zeros(16_000), None, r"waveforms are \(16000,\), expected \[clips, samples\]"),
        (np.zeros((2, 800)), [800], r"lengths are \(1,\), expected one per clip, 2"),
        (np.zeros((1, 800)), [399], "a length of 399 samples, expected 400"),
        (np.zeros((1, 800)), [801], r"to 800, those of the waveforms"),
        (np.zeros((1, 399)), None, "a length of 399 samples"),
        (np.full((2, 800), 9e3), None, "clip 0: .* integers stored as floats"),
    ],
)
def test_waveforms_that_are_none_are_refused(tmp_path_factory, waveforms, lengths, message):
    folder = write_probe(tmp_path_factory.mktemp("run"), fitted(features.fbank_moments), None)
    with pytest.raises(ValueError, match=message):
        load_classifier(folder).predict(waveforms, lengths)


def test_windows_shorter_than_a_token_are_refused(tmp_path):
    runs.write_classifier(tmp_path / "run", NAMES)
    with pytest.raises(ValueError, match=r"^window_seconds=0.1 must be at least 0.16, the length"):
        load_classifier(tmp_path / "run", window_seconds=0.1)
    with pytest.raises(ValueError, match="and the stride at most the window"):
        load_classifier(tmp_path / "run", window_seconds=0.32, stride_seconds=0.64)
    assert batching.whole_tokens("x", None, 16) is None
