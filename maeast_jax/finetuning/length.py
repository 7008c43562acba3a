"""How long a fold is fine-tuned, and when it is scored on validation."""

import dataclasses
import math

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a fold is trained; `evaluations`: the steps after which validation is scored."""

    steps_per_epoch: float
    total_steps: int
    evaluations: list[int]


def fold_length(config: ConfigDict, num_clips: int) -> Length:
    """Of a training set of so many clips."""
    steps_per_epoch = num_clips / config.batch_size
    total_steps = config.total_steps or math.ceil(config.epochs * steps_per_epoch)
    every = config.eval_every or steps_per_epoch
    return Length(steps_per_epoch, total_steps, evaluations(total_steps, every))


def evaluations(total_steps: int, every: float) -> list[int]:
    """Each `every` steps, rounded up, and the last."""
    count = math.ceil(total_steps / every - 1e-9)
    steps = [min(math.ceil(number * every - 1e-9), total_steps) for number in range(1, count + 1)]
    return list(dict.fromkeys(steps))  # the last epoch may end within the last step
