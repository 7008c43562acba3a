"""Which files go into a data set: a folder tree, with ids, labels and splits."""

import collections
import dataclasses
import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from etils import epath

from maeast_jax.data import AUDIO_SUFFIXES
from maeast_jax.runtime import storage, terminal

# Names that lists and folders have for the same split; their case does not matter.
_SPLIT_NAMES = {
    "train": "train", "training": "train",
    "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


class ManifestError(ValueError):
    """A source of files that cannot be used; the message is one line with the remedy."""


@dataclasses.dataclass(frozen=True, slots=True)
class AudioFile:
    """A file that goes into a data set.

    Attributes:
      path: where the file lies; may be gs://BUCKET/...
      id: its path below the folder that the listing starts at, as printable text.
      label: the name of its class; None in sets without labels; in multi-label sets the names of
        all classes that hold.
      split: None until `assign_splits`.
      piece_seconds: the length of the pieces that it is cut into; None for the build's own length.
      listed_seconds: the length that the data set's own list gives; None where it gives none.
    """

    path: str
    id: str
    label: str | tuple[str, ...] | None = None
    split: str | None = None
    piece_seconds: float | None = None
    listed_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files that go into a data set, their classes, and the clips that are missing.

    Attributes:
      files: at least one.
      label_names: the classes in the order of their numbers, None for a set without labels.
      missing: (id, split) of the clips that the data set's own lists name and its folder lacks.
      notes: lines for the terminal that say what the listing leaves out, renames or repeats.
    """

    files: list[AudioFile]
    label_names: tuple[str, ...] | None
    missing: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, files: list[AudioFile], notes: Sequence[str] = ()) -> "Listing":
        """Returns the listing of files whose classes are numbered in alphabetical order."""
        if isinstance(files[0].label, tuple):
            names = {name for file in files for name in file.label}
        else:
            names = {file.label for file in files} - {None}
        alike = collections.Counter(map(str.casefold, names))
        if apart := [name for name in sorted(names) if alike[name.casefold()] > 1]:
            notes = [*notes, f"labels that differ in case alone: {', '.join(apart[:8])}"]
        return cls(files, tuple(sorted(names)) or None, notes=notes)

    @property
    def by_split(self) -> dict[str, list[AudioFile]]:
        """The files of each split, the splits in alphabetical order."""
        splits = sorted({file.split for file in self.files})
        return {split: [file for file in self.files if file.split == split] for split in splits}

    @property
    def is_multi_label(self) -> bool:
        """Whether a file may be of several classes, or of none."""
        return isinstance(self.files[0].label, tuple)


def list_folder(audio_dir: str | os.PathLike, label_from_folder: bool = False) -> Listing:
    """Lists every audio file below a folder, which may be on gs://, sorted, without hidden ones.

    Where each file lies in a folder whose name is a split's, and these folders name two splits or
    more, they give the files their splits.

    Args:
      label_from_folder: a file's label is the name of the outermost folder that it lies in, apart
        from the folder that names its split and from folders that hold all files.

    Raises:
      ManifestError: the folder does not exist or holds no audio file; or a file lies in no
        subfolder that could be its label.
    """
    root = storage.path(audio_dir)
    with storage.reaching(root):
        if not root.is_dir():
            raise ManifestError(f"--audio_dir={audio_dir} is not a directory: check the path")
        paths, notes = audio_below(root)
    ids = [PurePosixPath(file_id(root / path, root)) for path in paths]
    split_folders, split_notes = _split_folders(ids)
    labels, label_notes = [None] * len(ids), []
    if label_from_folder:
        labels, label_notes = _folder_labels(ids, split_folders)
    files = [
        AudioFile(str(root / path), str(name), label, folder and split_name(folder))
        for path, name, label, folder in zip(paths, ids, labels, split_folders, strict=True)
    ]
    return Listing.of(files, notes + split_notes + label_notes)


def _folder_labels(
    paths: Sequence[PurePosixPath], split_folders: Sequence[str | None]
) -> tuple[list[str], list[str]]:
    """Returns the label of each file, as `list_folder` describes it; and notes."""
    folders = [list(path.parent.parts) for path in paths]
    for parts, split_folder in zip(folders, split_folders, strict=True):
        if split_folder:
            parts.remove(split_folder)
    if bare := [path for path, parts in zip(paths, folders, strict=True) if not parts]:
        raise ManifestError(
            f"--label_from_folder: {len(bare)} files, e.g. {bare[0]}, lie in no folder that could"
            " be their label: move them into folders of their classes, or drop the flag"
        )
    levels = zip(*(parts[:-1] for parts in folders), strict=False)  # as deep as all files lie
    depth = len(list(itertools.takewhile(lambda names: len({*names}) == 1, levels)))
    labels = [label_name(parts[depth]) for parts in folders]
    parts, label, path = max(zip(folders, labels, paths, strict=True), key=lambda row: len(row[0]))
    notes = [f"labels are the outermost folders, such as {label} of {path}"]
    return labels, notes if len(parts) > 1 else []


def list_named(paths: Sequence[str | os.PathLike]) -> tuple[list[str], list[str]]:
    """Returns the named files and the audio files in the named folders, each once; and notes.

    The notes are lines for the terminal that say what is left out of the folders.

    Raises ValueError where no path is given, a path does not exist, or a folder has no audio file.
    """
    if not paths:
        raise ValueError("no FILE: name audio files, or folders of them")
    found: dict[str, str] = {}
    notes: list[str] = []
    for path in map(os.path.expanduser, paths):
        if not os.path.exists(path):
            raise ValueError(f"{path} is not there; check the path")
        files = [path]
        if os.path.isdir(path):
            below, of_folder = audio_below(Path(path))
            files = [os.path.join(path, file) for file in below]
            notes += [f"{path}: {note}" for note in of_folder]
        for file in files:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values()), notes


def audio_below(root: Path | epath.Path) -> tuple[list[PurePosixPath], list[str]]:
    """Returns the audio files below a folder, as sorted paths below it, without hidden ones; notes.

    Raises ManifestError where there is none.
    """
    below, notes = _files_below(root)
    found = sorted(path for path in below if is_audio(path))
    others = collections.Counter(
        path.suffix.lower() or "without a suffix" for path in below if not is_audio(path)
    )
    if others:
        commonest = sorted(others, key=lambda suffix: (-others[suffix], suffix))
        shown = ", ".join(f"{others[suffix]} {suffix}" for suffix in commonest[:8])
        notes.append(f"left out by their names: {shown}{', ...' if len(others) > 8 else ''}")
    if not found:
        raise ManifestError("; ".join([f"no audio file below {root}: check the path", *notes]))
    return found, notes


def is_audio(path: PurePosixPath) -> bool:
    """Returns whether a file's suffix is one of the formats that decode."""
    return path.suffix.lower() in AUDIO_SUFFIXES


def _files_below(root: Path | epath.Path) -> tuple[list[PurePosixPath], list[str]]:
    """Returns the files below a folder, without hidden ones; and notes. Links are followed."""
    if storage.is_remote(root):
        import fsspec

        filesystem, folder = fsspec.core.url_to_fs(str(root))
        found = [PurePosixPath(name).relative_to(folder) for name in filesystem.find(folder)]
        return [p for p in found if not any(part.startswith(".") for part in p.parts)], []
    found, failed = [], []
    names = collections.defaultdict(list)  # of each folder, by its real path
    above = {os.fspath(root): ()}  # the real paths above a folder
    for folder, folders, files in os.walk(root, onerror=failed.append, followlinks=True):
        below, real = PurePosixPath(os.path.relpath(folder, root)), os.path.realpath(folder)
        if real in above[folder]:  # a link that leads back up, round and round
            folders.clear()
            continue
        names[real].append(below)
        folders[:] = [name for name in folders if not name.startswith(".")]
        above |= {os.path.join(folder, name): (*above[folder], real) for name in folders}
        found += [below / name for name in files if not name.startswith(".")]
    notes = [f"left out: {error.filename}, {terminal.one_line(error)}" for error in failed]
    if repeated := sorted(map(sorted, (same for same in names.values() if len(same) > 1))):
        first = " and ".join(map(str, repeated[0]))
        notes.append(
            f"folders that links repeat: {len(repeated)}, e.g. {first} are one folder; its files"
            " are taken once per name"
        )
    return found, notes


# --- splits ------------------------------------------------------------------------------------


def split_name(name: str) -> str:
    """Returns the split's name in data sets: lower case, and one name where there are several."""
    return _SPLIT_NAMES.get(name.lower(), name.lower())


def _split_folders(paths: Sequence[PurePosixPath]) -> tuple[list[str | None], list[str]]:
    """Returns for each file the outermost folder that names its split, or None for all; and notes.

    One folder `train` may be a class. Folders are splits where they name two or more, and each
    file lies in one of them.
    """
    folders = [
        next((part for part in path.parent.parts if part.lower() in _SPLIT_NAMES), None)
        for path in paths
    ]
    names = sorted({*folders} - {None})
    none = [None] * len(paths)
    if len({*map(split_name, names)}) < 2:
        return none, []
    if None in folders:
        return none, [
            f"splits are not taken from the folders {', '.join(names)}: {folders.count(None)}"
            f" files, e.g. {paths[folders.index(None)]}, lie in none of them"
        ]
    return folders, [
        f"splits are taken from the folders {', '.join(names)}",
        *renamed_splits(names),
    ]


def renamed_splits(names: Iterable[str]) -> list[str]:
    """Returns a note on the splits that a data set has under another name."""
    renamed = [f"{name} is {split_name(name)}" for name in sorted({*names})
               if name != split_name(name)]  # fmt: skip
    return [f"split names: {', '.join(renamed)}"] if renamed else []


def assign_splits(files: list[AudioFile], valid_percent: float) -> list[AudioFile]:
    """Puts files without a split into `valid` (about `valid_percent` of them) or `train`.

    The choice follows a hash of the id, so that files added later move no other file. Where a few
    files would leave one side empty, the file with the nearest hash goes there.
    """
    if files[0].split is not None or not valid_percent:
        return [dataclasses.replace(file, split=file.split or "train") for file in files]
    order = sorted(files, key=lambda file: _hash_percent(file.id))
    num_valid = sum(_hash_percent(file.id) < valid_percent for file in files)
    num_valid = min(max(num_valid, 1), len(files) - 1)  # 0 where there is one file
    valid = {file.id for file in order[:num_valid]}
    return [
        dataclasses.replace(file, split="valid" if file.id in valid else "train") for file in files
    ]


def _hash_percent(text: str) -> float:
    """Returns a hash of the text in [0, 100), the same on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 * 100


# --- names -------------------------------------------------------------------------------------


def check_unique(manifest: Path | epath.Path, files: list[AudioFile]) -> None:
    """Raises ManifestError where two files have the same id."""
    seen = set()
    for file in files:
        if file.id in seen:
            raise ManifestError(
                f"{manifest} lists {file.id} twice: keep one line per file, with several classes in"
                " the column `labels` and ; between them; cut a file that has segments first"
            )
        seen.add(file.id)


def file_id(path: Path | epath.Path, root: Path | epath.Path) -> str:
    """Returns a file's path as text, below `root` where it lies there."""
    name = path.relative_to(root) if path.is_relative_to(root) else path
    if storage.is_remote(path):
        return _in_one_line(str(name))
    return _in_one_line(os.fsencode(name).decode("utf-8", "backslashreplace"))  # any bytes


def label_name(text: str) -> str:
    """Returns the class that a folder or a cell names: one name for all ways to encode it."""
    return _in_one_line(unicodedata.normalize("NFC", text.strip()))


def _in_one_line(text: str) -> str:
    """Escapes tabs and all characters that end a line for some reader."""
    return re.sub("[\0-\x1f\x7f-\x9f\u2028\u2029]", lambda m: ascii(m[0])[1:-1], text)
