"""python -m benchmarks.input [--data_dir=DIR --data=NAME]: the input pipeline of pretraining alone.

It takes the batches of training as fast as they come and prints two tables in Markdown. The first
holds clips per second and clips per CPU second, with log-mel energies left to the device and with
energies computed on the host. The second holds the CPU time per clip of the parts, called alone;
each part but the last includes the parts above it. Without a data set the benchmark first writes
ten-second clips of noise (130 MB) and reads them from the page cache. For the figures of one core:
`taskset -c 0 python -m benchmarks.input --threads=1`.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np

from maeast_jax import config as configuration
from maeast_jax import fbank
from maeast_jax.data import DataConfig, Example, mixture, num_cores, pipeline, writer

_NAME = "ten_seconds_of_noise"
_CLIPS = 400
_STAGE_SECONDS = 2.0


def noise(num_samples: int) -> Iterator[Example]:
    random = np.random.default_rng(0)
    for index in range(_CLIPS):
        yield str(index), random.integers(-9000, 9000, num_samples).astype(np.int16), None


def throughput(options: argparse.Namespace, place: str) -> list[str]:
    """A row of the first table."""
    settings = _settings(options, place)
    stream = pipeline.train_batches(
        settings, pipeline.open_train(settings), seed=0, batch_size=options.batch,
        num_frames=options.num_frames, start_step=0, total_steps=1_000_000_000,
    )  # fmt: skip
    # Threads and queue hold fewer, so all clips that count are loaded while the clock runs.
    for _ in range(4 + 2 * (options.threads or num_cores())):
        next(stream)
    clips = size = 0
    start, before = time.monotonic(), os.times()
    while (seconds := time.monotonic() - start) < options.seconds:
        (batch,) = next(stream).values()
        clips += len(batch)
        size += batch.nbytes
    after = os.times()
    stream.close()
    user, system = after.user - before.user, after.system - before.system
    cpu = user + system
    return [
        place, f"{clips / seconds:.0f}", f"{clips / cpu:.0f}", f"{size / seconds / 1e6:.0f}",
        f"{1e3 * user / clips:.2f}", f"{1e3 * system / clips:.2f}", f"{cpu / seconds:.2f}",
    ]  # fmt: skip


def stages(options: argparse.Namespace) -> dict[str, float]:
    """CPU milliseconds per clip of each part, from first to last."""
    import tensorflow as tf

    clips = pipeline.open_train(_settings(options, "device"))
    if len(clips.splits) > 1:
        raise ValueError(f"--data={options.data} names several data sets; name one")
    (split,) = clips.splits
    num_samples = fbank.num_samples(options.num_frames)

    def address(step: int) -> tuple[np.ndarray, ...]:
        return mixture.address(step * options.batch + np.arange(options.batch), clips, 0)

    def crop(step: int) -> np.ndarray:
        return pipeline.read(clips, *address(step), 0, num_samples)

    same = tf.data.Dataset.from_tensors(crop(0)).repeat()
    energies = same.map(fbank.fbank_tf).as_numpy_iterator()
    calls = {
        "addresses: mixture.address": address,
        "records read and decompressed: Records.read": lambda step: split.records.read(
            address(step)[2]
        ),
        "records decoded: Split.read": lambda step: split.read(address(step)[2]),
        "clips cropped: pipeline.read": crop,
        "log-mel energies alone: fbank_tf": lambda step: next(energies),
    }
    return {name: _cpu_ms(call, options.batch) for name, call in calls.items()}


def _cpu_ms(call: Callable[[int], object], clips: int) -> float:
    """CPU milliseconds per clip of `call(step)`, which handles `clips` clips."""
    call(0)
    step, before, start = 0, time.process_time(), time.monotonic()
    while time.monotonic() - start < _STAGE_SECONDS:
        step += 1
        call(step)
    return 1e3 * (time.process_time() - before) / (step * clips)


def _settings(options: argparse.Namespace, place: str) -> DataConfig:
    section = configuration.pretrain().data
    section.update(dir=options.data_dir, train=options.data, fbank=place, threads=options.threads)
    return DataConfig(**section.to_dict())


def _report(options: argparse.Namespace) -> str:
    lines = [
        f"Batches of {options.batch} clips of {options.num_frames} frames, {options.data}, "
        f"{num_cores()} cores.",
        "",
        "| fbank | clips/s | clips per CPU second | MB/s | user, ms per clip | "
        "system, ms per clip | cores busy |",
        "|---|---|---|---|---|---|---|",
    ]
    for place in [options.fbank] if options.fbank else pipeline.FBANK_PLACES:
        lines.append(f"| {' | '.join(throughput(options, place))} |")
    lines += ["", "| one thread | CPU, ms per clip |", "|---|---|"]
    lines += [f"| {name} | {cost:.3f} |" for name, cost in stages(options).items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--data", help="as data.train; the default is noise")
    parser.add_argument("--fbank", choices=pipeline.FBANK_PLACES, help="measure this place only")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--num_frames", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=0, help="as data.threads")
    parser.add_argument("--seconds", type=float, default=10.0, help="per place")
    options = parser.parse_args()
    # As the programs set them.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    with tempfile.TemporaryDirectory() as folder:
        if not options.data:
            options.data_dir, options.data = folder, _NAME
            num_samples = fbank.num_samples(options.num_frames)
            writer.write(_NAME, folder, {"train": lambda: noise(num_samples)})
        print(_report(options))


if __name__ == "__main__":
    main()
