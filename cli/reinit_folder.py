"""`fastplastic reinit` on a checkpoint in many files, without the weights in memory."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastplastic.cli.following import after_reinit
from fastplastic.cli.launch import is_first
from fastplastic.cli.options import ReinitOptions
from fastplastic.cli.session import choose, measure_for, outlined
from fastplastic.cli.terminal import console, follow, waiting
from fastplastic.errors import FileError

if TYPE_CHECKING:
    from torch import nn


def run_many_files(options: ReinitOptions) -> None:
    """Re-initialise what a plan names in the files of a checkpoint, and write them to a folder."""
    from fastplastic import Plan, alone, reinit_checkpoint
    from fastplastic.cli import render
    from fastplastic.cli.report import plan_facts, plan_view, reset_fact

    source = options.many_files
    assert source is not None
    if options.plan:
        if not is_first():
            return
        plan = Plan.load(options.plan)
        with waiting(f"loading the structure of {options.model}", quiet=options.quiet):
            loaded = outlined(options)
        facts = [("model", options.model), ("weights", _checked(options, source, loaded.model))]
    else:
        measured = measure_for(options, pretrained=None)
        plan, loaded = choose(options, measured), measured.loaded
        facts = list(measured.facts)
        if not is_first():
            return
    target = None if options.in_place else options.output
    with alone(), waiting(f"writing {target or source}", quiet=options.quiet):
        report = reinit_checkpoint(
            source, target, loaded.model, plan, init=options.init, outgoing=options.outgoing,
            seed=options.seed, force=options.force,
        )  # fmt: skip
    if options.quiet:
        return
    facts += [
        *plan_facts(plan, read=options.plan is not None),
        reset_fact(report),
        _file(options, source),
    ]
    out = console(sys.stdout)
    out.print(render.plan(plan_view(plan, tuple(facts), report.notes)))
    follow(out, after_reinit(options, trains=loaded.texts is None))


def _checked(options: ReinitOptions, source: Path, model: "nn.Module") -> str:
    """Return what the weights are; FileError where some are NaN or infinite."""
    from fastplastic.files import find_weights, nonfinite_in, open_store
    from fastplastic.planning import some_of

    store = open_store(source)
    stored = find_weights(store, model)
    weights = f"checkpoint: {source} ({'; '.join(filter(None, (store.says, stored.said)))})"
    names = nonfinite_in(store, stored, model)
    if names and not options.force:
        raise FileError(
            f"{weights}: NaN or infinity in {len(names)} tensors: {some_of(names)}; expected "
            "finite weights: take another checkpoint, or pass --force to re-initialise this one "
            "all the same"
        )
    return weights


def _file(options: ReinitOptions, source: Path) -> tuple[str, str]:
    """Return where the weights are now."""
    from fastplastic.files import backup_of

    if not options.in_place:
        return "file", str(options.output)
    folder = (source if source.is_dir() else source.parent).resolve()
    return "file", f"{source}; the old one is kept as {backup_of(folder)}"
