"""python -m benchmarks.beside_kaldi [FOLDER]: log-mel energies on a CPU, ours beside torchaudio's.

The input is ten-second clips, int16, cut from FOLDER's recordings laid end to end, or noise. The
output is float32 [998, 128] per clip. torchaudio.compliance.kaldi.fbank takes single clips, ours
take a batch: fbank_tf in a tf.data pipeline, as data.fbank=host runs it, and fbank under jax.jit.
They run on one core and on all cores. There torchaudio uses torch's own threads; a data loader of
as many processes would take the time of one core divided by their number. The sides work in turn,
and each round gives a ratio. The tables are in Markdown. This needs the packages in
requirements-test.txt and requirements-reference.txt.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import beside, reference
from maeast_jax.data import audio
from maeast_jax.ingest import sources

NUM_SAMPLES = 160_000  # ten seconds
SIDES = ("torchaudio", "fbank_tf", "fbank")


def clips(folder: Path | None, count: int) -> np.ndarray:
    """int16 [count, NUM_SAMPLES]; raises ValueError where the folder holds too little."""
    random = np.random.default_rng(0)
    if folder is None:
        return random.integers(-8192, 8192, (count, NUM_SAMPLES), np.int16)
    files = sources.list_folder(folder).files
    heard, missing = [], count * NUM_SAMPLES
    for index in random.permutation(len(files)):
        try:
            heard.append(audio.decode(files[index].path).samples)
        except audio.UndecodableError:
            continue
        missing -= len(heard[-1])
        if missing <= 0:
            return np.concatenate(heard)[: count * NUM_SAMPLES].reshape(count, NUM_SAMPLES)
    raise ValueError(
        f"{folder} is {missing / 16_000:.0f} s short of {count} clips of 10 s; lower --batch"
    )


def torchaudio_side(audio_BxS: np.ndarray) -> beside.Work:
    import torch

    kaldi = reference.kaldi()
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def energies():
        return [
            kaldi.fbank(
                torch.from_numpy(audio_S[None]) / 32_768.0,
                sample_frequency=16_000,
                use_energy=False,
                num_mel_bins=128,
            )
            for audio_S in audio_BxS
        ]

    def run(count: int) -> None:
        for _ in range(count):
            energies()

    return _warm(run, torch.stack(energies()).numpy())


def fbank_tf_side(audio_BxS: np.ndarray) -> beside.Work:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    from maeast_jax import fbank

    cores = len(os.sched_getaffinity(0))
    batch = tf.data.Dataset.from_tensors(audio_BxS)

    def energies(count: int):
        batches = batch.repeat(count)
        batches = batches.map(fbank.fbank_tf, num_parallel_calls=cores, deterministic=True)
        return batches.prefetch(2).as_numpy_iterator()

    def run(count: int) -> None:
        for _ in energies(count):
            pass

    return _warm(run, next(energies(1)))


def fbank_side(audio_BxS: np.ndarray) -> beside.Work:
    import jax

    jax.config.update("jax_platforms", "cpu")
    from maeast_jax import fbank

    energies = jax.jit(fbank.fbank)

    def run(count: int) -> None:
        for _ in range(count):
            energies(audio_BxS).block_until_ready()

    return _warm(run, np.asarray(energies(audio_BxS)))


def _warm(run, energies_BxTxF: np.ndarray) -> beside.Work:
    run(2)
    return beside.Work(run, {"energies": energies_BxTxF})


BUILD = dict(zip(SIDES, (torchaudio_side, fbank_tf_side, fbank_side), strict=True))


def measure(audio_BxS: np.ndarray, cores: list[int], rounds: int, count: int) -> dict[str, Any]:
    """For each side milliseconds per clip, ratio to torchaudio and greatest deviation from it."""
    sides = []
    with beside.ending(sides):
        for name in SIDES:
            sides.append(beside.Side(name, BUILD[name], {"audio_BxS": audio_BxS}, cores))
        beside.take_turns(sides, rounds, count)
        for side in sides:
            side.close()
    amount = count * len(audio_BxS)
    clips_per_second = {side.name: beside.rates(side, amount) for side in sides}
    wanted = sides[0].facts["energies"]
    return {
        side.name: {
            "cores": len(cores),
            "ms_per_clip": beside.spread(1000 / clips_per_second[side.name]),
            "cpu_ms_per_clip": 1000 / amount * np.median([turn.cpu_seconds for turn in side.turns]),
            "times_torchaudio": beside.spread(
                clips_per_second[side.name] / clips_per_second["torchaudio"]
            ),
            "deviation": float(np.abs(side.facts["energies"] - wanted).max()),
            "waiting_load": side.waiting_load,
        }
        for side in sides
    }


def row(name: str, found: dict[str, Any]) -> str:
    (middle, low, high), (ratio, *_) = found["ms_per_clip"], found["times_torchaudio"]
    cells = [name, found["cores"], f"{middle:.2f} ({low:.2f}-{high:.2f})"]
    cells += [f"{found['cpu_ms_per_clip']:.2f}", f"{ratio:.2f}", f"{found['deviation']:.1e}"]
    return f"| {' | '.join(map(str, cells))} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--batch", type=beside.positive, default=32, help="clips per batch")
    parser.add_argument("--rounds", type=beside.positive, default=25)
    parser.add_argument("--count", type=beside.positive, default=4, help="batches per turn")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    if message := reference.missing():
        sys.exit(f"error: {message}")
    cores = sorted(os.sched_getaffinity(0))
    try:
        audio_BxS = clips(options.folder, options.batch)
        found = [
            measure(audio_BxS, some, options.rounds, options.count)
            for some in ([cores[:1], cores] if len(cores) > 1 else [cores])
        ]
    except (ValueError, beside.SideError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{options.batch} clips of 10 s per batch, of {options.folder or 'noise'}; "
        f"{options.rounds} rounds of {options.count} batches.\n\n"
        "| | cores | ms per clip, median (10th-90th) | ms of all cores | times as fast as "
        "torchaudio, median of rounds | greatest deviation from it, nepers |\n"
        "|---|---|---|---|---|---|"
    )
    for sides in found:
        for name, side in sides.items():
            print(row(name, side))
    if options.json:
        written = {"settings": vars(options), "found": found}
        options.json.write_text(json.dumps(written, indent=1, default=str))


if __name__ == "__main__":
    main()
