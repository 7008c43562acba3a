"""What a program prints: progress while it runs, and aligned tables."""

import sys
from collections.abc import Mapping
from typing import TextIO

import tqdm


class Progress:
    """A progress bar with loss, clips per second and time left; plain lines without a terminal."""

    def __init__(self, total_steps: int, start_step: int = 0, stream: TextIO | None = None):
        """Shows progress on `stream`; None is stderr."""
        self._total_steps = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm.tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {desc}",
                desc=f"step {start_step}/{total_steps}",
            )

    def update(
        self,
        step: int,
        loss: float,
        clips_per_second: float | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """Shows that `step` steps are done; leaves out values that are None."""
        parts = [f"step {step}/{self._total_steps}", f"loss {float(loss):.3f}"]
        if clips_per_second is not None:
            parts.append(f"{clips_per_second:.1f} clips/s")
        if seconds_left is not None:
            parts.append(f"{tqdm.tqdm.format_interval(seconds_left)} left")
        line = "  ".join(parts)
        if self._bar is None:
            print(line, file=self._stream, flush=True)
            return
        self._bar.n = step
        self._bar.set_description_str(line, refresh=True)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def close(self) -> None:
        """Leaves the bar on the screen as it is."""
        if self._bar is not None:
            self._bar.close()


def announce(lines: Mapping[str, str]) -> str:
    """Returns an aligned table: a line per key; a value of several lines continues below itself."""
    width = max(map(len, lines), default=0)
    indent = "\n" + " " * (width + 2)
    return "\n".join(
        f"{key:<{width}}  {str(value).replace(chr(10), indent)}".rstrip()
        for key, value in lines.items()
    )


def si(value: float, unit: str = "") -> str:
    """Renders a quantity to three digits: si(86_400_000) is "86.4M", si(1.75e9, "B") "1.75GB"."""
    return tqdm.tqdm.format_sizeof(value, unit)


def one_line(error: BaseException) -> str:
    """Returns what an exception says, on one line of at most 200 characters."""
    text = getattr(error, "strerror", None)
    if not text and isinstance(error, FileNotFoundError):
        text = "not found"  # gcsfs gives the path alone
    return " ".join((text or str(error) or type(error).__name__).split())[:200]
