"""`fastplastic profile`: run data through a model and show where it has lost plasticity."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastplastic.cli.following import after_profile
from fastplastic.cli.options import STDOUT, ProfileOptions
from fastplastic.cli.session import measure
from fastplastic.cli.terminal import console, follow


def _write_json(path: Path, schema: Mapping[str, Any], *, force: bool) -> None:
    from fastplastic.files import atomic_write

    text = json.dumps(schema, indent=2, allow_nan=False) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
        return
    with atomic_write(path, force=force) as temporary:
        temporary.write_text(text)


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
        _write_json(options.json, schema, force=options.force)
    if options.quiet or options.json == STDOUT:
        return
    from fastplastic.cli import render
    from fastplastic.cli.report import report_of

    out = console(sys.stdout)
    out.print(render.profile(report_of(measured.profile, measured.facts), out.width))
    follow(out, after_profile(options))
