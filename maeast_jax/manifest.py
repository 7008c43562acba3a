"""Which files go into a data set: a folder tree or a manifest, with ids, labels and splits."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from maeast_jax.audio import AUDIO_SUFFIXES


class ManifestError(ValueError):
    """A source of files that does not serve; one line that says what to do about it."""


@dataclasses.dataclass(frozen=True)
class AudioFile:
    """A file to go into a data set.

    Attributes:
      path: to open it.
      id: its path below the folder that the listing starts at, as printable text.
      label: None in sets without labels.
      split: None until `assign_splits`.
    """

    path: str
    id: str
    label: str | None = None
    split: str | None = None


def list_folder(audio_dir: str | Path, label_from_folder: bool = False) -> list[AudioFile]:
    """Every audio file below a folder, sorted; hidden files and folders are left out.

    Args:
      label_from_folder: the name of the folder that a file lies in is its label.

    Raises:
      ManifestError: no such folder, no audio file in it, a file without a folder for its label.
    """
    root = Path(os.path.expanduser(audio_dir))
    if not root.is_dir():
        raise ManifestError(f"--audio_dir={audio_dir} is not a directory: check the path")
    paths = sorted(path.relative_to(root) for path in _walk(root))
    if not paths:
        raise ManifestError(
            f"no audio file below {audio_dir} (looked for {' '.join(sorted(AUDIO_SUFFIXES))}):"
            " check the path, or list the files in a --manifest"
        )
    bare = [path for path in paths if not path.parent.name]
    if label_from_folder and bare:
        raise ManifestError(
            f"--label_from_folder: {len(bare)} files, e.g. {bare[0]}, lie in {audio_dir} itself and"
            " so have no label: move them into folders, or drop the flag"
        )
    return [
        AudioFile(
            str(root / path),
            _printable(path.as_posix()),
            _printable(path.parent.name) if label_from_folder else None,
        )
        for path in paths
    ]


def _walk(root: Path) -> Iterable[Path]:
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up the tree
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES:
                yield Path(folder, name)


def read_manifest(manifest: str | Path, audio_dir: str | Path | None = None) -> list[AudioFile]:
    """The files that a manifest lists, in its order.

    Either tab-separated with a header that has `path` and, where there are, `label` and `split`
    (other columns are ignored), or fairseq's format, as the authors use: a directory on the first
    line, then path and length in samples (which is ignored: files are decoded anyway).

    Args:
      audio_dir: where relative paths start; None for the manifest's folder or, in fairseq's format,
        the directory on its first line.

    Raises:
      ManifestError: unreadable, neither format, no rows, an empty cell, a path listed twice.
    """
    manifest = Path(os.path.expanduser(manifest))
    lines = _lines(manifest)
    header = lines[0][1].split("\t")
    if "path" in header:
        base, rows = manifest.parent, lines[1:]
    elif len(header) == 1 and len(lines) > 1 and _is_fairseq_row(lines[1][1]):
        base, rows, header = manifest.parent / header[0], lines[1:], ["path", "length"]
    else:
        raise ManifestError(
            f"{manifest}: no column `path` in its first line ({', '.join(header)[:80]}), nor is it"
            " fairseq's format (a directory, then lines of path, tab, samples): add a header line"
        )
    if not rows:
        raise ManifestError(f"{manifest} lists no files: add lines below its header")
    base = Path(os.path.expanduser(audio_dir)) if audio_dir else base
    if not base.is_dir():
        raise ManifestError(
            f"{base}, where {manifest} starts, is not a directory: pass --audio_dir"
        )
    files = [_row_file(manifest, number, line, header, base) for number, line in rows]
    _check_unique(manifest, files)
    return files


def _lines(manifest: Path) -> list[tuple[int, str]]:
    """(number from 1, text) of the lines that are not blank."""
    try:
        text = manifest.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"cannot read --manifest={manifest}: {error}") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ManifestError(f"{manifest} is empty: list the audio files in it")
    return lines


def _is_fairseq_row(line: str) -> bool:
    cells = line.split("\t")
    return len(cells) == 2 and cells[1].strip().isdigit()


def _row_file(manifest: Path, number: int, line: str, header: list[str], base: Path) -> AudioFile:
    row = dict(zip(header, (cell.strip() for cell in line.split("\t")), strict=False))
    for column in ("path", "label", "split"):
        if column in header and not row.get(column):
            raise ManifestError(
                f"{manifest}, line {number}: no {column}; fill it in, or drop the line or column"
            )
    path = base / row["path"]
    inside = path.is_relative_to(base)
    name = path.relative_to(base) if inside else path
    return AudioFile(str(path), _printable(name.as_posix()), row.get("label"), row.get("split"))


def _check_unique(manifest: Path, files: list[AudioFile]) -> None:
    seen = set()
    for file in files:
        if file.id in seen:
            raise ManifestError(f"{manifest} lists {file.id} twice: drop one of the lines")
        seen.add(file.id)


def assign_splits(files: list[AudioFile], valid_percent: float) -> list[AudioFile]:
    """Puts files without a split into `valid` (about `valid_percent` of them) or `train`.

    The choice is by a hash of the id, so that files added later move no other. Where a few files
    leave a side empty that should not be, the one file whose hash is nearest goes there.
    """
    if files[0].split is not None or not valid_percent:
        return [dataclasses.replace(file, split=file.split or "train") for file in files]
    order = sorted(files, key=lambda file: _hash_percent(file.id))
    num_valid = sum(_hash_percent(file.id) < valid_percent for file in files)
    num_valid = min(max(num_valid, 1), len(files) - 1)  # of one file, 0
    valid = {file.id for file in order[:num_valid]}
    return [
        dataclasses.replace(file, split="valid" if file.id in valid else "train") for file in files
    ]


def _hash_percent(text: str) -> float:
    """Uniform in [0, 100), the same on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 * 100


def _printable(text: str) -> str:
    """Text that UTF-8 and a line of TSV can hold; file names are arbitrary bytes."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return text.replace("\t", r"\t").replace("\n", r"\n").replace("\r", r"\r")
