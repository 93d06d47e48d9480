"""Under CUDA graphs, on two streams, in compiled code; and that a new scale compiles nothing."""

import pytest
import torch

from heterolora.kernels import Branch, Site, group_linear
from heterolora.verify.groups import GROUPS, LARGE, SEEDED, Draw, Sizes, build, dropout_seed, leaves
from heterolora.verify.operations import outputs_and_gradients

ALL = {**GROUPS, **SEEDED, **LARGE}


def _triton_group(name, seed=0):
    return ALL[name](Draw(torch.bfloat16, torch.float32, device="cuda", seed=seed))


@pytest.mark.parametrize("name", ["mixed_siblings", "shortcuts", "dropout_large", "split_k"])
def test_a_captured_graph_replays_with_new_data(name):
    group, other = _triton_group(name), _triton_group(name, seed=1)
    tensors = leaves(group)
    seed = dropout_seed("cuda")
    grads = outputs_and_gradients(group, "triton")[1]

    def step():
        outputs = group_linear(*group, seed=seed, implementation="triton")
        return [*outputs, *torch.autograd.grad(outputs, tensors, grads, materialize_grads=True)]

    # Compiles on a side stream before the capture, as torch asks.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor, new in zip(tensors, leaves(other), strict=True):
            tensor.copy_(new)
        for site, new in zip(group[1], other[1], strict=True):
            site.weight.copy_(new.weight)
        seed += 1
    for value in captured:
        value.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    expected = step()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_two_streams_do_not_disturb_each_other():
    groups = [_triton_group("shortcuts", seed) for seed in (0, 1)]
    expected = [outputs_and_gradients(group, "triton") for group in groups]
    streams = [torch.cuda.Stream() for _ in groups]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for group, stream, (_, grads) in zip(groups, streams, expected, strict=True):
            with torch.cuda.stream(stream):
                found.append(outputs_and_gradients(group, "triton", grads)[0])
        torch.cuda.synchronize()
        for values, (truth, _) in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(values, truth, strict=True))


def _compiled_kernels():
    """How many variants of this package's kernels this process holds."""
    import importlib
    import pkgutil

    import triton

    import heterolora.kernels as package

    total = 0
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("aot"):
            continue
        loaded = importlib.import_module(f"{package.__name__}.{module.name}")
        for kernel in set(filter(_hashable, vars(loaded).values())):
            if isinstance(kernel, triton.runtime.JITFunction):
                total += sum(len(cache[0]) for cache in kernel.device_caches.values())
    return total


def _hashable(value):
    return getattr(type(value), "__hash__", None) is not None and not isinstance(value, tuple)


def test_a_new_scale_compiles_nothing():
    shape = Sizes(64, 64, (64, 64), ((0, 8), (1, 16)), dropout=0.5)
    x, sites, branches = build(Draw(torch.bfloat16, device="cuda"), shape)

    def step(scale, seed):
        some = [Branch(b.site, b.a, b.b, scale, dropout=b.dropout) for b in branches]
        seed = torch.tensor(seed, device="cuda")
        outputs = group_linear(x, sites, some, seed=seed, implementation="triton")
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        return [y.detach().clone() for y in outputs]

    first = step(1.0, 1)
    before = _compiled_kernels()
    assert before > 0
    found = [step(scale, 1) for scale in (2.0, 0.0, -0.125, 16, 1 / 3)]
    step(2.0, 2**40)
    assert _compiled_kernels() == before
    assert not any(torch.equal(first[0], outputs[0]) for outputs in found)


@pytest.mark.parametrize("name", ["mixed_siblings", "two_sources", "ranks_17_to_32"])
def test_opcheck(name):
    x, sites, branches = _triton_group(name)
    sources = list(dict.fromkeys([x, *(b.source for b in branches if b.source is not None)]))
    position = {id(source): i for i, source in enumerate(sources)}
    arguments = (
        sources,
        [s.weight for s in sites],
        [s.bias for s in sites],
        [b.a for b in branches],
        [b.b for b in branches],
        None,
        [float(b.scale) for b in branches],
        [b.site for b in branches],
        [0 if b.source is None else position[id(b.source)] for b in branches],
        [0.0] * len(branches),
        "triton",
    )
    results = torch.library.opcheck(
        torch.ops.heterolora.group_linear.default, arguments, atol=1e-2, rtol=1e-2
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["mixed_siblings", "two_sources", "dropout"])
def test_compiles_without_a_graph_break(name):
    group = _triton_group(name)

    def step(group):
        return [y * 2 for y in group_linear(*group, implementation="triton")]

    expected = step(group)
    found = torch.compile(step, fullgraph=True)(group)
    grads = [torch.randn_like(y) for y in expected]
    truth = torch.autograd.grad(expected, leaves(group), grads, materialize_grads=True)
    values = torch.autograd.grad(found, leaves(group), grads, materialize_grads=True)
    for value, other in zip([*found, *values], [*expected, *truth], strict=True):
        torch.testing.assert_close(value, other, atol=2e-2, rtol=2e-2)


def test_a_fused_model_compiles_without_a_graph_break():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    import heterolora

    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
    )
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config),
        peft.LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.0),
    ).cuda()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(0, 97, (3, 9), device="cuda")
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
    report = heterolora.fuse(model, backend="triton", example={"input_ids": ids})
    assert report.fused and not report.declined
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        logits = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, plain, atol=1e-4, rtol=1e-4)


def test_int64_addresses_change_nothing(monkeypatch):
    import dataclasses

    from heterolora.kernels.gpu import passes
    from heterolora.kernels.gpu.launch import launch_for

    group = _triton_group("shortcuts")
    narrow, grads = outputs_and_gradients(group, "triton")
    monkeypatch.setattr(
        passes, "launch_for", lambda x: dataclasses.replace(launch_for(x), index64=True)
    )
    wide, _ = outputs_and_gradients(group, "triton", grads)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_capture_of_what_never_ran_is_right_or_a_clear_error():
    """No tuning, no read from the device: a first call inside a capture may only compile."""
    draw = Draw(torch.bfloat16, device="cuda")
    x, weight = draw.tensor(48, 80), draw.tensor(112, 80, grad=False)
    branch = draw.branch(0, 5, 80, 112)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.no_grad(), torch.cuda.graph(graph):
            captured = group_linear(x, [Site(weight)], [branch], implementation="triton")
    except RuntimeError as refusal:
        assert "captur" in str(refusal)
        return
    graph.replay()
    torch.cuda.synchronize()
    with torch.no_grad():
        expected = group_linear(x, [Site(weight)], [branch], implementation="triton")
    assert torch.equal(captured[0], expected[0])
