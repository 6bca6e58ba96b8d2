"""What the launchers launch, compiled ahead of time for GPUs that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastplastic.kernels import ACTIVATIONS

SCRIPT = Path(__file__).parents[1] / "benchmarks/compile_kernels.py"
# Activation functions of each kind in one dtype for one GPU; two functions and two dtypes for the
# others. The script compiles all.
FEW = ("--quick", "--quick")
TARGETS = {"sm_90": ("--quick",), "sm_80": FEW, "gfx942": FEW}
READERS = ("unit_kernel", "_parameter_kernel", "_histogram_kernel")
KINDS = {
    "identity", "relu", "leaky_relu", "elu", "selu", "gelu", "mish", "tanh", "hardswish",
}  # fmt: skip
# Layouts in which rows are not whole vectors; a score that reads nothing; flags of one byte.
NARROW = ("odd", "crop", "random", "all", "masks")


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request):
    # The interpreter, which this process may use, compiles nothing.
    command = [sys.executable, SCRIPT, "--json", "--target", request.param]
    result = subprocess.run(
        [*command, *TARGETS[request.param]],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert result.returncode == 0, result.stderr
    return [case | {"gpu": request.param} for case in json.loads(result.stdout)]


def of(compiled, *kernels):
    return [case for case in compiled if case["kernel"] in kernels]


def test_every_kernel_and_kind_of_activation_is_compiled(compiled):
    assert {case["kernel"] for case in compiled} == {
        *READERS, "fold_kernel", "_parameter_fold_kernel", "_add_kernel", "_mask_kernel",
        "_resample_kernel",
    }  # fmt: skip
    names = {case["case"].split(" ")[-1] for case in of(compiled, "unit_kernel")}
    expected = KINDS if compiled[0]["gpu"] == "sm_90" else {"relu", "gelu"}
    # Gradients have no activation function: there the layout is the last word.
    assert names & set(ACTIVATIONS) == expected and names - expected >= {"planes", "tokens"}


def test_no_register_is_spilled(compiled):
    assert not [case for case in compiled if case["spilled"]]


def test_loads_are_wide_where_memory_is_dense(compiled):
    # A wave of gfx942 is twice as wide: with the same tile, some loads are half as long.
    least = 8 if compiled[0]["gpu"] == "gfx942" else 16
    dense = [
        case
        for case in of(compiled, *READERS, "_mask_kernel")
        if not any(word in case["case"] for word in NARROW)
    ]
    assert dense
    assert not [case for case in dense if max(case["loads"], default=0) < least]


def test_shared_memory_leaves_room_for_many_programs(compiled):
    assert max(case["shared"] for case in compiled) <= 8192


def test_nothing_is_fused_in_initial_values(compiled):
    """One operation, one rounding: else the bits would differ between backends."""
    cases = of(compiled, "_resample_kernel")
    assert cases and all(case["fused"] in (0, -1) for case in cases)
    if compiled[0]["gpu"] != "gfx942":
        assert any(case["fused"] > 0 for case in of(compiled, "unit_kernel"))
