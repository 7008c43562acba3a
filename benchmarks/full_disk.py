"""python -m benchmarks.full_disk [--mib=3,10,12,16.5]: trains on disks that fill up.

For each size in MiB, a small model trains for 20 steps in a tmpfs of that size, in its own mount
namespace (`unshare --map-root-user --mount`, Linux). It saves 7.9 MB every 5 steps. The run must
end with code 1 and one line that names the full disk, and every checkpoint saved before must load
whole. Then the tmpfs is made larger, and the same command must go on to the end. Prints one row per
size.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from maeast_jax import checkpoint

_CONFIG = Path(__file__).parent / "kills_config.py"
_AMPLE_MIB = 64.0
STEPS = 20


def available() -> bool:
    """Returns whether this system lets us mount a tmpfs in our own namespace."""
    probe = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(probe, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def fill(mib: float) -> list[str]:
    """Fills a disk of `mib` MiB; returns the cells of a row.

    They are the size, the exit code, the last line, the steps whose checkpoints are whole, and the
    exit code and newest step of the same command with room.
    """
    words = ["unshare", "--map-root-user", "--mount"]
    words += [sys.executable, "-m", "benchmarks.full_disk", f"--inside={mib}"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.splitlines()[-1].split("\t")


def _inside(mib: float) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        _mount(folder, mib, "-t", "tmpfs")
        try:
            code, last = _train(folder)
            steps = checkpoint.saved_steps(folder)
            for step in steps:
                for part in ("weights", "progress"):
                    checkpoint.load_part(Path(folder) / checkpoint.CHECKPOINTS / str(step), part)
            _mount(folder, _AMPLE_MIB, "-o", "remount")
            again, _ = _train(folder)
            newest = max(checkpoint.saved_steps(folder), default=0)
        finally:
            subprocess.run(["umount", folder], check=True)
    return [f"{mib:g}", str(code), last, ", ".join(map(str, steps)), f"{again}, step {newest}"]


def _mount(folder: str, mib: float, *options: str) -> None:
    size = f"size={round(mib * 1024)}k"
    subprocess.run(["mount", *options, "-o", size, "none", folder], check=True)


def _train(folder: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "maeast_jax.train", f"--config={_CONFIG}", f"--workdir={folder}",
         f"--config.total_steps={STEPS}", "--config.checkpoint_every=5",
         "--config.eval.pictures=0"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, (done.stderr.splitlines() or [""])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", default="3,10,12,16.5")
    parser.add_argument("--inside", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print("\t".join(_inside(options.inside)))
        return
    if not available():
        raise SystemExit("error: unshare --map-root-user --mount is not allowed here; run as root")
    print("| MiB | exit code | last line | whole checkpoints | with room: exit code, newest |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:  # each run would compile again
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for mib in options.mib.split(","):
            print(f"| {' | '.join(fill(float(mib)))} |", flush=True)


if __name__ == "__main__":
    main()
