"""`fastplastic profile`: run data through a model and show where it has lost plasticity."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastplastic.cli.agreement import average_norms
from fastplastic.cli.following import after_profile
from fastplastic.cli.gates import enforce, said
from fastplastic.cli.launch import is_first, place
from fastplastic.cli.options import ProfileOptions
from fastplastic.cli.outputs import STDOUT, write_csv, write_json
from fastplastic.cli.parsing import typed
from fastplastic.cli.plot import require_matplotlib
from fastplastic.cli.session import Measured, measure, norms_of_other_data, precision
from fastplastic.cli.terminal import can_print, console, follow, progress
from fastplastic.errors import InputError
from fastplastic.naming import ModelName

if TYPE_CHECKING:
    from fastplastic.cli.page import DataDigest
    from fastplastic.comparison import GateResult
    from fastplastic.trials import Advice


def run(options: ProfileOptions) -> None:
    """Show where a model has lost plasticity, on your data.

    Runs batches forward and backward, changes nothing, and tells for every layer how many units
    are dead, frozen or dormant, and how far their activation functions are saturated.

    Under torchrun (torchrun --nproc-per-node 2 -m fastplastic profile ...) the processes share the
    batches, as for plan and reinit.
    """
    from fastplastic.comparison import check_gates, check_patterns, parse_gates
    from fastplastic.files import figures_of

    options.check()
    _refuse_ranks(options)
    gates = parse_gates(options.fail_if, change=False)
    digest = _digest(options)
    measured = measure(
        options, pretrained=options.pretrained, ranks=options.ranks,
        watch=digest.watch if digest else None,
        check=partial(check_patterns, gates) if any(gate.pattern for gate in gates) else None,
    )  # fmt: skip
    schema = measured.profile.to_dict(
        model=options.model, weights=measured.loaded.weights, data=measured.source.name
    )
    if digest:
        digest.put_together()
    schema |= _conditions(measured, digest)
    results = check_gates(gates, [figures_of(schema)]) if gates else ()
    # Nobody sees it otherwise, and it may take more passes.
    unseen = options.quiet and not (options.json or options.html)
    advice = None if unseen else _advice(options, measured)
    if is_first():
        _write(options, schema, advice, results)
        if options.html:
            _write_page(options, measured, advice, digest.value if digest else None)
        if not options.quiet and STDOUT not in (options.json, options.csv):
            _print(options, measured, advice, said(results))
    enforce(results)


def _refuse_ranks(options: ProfileOptions) -> None:
    found = place()
    if options.ranks and found is not None:
        raise InputError(
            f"--ranks in {found.size} processes: they are of samples of one: leave it out, or "
            "start the command without torchrun"
        )


def _digest(options: ProfileOptions) -> "DataDigest | None":
    """Return what tells the data from others in files; refuse files that cannot be made."""
    if options.plot:
        require_matplotlib()
    if not (options.html or options.json):
        return None
    from fastplastic.cli.page import DataDigest, require_jinja2

    if options.html:
        require_jinja2()
    return DataDigest()


def _conditions(measured: Measured, digest: "DataDigest | None") -> dict[str, Any]:
    """Return what a comparison with others has to know beside the profile itself."""
    heads = [text for name, text in measured.facts if name == "head"]
    return {
        "data_sha256": digest.value if digest else None,
        "lent_head": heads[0] if heads else None,
    }


def _write(
    options: ProfileOptions,
    schema: dict[str, Any],
    advice: "Advice | None",
    results: "Sequence[GateResult]",
) -> None:
    """Write the numbers to the files that are named."""
    if options.json:
        values = schema | ({"advice": asdict(advice)} if advice else {})
        values |= {"gates": [result.to_dict() for result in results]} if results else {}
        write_json(options.json, values, force=options.force)
    if options.csv:
        from fastplastic.measure import flat_rows

        write_csv(options.csv, flat_rows(schema["layers"]), force=options.force)
    if options.plot:
        from fastplastic.cli.profile_plot import draw_profile

        title = f"{schema['model']}, weights {schema['weights']}; data {schema['data']}, "
        title += f"{schema['samples']:,} samples, {schema['mode']} mode"
        draw_profile(schema["layers"], title, options.plot, force=options.force)


def _write_page(
    options: ProfileOptions, measured: Measured, advice: "Advice | None", digest: str | None
) -> None:
    """Write the page that --html names."""
    from fastplastic.cli.page import Origin, page_view, write_page
    from fastplastic.cli.report import report_of

    assert options.html is not None
    facts = (*measured.facts, *([("advice", advice.text)] if advice else []))
    report = report_of(measured.profile, facts)
    origin = Origin.of(typed("profile", options), digest)
    found = [(own.severity, own.text, own.evidence, own.action) for own in report.findings]
    view = page_view(measured.profile, options.model, report, origin, found)
    write_page(view, options.html, force=options.force)


def _print(
    options: ProfileOptions,
    measured: Measured,
    advice: "Advice | None",
    said_last: Sequence[tuple[str, str]],
) -> None:
    """Print the report, with these facts at its end and the command to type next."""
    from fastplastic.cli import overview, render
    from fastplastic.cli.report import report_of

    out = console(sys.stdout)
    # Ranks are in the table alone.
    table = options.layers or options.ranks or bool(options.sort or options.top)
    shown = overview.Shown(table, options.sort, options.top, plain=not can_print("█░", out))
    report = report_of(measured.profile, measured.facts)
    out.print(overview.report(report, out.width, shown, advice.text if advice else ""))
    if said_last:
        out.print()
        out.print(render.facts(said_last))
    follow(out, after_profile(options, trains=measured.loaded.texts is None))


def _advice(options: ProfileOptions, measured: Measured) -> "Advice | None":
    """Return whether re-initialisation is likely to help; None where nothing is known of it.

    Where fine-tuning would begin by measuring the norms anew, the advice is by what is dead then.
    """
    import fastplastic
    from fastplastic.trials import advise, recalibrate_norms

    # The limit was set by trials on images, and nobody knows what a function has trained.
    made = ModelName.of(options.model).kind == "factory" and not options.checkpoint
    if made or measured.loaded.weights == "random" or measured.loaded.texts is not None:
        return None
    model, source = measured.loaded.model, measured.source
    if not norms_of_other_data(measured.loaded, source):
        return advise(measured.profile)
    # The model is not read any more after this.
    with precision(options), progress(len(source), quiet=options.quiet, text="advice") as done:
        recalibrate_norms(model, source)
        average_norms(model)
        found = fastplastic.profile(model, source, backward=False, progress=done)
    advice = advise(found)
    if advice is None:
        return None
    return replace(advice, text=f"with the norms measured anew on these images, {advice.text}")
