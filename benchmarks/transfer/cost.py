"""What profile, plan and re-initialisation cost, over an epoch of 5,000 images, side by side.

python benchmarks/transfer/cost.py

EfficientNet-Lite0 at 64 px, 256 images profiled; the epoch is extrapolated from 20 batches of 32.
"""

import tomllib
from dataclasses import replace

import torch
from study import HERE, Pair

from fastplastic.trials import Arm, parse_arm, train
from fastplastic.trials.prepare import Start

_ARMS = (
    "dormant@0.3:zero+compensate+recalibrate", "dormant@0.3:fresh", "gradient@0.2:small", "swr@0.2",
)  # fmt: skip
_ROUNDS, _BATCHES, _EPOCH = 3, 20, 5000


def main() -> None:
    """Print the share of every arm in every round."""
    torch.set_num_threads(1)
    pair = Pair("lite0", "fashion", tomllib.loads((HERE / "study.toml").read_text()))
    settings = replace(
        pair.settings(1e-3), epochs=1, evals=1, profile_images=256, norms_first=False,
        probe_first=False,
    )  # fmt: skip
    task = pair.task(HERE / "cache")
    data = task.data(0)
    task = replace(task, data=lambda seed: data)
    # The model is traced once.
    Start(task, settings, 0).prepare(parse_arm(_ARMS[0]))
    few = [batch for number, batch in enumerate(data.train) if number < _BATCHES]
    images = sum(len(labels) for _, labels in few)
    for number in range(_ROUNDS):
        start = Start(task, settings, 0)
        spent = {name: sum(start.prepare(parse_arm(name)).seconds.values()) for name in _ARMS}
        model = start.prepare(Arm("baseline")).model
        epoch = train(model, few, settings, seed=0).seconds * _EPOCH / images
        shares = ", ".join(
            f"{name} {100 * seconds / epoch:.1f} %" for name, seconds in spent.items()
        )
        print(f"round {number + 1}: epoch {epoch:.0f} s; {shares}", flush=True)


if __name__ == "__main__":
    main()
