"""Which figure of a profile tells beforehand that re-initialisation will help?

    python benchmarks/transfer/predict.py            # writes what the package says of its trials
    python benchmarks/transfer/predict.py --check    # says whether that is up to date

Every network on every target of the finals is one case. It is helped where one of the settings that
are the same for all networks ends significantly better than the baseline, or does better over the
run.
The figures are those of measure.py, before anything was done.
"""

import argparse
import json
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, pstdev
from typing import Any

from measure import measured
from report import README, finals, gains_over_random, inserted, row
from scipy import stats
from study import HERE, usual

from fastplastic.criteria import CRITERIA, WEIGHT_CRITERIA
from fastplastic.errors import FastPlasticError
from fastplastic.trials import BASELINE
from fastplastic.trials.evidence import FILE

# Of the tests of criteria against random.
_LEVEL = 0.05
# Fewer seeds do not tell.
_SEEDS = 5
# Nor do fewer settings of a criterion.
_SETTINGS = 3
# The figure that advice is given by: it needs no gradients, and is the plainest of them.
_FIGURE = "dead"
_SHARES = ("dead", "dormant", "flat", "frozen", "no_gradient", "saturated", "weak_gradient")


@dataclass(frozen=True)
class Case:
    """A network on a target.

    Attributes:
        network: Name of the network; those of one name are left out together.
        target: Name of the target.
        figures: Of the profile, means over seeds.
        gain: In accuracy at the end, of the better one.
        helped: Whether the gain is shown, at the end or over the run.
    """

    network: str
    target: str
    figures: Mapping[str, float]
    gain: float
    helped: bool


def cases() -> Iterator[Case]:
    """Yield the cases that there are results of."""
    config = tomllib.loads((HERE / "study.toml").read_text())
    seen = set()
    for final in finals(config):
        wanted = usual(final.pair)
        arms = [arm for arm in final.trial.arms if arm.name in wanted and len(arm.seeds) >= _SEEDS]
        # With statistics that fine-tuning does not begin with it is the same network once more.
        again = not final.pair.get("norms_first", True)
        if not arms or again or final.pair.name in seen:
            continue
        seen.add(final.pair.name)
        shown = [
            test.shown > 0
            for arm in arms
            for test in (*arm.final_tests, *arm.area_tests)
            if test.against == BASELINE
        ]
        gain = max(arm.final_tests[0].difference.mean for arm in arms)
        figures = measured(final.pair)
        if not figures:
            raise FastPlasticError(f"{final.pair.name}: not measured yet: run measure.py")
        yield Case(final.pair.network, final.pair.target, figures, gain, any(shown))


def auc(scores: Sequence[float], helped: Sequence[bool]) -> float:
    """Return the chance that a helped case has the larger score, ties as one half."""
    pairs = [
        (x > y) + 0.5 * (x == y)
        for x, good in zip(scores, helped, strict=True)
        if good
        for y, other in zip(scores, helped, strict=True)
        if not other
    ]
    return mean(pairs) if pairs else float("nan")


def left_out(found: Sequence[Case]) -> float:
    """Return the AUC over all cases, each scored by what the other networks say.

    They choose the figure that tells their cases apart best, its direction and its scale.
    """
    scores = []
    for case in found:
        others = [other for other in found if other.network != case.network]
        names = set.intersection(*(set(other.figures) for other in found))
        ranked = {name: _auc_of(name, others) for name in names}
        best = max(sorted(names), key=lambda name: abs(ranked[name] - 0.5))
        sign = 1.0 if ranked[best] >= 0.5 else -1.0
        values = [other.figures[best] for other in others]
        scores.append(sign * (case.figures[best] - mean(values)) / (pstdev(values) or 1.0))
    return auc(scores, [case.helped for case in found])


def _auc_of(name: str, found: Sequence[Case]) -> float:
    value = auc([case.figures[name] for case in found], [case.helped for case in found])
    return 0.5 if value != value else value


