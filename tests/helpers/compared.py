"""Profiles as values in JSON, made up rather than measured."""

import json
from pathlib import Path

FIGURES = {"saturated_fraction": 0.5, "mean_abs_activation": 0.25, "mean_abs_gradient": 1e-6}


def a_layer(name, units=8, dead=0, frozen=0, dormant=0, **more):
    return {
        "name": name, "kind": "conv", "activation": "relu", "units": units, "hidden": units,
        "dead": dead, "frozen": frozen, "dormant": dormant, **FIGURES, **more,
    }  # fmt: skip


def a_profile(*layers, **more):
    """Return the values of a profile with these layers, and totals that fit them."""
    layers = list(layers) or [a_layer("stem", 4), a_layer("block.conv", 8, dead=2, dormant=4)]
    totals = {
        key: sum(layer[key] or 0 for layer in layers)
        for key in ("units", "hidden", "dead", "frozen", "dormant")
    }
    totals["hidden_units"] = totals.pop("hidden")
    return {
        "schema_version": 1, "fastplastic_version": "0.1.0", "model": "net", "weights": "random",
        "data": "sample", "device": "cpu", "dtype": "float32", "mode": "eval", "samples": 16,
        "seed": 0,
        "coverage": {"found": len(layers), "measured": len(layers), "skipped": []},
        "totals": {"layers": len(layers), **totals},
        "layers": layers, **more,
    }  # fmt: skip


def written(values, name="profile.json"):
    """Write values as JSON and return the path."""
    path = Path(name)
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path
