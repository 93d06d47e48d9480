"""No kernel reads or writes outside its tensors, operands, intermediates and results alike."""

import pytest
import torch
from guards import Guarded, check_guarded

from heterolora.verify.groups import GROUPS, LARGE, SEEDED

ALL = {**GROUPS, **SEEDED, **LARGE}
QUICK = {"mixed_siblings", "seeded_shortcut", "rank_160_beside_17", "split_k"}
PARAMETERS = [pytest.param(n, marks=pytest.mark.quick if n in QUICK else ()) for n in ALL]


@pytest.mark.parametrize("name", PARAMETERS)
def test_float32_inside_nan(name, launches):
    assert check_guarded(ALL[name], torch.float32) is None
    assert launches or name == "no_rows"


@pytest.mark.parametrize("name", ["ranks_1_to_4", "shortcuts", "dropout_large"])
@pytest.mark.parametrize("padding", [1, 16])
def test_bfloat16_rows_apart(name, padding):
    """NaN between the rows too: a stride taken for a width reads it."""
    assert check_guarded(ALL[name], torch.bfloat16, padding) is None


@pytest.mark.parametrize("operation", ["low_rank_add", "group_score"])
@pytest.mark.parametrize("name", ["ranks_48_64", "split_k", "shortcuts", "dropout_large"])
def test_other_ops_inside_nan(name, operation):
    assert check_guarded(ALL[name], torch.float32, operation=operation) is None


@pytest.mark.quick
def test_a_stray_write_would_be_seen():
    guarded = Guarded()
    inside = guarded.inside(torch.zeros(3, 5), padding=2)
    assert guarded.broken() == 0
    torch.as_strided(inside, (1,), (1,), inside.storage_offset() + 5).zero_()
    assert guarded.broken() == 1
