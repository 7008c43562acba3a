"""Audio files and arrays to int16 at 16 kHz, alone and in several processes."""

import errno
import os
import pathlib
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import soxr

from maeast_jax.data import audio


def sine(seconds, rate_hz, hz=440.0, level=0.5):
    return level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)


def write_av(path, codec, rate_hz, samples, layout="mono", sample_format="fltp"):
    """Encodes float [samples] for each channel with FFmpeg in the container of the suffix."""
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


def test_16_bit_mono_at_16_khz_is_exact(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
    samples[:2] = -32768, 32767
    soundfile.write(tmp_path / "a.flac", samples, 16_000, subtype="PCM_16")
    decoded = audio.decode(tmp_path / "a.flac").samples
    assert decoded.dtype == np.int16
    np.testing.assert_array_equal(decoded, samples)
    np.testing.assert_array_equal(audio.to_int16(samples, 16_000), samples)


def test_channels_are_averaged(tmp_path):
    left = np.array([100, -101, 32767, -32768, 7], np.int16)
    right = np.array([300, -100, 32767, -32768, 0], np.int16)
    third = np.array([200, 3, 32767, -32768, 5], np.int16)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right, third], 1), 16_000)
    expected = [200, -66, 32767, -32768, 4]
    assert audio.decode(tmp_path / "a.wav").samples.tolist() == expected
    assert audio.to_int16(np.stack([left, right, third], 1), 16_000).tolist() == expected


@pytest.mark.parametrize("rate_hz", [11_025, 44_100])
def test_arrays_of_other_rates_are_resampled_as_soxr_does(rate_hz):
    """To the bit and the sample: as one block, a stream is resampled like an array."""
    for length in (1, 7, 1_000, 4_001):
        samples = np.random.default_rng(length).normal(0, 0.1, length).astype(np.float32)
        resampled = soxr.resample(samples, rate_hz, 16_000, quality="HQ")
        expected = np.clip(np.rint(resampled * 32_768), -32_768, 32_767).astype(np.int16)
        np.testing.assert_array_equal(audio.to_int16(samples, rate_hz), expected)


def test_files_are_resampled_in_blocks_as_in_one_go(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "_BLOCK_FRAMES", 1000)  # many blocks, as a long file has
    samples = sine(0.5, 44_100).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 44_100, subtype="FLOAT")
    decoded = audio.decode(tmp_path / "a.wav").samples
    assert len(decoded) == 8000
    assert np.abs(decoded.astype(int) - audio.to_int16(samples, 44_100)).max() <= 1


def test_sound_beyond_full_scale_is_scaled_down_as_a_whole(tmp_path, monkeypatch):
    loud = np.array([0.75, 2**-15, 3 * 2**-15, 1.0, 3.0, -3.0, 1.5, -1.5], np.float32)
    soundfile.write(tmp_path / "a.wav", loud, 16_000, subtype="FLOAT")
    expected = [8192, 0, 1, 10923, 32767, -32768, 16384, -16384]
    recording = audio.decode(tmp_path / "a.wav")
    assert recording.samples.tolist() == expected
    assert recording.remarks == ("beyond full scale: scaled down from a peak of 3",)
    assert audio.to_int16(loud, 16_000).tolist() == expected
    # The peak may come late in a long file.
    monkeypatch.setattr(audio, "_BLOCK_FRAMES", 1)
    monkeypatch.setattr(audio, "_BLOCKS_AT_ONCE", 1)
    again = audio.decode(tmp_path / "a.wav").samples
    np.testing.assert_allclose(again.astype(int), expected, atol=1)  # rounded twice
    # Codecs overshoot so often that it is not worth a remark.
    soundfile.write(tmp_path / "b.wav", loud[:4] * np.float32(1.25), 16_000, subtype="FLOAT")
    recording = audio.decode(tmp_path / "b.wav")
    assert (recording.samples.tolist(), recording.remarks) == ([24576, 1, 3, 32767], ())


