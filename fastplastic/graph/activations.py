"""Modules that are one activation function, although they are written as several operators."""

import copy
from collections import defaultdict

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node

from fastplastic.kernels import ACTIVATIONS, activate


def activation_regions(
    program: ExportedProgram, model: nn.Module
) -> dict[Node, tuple[Node, str] | None]:
    """Return {last node: (input node, activation)} of modules that are one activation function.

    The other nodes of such a module are there with None.
    """
    known: dict[str, str | None] = {}

    def named(module: str, kind: str) -> str | None:
        function = next((name for name, f in ACTIVATIONS.items() if kind in f.classes), None)
        if function is None:
            return None
        if module not in known:
            known[module] = function if _computes(model, module, function) else None
        return known[module]

    inside: dict[str, list[Node]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for node in program.graph.nodes:
        for call, entry in (node.meta.get("nn_module_stack") or {}).items():
            function = named(str(entry[0]), str(entry[1]).rpartition(".")[2])
            if function is not None:
                inside[str(call)].append(node)
                kinds[str(call)] = function
    regions: dict[Node, tuple[Node, str] | None] = {}
    for call, nodes in inside.items():
        own = set(nodes)
        entries = {
            x
            for node in nodes
            for x in node.all_input_nodes
            if x not in own and x.op == "call_function"
        }
        exits = [node for node in nodes if any(user not in own for user in node.users)]
        if len(nodes) > 1 and len(entries) == 1 and len(exits) == 1:
            regions.update(dict.fromkeys(nodes))
            regions[exits[0]] = entries.pop(), kinds[call]
    return regions


def _computes(model: nn.Module, name: str, function: str) -> bool:
    """Tell whether a module does what its class is named for: others have such names, too."""
    z = torch.linspace(-8, 8, 65)
    try:
        # A copy: what it counts or keeps is nobody's business here.
        with torch.no_grad():
            h = copy.deepcopy(model.get_submodule(name)).cpu().float()(z)
        return torch.allclose(h, activate(z, function).to(h.dtype), rtol=0, atol=1e-3)
    except Exception:  # whatever a module of the user raises on another input
        return False
