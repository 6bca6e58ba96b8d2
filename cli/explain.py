"""`fastplastic explain`: the wiring of one layer in words, and why it can be reset or not."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from fastplastic.cli.options import ModelOptions
from fastplastic.cli.parsing import option
from fastplastic.cli.session import device_of, load
from fastplastic.cli.terminal import console, waiting
from fastplastic.cli.wiring_words import NO_SOURCE, TOGETHER, Neighbour, wiring_words
from fastplastic.errors import InputError, no_such

if TYPE_CHECKING:
    from fastplastic.wiring import UnitGraph, UnitLayer


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(ModelOptions):
    """The options of `fastplastic explain`."""

    layer: Annotated[str, typer.Argument(metavar="LAYER", help="Dotted name of a weight layer.")]
    json: Annotated[bool, option("--json", panel="Output", help="Print JSON.")] = False
    quiet: Annotated[bool, option("--quiet", "-q", panel="Output", help="Show no progress.")] = (
        False
    )


def run(options: ExplainOptions) -> None:
    """Tell how a layer is wired: what makes and reads its units, and why they can be reset or not.

    The model is traced, not run on data, and its weights are random unless you ask for others.
    """
    options.check()
    with waiting(f"loading and tracing {options.model}", quiet=options.quiet):
        graph = _graph(options)
    skipped = dict(graph.skipped)
    if options.layer in skipped:
        print(f"{options.layer} is not measured: {skipped[options.layer]}")
        return
    found = [layer for layer in graph.layers if options.layer in layer.names]
    if not found:
        names = [name for layer in graph.layers for name in layer.names]
        raise InputError(no_such("layer", options.layer, names))
    facts = explanation(found[0], graph)
    if options.json:
        print(json.dumps({"layer": found[0].name, **_plain(facts)}, indent=2))
        return
    from fastplastic.cli import render

    console(sys.stdout).print(render.facts(facts))


def _graph(options: ExplainOptions) -> "UnitGraph":
    import torch

    from fastplastic.graph import build_graph
    from fastplastic.model import undisturbed
    from fastplastic.sources import InputShape

    # Weights do not change the wiring.
    pretrained = options.pretrained or False
    loaded = load(options, pretrained=None if options.checkpoint else pretrained)
    model, device = loaded.model, device_of(options.device)
    if loaded.texts is not None:
        texts = {name: tensor.to(device) for name, tensor in loaded.texts.example().items()}
        with undisturbed(model):
            return build_graph(model, texts)
    shape = InputShape.of(model, options.img_size, options.in_chans, options.input_size)
    example = torch.zeros(2, shape.channels, *shape.config["input_size"][1:])
    with undisturbed(model):
        return build_graph(model, example.to(device))


def explanation(layer: "UnitLayer", graph: "UnitGraph") -> list[tuple[str, str]]:
    """Return the wiring of a layer in words, as (label, text) pairs."""
    words = wiring_words(layer, graph.layers)
    facts = [("layer", _what(layer))]
    if layer.tied:
        facts.append(("tied", f"the same weight is that of {', '.join(layer.tied)}"))
    facts.append(("activation", _activation(layer)))
    readers = [_listed(words.readers), words.otherwise]
    facts.append(("read by", "; ".join(filter(None, readers))))
    facts.append(("reads", _listed(words.sources) or NO_SOURCE))
    if words.together:
        facts.append(("together with", f"{_listed(words.together)}: {TOGETHER}"))
    hidden = int(layer.hidden.sum())
    facts.append(("can be reset", f"{hidden:,} of {layer.n_units:,} units"))
    facts += [("not reset", reason) for reason in words.reasons]
    facts += words.remarks
    if graph.note:
        facts.append(("note", graph.note))
    return facts


def _listed(neighbours: Sequence[Neighbour]) -> str:
    return ", ".join(f"{own.name} ({own.amount})" if own.amount else own.name for own in neighbours)


def _what(layer: "UnitLayer") -> str:
    bias = f" and {layer.bias}" if layer.bias else ", without a bias"
    return (
        f"{layer.name}: {layer.kind} with {layer.n_units:,} units, one for each index of dimension "
        f"{layer.unit_dim} of {layer.weight}{bias}"
    )


def _activation(layer: "UnitLayer") -> str:
    sites = dict.fromkeys(f"the {site.where} of {site.module}" for site in layer.z_sites)
    where = f", measured at {', '.join(sites)}" if sites else ""
    return f"{layer.activation}{where}"


def _plain(facts: list[tuple[str, str]]) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for label, text in facts:
        values.setdefault(label.replace(" ", "_"), []).append(text)
    del values["layer"]
    return values
