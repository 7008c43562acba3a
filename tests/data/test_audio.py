import pickle

import numpy as np
import pytest
import soundfile
import soxr

from maeast_jax.data import audio


def sine(seconds, rate_hz, hz=440.0, level=0.5):
    return level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)


def write_av(path, codec, rate_hz, samples, layout="mono", sample_format="fltp"):
    """Encodes float [samples] (each channel the same) with FFmpeg; the container by the suffix."""
    av = pytest.importorskip("av")
    channels = {"mono": 1, "stereo": 2}[layout]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate_hz, layout=layout)
        frame = av.AudioFrame.from_ndarray(
            np.tile(samples.astype(np.float32), (channels, 1)), format="fltp", layout=layout
        )
        frame.sample_rate = rate_hz
        resampler = av.AudioResampler(
            format=stream.codec_context.format or sample_format,
            layout=layout,
            rate=rate_hz,
            frame_size=stream.codec_context.frame_size or None,
        )
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))


def loudest_hz(samples):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return np.argmax(spectrum) * audio.SAMPLE_RATE_HZ / len(samples)


@pytest.mark.parametrize("suffix", ["wav", "flac", "aiff", "au"])
def test_16_bit_mono_at_16_khz_is_bit_exact(tmp_path, suffix):
    samples = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
    samples[:2] = -32768, 32767
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, samples, 16_000, subtype="PCM_16")
    decoded = audio.decode(path)
    assert decoded.dtype == np.int16
    np.testing.assert_array_equal(decoded, samples)
    np.testing.assert_array_equal(audio.to_int16(samples, 16_000), samples)


def test_channels_are_averaged(tmp_path):
    left = np.array([100, -101, 32767, -32768, 7], np.int16)
    right = np.array([300, -100, 32767, -32768, 0], np.int16)
    third = np.array([200, 3, 32767, -32768, 5], np.int16)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right, third], 1), 16_000)
    expected = [200, -66, 32767, -32768, 4]
    assert audio.decode(tmp_path / "a.wav").tolist() == expected
    assert audio.to_int16(np.stack([left, right, third], 1), 16_000).tolist() == expected


