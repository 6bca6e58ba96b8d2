"""In which steps of a training anything is measured or chosen."""

import math

from fastplastic.training.methods import Method


class Schedule:
    """The steps of a method: a choice every so many, made of those that lead to it.

    Args:
        method: Its `every`, `start_step`, `end_step`, and how many steps it measures.
    """

    def __init__(self, method: Method) -> None:
        self._every, self._window = method.every, method.measured
        self._start, self._end = method.start_step, method.end_step

    def is_due(self, step: int) -> bool:
        """Tell whether there is a choice behind a step."""
        return step % self._every == 0 and self._start < step <= self._last

    def is_measured(self, step: int) -> bool:
        """Tell whether a step is one of those that a choice is made of."""
        due = self._due_from(step)
        return self.is_due(due) and due - step < self._window

    def wakes_behind(self, step: int) -> float:
        """Return the first step from this one on behind which there is anything to do.

        That is a step that is measured, or the one before it; infinity when there is none.
        """
        due = max(self._due_from(step), self._due_from(self._start + 1))
        return math.inf if due > self._last else max(due - self._window, step)

    @property
    def _last(self) -> float:
        return math.inf if self._end is None else self._end

    def _due_from(self, step: int) -> int:
        """Return the first multiple of `every` from a step on."""
        return -(-step // self._every) * self._every
