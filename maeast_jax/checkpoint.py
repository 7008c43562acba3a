"""A run's folder on disk: its checkpoints, its configuration, the record of its starts, its lock.

`WORKDIR/checkpoints/STEP/` is one checkpoint, which Orbax writes in two parts, so that weights load
without the optimiser: `weights` {params, statistics} and `progress` {step, opt_state}.

On this machine Orbax writes a checkpoint under another name and renames it at the end, so the
newest folder named STEP is complete. On gs:// nothing can be renamed: there Orbax adds the object
`commit_success.txt` at the end. A kill during a deletion can leave an older checkpoint incomplete.
"""

import errno
import glob
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from maeast_jax.runtime import distributed, storage
from maeast_jax.runtime.cli import PeerLostError

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
_LOCK = "lock"
_COMPLETE = "commit_success.txt"
_SAVING = ocp.Context()
# By default a thread makes the folders; where that fails, other threads wait for them for minutes.
_SAVING.asynchronous.create_directories_asynchronously = False


class CheckpointError(ValueError):
    """A checkpoint is missing, or does not hold what the caller needs; the message is one line."""


class Checkpoints:
    """Saves and restores the checkpoints of one run, and keeps the newest `keep` of them.

    An older checkpoint is deleted by the next call of `save`, `wait` or `close` after a newer one
    is complete. All processes make the same calls in the same order.

    Orbax' own `Checkpointer` does the same, but asks jax's preemption service at every save which
    step the run has reached. The service cannot tell these questions from those of
    `distributed.stopping`, which counts otherwise, and then the processes never agree to stop.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int, metadata: dict[str, Any]):
        """Removes what a killed process left half-written.

        Args:
          workdir: the run's folder.
          keep: number of checkpoints to keep.
          metadata: JSON that every checkpoint carries; `config` must be among its keys.
        """
        self._folder = storage.absolute(workdir) / CHECKPOINTS
        self._keep = keep
        self._metadata = metadata
        self._steps = saved_steps(workdir)
        self._saving: Any = None  # Orbax' answer for the save under way
        if distributed.is_first():
            _clear_half_written(self._folder)

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, saved or being saved; None without one."""
        return self._steps[-1] if self._steps else None

    def save(self, step: int, parts: dict[str, Any]) -> None:
        """Starts to write a checkpoint, once the one before is complete.

        Returns when the values have left the device, so the caller may donate `parts`. The newest
        step is not saved again: a run's state is a function of its step.

        Raises:
          OSError: there is no space left, for this checkpoint or for the one before.
          RuntimeError: a checkpoint could not be written for another reason.
          PeerLostError: another process of the run is gone.
        """
        if step == self.latest_step():
            return
        self.wait()
        with _errors_of_a_save(), _SAVING:
            self._saving = ocp.save_checkpointables_async(
                self._folder / str(step), parts, custom_metadata=self._metadata
            )
        self._steps.append(step)

    def restore(self, step: int, abstract_parts: dict[str, Any]) -> dict[str, Any]:
        """Returns the parts saved at `step`.

        Args:
          step: the step of a complete checkpoint.
          abstract_parts: the wanted trees of `jax.ShapeDtypeStruct`, with shardings.

        Raises CheckpointError where the checkpoint is damaged; PeerLostError.
        """
        folder = self._folder / str(step)
        with _reading(folder), distributed.others_alive():
            return ocp.load_checkpointables(folder, abstract_parts)

    def wait(self) -> None:
        """Returns when the save under way is complete on disk; raises as `save` does."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with _errors_of_a_save():
                saving.result()
        for step in self._steps[: -self._keep]:
            old = self._folder / str(step)
            if distributed.is_first() and os.path.islink(old):
                os.unlink(old)  # a user moved the checkpoint to another disk, and it stays there
            elif distributed.is_first():
                old.rmtree(missing_ok=True)
            self._steps.remove(step)

    def close(self) -> None:
        """Waits for the save under way; raises as `save` does."""
        self.wait()


@contextmanager
def _errors_of_a_save() -> Iterator[None]:
    """Raises OSError for a full disk, RuntimeError for other failures of the storage.

    Orbax raises ValueError for both, but after a ValueError no launcher starts the run again.
    """
    try:
        with distributed.others_alive():
            yield
    except ValueError as error:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(number) in str(error):
                remedy = "free some, and start the same command again"
                raise OSError(number, f"no space left to save a checkpoint: {remedy}") from error
        raise RuntimeError("a checkpoint could not be saved") from error


def _clear_half_written(folder: epath.Path) -> None:
    if folder.exists():
        for entry in folder.iterdir():
            is_unfinished = _step(entry.name) is not None and not _is_complete(entry)
            if is_unfinished or "orbax-checkpoint-tmp" in entry.name:
                entry.rmtree()


def _is_complete(folder: epath.Path) -> bool:
    """Whether a folder named STEP is complete; on this machine it always is."""
    return not storage.is_remote(folder) or (folder / _COMPLETE).exists()


def _step(name: str) -> int | None:
    """Returns the step of a checkpoint by its folder's name; None for the name of anything else."""
    is_number = name.isascii() and name.isdigit()
    return int(name) if is_number and name == str(int(name)) else None


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """Returns the steps of the checkpoints in a workdir, ascending; the last one is complete."""
    folder = storage.path(workdir) / CHECKPOINTS
    with storage.reaching(folder):
        if not folder.is_dir():
            return []
        found = ((_step(entry.name), entry) for entry in folder.iterdir())
        return sorted(step for step, entry in found if step is not None and _is_complete(entry))


