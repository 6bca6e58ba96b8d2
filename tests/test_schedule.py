"""When a Recycler measures and chooses, against what can be counted step by step."""

import math

from hypothesis import given
from hypothesis import strategies as some

from fastplastic.training.methods import Method
from fastplastic.training.schedule import Schedule

LONG = 60


@given(
    every=some.integers(1, 12), window=some.integers(1, 12), start=some.integers(0, 30),
    end=some.none() | some.integers(0, 50),
)  # fmt: skip
def test_steps(every: int, window: int, start: int, end: int | None) -> None:
    window = min(window, every)
    schedule = Schedule(
        Method(rate=0.1, every=every, window=window, start_step=start, end_step=end)
    )
    last = LONG + every if end is None else end
    due = {s for s in range(1, LONG + 2 * every) if s % every == 0 and start < s <= last}
    measured = {s for d in due for s in range(d - window + 1, d + 1)}
    work = measured | {s - 1 for s in measured}
    for step in range(1, LONG):
        assert schedule.is_due(step) == (step in due)
        assert schedule.is_measured(step) == (step in measured)
        following = min((s for s in work if s >= step), default=math.inf)
        assert schedule.wakes_behind(step) <= following
        # It may wake a step early, never a step late, and sleeps where there is nothing left.
        assert math.isinf(schedule.wakes_behind(step)) == math.isinf(following)


def test_nothing_is_looked_at_in_between() -> None:
    schedule = Schedule(Method(ratio=0.1, every=1000))
    assert [schedule.wakes_behind(s) for s in (1, 500, 999, 1000, 1001)] == [
        999, 999, 999, 1000, 1999,
    ]  # fmt: skip
