"""Which figure of a profile tells beforehand that re-initialisation will help?

    python benchmarks/transfer/predict.py

Every network on every target of the finals is one case. It is helped where the setting that is the
same for all networks ends significantly better than the baseline, or is better over the run. The
figures are those of the profile before anything was done: `fastplastic.trials.figures`.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, pstdev

from report import finals, row
from study import HERE

from fastplastic.trials import BASELINE, Trial

# A case is helped where a paired test says so at this level.
_LEVEL = 0.05
# Fewer seeds do not tell.
_SEEDS = 5


@dataclass(frozen=True)
class Case:
    """A network on a target.

    Attributes:
        network: Name of the network; those of one name are left out together.
        target: Name of the target.
        figures: Of the profile, means over seeds.
        gain: In accuracy at the end.
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
        same = config["final"]["always"] + "+recalibrate" * bool(final.pair.get("norms"))
        names = {arm.name for arm in final.trial.arms}
        if same not in names or final.pair.name in seen:
            continue
        seen.add(final.pair.name)
        arm = final.trial[same]
        if len(arm.seeds) < _SEEDS:
            continue
        tests = [*arm.final_tests, *arm.area_tests]
        shown = [
            test.p is not None and test.p < _LEVEL and test.difference.mean > 0
            for test in tests
            if test.against == BASELINE
        ]
        yield Case(
            final.pair.network, final.pair.target, _figures(final.trial),
            arm.final_tests[0].difference.mean, any(shown),
        )  # fmt: skip


def _figures(trial: Trial) -> dict[str, float]:
    profiles = [run.figures for run in trial.runs if run.arm == BASELINE]
    names = set.intersection(*(set(found) for found in profiles))
    return {name: mean(found[name] for found in profiles) for name in sorted(names)}


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
    helped = sum(case.helped for case in found)
    lines.append("")
    lines.append(
        f"{helped} of {len(found)} cases are helped. Leave one network out: the others choose the "
        f"figure, its direction and its scale; AUC {left_out(found):.2f}."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables(list(cases())))
