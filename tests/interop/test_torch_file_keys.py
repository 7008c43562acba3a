import argparse
import collections
import datetime

import numpy as np
import pytest
from test_torch_file import Color, equal, peak_bytes, refused

from maeast_jax.interop import torch_file

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_keys_alone_are_made_and_read(tmp_path, kind):
    path = tmp_path / "a.pt"
    wanted, other = {"w": torch.ones(3)}, torch.full((1_000_000,), 1.0)
    saved = {"extra_state": {"when": datetime.timedelta(1), 1: np.ones(1)}, "model": wanted}
    saved |= {"optimizer": [other, Color.RED], 7: Color.RED, "cfg": {"a": 1}}
    torch.save(kind(saved), path)
    read = torch_file.read(path, keys=("cfg", "model"))
    assert list(read) == ["cfg", "model"]
    equal(read, {"cfg": {"a": 1}, "model": wanted})
    assert peak_bytes(torch_file.read, path, ["cfg"]) < 1e6
    whole = path.read_bytes()
    place = whole.index(other.numpy().tobytes()[:1000])
    path.write_bytes(whole[:place] + b"x" + whole[place + 1 :])  # in the optimizer's storage
    equal(torch_file.read(path, keys=["model"]), {"model": wanted})
    assert torch_file.read(path, keys=()) == {}
    refused(path, "it holds 'datetime.timedelta'")
    refused(path, "Bad CRC-32", keys=["cfg", "optimizer"])


def test_keys_that_are_not_there(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"args": Color.RED, "model": {}, 1: 2, "\n": 3}, path)
    found = r"found \['args', 'model', '\\n'\]; pass a file that has them"
    refused(path, r"expected a dict with the keys cfg, model, " + found, keys=("cfg", "model"))
    torch.save({f"layer{i}": i for i in range(1000)}, path)
    refused(path, "keys cfg, found .'layer0', 'layer1', ", keys=["cfg"])
    for value in ({}, {1: "cfg"}):
        torch.save(value, path)
        refused(path, r"keys cfg, found \[\]", keys=["cfg"])
    for value in (torch.ones(2), ["cfg"], ("cfg",), "cfg", None, dict, argparse.Namespace(cfg=1)):
        torch.save(value, path)
        refused(path, "keys cfg, found no dict", keys=["cfg"])
