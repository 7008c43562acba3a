import random
import zipfile

import pytest
from test_torch_file import GOLDEN, configuration, refused, write

from maeast_jax.interop import torch_file

torch = pytest.importorskip("torch")


def test_damaged_files(tmp_path):
    whole = (GOLDEN / "tiny_patch.pt").read_bytes()
    path = tmp_path / "a.pt"
    for size in [0, 1, 10, 1000, len(whole) // 2, len(whole) - 1000, len(whole) - 1]:
        path.write_bytes(whole[:size])
        refused(path, "torch.save did not write it, or it is damaged")
    for place in (len(whole) // 2, 1000):  # in a storage, in the pickle
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refused(path, "Bad CRC-32")


@pytest.mark.filterwarnings("ignore:invalid escape")
def test_no_damage_to_a_pickle_raises_anything_else(tmp_path):
    config, _ = configuration()
    path = tmp_path / "a.pt"
    torch.save({"cfg": config, "w": torch.ones(3, 4).t(), "s": {1}}, path)
    with zipfile.ZipFile(path) as archive:
        pickled, storages = archive.read("a/data.pkl"), {0: archive.read("a/data/0")}
    chance = random.Random(0)
    read = 0
    for _ in range(300):
        place, gone, new = chance.randrange(len(pickled)), chance.randrange(3), chance.randrange(3)
        damaged = pickled[:place] + chance.randbytes(new) + pickled[place + gone :]
        try:
            torch_file.read(write(path, damaged, storages))
            read += 1
        except torch_file.TorchFileError as error:
            assert str(error).isprintable()
    assert 10 < read < 290
