"""Builds a data set on Apache Beam, a shard an element: the same one whichever runner has it built.

Beam carries the names of task files and nothing else (`shard_plan`): recordings, tasks and shards
lie where all workers see them, on a shared disk or on gs://.
"""

import contextlib
import itertools
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from etils import epath
from tqdm import tqdm

from maeast_jax.data import DataError, DecodePool, Example, staging, writer
from maeast_jax.ingest import beam_runner, fetched, shard_file
from maeast_jax.ingest.examples import Cut, clips_of
from maeast_jax.ingest.report import Tally
from maeast_jax.ingest.shard_plan import Plan, Shard
from maeast_jax.ingest.sources import AudioFile, Listing
from maeast_jax.runtime import storage

_POLL_SECONDS = 1.0
_REMOTE_POLL_SECONDS = 10.0  # each look is a request, or several
_REMEDY = "the same command goes on with the shards that are done"


class BeamError(OSError):
    """A pipeline that failed; the shards that are done are kept."""


class BeamInterrupted(KeyboardInterrupt):
    """Ctrl-C; the shards that are done are kept."""


def write(
    schema: shard_file.Schema,
    data_dir: Path | epath.Path,
    by_split: Mapping[str, Sequence[AudioFile]],
    cut: Cut,
    tally: Tally,
    check_skipped: Callable[[], None],
    options,
    description: str,
    overwrite: bool,
    may_be_empty: Collection[str],
) -> Path:
    """Has the data set written and returns the directory of its version.

    Interrupted or failed, it leaves the shards that are done in `data_dir/NAME.partial`; called
    again for the same files it has only the others built.

    Args:
      tally: of the listing; counts everything at the end.
      check_skipped: raises where the tally has too many unreadable files.
      options: of `beam_runner.parse_options`.
      description, overwrite, may_be_empty: as in `shard_writer.write`.

    Raises:
      DataError: as there.
      ValueError: gs:// cannot be reached.
      BeamError: the pipeline failed.
      BeamInterrupted: by Ctrl-C.
    """
    target = data_dir / schema.name / writer.VERSION
    with staging.locked(target, wait=False):
        # A build may have ended since the caller looked.
        writer.check_writable(schema.name, data_dir, list(by_split), overwrite)
        plan = Plan.of(schema, data_dir, by_split, cut)
        with storage.reaching(plan.folder, "written", _REMEDY):
            plan.open()
            others, missing = plan.others(), plan.missing()
        if others:
            print(f"{others[0]}, of other files or flags, will be removed when this build is done")
        done = len(plan.shards) - len(missing)
        print(f"{len(plan.shards)} shards" + (f", {done} of them done before" if done else ""))
        sys.stdout.flush()
        if missing:
            _build_missing(plan, missing, options)
        with storage.reaching(data_dir, "written", _REMEDY):
            splits = _collect(plan, tally)
            check_skipped()
            _drop_empty(plan, splits, may_be_empty)
            staged = plan.folder / "shards"
            with staging.adding(staged) as folder:
                shard_file.write_metadata(folder, schema, splits, description)
                tally.write_skipped(folder / "skipped.tsv")
            staging.publish(staged, target)
            plan.remove()
    return target


# --- what a worker does ----------------------------------------------------------------------


def build_shard(task: str, pool: DecodePool) -> None:
    """Builds the shard of a task file, unless it is done.

    Files are decoded in the process of `pool`, so that one that kills its decoder is a skip there
    too, and not the end of a worker that its runner starts again and again. A shard that lacks
    recordings which could not be fetched is built again by the next build, if this one fails.
    """
    shard = Shard.read(task)
    if shard.tally() is not None:
        return
    tally = Tally(Listing(shard.files, shard.schema.label_names))
    not_fetched = False

    def examples() -> Iterator[Example]:
        nonlocal not_fetched
        names = [file.path for file in shard.files]
        for file, decoded in zip(shard.files, fetched.decode(pool, names), strict=True):
            not_fetched |= isinstance(decoded, fetched.NotFetched)
            clips = clips_of(file, decoded, shard.cut)
            tally.add(file, decoded, clips)
            yield from clips

    with shard.building() as path:
        ids, num_bytes = shard_file.write_shard(path, shard.schema, examples())
    told = {"counts": tally.counts(), "ids": ids, "num_bytes": num_bytes}
    shard.finish(told, again=not_fetched)


