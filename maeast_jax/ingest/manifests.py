"""Lists of files that people write: a manifest's format, its columns, and what they say."""

import codecs
import csv
import dataclasses
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from etils import epath

from maeast_jax.ingest.sources import (
    AudioFile,
    Listing,
    ManifestError,
    check_unique,
    file_id,
    is_audio,
    label_name,
    renamed_splits,
    split_name,
)
from maeast_jax.runtime import storage, terminal

# Names that lists have for the column of paths, without "_", "-" and spaces. The first one counts.
_PATH_COLUMNS = ("path", "file", "filename", "filepath", "audio", "wav", "audiofilepath")
_KNOWN_COLUMNS = ("", "path", "label", "labels", "split")
# Cells that other tools write where there is no value.
_NO_VALUE = ("", "nan", "NaN", "None", "<NA>")
# How the names of columns begin that give the place of a segment in its file.
_SEGMENT_COLUMNS = ("start", "begin", "onset", "offset", "end", "stop")


def read_manifest(
    manifest: str | os.PathLike, audio_dir: str | os.PathLike | None = None
) -> Listing:
    """Lists the files that a manifest names, in its order; list and files may lie on gs://.

    The manifest is separated by tabs, commas or semicolons, and has a header with the column `path`
    (or one of _PATH_COLUMNS) and optionally `label` and `split`; other columns are left out. Where
    a clip may be of several classes, the column is `labels`, with `;` between the classes and an
    empty cell for no class. Cells of _NO_VALUE are empty. Cells may be quoted. Two formats go
    without a header: one path per line, and the authors' format, fairseq's: a directory on the
    first line, then lines of path and length in samples, which is left out. No line is a comment,
    because names may start with #.

    Args:
      audio_dir: where relative paths start; None is the manifest's folder or, in fairseq's format,
        the directory on its first line.

    Raises:
      ManifestError: unreadable, no such format, no rows, an empty cell, cells without a column, a
        path listed twice, `label` beside `labels`, commas in place of `;`.
    """
    manifest = storage.path(manifest)
    columns, rows, base = _table(manifest)
    if {"label", "labels"} <= {*columns}:
        raise ManifestError(
            f"{manifest} has the columns label (one class per clip) and labels (any number): drop"
            " one of them"
        )
    if not rows:
        raise ManifestError(f"{manifest} lists no files: add lines below its header")
    base = storage.path(audio_dir) if audio_dir else base
    with storage.reaching(base):
        if not base.is_dir():
            raise ManifestError(
                f"{base}, where {manifest} starts, is not a directory: pass --audio_dir"
            )
    files = []
    for number, cells in rows:
        if any(cells[len(columns) :]):
            raise ManifestError(
                f"{manifest}, line {number}: {len(cells)} cells under {len(columns)} columns; put"
                " quotes around a cell that holds the separator"
            )
        row = dict(zip(columns, cells, strict=False))
        for column in ("path", "label", "split"):
            if column in columns and row.get(column, "") in _NO_VALUE:
                raise ManifestError(
                    f"{manifest}, line {number}: no {column} in {row.get(column, '')!r}; fill it"
                    " in, or drop the line or column"
                )
        label = label_name(row["label"]) if "label" in columns else None
        if "labels" in columns:
            names = map(label_name, row.get("labels", "").split(";"))
            label = tuple(dict.fromkeys(name for name in names if name not in _NO_VALUE))
        path = _join(base, row["path"])
        files.append(AudioFile(str(path), file_id(path, base), label, row.get("split")))
    check_unique(manifest, files)
    notes = _commas(manifest, files) if "labels" in columns else []
    if others := [name for name in columns if name not in _KNOWN_COLUMNS]:
        notes.append(f"columns left out: {', '.join(others)[:80]}")
    if any(name.startswith(_SEGMENT_COLUMNS) for name in others):
        notes.append("files are taken whole: cut those with segments before the build")
    if "split" in columns:
        notes += renamed_splits(file.split for file in files)
        files = [dataclasses.replace(file, split=split_name(file.split)) for file in files]
    return Listing.of(files, notes)