def find(path: str | os.PathLike) -> epath.Path:
    """Returns the folder of one checkpoint: `path` itself, or the newest one of the run at `path`.

    Raises CheckpointError where there is none.
    """
    path = storage.absolute(path)  # Orbax reads no others
    # A run comes first, because its name may be `checkpoints` or `checkpoints/1`.
    for workdir in (path, path.parent) if path.name == CHECKPOINTS else (path,):
        if steps := saved_steps(workdir):
            return workdir / CHECKPOINTS / str(steps[-1])
    if path.parent.name == CHECKPOINTS and (step := _step(path.name)) is not None:
        steps = saved_steps(path.parent.parent)
        if step in steps:
            return path
        if steps:
            raise CheckpointError(f"{path} is not there; saved are {', '.join(map(str, steps))}")
    if (path / CONFIG).exists():
        raise CheckpointError(
            f"{path} holds no checkpoint: that run has saved none, or is of mode linear or knn, "
            "on features of what its config.json names as init_from; name that"
        )
    is_there = storage.is_remote(path) or path.exists()
    raise CheckpointError(
        f"{path} {'holds no checkpoint' if is_there else 'does not exist'}; name a run's workdir, "
        f"WORKDIR/{CHECKPOINTS}/STEP, a .pt or .safetensors file, or an exported folder"
    )


@contextmanager
def _reading(folder: epath.Path) -> Iterator[None]:
    """Raises CheckpointError where Orbax cannot read a checkpoint of this machine.

    Orbax raises errors of any type for a file that is missing, empty or cut short, and logs and
    warns of more. On gs:// objects are whole, and errors there tell of the connection.
    """
    jax.devices()  # here a device that is missing is not taken for damage
    try:
        with storage.quiet(), warnings.catch_warnings(action="ignore"):
            yield
    except (PeerLostError, jax.errors.JaxRuntimeError, MemoryError, PermissionError):
        raise
    except Exception as error:
        if storage.is_remote(folder):
            raise
        remedy = "the run has saved no other before it: name another checkpoint or --workdir"
        steps = [step for step in saved_steps(folder.parent.parent) if step < int(folder.name)]
        if steps:
            remedy = f"move it away, and the run goes on from the one before, step {steps[-1]}"
        raise CheckpointError(
            f"{folder} is damaged, or is no checkpoint of this program; {remedy}"
        ) from error


def metadata(folder: epath.Path) -> dict[str, Any]:
    """Returns the metadata saved with a checkpoint; its `config` is the run's configuration.

    Raises CheckpointError where the folder is another program's checkpoint, or is damaged.
    """
    with _reading(folder):
        found = ocp.checkpointables_metadata(folder).custom_metadata
        found["config"]
        return found


def stamp(folder: epath.Path) -> int:
    """Returns when a checkpoint was completed, in ns; another checkpoint has another stamp."""
    with _reading(folder):
        return ocp.checkpointables_metadata(folder).commit_timestamp_nsecs


def has_part(folder: epath.Path, name: str) -> bool:
    """Returns whether a checkpoint holds the part `name`."""
    with _reading(folder):
        return name in ocp.checkpointables_metadata(folder).metadata


def load_part(folder: epath.Path, name: str) -> Any:
    """Returns one part of a checkpoint as a tree of numpy arrays, in the shapes it was saved in.

    Raises CheckpointError where the checkpoint is damaged.
    """
    with _reading(folder):
        saved = ocp.checkpointables_metadata(folder).metadata[name]
        shapes = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved)
        return ocp.load_checkpointables(folder, {name: shapes})[name]


def write_parts(
    workdir: str | os.PathLike, parts: dict[str, Any], metadata: dict[str, Any]
) -> None:
    """Makes a workdir with one checkpoint at step 0, whole or not at all; no run can resume it.

    Args:
      workdir: a folder of this machine that does not exist or is empty.
      parts: the trees to save, by name.
      metadata: what `metadata` returns later; `config` must be among its keys.

    Raises CheckpointError where something of that name exists.
    """
    check_new(workdir)
    with storage.whole(Path(workdir).absolute()) as partial:
        ocp.save_checkpointables(partial / CHECKPOINTS / "0", parts, custom_metadata=metadata)
        write_config(partial, metadata["config"])


