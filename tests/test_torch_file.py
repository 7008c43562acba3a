import argparse
import collections
import enum
import os
import pathlib
import pickle
import random
import subprocess
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from maeast_jax import torch_file

torch = pytest.importorskip("torch")
GOLDEN = pathlib.Path(__file__).parent / "golden"


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


def refused(path, pattern="."):
    with pytest.raises(torch_file.TorchFileError, match=pattern) as caught:
        torch_file.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.count(str(path)) == 1
    assert message.isprintable()  # so it is one line
    assert len(message) < len(str(path)) + 400


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
        },
    )


class Color(enum.Enum):
    RED = "red"
    BLUE = 2


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
    config = omegaconf.OmegaConf.create({**content, "color": Color.RED, "colors": [Color.BLUE]})
    config.path = pathlib.Path("/a/b")
    config.typed = omegaconf.DictConfig({"x": 1}, key_type=str, element_type=int)
    config.nothing = omegaconf.DictConfig(None)
    config.later = omegaconf.DictConfig("???")
    config._metadata.object_type = Color  # as the dataclass of a structured configuration is
    plain = {**content, "color": "red", "colors": [2], "path": "/a/b", "typed": {"x": 1}}
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
        from maeast_jax import torch_file
        print(torch_file.read(sys.argv[1]))
    """
    command = [sys.executable, "-c", program, tmp_path / "a.pt"]
    root = pathlib.Path(torch_file.__file__).parent.parent
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    assert printed == str({"cfg": plain, "args": {"a": 1}}) + "\n"


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments, *([state] if state else []))

    def __reduce__(self):
        return self.reduced


class Slotted:
    __slots__ = ("a",)

    def __init__(self):
        self.a = 1


def test_other_classes_are_refused_by_name(tmp_path):
    for value, name in [
        (Color.RED, "test_torch_file.Color"),
        ([{"a": Slotted()}], "test_torch_file.Slotted"),
        (list, "builtins.list"),
        ({"function": torch.save}, "torch.serialization.save"),
        ("".join, "builtins.getattr"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (collections.Counter("a"), "collections.Counter"),
        (np.float64(1), "numpy._core.multiarray.scalar"),
        (np.ones(1), "numpy._core.multiarray._reconstruct"),
        (bytearray(b"a"), "builtins.bytearray"),
        (torch.ones(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (torch.ones(2, dtype=torch.complex64), "torch.ComplexFloatStorage"),
        (torch.ones(2, dtype=torch.complex64).conj().imag, "torch._utils._rebuild_tensor_v2"),
        (torch.ones(2, dtype=torch.uint16), "torch._utils._rebuild_tensor_v3"),
        (argparse.Namespace(a=argparse.ArgumentParser), "argparse.ArgumentParser"),
        (torch.ones(2).untyped_storage(), "storage"),
    ]:
        torch.save(value, tmp_path / "a.pt")
        refused(tmp_path / "a.pt", f"a.pt: it holds .*'{name}'")


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def hostile(sentinel):
    """Pickles that would make the file `sentinel`, or that ask for more than data in other ways."""
    touch = f"touch {sentinel}"
    write_it = f"open({str(sentinel)!r}, 'w')"
    run = text(touch)
    calls = {
        "os.system": Call(os.system, touch),
        "eval": Call(eval, write_it),
        "exec": Call(exec, write_it),
        "open": Call(open, str(sentinel), "w"),
        "getattr": Call(getattr, "a", "upper"),
        "subprocess": Call(subprocess.check_call, ["touch", str(sentinel)]),
        "torch": Call(torch.save, 1, str(sentinel)),
        "state": Call(collections.OrderedDict, state={"__class__": Call(os.system, touch)}),
        "metadata": Call(collections.OrderedDict, state={"_metadata": Call(os.system, touch)}),
        "argument": Call(collections.OrderedDict, Call(os.system, touch)),
        "factory": Call(collections.defaultdict, Call(os.system, touch)),
        "key": {Call(os.system, touch): 1},
        "set": Call(set, [Call(os.system, touch)]),
        "dtype": Call(eval, "torch.float16"),
    }
    return {name: pickle.dumps(call, 2) for name, call in calls.items()} | {
        "global": b"cos\nsystem\n(" + run + b"tR.",
        "dotted": b"cargparse\nos.system\n(" + run + b"tR.",
        "method": b"ccollections\nOrderedDict.fromkeys\n(" + run + b"tR.",
        "omegaconf": b"comegaconf.os\nsystem\n(" + run + b"tR.",
        "omegaconf state": b"comegaconf.os\nsystem\n)\x81}" + text("_val") + b"cos\nsystem\n("
        + run + run + b"tRsb.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93(" + run + b"tR.",
        "instance": b"(" + run + b"ios\nsystem\n.",
        "object": b"(cos\nsystem\n" + run + b"o.",
        "extension": b"\x80\x02\x82\x01.",
        "setstate": b"ccollections\nOrderedDict\n)R}" + text("__setstate__") + b"cos\nsystem\nsb"
        + run + b"b.",
        "call of a call": b"c__builtin__\ngetattr\n(cos\nsystem\n" + run + b"tR(" + run + b"tR.",
        "call of a dict": b"}(" + run + b"tR.",
        "call of a text": run + b"(" + run + b"tR.",
        "int": b"c__builtin__\nint\n(" + text("9" * 10_000) + b"tR.",
        "bytes": b"c__builtin__\nbytes\n(J\xff\xff\xff\x7ftR.",
        "bag as a key": b"}cargparse\nNamespace\n)\x81Nsb.",
        "not a tensor": b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04K\x05K\x06tR.",
        "tensor of a dict": b"ctorch._utils\n_rebuild_tensor_v2\n(}K\x00)))NtR.",
        "other reference": text("a") + b"Q.",
        "many lines": b"ca\\nb\n" + b"\\x1b" * 1000 + b"\n.",
        "plain call of a call": b"ccollections\nOrderedDict\n)R)R.",
        "call of a type": b"ctorch\nfloat16\n)R.",
    }  # fmt: skip


@pytest.mark.parametrize("name", hostile(""))
def test_nothing_is_executed(tmp_path, name):
    sentinel = tmp_path / "sentinel"
    path = write(tmp_path / "a.pt", hostile(sentinel)[name])
    if name in ("factory", "state", "setstate"):
        assert torch_file.read(path) == {}  # What is not part of the value is not looked at.
    else:
        refused(path)
    assert not sentinel.exists()


def test_the_hostile_pickles_would_be_executed(tmp_path):
    for name in ("os.system", "eval", "open", "key", "set", "global", "stack global", "object"):
        sentinel = tmp_path / name.replace(" ", "_")
        pickle.loads(hostile(sentinel)[name])
        assert sentinel.exists()


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def tensor(count=4, offset=0, shape=(4,), strides=(1,), kind="Float", key="0"):
    """A pickled tensor."""
    storage = text("storage") + f"ctorch\n{kind}Storage\n".encode() + number(key) + text("cpu")
    view = number(offset) + number(shape) + number(strides)
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + storage
        + number(count)
        + b"tQ"
        + view
        + b"\x89NtR"
    )


# fmt: off
IMPOSSIBLE = [
    {"shape": (5,)}, {"shape": (2, 2)}, {"shape": (-1,)}, {"shape": (-1, -4), "strides": (1, 1)},
    {"shape": (0, -1), "strides": (1, 1)}, {"shape": 4}, {"shape": (4.0,)}, {"shape": ("4",)},
    {"shape": (1,) * 100, "strides": (1,) * 100}, {"shape": (2**62,)},
    {"offset": 1}, {"offset": 4}, {"offset": -1}, {"offset": 0.0}, {"strides": (None,)},
    {"shape": (2,), "strides": (4,)}, {"shape": (2,), "strides": (2**62,)},
    {"shape": (2,), "strides": (-1,)}, {"shape": (2,), "strides": (-1,), "offset": 3},
    {"shape": (2, 2), "strides": (2**63, 1)}, {"shape": (2**64 + 1,), "strides": (0,)},
    {"shape": (2**62, 2**62), "strides": (0, 0)}, {"shape": (2**40,), "strides": (0,)},
    {"count": 3}, {"count": 5}, {"count": -1}, {"count": 2**64}, {"count": "4"},
    {"key": "1"}, {"key": 0}, {"key": ("0",)}, {"key": "k\n" * 3000},
    {"kind": "Double"}, {"kind": "QInt8"},
]
# fmt: on


@pytest.mark.parametrize("change", IMPOSSIBLE, ids=lambda change: str(change)[:60])
def test_tensors_outside_their_storage_are_refused(tmp_path, change):
    storages = {0: np.arange(4, dtype=np.float32).tobytes() + b"x"}
    path = write(tmp_path / "a.pt", tensor() + b".", storages)
    np.testing.assert_array_equal(torch_file.read(path), np.arange(4, dtype=np.float32))
    refused(write(path, tensor(**change) + b".", storages))


def peak_bytes(function, *arguments):
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_small_file_cannot_fill_the_memory(tmp_path):
    view = tensor(1_000_000, 1, (999_999,), kind="Char")
    path = write(tmp_path / "a.pt", b"](" + view * 300 + b"e.", {0: bytes(1_000_000)})
    assert peak_bytes(refused, path, "over four times its size") < 100e6
    once = b"c_codecs\nencode\n(" + text("a" * 1_000_000) + b"q\x00" + text("latin1") + b"tR"
    again = b"c_codecs\nencode\n(h\x00" + text("latin1") + b"tR"
    path = write(path, b"](" + once + again * 300 + b"e.")
    assert peak_bytes(refused, path, "over four times its size") < 100e6
    a_set = b"c__builtin__\nset\n%b\x85R"
    many = number(list(range(10_000)))
    path = write(
        path,
        b"](" + a_set % (many + b"r\x00\x00\x01\x00") + a_set % b"j\x00\x00\x01\x00" * 400 + b"e.",
    )
    assert peak_bytes(refused, path, "over four times its size") < 100e6
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"N.")
        archive.getinfo("archive/data.pkl").file_size = 1 << 40
    refused(path, "over four times its size")


def test_a_large_file_is_in_memory_once(tmp_path):
    torch.save({str(i): torch.ones(2_000_000) for i in range(4)}, tmp_path / "a.pt")
    assert 32e6 < peak_bytes(torch_file.read, tmp_path / "a.pt") < 1.6 * 32e6


CONTAINERS = {
    "list": (b"]", b"", b"a"),
    "dict": (b"}", b"N", b"s"),
    "tuple": (b"", b"", b"\x85"),
    "namespace": (b"cargparse\nNamespace\n)\x81", b"}" + text("a"), b"sb"),
    "configuration": (b"comegaconf.nodes\nAnyNode\n)\x81", b"}" + text("_val"), b"sb"),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_of_any_depth_end(tmp_path, kind):
    made, opening, closing = CONTAINERS[kind]
    opening = made + opening
    path = write(tmp_path / "a.pt", opening * 40 + b"K\x07" + closing * 40 + b".")
    assert "7" in repr(torch_file.read(path))
    depth = 100_000 if kind == "tuple" else 5000  # a tuple of a tuple ... has a hash of its own
    deep = opening * depth + b"N" + closing * depth
    refused(write(path, deep + b"."), "more than 100 deep")
    refused(write(path, b"}" + deep + b"Ns."), "more than 100 deep")


@pytest.mark.parametrize("kind", [kind for kind in CONTAINERS if kind != "tuple"])
def test_containers_in_themselves_are_refused(tmp_path, kind):
    made, opening, closing = CONTAINERS[kind]
    cycle = made + b"q\x00" + opening + b"h\x00" + closing + b"."
    refused(write(tmp_path / "a.pt", cycle), "holds itself")


def test_a_container_held_many_times_is_one(tmp_path):
    """Sixty lists, of which each holds the one before twice: 2**60 lists, were they not shared."""
    read = torch_file.read(write(tmp_path / "a.pt", b"]" + b"q\x00]h\x00ah\x00a" * 60 + b"."))
    for _ in range(60):
        first, read = read
        assert first is read
    tuples = b"}K\x01\x85" + b"q\x00h\x00\x86" * 60 + b"Ns."  # their hash takes 2**60 steps
    refused(write(tmp_path / "a.pt", tuples), "a tuple in it is a key")


@pytest.mark.parametrize(
    "key", [[], {}, argparse.Namespace(), (1, []), ((1,),), frozenset()], ids=repr
)
def test_keys_without_a_quick_hash_are_refused(tmp_path, key):
    refused(write(tmp_path / "a.pt", b"}" + number(key) + b"Ns."), "in it is a key")
    a_set = b"c__builtin__\nset\n](" + number(key) + b"e\x85R."
    refused(write(tmp_path / "a.pt", a_set), "in it is a key or in a set")


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
