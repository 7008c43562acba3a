"""Files of torch.save: what is read equals what torch reads, and nothing in a file is run."""

import argparse
import collections
import dataclasses
import datetime
import enum
import os
import pathlib
import pickle
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from maeast_jax.interop import torch_file

torch = pytest.importorskip("torch")
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def assert_equal(ours, theirs):
    """Asserts equal types, shapes and bits, all the way down."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, np.ndarray)
        if theirs.dtype == torch.bfloat16:
            assert ours.dtype == ml_dtypes.bfloat16
            ours, theirs = ours.view(np.int16), theirs.view(torch.int16)
        theirs = theirs.detach().numpy()
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.tobytes() == theirs.tobytes()
    elif isinstance(theirs, dict):
        assert type(ours) is dict and list(ours) == list(theirs)
        for key in theirs:
            assert_equal(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    else:
        assert type(ours) is type(theirs) and ours == theirs


def read_back(path, value, **options):
    torch.save({"model": value}, path, **options)
    return torch_file.read(path, ["model"])["model"]


def write(path, pickled, compression=zipfile.ZIP_STORED, **storages):
    """Writes an archive as torch.save lays it out, of a pickle and the bytes of storages."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def assert_refused(path, message="", keys=("model",)):
    with pytest.raises(torch_file.TorchFileError) as caught:
        torch_file.read(path, keys)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and message in text
    assert text.isprintable()  # so it is one line
    assert len(text) < len(str(path)) + 400


@pytest.mark.parametrize("name", ["tiny_patch.pt", "tiny_frame.pt"])
def test_the_golden_files_are_what_torch_reads(name):
    found = torch_file.read(GOLDEN / name, ("cfg", "model"))
    assert_equal(found, torch.load(GOLDEN / name, weights_only=True))


def test_every_type_of_tensor_is_read(tmp_path):
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8",
                 "uint8", "bool"):  # fmt: skip
        dtype = getattr(torch, name)
        values = torch.linspace(0, 100, 24).to(dtype).reshape(2, 3, 4)
        special = [-0.0, float("inf"), float("nan"), -1e-7] if dtype.is_floating_point else [1, 0]
        both = [values, torch.tensor(special, dtype=dtype)]
        assert_equal(read_back(tmp_path / "a.pt", both), both)


def test_every_view_of_a_storage_is_read(tmp_path):
    base = torch.arange(60.0).reshape(3, 4, 5)
    views = {
        "whole": base, "transposed": base.transpose(0, 2), "offset": base[1:], "first": base[:1],
        "strided": base[:, ::2, 1::3], "one value": base[1, 2, 3], "sizes of one": base[:1, :, :1],
        "no axis": torch.tensor(3.0), "empty": torch.zeros(3, 0, 2),
        "empty at the end": base.flatten()[60:],
    }  # fmt: skip
    assert_equal(read_back(tmp_path / "a.pt", views), views)


def test_tied_weights_take_memory_once(tmp_path):
    weight = torch.ones(1000)
    found = read_back(tmp_path / "a.pt", {"a": weight, "b": weight.detach(), "c": weight[:500]})
    assert np.shares_memory(found["a"], found["b"]) and np.shares_memory(found["a"], found["c"])


