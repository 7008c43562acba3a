from maeast_jax.training.pace import Pace


class Clock:
    """A clock that is set by hand."""

    seconds = 0.0

    def __call__(self):
        return self.seconds


def test_pace_is_between_two_calls():
    clock = Clock()
    pace = Pace(32, total_steps=1000, eval_every=1000, clock=clock)
    assert pace.rate(100) is None
    clock.seconds = 4.0
    assert pace.rate(110) == 80.0
    clock.seconds = 5.0
    assert pace.rate(115) == 160.0
    assert pace.rate(120) is None  # no time has passed
    clock.seconds = 6.0
    assert pace.rate(120) is None  # nor a step
    clock.seconds = 8.0
    assert pace.rate(121) == 16.0


def test_time_left_has_the_steps_and_the_evaluations_ahead():
    clock = Clock()
    pace = Pace(8, total_steps=100, eval_every=30, clock=clock)
    with pace.evaluation():  # before the clock of the steps starts
        clock.seconds = 5.0
    clock.seconds = 300.0  # compilation
    pace.rate(10)
    assert pace.seconds_left(10) is None
    clock.seconds = 320.0
    pace.rate(20)
    # 80 steps of 2 s; evaluations after steps 30, 60, 90 and 100.
    assert pace.seconds_left(20) == 80 * 2.0 + 4 * 5.0
    clock.seconds = 340.0
    pace.rate(30)
    assert pace.seconds_left(30) == 70 * 2.0 + 4 * 5.0  # the one at 30 is still to come
    with pace.evaluation():
        clock.seconds = 347.0
    clock.seconds = 367.0
    assert pace.rate(40) == 8 * 10 / 20.0  # the evaluation's 7 s are not the steps'
    assert pace.seconds_left(40) == 60 * 2.0 + 3 * 7.0
    assert pace.seconds_left(100) == 7.0
