"""The processes that watch one model, each with a monitor of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import distributed, nn

from fastplastic.errors import InputError
from fastplastic.measure.observation import Observation
from fastplastic.measure.together import compare_traces, put_alone, put_together
from fastplastic.model import fingerprint, is_spread
from fastplastic.processes import all_or_nothing, all_processes, is_alone
from fastplastic.wiring import UnitGraph

_MAKING, _COMPUTING = "Monitor()", "Monitor.compute()"


@dataclass(frozen=True, eq=False)
class SeenHere:
    """What there is to make a profile of.

    Attributes:
        observation: What was seen.
        seed: Of the profile.
        largest: Positions of the largest tensor that was not read whole; 0 for none.
    """

    observation: Observation
    seed: int
    largest: int


class MonitorMeeting:
    """Brings together what the monitors of all processes have seen.

    Args:
        model: The model.
        options: What has to be the same in all, beside the model.

    Attributes:
        processes: All of them; None where this is the only one, or is alone.
    """

    def __init__(self, model: nn.Module, options: Mapping[str, object]) -> None:
        self.processes = all_processes()
        self._spread = any(map(is_spread, model.parameters()))
        self._facts = {name: str(value) for name, value in options.items()}
        self._facts["the model"] = fingerprint(model)[:12]

    def traced(self, trace: Callable[[], UnitGraph]) -> UnitGraph:
        """Return the wiring of the model, the same in all processes.

        Args:
            trace: Returns it.

        Raises:
            ProcessError: The processes differ, or one failed or is gone.
        """
        with all_or_nothing(self.processes, _MAKING, lambda: self._facts):
            graph = trace()
            compare_traces(graph, self.processes)
        return graph

    def gather(self, read: Callable[[], SeenHere]) -> SeenHere:
        """Return what all processes have seen, or this one where it is alone.

        Args:
            read: Returns what this process has seen.

        Raises:
            InputError: This process alone asks for the weights that others have parts of, or the
                processes are no longer in a group.
            ProcessError: Another process is elsewhere, failed or is gone.
        """
        together, own = self.processes, []
        if together is None or is_alone():
            return self._alone(read)
        if not distributed.is_initialized():
            raise InputError(
                f"{_COMPUTING} behind destroy_process_group(), expected before it: the processes "
                "put together what they have seen; or call it within fastplastic.alone()"
            )

        def facts() -> dict[str, str]:
            own.append(read())
            # Where weights are spread, all processes make each call.
            calls = {"the number of measured calls": str(own[0].observation.steps)}
            return self._facts | (calls if self._spread else {})

        with all_or_nothing(together, _COMPUTING, facts):
            said = together.share((own[0].seed, own[0].largest))
            observation = put_together(own[0].observation, together)
        return SeenHere(observation, said[0][0], max(largest for _, largest in said))

    def _alone(self, read: Callable[[], SeenHere]) -> SeenHere:
        if self.processes is not None and self._spread:
            raise InputError(
                f"{_COMPUTING} of one process alone, which has parts of the weights: expected the "
                "same call in all processes, without fastplastic.alone()"
            )
        own = read()
        return SeenHere(put_alone(own.observation), own.seed, own.largest)
