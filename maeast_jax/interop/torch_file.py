"""Reads what torch.save writes, without torch and without running anything that is in it.

A file is a zip archive: a pickle, `data.pkl`, and a member for each storage. The pickle is read in
two steps. `torch_pickle` follows its opcodes to a graph in which a name is text and a call is a
name with arguments; `_Values` makes plain values of what that graph holds, and refuses each name
that it does not know. (Layout: torch/serialization.py and torch/_utils.py.)
"""

import collections
import os
import posixpath
import zipfile
from collections.abc import Collection
from typing import Any

import ml_dtypes
import numpy as np

from maeast_jax.interop.torch_pickle import Budget, Node, TorchFileError, parse

_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # a number that opens files of torch < 1.6
_DEEPEST = 100  # containers in one another; configurations have a few
_CHUNK_BYTES = 1 << 24
# fmt: off
_DTYPES = {
    f"torch.{name}Storage": np.dtype(dtype) for name, dtype in {
        "Double": np.float64, "Float": np.float32, "Half": np.float16, "Bool": np.bool_,
        "Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8,
        "BFloat16": ml_dtypes.bfloat16,
    }.items()
}
# fmt: on
_DTYPE_NAMES = {f"torch.{dtype.name}": dtype.name for dtype in _DTYPES.values()}
_DICTS = {"builtins.dict", "collections.OrderedDict", "collections.defaultdict"}
_NUMBERS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
_SCALARS = str | int | float | complex | bytes | None


