"""Checkpoints of a run: `WORKDIR/checkpoints/STEP/`, written by Orbax, and `WORKDIR/config.json`.

A checkpoint is two parts, so that weights load without the optimiser: `weights` {params,
statistics} and `progress` {step, opt_state}. Orbax writes it under another name and renames it
when it is whole, so the newest folder with a bare number for a name is complete. It deletes old
ones where they lie: a kill can leave an older one short. On gs:// nothing can be renamed: there it
writes under the bare number, and at the end the object `commit_success.txt` that completes it.
"""

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from maeast_jax.runtime import distributed, storage

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
_COMPLETE = "commit_success.txt"


class CheckpointError(ValueError):
    """A checkpoint that is not there, or is not what was asked for; one line."""


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them."""

    def __init__(self, workdir: str | os.PathLike, keep: int, config: dict[str, Any]):
        self._config = config
        folder = storage.absolute(workdir) / CHECKPOINTS
        if jax.process_index() == 0:
            _clear_half_written(folder)
        # Before any process lists the folder.
        multihost_utils.sync_global_devices("half-written saves are cleared")
        # Both policies are given: by default Orbax saves at every idle step and keeps everything.
        self._checkpointer = ocp.training.Checkpointer(
            folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        )
        # At each save Orbax would ask jax's preemption service too, by the step. The service takes
        # the last number that each process asked by for how far it is, and hosts.stopping counts
        # otherwise: all would agree on a number that is past, or far ahead, and never stop.
        self._checkpointer._manager.reached_preemption = lambda step: False

    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, parts: dict[str, Any]) -> None:
        """Starts writing; returns once the values are off the device, which may then be donated.

        A step that is saved already is left as it is: the state is a function of the step.
        """
        if step != self.latest_step():
            with _storage_may_fail():
                self._checkpointer.save_checkpointables_async(
                    step, parts, force=True, custom_metadata={"config": self._config}
                )

    def restore(self, step: int, abstract_parts: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint of `step`, placed as `abstract_parts` (shapes, types, shardings) says."""
        return self._checkpointer.load_checkpointables(step, abstract_parts)

    def wait(self) -> None:
        """Until all that was asked for is on the disk."""
        with _storage_may_fail():
            self._checkpointer.wait()

    def close(self) -> None:
        with _storage_may_fail():
            self._checkpointer.close()


@contextmanager
def _storage_may_fail() -> Iterator[None]:
    """Raises OSError where there is no space, RuntimeError for what else storage refused.

    Orbax writes through tensorstore, which raises ValueError for both: elsewhere a mistake of the
    user's, after which no launcher starts again.
    """
    try:
        yield
    except ValueError as error:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(number) in str(error):
                raise OSError(
                    number,
                    "no space left to save a checkpoint: free some, and start the same command "
                    "again",
                ) from error
        raise RuntimeError("a checkpoint could not be saved") from error


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """Steps of the checkpoints in a workdir, ascending; the last one is complete."""
    folder = storage.path(workdir) / CHECKPOINTS
    with storage.reaching(folder):
        if not folder.is_dir():
            return []
        return sorted(
            int(entry.name)
            for entry in folder.iterdir()
            if entry.name.isdigit() and not _is_unfinished(entry)
        )


def _is_unfinished(folder: epath.Path) -> bool:
    return storage.is_remote(folder) and not (folder / _COMPLETE).exists()


def find(path: str | os.PathLike) -> epath.Path:
    """The folder of one checkpoint: `path` itself, or the newest one of the run at `path`.

    Raises CheckpointError where there is none.
    """
    # Orbax reads absolute paths only, and warns at length of others.
    path = storage.absolute(path)
    if path.name == CHECKPOINTS:
        path = path.parent
    if path.name.isdigit() and path.parent.name == CHECKPOINTS:
        with storage.reaching(path):
            if path.exists() and not _is_unfinished(path):
                return path
    steps = saved_steps(path)
    if not steps and path.parent.name == CHECKPOINTS and (there := saved_steps(path.parent.parent)):
        raise CheckpointError(
            f"{path} is not there; the steps saved are {', '.join(map(str, there))}"
        )
    if not steps and (path / CONFIG).exists():
        raise CheckpointError(
            f"{path} holds no checkpoint: that run has saved none, or is of mode linear or knn, "
            "on features of what its config.json names as init_from; name that"
        )
    if not steps:
        is_there = storage.is_remote(path) or path.exists()
        reason = "holds no checkpoint" if is_there else "does not exist"
        raise CheckpointError(
            f"{path} {reason}; name a run's workdir, WORKDIR/{CHECKPOINTS}/STEP, or a .pt or "
            ".safetensors file"
        )
    return path / CHECKPOINTS / str(steps[-1])


