import argparse
import collections
import dataclasses
import enum
import pathlib
import pickle
import subprocess
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from maeast_jax.interop import torch_file

torch = pytest.importorskip("torch")
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def equal(ours, theirs):
    """Asserts that what was read is what torch reads: types, shapes and bits, all the way down."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, np.ndarray)
        assert ours.flags.c_contiguous
        assert ours.flags.writeable
        if theirs.dtype == torch.bfloat16:
            assert ours.dtype == ml_dtypes.bfloat16
            ours, theirs = ours.view(np.int16), theirs.view(torch.int16)
        theirs = theirs.detach().numpy()
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert ours.tobytes() == theirs.tobytes()
    elif isinstance(theirs, dict):
        assert isinstance(ours, dict)
        assert list(ours) == list(theirs)
        for key in theirs:
            equal(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert isinstance(ours, list if isinstance(theirs, list) else tuple)
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            equal(one, other)
    else:
        assert type(ours) is type(theirs)
        assert ours == theirs


def saved(path, value, **options):
    torch.save(value, path, **options)
    return torch_file.read(path)


def write(path, pickled=b"N.", storages=None, compression=zipfile.ZIP_STORED, **members):
    """An archive as torch.save lays it out, of a pickle and of storages' bytes."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return path


def refused(path, pattern=".", **options):
    with pytest.raises(torch_file.TorchFileError, match=pattern) as caught:
        torch_file.read(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.count(str(path)) == 1
    assert message.isprintable()  # so it is one line
    assert len(message) < len(str(path)) + 400


def peak_bytes(function, *arguments):
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["tiny_patch.pt", "tiny_frame.pt"])
def test_checkpoints_are_what_torch_reads(name):
    equal(torch_file.read(GOLDEN / name), torch.load(GOLDEN / name, weights_only=True))


