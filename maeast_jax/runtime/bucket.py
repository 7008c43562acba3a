"""Objects of Google Cloud Storage, many at a time or from and to files of this machine, by gcsfs.

What `paths` does not: epath reads and writes one, through memory.
"""

import concurrent.futures
import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from etils import epath

from maeast_jax.runtime import storage

_THREADS = 32  # that wait for answers

Item = TypeVar("Item")
Result = TypeVar("Result")

# Size in bytes and generation, which an object of the same name and other content does not have.
Stamp = tuple[int, int]


def each(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`function` of every item, in order, many at a time: an answer takes its time to come."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(function, items))


def listing(folder: epath.Path) -> list[str]:
    """The addresses of all objects below a folder, sorted; none where there is no such folder."""
    found = _store().find(str(folder), update_cache=False)
    return sorted(f"gs://{name}" for name in found)


def stamps(names: Iterable[str]) -> dict[str, Stamp]:
    """The stamps of the objects that are there, of these addresses.

    Whole folders are listed, a thousand objects an answer.

    Raises ValueError, in one line, where they cannot be.
    """
    names = set(names)
    found = {}
    folders = sorted({name.rpartition("/")[0] for name in names})
    if folders:
        with storage.reaching(folders[0]):
            for entries in each(_entries, folders):
                found.update(entries)
    return {name: found[name] for name in names & found.keys()}


def size(name: epath.Path) -> int:
    """In bytes. Raises FileNotFoundError."""
    return _store().size(str(name))


def fetch(name: str, file: Path) -> None:
    """Copies an object to a file of this machine, all of it or none."""
    _store().get_file(name, str(file))


@contextlib.contextmanager
def writing(folder: epath.Path) -> Iterator[Path]:
    """A folder of this machine; its files become objects in `folder`, if nothing is raised."""
    with tempfile.TemporaryDirectory() as here:
        yield Path(here)
        for file in sorted(Path(here).iterdir()):
            _store().put_file(str(file), str(folder / file.name))


def copy(names: list[str], targets: list[str]) -> None:
    """Copies objects to others, inside the store."""
    _store().copy(names, targets)


def remove(folder: epath.Path) -> None:
    """Removes all objects below a folder, which need not be there."""
    with contextlib.suppress(FileNotFoundError):
        _store().rm(str(folder), recursive=True)


@functools.cache
def _store():
    import fsspec

    # A listing that was kept would hide what workers add.
    return fsspec.filesystem("gcs", use_listings_cache=False)


def _entries(folder: str) -> dict[str, Stamp]:
    """The objects that lie in a folder itself."""
    try:
        entries = _store().ls(folder, detail=True)
    except FileNotFoundError:
        return {}
    return {
        f"gs://{entry['name']}": (entry["size"], int(entry["generation"]))
        for entry in entries
        if entry["type"] == "file"
    }
