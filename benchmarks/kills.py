"""python -m benchmarks.kills --workdir=DIR [--kills=50]: a run killed at random moments.

A small model trains on synthetic clips and saves at every step; each time a line reports a new
step it is killed (SIGKILL) after a random moment, most often in the middle of a save. After every
kill the newest checkpoint must load whole and be no older than the newest before the kill; then
the run goes on. At the end its parameters, optimiser and losses must be those of a run that nobody
killed, bit for bit. Prints a line a kill, and what half-written things it found.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from maeast_jax import checkpoint, logs

_CONFIG = Path(__file__).parent / "kills_config.py"


def start(workdir: Path, steps: int) -> subprocess.Popen:
    cache = workdir.parent / "compiled"  # else most of the time goes into compiling
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "maeast_jax.train", f"--config={_CONFIG}",
         f"--workdir={workdir}", f"--config.total_steps={steps}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def kill_once(workdir: Path, steps: int, draw: random.Random) -> str | None:
    """Runs until some step is reported, waits a random moment, kills; None where it had ended."""
    reports = draw.randint(1, 4)
    process = start(workdir, steps)
    for line in process.stderr:
        reports -= line.startswith("step ")
        if not reports:
            time.sleep(draw.uniform(0.0, 0.25))
            process.send_signal(signal.SIGKILL)
            break
    process.stderr.close()
    if process.wait() != -signal.SIGKILL:
        if process.returncode:
            raise SystemExit(f"the run ended with {process.returncode} by itself")
        return None
    folder = workdir / checkpoint.CHECKPOINTS
    half = [entry.name for entry in folder.iterdir() if not entry.name.isdigit()]
    return f"killed with {len(half)} half-written save(s)"


def final(workdir: Path) -> list:
    newest = checkpoint.find(workdir)
    parts = [checkpoint.load_part(newest, name) for name in ("weights", "progress")]
    losses = np.array([(r["step"], r["loss"]) for r in logs.read_metrics(workdir)])
    return [*map(np.asarray, jax.tree.leaves(parts)), losses]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    steps = 8 * options.kills
    shutil.rmtree(options.workdir, ignore_errors=True)
    options.workdir.mkdir(parents=True)
    killed, whole = options.workdir / "killed", options.workdir / "whole"
    newest_before, in_a_save, count = 0, 0, 0
    while count < options.kills:
        told = kill_once(killed, steps, draw)
        if told is None:
            raise SystemExit(f"the run ended after {count} kills: raise its steps")
        count += 1
        in_a_save += not told.startswith("killed with 0")
        saved = checkpoint.saved_steps(killed) or [0]
        assert saved[-1] >= newest_before, f"step {newest_before} was lost"
        if saved[-1]:
            newest = checkpoint.find(killed)
            for name in ("weights", "progress"):
                checkpoint.load_part(newest, name)  # raises where a file is short
        newest_before = saved[-1]
        print(f"{count}: {told}; newest checkpoint {newest_before}, whole", flush=True)
    for workdir in (killed, whole):
        process = start(workdir, steps)
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(errors)
    for got, wanted in zip(final(killed), final(whole), strict=True):
        np.testing.assert_array_equal(got, wanted)
    print(
        f"{count} kills, {in_a_save} of them with a save half written: every newest checkpoint "
        f"was whole, and the end after {steps} steps is that of a run that nobody killed"
    )


if __name__ == "__main__":
    main()
