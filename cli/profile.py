"""`fastplastic profile`: run data through a model and show where it has lost plasticity."""

import sys

from fastplastic.cli.following import after_profile
from fastplastic.cli.options import ProfileOptions
from fastplastic.cli.outputs import STDOUT, write_json
from fastplastic.cli.session import Measured, measure
from fastplastic.cli.terminal import console, follow


def run(options: ProfileOptions) -> None:
    """Show where a model has lost plasticity, on your data.

    Runs batches forward and backward, changes nothing, and tells for every layer how many units
    are dead, frozen or dormant, and how far their activation functions are saturated.
    """
    options.check()
    measured = measure(options, pretrained=options.pretrained, ranks=options.ranks)
    schema = measured.profile.to_dict(
        model=options.model, weights=measured.loaded.weights, data=measured.source.name
    )
    if options.json:
        write_json(options.json, schema, force=options.force)
    if options.quiet or options.json == STDOUT:
        return
    from fastplastic.cli import render
    from fastplastic.cli.report import report_of

    out = console(sys.stdout)
    out.print(render.profile(report_of(measured.profile, measured.facts), out.width))
    advice = _advice(measured)
    if advice:
        out.print()
        out.print(render.facts([("advice", advice)]))
    follow(out, after_profile(options))


def _advice(measured: Measured) -> str:
    """Return whether re-initialisation is likely to help; "" for weights that are not trained."""
    from fastplastic.trials import advise

    found = None if measured.loaded.weights == "random" else advise(measured.profile)
    return found.text if found else ""