def tables(found: Sequence[Case]) -> str:
    """Return the cases and the AUC of every figure as Markdown."""
    names = sorted(set.intersection(*(set(case.figures) for case in found)))
    lines = [row(("network", "target", "gain, points", "helped", *names))]
    lines.append(row(["---"] * (4 + len(names))))
    for case in found:
        shares = [f"{case.figures[name]:.2f}" for name in names]
        helped = "yes" if case.helped else "no"
        lines.append(row((case.network, case.target, f"{100 * case.gain:+.1f}", helped, *shares)))
    scores = [f"{_auc_of(name, found):.2f}" for name in names]
    lines.append(row(("AUC", "", "", "", *scores)))
    lines.append(row(("errs", "", "", "", *(str(errors(found, name)) for name in names))))
    helped = sum(case.helped for case in found)
    lines.append("")
    networks = len({case.network for case in found})
    lines.append(
        f"{helped} of {len(found)} cases of {networks} networks are helped. `{_FIGURE}`, which "
        f"`profile` advises by: AUC {_auc_of(_FIGURE, found):.2f}. Leave one network out, so that "
        f"the others choose the figure, its direction and its scale: AUC {left_out(found):.2f}."
    )
    return "\n".join(lines)


def limit_of(found: Sequence[Case], figure: str = _FIGURE, sign: float = 1.0) -> float:
    """Return the limit of a figure that errs least, in the middle of the widest such gap.

    Args:
        found: The cases that it is set on.
        figure: The figure.
        sign: 1 where a large figure tells of help, -1 where a small one does.
    """
    values = sorted({sign * case.figures[figure] for case in found})
    # Beyond all of them, too: a share ends at 0 and 1, another figure as far again as they lie.
    span = values[-1] - values[0]
    ends = sorted((0.0, sign)) if figure in _SHARES else [values[0] - span, values[-1] + span]
    around = sorted({ends[0], *values, ends[1]})
    middles = {(low + high) / 2: high - low for low, high in pairwise(around)}
    return min(middles, key=lambda m: (_wrong(m, found, figure, sign), -middles[m]))


def _wrong(limit: float, found: Sequence[Case], figure: str, sign: float) -> int:
    return sum((sign * case.figures[figure] >= limit) != case.helped for case in found)


def errors(found: Sequence[Case], figure: str) -> int:
    """Return for how many cases a limit errs that the other networks set, and its direction."""
    wrong = 0
    for network in sorted({case.network for case in found}):
        others = [case for case in found if case.network != network]
        own = [case for case in found if case.network == network]
        sign = 1.0 if _auc_of(figure, others) >= 0.5 else -1.0
        wrong += _wrong(limit_of(others, figure, sign), own, figure, sign)
    return wrong


def advice(found: Sequence[Case]) -> dict[str, Any]:
    """Return the rule and its record: [helped, cases] on both sides, [wrong, cases] left out."""
    limit = round(limit_of(found), 2)
    sides: dict[str, list[bool]] = {"above": [], "below": []}
    for case in found:
        side = "above" if case.figures[_FIGURE] >= limit else "below"
        sides[side].append(case.helped)
    networks = {case.network for case in found}
    return {
        "figure": _FIGURE, "limit": limit, "networks": len(networks),
        **{side: [sum(helped), len(helped)] for side, helped in sides.items()},
        "wrong": [errors(found, _FIGURE), len(found)],
    }  # fmt: skip


def criteria() -> dict[str, dict[str, list[int]]]:
    """Return {granularity: {criterion: [networks on which it was better than random, networks]}}.

    Better is a mean gain above 0 over the settings of the screening, p < 0.05. A network counts
    where there are enough finished settings to show it.
    """
    config = tomllib.loads((HERE / "study.toml").read_text())
    counts: dict[str, dict[str, list[int]]] = {"unit": {}, "weight": {}}
    for (granularity, criterion), by_network in sorted(gains_over_random(config).items()):
        seeds = len(config["screen"]["seeds"])
        finished = [
            [mean(values) for values in gains.values() if len(values) == seeds]
            for gains in by_network.values()
        ]
        better = [_is_better(means) for means in finished if len(means) >= _SETTINGS]
        # One that was screened may be gone since.
        known = CRITERIA if granularity == "unit" else WEIGHT_CRITERIA
        if better and criterion in known:
            counts[granularity][criterion] = [sum(better), len(better)]
    return counts


def _is_better(means: Sequence[float]) -> bool:
    return bool(mean(means) > 0 and stats.ttest_1samp(means, 0.0).pvalue < _LEVEL)


def main() -> None:
    """Write or compare what the package says, and the cases in README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    found = list(cases())
    readme = inserted(README.read_text(), "cases", tables(found))
    text = json.dumps({"advice": advice(found), "criteria": criteria()}, indent=2) + "\n"
    if options.check:
        sys.exit(FILE.read_text() != text or README.read_text() != readme)
    FILE.write_text(text)
    README.write_text(readme)


if __name__ == "__main__":
    main()
