"""The filter bank beside torchaudio's output, a computation in float64, and itself."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from maeast_jax import fbank

GOLDEN = np.load(Path(__file__).parent / "golden" / "fbank.npz")
FLOOR = float(np.log(np.finfo(np.float32).eps))


def reference(waveform):
    """Kaldi's recipe step by step in float64, frame by frame."""
    waveform = np.asarray(waveform, np.float64)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    edges = mel(20.0) + (mel(8000.0) - mel(20.0)) * np.arange(130) / 129
    bank = np.zeros((256, 128))
    for k in range(256):
        position = mel(k * 16000 / 512)
        for band in range(128):
            left, centre, right = edges[band : band + 3]
            if left < position <= centre:
                bank[k, band] = (position - left) / (centre - left)
            elif centre < position < right:
                bank[k, band] = (right - position) / (right - centre)
    rows = []
    for start in range(0, len(waveform) - 399, 160):
        frame = waveform[start : start + 400]
        frame = frame - frame.mean()
        emphasised = frame.copy()
        emphasised[0] -= 0.97 * frame[0]
        emphasised[1:] -= 0.97 * frame[:-1]
        power = np.abs(np.fft.rfft(emphasised * window, 512)) ** 2
        rows.append(np.log(np.maximum(power[:256] @ bank, np.finfo(np.float32).eps)))
    return np.stack(rows)


def mel(frequency_hz):
    return 1127 * np.log(1 + frequency_hz / 700)


@functools.cache
def computed(name):
    return np.asarray(jax.jit(fbank.fbank)(GOLDEN[f"{name}.wav"]))


@pytest.mark.parametrize("name", ["noise", "click", "shortest", "odd", "speech"])
def test_agrees_with_torchaudio(name):
    error = np.abs(computed(name) - GOLDEN[f"{name}.mae_ast"])
    assert error.max() <= 1e-3
    assert error.mean() <= 1e-5


def test_sweep_agrees_with_float64():
    """Here torchaudio's float32 is 1.3e-2 off, a single float32 product 2e-3, the split 5e-5."""
    error = np.abs(computed("sweep") - reference(GOLDEN["sweep.wav"]))
    assert error.max() <= 2e-4


def test_a_constant_offset_changes_nothing_but_rounding():
    waveform = GOLDEN["odd.wav"][:2000]
    error = np.abs(np.asarray(fbank.fbank(waveform + np.float32(0.5))) - reference(waveform))
    assert error.max() <= 1e-3


def test_int16_is_its_values_over_32768():
    pcm = np.round(GOLDEN["speech.wav"][:8000] * 32768).astype(np.int16)
    as_float = pcm.astype(np.float32) / 32768
    np.testing.assert_array_equal(fbank.fbank(pcm), fbank.fbank(as_float))


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray])
def test_samples_of_any_type_become_int16_or_float32(of):
    for values, expected in [
        (np.array([1, -32_768], np.int16), np.int16),
        (np.array([1, 32_767], np.int32), np.int16),
        (np.array([0.5, -99.0], np.float16), np.float32),
        (np.array([0.5, -1.0], ml_dtypes.bfloat16), np.float32),
        (np.array([[0.5], [-1.0]], np.float64), np.float32),
    ]:
        samples = fbank.as_samples(of(values))
        assert samples.dtype == expected
        np.testing.assert_array_equal(samples, values.astype(np.float64))
    for values, message in [
        (np.array([0.5, np.nan], np.float32), "NaN or infinity, but must be finite; repair"),
        (np.array([-np.inf, 0.5], np.float16), "NaN or infinity"),
        (np.array([0, -12_345.0]), "peak of 12345 times full scale.*divide them by 32768"),
        (np.array([0, -32_769], np.int32), "int32 samples from -32769 to 0 must be 16-bit values"),
        (np.zeros(2, np.uint8), "uint8 must be int16 or float"),
        (np.zeros(2, np.complex64), "complex64 must be int16 or float"),
    ]:
        with pytest.raises(ValueError, match=message):
            fbank.as_samples(of(values))