def test_channels_that_cancel_are_not_averaged(tmp_path):
    random = np.random.default_rng(0)
    left, other = np.int16(random.normal(0, 3000, (2, 16_000)))
    right = np.int16(-0.9 * left)
    for name, channels, expected, remarks in [
        ("a", [left, right], left, ("channels cancel: channel 1 alone",)),
        ("b", [right, left], left, ("channels cancel: channel 2 alone",)),
        ("c", [left, other], np.rint((left + np.float32(other)) / 2), ()),
        ("d", [left, 0 * left], np.rint(left / np.float32(2)), ()),
        ("e", [0 * left, 0 * left], 0 * left, ()),
    ]:
        soundfile.write(tmp_path / f"{name}.wav", np.stack(channels, 1), 16_000)
        recording = audio.decode(tmp_path / f"{name}.wav")
        np.testing.assert_array_equal(recording.samples, expected)
        assert recording.remarks == remarks
        np.testing.assert_array_equal(audio.to_int16(np.stack(channels, 1), 16_000), expected)


@pytest.mark.parametrize(
    ("name", "codec", "rate_hz", "layout"),
    [
        ("a.m4a", "aac", 44_100, "stereo"),
        ("a.webm", "libopus", 48_000, "mono"),
        ("a.mp3", "libmp3lame", 44_100, "stereo"),
    ],
)
def test_compressed_files_give_the_tone_that_went_in(tmp_path, name, codec, rate_hz, layout):
    av = pytest.importorskip("av")
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this FFmpeg does not encode {codec}")
    write_av(tmp_path / name, codec, rate_hz, sine(1, rate_hz), layout)
    decoded, remarks = audio.decode(tmp_path / name)
    assert remarks == ()
    assert len(decoded) == pytest.approx(16_000, abs=0.15 * 16_000)  # encoders pad
    assert loudest_hz(decoded) == pytest.approx(440, abs=2)
    assert np.abs(decoded[4000:12_000]).max() == pytest.approx(16_384, rel=0.1)


@pytest.mark.parametrize(
    ("suffix", "writer", "rate_hz"),
    [
        (".sph", "NIST", 16_000), (".nist", "NIST", 16_000), (".wv1", "NIST", 16_000),
        (".voc", "VOC", 16_000), (".avr", "AVR", 16_000), (".paf", "PAF", 16_000),
        (".pvf", "PVF", 16_000), (".sf", "IRCAM", 16_000), (".8svx", "SVX", 16_000),
        (".sds", "SDS", 16_000), (".wve", "WVE", 8_000), (".bwf", "WAV", 16_000),
        (".gsm", "RAW", 8_000),
        (".mp2", "mp2", 16_000), (".mpa", "mp2", 48_000), (".tta", "tta", 16_000),
        (".g722", "g722", 16_000), (".eac3", "eac3", 44_100), (".3g2", "aac", 16_000),
        (".avi", "mp2", 16_000), (".wmv", "pcm_s16le", 16_000),
        (".mpg", "mp2", 16_000), (".m4v", "aac", 16_000), (".f4v", "aac", 16_000),
        (".flv", "mp3", 44_100),
        (".m2ts", "mp2", 16_000), (".ra", "ac3", 44_100), (".mmf", "adpcm_yamaha", 44_100),
    ],
)  # fmt: skip
def test_files_of_other_suffixes_that_folders_are_searched_for_decode(
    tmp_path, suffix, writer, rate_hz
):
    path = tmp_path / f"a{suffix}"
    if writer.isupper():
        subtype = {"WVE": "ALAW", "RAW": "GSM610"}.get(writer, "PCM_16")
        soundfile.write(path, sine(1, rate_hz), rate_hz, format=writer, subtype=subtype)
    else:
        write_av(path, writer, rate_hz, sine(1, rate_hz))
    decoded, remarks = audio.decode(path)
    assert remarks == ()
    assert suffix in audio.AUDIO_SUFFIXES
    assert len(decoded) == pytest.approx(16_000, abs=0.15 * 16_000)
    assert loudest_hz(decoded) == pytest.approx(440, abs=2)


