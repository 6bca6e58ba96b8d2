"""Make the tables and the figure of README.md from the result files.

python benchmarks/transfer/report.py            # writes README.md and results.svg
python benchmarks/transfer/report.py --check    # says whether README.md is up to date
"""

import argparse
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

from networks import NETWORKS
from study import HERE, RESULTS, Pair, best_rate, pairs_of, runs_of
from variants import AT_ONCE, VARIANTS, file_of
from variants import pairs as varied_pairs

from fastplastic.errors import FastPlasticError
from fastplastic.trials import BASELINE, Arm, ArmResult, Comparison, Trial, outcome_of, parse_arm
from fastplastic.trials.statistics import compare, holm

README = HERE / "README.md"
FIGURE = HERE / "results.svg"
# Fewer seeds, and fewer targets, do not tell.
_SEEDS, _TARGETS = 5, 3


@dataclass(frozen=True, eq=False)
class Final:
    """What the final of a pair shows.

    Attributes:
        pair: The pair.
        lr: Learning rate.
        trial: The outcome.
    """

    pair: Pair
    lr: float
    trial: Trial

    def arms(self, kind: str) -> list[ArmResult]:
        """Return the arms of a kind."""
        return [arm for arm in self.trial.arms if arm.kind == kind]

    @property
    def best(self) -> ArmResult:
        """Return the dose that ends best."""
        return max(self.arms("reinit"), key=lambda arm: arm.final.mean)

    def recovered(self, arm: ArmResult) -> float | None:
        """Return the share of the gap to a fresh network that an arm closes, by the area."""
        fresh = self.arms("fresh")
        base = self.trial[BASELINE].area.mean
        gap = fresh[0].area.mean - base if fresh else 0.0
        return (arm.area.mean - base) / gap if gap > 0.01 else None


def finals(config: dict[str, Any]) -> Iterator[Final]:
    """Yield the finals that have runs, each pair at the best rate of its baseline first."""
    for pair in pairs_of(config):
        try:
            best = best_rate(pair)
        except FastPlasticError:
            continue
        for factor in (1.0, 0.3, 3.0):
            runs = runs_of(pair.file("final", best * factor))
            names = dict.fromkeys(run.arm for run in runs)
            arms = [Arm(BASELINE) if name == BASELINE else parse_arm(name) for name in names]
            arms.sort(key=lambda arm: arm.kind != BASELINE)
            if any(arm.kind == "reinit" for arm in arms):
                yield Final(pair, best * factor, outcome_of(arms, runs, {}))


def against(arm: ArmResult, baseline: bool) -> Comparison | None:
    """Return the comparison of the accuracy at the end with the baseline, or with the control."""
    found = (test for test in arm.final_tests if (test.against == BASELINE) == baseline)
    return next(found, None)


