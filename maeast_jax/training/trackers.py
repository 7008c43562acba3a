"""Sends a run's metrics to Weights & Biases or Trackio, beside the files in its workdir."""

import hashlib
import importlib
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from maeast_jax.runtime import distributed, storage, terminal

TRACKERS = ("wandb", "trackio")
HELP = "Service that gets the metrics too; install it with pip."
_PROJECT = "maeast_jax"


def check(name: str) -> None:
    """Raises ValueError for a tracker that is unknown or not installed; "" is none."""
    if name and name not in TRACKERS:
        raise ValueError(f"tracker={name!r} is unknown; known: {', '.join(TRACKERS)}")
    if name and importlib.util.find_spec(name) is None:
        raise ValueError(f"tracker={name} is not installed: pip install {name}")


class Tracker:
    """One run of a tracker. A workdir that goes on after a stop goes on in the same run.

    Trackio has the interface of Weights & Biases. Of several processes only the first one tracks,
    and with the name "" none does.
    """

    def __init__(self, name: str, workdir: str | os.PathLike, started: str, config: Mapping):
        """Starts the run.

        Args:
          name: one of TRACKERS, or "".
          workdir: its last parts name the run.
          started: when the workdir's first start was; it tells apart runs of one workdir.
          config: the configuration.

        Raises ValueError, in one line, for example without a login.
        """
        self._module: Any = None
        if not name or not distributed.is_first():
            return
        self._module = importlib.import_module(name)
        path = storage.absolute(workdir)
        run = hashlib.sha256(f"{path} {started}".encode()).hexdigest()[:16]
        names = {"name": f"{path.name}-{run[:4]}"}
        if name == "wandb":  # Trackio knows a run by its name, and has a folder of its own
            names |= {"id": run, "dir": None if storage.is_remote(path) else str(path)}
        try:
            self._module.init(project=_PROJECT, config=dict(config), resume="allow", **names)
        except Exception as error:  # each tracker has its own classes of errors
            raise ValueError(
                f"--tracker={name} cannot start ({terminal.one_line(error)}); log in first, or "
                "drop the flag"
            ) from error

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Sends the values of one line of metrics.jsonl as SPLIT/NAME."""
        if self._module is not None:
            self._module.log({f"{split}/{key}": value for key, value in values.items()}, step=step)

    def close(self) -> None:
        """Waits until all values are sent."""
        if self._module is not None:
            self._module.finish()
