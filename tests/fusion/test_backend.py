"""The choice of implementation, and dropout, which only the Triton kernels take."""

import pytest
import torch
from helpers import CountOps, batch_for, build, step, with_lora
from quantised import quantise_bases

import heterolora
from heterolora.errors import FuseError
from heterolora.fusion import call as fused_call
from heterolora.kernels import dispatch, spec


@pytest.fixture
def bert():
    base = build("bert")
    return with_lora(base, lora_dropout=0.25), batch_for(base)


def test_triton_that_cannot_run_is_an_error(bert, monkeypatch):
    model, _ = bert
    monkeypatch.setattr(dispatch, "triton_reason", lambda *_: "no device")
    for mode in (model.train(), model.eval()):
        with pytest.raises(FuseError, match=r"bert\..*'triton' cannot run here: no device"):
            heterolora.fuse(mode, backend="triton")
    assert not hasattr(model, "_heterolora")
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_the_report_names_the_backend(bert, monkeypatch):
    model, _ = bert
    monkeypatch.setattr(dispatch, "triton_reason", lambda *_: None)
    report = heterolora.fuse(model, backend="triton")
    assert set(report.fused.values()) == {"triton"} and not report.declined
    assert "fused, triton: " in str(report)
    quantise_bases(model, only="query")
    assert set(heterolora.fuse(model, backend="triton").fused.values()) == {
        "triton",
        "triton, own base matmul",
    }
    for backend in ("aten", "auto"):
        report = heterolora.fuse(model, backend=backend)
        assert not report.fused
        assert set(report.declined.values()) == {"active dropout (p=0.25)"}
    assert set(heterolora.fuse(model.eval()).fused.values()) == {"aten", "aten, own base matmul"}


class _Calls:
    """The two ops as `run` calls them; "triton" is run by aten, which takes the same masks."""

    def __init__(self, monkeypatch):
        self.seeds, self.implementations = [], []
        monkeypatch.setattr(dispatch, "triton_reason", lambda *_: None)
        for name in ("group_linear", "low_rank_add"):
            monkeypatch.setattr(fused_call, name, self._recorded(getattr(fused_call, name)))

    def _recorded(self, function):
        def call(first, x, branches, *, seed=None, implementation):
            self.seeds.append(seed)
            self.implementations.append(implementation)
            return function(first, x, branches, seed=seed, implementation="aten")

        return call


@pytest.mark.parametrize("own", [False, True])
def test_dropout_is_that_of_the_seed_drawn_for_the_call(own, monkeypatch):
    model = with_lora(build("bert"), 4, lora_dropout=0.25)
    if own:
        quantise_bases(model)
    calls = _Calls(monkeypatch)
    heterolora.fuse(model, backend="triton")
    layer = model.get_base_model().bert.pooler.dense
    x = torch.randn(5, 48)
    with CountOps() as ops:
        found = [layer(x) for _ in range(2)]
    assert ops.counts["aten::randint"] == 2 and calls.implementations == ["triton"] * 2
    assert not torch.equal(*found), "a new seed for each call"
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for y, seed in zip(found, calls.seeds, strict=True):
        assert seed.dtype == torch.int64 and seed.shape == ()
        mask = spec.dropout_mask(seed, 0, 5, 48, 0.25).float()
        expected = layer.base_layer(x) + layer.scaling["default"] * (x * mask) @ a.T @ b.T
        torch.testing.assert_close(y, expected)
    model.eval()
    torch.testing.assert_close(layer(x), type(layer).forward(layer, x))
    assert calls.seeds[-1] is None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("own", [False, True])
def test_checkpointing_repeats_the_masks(own, reentrant, bert, monkeypatch):
    model, batch = bert
    if own:
        quantise_bases(model)
    model.enable_input_require_grads()
    calls = _Calls(monkeypatch)
    heterolora.fuse(model, backend="triton", example=batch)
    calls.seeds.clear()
    torch.manual_seed(7)
    logits, grads = step(model, batch)
    seeds = [int(seed) for seed in calls.seeds]
    assert len(set(seeds)) == len(seeds) > 4, "one for each group call"
    torch.manual_seed(8)
    other, _ = step(model, batch)
    assert not torch.equal(other, logits)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls.seeds.clear()
    torch.manual_seed(7)
    again, checkpointed = step(model, batch)
    assert len(calls.seeds) > len(seeds) and {int(seed) for seed in calls.seeds} == set(seeds)
    assert torch.equal(again, logits)
    assert all(torch.equal(checkpointed[key], grad) for key, grad in grads.items())


@pytest.mark.parametrize("p", [1.0, 1 - 2**-18])
def test_dropout_of_everything_stays_with_peft(p, bert, monkeypatch):
    model, batch = bert
    for name, module in model.named_modules():
        if "lora_dropout.default" in name:
            module.p = p
    _Calls(monkeypatch)
    report = heterolora.fuse(model, backend="triton")
    assert set(report.declined.values()) == {f"active dropout (p={p}) that keeps nothing"}
    assert torch.isfinite(step(model, batch)[0]).all()
