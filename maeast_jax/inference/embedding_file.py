"""Files that hold embeddings, the names of the embedded files and settings: .npz and Parquet.

The settings are JSON that says how the file was made. Embeddings have named axes: "layers" where
the file holds all layers, "steps" where it holds every time step, and "size".

| file     | content                                                                             |
|----------|-------------------------------------------------------------------------------------|
| .npz     | files [n], embeddings [n, size] or [n, layers, size], settings; with "steps":       |
|          | embeddings [(layers,) total steps, size], file after file, and steps [n]            |
| .parquet | one row per file: file, embedding (lists of float32, nested as the axes are); the   |
|          | settings are pyarrow.parquet.read_metadata(path).metadata[b"settings"]              |
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from maeast_jax.runtime import storage

SUFFIXES = (".npz", ".parquet")
_ROW_GROUP_BYTES = 64 << 20


def check(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Raises ValueError, in one line, if `open_writer` could not write to `path`."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--output={path} must end in {' or '.join(SUFFIXES)}")
    storage.check_output(path, overwrite)
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ValueError(
                f"--output={path} needs pyarrow: pip install pyarrow, or name an .npz file"
            ) from None


@contextlib.contextmanager
def open_writer(
    path: str | os.PathLike, axes: tuple[str, ...], settings: dict[str, Any]
) -> Iterator["_NpzWriter | _ParquetWriter"]:
    """Yields a writer with `add(file, embedding)`, for float32 embeddings with these axes.

    The file appears, or replaces another one, when the `with` statement ends. No file appears after
    an exception or if nothing was added. `settings` are written last, so they may still grow.
    """
    kind = _ParquetWriter if Path(path).suffix == ".parquet" else _NpzWriter
    with contextlib.suppress(_NothingAddedError), storage.whole(path) as partial:
        writer = kind(partial, axes)
        yield writer
        if not writer.files:
            raise _NothingAddedError
        writer.finish(json.dumps(settings))


def how_to_read(path: str | os.PathLike, axes: tuple[str, ...]) -> str:
    """Returns Python code that reads such a file into `files` and `embeddings`, in equal order."""
    path = os.fspath(path)
    if path.endswith(".npz"):
        lines = [
            "import numpy as np",
            f"f = np.load({path!r})",
            'files, embeddings = f["files"], f["embeddings"]',
        ]
        if "steps" in axes:
            lines.append('embeddings = np.split(embeddings, np.cumsum(f["steps"])[:-1], axis=-2)')
        return "; ".join(lines)
    if axes == ("size",):
        embeddings = 'np.stack(t["embedding"].to_numpy())'
    else:
        embeddings = '[np.array(e, np.float32) for e in t["embedding"].to_pylist()]'
    lines = [
        "import numpy as np, pyarrow.parquet as pq",
        f"t = pq.read_table({path!r})",
        f'files, embeddings = t["file"].to_pylist(), {embeddings}',
    ]
    return "; ".join(lines)


class _NothingAddedError(Exception):
    """Keeps `open_writer` from making a file."""


class _NpzWriter:
    """Collects the embeddings in memory."""

    def __init__(self, partial: Path, axes: tuple[str, ...]):
        self._partial = partial
        self._axes = axes
        self.files: list[str] = []
        self._embeddings: list[np.ndarray] = []

    def add(self, file: str, embedding: np.ndarray) -> None:
        self.files.append(file)
        self._embeddings.append(embedding)

    def finish(self, settings: str) -> None:
        arrays = {"files": np.array(self.files), "settings": np.array(settings)}
        if "steps" in self._axes:
            arrays["steps"] = np.array([e.shape[-2] for e in self._embeddings], np.int64)
            arrays["embeddings"] = np.concatenate(self._embeddings, axis=-2)
        else:
            arrays["embeddings"] = np.stack(self._embeddings)
        with open(self._partial, "wb") as file:
            np.savez(file, **arrays)


class _ParquetWriter:
    """Writes a row group per 64 MiB of embeddings."""

    def __init__(self, partial: Path, axes: tuple[str, ...]):
        self._partial = partial
        self._axes = axes
        self._writer = None
        self.files: list[str] = []
        self._embeddings: list[np.ndarray] = []  # of the last files, not yet written
        self._num_bytes = 0

    def add(self, file: str, embedding: np.ndarray) -> None:
        self.files.append(file)
        self._embeddings.append(embedding)
        self._num_bytes += embedding.nbytes
        if self._num_bytes >= _ROW_GROUP_BYTES:
            self._write_group()

    def finish(self, settings: str) -> None:
        if self._embeddings:
            self._write_group()
        self._writer.add_key_value_metadata({"settings": settings})
        self._writer.close()

    def _write_group(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = self.files[-len(self._embeddings) :]
        table = pa.table({"file": pa.array(files, pa.string()), "embedding": self._lists()})
        if self._writer is None:
            # Embeddings hardly repeat, so a dictionary would be tried and given up in each group.
            self._writer = pq.ParquetWriter(self._partial, table.schema, use_dictionary=False)
        self._writer.write_table(table)
        self._embeddings, self._num_bytes = [], 0

    def _lists(self):
        """Returns a list array of the embeddings, of fixed length along all axes but "steps"."""
        import pyarrow as pa

        embeddings = self._embeddings
        lists = pa.array(np.concatenate([embedding.ravel() for embedding in embeddings]))
        for axis in range(len(self._axes) - 1, -1, -1):
            if self._axes[axis] == "steps":
                lengths = [e.shape[axis] for e in embeddings]
                repeats = [int(np.prod(e.shape[:axis])) for e in embeddings]
                offsets = np.cumsum([0, *np.repeat(lengths, repeats)], dtype=np.int32)
                lists = pa.ListArray.from_arrays(offsets, lists)
            else:
                lists = pa.FixedSizeListArray.from_arrays(lists, embeddings[0].shape[axis])
        return lists