def _commas(manifest: epath.Path, files: Sequence[AudioFile]) -> list[str]:
    """Returns a note where commas may have been meant to part the classes of a clip.

    AudioSet's names hold commas ("Child speech, kid speaking"), but no part of one is a class.

    Raises:
      ManifestError: no clip has several classes, and a part of a name between commas is a class.
    """
    names = {name for file in files for name in file.label}
    lists = sorted(name for name in names if "," in name)
    if not lists or any(len(file.label) > 1 for file in files):
        return []
    for name in lists:
        if parts := names.intersection(part.strip() for part in name.split(",")):
            raise ManifestError(
                f"{manifest}: {name!r} would be one class beside {min(parts)!r}: put ; between the"
                " classes of a clip in the column `labels`"
            )
    return [f"labels with commas are one class each, such as {lists[0]}: ; parts classes"]


def _table(manifest: epath.Path) -> tuple[list[str], list[tuple[int, list[str]]], epath.Path]:
    """Returns a manifest's columns, its rows with their line numbers, and where paths start."""
    text = _read_text(manifest)
    rows = list(_rows(manifest, text, "\t"))
    if not rows:
        raise ManifestError(f"{manifest} is empty: list the audio files in it")
    (_, first), *others = rows
    second = others[0][1] if others else []
    if len(first) == 1 and len(second) == 2 and second[1].isdigit():
        return ["path", "samples"], others, _join(manifest.parent, first[0])
    if len(first) == 1 and is_audio(PurePosixPath(first[0])):
        return ["path"], rows, manifest.parent
    if first[0].startswith(("{", "[")):
        raise ManifestError(_json_remedy(manifest, text))
    for separator in "\t,;":
        lines = _rows(manifest, text, separator)
        _, header = next(lines, (0, []))
        columns = [name.lower() for name in header]
        plain = [re.sub(r"[\W_]+", "", name) for name in columns]
        if found := [name for name in _PATH_COLUMNS if name in plain]:
            columns[plain.index(found[0])] = "path"
            return columns, list(lines), manifest.parent
    raise ManifestError(
        f"{manifest}: no column `path` in its first line ({', '.join(first)[:80]}), nor is it a"
        " bare list of audio files or fairseq's format (a directory, then lines of path, tab,"
        " samples): add a header line, such as path,label"
    )


def _json_remedy(manifest: epath.Path, text: str) -> str:
    if around := re.match(r'\s*{\s*"(\w+)"\s*:\s*\[', text):  # {"data": [...]}, as AST has it
        table = f"pandas.DataFrame(json.load(open('{manifest}'))['{around[1]}'])"
    else:
        lines = ", lines=True" if text.lstrip().startswith("{") else ""
        table = f"pandas.read_json('{manifest}'{lines})"
    return (
        f"{manifest} is JSON: make it a table by {table}.to_csv('list.csv', index=False), with the"
        " columns path and, where there are classes, label or labels"
    )


def _read_text(manifest: epath.Path) -> str:
    try:
        with storage.reaching(manifest):
            data = manifest.read_bytes()
    except OSError as error:
        raise ManifestError(
            f"cannot read --manifest={manifest}: {terminal.one_line(error)}"
        ) from None
    # Spreadsheets save "Unicode text" as UTF-16 behind its mark.
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
        place = text.find("\0")  # UTF-16 without its mark
    except UnicodeDecodeError as error:
        place = error.start
    if place >= 0:
        line = data.count(b"\n", 0, place) + 1
        raise ManifestError(
            f"{manifest}, line {line}: byte {place} (0x{data[place]:02x}) is not text in UTF-8;"
            " save the list as UTF-8"
        )
    return text


def _rows(manifest: epath.Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number from 1, cells) of the lines that are not blank."""
    # Tab-separated corpora hold sentences with a lone quote, which must not swallow the next lines.
    quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, quoting=quoting,
        skipinitialspace=True, strict=True,
    )  # fmt: skip
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if quoting == csv.QUOTE_NONE:
                cells = [_unquoted(cell) for cell in cells]
            if any(cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise ManifestError(
            f"{manifest}, line {reader.line_num}: {error}; quote its cells as a spreadsheet does"
        ) from None


def _unquoted(cell: str) -> str:
    is_quoted = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return cell[1:-1].replace('""', '"') if is_quoted else cell


def _join(base: epath.Path, name: str) -> epath.Path:
    if storage.is_remote(name):
        return storage.path(name)
    name = os.fsdecode(name.encode())  # UTF-8 as well where the machine has another encoding
    path = base / name
    # Lists made on Windows part folders by backslashes, which names of files may hold here.
    return base / name.replace("\\", "/") if "\\" in name and not path.exists() else path
