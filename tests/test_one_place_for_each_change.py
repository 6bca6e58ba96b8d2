"""Adding a criterion and an activation function by the steps of CONTRIBUTING, in a copy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import fastplastic

REPOSITORY = Path(__file__).parent.parent
CRITERION = """        Criterion(
            "toy", lambda stats, _: stats.mean_abs_h - 1, "small", 0.5, "activations",
            "a test", "mean abs(h) - 1",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class WeightCriterion"""
ENTRY = """    "erf": Activation(
        torch.erf, flat=((-_INF, -2.173925579136355), (2.173925579136355, _INF)), operators=("erf",)
    ),
    "tanh": Activation("""
NUMBA = """@inline
def erf(z: Any, slope: Any) -> Any:
    return _TWO * normal_cdf(z * F(1.4142135)) - _ONE


@inline
def tanh(z"""
TRITON = """    elif ACTIVATION == "erf":
        h = tl.erf(z)
    elif ACTIVATION == "sigmoid":"""
# A step: the file, what stands there, and what takes its place.
ADD_CRITERION = [
    (
        "fastplastic/criteria.py",
        "    )\n}  # fmt: skip\n\n\n@dataclass(frozen=True)\nclass WeightCriterion",
        CRITERION,
    )
]
ADD_ACTIVATION = [
    ("kernels/activations.py", '    "tanh": Activation(', ENTRY),
    ("kernels/cpu/functions.py", "@inline\ndef tanh(z", NUMBA),
    ("kernels/gpu/functions.py", '    elif ACTIVATION == "sigmoid":', TRITON),
]
USE_CRITERION = """
import sys, torch
from fastplastic import Profile, plan
from fastplastic.cli.main import main
from fastplastic.cli.options import PlanOptions

found = Profile.load(sys.argv[1])
score = found.score("toy")["0"]
assert torch.equal(score, found["0"].stats.mean_abs_h - 1)
chosen = plan(found, criterion="toy", threshold=-0.5, max_layer_fraction=1.0)
assert chosen.count == int((score <= -0.5).sum()) > 0
assert main(["list", "criteria"]) == 0
PlanOptions(model="resnet18", ratio=0.1, criterion="toy").check()
"""
USE_ACTIVATION = """
import os, torch
os.environ["TRITON_INTERPRET"] = "1"
from fastplastic.graph import build_graph
from fastplastic.kernels import activate, activation_stats
from fastplastic.kernels.dispatch import kernel_of

z = 3 * torch.randn(200, 7)
h = torch.erf(z).double()
assert torch.equal(activate(z, "erf"), torch.erf(z))
(slope,) = torch.autograd.grad(torch.erf(z.requires_grad_()).sum(), z)
flat, z = (slope <= 0.01).sum(0).tolist(), z.detach()
for backend in ("pytorch", "numba", "triton"):
    table = kernel_of(backend, "activation_stats")(z, 1, "erf").double()
    torch.testing.assert_close(table[1], h.sum(0), rtol=1e-5, atol=1e-4)
    assert table[7].tolist() == flat, backend


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)

    def forward(self, x):
        return self.b(torch.erf(self.a(x)))


assert build_graph(Net(), torch.randn(5, 3))["a"].activation == "erf"
"""


def copy_with(steps, folder: Path) -> Path:
    """Return a folder to import a copy of the package from, changed by some steps."""
    for name in ("fastplastic", "kernels", "cli"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    for file, old, new in steps:
        text = (folder / file).read_text()
        assert text.count(old) == 1, file
        (folder / file).write_text(text.replace(old, new))
    for name in ("kernels", "cli"):
        shutil.move(folder / name, folder / "fastplastic" / name)
    return folder


def run(site: Path, program: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-P", "-c", program, *arguments]
    result = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_criterion_takes_one_file(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    batch = torch.randn(50, 3), torch.zeros(50).long()
    fastplastic.profile(model, [batch]).save(tmp_path / "profile")
    run(copy_with(ADD_CRITERION, tmp_path), USE_CRITERION, str(tmp_path / "profile"))


def test_an_activation_function_takes_an_entry_and_two_expressions(tmp_path):
    run(copy_with(ADD_ACTIVATION, tmp_path), USE_ACTIVATION)
