"""Builds a data set on Apache Beam, a shard an element: the same one whichever runner has it built.

Beam carries the names of task files and nothing else (`shard_plan`): recordings, tasks and shards
lie where all workers see them.
"""

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from maeast_jax import beam_runner, shard_file, shard_writer, staging
from maeast_jax.build_report import Tally
from maeast_jax.clips import Cut, clips_of
from maeast_jax.decode_pool import DecodePool
from maeast_jax.manifest import AudioFile, Listing
from maeast_jax.shard_plan import Plan, Shard
from maeast_jax.shard_writer import DataError, Example

_POLL_SECONDS = 1.0


class BeamError(OSError):
    """A pipeline that failed; the shards that are done are kept."""


class BeamInterrupted(KeyboardInterrupt):
    """Ctrl-C; the shards that are done are kept."""


def write(
    schema: shard_file.Schema,
    data_dir: Path,
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
      BeamError: the pipeline failed.
      BeamInterrupted: by Ctrl-C.
    """
    target = data_dir / schema.name / shard_writer.VERSION
    with staging.locked(target, wait=False):
        # A build may have ended since the caller looked.
        shard_writer.check_writable(schema.name, data_dir, list(by_split), overwrite)
        plan = Plan.of(schema, data_dir, by_split, cut)
        plan.open()
        if others := plan.others():
            print(f"{others[0]}, of other files or flags, will be removed when this build is done")
        missing = plan.missing()
        done = len(plan.shards) - len(missing)
        print(f"{len(plan.shards)} shards" + (f", {done} of them done before" if done else ""))
        sys.stdout.flush()
        if missing:
            _build_missing(plan, missing, options)
        splits = _collect(plan, tally)
        check_skipped()
        _drop_empty(plan, splits, may_be_empty)
        staged = plan.folder / "shards"
        shard_file.write_metadata(staged, schema, splits, description)
        tally.write_skipped(staged / "skipped.tsv")
        staging.publish(staged, target)
        plan.remove()
    return target


# --- what a worker does ----------------------------------------------------------------------


def build_shard(task: str, pool: DecodePool) -> None:
    """Builds the shard of a task file, unless it is done.

    Files are decoded in the process of `pool`, so that one that kills its decoder is a skip there
    too, and not the end of a worker that its runner starts again and again.
    """
    shard = Shard.read(task)
    if shard.tally() is not None:
        return
    tally = Tally(Listing(shard.files, shard.schema.label_names))

    def examples() -> Iterator[Example]:
        paths = [file.path for file in shard.files]
        for file, decoded in zip(shard.files, pool.decode(paths), strict=True):
            clips = clips_of(file, decoded, shard.cut)
            tally.add(file, decoded, clips)
            yield from clips

    with shard.building() as path:
        ids, num_bytes = shard_file.write_shard(path, shard.schema, examples())
    shard.finish({"counts": tally.counts(), "ids": ids, "num_bytes": num_bytes})


# --- having it done ----------------------------------------------------------------------------


def _build_missing(plan: Plan, missing: list[Shard], options) -> None:
    """Runs the pipeline; BeamError or BeamInterrupted where it does not end well."""
    log = plan.folder / "workers.log"
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


def _state(plan: Plan) -> str:
    done = len(plan.shards) - len(plan.missing())
    return f"{done} of {len(plan.shards)} shards are done: the same command builds the others"


@contextlib.contextmanager
def _progress(plan: Plan) -> Iterator[None]:
    """A bar of the files whose shards are done: runners themselves tell nothing before the end."""
    ended = threading.Event()
    total = sum(len(shard.files) for shard in plan.shards)

    def watch():
        left = {shard.tally_path.name: len(shard.files) for shard in plan.shards}
        last_look = False
        while not last_look:
            last_look = ended.wait(_POLL_SECONDS)
            done = {path.name for path in (plan.folder / "tallies").iterdir()} & left.keys()
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
    for split, shards in itertools.groupby(plan.shards, key=lambda shard: shard.split):
        lengths, num_bytes = [], 0
        for shard in shards:
            told = shard.tally()
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
