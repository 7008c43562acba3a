"""Batches: exact, resumable, the same for any number of processes, every held-out clip once."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tiny

from maeast_jax import fbank
from maeast_jax.data import dataset, demo_corpus, pipeline, writer
from maeast_jax.data.mixture import Clips

FRAMES = 16
SAMPLES = fbank.num_samples(FRAMES)


def data_config(**changes):
    return pipeline.DataConfig(**tiny.section("data", **changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`ramps`: clip i's sample j is 100 i + j % 100, so that a window shows its clip and place."""
    path = tmp_path_factory.mktemp("data")

    def ramps(first, count):
        for index in range(first, first + count):
            length = 1_000 if index % 2 else SAMPLES + 500
            yield f"r{index}", (100 * index + np.arange(length) % 100).astype(np.int16), None

    writer.write("ramps", path, {"train": lambda: ramps(0, 13), "valid": lambda: ramps(13, 5)})
    return path


def config(folder, **fields):
    return data_config(dir=str(folder), train="ramps", eval="ramps", threads=2, **fields)


SHARES = np.arange(4).reshape(2, 2)  # the rows of each of two processes


def train(folder, start=0, stop=10, rows=None, seed=0, **fields):
    settings = config(folder, **fields)
    stream = pipeline.train_batches(
        settings, pipeline.open_train(settings), seed=seed, batch_size=4, num_frames=FRAMES,
        start_step=start, total_steps=stop, rows=rows,
    )  # fmt: skip
    return list(stream)


def evaluate(folder, rows=None, **fields):
    settings = config(folder, **fields)
    clips = pipeline.open_eval(settings)
    return list(
        pipeline.eval_batches(settings, clips, seed=0, batch_size=4, num_frames=FRAMES, rows=rows)
    )


