"""What docs/extend shows how to add, added in a copy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from helpers.documents import apply_changes
from torch import nn

import fastplastic

REPOSITORY = Path(__file__).parent.parent
USE_CRITERION = """
import sys, torch
from fastplastic import Profile, plan
from fastplastic.cli.main import main
from fastplastic.cli.options import PlanOptions

found = Profile.load(sys.argv[1])
score = found.score("spread")["0"]
assert torch.equal(score, found["0"].stats.std_h / found["0"].stats.mean_abs_h)
chosen = plan(found, criterion="spread", threshold=1.5, max_layer_fraction=1.0)
assert chosen.count == int((score <= 1.5).sum()) > 0
assert main(["list", "criteria"]) == 0
PlanOptions(model="resnet18", ratio=0.1, criterion="spread").check()
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


USE_RULE = """
import torch
from fastplastic.graph import build_graph


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 2, 3)

    def forward(self, x):
        resize = torch.nn.functional.interpolate
        return self.b(resize(self.a(x), size=9, mode="bicubic", antialias=True))


assert build_graph(Net(), torch.randn(2, 3, 12, 12))["a"].hidden.all()
"""
USE_KERNEL = """
import os, torch
os.environ["TRITON_INTERPRET"] = "1"
from fastplastic.kernels import largest
from fastplastic.kernels.dispatch import kernel_of

for shape in ((1, 1), (37, 101), (3, 300)):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(shape).to(dtype)
        x[0, -1] = torch.nan
        for view in (x, x.T.contiguous().T):
            for backend in ("pytorch", "numba", "triton"):
                found = kernel_of(backend, "largest")(view)
                torch.testing.assert_close(
                    found, x.double().abs().amax(0), rtol=0, atol=0, equal_nan=True
                )
            assert torch.equal(largest(view).nan_to_num(), found.nan_to_num())
"""


def copy_with(pages: dict[str, int], folder: Path) -> Path:
    """Return a folder to import a copy of the package from, changed as some pages show.

    Args:
        pages: How many files a page says to change.
        folder: An empty one.
    """
    for name in ("fastplastic", "kernels", "cli"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    for page, files in pages.items():
        changed = apply_changes(f"docs/extend/{page}.md", folder)
        assert len(set(changed)) == files, changed
    for name in ("kernels", "cli"):
        shutil.move(folder / name, folder / "fastplastic" / name)
    return folder


def run(site: Path, program: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-P", "-c", program, *arguments]
    result = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_criterion_and_a_rule_take_one_file_and_a_kernel_one_for_each_backend(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    batch = torch.randn(50, 3), torch.zeros(50).long()
    fastplastic.profile(model, [batch]).save(tmp_path / "profile")
    # A kernel takes its public name, in two files, too.
    site = copy_with({"criterion": 1, "wiring-rule": 1, "kernel": 5}, tmp_path)
    run(site, USE_KERNEL + USE_RULE + USE_CRITERION, str(tmp_path / "profile"))


def test_an_activation_function_takes_an_entry_and_two_expressions(tmp_path):
    run(copy_with({"activation": 3}, tmp_path), USE_ACTIVATION)