def row(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def points(test: Comparison | None) -> str:
    """Return a difference in points with its interval and p."""
    if test is None:
        return ""
    found = test.difference
    text = f"{100 * found.mean:+.1f}"
    if found.low is not None and found.high is not None:
        text += f" [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    p = test.corrected
    return text if p is None else f"{text} p {'<' if p < 0.001 else ''}{max(p, 0.001):.2g}"


def share(value: float | None) -> str:
    """Return a share in percent."""
    return "" if value is None else f"{100 * value:.0f} %"


def table(found: Sequence[Final]) -> str:
    """Return the table of all arms that re-initialise and what explains them."""
    titles = (
        "network", "target", "lr", "arm", "seeds", "end", "mean over the run", "to baseline",
        "to random", "updates to the baseline's end", "recovered", "cost",
    )  # fmt: skip
    lines = [row(titles), row(["---"] * len(titles))]
    for final in found:
        for arm in final.trial.arms:
            if arm.kind == "random":
                continue
            lines.append(
                row(
                    (
                        final.pair.network, final.pair.target, f"{final.lr:g}", f"`{arm.name}`",
                        str(len(arm.seeds)), f"{100 * arm.final.mean:.1f}",
                        f"{100 * arm.area.mean:.1f}", points(against(arm, True)),
                        points(against(arm, False)), _steps(arm), share(final.recovered(arm)),
                        share(arm.cost) if arm.kind == "reinit" else "",
                    )
                )
            )  # fmt: skip
    return "\n".join(lines)


def _steps(arm: ArmResult) -> str:
    if arm.name == BASELINE:
        return ""
    reached = f"{arm.reached} of {len(arm.seeds)}"
    return f"never ({reached})" if arm.steps_to_baseline is None else share(arm.steps_to_baseline)


def targets(found: Sequence[Final]) -> str:
    """Return the table of what had to be reached."""
    damaged = [f for f in found if NETWORKS[f.pair.network].damaged and len(f.arms("fresh"))]
    first: dict[str, Final] = {}
    for final in damaged:
        first.setdefault(final.pair.network, final)
    lines = [row(("damaged network", "best arm", "gain", "updates", "to random", "recovered"))]
    lines.append(row(["---"] * 6))
    for final in first.values():
        arm = final.best
        lines.append(
            row(
                (
                    f"{final.pair.network} on {final.pair.target}", f"`{arm.name}`",
                    points(against(arm, True)), _steps(arm), points(against(arm, False)),
                    share(final.recovered(arm)),
                )
            )
        )  # fmt: skip
    return "\n".join(lines)


def together(found: Sequence[Final]) -> str:
    """Return the gain over the baseline over all targets of a network, each target as one value."""
    gains: dict[tuple[str, str], dict[str, float]] = {}
    for final in found:
        if final.lr != best_rate(final.pair):
            continue
        for arm in final.arms("reinit"):
            test = against(arm, True)
            if test is not None and len(arm.seeds) >= _SEEDS:
                own = gains.setdefault((final.pair.network, arm.name), {})
                own[final.pair.target] = test.difference.mean
    lines = [row(("network", "arm", "targets", "gain, points", "of each"))]
    lines.append(row(["---"] * 5))
    for (network, name), own in gains.items():
        if len(own) >= _TARGETS:
            test = compare(BASELINE, list(own.values()), [0.0] * len(own))
            each = ", ".join(f"{target} {100 * gain:+.1f}" for target, gain in own.items())
            lines.append(row((network, f"`{name}`", str(len(own)), points(test), each)))
    return "\n".join(lines)


Gains = dict[tuple[str, str], dict[str, dict[str, list[float]]]]


def gains_over_random(config: dict[str, Any]) -> Gains:
    """Return {(of what, criterion): {network: {setting: gains over random, one for each seed}}}."""
    gains: Gains = {}
    for pair in pairs_of(config):
        for key, setting, gain in _gains(pair):
            found = gains.setdefault(key, {}).setdefault(pair.network, {})
            found.setdefault(setting, []).append(gain)
    return gains


def screened(config: dict[str, Any]) -> str:
    """Return how criteria did against random units, or weights, of the same dose and treatment."""
    gains = gains_over_random(config)
    names = list(dict.fromkeys(name for found in gains.values() for name in found))
    lines = [row(("of", "criterion", *names)), row(["---"] * (2 + len(names)))]
    for (granularity, criterion), found in sorted(gains.items()):
        cells = []
        for name in names:
            own = [gain for values in found.get(name, {}).values() for gain in values]
            better = sum(gain > 0 for gain in own)
            text = f"{100 * mean(own):+.1f} ({better} of {len(own)})" if own else ""
            cells.append(text)
        lines.append(row((granularity, f"`{criterion}`", *cells)))
    return "\n".join(lines)


def _gains(pair: Pair) -> Iterator[tuple[tuple[str, str], str, float]]:
    """Yield ((of what, criterion), setting, gain over random) of every setting and seed."""
    try:
        runs = runs_of(pair.file("screen", best_rate(pair)))
    except FastPlasticError:
        return
    ends = {(run.arm, run.seed): run.accuracy[-1] for run in runs}
    for (name, seed), end in ends.items():
        # By its text, as a criterion that was screened may be gone since.
        criterion, _, dose = name.partition("@")
        ratio, _, options = dose.partition(":")
        of_weights = options.startswith("weight") or criterion in ("swr", "magnitude")
        if of_weights and not options.startswith("weight"):
            options = "weight" + f"+{options}" * bool(options)
        control = f"random@{ratio}:{options}"
        if criterion != "random" and (control, seed) in ends:
            of = "weight" if of_weights else "unit"
            yield (of, criterion), name, end - ends[control, seed]


def varied(config: dict[str, Any]) -> str:
    """Return how doses did that were given in other ways, against the same dose at once."""
    names = [name for name in VARIANTS if name != AT_ONCE]
    lines = [row(("network", "target", "dose", f"{AT_ONCE}: end", *names)), row(["---"] * 8)]
    for pair in varied_pairs(config):
        ends = {(run.arm, run.seed): run.accuracy[-1] for run in runs_of(file_of(pair))}
        for dose in config["variants"]["doses"]:
            found = {n: {s: e for (a, s), e in ends.items() if a == f"{dose}, {n}"}
                     for n in VARIANTS}  # fmt: skip
            seeds = sorted(set.intersection(*(set(by_seed) for by_seed in found.values())))
            if not seeds:
                continue
            values = {name: [by_seed[s] for s in seeds] for name, by_seed in found.items()}
            tests = [compare(AT_ONCE, values[name], values[AT_ONCE]) for name in names]
            ps = holm({name: test.p for name, test in zip(names, tests, strict=True)})
            cells = [
                points(replace(test, corrected=ps[name]))
                for name, test in zip(names, tests, strict=True)
            ]
            end = f"{100 * mean(values[AT_ONCE]):.1f} ({len(seeds)} seeds)"
            lines.append(row((pair.network, pair.target, f"`{dose}`", end, *cells)))
    return "\n".join(lines)


def compute() -> str:
    """Return how many runs there are, and what they took."""
    files = sorted(file for file in RESULTS.rglob("*.jsonl") if file.parent.name != "figures")
    runs = [run for file in files for run in runs_of(file)]
    hours = sum(run.seconds.get("train", 0.0) for run in runs) / 3600
    return (
        f"{len(runs):,} runs in {len(files)} trials, {hours:.1f} hours of training on one core; "
        f"a run takes {median(run.seconds['train'] for run in runs):.1f} s in the middle."
    )


def draw(found: Sequence[Final]) -> None:
    """Draw the gain of every dose over the baseline against that of as many at random."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for damaged, colour, marker in ((True, "#D55E00", "o"), (False, "#0072B2", "s")):
        pairs = [
            (against(arm, True), against(arm, False))
            for final in found
            if NETWORKS[final.pair.network].damaged == damaged
            for arm in final.arms("reinit")
        ]
        known = [(b.difference.mean, r.difference.mean) for b, r in pairs if b and r]
        xs, ys = ([100 * pair[i] for pair in known] for i in (0, 1))
        label = "damaged networks" if damaged else "healthy networks"
        axes.scatter(xs, ys, color=colour, marker=marker, label=label, alpha=0.8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="gain over the baseline, points", ylabel="gain over as many at random, points")
    axes.legend()
    axes.grid(alpha=0.3)
    # The same file from the same results.
    with rc_context({"svg.hashsalt": "transfer"}):
        figure.savefig(FIGURE, metadata={"Date": None})


def readme(found: Sequence[Final], config: dict[str, Any]) -> str:
    """Return README.md with its generated parts made anew."""
    parts = {
        "targets": targets(found), "together": together(found), "table": table(found),
        "screened": screened(config), "varied": varied(config), "compute": compute(),
    }  # fmt: skip
    text = README.read_text()
    for name, content in parts.items():
        text = inserted(text, name, content)
    return text


def inserted(text: str, name: str, content: str) -> str:
    """Return a text with what stands between the marks of a name made anew."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}{content}\n{end}{after}"


def main() -> None:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    config = tomllib.loads((HERE / "study.toml").read_text())
    found = list(finals(config))
    text = readme(found, config)
    if options.check:
        sys.exit(README.read_text() != text)
    README.write_text(text)
    draw(found)


if __name__ == "__main__":
    main()
