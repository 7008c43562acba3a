"""Named files decoded one after the other, and what became of each: for embed and predict."""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from maeast_jax import fbank
from maeast_jax.data.audio import DecodePool, has_sound


@dataclasses.dataclass
class Outcome:
    """What became of the files.

    Attributes:
      done: names of the files that were decoded, in order.
      failed: the reason per file that was not, by name.
      remarks: what is unusual about a decoded file, by name.
      num_samples: samples in the decoded files, at 16 kHz.
    """

    done: list[str] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    remarks: dict[str, str] = dataclasses.field(default_factory=dict)
    num_samples: int = 0

    def summary(self, verb: str, seconds: float) -> dict[str, str]:
        """Returns lines for `terminal.announce`; `verb` says what was done in `seconds`."""
        hours = self.num_samples / fbank.SAMPLE_RATE_HZ / 3600
        lines = {
            verb: f"{len(self.done)} files, {hours:.3f} h of audio in {seconds:.1f} s",
            "failed": str(len(self.failed)),
        }
        if self.remarks:
            lines["remarks"] = f"on {len(self.remarks)} files"
        return lines


def decoded(
    files: Sequence[str], decode_pool: DecodePool, outcome: Outcome, bar: tqdm
) -> Iterator[np.ndarray]:
    """Yields int16 [samples], at least 400, of each file that decodes; notes all in `outcome`.

    What is unusual is printed on stderr, above the bar. The bar counts the files that fail; the
    caller counts the others.
    """
    for file, recording in zip(files, decode_pool.decode(files), strict=True):
        # File names are arbitrary bytes, but the output holds UTF-8.
        name = os.fsencode(file).decode("utf-8", "backslashreplace")
        if isinstance(recording, str):
            outcome.failed[name] = recording
        elif len(recording.samples) < fbank.FRAME_LENGTH:
            outcome.failed[name] = f"{len(recording.samples)} samples at 16 kHz, shorter than 25 ms"
        else:
            silence = [] if has_sound(recording.samples) else ["no sound"]
            if remarks := [*recording.remarks, *silence]:
                outcome.remarks[name] = "; ".join(remarks)
            outcome.done.append(name)
            outcome.num_samples += len(recording.samples)
        if told := outcome.failed.get(name) or outcome.remarks.get(name):
            bar.write(f"{name}: {told}", file=sys.stderr)
        if name in outcome.failed:
            bar.update()
        else:
            yield recording.samples
