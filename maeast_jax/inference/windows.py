"""Which windows of a clip the model sees, which one each time step is taken from, and buckets.

The unit of everything here is the time step: one token along time, all its bands.
"""

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a clip that the model sees alone.

    Attributes:
      start, stop: the steps of the clip that it holds.
      own_start, own_stop: those of them that are taken from it; the rest is context.
    """

    start: int
    stop: int
    own_start: int
    own_stop: int


def num_steps(num_frames: int, patch_frames: int) -> int:
    """Whole time steps in so many frames; a clip shorter than one is padded to one."""
    return max(1, num_frames // patch_frames)


def cut(num_steps: int, window_steps: int, stride_steps: int) -> list[Window]:
    """Windows over a clip, of `window_steps` each (0, or a shorter clip: one of the clip's length).

    They start every `stride_steps`; the last one is moved back to end where the clip ends. Of the
    windows that hold a step it is taken from the one whose centre is nearest, of two as near the
    earlier: every step from exactly one, with as much context on both sides as there is.

    Raises ValueError for a stride that would leave steps out.
    """
    if not window_steps or num_steps <= window_steps:
        return [Window(0, num_steps, 0, num_steps)]
    if not 1 <= stride_steps <= window_steps:
        raise ValueError(
            f"a stride of {stride_steps} steps must be 1 to {window_steps}, the window: "
            "a longer one would leave steps out"
        )
    last = num_steps - window_steps
    starts = [*range(0, last, stride_steps), last]
    # The first step past the midpoint of two centres, start + (window - 1) / 2 each.
    edges = [
        (start + following + window_steps - 1) // 2 + 1
        for start, following in itertools.pairwise(starts)
    ]
    return [
        Window(start, start + window_steps, own_start, own_stop)
        for start, own_start, own_stop in zip(starts, [0, *edges], [*edges, num_steps], strict=True)
    ]
