"""Spectral scores where they are not from one process at B = 0: shared, dynamic, while training."""

import pytest
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from search_runs import HALF, make_model, make_trainer

from heterolora import DynamicSearchCallback
from heterolora.search.dynamic.samples import agreed_scores
from heterolora.search.gains import Gains
from heterolora.search.scores.proxies import PROXIES


def adapted(subject):
    made = subject("opt")
    return get_peft_model(made.model, LoraConfig(r=4, target_modules=["q_proj", "fc1"])), made


@pytest.mark.parametrize(("proxy", "power"), [("spectral", 2), ("spectral-sigma", 1)])
def test_gradients_are_added_up_before_they_are_measured(subject, proxy, power):
    """Two processes with the same batch: twice the gradient."""
    model, made = adapted(subject)
    alone = PROXIES[proxy](model, made.batches(1))

    def reduce(tensors):
        for tensor in tensors:
            tensor.mul_(2)

    both = PROXIES[proxy](model, made.batches(1), reduce=reduce)
    for name, values in alone.marginal.items():
        expected = [2**power * value for value in values]
        # In float32 an eigenvalue is off by 1e-7 of the largest, and a root of that by 3e-4.
        assert both.marginal[name] == pytest.approx(expected, abs=1e-3 * expected[0])


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_agreed_gains_are_gains(subject, group):
    model, made = adapted(subject)
    shared = agreed_scores(PROXIES["spectral"], model, made.batches(2))
    assert isinstance(shared, Gains)
    alone = PROXIES["spectral"](model, made.batches(2))
    for name, values in alone.marginal.items():
        assert shared.marginal[name] == pytest.approx(values, abs=1e-5 * values[0])


def test_a_dynamic_search(tmp_path):
    search = DynamicSearchCallback(HALF, proxy="spectral", ranks=(0, 1, 2, 4), batches=2, every=0.5)
    trainer = make_trainer(make_model(), tmp_path, [search], num_train_epochs=1)
    trainer.train()
    assert len(search.rankings) == 2
    for ranking in search.rankings:
        assert set(ranking.ranks.values()) <= {0, 1, 2, 4} and min(ranking.scores.values()) > 0
    assert sum(search.ranks.values()) == 2 * len(search.ranks)
