"""AudioSet (Gemmeke et al. 2017): its lists, and which file of a folder is which of its clips."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from maeast_jax.ingest.sources import AudioFile, Listing, ManifestError, audio_paths, printable

_CLASSES = "class_labels_indices.csv"
_SEGMENTS = {
    "train": "balanced_train_segments.csv",
    "unbalanced": "unbalanced_train_segments.csv",
    "test": "eval_segments.csv",
}
_OPTIONAL = ("unbalanced",)
_COLUMNS = ("index", "mid", "display_name")
# YouTube's ids have eleven characters. Copies name a clip ID, Y before the ID (as PANNs does), or
# ID_START or ID_START_END, in seconds or milliseconds.
_STEM = re.compile(r"Y?(?P<id>[\w-]{11})(_\d+(\.\d+)?([_-]\d+(\.\d+)?)?)?", re.ASCII)


def list_audioset(root: Path) -> Listing:
    """The clips of AudioSet: multi-label, 527 classes named and numbered by its csv.

    `root` holds the csv files as AudioSet publishes them, `class_labels_indices.csv`,
    `balanced_train_segments.csv`, `eval_segments.csv` and, where wanted,
    `unbalanced_train_segments.csv`; and below it, at any depth, the clips: ten-second segments, not
    whole videos, in any format that decodes, named `ID`, `YID`, `ID_START` or `ID_START_END`. Of
    several files of one clip the first by path is taken; files of no listed clip are left out.

    Splits: `train` is the balanced list (AudioSet-20K: 22,160 clips), `unbalanced` the other
    2,041,789 (AudioSet-2M is `train+unbalanced`), `test` the evaluation list (20,371).

    Raises:
      ManifestError: a csv file that is missing or not of that form, or a clip listed twice.
    """
    names = _class_names(root / _CLASSES)
    paths = _clip_paths(root)
    files, missing, seen = [], [], set()
    for split, name in _SEGMENTS.items():
        if split in _OPTIONAL and not (root / name).exists():
            continue
        for clip, label in _segments(root / name, names):
            if clip in seen:
                raise ManifestError(f"{root / name} lists {clip} again: drop one of the lines")
            seen.add(clip)
            if clip in paths:
                path = paths[clip]
                files.append(AudioFile(str(root / path), printable(path), label, split))
            else:
                missing.append((clip, split))
    return Listing(files, tuple(names.values()), missing)


def _clip_paths(root: Path) -> dict[str, str]:
    """YouTube id -> path below `root`."""
    found = {}
    for path in sorted(path.relative_to(root).as_posix() for path in audio_paths(root)):
        if match := _STEM.fullmatch(Path(path).stem):
            found.setdefault(match["id"], path)
    return found


def _class_names(path: Path) -> dict[str, str]:
    """Machine id -> name of each class, in the order of their numbers."""
    rows = list(_rows(path))
    if not rows or tuple(rows[0][1]) != _COLUMNS:
        raise ManifestError(f"{path} does not start with {','.join(_COLUMNS)}: download it again")
    names = {}
    for line, row in rows[1:]:
        if len(row) != len(_COLUMNS) or row[0] != str(len(names)) or row[2] in names.values():
            raise ManifestError(
                f"{path}, line {line}: {','.join(row)!r} is not the class after the"
                f" {len(names)} before it, with a name of its own: download the file again"
            )
        names[row[1]] = row[2]
    return names


def _segments(path: Path, names: dict[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(YouTube id, names of its classes) of each line."""
    for line, row in _rows(path):
        machine_ids = row[3].split(",") if len(row) == 4 else []
        if not machine_ids or not set(machine_ids) <= names.keys():
            raise ManifestError(
                f"{path}, line {line}: {', '.join(row)[:80]!r}, expected a YouTube id, start, end"
                f' and "ids" of classes that {_CLASSES} names: download both again'
            )
        yield row[0], tuple(names[machine_id] for machine_id in machine_ids)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of a csv file without its comments, read as it goes: one has two million."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for number, line in enumerate(file, 1):
                if line.strip() and not line.startswith("#"):
                    yield number, next(csv.reader([line.strip()], skipinitialspace=True))
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(
            f"cannot read {path}, which --layout=audioset needs in --audio_dir: {error}"
        ) from None
