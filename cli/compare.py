"""`fastplastic compare`: what changed from one profile to another."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastplastic.cli.compare_options import TOP, CompareOptions
from fastplastic.cli.gates import enforce
from fastplastic.cli.outputs import STDOUT, write_json
from fastplastic.cli.parsing import typed
from fastplastic.cli.terminal import console
from fastplastic.errors import FileError

if TYPE_CHECKING:
    from fastplastic.comparison import GateResult, ProfileComparison
    from fastplastic.files import ProfileFigures


def run(options: CompareOptions) -> None:
    """Show what changed between profiles of the same model, or of related ones.

    Before and after fine-tuning, over epochs, or over the sizes of a family: in the model as a
    whole, then in the layers, the most changed first. Layers are matched by their names.
    """
    from fastplastic.comparison import check_gates, compare_figures, parse_gates

    options.check()
    if options.html:
        from fastplastic.cli.page import require_jinja2

        require_jinja2()
    gates = parse_gates(options.fail_if)
    figures = [_read(file) for file in options.files]
    names = ["stdin" if file == STDOUT else str(file) for file in options.files]
    found = compare_figures(figures, names)
    results = check_gates(gates, figures)
    if options.json:
        values = found.to_dict() | {"gates": [result.to_dict() for result in results]}
        write_json(options.json, values, force=options.force)
    if options.html:
        _write_page(options, found, results)
    if not (options.quiet or options.json == STDOUT):
        from fastplastic.cli import compare_view

        out = console(sys.stdout)
        top = None if options.layers else options.top or TOP
        out.print(compare_view.comparison(found, results, width=out.width, top=top))
    enforce(results)


def _write_page(
    options: CompareOptions, found: "ProfileComparison", results: "Sequence[GateResult]"
) -> None:
    """Write the page that --html names."""
    from fastplastic.cli.page import Origin, changes_view, write_page

    assert options.html is not None
    origin = Origin.of(typed("compare", options), None)
    write_page(changes_view(found, results, origin), options.html, force=options.force)


def _read(file: Path) -> "ProfileFigures":
    from fastplastic.comparison import read_figures
    from fastplastic.files import parse_profile_json

    if file != STDOUT:
        return read_figures(file)
    try:
        content = sys.stdin.buffer.read()
    except OSError as error:
        raise FileError(
            f"stdin: cannot be read ({error.strerror or error}): expected a profile"
        ) from None
    return parse_profile_json(content, "stdin")
