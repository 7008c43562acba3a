"""What is wrong with labelled clips before anything is trained on them or scored with them."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from maeast_jax.data import Labelled

_SHOWN = 5  # names of classes in a line


def check(
    train: Labelled,
    valid: Labelled,
    tests: Sequence[Labelled] = (),
    longest_seconds: float = math.inf,
) -> list[str]:
    """Returns a line for each thing that makes scores worth less than they seem.

    It reads every clip once, as `Labelled.classes` says.

    Args:
      train: the clips to train on.
      valid: the clips on which settings are chosen.
      tests: the sets to score; `valid` may be one of them.
      longest_seconds: a longer clip is scored by this much of its middle.

    Raises:
      ValueError: no score has a meaning, because the training clips have nothing to tell apart, or
        no clip of a set holds sound, or a set of several labels per clip has no positive.
    """
    held_out = [("validation", valid), *(("test", clips) for clips in tests if clips is not valid)]
    lines = []
    for use, clips in [("training", train), *held_out]:
        lines += _of_sound(use, clips)
        lines += _of_classes(use, clips)
    for use, clips in held_out:
        if cropped := sum(look.seconds > longest_seconds for look in clips.looks):
            lines.append(
                f"{cropped:,} of the {len(clips):,} {use} clips of {clips.text!r} are longer than "
                f"{longest_seconds:g} s, and only their middle is scored: raise max_frames"
            )
    overlaps = [
        (use, clips, "training", train, "which the model has learnt") for use, clips in held_out
    ]
    overlaps += [
        ("test", clips, "validation", valid, "on which settings are chosen") for clips in tests
    ]
    for use, clips, other_use, other, which in overlaps:
        if shared := clips.count_shared(other):
            lines.append(
                f"{shared:,} of the {len(clips):,} {use} clips of {clips.text!r} are {other_use} "
                f"clips too, {which}: for a fair score name other clips"
            )
    return lines


def _of_sound(use: str, clips: Labelled) -> Iterator[str]:
    without = np.count_nonzero(~clips.has_sound)
    if without == len(clips):
        raise ValueError(
            f"none of the {without:,} {use} clips of {clips.text!r} holds 25 ms of sound: name "
            "another set, or build it again from recordings that do"
        )
    if without:
        yield f"{use} clips of {clips.text!r} without 25 ms of sound: {without:,} of {len(clips):,}"


def _of_classes(use: str, clips: Labelled) -> Iterator[str]:
    names = np.array(clips.class_names)
    counts = np.bincount(np.concatenate(clips.classes), minlength=len(names))
    if not counts.any():
        raise ValueError(
            f"none of the {len(clips):,} {use} clips of {clips.text!r} has a class: name another "
            "set, or build it again with labels"
        )
    if use == "training" and len({tuple(sorted(of_clip)) for of_clip in clips.classes}) == 1:
        raise ValueError(
            f"all {len(clips):,} training clips of {clips.text!r} have the class "
            f"{'; '.join(names[counts > 0])!r}, so there is nothing to tell apart: add clips of "
            "another class"
        )
    without = names[counts == 0]
    if len(without):
        more = ", …" if len(without) > _SHOWN else ""
        yield (
            f"classes without a {use} clip in {clips.text!r}: {len(without):,} of {len(names):,} "
            f"({', '.join(without[:_SHOWN])}{more})"
        )
