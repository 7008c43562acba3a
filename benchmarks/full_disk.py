"""python -m benchmarks.full_disk [--mib=3,10,12,16.5]: a run whose disk fills up, for real.

For each size a small model trains in a tmpfs of so many MiB, in a mount namespace of its own
(`unshare --map-root-user --mount`, Linux), and saves every 5 of its 20 steps, 7.9 MB a save. It
must end with code 1 and one line that says so, and every checkpoint before must load whole; then
the tmpfs is made larger, and the same command must go on to the end. Prints a row a size.
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
    """Whether this system lets us mount something that only we see."""
    probe = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(probe, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def fill(mib: float) -> list[str]:
    """A row: size, exit code, last line, steps that are whole, and how the same command went on."""
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
    with tempfile.TemporaryDirectory() as cache:  # else most of the time goes into compiling
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for mib in options.mib.split(","):
            print(f"| {' | '.join(fill(float(mib)))} |", flush=True)


if __name__ == "__main__":
    main()
