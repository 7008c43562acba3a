"""Which files go into which shard of a data set, and which of the shards are done.

All of it lies in files, in the folder NAME.partial/DIGEST beside the data set: any process that
sees them can build a shard, and a build that is run again builds those that are missing.

  tasks/SPLIT-INDEX.json    what goes into a shard
  shards/                   the shards, under their names in the data set
  tallies/SPLIT-INDEX.json  what the files of a shard gave; written last, it says that it is done
  building/                 what is not whole yet

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

from maeast_jax import paths
from maeast_jax.clips import Cut
from maeast_jax.manifest import AudioFile
from maeast_jax.shard_file import Schema, file_name, hash_of

_SHARD_BYTES = 16 << 20  # of source files: minutes of recordings to hours, seconds of work
_MOST_SHARDS = 1024  # of a split
_VERSION = 1  # to be raised when the same task gives other bytes


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard; `folder` is that of the plan."""

    folder: Path
    split: str
    index: int
    num_shards: int
    schema: Schema
    cut: Cut
    files: Sequence[AudioFile]

    @classmethod
    def read(cls, task: str | Path) -> "Shard":
        """The shard of a task file."""
        task = Path(task)
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
    def task_path(self) -> Path:
        return self.folder / "tasks" / f"{self.split}-{self.index:05d}.json"

    @property
    def tally_path(self) -> Path:
        return self.folder / "tallies" / self.task_path.name

    @property
    def path(self) -> Path:
        name = file_name(self.schema.name, self.split, self.index, self.num_shards)
        return self.folder / "shards" / name

    def tally(self) -> dict | None:
        """What `finish` was given; None where the shard is not done, or not as it was then."""
        try:
            tally = json.loads(self.tally_path.read_text())
            return tally if self.path.stat().st_size == tally["file_bytes"] else None
        except (FileNotFoundError, json.JSONDecodeError):  # after a crash, files may be cut short
            return None

    @contextlib.contextmanager
    def building(self) -> Iterator[Path]:
        """Where to write the shard; it appears under its name at the end, if nothing is raised.

        Runners may build a shard twice at a time; both give the same bytes.
        """
        path = self.folder / "building" / f"{self.path.name}.{uuid.uuid4().hex}"
        try:
            yield path
            path.replace(self.path)
        finally:
            path.unlink(missing_ok=True)

    def finish(self, tally: dict) -> None:
        """The shard is there; keeps what there is to say of it."""
        tally = {**tally, "file_bytes": self.path.stat().st_size}
        self._write(self.tally_path, json.dumps(tally))

    def write_task(self) -> None:
        self._write(self.task_path, self.task())

    def _write(self, path: Path, text: str) -> None:
        """Writes a file that nobody sees half written."""
        aside = self.folder / "building" / f"{path.name}.{uuid.uuid4().hex}"
        aside.write_text(text)
        aside.replace(path)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All shards of a data set, by split and index, and the folder they are built in."""

    folder: Path
    shards: Sequence[Shard]

    @classmethod
    def of(
        cls,
        schema: Schema,
        data_dir: Path,
        by_split: Mapping[str, Sequence[AudioFile]],
        cut: Cut,
    ) -> "Plan":
        """Files go to shards in the order of a hash of their ids: whoever lists and builds them.

        The number of a split's shards follows from the size of its files.
        """
        home = Path(os.path.abspath(data_dir)) / f"{schema.name}.partial"
        digest = hashlib.blake2b(f"{_VERSION}".encode(), digest_size=8)
        shards = []
        for split, files in sorted(by_split.items()):
            files = [dataclasses.replace(f, path=os.path.abspath(f.path)) for f in files]
            files.sort(key=lambda file: (hash_of(file.id, b"shard"), file.id))
            stamps = [paths.stamp(file.path) for file in files]
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
        # A worker that outlives its build may be writing there: it fails.
        shutil.rmtree(self.folder / "building", ignore_errors=True)
        for name in ("tasks", "shards", "tallies", "building"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for shard in self.shards:
            shard.write_task()

    def others(self) -> list[Path]:
        """The folders of other plans of the same name."""
        folders = sorted(tasks.parent for tasks in self.folder.parent.glob("*/tasks"))
        return [folder for folder in folders if folder != self.folder]

    def missing(self) -> list[Shard]:
        """The shards that are not done."""
        return [shard for shard in self.shards if shard.tally() is None]

    def remove(self) -> None:
        """Clears away the folder and those of other plans."""
        for folder in (self.folder, *self.others()):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()


def _with_tuple(file: dict) -> dict:
    """The fields of an AudioFile: JSON has no tuples."""
    label = file["label"]
    return {**file, "label": tuple(label) if isinstance(label, list) else label}
