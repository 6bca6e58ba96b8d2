"""ReDo in deep reinforcement learning: DQN on CartPole with many updates for each step.

    pip install gymnasium
    python benchmarks/continual/cartpole.py            # five seeds, with ReDo and without

A value network that is updated often for each step of the environment loses plasticity (Sokar et
al., arXiv 2302.12902). The Recycler follows the optimizer, measures the batch of the replay buffer
that is learned from, and re-initialises the same units in the target network. One line of
results/cartpole.jsonl for each run; finished runs are never run again.
"""

import argparse
import time
from copy import deepcopy
from dataclasses import dataclass
from statistics import mean

import torch
from study import RESULTS, append, read
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from fastplastic import Recycler
from fastplastic.trials.statistics import compare, estimate

FILE = RESULTS / "cartpole.jsonl"
_STEPS, _WARM_UP, _UPDATES, _BATCH = 12_000, 500, 4, 32
_DISCOUNT, _COPY_EVERY = 0.99, 1000
_METHODS = {
    "none": None,
    "redo": {"method": "redo", "every": 1000, "threshold": 0.025},
    "random": {"method": "random", "every": 1000, "ratio": 0.05},
}


@dataclass(frozen=True)
class Played:
    """One run.

    Attributes:
        method: Name in _METHODS.
        seed: Of everything that is drawn.
        returns: Sum of rewards of each episode.
        ends: Step at which each episode ended.
        resets: Units that were re-initialised.
        seconds: Of the whole run.
    """

    method: str
    seed: int
    returns: list[float]
    ends: list[int]
    resets: int
    seconds: float

    @property
    def late(self) -> float:
        """Return the mean return of the episodes that ended in the last quarter."""
        return mean(
            r for r, end in zip(self.returns, self.ends, strict=True) if end > _STEPS * 0.75
        )


class Replay:
    """The transitions so far, as tensors."""

    def __init__(self, size: int, width: int) -> None:
        self._before, self._after = torch.zeros(size, width), torch.zeros(size, width)
        self._action = torch.zeros(size, dtype=torch.int64)
        self._reward, self._ends = torch.zeros(size), torch.zeros(size)
        self._n = 0

    def add(self, before: Tensor, action: int, reward: float, after: Tensor, ends: bool) -> None:
        """Add a transition."""
        self._before[self._n], self._after[self._n] = before, after
        self._action[self._n], self._reward[self._n] = action, reward
        self._ends[self._n] = float(ends)
        self._n += 1

    def draw(self) -> tuple[Tensor, ...]:
        """Return a batch of transitions."""
        chosen = torch.randint(self._n, (_BATCH,))
        kept = self._before, self._action, self._reward, self._after, self._ends
        return tuple(values[chosen] for values in kept)


def network() -> nn.Sequential:
    """Return a value network for the four numbers and two actions of CartPole."""
    return nn.Sequential(
        nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2)
    )


def learn(
    model: nn.Module, target: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...]
) -> None:
    """Make one update of double Q-learning."""
    before, action, reward, after, ends = batch
    with torch.no_grad():
        best = model(after).argmax(1, keepdim=True)
        value = reward + _DISCOUNT * (1 - ends) * target(after).gather(1, best).squeeze(1)
    found = model(before).gather(1, action[:, None]).squeeze(1)
    optimizer.zero_grad()
    smooth_l1_loss(found, value).backward()
    optimizer.step()


def play(method: str, seed: int) -> Played:
    """Train one agent."""
    import gymnasium

    begun = time.perf_counter()
    torch.manual_seed(seed)
    environment = gymnasium.make("CartPole-v1")
    model = network()
    target = deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    options = _METHODS[method]
    recycler = None
    if options is not None:
        recycler = Recycler(
            model, torch.zeros(2, 4), optimizer, sync=[target], seed=seed, **options
        ).install()
    replay = Replay(_STEPS, 4)
    returns, ends, total, updates = [], [], 0.0, 0
    state = torch.tensor(environment.reset(seed=seed)[0])
    for step in range(1, _STEPS + 1):
        random = torch.rand(()) < max(0.05, 1 - step / 5000)
        with torch.no_grad():
            action = int(torch.randint(2, ())) if random else int(model(state).argmax())
        seen, reward, terminated, truncated, _ = environment.step(action)
        after = torch.tensor(seen)
        replay.add(state, action, float(reward), after, terminated)
        total, state = total + float(reward), after
        if terminated or truncated:
            returns.append(total)
            ends.append(step)
            total, state = 0.0, torch.tensor(environment.reset()[0])
        for _ in range(_UPDATES if step > _WARM_UP else 0):
            learn(model, target, optimizer, replay.draw())
            updates += 1
            if updates % _COPY_EVERY == 0:
                target.load_state_dict(model.state_dict())
    resets = 0 if recycler is None else sum(reset.count for reset in recycler.log)
    if recycler is not None:
        recycler.detach()
    return Played(method, seed, returns, ends, resets, round(time.perf_counter() - begun, 1))


def finished() -> list[Played]:
    """Return the runs of the file."""
    return read(FILE, Played)


def report(runs: list[Played]) -> None:
    """Print what each method does in the last quarter, beside none."""
    plain = {run.seed: run.late for run in runs if run.method == "none"}
    for method in _METHODS:
        own = {run.seed: run.late for run in runs if run.method == method}
        if not own:
            continue
        found = estimate(list(own.values()))
        low, high = found.low or found.mean, found.high or found.mean
        text = f"{method}: {found.mean:.0f} [{low:.0f}, {high:.0f}] ({found.n} seeds)"
        both = sorted(own.keys() & plain.keys())
        if method != "none" and len(both) > 1:
            test = compare("none", [own[s] for s in both], [plain[s] for s in both])
            text += f", {test.difference.mean:+.0f} to none, p {test.p:.2g}"
        resets = mean(run.resets for run in runs if run.method == method)
        print(f"{text}; {resets:.0f} units re-initialised")


def main() -> None:
    """Run what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs = [(method, seed) for seed in range(options.seeds) for method in ("none", "redo")]
    for method, seed in [*pairs, *(("random", seed) for seed in range(options.seeds))]:
        if any((run.method, run.seed) == (method, seed) for run in finished()):
            continue
        done = play(method, seed)
        append(FILE, done)
        print(f"{method} {seed}: {done.late:.0f} in the end, {done.seconds:.0f} s", flush=True)
    report(finished())


if __name__ == "__main__":
    main()
