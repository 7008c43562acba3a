"""Files that try to run something, or to take more than they are."""

import argparse
import collections
import os
import pickle
import subprocess
import zipfile

import numpy as np
import pytest
from test_torch_file import Color, peak_bytes, refused, write

from maeast_jax.interop import torch_file

torch = pytest.importorskip("torch")


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
        ([{"a": Slotted()}], "test_torch_file_hostile.Slotted"),
        (list, "builtins.list"),
        ({"function": torch.save}, "torch.serialization.save"),
        ("".join, "builtins.getattr"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (collections.Counter("a"), "collections.Counter"),
        (np.str_("a"), "numpy._core.multiarray.scalar"),
        (np.datetime64(1, "s"), "numpy._core.multiarray.scalar"),
        (np.longdouble(1), "numpy._core.multiarray.scalar"),
        (np.ones(1, [("a", "f4")])[0], "numpy._core.multiarray.scalar"),
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


def node(name, field, argument, enumeration=None):
    """A pickled omegaconf node that holds os.system(argument)."""
    declared = text("enum_type") + enumeration + b"s" if enumeration else b""
    called = text(field) + b"cos\nsystem\n(" + argument + b"tRs"
    return f"comegaconf.{name}\n".encode() + b")\x81}" + declared + called + b"b."


def scalar(kind, order, nbytes):
    """A pickled numpy scalar, zero."""
    dtype = b"cnumpy\ndtype\n(" + text(kind) + b"\x89\x88tR(K\x03" + text(order) + b"NNNtb"
    data = b"C" + bytes([nbytes]) + bytes(nbytes)
    return b"cnumpy.core.multiarray\nscalar\n(" + dtype + data + b"tR."


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
        "any node": node("nodes\nAnyNode", "_val", run),
        "enumeration of another class": node("nodes\nEnumNode", "_val", run, b"ccolors\nColor\n"),
        "enumeration without a class": node("nodes\nEnumNode", "_val", run, b"N"),
        "list node": node("listconfig\nListConfig", "_content", run),
        "content": node("dictconfig\nDictConfig", "_content", run),
        "dict in a node": b"comegaconf.dictconfig\nDictConfig\n)\x81}" + text("_content") + b"}"
        + text("a") + b"cos\nsystem\n(" + run + b"tRssb.",
        "number of another kind": scalar("O8", "<", 8),
        "number of another order": scalar("f4", ">", 4),
        "numbers": scalar("f4", "<", 8),
        "half a number": scalar("f4", "<", 2),
        "number of a call": scalar("f4", "<", 4).replace(b"C\x04\0\0\0\0", b"cos\nsystem\n("
        + run + b"tR"),
        "type of a call": scalar("f4", "<", 4).replace(text("f4"), b"cos\nsystem\n(" + run + b"tR"),
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


def test_numpy_scalars_are_one_number_each(tmp_path):
    assert torch_file.read(write(tmp_path / "a.pt", scalar("f4", "<", 4))) == 0
    pickles = hostile(tmp_path / "sentinel")
    for name in ("number of another kind", "number of another order", "numbers", "half a number"):
        refused(write(tmp_path / "a.pt", pickles[name]), "it holds 'numpy.core.multiarray.scalar'")
    refused(write(tmp_path / "a.pt", pickles["number of a call"]), "it holds 'os.system'")


def test_a_call_in_a_configuration_is_refused_by_its_name(tmp_path):
    pickles = hostile(tmp_path / "sentinel")
    for name in ("any node", "enumeration without a class", "content", "dict in a node"):
        refused(write(tmp_path / "a.pt", pickles[name]), "it holds 'os.system'")
    omegaconf = pytest.importorskip("omegaconf")
    torch.save(omegaconf.OmegaConf.create({"color": Color.RED}), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "it holds 'test_torch_file.Color'")


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
    path = write(path, b"]" * 1_000_000 + b".")
    assert peak_bytes(refused, path, "over four times its size") < 50e6
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"N.")
        archive.getinfo("archive/data.pkl").file_size = 1 << 40
    refused(path, "over four times its size")


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
