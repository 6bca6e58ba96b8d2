"""Why nothing was chosen, how often, and when that has to be said aloud."""

from collections.abc import Mapping

from fastplastic.errors import warn

WAITED = "step() without a step of the optimizer: waited for it"
# Calls on end that find no step of the optimizer, before anything is said: gradients may be
# accumulated over many.
MANY_CALLS = 100
# Choices on end that came to nothing, before anything is said.
_IN_A_ROW = 3


class Skips(dict[str, int]):
    """Reason -> how often nothing was chosen for it.

    Args:
        known: What was counted before.
    """

    def __init__(self, known: Mapping[str, int] | None = None) -> None:
        super().__init__(known or {})
        self._row = 0
        self._warned = False

    def add(self, why: str, *, but_after: int = _IN_A_ROW) -> None:
        """Count a reason; warn, once, where nothing else has happened so many times on end."""
        self[why] = self.get(why, 0) + 1
        self._row += 1
        if self._row == but_after:
            self.warn(f"nothing was re-initialised {but_after} times in a row: {why}")

    def end_row(self) -> None:
        """Tell that something could be chosen."""
        self._row = 0

    def warn(self, text: str) -> None:
        """Warn, if nothing was warned of before."""
        if not self._warned:
            self._warned = True
            warn(text)