class Color(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Paint:
    color: Color = Color.RED


def test_state_dicts_and_configurations_become_plain(tmp_path, monkeypatch):
    omegaconf = pytest.importorskip("omegaconf")
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    plain = {
        "a": 1, "b": {"c": [1, 2.5, None, [True, {"x": "µ\n"}]], "missing": "???", "e": {}},
        3: "${b}", "none": None,
    }  # fmt: skip
    config = omegaconf.OmegaConf.create(plain | {"paint": Paint()})
    config._metadata.object_type = Color  # as the dataclass of a structured configuration is
    saved = {
        "state": module.state_dict(),
        "parameters": dict(module.named_parameters()),
        "cfg": config,
        "args": argparse.Namespace(rate=0.5, more=argparse.Namespace(items=[1, (2,)])),
    }
    torch.save({"model": saved}, tmp_path / "a.pt")
    for name in ("torch", "omegaconf", "argparse"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it raises
    found = torch_file.read(tmp_path / "a.pt", ["model"])["model"]
    monkeypatch.undo()
    assert_equal(found["state"], dict(saved["state"]))
    assert_equal(found["parameters"], saved["parameters"])
    assert_equal(found["cfg"], plain | {"paint": {"color": "red"}})
    assert_equal(found["args"], {"rate": 0.5, "more": {"items": [1, (2,)]}})


def test_other_protocols_are_read(tmp_path):
    value = {"a": [1, -1, 10**30, 1.5], "w": torch.ones(2), "long": "x" * 300, None: (True, ())}
    for protocol in (3, 4):
        assert_equal(read_back(tmp_path / "a.pt", value, pickle_protocol=protocol), value)


def test_other_keys_may_hold_anything_and_are_not_read(tmp_path):
    path = tmp_path / "a.pt"
    other = torch.full((10_000,), 1.0)
    saved = {"extra_state": {"when": datetime.timedelta(1), 1: np.ones(1), 2: {(1, 2): {3}}}}
    saved |= {"model": {"w": torch.ones(3)}, "optimizer": [other, Color.RED], 7: Color.RED}
    torch.save(collections.OrderedDict(saved), path)
    whole = path.read_bytes()
    place = whole.index(other.numpy().tobytes()[:1000])
    path.write_bytes(whole[:place] + b"x" + whole[place + 1 :])
    assert_equal(torch_file.read(path, ["model"]), {"model": saved["model"]})
    assert_refused(path, "Bad CRC-32", ["optimizer"])
    assert_refused(path, "it holds 'datetime.timedelta', but only tensors", ["extra_state"])


def test_missing_keys_are_named(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"args": 1, "model": {}}, path)
    message = "expected a dict with the keys cfg, model, found ['args', 'model']"
    assert_refused(path, message, ("cfg", "model"))
    torch.save([torch.ones(2)], path)
    assert_refused(path, "found no dict")


def test_objects_of_other_classes_are_refused_by_name(tmp_path):
    for value, name in [
        ([{"a": pathlib.Path("a")}], "pathlib"),
        (list, "__builtin__.list"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (collections.Counter("a"), "collections.Counter"),
        (np.ones(1), "numpy._core.multiarray._reconstruct"),
        (torch.ones(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (torch.ones(2, dtype=torch.complex64), "torch.ComplexFloatStorage"),
    ]:
        torch.save({"model": value}, tmp_path / "a.pt")
        assert_refused(tmp_path / "a.pt", name)
    torch.save({"model": {(1, 2): 3}}, tmp_path / "a.pt")
    assert_refused(tmp_path / "a.pt", "keys that are no plain values")


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def test_nothing_in_a_file_is_run(tmp_path):
    sentinel = tmp_path / "sentinel"
    touch = f"touch {sentinel}"
    start = b"}X\x05\x00\x00\x00model"
    text = b"X" + len(touch).to_bytes(4, "little") + touch.encode()
    for hostile in (
        pickle.dumps({"model": Call(os.system, touch)}, 2),
        pickle.dumps({"model": Call(collections.OrderedDict, Call(os.system, touch))}, 2),
        b"\x80\x04" + start + b"\x8c\x02os\x8c\x06system\x93(" + text + b"tRs.",
        start + b"(" + text + b"ios\nsystem\ns.",  # an instance of a class
        b"\x80\x02" + start + b"\x82\x01s.",  # a name from copyreg's registry
        start + b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04K\x05K\x06tRs.",
        start + b"ca\\nb\n" + b"\\x1b" * 1000 + b"\ns.",  # a message of many lines
        start + b"]q\x00h\x00as.",  # a list in itself
    ):
        assert_refused(write(tmp_path / "a.pt", hostile))
        assert not sentinel.exists()


def test_a_file_cannot_hold_more_than_its_size(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model": torch.arange(3.0)[:, None].expand(3, 4)}, path)
    assert_refused(path, "a tensor of shape [3, 4] in it does not fit its storage of 3 values")
    write(path, pickle.dumps({"model": "a" * 1_000_000}, 2), zipfile.ZIP_DEFLATED)
    assert_refused(path, "its members are larger than the file")
    tensor = read_back(path, torch.arange(6.0))
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("a/data.pkl")
    assert b"K\x06\x85" in pickled  # the shape
    write(path, pickled.replace(b"K\x06\x85", b"K\x07\x85"), **{"0": tensor.tobytes()})
    assert_refused(path, "a tensor of shape [7] in it does not fit its storage of 6 values")


def test_damaged_files_and_other_kinds_of_files_are_refused(tmp_path):
    whole = (GOLDEN / "tiny_patch.pt").read_bytes()
    path = tmp_path / "a.pt"
    for size in [0, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert_refused(path, "torch.save of torch 1.6 or later did not write it, or it is damaged")
    for place in (len(whole) // 2, 1000):  # in a storage, in the pickle
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert_refused(path, "Bad CRC-32")
    torch.save({"model": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert_refused(path, "torch.save of torch 1.6 or later did not write it")
    np.savez(tmp_path / "a.npz", a=1)
    assert_refused(tmp_path / "a.npz", "it holds 0 files data.pkl, but torch.save writes one")