def origins(batch):
    return (batch["audio"] // 100).min(axis=1).tolist()


def test_batches_are_int16_of_one_shape_and_an_epoch_has_each_clip_once(folder):
    batches = train(folder, stop=13)
    assert all(b["audio"].shape == (4, SAMPLES) and b["audio"].dtype == np.int16 for b in batches)
    seen = [origin for batch in batches for origin in origins(batch)]
    assert [sorted(seen[13 * e : 13 * (e + 1)]) for e in range(4)] == [list(range(13))] * 4


def test_any_start_continues_the_same_stream_bit_for_bit(folder):
    whole = train(folder)
    for got, wanted in zip(train(folder, start=7), whole[7:], strict=True):
        np.testing.assert_array_equal(got["audio"], wanted["audio"])
    far = train(folder, start=10_000_000, stop=10_000_001)
    assert far[0]["audio"].shape == (4, SAMPLES)


def test_global_batches_are_the_same_for_any_number_of_processes(folder):
    whole = train(folder)
    parts = [train(folder, rows=rows) for rows in SHARES]
    for step, batch in enumerate(whole):
        rows = np.concatenate([part[step]["audio"] for part in parts])
        np.testing.assert_array_equal(rows, batch["audio"])


def test_seeds_change_order_and_crop(folder):
    first, other = train(folder, stop=1), train(folder, stop=1, seed=1)
    assert origins(first[0]) != origins(other[0])


def test_crops_are_windows_and_short_clips_go_round(folder):
    starts = {}
    for batch in train(folder, stop=130):
        for origin, window in zip(origins(batch), batch["audio"], strict=True):
            # Both lengths are whole hundreds, so the ramp goes on across the joint.
            phase = window[0] - 100 * origin
            np.testing.assert_array_equal(window, 100 * origin + (phase + np.arange(SAMPLES)) % 100)
            starts.setdefault(origin, set()).add(int(phase))
    assert all(len(found) > 15 for found in starts.values()), "crops hardly move"


def test_evaluation_counts_every_clip_once_and_is_the_same_each_time(folder):
    batches = evaluate(folder)
    assert [b["mask"].tolist() for b in batches] == [[True] * 4, [True, False, False, False]]
    seen = [o for b in batches for o, real in zip(origins(b), b["mask"], strict=True) if real]
    assert sorted(seen) == [13, 14, 15, 16, 17]
    assert not batches[-1]["audio"][1:].any()
    for got, wanted in zip(evaluate(folder), batches, strict=True):
        np.testing.assert_array_equal(got["audio"], wanted["audio"])


def test_evaluation_on_two_processes_has_full_batches_on_both(folder):
    whole = evaluate(folder)
    parts = [evaluate(folder, rows=rows) for rows in SHARES]
    for step, batch in enumerate(whole):
        for name in ("audio", "mask"):
            np.testing.assert_array_equal(
                np.concatenate([part[step][name] for part in parts]), batch[name]
            )


def test_evaluation_of_a_few_clips_spreads_them_over_all_sets(folder):
    settings = data_config(dir=str(folder), train="ramps", eval="ramps@train,ramps@valid")
    clips = pipeline.open_eval(settings)
    (batch,) = pipeline.eval_batches(
        settings, clips, seed=0, batch_size=12, num_frames=FRAMES, max_clips=9
    )
    assert batch["mask"].sum() == pipeline.eval_count(clips, 9) == 9
    held_out = [o >= 13 for o in origins(batch)[:9]]
    assert len(set(origins(batch)[:9])) == 9 and 2 <= sum(held_out) <= 3


def test_weights_have_no_place_in_evaluation(folder):
    with pytest.raises(ValueError, match="has weights, but every clip counts once"):
        pipeline.open_eval(data_config(dir=str(folder), eval="ramps@train*0.5,ramps@valid*0.5"))


def test_host_fbank_is_the_devices(folder):
    audio = train(folder, stop=1)[0]["audio"]
    host = train(folder, stop=1, fbank="host")[0]
    assert set(host) == {"fbank"}
    np.testing.assert_allclose(host["fbank"], fbank.fbank(audio), atol=1e-4)
    parts = [train(folder, stop=1, rows=rows, fbank="host")[0] for rows in SHARES]
    np.testing.assert_array_equal(np.concatenate([p["fbank"] for p in parts]), host["fbank"])
    held_out = evaluate(folder, fbank="host")
    assert [set(batch) for batch in held_out] == [{"fbank", "mask"}] * 2


def test_synthetic_noise_is_a_function_of_seed_and_position():
    settings = data_config(source="synthetic")

    def noise(start, rows=None, seed=0):
        return next(
            pipeline.train_batches(
                settings, None, seed=seed, batch_size=4, num_frames=FRAMES, start_step=start,
                total_steps=9, rows=rows,
            )
        )["audio"]  # fmt: skip

    assert noise(0).shape == (4, SAMPLES) and noise(0).std() > 1000
    np.testing.assert_array_equal(noise(3), noise(3))
    assert np.any(noise(3) != noise(4)) and np.any(noise(3) != noise(3, seed=1))
    np.testing.assert_array_equal(np.concatenate([noise(3, rows) for rows in SHARES]), noise(3))
    clips = np.concatenate([noise(step) for step in range(9)]).astype(np.float64)
    similar = np.corrcoef(clips) - np.eye(36)
    assert np.abs(similar).max() < 5 / np.sqrt(SAMPLES)


def test_synthetic_noise_is_drawn_once_for_all_steps(monkeypatch):
    """An accelerator takes thousands of clips per second; drawing one takes a millisecond."""
    common = {"seed": 0, "batch_size": 4, "num_frames": FRAMES}
    settings = data_config(source="synthetic")
    train = pipeline.train_batches(settings, None, start_step=0, total_steps=3, **common)
    held_out = pipeline.eval_batches(settings, None, max_clips=6, rows=np.array([2, 3]), **common)
    for stream in (train, held_out):
        first = next(stream)
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "Philox", None)
            second = next(stream)
        assert np.any(first["audio"] != second["audio"])
    # Rows that are all past the end.
    assert not second["mask"].any() and not second["audio"].any()


class Counted:
    """A split whose clip i holds i alone; remembers which clips it was asked for."""

    name, split, sample_rate_hz = "counted/1.0.0", "train", 16_000

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 9

    def read(self, indices):
        self.asked.append(indices.tolist())
        return [{"audio": np.full(SAMPLES, index)} for index in indices]


def test_a_batch_is_read_in_one_call_per_set():
    """Only so are neighbours read together, and others side by side."""
    splits = Counted(), Counted()
    which, example = np.array([1, 0, 1, 0, 1]), np.array([7, 5, 2, 1, 7])
    audio = pipeline.read(Clips(splits, None), which, np.arange(5), example, 0, SAMPLES)
    assert [split.asked for split in splits] == [[[5, 1]], [[7, 2, 7]]]
    np.testing.assert_array_equal(audio, np.repeat(example[:, None], SAMPLES, axis=1))


