"""Reads what torch.save writes, without torch and without running anything that is in it.

A file is a zip archive: a pickle, `data.pkl`, and a member for each storage. The pickle is read in
two steps. `_parse` follows its opcodes to a graph in which a name is text and a call is a name with
arguments; `_Values` makes plain values of what that graph holds, and refuses each name that it does
not know. (Layout: torch/serialization.py and torch/_utils.py; opcodes: pickletools.)
"""

import collections
import os
import pickletools
import posixpath
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # a number that opens files of torch < 1.6
_DEEPEST = 100  # containers in one another; configurations have a few
_SPARE_BYTES = 1 << 26
_CHUNK_BYTES = 1 << 24
# fmt: off
_DTYPES = {
    f"torch.{name}Storage": np.dtype(dtype) for name, dtype in {
        "Double": np.float64, "Float": np.float32, "Half": np.float16, "Bool": np.bool_,
        "Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8,
        "BFloat16": ml_dtypes.bfloat16,
    }.items()
}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "BINBYTES",
    "SHORT_BINBYTES",
}
# fmt: on
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_DTYPE_NAMES = {f"torch.{dtype.name}": dtype.name for dtype in _DTYPES.values()}
_SCALARS = str | int | float | complex | bytes | None


class TorchFileError(ValueError):
    """A file that torch.save did not write, is damaged, or holds what is not read; one line."""