def metadata(folder: epath.Path) -> dict[str, Any]:
    """What was said of a checkpoint as it was written; `config` is its run's configuration.

    Raises CheckpointError where the folder holds something else, or no longer all.
    """
    try:
        found = ocp.checkpointables_metadata(folder).custom_metadata
        found["config"]  # another program's checkpoint has none
        return found
    except (KeyError, TypeError, FileNotFoundError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint of this program, or not all of one; name another (where "
            "it is the newest of a run of this program, remove it to go on from the one before)"
        ) from error


def stamp(folder: epath.Path) -> int:
    """When a checkpoint was completed (ns), by which one that took its place is told."""
    return ocp.checkpointables_metadata(folder).commit_timestamp_nsecs


def write_parts(
    workdir: str | os.PathLike, parts: dict[str, Any], metadata: dict[str, Any]
) -> None:
    """Makes a workdir of weights alone, at step 0: for `init_from` and loading, not to resume.

    It is there whole or not at all. `metadata` has the key `config`. Raises CheckpointError where
    there is something of that name.
    """
    workdir = Path(workdir).absolute()
    check_new(workdir)
    partial = workdir.with_name(f".{workdir.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        folder = partial / CHECKPOINTS / "0"
        folder.parent.mkdir(parents=True)
        ocp.save_checkpointables(folder, parts, custom_metadata=metadata)
        write_config(partial, metadata["config"])
        partial.replace(workdir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(workdir: str | os.PathLike) -> None:
    """Raises CheckpointError where a folder cannot become a workdir of weights alone."""
    workdir = Path(workdir)
    if workdir.exists() and not (workdir.is_dir() and not any(workdir.iterdir())):
        raise CheckpointError(f"{workdir} exists and is no empty folder; choose another name")


def has_part(folder: epath.Path, name: str) -> bool:
    """Whether a checkpoint holds the tree `name`."""
    return name in ocp.checkpointables_metadata(folder).metadata


def load_part(folder: epath.Path, name: str) -> Any:
    """One tree of a checkpoint as numpy arrays, whatever it holds."""
    metadata = ocp.checkpointables_metadata(folder).metadata[name]
    shapes = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), metadata)
    return ocp.load_checkpointables(folder, {name: shapes})[name]


def _clear_half_written(folder: epath.Path) -> None:
    """Removes what a kill left of a save; Orbax clears only some of its temporary folders."""
    if folder.exists():
        for entry in folder.iterdir():
            left = entry.name.isdigit() and _is_unfinished(entry)
            if left or "orbax-checkpoint-tmp" in entry.name:
                entry.rmtree()


def write_config(workdir: str | os.PathLike, config: dict[str, Any]) -> None:
    """Atomic, so that a kill leaves the old file or the new one."""
    text = json.dumps(config, indent=2) + "\n"
    storage.write_whole(storage.path(workdir) / CONFIG, text.encode())


# A network file system may show a host what a folder held a minute ago (NFS: acdirmax, 60 s), and
# keeps the lock of a host that died until its lease ends (NFSv4: 90 s).
_SETTLING_SECONDS = 150
_POLL_SECONDS = 1.0


def newest_step(workdir: str | os.PathLike) -> int | None:
    """The step of the newest checkpoint that any process of the run sees, once all see it.

    Raises ValueError, in every process, where one does not come to see it.
    """

    def seen() -> int:
        return max(saved_steps(workdir), default=-1)

    newest = distributed.largest(seen())
    if not distributed.all_true(_settles(lambda: seen() == newest)):
        raise ValueError(
            f"the processes of this run see different checkpoints in {workdir}: give a --workdir "
            "that all hosts share"
        )
    return newest if newest >= 0 else None


@contextmanager
def held(workdir: os.PathLike) -> Iterator[None]:
    """Holds a workdir for this run, whose processes all see it.

    The lock is on an open file, so it ends with its process, the run's first, however that ends;
    where a file system has no locks, and on gs://, nothing keeps two runs apart.

    Raises ValueError where another run is at work in it; in every process, where the hosts have
    each a folder of their own by that name.
    """
    if storage.is_remote(workdir):
        yield
        return
    path = Path(workdir) / "lock"
    if not distributed.is_first():
        _check_shared(path, 0)
        yield
        return
    with path.open("a") as file:
        _take(file, path.parent)
        nonce = secrets.randbits(30)
        file.truncate(0)
        file.write(str(nonce))
        file.flush()
        _check_shared(path, nonce)
        yield


def _take(file, workdir: Path) -> None:
    if storage.try_lock(file):
        return
    # Of a run on several hosts it may be the lock of the one that was lost.
    if distributed.is_joined():
        print(f"another process holds {workdir}: waiting {_SETTLING_SECONDS} s for it", flush=True)
        if _settles(lambda: storage.try_lock(file)):
            return
    raise ValueError(
        f"another process is training in {workdir}; wait for it or choose another --workdir"
    )


def _check_shared(path: Path, nonce: int) -> None:
    """Waits until all processes read the first one's `nonce` in the file at `path`."""
    wanted = str(distributed.from_first(nonce))
    if not distributed.all_true(_settles(lambda: path.exists() and path.read_text() == wanted)):
        raise ValueError(
            f"not every host sees what the first one writes to {path.parent}: give a --workdir "
            "that all of them share, or one on gs://"
        )


def _settles(is_so: Callable[[], bool]) -> bool:
    end = time.monotonic() + _SETTLING_SECONDS
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
    return True