@pytest.mark.parametrize(
    "dtype",
    [
        *("float64", "float32", "float16", "bfloat16"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
    ],
)
def test_every_type(tmp_path, dtype):
    dtype = getattr(torch, dtype)
    values = torch.linspace(0, 100, 24).to(dtype).reshape(2, 3, 4)
    special = [-0.0, float("inf"), float("nan"), -1e-7] if dtype.is_floating_point else [1, 0]
    both = [values, torch.tensor(special, dtype=dtype)]
    equal(saved(tmp_path / "a.pt", both), both)


BASE = torch.arange(60.0).reshape(3, 4, 5)
VIEWS = {
    "whole": BASE,
    "transposed": BASE.transpose(0, 2),
    "offset": BASE[1:],
    "beginning": BASE[:1],
    "strided": BASE[:, ::2, 1::3],
    "one value": BASE[1, 2, 3],
    "0-d": torch.tensor(3.0),
    "empty": torch.zeros(0),
    "empty of a shape": torch.zeros(3, 0, 2),
    "empty view at the end": BASE.flatten()[60:],
    "repeated": torch.arange(3.0)[:, None].expand(3, 4),
    "sizes of one": BASE[:1, :, :1],
    "overlapping": torch.arange(10.0).as_strided((4, 3), (2, 1)),
    "flat": BASE.flatten(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_every_view(tmp_path, name):
    equal(saved(tmp_path / "a.pt", VIEWS[name]), VIEWS[name])


def test_views_of_one_storage_are_copies(tmp_path):
    base = torch.arange(12.0)
    halves = saved(tmp_path / "a.pt", [base[:6], base[3:9], base.reshape(3, 4).t()])
    halves[0][:] = -1
    np.testing.assert_array_equal(halves[1], np.arange(3, 9))
    np.testing.assert_array_equal(halves[2], np.arange(12).reshape(3, 4).T)


def test_tied_weights_take_memory_once(tmp_path):
    weight = torch.ones(1 << 20)
    model = {str(i): weight.detach() for i in range(100)}  # 400 MB if they were copies
    read = saved(tmp_path / "a.pt", model)
    assert len(read) == 100
    assert all(np.shares_memory(read["0"], array) for array in read.values())


def test_parameters_and_a_state_dict_with_its_metadata(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = module.state_dict()
    read = saved(tmp_path / "a.pt", state)
    assert type(read) is collections.OrderedDict
    equal(read, state)
    assert read._metadata == state._metadata
    parameters = dict(module.named_parameters())
    equal(saved(tmp_path / "a.pt", parameters), parameters)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    equal(saved(tmp_path / "a.pt", optimizer.state_dict()), optimizer.state_dict())


@pytest.mark.parametrize("protocol", [2, 3])
def test_plain_values_stay_what_they_are(tmp_path, protocol):
    shared = [1]
    value = {
        "text": "µ\n",
        "": [True, False, None, 0, -1, 255, 256, 65_536, -(2**31), 2**31, 10**30, -(10**700)],
        1: (1.5, -0.0, float("inf"), 1e300, 2 - 3j, b"", b"a\xff", "x" * 300, b"y" * 300),
        (2, "b"): [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, set(), frozenset()],
        None: [{1, "a", (2, 3)}, frozenset({b"b"}), collections.OrderedDict(b=1, a=2)],
        2.5: [shared, shared],
    }
    read = saved(tmp_path / "a.pt", value, pickle_protocol=protocol)
    equal(read, value)
    assert read[2.5][0] is read[2.5][1]


def test_what_becomes_plain(tmp_path):
    counts = collections.defaultdict(list)
    counts["a"].append(1)
    value = {
        "counts": counts,
        "size": torch.Size([2, 3]),
        "types": [torch.float16, torch.bfloat16, torch.bool, torch.int64],
        "devices": [torch.device("cpu"), torch.device("cuda", 1)],
        "paths": [pathlib.Path("/a/b.wav"), pathlib.Path()],
        "arguments": argparse.Namespace(rate=0.5, more=argparse.Namespace(), items=[1]),
        "floats": [np.float64(1 / 3), np.float32(0.5), np.float16(-2), np.float64(-np.inf)],
        "integers": [np.int64(-(2**63)), np.uint64(2**64 - 1), np.int8(-1), np.uint16(65_535)],
        "truth": (np.bool_(True), np.bool_(False)),
    }
    equal(
        saved(tmp_path / "a.pt", value),
        {
            "counts": {"a": [1]},
            "size": (2, 3),
            "types": ["float16", "bfloat16", "bool", "int64"],
            "devices": ["cpu", "cuda:1"],
            "paths": ["/a/b.wav", "."],
            "arguments": {"rate": 0.5, "more": {}, "items": [1]},
            "floats": [1 / 3, 0.5, -2.0, -float("inf")],
            "integers": [-(2**63), 2**64 - 1, -1, 65_535],
            "truth": (True, False),
        },
    )


class Color(enum.Enum):
    RED = "red"
    BLUE = 2


@dataclasses.dataclass
class Paint:
    color: Color = Color.RED
    colors: list[Color] = dataclasses.field(default_factory=lambda: [Color.BLUE])
    other: Color | None = None


def configuration():
    """A configuration, and what it comes out as."""
    omegaconf = pytest.importorskip("omegaconf")
    content = {
        "a": 1,
        "b": {"c": [1, 2.5, None, [True, {"x": "y"}]], "missing": "???", "same": "${a}", "e": {}},
        "none": None,
        3: [b"bytes", []],
        "whole": "${b}",
    }
    config = omegaconf.OmegaConf.create({**content, "paint": Paint()})
    config.path = pathlib.Path("/a/b")
    config.typed = omegaconf.DictConfig({"x": 1}, key_type=str, element_type=int)
    config.nothing = omegaconf.DictConfig(None)
    config.later = omegaconf.DictConfig("???")
    config._metadata.object_type = Color  # as the dataclass of a structured configuration is
    paint = {"color": "red", "colors": [2], "other": None}
    plain = {**content, "paint": paint, "path": "/a/b", "typed": {"x": 1}}
    return config, {**plain, "nothing": None, "later": "???"}


def test_omegaconf_becomes_plain(tmp_path):
    config, plain = configuration()
    value = {"cfg": config, "part": config.b.c, "node": config._get_node("a"), "w": torch.ones(2)}
    expected = {"cfg": plain, "part": plain["b"]["c"], "node": 1, "w": torch.ones(2)}
    equal(saved(tmp_path / "a.pt", value), expected)


def test_neither_torch_nor_omegaconf_nor_argparse_is_needed(tmp_path):
    config, plain = configuration()
    torch.save({"cfg": config, "args": argparse.Namespace(a=1)}, tmp_path / "a.pt")
    program = """if True:
        import sys
        for name in ("torch", "omegaconf", "argparse"):
            sys.modules[name] = None  # an import of it raises
        from maeast_jax.interop import torch_file
        print(torch_file.read(sys.argv[1]))
    """
    command = [sys.executable, "-c", program, tmp_path / "a.pt"]
    root = pathlib.Path(torch_file.__file__).parents[2]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    assert printed == str({"cfg": plain, "args": {"a": 1}}) + "\n"


def test_a_large_file_is_in_memory_once(tmp_path):
    torch.save({str(i): torch.ones(2_000_000) for i in range(4)}, tmp_path / "a.pt")
    assert 32e6 < peak_bytes(torch_file.read, tmp_path / "a.pt") < 1.6 * 32e6


def test_other_kinds_of_files(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"RIFF" + bytes(100))
    refused(path, "torch.save did not write it")
    path.write_bytes(pickle.dumps({"a": 1}))
    refused(path, "torch.save did not write it")
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    refused(path, "torch before 1.6; load and save it once")
    torch.save({"a": 1}, path, pickle_protocol=4)
    refused(path, "uses FRAME as torch.save's protocol 2 does not")
    np.savez(tmp_path / "a.npz", a=1)
    refused(tmp_path / "a.npz", "0 files data.pkl")
    refused(write(path, **{"inner/data.pkl": b"N."}), "2 files data.pkl")
    refused(write(path, **{"constants.pkl": b"N."}), r"TorchScript.*state_dict\(\)")
    refused(write(path, byteorder=b"big"), "big-endian")
    refused(write(path, compression=zipfile.ZIP_DEFLATED), "'data.pkl' is compressed")
    assert torch_file.read(write(path, byteorder=b"little")) is None
    assert torch_file.read(write(path)) is None  # as before torch 2.1


def test_what_cannot_be_opened_says_so_itself(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        torch_file.read(tmp_path / "absent.pt")
    with pytest.raises(IsADirectoryError):
        torch_file.read(tmp_path)
