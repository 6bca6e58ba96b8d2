"""The state of optimizers in a checkpoint of many files: of which weight each tensor is."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastplastic.files.stored_optimizer import StoredOptimizer
from fastplastic.files.stores import StoredWeights, WeightStore
from fastplastic.model import stand_in

# Options at which fresh state begins, or by which an optimizer is known.
_READ = ("initial_accumulator_value", "lr", "params", "param_names")
_KNOWN = "lr_in_momentum"


@dataclass(frozen=True, eq=False)
class OptimizerBeside:
    """An optimizer in a checkpoint; its tensors have no values.

    Attributes:
        entry: Its name in the checkpoint, "" where it has none.
        covers: Names of all that it consists of there.
        stored: What it remembers of which parameter; None where that is not known.
        names: {(parameter, state): name of that tensor in the checkpoint}.
    """

    entry: str
    covers: frozenset[str]
    stored: StoredOptimizer | None
    names: Mapping[tuple[str, str], str]


def optimizers_beside(
    store: WeightStore, stored: StoredWeights, model: nn.Module
) -> list[OptimizerBeside]:
    """Return the optimizers of a checkpoint, as torch's get_state_dict or scripts save them.

    Args:
        store: The checkpoint.
        stored: Which of its tensors are those of the model.
        model: The model, without values.
    """
    if not store.copies_all:
        return []
    found: dict[str, _Saved] = defaultdict(_Saved)
    weights = stored.used
    for name in (*store.tensors, *store.beside):
        for kind in ("state", "param_groups"):
            root, between, rest = f".{name}".partition(f".{kind}.")
            owner, dot, last = rest.rpartition(".")
            if between and dot and name not in weights:
                getattr(found[root[1:]], kind)[owner, last] = name
                break
    return [
        OptimizerBeside(root, saved.covers, *saved.of(store, stored, model))
        for root, saved in found.items()
        if saved.state
    ]


def entries_beside(
    store: WeightStore, stored: StoredWeights, optimizers: Iterable[OptimizerBeside]
) -> list[str]:
    """Return the names of all else in a checkpoint."""
    known = stored.used.union(*(optimizer.covers for optimizer in optimizers))
    names = [name for name in (*store.tensors, *store.beside) if name not in known]
    return list(dict.fromkeys(map(store.entry_of, names)))


@dataclass(eq=False)
class _Saved:
    """Names in the checkpoint, by the parameter (or group) and the state (or option)."""

    state: dict[tuple[str, str], str] = field(default_factory=dict)
    param_groups: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def covers(self) -> frozenset[str]:
        """All the names."""
        return frozenset([*self.state.values(), *self.param_groups.values()])

    def of(
        self, store: WeightStore, stored: StoredWeights, model: nn.Module
    ) -> tuple[StoredOptimizer | None, dict[tuple[str, str], str]]:
        """Return the optimizer, and under which names its tensors stand."""
        groups, state = self._groups(store), defaultdict[int, dict[str, Any]](dict)
        listed = [name for group in groups for name in group["params"]]
        # By number, as optimizers number their parameters, or by name.
        numbers = {str(name): number for number, name in enumerate(listed)}
        if groups and all(isinstance(name, int) for name in listed):
            numbers = {str(number): number for number in listed}
        else:
            groups = groups or [{"params": sorted({owner for owner, _ in self.state})}]
            numbers = numbers or {name: i for i, name in enumerate(groups[0]["params"])}
            owns = _names_of_optimizers(stored)
            groups = [_numbered(group, numbers, owns) for group in groups]
        if not all(owner in numbers for owner, _ in self.state):
            return None, {}
        for (owner, key), name in self.state.items():
            meta = store.tensors.get(name)
            state[numbers[owner]][key] = None if meta is None else stand_in(meta)
        found = StoredOptimizer.of({"state": state, "param_groups": groups}, model)
        if found is None:
            return None, {}
        own = {id(parameter): name for name, parameter in model.named_parameters()}
        of = {number: own[id(parameter)] for number, parameter in found.parameters.items()}
        return found, {(of[numbers[owner]], key): x for (owner, key), x in self.state.items()}

    def _groups(self, store: WeightStore) -> list[dict[str, Any]]:
        """Return the groups of parameters, with the few options that matter."""
        found: dict[str, dict[str, Any]] = defaultdict(dict)
        for (owner, option), name in self.param_groups.items():
            if option in _READ and name not in store.tensors:
                found[owner][option] = store.value(name)
            elif option == _KNOWN:
                found[owner][option] = True
        # Where the state is flattened, each parameter is a group by its name.
        return [{"params": [owner]} | group for owner, group in found.items()]


def _numbered(
    group: dict[str, Any], numbers: Mapping[str, int], owns: Mapping[str, str]
) -> dict[str, Any]:
    names = [str(name) for name in group["params"]]
    known = [owns.get(name, name) for name in names]
    return group | {"params": [numbers[name] for name in names], "param_names": known}


def _names_of_optimizers(stored: StoredWeights) -> dict[str, str]:
    """Return {name by which an optimizer may know a parameter: name in the model}.

    It does not have the key under which the weights are, but the names of modules around the model.
    """
    found = {there: name for name, there in stored.names.items()}
    bare = {there.partition(".")[2]: name for name, there in stored.names.items() if there != name}
    return bare | found | {name: name for name in stored.names}