def read(path: str | os.PathLike) -> Any:
    """What `torch.save` was given: containers and values, with tensors as numpy arrays.

    A tensor or parameter is a contiguous, writable array; bfloat16 is that of ml_dtypes. Arrays
    share memory only where tensors were the whole of one storage, as tied weights are. An
    argparse.Namespace is a dict; an omegaconf configuration is dicts and lists, in which
    interpolations and missing values ("???") are strings as they were written. A defaultdict is a
    dict, a torch.Size a tuple; a torch.dtype, a torch.device or a path is its name.

    Raises:
      TorchFileError: another kind of file, a damaged one, or one that holds anything else (by its
        module.name), a container in itself, or containers more than 100 deep.
      OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            if _LEGACY_MAGIC in file.read(32):
                raise TorchFileError(
                    "it is of torch before 1.6; load and save it once with a newer torch"
                )
            with zipfile.ZipFile(file) as archive:
                return _read_archive(archive, os.fstat(file.fileno()).st_size)
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


def _read_archive(archive: zipfile.ZipFile, file_bytes: int) -> Any:
    names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise TorchFileError(
            "it is a TorchScript program, expected weights; save its state_dict() with torch.save"
        )
    folders = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise TorchFileError(f"it holds {len(folders)} files data.pkl, expected torch.save's one")
    values = _Values(archive, folders[0], file_bytes)
    if f"{folders[0]}byteorder" in names and values.member("byteorder").tobytes() != b"little":
        raise TorchFileError("it is big-endian, expected little-endian; save it on such a machine")
    return values.value(_parse(values.member("data.pkl").tobytes()))


class _Node:
    """A name (arguments are None) or a call of it, with what the pickle puts into the result.

    Lists and dicts are calls too, so that no key is hashed before it has been checked.
    """

    __slots__ = ("arguments", "items", "name", "state")

    def __init__(self, name: str, arguments: tuple | None = None):
        self.name = name
        self.arguments = arguments
        self.items = []  # of a dict: pairs
        self.state = None


def _parse(data: bytes) -> Any:
    """The graph that a pickle describes: nodes, tuples, scalars. Nothing is imported or called."""
    stack, marks, memo = [], [], {}
    for opcode, argument, _ in pickletools.genops(data):
        takes = opcode.stack_before
        if pickletools.stackslice in takes:  # what lies above the last mark, as a list
            mark = marks.pop()
            start = max(mark - takes.index(pickletools.markobject), 0)
            operands = [*stack[start:mark], stack[mark:]]
        else:
            start = max(len(stack) - len(takes), 0)
            operands = stack[start:]
        del stack[start:]
        match [opcode.name, *operands]:
            case [name, *_] if name in _LITERALS:
                stack.append(argument)
            case [name, *_] if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case ["BINPUT" | "LONG_BINPUT", *_]:
                memo[argument] = stack[-1]
            case ["BINGET" | "LONG_BINGET", *_]:
                stack.append(memo[argument])
            case ["MARK", *_]:
                marks.append(len(stack))
            case ["TUPLE1" | "TUPLE2" | "TUPLE3", *items] | ["TUPLE", list(items)]:
                stack.append(tuple(items))
            case ["EMPTY_DICT" | "EMPTY_LIST" as name, *_]:
                stack.append(_Node(f"builtins.{name.removeprefix('EMPTY_').lower()}", ()))
            case ["APPEND", _Node() as node, *items] | ["APPENDS", _Node() as node, list(items)]:
                node.items.extend(items)
                stack.append(node)
            case ["SETITEM", _Node() as node, *items] | ["SETITEMS", _Node() as node, list(items)]:
                node.items.extend(zip(items[::2], items[1::2], strict=True))
                stack.append(node)
            case ["GLOBAL", *_]:  # `__builtin__` is Python 2's name
                name = argument.replace(" ", ".", 1).replace("__builtin__.", "builtins.")
                stack.append(_Node(name))
            case ["REDUCE" | "NEWOBJ", _Node() as called, tuple(arguments)]:
                name = called.name if called.arguments is None else f"{called.name}()"
                stack.append(_Node(name, arguments))
            case ["BUILD", _Node() as node, state]:
                node.state = state
                stack.append(node)
            case ["BINPERSID", identity]:
                stack.append(_Node("storage", (identity,)))
            case ["STOP", graph]:
                return graph
            case [name, *_] if name not in ("PROTO", "POP"):
                raise TorchFileError(
                    f"its pickle uses {name} as torch.save's protocol 2 does not; save it with"
                    " torch.save and its default pickle_protocol"
                )
    raise EOFError("its pickle does not end")


def _hashable(value: Any) -> Any:
    """`value`; refuses what has no hash, and tuples of tuples, whose hash can take for ever."""
    if not all(isinstance(v, _SCALARS) for v in (value if isinstance(value, tuple) else [value])):
        raise TorchFileError(
            f"a {type(value).__name__} in it is a key or in a set, expected values or flat tuples"
        )
    return value


class _Values:
    """Makes plain values of a graph, each of its containers once."""

    def __init__(self, archive: zipfile.ZipFile, folder: str, file_bytes: int):
        self._archive = archive
        self._folder = folder
        # Members can overlap and views repeat values: a small file must not fill the memory.
        self._left_bytes = 4 * file_bytes + _SPARE_BYTES
        self._storages: dict[str, np.ndarray] = {}
        self._made: dict[int, Any] = {}  # by id: a graph can hold one container many times
        self._open: set[int] = set()

    def member(self, name: str) -> np.ndarray:
        """uint8 [bytes] of a member of the archive, checked against its checksum."""
        info = self._archive.getinfo(self._folder + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise TorchFileError(f"its {name!r:.100} is compressed, expected stored")
        self._spend(info.file_size)
        data = np.empty(info.file_size, np.uint8)
        with self._archive.open(info) as file:
            for start in range(0, len(data), _CHUNK_BYTES):
                chunk = data[start : start + _CHUNK_BYTES]
                if file.readinto(chunk) != len(chunk):
                    raise EOFError(f"its {name!r:.100} ends early")
        return data

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

    def _make(self, node: tuple | _Node) -> Any:
        if isinstance(node, tuple):
            return tuple(map(self.value, node))
        # A few bytes can give a large argument to one more call.
        self._spend(sum(len(a) for a in node.arguments or () if isinstance(a, str | tuple)))
        attributes = node.state.items if isinstance(node.state, _Node) else ()
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
                self._spend(64 * len(values))
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
                    match fields[field]:
                        case _Node(arguments=(str() | int() as member,), state=None):
                            return member  # An enumeration's is its class called with its value.
                        case content:
                            return self.value(content)
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

    def _dict(self, node: _Node) -> dict:
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
        self._spend(view.nbytes)
        return view.copy()

    def _spend(self, nbytes: int) -> None:
        self._left_bytes -= nbytes
        if self._left_bytes < 0:
            raise TorchFileError(
                "its values take over four times its size; save clones of its views"
            )