def check_new(workdir: str | os.PathLike) -> None:
    """Raises CheckpointError where `write_parts` cannot make a workdir of this name."""
    _check_name(workdir)
    workdir = Path(workdir)
    if workdir.exists() and not (workdir.is_dir() and not any(workdir.iterdir())):
        raise CheckpointError(f"{workdir} exists and is no empty folder; choose another name")


def make_workdir(workdir: str | os.PathLike) -> None:
    """Makes the folder of a run; raises ValueError where the run could not save or be read."""
    _check_name(workdir)
    storage.make_writable(storage.path(workdir), "--workdir")
    folder = Path(os.path.expanduser(workdir))
    for file in (*folder.glob("*"), *folder.glob(f"{CHECKPOINTS}/*")):
        if file.exists() and not os.access(file, os.W_OK):
            raise ValueError(
                f"{file} cannot be written by this user; choose another --workdir, or have its "
                "owner give write permission to all files of the run"
            )


def _check_name(workdir: str | os.PathLike) -> None:
    """Raises CheckpointError for a path in which Orbax cannot find the files that it wrote.

    Orbax looks for them by a pattern that begins with the path, and tensorstore reads a backslash
    as a slash.
    """
    path = os.fspath(storage.absolute(workdir))
    if glob.has_magic(path) or "\\" in path:
        raise CheckpointError(
            f"{path} has one of the characters * ? [ \\ in its path, where Orbax cannot read a "
            "checkpoint back; choose another name"
        )


def write_config(workdir: str | os.PathLike, config: dict[str, Any]) -> None:
    """Writes `config.json`; a kill leaves the old file or the new one."""
    text = json.dumps(config, indent=2) + "\n"
    storage.write_whole(storage.path(workdir) / CONFIG, text.encode())


def saved_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """Returns what `write_config` wrote, of a run of any mode; {} where there is nothing."""
    file = storage.path(workdir) / CONFIG
    with storage.reaching(workdir):
        return json.loads(file.read_text()) if file.exists() else {}


def read_config(workdir: str | os.PathLike, mode: str | None) -> dict[str, Any]:
    """Returns what `write_config` wrote, {} in a new workdir.

    Args:
      mode: the `mode` of fine-tuning; None for pretraining, whose configurations have none.

    Raises CheckpointError where the run is of another mode: its files would be lost.
    """
    found = saved_config(workdir)
    if not found:
        return {}
    was, is_ = found.get("mode") or "pretraining", mode or "pretraining"
    if was != is_:
        raise CheckpointError(
            f"{workdir} holds a run of {was}, not of {is_}; choose another --workdir "
            f"(--config.init_from={workdir} starts from its weights)"
        )
    return found


def record_start(workdir: str | os.PathLike, entry: dict[str, Any]) -> str:
    """Appends an entry to `environment.json`, a list with one entry per start of the run.

    Returns the first entry's `time`.
    """
    file = storage.path(workdir) / ENVIRONMENT
    entries = [*(json.loads(file.read_text()) if file.exists() else []), entry]
    storage.write_whole(file, (json.dumps(entries, indent=1) + "\n").encode())
    return entries[0]["time"]


def newest_step(workdir: str | os.PathLike) -> int | None:
    """Returns the step of the newest checkpoint in a workdir; None without one.

    Raises ValueError, in every process, where the processes see different steps.
    """
    newest = max(saved_steps(workdir), default=-1)
    if not distributed.all_true(newest == distributed.from_first(newest)):
        raise ValueError(
            f"the processes of this run see different checkpoints in {workdir}: give a --workdir "
            "that all hosts share"
        )
    return newest if newest >= 0 else None


@contextmanager
def held(workdir: str | os.PathLike) -> Iterator[None]:
    """Keeps other runs out of a workdir.

    The run's first process locks an open file, so the lock ends with that process, however it
    ends. Where the file system has no locks, and on gs://, nothing keeps two runs apart.

    Raises ValueError, in every process, where another run holds the workdir, or where the hosts
    do not share it.
    """
    if storage.is_remote(workdir):
        yield
        return
    path = Path(workdir) / _LOCK
    with ExitStack() as files:
        is_ours = True
        if distributed.is_first():
            is_ours = storage.try_lock(files.enter_context(path.open("a")))
        if not distributed.all_true(is_ours):
            raise ValueError(
                f"another process is training in {workdir}; wait for it or choose another --workdir"
            )
        # The first process has made the file by now.
        if not distributed.all_true(path.exists()):
            raise ValueError(
                f"not every host sees what the first one writes to {workdir}: give a --workdir "
                "that all of them share, or one on gs://"
            )
        yield