def test_a_clip_that_is_not_audio_is_named():
    example = np.array([40_000])
    clips = Clips((Counted(),), None)
    message = "counted/1.0.0@train example 40000: .* 16-bit .*; prepare the set without it"
    with pytest.raises(dataset.DataError, match=message):
        pipeline.read(clips, np.array([0]), example, example, 0, SAMPLES)


# --- prefetching ------------------------------------------------------------------------------

FIELDS = {"audio": (np.int32, (2, None)), "label": (np.float32, (2,))}


def row(step):
    return {"audio": np.full((2, step % 3), step, np.int32), "label": np.full(2, step, np.float32)}


def test_batches_of_several_fields_and_of_any_length_come_in_order():
    for step, batch in enumerate(pipeline.prefetched(row, range(40), FIELDS, 3)):
        assert list(batch) == ["audio", "label"]
        for name, values in row(step).items():
            assert batch[name].dtype == values.dtype
            np.testing.assert_array_equal(batch[name], values)
    assert step == 39


def test_every_thread_loads_a_batch_of_its_own():
    together = threading.Barrier(6, timeout=10)
    waiting = pipeline.prefetched(
        lambda step: together.wait() * 0 or row(step), range(6), FIELDS, 6
    )
    assert len(list(waiting)) == 6


def test_an_error_comes_as_it_is_at_its_step_and_ends_the_threads():
    loaded = []

    def load(step):
        loaded.append(step)
        if step in (3, 4):
            raise ZeroDivisionError(f"step {step}")
        return row(step)

    stream = pipeline.prefetched(load, range(1_000_000), FIELDS, 2)
    assert len([next(stream) for _ in range(3)]) == 3
    with pytest.raises(ZeroDivisionError, match="step 3"):
        next(stream)
    ended = len(loaded)
    time.sleep(0.1)
    assert len(loaded) == ended


def test_a_closed_stream_loads_no_more():
    loaded = []
    stream = pipeline.prefetched(
        lambda step: loaded.append(step) or row(step), range(99), FIELDS, 2
    )
    next(stream)
    stream.close()
    ended = len(loaded)
    time.sleep(0.1)
    assert len(loaded) == ended < 20


def test_an_open_stream_does_not_keep_the_interpreter_from_ending():
    program = (
        "import time, numpy as np; from maeast_jax.data import pipeline\n"
        "def load(step): time.sleep(0.01); return {'audio': np.zeros(9, np.int16)}\n"
        "stream = pipeline.prefetched(load, range(10**9), {'audio': (np.int16, (9,))}, 4)\n"
        "next(stream)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


# --- configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "synthetic", "train": "a"}, "have no meaning with data.source=synthetic"),
        ({"source": "synthetic", "fbank": "host"}, "data.fbank=host needs data.source=tfds"),
        ({"threads": -1}, "data.threads=-1 must not be negative"),
    ],
)
def test_fields_that_contradict_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        data_config(**fields)


def test_the_embedded_corpus_is_built_once_and_named_in_no_config(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_corpus, "SPLITS", {"train": range(2), "valid": range(90, 91)})
    built = []
    real = writer.write
    monkeypatch.setattr(writer, "write", lambda *a, **k: built.append(a[0]) or real(*a, **k))
    settings = data_config(dir=str(tmp_path))
    assert settings.is_demo and settings.has_eval
    assert len(pipeline.open_train(settings)) == 20
    assert len(pipeline.open_eval(settings)) == 10
    assert built == [demo_corpus.NAME]


# --- the lengths that clips are padded to ------------------------------------------------------


@pytest.mark.parametrize("window", [1, 5, 64, 512])
def test_few_buckets_hold_all_lengths(window):
    buckets = [pipeline.bucket_steps(steps, window) for steps in range(1, window + 1)]
    assert all(bucket >= steps for steps, bucket in enumerate(buckets, 1))
    assert buckets == sorted(buckets)
    assert len(set(buckets)) <= 9
    assert buckets[-1] == window


def test_buckets_above_the_window_grow_by_half_at_most():
    found = sorted({pipeline.bucket_steps(steps, 64) for steps in range(1, 400)})
    assert found == [4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
