"""Random groups, the same in every run."""

import pytest
import torch
from guards import check_guarded
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from heterolora.verify.groups import RANKS, Sizes, build

SIZES = st.sampled_from((1, 2, 5, 13, 16, 17, 31, 32, 33, 47, 64, 67))
RANK = st.sampled_from((0, *RANKS))
DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64))


@st.composite
def shapes(draw):
    n = tuple(draw(st.lists(SIZES, min_size=1, max_size=4)))
    widths = tuple(draw(st.lists(SIZES, max_size=2)))
    site = st.integers(0, len(n) - 1)
    lora = draw(st.lists(st.tuples(site, RANK), max_size=4))
    shortcuts = []
    if widths:
        source = st.integers(0, len(widths) - 1)
        shortcuts = draw(st.lists(st.tuples(site, RANK, source), max_size=3))
    return Sizes(
        m=draw(SIZES),
        k=draw(SIZES),
        n=n,
        lora=tuple(lora),
        shortcuts=tuple(shortcuts),
        widths=widths,
        dropout=draw(st.sampled_from((0.0, 0.0, 0.1, 0.5))),
    )


# No shrinking: it takes minutes here, and the shape that fails is short to read as it is.
OPTIONS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": [Phase.explicit, Phase.generate],
    "suppress_health_check": list(HealthCheck),
}


@settings(max_examples=16, **OPTIONS)
@given(shapes(), DTYPES)
def test_any_group(shape, dtype):
    _check(shape, dtype)


@pytest.mark.quick
@settings(max_examples=4, **OPTIONS)
@given(shapes(), DTYPES)
def test_a_few_groups(shape, dtype):
    _check(shape, dtype)


def _check(shape, dtype):
    assert check_guarded(lambda draw: build(draw, shape), dtype) is None
