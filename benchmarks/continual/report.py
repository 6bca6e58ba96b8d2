"""Make the tables and the figure of README.md from the result files.

python benchmarks/continual/report.py            # writes README.md and results.svg
python benchmarks/continual/report.py --check    # says whether README.md is up to date
"""

import argparse
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

from study import HERE, RESULTS, Run, best_options, read

from fastplastic.trials.statistics import Comparison, Estimate, compare, estimate, holm

README = HERE / "README.md"
FIGURE = HERE / "results.svg"
_LEAST_SEEDS = 2
# For a curve.
_LEAST_TASKS = 5
_CONTROLS = ("none", "random")
_COLUMNS = (
    "method", "setting", "seeds", "first task", "late tasks", "to none", "to random",
    "to its dose at random", "resets",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sequence:
    """What a method does on a problem, over seeds.

    Attributes:
        method: Its name in study.toml.
        runs: Its runs by seed.
        late: Online accuracy of each seed, over the tasks that count.
    """

    method: str
    runs: dict[int, Run]
    late: dict[int, float]

    @property
    def first(self) -> float:
        """Return the online accuracy of the first task."""
        return mean(run.online[0] for run in self.runs.values())

    @property
    def curve(self) -> list[float]:
        """Return the mean online accuracy of each task."""
        together = zip(*(run.online for run in self.runs.values()), strict=True)
        return [mean(values) for values in together]

    def against(self, other: "Sequence") -> Comparison | None:
        """Return the paired comparison of the late tasks; None with too few seeds."""
        both = sorted(self.late.keys() & other.late.keys())
        if len(both) < _LEAST_SEEDS or other.method == self.method:
            return None
        ours, theirs = ([side.late[seed] for seed in both] for side in (self, other))
        return compare(other.method, ours, theirs)


def sequences(config: dict[str, Any], problem: str) -> dict[str, Sequence]:
    """Return {method: its final runs at its best setting}."""
    found = {}
    entry = config["problems"][problem]
    for method in config["methods"]:
        try:
            best = best_options(config, problem, method, RESULTS)
        except LookupError:
            continue
        runs = read(RESULTS / "final" / f"{problem}.{method}.jsonl")
        own = {run.seed: run for run in runs if run.options == best}
        late = {seed: mean(run.online[entry["from"] - 1 :]) for seed, run in own.items()}
        if own:
            found[method] = Sequence(method, own, late)
    return found


def table(found: dict[str, Sequence]) -> Iterator[str]:
    """Yield the lines of the table of a problem."""
    tests = {
        control: {name: own.against(found[control]) for name, own in found.items()}
        for control in _CONTROLS
        if control in found
    }
    corrected = {
        control: holm({name: None if test is None else test.p for name, test in own.items()})
        for control, own in tests.items()
    }
    yield f"| {' | '.join(_COLUMNS)} |"
    yield f"| {' | '.join('---' for _ in _COLUMNS)} |"
    for name, own in sorted(found.items(), key=lambda item: -mean(item[1].late.values())):
        options = next(iter(own.runs.values())).options
        setting = ", ".join(f"{key} {value}" for key, value in options.items())
        late = estimate(list(own.late.values()))
        cells = [
            f"`{name}`", setting, str(len(own.runs)), f"{100 * own.first:.1f}", _interval(late),
            *(_cell(tests, corrected, control, name) for control in _CONTROLS),
            _to_its_dose(own, found), _resets(own),
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def _to_its_dose(own: Sequence, found: dict[str, Sequence]) -> str:
    """Return the comparison with as many units at random in the same steps."""
    control = found.get(f"random-as-{own.method}")
    test = None if control is None else own.against(control)
    return "" if test is None else _shown(test, test.p)


def _resets(own: Sequence) -> str:
    counts = [count for run in own.runs.values() for count in run.resets]
    return f"{mean(counts):.0f}" if any(counts) else ""


def _interval(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return f"{100 * found.mean:.1f}"
    return f"{100 * found.mean:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _cell(
    tests: dict[str, dict[str, Comparison | None]],
    corrected: dict[str, dict[str, float | None]],
    control: str,
    name: str,
) -> str:
    test = tests.get(control, {}).get(name)
    if test is None:
        return ""
    return _shown(test, corrected[control][name])


def _shown(test: Comparison, p: float | None) -> str:
    shown = "" if p is None else " p <0.001" if p < 0.001 else f" p {p:.2g}"
    return f"{100 * test.difference.mean:+.1f}{shown}"


def draw(config: dict[str, Any], found: dict[str, dict[str, Sequence]]) -> None:
    """Write the curves over tasks as a picture, for the problems of many."""
    from matplotlib.figure import Figure

    found = {
        problem: own for problem, own in found.items()
        if config["problems"][problem]["tasks"] >= _LEAST_TASKS
    }  # fmt: skip
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    colours = {name: f"C{number % 10}" for number, name in enumerate(config["methods"])}
    for place, (problem, methods) in zip(axes, found.items(), strict=True):
        for name, own in methods.items():
            dashes = "--" if name.startswith(("none", "random", "leaky-relu", "fresh")) else "-"
            line = [100 * value for value in own.curve]
            place.plot(range(1, len(line) + 1), line, dashes, color=colours[name], label=name)
        place.set(title=problem, xlabel="task", ylabel="online accuracy, %")
        place.grid(alpha=0.3)
    lines = {line.get_label(): line for place in axes for line in place.lines}
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=7, fontsize="small"
    )
    figure.savefig(FIGURE, metadata={"Date": None})


def parts(found: dict[str, dict[str, Sequence]]) -> dict[str, str]:
    """Return {marker in the README: text}."""
    return {problem: "\n".join(table(methods)) for problem, methods in found.items()}


def filled(text: str, tables: dict[str, str]) -> str:
    """Return the README with its tables replaced."""
    for name, own in tables.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise LookupError(f"README.md has no place for {name!r}")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = before + begin + own + end + after
    return text


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    config = tomllib.loads((HERE / "study.toml").read_text())
    found = {problem: sequences(config, problem) for problem in config["problems"]}
    text = README.read_text()
    new = filled(text, parts(found))
    if options.check:
        sys.exit("README.md is not up to date: run report.py" if new != text else 0)
    README.write_text(new)
    draw(config, found)


if __name__ == "__main__":
    main()
