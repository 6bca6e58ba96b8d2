"""Who watches a model: paused while it runs for another reason than its user's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakSet

from torch import nn


class Watcher(Protocol):
    """Sums up what passes the hooks that it has on a model.

    Attributes:
        model: The model.
        paused: Whether what passes does not count.
    """

    model: nn.Module
    paused: bool

    def pause(self, paused: bool) -> None:
        """Let what passes not count, or count again."""


_WATCHERS: WeakSet[Watcher] = WeakSet()


def note_watcher(watcher: Watcher, *, watches: bool) -> None:
    """Note that there is a watcher with hooks on its model, or that its hooks are gone."""
    if watches:
        _WATCHERS.add(watcher)
    else:
        _WATCHERS.discard(watcher)


@contextmanager
def unwatched(model: nn.Module) -> Iterator[None]:
    """Pause all who watch the model, or one that shares modules with it."""
    own = set(model.modules())
    resting = [w for w in list(_WATCHERS) if not (w.paused or own.isdisjoint(w.model.modules()))]
    try:
        for watcher in resting:
            watcher.pause(True)
        yield
    finally:
        for watcher in resting:
            watcher.pause(False)
