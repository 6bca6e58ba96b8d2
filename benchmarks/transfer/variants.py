"""Other ways to give the same dose, which no arm of a trial has: what do they change?

    python benchmarks/transfer/variants.py --only 'mlp-*'

A rate of its own for what is fresh, resets spread over the first tenth of the updates, and three
rounds of profile, plan and re-initialisation with a third of the dose each. The files of results in
`results/variants` are as those of study.py: finished runs are never run again.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from study import RESULTS, Pair, best_rate, options_beside
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastplastic import plan, profile, reinit_
from fastplastic.planning import Plan
from fastplastic.trials import Arm, Dose, Results, TrainSettings, parse_arm
from fastplastic.trials.prepare import Prepared, Start
from fastplastic.trials.run import train_prepared

AT_ONCE = "at once"
# A share of the updates, in which all that comes later has come.
_SPREAD, _ROUNDS = 0.1, 0.2
_PARTS = 4
_TURNS = 3

# What is done after an update: the optimizer, and the number of updates so far.
After = Callable[[Optimizer, int], None]


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a variant.

    Attributes:
        start: Where it starts from.
        model: Its own copy of the model.
        dose: What is re-initialised.
        updates: Of the whole run.
    """

    start: Start
    model: nn.Module
    dose: Dose
    updates: int

    def reset(self, chosen: Plan, optimizer: Optimizer | None = None) -> None:
        """Re-initialise by a plan; a unit that is taken twice gets the same values again."""
        reinit_(self.model, chosen, outgoing=self.dose.outgoing, optimizer=optimizer,
                reset_steps=optimizer is not None, seed=self.start.seed)  # fmt: skip


def at_once(run: Run) -> After | None:
    """Re-initialise before training: what the arms of a trial do."""
    run.reset(run.start.plan(run.dose))
    return None


def rate(factor: float) -> Callable[[Run], After | None]:
    """Return a variant in which every update of a fresh weight is so many times as large."""

    def begin(run: Run) -> After:
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        at_once(run)
        fresh = {name: p.detach() != before[name] for name, p in run.model.named_parameters()}
        for name, p in run.model.named_parameters():
            before[name] = p.detach().clone()

        def after(optimizer: Optimizer, done: int) -> None:
            with torch.no_grad():
                for name, p in run.model.named_parameters():
                    scaled = before[name] + factor * (p - before[name])
                    p.copy_(torch.where(fresh[name], scaled, p))
                    before[name].copy_(p)

        return after

    return begin


def spread(run: Run) -> After:
    """Re-initialise a quarter of the plan at a time."""
    parts = list(_parts(run.start.plan(run.dose), _PARTS))
    run.reset(parts[0])
    at = [round(run.updates * _SPREAD * k / (_PARTS - 1)) for k in range(1, _PARTS)]
    later = dict(zip(at, parts[1:], strict=True))

    def after(optimizer: Optimizer, done: int) -> None:
        if done in later:
            run.reset(later[done], optimizer)

    return after


def rounds(run: Run) -> After:
    """Profile, plan and re-initialise a third of the dose, three times."""
    ratio = (run.dose.ratio or 0.0) / _TURNS
    run.reset(run.start.plan(replace(run.dose, ratio=ratio)))
    at = [round(run.updates * _ROUNDS * k / (_TURNS - 1)) for k in range(1, _TURNS)]

    def after(optimizer: Optimizer, done: int) -> None:
        if done in at:
            training = run.model.training
            found = profile(run.model.eval(), run.start.data.plain, backward=False)
            run.model.train(training)
            chosen = plan(found, criterion=run.dose.criterion, ratio=ratio, seed=run.start.seed,
                          max_layer_fraction=run.dose.max_layer_fraction)  # fmt: skip
            run.reset(chosen, optimizer)

    return after


def _parts(chosen: Plan, number: int) -> Iterator[Plan]:
    """Yield plans that have every so-manyth unit of each layer."""
    for first in range(number):
        units, scores = (
            {name: values[first::number] for name, values in found.items() if len(values) > first}
            for found in (chosen.units, chosen.scores)
        )
        yield replace(chosen, units=units, scores=scores)


VARIANTS: Mapping[str, Callable[[Run], After | None]] = {
    AT_ONCE: at_once, "rate 0.3": rate(0.3), "rate 3": rate(3.0),
    f"in {_PARTS} parts": spread, f"in {_TURNS} rounds": rounds,
}  # fmt: skip


def one(start: Start, settings: TrainSettings, arm: Arm, variant: str) -> Any:
    """Return the finished run of a variant."""
    assert arm.dose is not None
    model = copy.deepcopy(start.model)
    updates = settings.epochs * len(start.data.train)
    after = VARIANTS[variant](Run(start, model, arm.dose, updates))
    done = 0

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal done
        done += 1
        if after is not None:
            after(optimizer, done)

    handle = register_optimizer_step_post_hook(hook)
    try:
        named = replace(arm, name=f"{arm.dose}, {variant}")
        return train_prepared(start, Prepared(model), named, settings, lambda share: None)
    finally:
        handle.remove()


def file_of(pair: Pair, results: Path = RESULTS) -> Path:
    """Return where the runs of a pair are kept."""
    return results / "variants" / f"{pair.name}.jsonl"


def run_pair(pair: Pair, doses: list[str], seeds: int, cache: Path) -> None:
    """Run what is missing of a pair."""
    settings, task = pair.settings(best_rate(pair)), pair.task(cache)
    file = file_of(pair, pair.results)
    file.parent.mkdir(parents=True, exist_ok=True)
    store = Results(file, {**settings.to_dict(), **task.facts})
    with store.locked():
        for seed in range(seeds):
            wanted = [(parse_arm(text), name) for text in doses for name in VARIANTS]
            left = [x for x in wanted if store.find(f"{x[0].dose}, {x[1]}", seed) is None]
            if left:
                start = Start(task, settings, seed)
            for arm, name in left:
                run = one(start, settings, arm, name)
                store.add(run)
                print(f"{pair.name} {run.arm} {seed}: {run.accuracy[-1]:.3f}", flush=True)


def pairs(config: dict[str, Any], results: Path = RESULTS) -> list[Pair]:
    """Return the pairs on which the variants are compared."""
    names = [name.partition(".") for name in config["variants"]["pairs"]]
    return [Pair(network, target, config, results) for network, _, target in names]


def main() -> None:
    """Run the variants."""
    options, config = options_beside(__doc__)
    entry = config["variants"]
    for pair in pairs(config):
        if fnmatchcase(pair.name, options.only):
            run_pair(pair, entry["doses"], entry["seeds"], options.cache)


if __name__ == "__main__":
    main()