# --- having it done ----------------------------------------------------------------------------


def _build_missing(plan: Plan, missing: list[Shard], options) -> None:
    """Runs the pipeline; BeamError or BeamInterrupted where it does not end well."""
    log = _log(plan)
    try:
        with _progress(plan):
            tasks = [str(shard.task_path) for shard in missing]
            beam_runner.run(build_shard, tasks, options, log)
        failure = "" if not plan.missing() else "ended, but its workers wrote elsewhere"
    except KeyboardInterrupt:
        raise BeamInterrupted(f"interrupted; {_state(plan)}") from None
    except Exception as error:  # Runners fail in their own ways.
        reason = beam_runner.last_line(str(error)).removeprefix("RuntimeError: ")
        failure = f"failed: {reason or type(error).__name__}"
        if log.exists():
            failure += f" (see {log})"
    if failure:
        raise BeamError(f"Beam's pipeline {failure}; {_state(plan)}")
    if storage.is_remote(plan.folder):
        shutil.rmtree(log.parent)


def _log(plan: Plan) -> Path:
    """Where workers of this machine append what they have to say, which cannot be on gs://."""
    if not storage.is_remote(plan.folder):
        return Path(plan.folder, "workers.log")
    return Path(tempfile.mkdtemp(prefix="maeast_jax_beam_"), "workers.log")


def _state(plan: Plan) -> str:
    with storage.reaching(plan.folder, "read", _REMEDY):
        done = len(plan.shards) - len(plan.missing())
    return f"{done} of {len(plan.shards)} shards are done: the same command builds the others"


@contextlib.contextmanager
def _progress(plan: Plan) -> Iterator[None]:
    """A bar of the files whose shards are done: runners themselves tell nothing before the end."""
    ended = threading.Event()
    total = sum(len(shard.files) for shard in plan.shards)

    def watch():
        left = {shard.tally_path.name: len(shard.files) for shard in plan.shards}
        remote = storage.is_remote(plan.folder)
        last_look = False
        while not last_look:
            last_look = ended.wait(_REMOTE_POLL_SECONDS if remote else _POLL_SECONDS)
            # What one look misses the next one sees.
            with contextlib.suppress(Exception):
                done = plan.tally_names() & left.keys()
                bar.update(sum(left.pop(name) for name in done))

    with tqdm(total=total, unit="file") as bar:
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


# --- the whole set ---------------------------------------------------------------------------


def _collect(plan: Plan, tally: Tally) -> dict[str, tuple[list[int], int]]:
    """Adds up the tallies of all shards: split -> examples of each shard, bytes of all records."""
    ids: set[str] = set()
    splits = {}
    tallies = zip(plan.shards, plan.tallies(), strict=True)
    for split, shards in itertools.groupby(tallies, key=lambda pair: pair[0].split):
        lengths, num_bytes = [], 0
        for _, told in shards:
            for example_id in told["ids"]:
                if example_id in ids:
                    raise DataError(
                        f"id {example_id!r} is used twice: ids must be unique over all splits"
                    )
                ids.add(example_id)
            tally.add_counts(told["counts"])
            lengths.append(len(told["ids"]))
            num_bytes += told["num_bytes"]
        splits[split] = lengths, num_bytes
    return splits


def _drop_empty(plan: Plan, splits: dict, may_be_empty: Collection[str]) -> None:
    """Takes out splits without examples; DataError where that must not be."""
    empty = [split for split, (lengths, _) in splits.items() if not sum(lengths)]
    if len(empty) == len(splits):
        raise DataError(f"no split of {', '.join(splits)} has examples: put clips into one")
    for split in empty:
        if split not in may_be_empty:
            raise DataError(f"split {split!r} has no examples: leave it out, or put clips into it")
        del splits[split]
    for shard in plan.shards:
        if shard.split in empty:
            shard.path.unlink()
