"""Base layers with a matmul of their own on a GPU: bitsandbytes and torchao where installed."""

import pytest
import torch
from helpers import CountOps, batch_for, build, error, step, with_lora
from packages import PACKAGES, check
from quantised import added, quantise_bases

import heterolora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_is_peft(package, dtype):
    check(package, dtype, "cuda")


@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_a_model_over_int8_weights(backend):
    base = build("llama")
    batch = {name: value.cuda() for name, value in batch_for(base).items()}
    model = quantise_bases(with_lora(base)).cuda()
    truth, exact = step(model.double(), batch)
    model.float()
    logits, grads = step(model, batch)
    report = heterolora.fuse(model, backend=backend, example=batch)
    assert set(report.fused.values()) == {f"{backend}, own base matmul"}
    with CountOps() as ops:
        fused, found = step(model, batch)
    assert added(ops)[0] == added(ops)[1] > 0
    assert error(fused, truth) <= 2 * max(error(logits, truth), torch.finfo(torch.float32).eps)
    # Pooled: a near-cancelling gradient says little by itself.
    pooled = [
        sum(float((g[key].double() - exact[key]).square().sum()) for key in exact)
        for g in (found, grads)
    ]
    assert pooled[0] ** 0.5 <= 2 * pooled[1] ** 0.5


def test_dropout_on_the_kernels():
    """The same torch seed gives the same masks; another gives others; PEFT's runs with none."""
    base = build("llama")
    batch = {name: value.cuda() for name, value in batch_for(base).items()}
    model = quantise_bases(with_lora(base, lora_dropout=0.3), only="mlp").cuda()
    report = heterolora.fuse(model, backend="triton", example=batch)
    assert set(report.fused.values()) == {"triton", "triton, own base matmul"}
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(step(model, batch))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert not torch.equal(outputs[0][0], outputs[2][0])
    for key, grad in outputs[0][1].items():
        assert torch.equal(grad, outputs[1][1][key])
