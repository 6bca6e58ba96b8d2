"""Which calls of a model are measured, and which of them ran without the hooks."""

import torch

from fastplastic.measure.compiled import (
    EagerStance,
    anything_is_compiled,
    in_compiled_call,
    traced_operators,
)
from fastplastic.measure.hooks import in_backward


class Pace:
    """Counts the calls of a model.

    Calls of which nothing is seen, because a compiled function around the model makes them, are
    counted when gradients of weights come of them.

    Args:
        every: The first of every so many calls is measured; with more than one, eagerly.

    Attributes:
        unseen: Calls to be measured that hooks did not see, or not all of.
        passed: Whether any hook was reached since the begin of the last call.
        missed: Whether a hook did not see all of it.
        traced: Whether a call was counted by compiled code since the last backward pass.
        stale: Whether there was compiled code when hooks were put on the model.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._eager = EagerStance()
        self.stale = False
        self._traced_before = 0
        # Whether there are hooks, and they measure.
        self._on = False
        self.restart()

    def restart(self) -> None:
        """Count from the start."""
        self._calls = self.unseen = 0
        self.passed = self.traced = self.missed = False
        # Calls with a backward pass to come, whether there was any, and the last backward pass.
        self._pending = 0
        self._known = False
        self._backward = -1
        if self._on:
            self.look_ahead()

    def attach(self, *, paused: bool) -> None:
        """Begin, with code that was compiled before, if there is any."""
        self.stale = anything_is_compiled()
        self._traced_before = traced_operators()
        self.pause(paused, hooked=True)

    def pause(self, paused: bool, *, hooked: bool) -> None:
        """Measure nothing, or go on where there are hooks."""
        self._on = hooked and not paused
        if self._on:
            self.look_ahead()
        else:
            self.rest()

    def look_ahead(self) -> None:
        """Let the next call run eagerly if it is measured and others are not."""
        if self._every > 1 and self._calls % self._every == 0:
            self._eager.begin()

    def rest(self) -> None:
        """Let compiled code run as it does without a monitor."""
        self._eager.end()

    def detach(self) -> None:
        """End."""
        self._on = False
        self.rest()

    def begin(self) -> bool:
        """Count a call; tell whether it is measured."""
        measured = self._calls % self._every == 0
        if not measured:
            self.rest()
        self._calls += 1
        self._pending += torch.is_grad_enabled()
        self._known |= torch.is_grad_enabled()
        self.passed = self.missed = False
        return measured

    def recomputes(self) -> bool:
        """Tell, and note, that a call is made once more in its backward pass."""
        inside = in_backward()
        self._known |= inside
        return inside

    def end(self, *, whole: bool) -> None:
        """End a call that is measured.

        Args:
            whole: Whether it came to its end, and there are hooks that it passes.
        """
        self.rest()
        self.end_unmeasured()
        traced = self.passed or traced_operators() > self._traced_before
        if self.missed or (whole and not traced and anything_is_compiled()):
            self.unseen += 1

    def read_graph(self) -> None:
        """Note that the autograd graph of a module is read, which compiled code has none of."""
        self.missed |= in_compiled_call()

    def end_unmeasured(self) -> None:
        """Look ahead behind a call without a backward pass to come."""
        if not torch.is_grad_enabled():
            self.look_ahead()

    def gradient(self, backward: int) -> bool:
        """Note a gradient of a weight in a backward pass, given by its number.

        Returns:
            Whether it is of a call that was not to be measured, and was not seen before.
        """
        if backward == self._backward:
            return False
        self._backward = backward
        hidden = not self._pending and not self.traced and anything_is_compiled()
        if hidden and self._every > 1:
            self._calls += 1
        elif hidden and not self._known:
            # One call may have several backward passes, so this is told of the first calls only.
            self.unseen += self.stale
        self._pending = max(0, self._pending - 1)
        self.traced = False
        self.look_ahead()
        return hidden and self._every > 1
