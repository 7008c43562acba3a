"""python -m benchmarks.kills --workdir=DIR [--kills=50] [--processes=2]: kills a run at random.

A small model trains on synthetic clips and saves at every step. After a line has reported a new
step, the run is killed (SIGKILL) at a random moment, most often in the middle of a save. With
several processes, one drawn at random is killed, and the others must end by themselves, with a code
on which launchers start again. After every kill the newest checkpoint must load whole and must not
be older than the newest one before the kill; then the run goes on. At the end, parameters,
optimiser and losses must equal, bit for bit, those of a run that nobody killed.

Prints one line per kill: what it left half-written, and how the other processes ended. DIR is
removed first and made anew, so give the benchmark its own folder.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from maeast_jax import checkpoint
from maeast_jax.runtime import cli
from maeast_jax.training import metrics_writer

_CONFIG = Path(__file__).parent / "kills_config.py"
# Exit codes of a process whose peer was killed: it noticed itself, or jax aborted it.
_STARTED_AGAIN = (cli.EXIT_PEER_LOST, -signal.SIGABRT)


def start(workdir: Path, steps: int, processes: int) -> list[subprocess.Popen]:
    """Starts the run in so many processes; they share a cache of compiled programs."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "maeast_jax.train", f"--config={_CONFIG}",
               f"--workdir={workdir}", f"--config.total_steps={steps}"]  # fmt: skip
    joined: list[list[str]] = [[]]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"--coordinator=127.0.0.1:{probe.getsockname()[1]}"
        joined = [
            [address, f"--num_processes={processes}", f"--process_id={i}"] for i in range(processes)
        ]
        environment["JAX_NUM_CPU_DEVICES"] = "1"
    return [
        subprocess.Popen(
            command + flags, env=environment, stdout=subprocess.DEVNULL,
            stderr=None if i else subprocess.PIPE, text=True,
        )
        for i, flags in enumerate(joined)
    ]  # fmt: skip


def kill_once(workdir: Path, steps: int, processes: int, draw: random.Random) -> str:
    """Runs until some step is reported, and kills one process a random moment later.

    Returns what the kill left, in words.
    """
    reports = draw.randint(1, 4)
    victim = draw.randrange(processes)
    started = start(workdir, steps, processes)
    for line in started[0].stderr:
        reports -= line.startswith("step ")
        if not reports:
            time.sleep(draw.uniform(0.0, 0.25))
            started[victim].send_signal(signal.SIGKILL)
            break
    _, told = started[0].communicate()
    codes = [process.wait() for process in started]
    if codes[victim] != -signal.SIGKILL:
        raise SystemExit(f"the run ended with {codes} before it was killed\n{told}")
    others = sorted(codes[:victim] + codes[victim + 1 :])
    if any(code not in _STARTED_AGAIN for code in others):
        raise SystemExit(f"process {victim} was killed, and the others ended with {others}\n{told}")
    folder = workdir / checkpoint.CHECKPOINTS
    entries = folder.iterdir() if folder.exists() else ()
    half = [entry.name for entry in entries if not entry.name.isdigit()]
    text = f"killed with {len(half)} half-written save(s)"
    return text + (f", process {victim}; the others ended with {others}" if others else "")


def final(workdir: Path) -> list:
    """Returns the arrays of the newest checkpoint and the losses of all steps."""
    newest = checkpoint.find(workdir)
    parts = [checkpoint.load_part(newest, name) for name in ("weights", "progress")]
    losses = np.array([(r["step"], r["loss"]) for r in metrics_writer.read_metrics(workdir)])
    return [*map(np.asarray, jax.tree.leaves(parts)), losses]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    steps = 8 * options.kills
    shutil.rmtree(options.workdir, ignore_errors=True)
    options.workdir.mkdir(parents=True)
    killed, whole = options.workdir / "killed", options.workdir / "whole"
    newest_before, in_a_save = 0, 0
    for count in range(1, options.kills + 1):
        told = kill_once(killed, steps, options.processes, draw)
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
        started = start(workdir, steps, options.processes)
        _, errors = started[0].communicate()
        codes = [process.wait() for process in started]
        if any(codes):
            raise SystemExit(errors)
    for got, wanted in zip(final(killed), final(whole), strict=True):
        np.testing.assert_array_equal(got, wanted)
    print(
        f"{options.kills} kills, {in_a_save} of them with a save half written: every newest "
        f"checkpoint was whole, and the end after {steps} steps is that of a run nobody killed"
    )


if __name__ == "__main__":
    main()
