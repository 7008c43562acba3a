"""Files of embeddings with the names of what they are of: NumPy's .npz and Parquet.

Both hold settings as JSON, so that a file says how it was made. Embeddings have named axes:
"layers" where there are all, "steps" (of time) where these are kept, "size".

| file     | content                                                                             |
|----------|-------------------------------------------------------------------------------------|
| .npz     | files [n], embeddings [n, size] or [n, layers, size], settings; with steps:         |
|          | embeddings [(layers,) total steps, size], all files one after the other, steps [n]  |
| .parquet | a row a file: file, embedding (lists of float32, nested as the axes are); settings  |
|          | are at pyarrow.parquet.read_metadata(path).metadata[b"settings"]                    |
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from maeast_jax.runtime import storage

SUFFIXES = (".npz", ".parquet")
_ROW_GROUP_BYTES = 64 << 20


def check(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Raises ValueError, in one line, where `open_writer` could not write to `path`."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--output={path} must end in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise ValueError(f"--output={path} is a folder: choose another name")
    if path.exists() and not overwrite:
        raise ValueError(f"--output={path} exists: choose another name, or pass --overwrite")
    if not path.parent.is_dir():
        raise ValueError(f"--output={path}: {path.parent} is not a folder; make it first")
    storage.make_writable(path.parent, "--output")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ValueError(
                f"--output={path} needs pyarrow: pip install pyarrow, or name an .npz file"
            ) from None


def open_writer(
    path: str | os.PathLike, axes: tuple[str, ...], settings: dict[str, Any]
) -> "_Writer":
    """The writer that the suffix of `path` asks for, to be used in a `with` statement.

    The file appears, or replaces one of its name, when the statement ends; not where it ends by an
    error or nothing was added. `settings` are written then: they may still grow.

    axes: of each embedding.
    """
    kind = _ParquetWriter if Path(path).suffix == ".parquet" else _NpzWriter
    return kind(Path(path), axes, settings)


def how_to_read(path: str | os.PathLike, axes: tuple[str, ...]) -> str:
    """Python that reads such a file, with each file's embedding at the same place as its name."""
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


class _Writer:
    """What both kinds share: a temporary file beside the final one."""

    def __init__(self, path: Path, axes: tuple[str, ...], settings: dict[str, Any]):
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._axes = axes
        self._settings = settings
        self._num_files = 0

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        try:
            if error_type is None and self._num_files:
                self._finish(json.dumps(self._settings))
                os.replace(self._partial, self._path)
            else:
                self._discard()
        finally:
            self._partial.unlink(missing_ok=True)

    def add(self, file: str, embedding: np.ndarray) -> None:
        """Takes in an embedding, float32 with the writer's axes."""
        self._num_files += 1
        self._add(file, embedding)

    def _add(self, file: str, embedding: np.ndarray) -> None:
        raise NotImplementedError

    def _finish(self, settings: str) -> None:
        """Writes the temporary file to its end."""
        raise NotImplementedError

    def _discard(self) -> None:
        """Lets go of the temporary file."""


class _NpzWriter(_Writer):
    """Collects in memory."""

    def __init__(self, *args):
        super().__init__(*args)
        self._partial.touch()  # what cannot be written is known before anything is computed
        self._files: list[str] = []
        self._embeddings: list[np.ndarray] = []

    def _add(self, file: str, embedding: np.ndarray) -> None:
        self._files.append(file)
        self._embeddings.append(embedding)

    def _finish(self, settings: str) -> None:
        arrays = {"files": np.array(self._files), "settings": np.array(settings)}
        if "steps" in self._axes:
            arrays["steps"] = np.array([e.shape[-2] for e in self._embeddings], np.int64)
            arrays["embeddings"] = np.concatenate(self._embeddings, axis=-2)
        else:
            arrays["embeddings"] = np.stack(self._embeddings)
        with open(self._partial, "wb") as file:
            np.savez(file, **arrays)


class _ParquetWriter(_Writer):
    """Writes a row group whenever 64 MiB have come together."""

    def __init__(self, *args):
        super().__init__(*args)
        self._writer = None
        self._rows: list[tuple[str, np.ndarray]] = []
        self._num_bytes = 0

    def _add(self, file: str, embedding: np.ndarray) -> None:
        self._rows.append((file, embedding))
        self._num_bytes += embedding.nbytes
        if self._num_bytes >= _ROW_GROUP_BYTES:
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        files, embeddings = zip(*self._rows, strict=True)
        table = pa.table(
            {"file": pa.array(files, pa.string()), "embedding": self._lists(embeddings)}
        )
        if self._writer is None:
            # Embeddings hardly repeat: a dictionary would be tried, and given up, for each group.
            self._writer = pq.ParquetWriter(self._partial, table.schema, use_dictionary=False)
        self._writer.write_table(table)
        self._rows, self._num_bytes = [], 0

    def _lists(self, embeddings: tuple[np.ndarray, ...]):
        """A list array of the embeddings: of fixed length along all axes but "steps"."""
        import pyarrow as pa

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

    def _finish(self, settings: str) -> None:
        if self._rows:
            self._write_group()
        self._writer.add_key_value_metadata({"settings": settings})
        self._writer.close()

    def _discard(self) -> None:
        if self._writer is not None:
            self._writer.close()
