"""What went wrong with a run in another process, to be raised here as it would be there."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass

from fastplastic import errors
from fastplastic.errors import FastPlasticError, ProcessError
from fastplastic.trials.engine import Made, Pending, Trainer


@dataclass(frozen=True)
class Failure:
    """An error in words, which any process can read.

    Attributes:
        kind: Name of our error; "" for those of others.
        text: What it says.
        trace: Where it was raised.
    """

    kind: str
    text: str
    trace: str = ""

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Return an error in words."""
        known = type(error).__name__ if isinstance(error, FastPlasticError) else ""
        text = str(error) if known else f"{type(error).__name__}: {error}"
        return cls(known, text, "".join(traceback.format_exception(error)).rstrip())

    def within(self, item: Pending, where: str = "") -> "Failure":
        """Return it with the run that it happened in, and on which machine or in which process."""
        place = f", {where}" * bool(where)
        text = f"{self.text} (in the run of {item.arm.name}, seed {item.seed}{place})"
        return Failure(self.kind, text, self.trace)

    def error(self) -> FastPlasticError:
        """Return the error again; one of others as a `ProcessError`."""
        found = getattr(errors, self.kind, ProcessError)(self.text)
        assert isinstance(found, FastPlasticError)
        if self.trace:
            # Tracebacks end with it.
            found.add_note(self.trace)
        return found


def attempt(
    trainer: Trainer,
    item: Pending,
    where: str,
    tell: Callable[[float], None] = lambda share: None,
) -> Made | Failure:
    """Make a run, and return it or its failure, as it can be sent to another process.

    Args:
        trainer: What makes it.
        item: Which.
        where: On which machine or in which process this is; "" where that goes without saying.
        tell: Called with the share of the training that is done.
    """
    try:
        made = trainer.make(item, tell)
    except Exception as error:
        return Failure.of(error).within(item, where)
    if made.error is None:
        return made
    return Made(made.run, Failure.of(made.error).within(item, where).error())