def read(path: str | os.PathLike, keys: Collection[str] | None = None) -> Any:
    """What `torch.save` was given: containers and values, with tensors as numpy arrays.

    A tensor or parameter is a contiguous, writable array; bfloat16 is that of ml_dtypes. Arrays
    share memory only where tensors were the whole of one storage, as tied weights are. An
    argparse.Namespace is a dict; an omegaconf configuration is dicts and lists, in which
    interpolations and missing values ("???") are strings as they were written. A defaultdict is a
    dict, a torch.Size a tuple, a numpy scalar a Python number, the member of an enumeration in an
    omegaconf EnumNode its value; a torch.dtype, a torch.device or a path is its name.

    Args:
      path: the file.
      keys: of a dict, those that are wanted: the result is a dict of these alone, in this order.
        What the others hold is neither made nor read, so it may be anything. None: everything.

    Raises:
      TorchFileError: another kind of file, a damaged one, or one that holds anything else (by its
        module.name), a container in itself, containers more than 100 deep, or values that take
        over four times its size. With `keys`: no dict, or one without them, and its keys.
      OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            if _LEGACY_MAGIC in file.read(32):
                raise TorchFileError(
                    "it is of torch before 1.6; load and save it once with a newer torch"
                )
            with zipfile.ZipFile(file) as archive:
                return _read_archive(archive, os.fstat(file.fileno()).st_size, keys)
        except MemoryError:
            raise  # about this machine, not about the file
        except TorchFileError as error:
            raise TorchFileError(f"{path}: {error}") from None
        except Exception as error:  # Broken files raise errors of any type.
            reason = f"{type(error).__name__}: {error}"
            raise TorchFileError(
                f"{path}: torch.save did not write it, or it is damaged ({reason:.200}); copy it"
                " again, or save it again with torch 1.6 or later"
            ) from error


def _read_archive(archive: zipfile.ZipFile, file_bytes: int, keys: Collection[str] | None) -> Any:
    names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise TorchFileError(
            "it is a TorchScript program, expected weights; save its state_dict() with torch.save"
        )
    folders = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise TorchFileError(
            f"it holds {len(folders)} files data.pkl, expected the one of torch.save; name a .pt or"
            " .safetensors checkpoint, or a run's workdir"
        )
    # Members can overlap and views repeat values: a small file must not fill the memory.
    budget = Budget(file_bytes)
    values = _Values(archive, folders[0], budget)
    if f"{folders[0]}byteorder" in names and values.member("byteorder").tobytes() != b"little":
        raise TorchFileError("it is big-endian, expected little-endian; save it on such a machine")
    graph = parse(values.member("data.pkl").tobytes(), budget)
    return values.value(graph) if keys is None else values.entries(graph, keys)


def _hashable(value: Any) -> Any:
    """`value`; refuses what has no hash, and tuples of tuples, whose hash can take for ever."""
    if not all(isinstance(v, _SCALARS) for v in (value if isinstance(value, tuple) else [value])):
        raise TorchFileError(
            f"a {type(value).__name__} in it is a key or in a set, expected values or flat tuples"
        )
    return value


class _Values:
    """Makes plain values of a graph, each of its containers once."""

    def __init__(self, archive: zipfile.ZipFile, folder: str, budget: Budget):
        self._archive = archive
        self._folder = folder
        self._budget = budget
        self._storages: dict[str, np.ndarray] = {}
        self._made: dict[int, Any] = {}  # by id: a graph can hold one container many times
        self._open: set[int] = set()

    def member(self, name: str) -> np.ndarray:
        """uint8 [bytes] of a member of the archive, checked against its checksum."""
        info = self._archive.getinfo(self._folder + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise TorchFileError(f"its {name!r:.100} is compressed, expected stored")
        self._budget.spend(info.file_size)
        data = np.empty(info.file_size, np.uint8)
        with self._archive.open(info) as file:
            for start in range(0, len(data), _CHUNK_BYTES):
                chunk = data[start : start + _CHUNK_BYTES]
                if file.readinto(chunk) != len(chunk):
                    raise EOFError(f"its {name!r:.100} ends early")
        return data

    def entries(self, graph: Any, keys: Collection[str]) -> dict[str, Any]:
        """The values of `keys` in the dict that `graph` is; those of its other keys stay unmade."""
        found = None
        if isinstance(graph, Node) and graph.name in _DICTS and graph.arguments is not None:
            found = {key: value for key, value in graph.items if isinstance(key, str)}
        if found is None or not set(keys) <= set(found):
            raise TorchFileError(
                f"expected a dict with the keys {', '.join(keys)}, found"
                f" {'no dict' if found is None else list(found)!s:.200}; pass a file that has them"
            )
        return {key: self.value(found[key]) for key in keys}

    def value(self, graph: Any) -> Any:
        """The plain value of a node, tuple or scalar."""
        if isinstance(graph, _SCALARS):
            return graph
        key = id(graph)
        if key in self._open:
            raise TorchFileError("a container in it holds itself, which is not read")
        if key not in self._made:
            if len(self._open) == _DEEPEST:
                raise TorchFileError(f"its containers are more than {_DEEPEST} deep")
            self._open.add(key)
            self._made[key] = self._make(graph)
            self._open.remove(key)
        return self._made[key]

    def _make(self, node: tuple | Node) -> Any:
        if isinstance(node, tuple):
            return tuple(map(self.value, node))
        arguments = node.arguments or ()
        attributes = node.state.items if isinstance(node.state, Node) else []
        # A few bytes can give large arguments or a large state to one more call.
        sizeable = (arguments, attributes, *arguments)
        self._budget.spend(sum(len(a) for a in sizeable if isinstance(a, str | tuple | list)))
        fields = {key: graph for key, graph in attributes if isinstance(key, str)}
        match node.name, node.arguments:
            case "builtins.list", ():
                return [self.value(item) for item in node.items]
            case ("builtins.dict", ()) | ("collections.defaultdict", () | (_,)):
                return self._dict(node)
            case "collections.OrderedDict", ():
                ordered = collections.OrderedDict(self._dict(node))
                if "_metadata" in fields:  # of a module's state_dict
                    ordered._metadata = self.value(fields["_metadata"])
                return ordered
            case ("builtins.set" | "builtins.frozenset") as name, (items,):
                values = self.value(items)
                self._budget.spend(64 * len(values))
                return (set if name == "builtins.set" else frozenset)(map(_hashable, values))
            case "builtins.bytes", ():
                return b""
            case "_codecs.encode", (str(text), "latin1"):
                return text.encode("latin1")
            case "builtins.complex", (float(real), float(imaginary)):
                return complex(real, imaginary)
            case "argparse.Namespace", ():
                return self.value(node.state) if node.state else {}
            case name, () if name.startswith("omegaconf."):
                # Other fields describe the value, or lead back to what holds it.
                for field in {"_val", "_content"} & fields.keys():
                    match name, fields.get("enum_type"), fields[field]:
                        # An enumeration's member is its class called with its value.
                        case (
                            "omegaconf.nodes.EnumNode",
                            Node(name=enumeration, arguments=None),
                            Node(name=called, arguments=(str() | int() as member,), state=None),
                        ) if called == enumeration:
                            return member
                    return self.value(fields[field])
            case (
                "numpy.core.multiarray.scalar" | "numpy._core.multiarray.scalar",
                (Node(name="numpy.dtype", arguments=(str(kind), *_), state=(_, order, *_)), data),
            ) if kind in _NUMBERS and order in ("<", "|"):
                number = self.value(data)
                if isinstance(number, bytes) and len(number) == np.dtype(kind).itemsize:
                    return np.frombuffer(number, kind)[0].item()
            case (("pathlib.PosixPath" | "pathlib._local.PosixPath"), tuple(parts)):
                return posixpath.join("", *parts) or "."
            case name, None if name in _DTYPE_NAMES:
                return _DTYPE_NAMES[name]
            case "torch.device", (str(kind), *index):
                return ":".join([kind, *(f"{i:d}" for i in index)])
            case "torch.Size", (tuple(shape),):
                return self.value(shape)
            case "torch._utils._rebuild_parameter", (tensor, _, _):
                return self.value(tensor)
            case "torch._utils._rebuild_tensor_v2", (storage, offset, shape, strides, _, _):
                return self._tensor(storage.arguments[0], offset, shape, strides)
        raise TorchFileError(
            f"it holds {node.name!r:.100}, expected tensors, plain containers and plain values;"
            " save only those, such as a state_dict()"
        )

    def _dict(self, node: Node) -> dict:
        return {_hashable(self.value(key)): self.value(value) for key, value in node.items}

    def _tensor(self, storage: tuple, offset: int, shape: tuple, strides: tuple) -> np.ndarray:
        """A contiguous array of what a tensor shows of its storage."""
        _, kind, key, _, count = storage
        if kind.name not in _DTYPES:
            raise TorchFileError(f"it holds a tensor in {kind.name!r:.100}, which is not read")
        dtype, member = _DTYPES[kind.name], "data/" + key
        if member not in self._storages:
            self._storages[member] = self.member(member)
        data = self._storages[member]
        values = data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)[:count]
        sound = all(isinstance(n, int) and 0 <= n < 1 << 63 for n in (offset, *shape, *strides))
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if not sound or len(values) != count or (last >= count and 0 not in shape):
            raise TorchFileError(  # Past the storage is foreign memory.
                f"a tensor in it is outside its storage of {len(values)} values; copy it again"
            )
        strides_bytes = [stride * dtype.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(values[offset:], shape, strides_bytes)
        if view.flags.c_contiguous and view.nbytes == len(data):
            return values.reshape(shape)
        self._budget.spend(view.nbytes)
        return view.copy()