def test_silence_and_the_band_without_a_bin_are_the_floor():
    np.testing.assert_allclose(fbank.fbank(np.zeros(1000, np.int16)), FLOOR, atol=1e-6)
    constant = [band for band in range(128) if np.ptp(computed("noise")[:, band]) == 0]
    assert constant == [3]
    np.testing.assert_allclose(computed("noise")[:, 3], FLOOR, atol=1e-6)


def test_shapes():
    waveform = np.random.default_rng(0).normal(0, 0.1, (2, 3, 1039)).astype(np.float32)
    energies = fbank.fbank(waveform)
    assert energies.shape == (2, 3, 4, 128)
    assert energies.dtype == jnp.float32
    np.testing.assert_allclose(energies[1, 2], fbank.fbank(waveform[1, 2]), atol=1e-4)
    assert fbank.fbank(waveform[:, :0]).shape == (2, 0, 4, 128)


def test_products_are_full_float32_without_a_gather():
    """On TPU and GPU a product without precision=HIGHEST rounds its factors."""
    program = str(jax.make_jaxpr(fbank.fbank)(np.zeros((2, 4000), np.int16)))
    products = re.findall(r"dot_general\[.*?\n\s*\]", program, flags=re.DOTALL)
    assert len(products) == 4
    assert all("HIGHEST, Precision.HIGHEST" in product for product in products)
    assert "gather" not in program


def test_num_frames_and_num_samples():
    assert [fbank.num_frames(size) for size in (400, 559, 560, 12345, 160000)] == [1, 1, 2, 75, 998]
    for frames in (1, 2, 512, 1024):
        assert fbank.num_frames(fbank.num_samples(frames)) == frames
        if frames > 1:
            assert fbank.num_frames(fbank.num_samples(frames) - 1) == frames - 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fbank.fbank(np.zeros((2, 399), np.float32)), "399 samples .* 400 .*pad"),
        (lambda: fbank.fbank(np.zeros(800, np.int32)), "int32 must be int16 or float"),
        (lambda: fbank.num_samples(0), "num_frames=0"),
    ],
)
def test_errors_name_value_rule_and_remedy(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["noise", "shortest", "odd"])
def test_tensorflow_computes_the_same(name):
    pytest.importorskip("tensorflow")
    energies = fbank.fbank_tf(GOLDEN[f"{name}.wav"][None]).numpy()
    np.testing.assert_allclose(energies[0], computed(name), atol=1e-4)


def test_tensorflow_agrees_with_float64_on_the_sweep():
    """Its transform in float64 is 1e-6 off; matrices in float32 are 5e-5 off."""
    pytest.importorskip("tensorflow")
    energies = fbank.fbank_tf(GOLDEN["sweep.wav"][None]).numpy()
    assert np.abs(energies[0] - reference(GOLDEN["sweep.wav"])).max() <= 1e-5


def test_tensorflow_in_a_pipeline():
    tf = pytest.importorskip("tensorflow")
    # 1,025 frames: three blocks of 342; the last frame of the third block is past the end.
    pcm = np.random.default_rng(0).integers(-9000, 9000, (3, 164_300)).astype(np.int16)
    # TensorFlow knows the size of a batch only when it runs.
    data = tf.data.Dataset.from_tensor_slices(pcm).batch(2).map(fbank.fbank_tf)
    assert data.element_spec.shape.as_list() == [None, 1025, 128]
    energies = np.concatenate(list(data.as_numpy_iterator()))
    np.testing.assert_allclose(energies, fbank.fbank(pcm), atol=1e-4)


def test_tensorflow_errors():
    pytest.importorskip("tensorflow")
    with pytest.raises(ValueError, match="399 samples"):
        fbank.fbank_tf(np.zeros((2, 399), np.float32))
    with pytest.raises(ValueError, match="int32 must be int16"):
        fbank.fbank_tf(np.zeros((2, 800), np.int32))
