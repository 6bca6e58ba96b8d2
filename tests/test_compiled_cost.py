"""What a monitor adds to compiled code: operators alone."""

import pytest
import torch

import fastplastic.measure.operators  # noqa: F401


@pytest.mark.parametrize("name", ["add_activations", "add_gradients", "add_call"])
def test_operators_are_called_without_a_way_for_gradients(name):
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(f"fastplastic::{name}", "CompositeExplicitAutograd")
    for key in ("AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        assert not has_kernel(f"fastplastic::{name}", key)
