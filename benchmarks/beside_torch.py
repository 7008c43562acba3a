"""python -m benchmarks.beside_torch [--dtype=float32]: a training step, ours beside the authors'.

Theirs is s3prl's copy of their model in training mode with its own masking on the host, their loss,
torch.nn.utils.clip_grad_norm_ and torch.optim.AdamW (fused); bfloat16 is torch.autocast over
float32 parameters. `eager` runs it as it is. `compiled` uses torch.compile for each layer and for
the loss; the whole model would be compiled again at every step, because it holds the step's mask as
constants. Ours is the step that training builds. Both take the same log-mel energies, which are on
the device already, use the paper's dropouts, and write float32 parameters. There is one difference:
ours computes the queries and the MLP of the last decoder layer at the masked places only, because
nothing else is read.

Each of ours is compared with each of theirs. The two work in turn, in a process each, so that a
device holds at most two models, and each round gives one ratio. The seconds of the first step
include the compilation, with empty caches. Memory is the peak of the process: VmHWM on a CPU,
torch's max_memory_allocated and XLA's peak_bytes_in_use on a GPU. --batches first tries each batch
on each side alone, and then compares the fastest of each side. The program needs
requirements-test.txt and requirements-reference.txt.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

# This process imports neither jax nor torch: each side imports one of them.
from benchmarks import beside, beside_steps, reference

# Settings of glibc by which a process keeps freed memory, in pieces of any size.
_KEEPS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
}
# Words of XLA, of torch's CUDA allocator and of the system when memory has run out.
_NO_MEMORY = ("RESOURCE_EXHAUSTED", "OutOfMemoryError", "MemoryError", "ended with -9")


def size_of(options: argparse.Namespace) -> dict[str, int]:
    return beside_steps.TINY if options.tiny else beside_steps.BASE


def build(side: str, batch: int, options: argparse.Namespace) -> beside.Side:
    """Returns the side `ours MODE` or `s3prl MODE`, warm."""
    who, mode = side.split()
    settings = {"mode": mode, "batch": batch, "dtype": options.dtype, "device": options.device}
    settings["size"] = size_of(options)
    if who == "s3prl":
        environment = _KEEPS if options.memory == "kept" else {}
        return beside.Side(side, beside_steps.build_theirs, settings, environment=environment)
    settings |= {"from_audio": options.from_audio, "keeps_freed": options.memory != "returned"}
    return beside.Side(side, beside_steps.build_ours, settings)


def best_batch(side: str, options: argparse.Namespace) -> int:
    """Returns the batch with the most clips per second in a trial of a few turns.

    Raises beside.SideError if no batch fits, and for every other failure.
    """
    if len(options.batches) == 1:
        return options.batches[0]
    found = {}
    for batch in options.batches:
        trials = []
        try:
            with beside.ending(trials):
                trials.append(build(side, batch, options))
                beside.take_turns(trials, 3, options.steps)
            found[batch] = statistics.median(beside.rates(trials[0], batch * options.steps))
            print(f"{side}, batch {batch}: {found[batch]:.2f} clips/s in a trial", flush=True)
        except beside.SideError as error:
            if not any(word in str(error) for word in _NO_MEMORY):
                raise
            found[batch] = 0.0
            print(f"{side}, batch {batch}: does not fit", flush=True)
    if not any(found.values()):
        raise beside.SideError(f"{side}: none of the batches fits; name smaller --batches")
    return max(found, key=found.get)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Returns two rows per pair, ours first, and the ratio of their speeds."""
    ours = [f"ours {mode}" for mode in options.ours]
    theirs = [f"s3prl {mode}" for mode in options.modes]
    batches = {name: best_batch(name, options) for name in (*ours, *theirs)}
    found = {"sides": [], "ratios": []}
    for names in itertools.product(ours, theirs):
        rows, rates = compare_pair(names, batches, options)
        found["sides"] += rows
        ratio = beside.spread(rates[0] / rates[1])
        found["ratios"].append({"ours": names[0], "theirs": names[1], "ratio": ratio})
    return found