@pytest.mark.parametrize(("codec", "step"), [("pcm_u8", 256), ("pcm_s32le", 1), ("pcm_f64le", 1)])
def test_pyav_is_exact_where_the_codec_is(tmp_path, codec, step):
    samples = np.random.default_rng(1).integers(-32768 // step, 32767 // step, 3000) * step
    write_av(tmp_path / "a.mka", codec, 16_000, samples / 32768)
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.read(tmp_path / "a.mka")  # so PyAV decodes it
    np.testing.assert_array_equal(audio.decode(tmp_path / "a.mka").samples, samples)


def test_a_name_with_a_colon_is_a_file_and_not_a_protocol(tmp_path, monkeypatch):
    write_av(tmp_path / "a.mka", "pcm_s16le", 16_000, sine(0.1, 16_000))
    (tmp_path / "a.mka").rename(tmp_path / "data:a.mka")
    monkeypatch.chdir(tmp_path)
    assert len(audio.decode("data:a.mka").samples) == 1600


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


def write_parts(folder, suffix, rates_hz=(44_100,) * 3, layouts=("mono",) * 3):
    """Writes three files of 3 s and different tones, and returns the bytes of each."""
    parts = []
    for hz, rate_hz, layout in zip(TONES_HZ, rates_hz, layouts, strict=True):
        path, samples = folder / f"part.{suffix}", sine(3, rate_hz, hz, level=0.25)
        if suffix == "ogg":  # FFmpeg's own encoder of Vorbis writes stereo alone
            soundfile.write(path, np.stack([samples] * (1 + (layout == "stereo")), 1), rate_hz)
        else:
            codec = {"mp3": "libmp3lame", "opus": "libopus"}.get(suffix, suffix)
            write_av(path, codec, rate_hz, samples, layout)
        parts.append(path.read_bytes())
    return parts


TONES_HZ = (300, 1000, 3000)


@pytest.mark.parametrize(
    ("suffix", "rates_hz", "layouts"),
    [
        ("mp3", (44_100,) * 3, ("mono",) * 3),  # with ID3 tags and Xing headers in the middle
        ("mp3", (44_100, 22_050, 48_000), ("mono", "stereo", "mono")),
        ("ogg", (44_100,) * 3, ("mono",) * 3),
        ("opus", (48_000,) * 3, ("mono",) * 3),
        ("flac", (44_100,) * 3, ("stereo",) * 3),
    ],
)
def test_joined_files_are_read_to_the_end(tmp_path, suffix, rates_hz, layouts):
    parts = write_parts(tmp_path, suffix, rates_hz, layouts)
    (tmp_path / f"a.{suffix}").write_bytes(b"".join(parts))
    samples, remarks = audio.decode(tmp_path / f"a.{suffix}")
    assert len(samples) == pytest.approx(9 * 16_000, abs=0.15 * 16_000)
    for number, hz in enumerate(TONES_HZ):
        part = samples[(48_000 * number) + 4_000 : 48_000 * (number + 1) - 4_000]
        assert loudest_hz(part) == pytest.approx(hz, abs=2)
        assert np.abs(part).max() == pytest.approx(8_192, rel=0.1)
    # A FLAC file counts its samples.
    assert remarks == (("longer than its header counts: read to the end",) * (suffix == "flac"))


def test_a_joined_file_that_ffmpeg_does_not_follow_is_read_in_part(tmp_path):
    parts = write_parts(tmp_path, "ogg", layouts=("mono", "stereo", "mono"))
    (tmp_path / "a.ogg").write_bytes(b"".join(parts))
    samples, (remark,) = audio.decode(tmp_path / "a.ogg")
    assert len(samples) == 48_000
    assert remark.startswith("read in part: 3.00 s, 0 packets damaged, where FFmpeg stops: Not yet")


@pytest.fixture(scope="module")
def pcm():
    return np.random.default_rng(2).integers(-9000, 9000, 48_000).astype(np.int16)


def wav(folder, samples, counted_bytes, riff_bytes=None):
    """The bytes of a wav file with other counts in its header."""
    soundfile.write(folder / "whole.wav", samples, 16_000)
    content = bytearray((folder / "whole.wav").read_bytes())
    if riff_bytes is not None:
        content[4:8] = struct.pack("<I", riff_bytes)
    content[40:44] = struct.pack("<I", counted_bytes)
    return bytes(content)


@pytest.mark.parametrize(
    ("counted_bytes", "riff_bytes"),
    [(48_000, None), (0, None), (0, 0), (2**32 - 1, 2**32 - 1), (2**31 - 2**15, 2**31 - 1)],
)
def test_a_wav_file_is_read_to_its_end_whatever_its_header_counts(
    tmp_path, pcm, counted_bytes, riff_bytes
):
    (tmp_path / "a.wav").write_bytes(wav(tmp_path, pcm, counted_bytes, riff_bytes))
    samples, remarks = audio.decode(tmp_path / "a.wav")
    np.testing.assert_array_equal(samples, pcm)
    is_stream = counted_bytes > 96_000  # whose length nobody knew
    assert remarks == (() if is_stream else ("longer than its header counts: read to the end",))


def test_chunks_and_zeros_after_the_sound_of_a_wav_file_are_no_sound(tmp_path, pcm):
    content = wav(tmp_path, pcm, 96_000)
    for rest in (b"LIST\4\0\0\0INFO", bytes(1000), b"LIST\xff\0\0\0INFO"):
        (tmp_path / "a.wav").write_bytes(content + rest)
        samples, remarks = audio.decode(tmp_path / "a.wav")
        np.testing.assert_array_equal(samples, pcm)
        assert remarks == ()
    (tmp_path / "a.wav").write_bytes(content + content)
    samples, remarks = audio.decode(tmp_path / "a.wav")
    assert len(samples) == 96_022  # the second header sounds as 22 samples
    assert remarks == ("longer than its header counts: read to the end",)


@pytest.mark.parametrize(
    ("suffix", "remark"),
    [
        ("wav", "read in part: 47978 of 96000 bytes that its header counts"),
        ("aiff", "read in part: 47981 of 96008 bytes that its header counts"),
        ("au", "read in part: 47988 of 96000 bytes that its header counts"),
        ("w64", "read in part: 48052 of 96104 bytes that its header counts"),
        ("caf", "read by PyAV: soundfile: Supported file format but file is malformed."),
        ("flac", "read in part: 1.28 of 3.00 s, 1 packets damaged"),
        ("mp3", "read in part: 1.41 of 3.00 s, 0 packets damaged"),
    ],
)
def test_a_truncated_file_is_read_in_part(tmp_path, pcm, suffix, remark):
    soundfile.write(tmp_path / f"a.{suffix}", pcm, 16_000)
    content = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / f"a.{suffix}").write_bytes(content[: len(content) // 2])
    samples, remarks = audio.decode(tmp_path / f"a.{suffix}")
    assert remarks[-1] == remark
    assert 20_000 < len(samples) < 25_000
    if suffix != "mp3":
        np.testing.assert_array_equal(samples, pcm[: len(samples)])


@pytest.mark.parametrize("suffix", ["mp3", "flac"])
def test_decoding_goes_on_after_damage(tmp_path, pcm, suffix):
    soundfile.write(tmp_path / f"a.{suffix}", np.tile(pcm, 3), 16_000)
    content = bytearray((tmp_path / f"a.{suffix}").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = np.random.default_rng(0).bytes(2000)
    (tmp_path / f"a.{suffix}").write_bytes(content)
    samples, remarks = audio.decode(tmp_path / f"a.{suffix}")
    assert 0.8 * 9 * 16_000 < len(samples) < 9 * 16_000
    assert any(remark.startswith("read in part: 8.") for remark in remarks)
    if suffix == "flac":
        np.testing.assert_array_equal(samples[-20_000:], pcm[-20_000:])


def test_decoders_print_nothing(tmp_path, capfd):
    (tmp_path / "id3.mp3").write_bytes(b"ID3 of no kind")
    (tmp_path / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(30_000))
    names = [str(tmp_path / "id3.mp3"), str(tmp_path / "noise.mp3")]
    with audio.DecodePool(1) as pool:
        assert all(isinstance(result, str) for result in pool.decode(names))
    assert capfd.readouterr() == ("", "")


def test_undecodable_files_say_why_in_one_line(tmp_path):
    (tmp_path / "noise.wav").write_bytes(np.random.default_rng(0).bytes(3000))
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.int16), 16_000)
    soundfile.write(tmp_path / "tick.wav", np.ones(1, np.int16), 96_000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "big.wav", np.array([0.0, 9000.0]), 16_000, subtype="FLOAT")
    expected = {
        "noise.wav": "PyAV: .*; soundfile: ",
        "empty.wav": "no samples",
        "tick.wav": "no samples",
        "nan.wav": "NaN or infinity",
        "big.wav": "peak of 9000 times full scale, so they are integers .*; divide them by 32768",
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


def test_a_file_that_the_system_refuses_is_undecodable(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", np.zeros(9, np.int16), 16_000)
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(audio.UndecodableError, match=r"a\.wav: Permission denied"):
        audio.decode(tmp_path / "a.wav")


def refuse(*arguments, **options):
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_missing_decoder_is_not_the_fault_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "a.m4a").write_bytes(b"no audio")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError):
        audio.decode(tmp_path / "a.m4a")


def test_wider_integers_must_hold_16_bit_values():
    result = audio.to_int16(np.array([0, 1, 32767], np.int64), 16_000)
    assert (result.dtype, result.tolist()) == (np.int16, [0, 1, 32767])
    for values in ([0, 32768], [-32769, 0]):
        with pytest.raises(ValueError, match="from {} to {} must be 16-bit".format(*values)):
            audio.to_int16(np.array(values), 16_000)


def test_arrays_that_are_not_audio_are_refused():
    for bad, pattern in [
        (np.zeros((2, 3, 4), np.int16), r"shape \[2, 3, 4\]"),
        (np.zeros(0, np.int16), r"shape \[0\]"),
        (np.zeros(3, np.uint8), "samples of uint8 must be int16 or float"),
        (np.array([0, np.nan]), "NaN or infinity"),
        (np.array([0, 12_345.0]), "12345 times full scale"),
    ]:
        with pytest.raises(ValueError, match=pattern):
            audio.to_int16(bad, 16_000)


# --- several processes ------------------------------------------------------------------------

DIED = "its decoder died (crashed, or out of memory)"
decode = audio._decode


def decode_or_die(path):
    """Runs in place of `audio._decode`, and dies as the file's name says."""
    name, once = os.path.basename(path), pathlib.Path(path + ".once")
    if name.startswith("kills"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("exhausts"):
        audio.decode = exhaust
    if name.startswith("once") and not once.exists():
        once.touch()
        os._exit(1)
    return decode(path)


def exhaust(path):
    raise MemoryError


def test_decoding_processes_load_no_framework():
    """Each starts with this import; jax and TensorFlow take seconds and hundreds of megabytes."""
    program = (
        "import sys, maeast_jax.data;"
        "print({'jax', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_results_come_in_order_and_failures_as_text(tmp_path):
    paths = []
    for index in range(20):
        paths.append(str(tmp_path / f"{index}.wav"))
        if index % 7:
            # Long files before short ones, which would otherwise overtake them.
            soundfile.write(paths[-1], np.full(50_000 // (index + 1), index, np.int16), 16_000)
    with audio.DecodePool(2) as pool:
        for index, recording in enumerate(pool.decode(paths)):
            if index % 7:
                assert recording.samples.tolist() == [index] * (50_000 // (index + 1))
            else:
                assert recording == "not found"
        assert index == 19
        assert list(pool.decode([])) == []


def decoded(folder, names, num_processes=2):
    """The pool's result for each name; a file whose name is a number holds only that number."""
    for name in names:
        if name.isdigit():
            soundfile.write(folder / f"{name}.wav", np.full(9, int(name), np.int16), 16_000)
    with audio.DecodePool(num_processes) as pool:
        results = list(pool.decode([str(folder / f"{name}.wav") for name in names]))
    return [r if isinstance(r, str) else str(*set(r.samples.tolist())) for r in results]


def test_a_file_that_kills_its_decoder_is_undecodable_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "_decode", decode_or_die)
    names = [str(index) for index in range(14)]
    names[5], names[6], names[13] = "kills", "absent", "exhausts"
    expected = list(names)
    expected[5], expected[6], expected[13] = DIED, "not found", DIED
    assert decoded(tmp_path, names) == expected


@pytest.mark.slow
def test_a_decoder_that_dies_by_chance_costs_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "_decode", decode_or_die)
    assert decoded(tmp_path, ["0", "once", "2"]) == ["0", "not found", "2"]
    with audio.DecodePool(1) as pool:
        assert pool._executor.submit(os._exit, 1).exception()
        assert list(pool.decode([str(tmp_path / "a.wav")] * 3)) == ["not found"] * 3


@pytest.mark.slow
def test_files_under_way_stay_few_when_decoders_die(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "_decode", decode_or_die)
    taken = []

    def names():
        for index in range(40):
            taken.append(index)
            yield str(tmp_path / f"{'kills' if index == 2 else index}.wav")

    with audio.DecodePool(1) as pool:
        for index, _ in enumerate(pool.decode(names())):
            assert len(taken) <= index + 4
            if index == 8:
                break


@pytest.mark.slow
def test_processes_that_die_on_every_file_are_an_error_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "_decode", decode_or_die)
    monkeypatch.setattr(audio, "_MOST_DEATHS", 3)
    names = ["0", "kills0", "kills1", "2", *(f"kills{index}" for index in range(5))]
    with pytest.raises(audio.DecoderDiedError, match=r"3 files in a row, .*kills2\.wav: take"):
        decoded(tmp_path, names)
