"""Read the weights of a checkpoint in many files."""

from pathlib import Path

from torch import Tensor, nn

from fastplastic.errors import FileError
from fastplastic.files.beside import entries_beside
from fastplastic.files.names import without_wrappers
from fastplastic.files.pickled import load_pickled, unwrap
from fastplastic.files.shard_index import PICKLES, read_index
from fastplastic.files.stores import StoredWeights, WeightStore, find_weights, open_store


def read_many(
    listed: Path, model: nn.Module | None
) -> tuple[dict[str, Tensor], list[str], tuple[str, ...]]:
    """Return the weights, what was chosen or changed of them, and what is beside them.

    Args:
        listed: The file that lists them, as `sharded` found it.
        model: The model that they are for: of a folder of torch.distributed.checkpoint they alone
            are read, and tensors that it does not have are without values.

    Raises:
        FileError: A file is missing, damaged or holds more than tensors.
    """
    if listed.name.endswith(PICKLES):
        state = _load_pickles(listed)
        state, removed = without_wrappers(state, listed.parent)
        said = [f"{len(set(read_index(listed).values()))} PyTorch files"]
        return state, said + ([f"prefix {removed!r} removed"] if removed else []), ()
    store = open_store(listed)
    if model is None or not store.copies_all:
        state, removed = without_wrappers(store.load(store.tensors), listed.parent)
        return state, [store.says, *([f"prefix {removed!r} removed"] if removed else [])], ()
    # Beside the weights there is the state of an optimizer, which is larger than they are.
    stored = find_weights(store, model)
    loaded = store.load(stored.names.values())
    state = {name: loaded[there] for name, there in stored.names.items()}
    state |= {name: store.tensors[name] for name in stored.others}
    said = [store.says, *([stored.said] if stored.said else [])]
    return state, said, tuple(entries_beside(store, stored, ()))


def _load_pickles(index: Path) -> dict[str, Tensor]:
    """Return the tensors of several PyTorch files."""
    state: dict[str, Tensor] = {}
    listed = read_index(index)
    for path in sorted(set(listed.values())):
        found, _ = unwrap(load_pickled(path), path)
        if twice := found.keys() & state.keys():
            raise FileError(
                f"{path}: holds {min(twice)}, as another file does, expected it in one: get them "
                "anew"
            )
        state |= found
    for name in listed:
        if name not in state:
            raise FileError(
                f"{index}: has {name} in {listed[name].name}, which does not hold it: get them anew"
            )
    return state


def nonfinite_in(store: WeightStore, stored: StoredWeights, model: nn.Module) -> tuple[str, ...]:
    """Return the names of tensors of a model that hold NaN or infinity, read one by one.

    As in `fastplastic.model.nonfinite_tensors`, infinities in buffers may be meant.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = []
    for name, there in stored.names.items():
        if store.tensors[there].is_floating_point():
            tensor = store.load([there])[there]
            strict = name in parameters or name.endswith(("running_mean", "running_var"))
            if not bool(tensor.isfinite().all() if strict else not tensor.isnan().any()):
                found.append(name)
    return tuple(found)
