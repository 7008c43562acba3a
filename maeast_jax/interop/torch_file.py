"""Reads checkpoints that torch.save wrote, without torch and without running anything in them.

Such a file is a zip archive: a pickle, `data.pkl`, and one member per tensor storage. The unpickler
here imports nothing: each name in the pickle becomes an empty class of that name, and its objects
keep the arguments and the state that the pickle gives them. Plain values are then made of the few
classes that a checkpoint needs. (Layout: torch/serialization.py and torch/_utils.py.)
"""

import io
import math
import os
import pickle
import zipfile
from collections.abc import Collection
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_DTYPES = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}


class TorchFileError(ValueError):
    """The file is not of torch.save, is damaged, or holds objects that are not read; one line."""


def read(path: str | os.PathLike, keys: Collection[str]) -> dict[str, Any]:
    """Returns the values of `keys` in the dict that `torch.save` was given.

    Tensors and parameters become read-only numpy arrays, bfloat16 that of ml_dtypes; tied weights
    share memory. An OrderedDict, an argparse.Namespace and an omegaconf configuration become plain
    dicts and lists. Other keys of the dict may hold anything, and their tensors are not read.

    Raises:
      TorchFileError: the file is of another kind or damaged, lacks a key, or holds an object of
        another class under one of `keys`.
      OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _Archive(archive, os.fstat(file.fileno()).st_size).read(keys)
        except MemoryError:
            raise  # the machine is at fault, not the file
        except TorchFileError as error:
            raise TorchFileError(f"{path}: {error}") from None
        except Exception as error:  # Damaged files raise errors of any type.
            raise TorchFileError(
                f"{path}: torch.save of torch 1.6 or later did not write it, or it is damaged "
                f"({error!r:.200}); copy it again, or load it with torch and save it again"
            ) from error


class _Named:
    """The base of the classes that stand for the names in a pickle."""

    def __new__(cls, *arguments):
        made = super().__new__(cls)
        made.arguments, made.items, made.fields = arguments, {}, {}
        return made

    def __setitem__(self, key, value):
        self.items[key] = value

    def __setstate__(self, state):
        self.fields = state

    def append(self, item):
        """Accepts the items of a list's subclass, which is not read."""


class _Storage(NamedTuple):
    kind: str
    key: str


class _Unpickler(pickle.Unpickler):
    def __init__(self, file):
        super().__init__(file)
        self._classes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> type:
        full = f"{module}.{name}"
        return self._classes.setdefault(full, type(full, (_Named,), {}))

    def persistent_load(self, identity: Any) -> _Storage:
        _, kind, key, _, _ = identity
        return _Storage(kind.__name__, key)


class _Archive:
    """An open archive in a file of `file_bytes`."""

    def __init__(self, archive: zipfile.ZipFile, file_bytes: int):
        self._archive = archive
        self._bytes_left = file_bytes
        self._storages: dict[_Storage, np.ndarray] = {}
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise TorchFileError(
                f"it holds {len(pickles)} files data.pkl, but torch.save writes one; name a .pt or "
                ".safetensors checkpoint, or a run's workdir"
            )
        self._folder = pickles[0].removesuffix("data.pkl")

    def read(self, keys: Collection[str]) -> dict[str, Any]:
        saved = _Unpickler(io.BytesIO(self._member("data.pkl"))).load()
        if type(saved).__name__ == "collections.OrderedDict":
            saved = saved.items
        if not isinstance(saved, dict) or not set(keys) <= set(saved):
            found = str(list(saved)) if isinstance(saved, dict) else "no dict"
            raise TorchFileError(
                f"expected a dict with the keys {', '.join(keys)}, found {found:.200}"
            )
        return {key: self._plain(saved[key]) for key in keys}

    def _member(self, name: str) -> bytes:
        info = self._archive.getinfo(self._folder + name)
        # Members that are compressed or overlap could be far larger than the file.
        self._bytes_left -= info.file_size
        if self._bytes_left < 0:
            raise TorchFileError("its members are larger than the file; save it with torch.save")
        return self._archive.read(info)

    def _plain(self, value: Any) -> Any:
        match value:
            case None | bool() | int() | float() | str():
                return value
            case dict():
                if not all(isinstance(key, str | int | float | None) for key in value):
                    raise TorchFileError("a dict in it has keys that are no plain values")
                return {key: self._plain(item) for key, item in value.items()}
            case list() | tuple():
                return type(value)(map(self._plain, value))
        name = type(value).__name__
        match name, value:
            case "collections.OrderedDict", _Named(arguments=()):
                return self._plain(value.items)
            case "argparse.Namespace", _Named():
                return self._plain(value.fields)
            case "torch._utils._rebuild_parameter", _Named(arguments=(tensor, *_)):
                return self._plain(tensor)
            case (
                "torch._utils._rebuild_tensor_v2",
                _Named(arguments=(_Storage() as storage, offset, tuple(shape), tuple(strides), *_)),
            ):
                return self._tensor(storage, offset, shape, strides)
            case "omegaconf.nodes.EnumNode", _Named(fields={"_val": _Named(arguments=(member,))}):
                return self._plain(member)
            case _, _Named(fields={"_val": content} | {"_content": content}) if name.startswith(
                "omegaconf."
            ):
                return self._plain(content)
        if isinstance(value, type):
            name = value.__name__
        raise TorchFileError(
            f"it holds {name!r:.100}, but only tensors, plain containers and values, and omegaconf "
            "configurations are read; save only those, such as a state_dict()"
        )

    def _tensor(self, storage: _Storage, offset: int, shape: tuple, strides: tuple) -> np.ndarray:
        if storage.kind not in _DTYPES:
            raise TorchFileError(f"it holds a tensor of {storage.kind!r:.100}, which is not read")
        if storage not in self._storages:
            data = self._member(f"data/{storage.key}")
            self._storages[storage] = np.frombuffer(data, _DTYPES[storage.kind])
        values = self._storages[storage]
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if 0 in shape:
            return np.zeros(shape, values.dtype)
        # Memory past the storage belongs to something else. A view that repeats values could take
        # far more memory than the file once it is copied.
        is_inside = min((offset, *shape, *strides)) >= 0 and last < len(values)
        if not is_inside or math.prod(shape) > len(values):
            raise TorchFileError(
                f"a tensor of shape {list(shape)!s:.100} in it does not fit its storage of "
                f"{len(values)} values; save a clone of it, or copy the file again"
            )
        strides_bytes = [stride * values.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(
            values[offset:], shape, strides_bytes, writeable=False
        )