def compare_pair(
    names: tuple[str, str], batches: dict[str, int], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Returns a row for each of the two sides, and its clips per second in each round."""
    sides = []
    with beside.ending(sides):
        for name in names:
            sides.append(build(name, batches[name], options))
        beside_steps.check_same_work(sides[0].facts, sides[1].facts, size_of(options))
        beside.take_turns(sides, options.rounds, options.steps)
        peaks = [side.close() for side in sides]
    clips = [batches[name] * options.steps for name in names]
    rates = [beside.rates(side, count) for side, count in zip(sides, clips, strict=True)]
    rows = [
        {
            "side": side.name,
            "dtype": options.dtype,
            "memory": options.memory,
            "batch": batches[side.name],
            "clips_a_second": beside.spread(rate),
            "cpu_seconds_a_clip": statistics.median(t.cpu_seconds for t in side.turns) / count,
            "peak_bytes": peak,
            "waiting_load": side.waiting_load,
            **side.facts,
        }
        for side, count, rate, peak in zip(sides, clips, rates, peaks, strict=True)
    ]
    return rows, rates


def table(found: dict[str, Any]) -> str:
    """Returns the sides as a table in Markdown, and one line per ratio."""
    lines = [
        "| side | type | batch | clips/s, median (10th-90th) | CPU seconds per clip | "
        "first step, s | peak memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for side in found["sides"]:
        middle, low, high = side["clips_a_second"]
        cells = [f"{side['side']} ({side['version']})", side["dtype"], str(side["batch"])]
        cells += [f"{middle:.2f} ({low:.2f}-{high:.2f})", f"{side['cpu_seconds_a_clip']:.2f}"]
        cells += [f"{side['first_step_seconds']:.0f}", f"{side['peak_bytes'] / 1e9:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for pair in found["ratios"]:
        middle, low, high = pair["ratio"]
        lines.append(
            f"{pair['ours']} is {middle:.2f} times as fast as {pair['theirs']} "
            f"(median of the rounds; 10th-90th {low:.2f}-{high:.2f})."
        )
    busiest = max(side["waiting_load"] for side in found["sides"])
    lines.append(f"A waiting side kept at most {busiest:.3f} cores busy.")
    return "\n".join(lines)


def positives(text: str) -> list[int]:
    return [beside.positive(number) for number in text.split(",")]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", default="eager,compiled", help="of theirs, from eager,compiled")
    parser.add_argument("--ours", default="unrolled", help="modes of ours, from scan,unrolled")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=beside.positive, default=8, help="clips per step")
    parser.add_argument(
        "--batches", type=positives, help="such as 8,16,32: each side takes its fastest"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--memory",
        choices=["as_is", "kept", "returned"],
        default="as_is",
        help="memory that a step frees on a CPU. as_is: ours keeps it, as in training, theirs does "
        "what torch does; kept: both keep it; returned: both return it to the system",
    )
    parser.add_argument("--rounds", type=beside.positive, default=15)
    parser.add_argument("--steps", type=beside.positive, help="per turn; 1 on a CPU, 20 on a GPU")
    parser.add_argument("--from_audio", action="store_true", help="ours starts from int16 audio")
    parser.add_argument("--tiny", action="store_true", help="a model for tests")
    parser.add_argument("--json", type=Path, help="FILE for the results")
    options = parser.parse_args(arguments)
    for name, known in (("modes", ("eager", "compiled")), ("ours", ("scan", "unrolled"))):
        given = getattr(options, name).split(",")
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"--{name}: {', '.join(unknown)} unknown; known: {', '.join(known)}")
        setattr(options, name, given)
    options.batches = options.batches or [options.batch]
    options.steps = options.steps or (20 if options.device == "cuda" else 1)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if message := reference.missing():
        sys.exit(f"error: {message}")
    try:
        found = compare(options)
    except (ValueError, beside.SideError) as error:
        sys.exit(f"error: {error}")
    print(table(found))
    if options.json:
        settings = {"settings": vars(options)}
        options.json.write_text(json.dumps(settings | found, indent=1, default=str))


if __name__ == "__main__":
    main()
