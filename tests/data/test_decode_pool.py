import os
import pathlib
import signal

import numpy as np
import pytest
import soundfile

from maeast_jax.data import audio, decode_pool

DIED = "its decoder died (crashed, or out of memory)"
decode = decode_pool._decode


def decode_or_die(path):
    """What the processes run in place of `decode_pool._decode`: dies as a file's name says."""
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


def die():
    os._exit(1)


def test_results_come_in_order_and_failures_as_text(tmp_path):
    paths = []
    for index in range(30):
        paths.append(str(tmp_path / f"{index}.wav"))
        if index % 7:
            # Long files before short ones, which would otherwise overtake them.
            soundfile.write(paths[-1], np.full(50_000 // (index + 1), index, np.int16), 16_000)
    with decode_pool.DecodePool(2) as pool:
        for index, samples in enumerate(pool.decode(paths)):
            if index % 7:
                assert samples.tolist() == [index] * (50_000 // (index + 1))
            else:
                assert samples == "not found"
        assert index == 29
        assert list(pool.decode([])) == []


def decoded(folder, names, num_processes=2):
    """What a pool makes of files, of which those named by a number hold only that number."""
    for name in names:
        if name.isdigit():
            soundfile.write(folder / f"{name}.wav", np.full(9, int(name), np.int16), 16_000)
    with decode_pool.DecodePool(num_processes) as pool:
        results = list(pool.decode([str(folder / f"{name}.wav") for name in names]))
    return [r if isinstance(r, str) else str(*set(r.tolist())) for r in results]


def test_a_file_that_kills_its_decoder_is_undecodable_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_pool, "_decode", decode_or_die)
    names = [str(index) for index in range(30)]
    names[5], names[6], names[20] = "kills", "absent", "exhausts"
    expected = list(names)
    expected[5], expected[6], expected[20] = DIED, "not found", DIED
    assert decoded(tmp_path, names) == expected


@pytest.mark.parametrize("names", [["kills"], ["kills1", "0", "kills2"], ["0", "1", "kills"]])
def test_the_first_and_the_last_file_may_kill(tmp_path, monkeypatch, names):
    monkeypatch.setattr(decode_pool, "_decode", decode_or_die)
    expected = [DIED if name.startswith("kills") else name for name in names]
    assert decoded(tmp_path, names, num_processes=1) == expected


def test_a_decoder_that_dies_by_chance_costs_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_pool, "_decode", decode_or_die)
    assert decoded(tmp_path, ["0", "once", "2"]) == ["0", "not found", "2"]


def test_a_decoder_that_died_without_work_costs_no_file(tmp_path):
    with decode_pool.DecodePool(1) as pool:
        assert pool._executor.submit(os._exit, 1).exception()
        paths = [str(tmp_path / f"{index}.wav") for index in range(3)]
        assert list(pool.decode(paths)) == ["not found"] * 3
        assert list(pool.decode(paths)) == ["not found"] * 3


def test_files_under_way_stay_few_when_decoders_die(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_pool, "_decode", decode_or_die)
    taken = []

    def names():
        for index in range(40):
            taken.append(index)
            yield str(tmp_path / f"{'kills' if index == 2 else index}.wav")

    with decode_pool.DecodePool(1) as pool:
        for index, _ in enumerate(pool.decode(names())):
            assert len(taken) <= index + 4
            if index == 8:
                break


def test_processes_that_never_live_are_an_error_and_no_crawl(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_pool, "_start", die)
    with pytest.raises(decode_pool.DecoderDiedError, match=r"0\.wav, and so did a new one without"):
        decoded(tmp_path, ["0", "1", "2"])


def test_processes_that_die_on_every_file_are_an_error_and_no_crawl(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_pool, "_decode", decode_or_die)
    monkeypatch.setattr(decode_pool, "_MOST_DEATHS", 3)
    names = ["0", "kills0", "kills1", "2", *(f"kills{index}" for index in range(9))]
    with pytest.raises(
        decode_pool.DecoderDiedError, match=r"3 files in a row, .*kills2\.wav: take"
    ):
        decoded(tmp_path, names)
