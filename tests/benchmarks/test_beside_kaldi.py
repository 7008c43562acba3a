"""Log-mel energies beside torchaudio's: the same values, and the clips they are taken of."""

import json
import os

import numpy as np
import pytest
from recordings import write_wav

pytest.importorskip("torch")

from benchmarks import beside_kaldi, reference

if reference.missing():
    pytest.skip(reference.missing(), allow_module_level=True)


def test_recordings_are_laid_end_to_end(tmp_path):
    write_wav(tmp_path / "a.wav", 12, seed=1)
    write_wav(tmp_path / "b.wav", 9, seed=2)
    (tmp_path / "c.wav").write_bytes(b"no sound")
    found = beside_kaldi.clips(tmp_path, 2)
    assert found.shape == (2, beside_kaldi.NUM_SAMPLES)
    assert found.dtype == np.int16
    assert len(np.unique(found[0])) > 5_000
    with pytest.raises(ValueError, match=r"is 9 s short of 3 clips of 10 s; lower --batch"):
        beside_kaldi.clips(tmp_path, 3)


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .*missing.* is not a directory"):
        beside_kaldi.main([str(tmp_path / "missing")])


@pytest.mark.slow
def test_sides_compute_the_same(tmp_path, monkeypatch, capsys):
    core = min(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {core})
    file = tmp_path / "found.json"
    beside_kaldi.main(["--batch=2", "--rounds=3", "--count=1", f"--json={file}"])
    (found,) = json.loads(file.read_text())["found"]
    assert list(found) == ["torchaudio", "fbank_tf", "fbank"]
    for name in ("fbank_tf", "fbank"):
        assert 0 < found[name]["deviation"] < 1e-3
        assert found[name]["cores"] == 1
    assert found["torchaudio"]["times_torchaudio"] == [1.0, 1.0, 1.0]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| torchaudio", "| fbank_tf", "| fbank"]
