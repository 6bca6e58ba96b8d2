"""Traced nodes: names of operators, shapes, and the modules that were running."""

import operator

from torch import Tensor
from torch.fx import Node

_SLICING = ("select", "slice", "narrow", "getitem")


def op_name(node: Node) -> str:
    """Return the operator's name without namespace and overload: "conv2d", "getitem"."""
    if node.target is operator.getitem:
        return "getitem"
    name = getattr(node.target, "_opname", None)
    return str(name) if name is not None else str(getattr(node.target, "__name__", node.target))


def base_name(name: str) -> str:
    """Return the name of the out-of-place operator for an in-place one."""
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def shape_of(node: Node) -> tuple[int, ...]:
    """Return the shape of the node's tensor, or () when it is no tensor."""
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def branch_point(node: Node) -> bool:
    """Tell whether more than one operator reads the node's value as a whole."""
    users = [user for user in node.users if op_name(user) not in ("sym_size", "size")]
    return len(users) > 1 and not all(base_name(op_name(user)) in _SLICING for user in users)


def without_own_module(node: Node, layer: str) -> str | None:
    """Return the class of the module that runs a layer by a function; None if the layer is called.

    Args:
        node: The operator that reads the layer's weight.
        layer: Name of the layer.
    """
    name, kind = innermost_module(node)
    return None if name == layer else kind.rpartition(".")[2] or "the model"


def innermost_module(node: Node) -> tuple[str, str]:
    """Return the name and the class, with its package, of the innermost module that was running."""
    name, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))
    return str(name), str(kind)


def module_calls(node: Node) -> dict[str, str]:
    """Return {call: module name} of the modules that were running, the outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return {str(call): str(entry[0]) for call, entry in stack.items()}
