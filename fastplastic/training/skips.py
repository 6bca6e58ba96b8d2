"""Why nothing was chosen, how often, and when that has to be said aloud."""

from collections.abc import Mapping

from fastplastic.errors import warn

_WAITED = "step() without a step of the optimizer: waited for it"
# Calls on end that find no step of the optimizer, before anything is said: gradients may be
# accumulated over many.
_MANY_CALLS = 100
# Choices on end that came to nothing, before anything is said.
_IN_A_ROW = 3


class Skips(dict[str, int]):
    """Reason -> how often nothing was chosen for it.

    Args:
        known: What was counted before.
    """

    def __init__(self, known: Mapping[str, int] | None = None) -> None:
        super().__init__(known or {})
        # On end: choices that came to nothing, and calls without a step of the optimizer.
        self._choices = self._calls = 0
        self._warned = False

    def add(self, why: str) -> None:
        """Count a choice that came to nothing; warn, once, of several on end."""
        self[why] = self.get(why, 0) + 1
        self._choices += 1
        if self._choices == _IN_A_ROW:
            self.warn(f"nothing was re-initialised {_IN_A_ROW} times in a row: {why}")

    def end_row(self) -> None:
        """Tell that something could be chosen."""
        self._choices = 0

    def wait(self) -> None:
        """Count a call without a step of the optimizer; warn, once, of many on end."""
        self[_WAITED] = self.get(_WAITED, 0) + 1
        self._calls += 1
        if self._calls == _MANY_CALLS:
            self.warn(f"{_MANY_CALLS} times in a row: {_WAITED}: is it another optimizer now?")

    def end_wait(self) -> None:
        """Tell that the optimizer has made a step."""
        self._calls = 0

    def warn(self, text: str) -> None:
        """Warn, if nothing was warned of before."""
        if not self._warned:
            self._warned = True
            warn(text)
