"""Means of scores, which do not depend on the order or on who holds which part."""

import math
from fractions import Fraction

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastplastic.planning.means import mean_of, sums_of

# Of all powers of two, also those below the smallest normal number.
scores = st.floats(0, float(np.finfo(np.float32).max), width=32)
special = st.sampled_from([0.0, 2.0**-149, math.inf, math.nan, -math.nan])


@given(values=st.lists(st.one_of(scores, special), max_size=30), cut=st.integers(0, 30))
@settings(max_examples=200, deadline=None)
def test_a_mean_is_rounded_once_and_parts_add_up(values, cut):
    tensor = torch.tensor(values, dtype=torch.float32)
    found = mean_of(sums_of(tensor))
    finite = [Fraction(value) for value in values if math.isfinite(value)]
    if not finite:
        assert math.isnan(found)
        return
    assert found == float(sum(finite) / len(finite))
    assert mean_of(sums_of(tensor[cut:]) + sums_of(tensor[:cut])) == found


def test_of_more_scores_than_are_read_at_once():
    values = torch.rand(1500, 1400, generator=torch.Generator().manual_seed(0)).t()
    exact = math.fsum(values.flatten().tolist()) / values.numel()
    assert math.isclose(mean_of(sums_of(values)), exact, rel_tol=1e-15)
