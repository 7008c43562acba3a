"""python -m benchmarks.embed FOLDER [--count=1000]: time of embedding audio files, beside s3prl's.

Files drawn from FOLDER and weights (base size, random; or --checkpoint) are the same for all rows,
in float32, one process after the other: `maeast_jax.embed --pool=time`, with windows and without,
then s3prl's expert, with the same decoder, the last hidden states averaged over time, clip by clip
and in batches of eight clips of similar length. Seconds are a process's whole life. Memory is the
most that the process and its children held at once. Needs requirements-test.txt and
requirements-reference.txt.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import reference
from maeast_jax import fbank
from maeast_jax.data import audio
from maeast_jax.ingest import sources

_POLL_SECONDS = 0.2


def measure(command: list[str]) -> tuple[float, float]:
    """Returns a command's seconds and the most GB that it and its descendants held at once."""
    start = time.monotonic()
    process = subprocess.Popen(command)
    most = 0
    while process.poll() is None:
        most = max(most, sum(map(_proportional_bytes, _descendants(process.pid))))
        time.sleep(_POLL_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.monotonic() - start, most / 1e9


def choose(folder: Path, count: int, shortest_frames: int) -> list[Path]:
    """Returns files drawn from a folder, without the files that are too short for s3prl."""
    files = [Path(file.path) for file in sources.list_folder(folder).files]
    chosen = []
    for index in np.random.default_rng(0).permutation(len(files)):
        try:
            samples = len(audio.decode(files[index]).samples)
        except audio.UndecodableError:
            continue
        if fbank.frame_count(samples) >= shortest_frames:
            chosen.append(files[index])
        if len(chosen) == count:
            break
    return sorted(chosen)


def embed_with_s3prl(checkpoint: str, listing: Path, output: Path, batch_size: int) -> None:
    """Embeds the listed files; this runs in the process that is measured."""
    import torch

    expert = reference.expert(checkpoint)
    files = listing.read_text().split("\n")
    clips = [np.float32(audio.decode(file).samples) / 32_768 for file in files]
    order = sorted(range(len(clips)), key=lambda index: len(clips[index]))
    patch_frames = expert.ast_kernel_stride_time
    embeddings = [None] * len(clips)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        with torch.no_grad():
            last = expert([torch.from_numpy(clips[index]) for index in batch])["hidden_states"][-1]
        for row, index in enumerate(batch):
            steps = fbank.frame_count(len(clips[index])) // patch_frames
            embeddings[index] = last[row, :steps].mean(0).numpy()
    np.save(output, np.stack(embeddings))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--tokens", default="patch")
    parser.add_argument("--checkpoint", help="a .pt of the authors' layout")
    parser.add_argument("--s3prl", nargs=2, help=argparse.SUPPRESS)  # listing, output
    parser.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.s3prl:
        listing, output = map(Path, options.s3prl)
        embed_with_s3prl(options.checkpoint, listing, output, options.batch)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(compare(options, Path(folder)))


def compare(options: argparse.Namespace, folder: Path) -> str:
    from maeast_jax.inference import pretrained

    checkpoint = options.checkpoint or str(
        reference.make_checkpoint(folder / "base.pt", tokens=options.tokens)
    )
    patch_frames, _ = pretrained.read(checkpoint).config.patch_shape
    files = choose(options.folder, options.count, patch_frames)
    listing = folder / "files"
    listing.write_text("\n".join(map(str, files)))
    ours = [sys.executable, "-m", "maeast_jax.embed", *map(str, files), "--pool=time",
            f"--checkpoint={checkpoint}", "--overwrite",
            f"--output={folder / 'ours.npz'}"]  # fmt: skip
    rows = [("maeast_jax.embed, windows", *measure(ours))]
    rows.append(("maeast_jax.embed", *measure([*ours, "--window_seconds=0"])))
    theirs = {}
    for batch_size in (1, 8):
        theirs[batch_size] = folder / f"{batch_size}.npy"
        command = [sys.executable, "-m", "benchmarks.embed", str(options.folder),
                   f"--checkpoint={checkpoint}", "--s3prl", str(listing), str(theirs[batch_size]),
                   f"--batch={batch_size}"]  # fmt: skip
        rows.append((f"s3prl, batches of {batch_size}", *measure(command)))
    with np.load(folder / "ours.npz") as saved:
        place = {name: row for row, name in enumerate(saved["files"].tolist())}
        embeddings = saved["embeddings"][[place[str(file)] for file in files]]
    wanted = np.load(theirs[1])
    deviation = np.abs(embeddings - wanted).max() / np.abs(wanted).max()
    lines = ["| | seconds | clips/s | most memory, GB |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {seconds:.0f} | {len(files) / seconds:.1f} | {memory:.2f} |"
        for name, seconds, memory in rows
    ]
    return "\n".join(
        [
            f"{len(files)} files, {options.tokens} tokens, {os.cpu_count()} cores.",
            "",
            *lines,
            "",
            "Greatest deviation of an embedding from s3prl's, clip by clip: "
            f"{deviation:.1e} of the largest value.",
        ]
    )


def _descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(found for child in children for found in _descendants(int(child)))]


def _proportional_bytes(pid: int) -> int:
    """Returns a process's memory; pages that it shares count in part."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    main()