def test_other_rates_are_resampled_as_soxr_does_in_one_go(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "_BLOCK_FRAMES", 1000)  # many blocks, as a long file has
    samples = sine(0.5, 44_100).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 44_100, subtype="FLOAT")
    whole = soxr.resample(samples, 44_100, 16_000, quality="HQ")
    expected = np.rint(whole * 32768).astype(np.int16)
    decoded = audio.decode(tmp_path / "a.wav")
    assert len(decoded) == 8000
    assert np.abs(decoded.astype(int) - expected).max() <= 1
    assert np.abs(audio.to_int16(samples, 44_100).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("rate_hz", [8000, 11_025, 22_050, 48_000, 96_000])
def test_resampling_keeps_pitch_length_and_level(tmp_path, rate_hz):
    soundfile.write(tmp_path / "a.wav", sine(1, rate_hz), rate_hz)
    decoded = audio.decode(tmp_path / "a.wav")
    assert abs(len(decoded) - 16_000) <= 1
    assert loudest_hz(decoded) == pytest.approx(440, abs=1.1)
    assert np.abs(decoded[4000:12_000]).max() == pytest.approx(16_384, rel=0.01)


def test_what_exceeds_full_scale_is_clipped_not_wrapped(tmp_path):
    loud = np.array([1.5, -1.5, 1.0, -1.0, 0.5, 2**-16, 3 * 2**-16], np.float32)
    soundfile.write(tmp_path / "a.wav", loud, 16_000, subtype="FLOAT")
    expected = [32767, -32768, 32767, -32768, 16384, 0, 2]  # halves go to the even number
    assert audio.decode(tmp_path / "a.wav").tolist() == expected
    assert audio.to_int16(loud, 16_000).tolist() == expected
    assert audio.to_int16(loud.astype(np.float64), 16_000).tolist() == expected


@pytest.mark.parametrize(
    ("name", "codec", "rate_hz", "layout"),
    [
        ("a.m4a", "aac", 44_100, "stereo"),
        ("a.mp4", "aac", 16_000, "mono"),
        ("a.aac", "aac", 22_050, "mono"),
        ("a.webm", "libopus", 48_000, "mono"),
        ("a.mkv", "libopus", 48_000, "stereo"),
        ("a.mka", "pcm_s16le", 16_000, "stereo"),
        ("a.mov", "alac", 44_100, "mono"),
        ("a.mp3", "libmp3lame", 44_100, "stereo"),
        ("a.opus", "libopus", 48_000, "mono"),
        ("a.ogg", "libopus", 48_000, "stereo"),
        ("a.flac", "flac", 44_100, "stereo"),
    ],
)
def test_every_container_gives_the_tone_that_went_in(tmp_path, name, codec, rate_hz, layout):
    av = pytest.importorskip("av")
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this FFmpeg does not encode {codec}")
    write_av(tmp_path / name, codec, rate_hz, sine(1, rate_hz), layout)
    decoded = audio.decode(tmp_path / name)
    assert len(decoded) == pytest.approx(16_000, abs=0.15 * 16_000)  # encoders pad
    assert loudest_hz(decoded) == pytest.approx(440, abs=2)
    assert np.abs(decoded[4000:12_000]).max() == pytest.approx(16_384, rel=0.1)


@pytest.mark.parametrize(
    ("codec", "step"),
    [("pcm_u8", 256), ("pcm_s16le", 1), ("pcm_s32le", 1), ("pcm_f32le", 1), ("pcm_f64le", 1)],
)
def test_pyav_is_exact_where_the_codec_is(tmp_path, codec, step):
    samples = np.random.default_rng(1).integers(-32768 // step, 32767 // step, 3000) * step
    write_av(tmp_path / "a.mka", codec, 16_000, samples / 32768)
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.read(tmp_path / "a.mka")  # so it is PyAV that is tested
    np.testing.assert_array_equal(audio.decode(tmp_path / "a.mka"), samples)


def test_a_name_with_a_colon_is_a_file_and_not_a_protocol(tmp_path, monkeypatch):
    write_av(tmp_path / "a.mka", "pcm_s16le", 16_000, sine(0.1, 16_000))
    (tmp_path / "a.mka").rename(tmp_path / "data:a.mka")
    monkeypatch.chdir(tmp_path)
    assert len(audio.decode("data:a.mka")) == 1600


def test_a_video_without_sound_is_undecodable(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(audio.UndecodableError, match="no audio stream"):
        audio.decode(tmp_path / "a.mkv")


def test_undecodable_files_say_why_in_one_line(tmp_path):
    (tmp_path / "noise.wav").write_bytes(np.random.default_rng(0).bytes(3000))
    (tmp_path / "nothing.wav").write_bytes(b"")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.int16), 16_000)
    soundfile.write(tmp_path / "tick.wav", np.ones(1, np.int16), 96_000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "inf.wav", np.array([0.0, np.inf]), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "big.wav", np.array([0.0, 9000.0]), 16_000, subtype="FLOAT")
    expected = {
        "noise.wav": "soundfile: .*; PyAV: ",
        "nothing.wav": "soundfile: .*; PyAV: ",
        "empty.wav": "no samples",
        "tick.wav": "no samples",
        "nan.wav": "NaN or infinity",
        "inf.wav": "NaN or infinity",
        "big.wav": "a peak of 9000 times full scale",
        "absent.wav": "not found",
        ".": "not a file",
    }
    for name, pattern in expected.items():
        with pytest.raises(audio.UndecodableError, match=pattern) as caught:
            audio.decode(tmp_path / name)
        message = str(caught.value)
        assert message.startswith(str(tmp_path / name))
        assert message.count(str(tmp_path)) == 1
        assert "\n" not in message


def test_the_error_survives_the_way_back_from_another_process():
    error = pickle.loads(pickle.dumps(audio.UndecodableError("a.wav", "not found")))
    assert (error.path, error.reason, str(error)) == ("a.wav", "not found", "a.wav: not found")


def test_a_missing_decoder_is_no_property_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "a.m4a").write_bytes(b"no audio")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError):
        audio.decode(tmp_path / "a.m4a")


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_wider_integers_hold_16_bit_values(dtype):
    values = np.array([0, 1, 32767], dtype)
    result = audio.to_int16(values, 16_000)
    assert result.dtype == np.int16
    assert result.tolist() == [0, 1, 32767]
    with pytest.raises(ValueError, match=f"value 32768 in {np.dtype(dtype)} audio"):
        audio.to_int16(np.array([0, 32768], dtype), 16_000)


def test_integers_below_16_bits_are_an_error():
    assert audio.to_int16(np.array([-32768]), 16_000).tolist() == [-32768]
    with pytest.raises(ValueError, match="value -32769 in int64 audio"):
        audio.to_int16(np.array([-32769, 5]), 16_000)


def test_integers_and_floats_of_the_same_sound_agree():
    floats = sine(0.2, 8000)
    integers = np.rint(floats * 32768).astype(np.int64)
    difference = audio.to_int16(floats, 8000).astype(int) - audio.to_int16(integers, 8000)
    assert np.abs(difference).max() <= 1
    assert len(audio.to_int16(integers, 8000)) == 3200


def test_arrays_that_are_no_audio():
    for bad, pattern in [
        (np.zeros((2, 3, 4), np.int16), r"shape \[2, 3, 4\]"),
        (np.int16(3), r"shape \[\]"),
        (np.zeros((5, 0), np.int16), r"shape \[5, 0\]"),
        (np.zeros(3, np.uint8), "type uint8"),
        (np.zeros(3, bool), "type bool"),
        (np.array([b"riff"]), "type "),
        (np.array([0, np.nan]), "NaN or infinity"),
        (np.array([0, 12_345.0]), "12345 times full scale"),
    ]:
        with pytest.raises(ValueError, match=pattern):
            audio.to_int16(bad, 16_000)


def test_no_samples_in_memory_stay_none():
    for empty in (np.zeros(0, np.int16), np.zeros(0, np.int64), np.zeros((0, 2))):
        for rate_hz in (16_000, 44_100):
            assert audio.to_int16(empty, rate_hz).shape == (0,)
