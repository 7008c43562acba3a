"""Which files go into which shard of a data set, and which of the shards are done.

All of it lies in files, in the folder NAME.partial/DIGEST beside the data set, on a disk or on
gs://: any process that sees them can build a shard, and a build that is run again builds those that
are missing.

  tasks/SPLIT-INDEX.json    what goes into a shard
  shards/                   the shards, under their names in the data set
  tallies/SPLIT-INDEX.json  what the files of a shard gave; written last, it says that it is done
  building/                 what is not whole yet; on gs://, where nothing is seen before it is
                            whole, that waits in temporary files

DIGEST is of all that the shards depend on: a build of other files or flags has another folder.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from etils import epath

from maeast_jax.ingest.examples import Cut
from maeast_jax.ingest.shard_file import Schema, file_name, hash_of
from maeast_jax.ingest.sources import AudioFile
from maeast_jax.runtime import bucket, storage

_SHARD_BYTES = 16 << 20  # of source files: minutes of recordings to hours, seconds of work
_MOST_SHARDS = 1024  # of a split
_VERSION = 1  # to be raised when the same task gives other bytes


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard; `folder` is that of the plan."""

    folder: epath.Path
    split: str
    index: int
    num_shards: int
    schema: Schema
    cut: Cut
    files: Sequence[AudioFile]

    @classmethod
    def read(cls, task: str | os.PathLike) -> "Shard":
        """The shard of a task file."""
        task = storage.path(task)
        fields = json.loads(task.read_text())
        return cls(
            folder=task.parents[1],
            schema=Schema(**fields.pop("schema")),
            cut=Cut(**fields.pop("cut")),
            files=[AudioFile(**_with_tuple(file)) for file in fields.pop("files")],
            **fields,
        )

    def task(self) -> str:
        """The text of its task file: all that it depends on."""
        fields = dataclasses.asdict(self)
        del fields["folder"]
        return json.dumps(fields)

    @property
    def task_path(self) -> epath.Path:
        return self.folder / "tasks" / f"{self.split}-{self.index:05d}.json"

    @property
    def tally_path(self) -> epath.Path:
        return self.folder / "tallies" / self.task_path.name

    @property
    def path(self) -> epath.Path:
        name = file_name(self.schema.name, self.split, self.index, self.num_shards)
        return self.folder / "shards" / name

    def tally(self) -> dict | None:
        """What `finish` was given; None where the shard is not done, or not as it was then."""
        try:
            tally = json.loads(self.tally_path.read_text())
            return tally if self._file_bytes() == tally["file_bytes"] else None
        except (FileNotFoundError, json.JSONDecodeError):  # after a crash, files may be cut short
            return None

    @contextlib.contextmanager
    def building(self) -> Iterator[Path]:
        """Where to write the shard; it appears under its name at the end, if nothing is raised.

        Runners may build a shard twice at a time; both give the same bytes.
        """
        with self._placing(self.path) as path:
            yield path

    def finish(self, tally: dict, again: bool = False) -> None:
        """The shard is there; keeps what there is to say of it.

        Args:
          again: another build of the same plan is to build it again.
        """
        tally = {**tally, "again": again, "file_bytes": self._file_bytes()}
        with self._placing(self.tally_path) as path:
            path.write_text(json.dumps(tally))

    def prepare(self) -> None:
        """Writes the task file, and forgets what was built but is to be built again."""
        with self._placing(self.task_path) as path:
            path.write_text(self.task())
        if (tally := self.tally()) and tally.get("again"):
            self.tally_path.unlink()

    def _file_bytes(self) -> int:
        return (
            bucket.size(self.path) if storage.is_remote(self.path) else os.path.getsize(self.path)
        )

    @contextlib.contextmanager
    def _placing(self, target: epath.Path) -> Iterator[Path]:
        """A file to write that appears as `target` at the end, if nothing is raised."""
        if storage.is_remote(target):
            with bucket.writing(target.parent) as here:
                yield here / target.name
            return
        path = Path(self.folder, "building", f"{target.name}.{uuid.uuid4().hex}")
        try:
            yield path
            path.replace(target)
        finally:
            path.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All shards of a data set, by split and index, and the folder they are built in."""

    folder: epath.Path
    shards: Sequence[Shard]

    @classmethod
    def of(
        cls,
        schema: Schema,
        data_dir: str | os.PathLike,
        by_split: Mapping[str, Sequence[AudioFile]],
        cut: Cut,
    ) -> "Plan":
        """Files go to shards in the order of a hash of their ids: whoever lists and builds them.

        The number of a split's shards follows from the size of its files.

        Raises ValueError, in one line, where folders of recordings on gs:// cannot be listed.
        """
        home = storage.path(_absolute(data_dir)) / f"{schema.name}.partial"
        digest = hashlib.blake2b(f"{_VERSION}".encode(), digest_size=8)
        shards = []
        for split, files in sorted(by_split.items()):
            files = [dataclasses.replace(f, path=_absolute(f.path)) for f in files]
            files.sort(key=lambda file: (hash_of(file.id, b"shard"), file.id))
            stamps = _stamps([file.path for file in files])
            num_bytes = sum(size for size, _ in stamps)
            count = min(-(-num_bytes // _SHARD_BYTES) or 1, _MOST_SHARDS, len(files))
            bounds = [len(files) * index // count for index in range(count + 1)]
            parts = [files[start:stop] for start, stop in itertools.pairwise(bounds)]
            split_shards = [
                Shard(home, split, index, count, schema, cut, part)
                for index, part in enumerate(parts)
            ]
            for text in (json.dumps(stamps), *(shard.task() for shard in split_shards)):
                digest.update(text.encode())
            shards += split_shards
        folder = home / digest.hexdigest()
        return cls(folder, [dataclasses.replace(shard, folder=folder) for shard in shards])

    def open(self) -> None:
        """Makes the folder and clears away what killed builders have left."""
        if not storage.is_remote(self.folder):
            # A worker that outlives its build may be writing there: it fails.
            shutil.rmtree(self.folder / "building", ignore_errors=True)
            for name in ("tasks", "shards", "tallies", "building"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        bucket.each(Shard.prepare, self.shards)

    def others(self) -> list[epath.Path]:
        """The folders of other plans of the same name."""
        folders = sorted(tasks.parent for tasks in self.folder.parent.glob("*/tasks"))
        return [folder for folder in folders if folder != self.folder]

    def tallies(self) -> list[dict | None]:
        """Of each shard, None where it is not done."""
        return bucket.each(Shard.tally, self.shards)

    def missing(self) -> list[Shard]:
        """The shards that are not done."""
        tallies = self.tallies()
        return [shard for shard, tally in zip(self.shards, tallies, strict=True) if tally is None]

    def tally_names(self) -> set[str]:
        """The names of the tallies that are there, by one look."""
        folder = self.folder / "tallies"
        if storage.is_remote(folder):
            return {name.rpartition("/")[2] for name in bucket.listing(folder)}
        return set(os.listdir(folder))

    def remove(self) -> None:
        """Clears away the folder and those of other plans."""
        for folder in (self.folder, *self.others()):
            if storage.is_remote(folder):
                bucket.remove(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        if not storage.is_remote(self.folder):
            with contextlib.suppress(OSError):
                os.rmdir(self.folder.parent)


def _with_tuple(file: dict) -> dict:
    """The fields of an AudioFile: JSON has no tuples."""
    label = file["label"]
    return {**file, "label": tuple(label) if isinstance(label, list) else label}


def _absolute(name: str | os.PathLike) -> str:
    return os.fspath(name) if storage.is_remote(name) else os.path.abspath(name)


def _stamps(names: Sequence[str]) -> list[tuple[int, int]]:
    """Of each file its size and what changes with it, a time or number; zeros where it is not."""
    there = bucket.stamps(name for name in names if storage.is_remote(name))
    return [
        there.get(name, (0, 0)) if storage.is_remote(name) else storage.stamp(name)
        for name in names
    ]
