"""Unsloth and Liger by stand-ins: what they are called with, and that nothing else changes.

The stand-ins have the signatures of the real functions and compute the same by plain PyTorch; like
the real ones they take [batch, tokens, features] only. The real packages need a GPU.
"""

import importlib.machinery
import sys
from types import MethodType, ModuleType, SimpleNamespace

import pytest
import torch
from transformers.models.llama import modeling_llama

from heterolora.bench.cases import external, groups, peers, workloads
from heterolora.bench.harness import steps
from heterolora.bench.harness.timing import BenchError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = {"layers": 2, "hidden": 32, "ffn": 64, "batch": 2, "length": 4}
QKV = {"q_proj": 24, "k_proj": 8, "v_proj": 16}


def llama(dtype: torch.dtype = torch.bfloat16) -> steps.Workload:
    return workloads.llama(**SMALL, heads=4, kv_heads=2, dtype=dtype, device=CPU)


def everywhere(load: steps.Workload) -> dict[str, int]:
    return dict.fromkeys(load.targets, 1)


def group(
    sites: dict[str, int] = QKV, repeats: int = 2, dtype: torch.dtype = torch.bfloat16
) -> steps.Workload:
    return groups.group(m=6, k=16, sites=sites, repeats=repeats, dtype=dtype, device=CPU)


def installed(monkeypatch, name: str, **attributes: object) -> None:
    """Modules `name` and its parents, importable as if they were installed."""
    for end in range(1, name.count(".") + 2):
        part = ".".join(name.split(".")[:end])
        module = ModuleType(part)
        module.__spec__ = importlib.machinery.ModuleSpec(part, None)
        monkeypatch.setitem(sys.modules, part, module)
    vars(sys.modules[name]).update(attributes)


def peft_output(layer, x: torch.Tensor) -> torch.Tensor:
    assert x.dim() == 3 and layer.base_layer.bias is None and layer.base_layer.weight is not None
    assert layer.base_layer.weight.dtype == x.dtype == torch.bfloat16
    return type(layer).forward(layer, x)


class Unsloth:
    """`unsloth.kernels`, with a record of its calls."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[tuple] = []
        names = ("apply_lora_qkv", "apply_lora_o", "apply_lora_mlp_swiglu")
        # Unsloth's are plain functions whose first argument is the layer's parent.
        functions = {name: (lambda f: lambda *a, **k: f(*a, **k))(getattr(self, name))
                     for name in names}  # fmt: skip
        installed(monkeypatch, "unsloth.kernels.fast_lora", FUSED_LORA_DROPOUT=True)
        vars(sys.modules["unsloth.kernels"]).update(functions)

    def apply_lora_qkv(self, parent, X, inplace=True):
        self.calls.append(("qkv", parent, inplace))
        return tuple(
            peft_output(layer, X) for layer in (parent.q_proj, parent.k_proj, parent.v_proj)
        )

    def apply_lora_o(self, parent, X):
        self.calls.append(("o", parent.o_proj))
        return peft_output(parent.o_proj, X)

    def apply_lora_mlp_swiglu(self, parent, X, inplace=True):
        self.calls.append(("mlp", parent, inplace))
        gate, up = peft_output(parent.gate_proj, X), peft_output(parent.up_proj, X)
        return peft_output(parent.down_proj, parent.act_fn(gate) * up)

    @property
    def kinds(self) -> list[str]:
        return [call[0] for call in self.calls]


@pytest.fixture
def unsloth(monkeypatch) -> Unsloth:
    return Unsloth(monkeypatch)


def gradients(step: steps.Step) -> list[torch.Tensor]:
    step.clear_gradients()
    torch.autograd.backward(step.forward(), step.output_grads)
    leaves = (*steps.adapter_parameters(step.module).values(), *step.inputs.values())
    return [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]


def assert_same(variant: str, load: steps.Workload, ranks: dict[str, int]) -> None:
    mine, theirs = (peers.build_step(v, steps.twin(load), ranks) for v in ("peft", variant))
    for a, b in zip(mine.forward(), theirs.forward(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(mine), gradients(theirs), strict=True):
        # Only the order in which dX of q, k and v add up may differ.
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * b.abs().max().item())


@pytest.mark.parametrize("name", external.PEERS)
def test_only_what_is_a_variant_is_a_peer(name):
    assert name in peers.VARIANTS


@pytest.mark.parametrize(
    ("variant", "package", "title"),
    [("unsloth", "unsloth", "Unsloth"), ("liger-peft", "liger_kernel", "Liger")],
)
def test_one_reason_at_a_time(monkeypatch, variant, package, title):
    load = llama()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (
        external.unavailable(variant, load, everywhere(load), GPU) == f"{package} is not installed"
    )
    assert external.unavailable(variant, load, everywhere(load), CPU) == f"{title} needs a GPU"
    bert = workloads.bert(**SMALL, heads=2, dtype=torch.float32, device=CPU)
    reason = external.unavailable(variant, bert, everywhere(bert), GPU)
    assert reason.startswith(f"{title} has nothing for this: only ")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert external.unavailable(variant, load, everywhere(load), GPU) is None


def test_looking_imports_nothing(monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"imported {name}"))
    for variant in external.PEERS:
        external.unavailable(variant, llama(), everywhere(llama()), GPU)


@pytest.mark.parametrize(
    ("sites", "covered"),
    [
        (QKV, True),
        ({"proj": 8}, True),
        ({"gate_proj": 40, "up_proj": 40}, False),
        ({"q_proj": 8, "k_proj": 8}, False),
    ],
)
def test_unsloth_has_functions_for_these_groups(monkeypatch, sites, covered):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    load = group(sites)
    assert (external.unavailable("unsloth", load, everywhere(load), GPU) is None) == covered
    assert external.unavailable("liger-peft", load, everywhere(load), GPU).startswith(
        "Liger has nothing for this"
    )


@pytest.mark.parametrize(
    ("dtype", "without", "covered"),
    [
        (torch.bfloat16, (), True),
        (torch.float16, (), True),
        (torch.float32, (), False),
        (torch.bfloat16, ("v_proj",), False),
    ],
)
def test_unsloth_wants_16_bits_and_every_rank(monkeypatch, dtype, without, covered):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    load = group(repeats=1, dtype=dtype)
    ranks = {name: 0 if name.endswith(without) else 8 for name in load.targets}
    reason = external.unavailable("unsloth", load, ranks, GPU)
    assert reason is None if covered else "has nothing for this" in reason
    assert (external.unavailable("unsloth", load, everywhere(load), GPU) is None) == (
        dtype != torch.float32
    )


def test_unsloth_on_a_group(unsloth):
    load = group()
    assert_same("unsloth", load, steps.mixed_ranks(load.targets, 4))
    step = peers.build_step("unsloth", steps.twin(load), steps.uniform_ranks(load.targets))
    unsloth.calls.clear()
    step()
    # One call a copy; x is an input of the step, which dX must not overwrite.
    assert unsloth.kinds == ["qkv", "qkv"]
    assert not any(inplace for _, _, inplace in unsloth.calls)


def test_unsloth_on_a_linear_alone(unsloth):
    load = group({"proj": 8})
    assert_same("unsloth", load, steps.uniform_ranks(load.targets))
    assert set(unsloth.kinds) == {"o"} and len(unsloth.calls) == 4


def test_unsloth_on_a_llama(unsloth):
    load = llama()
    ranks = steps.uniform_ranks(load.targets)
    assert_same("unsloth", load, ranks)
    step = peers.build_step("unsloth", steps.twin(load), ranks)
    unsloth.calls.clear()
    step()
    assert unsloth.kinds == ["qkv", "o", "mlp"] * 2
    layers = step.module.get_base_model().model.layers
    assert [call[1] for call in unsloth.calls[:3]] == [
        layers[0].self_attn,
        layers[0].self_attn.o_proj,
        layers[0].mlp,
    ]
    # Inside the model dX overwrites what it may, as in Unsloth itself.
    assert [call[2] for call in unsloth.calls if call[0] != "o"][1:] == [True] * 3


def test_unsloth_leaves_what_it_has_no_function_for_to_peft(unsloth):
    load = llama()
    ranks = steps.uniform_ranks(load.targets)
    ranks["model.layers.0.self_attn.v_proj"] = 0
    ranks["model.layers.1.mlp.gate_proj"] = 0
    ranks["model.layers.1.self_attn.o_proj"] = 0
    assert_same("unsloth", load, ranks)
    assert unsloth.kinds[:3] == ["o", "mlp", "qkv"]


def test_unsloth_changes_one_instance_only(unsloth):
    load = llama()
    ranks = steps.uniform_ranks(load.targets)
    other = peers.build_step("peft", steps.twin(load), ranks)
    peers.build_step("unsloth", steps.twin(load), ranks)
    other()
    steps.with_adapters(steps.twin(load), ranks)(**load.inputs)
    load.run(load.model, load.inputs)
    assert unsloth.calls == []


def test_unsloth_refuses_siblings_with_different_inputs(unsloth):
    load = group(repeats=1)
    model = steps.with_adapters(load, steps.uniform_ranks(load.targets))
    external.PEERS["unsloth"].apply(model)
    (one,) = model.get_base_model().copies
    one.q_proj(load.inputs["x0"])
    with pytest.raises(BenchError, match="in this order with one input"):
        one.k_proj(load.inputs["x0"].clone())
    # And nothing of the step is kept alive once all three are taken.
    one(load.inputs["x0"])
    with pytest.raises(BenchError, match="in this order with one input"):
        one.v_proj(load.inputs["x0"])


def test_a_model_without_anything_for_unsloth_is_an_error(unsloth):
    load = group({"gate_proj": 8, "up_proj": 8})
    with pytest.raises(BenchError, match="no adapted layer"):
        peers.build_step("unsloth", load, steps.uniform_ranks(load.targets))


def test_dropout_is_run_where_the_version_has_it_and_refused_elsewhere(unsloth):
    load = group()
    ranks = steps.uniform_ranks(load.targets)
    step = peers.build_step("unsloth", steps.twin(load), ranks, dropout=0.5)
    one, other = step.forward(), step.forward()
    assert unsloth.kinds == ["qkv"] * 4 and not torch.equal(one[0], other[0])
    kernels = sys.modules["unsloth.kernels.fast_lora"]
    kernels.FUSED_LORA_DROPOUT = False
    with pytest.raises(BenchError, match="UNSLOTH_FUSED_LORA_DROPOUT=0"):
        peers.build_step("unsloth", steps.twin(load), ranks, dropout=0.5)
    del kernels.FUSED_LORA_DROPOUT
    with pytest.raises(BenchError, match="cannot load FUSED_LORA_DROPOUT"):
        peers.build_step("unsloth", steps.twin(load), ranks, dropout=0.5)
    peers.build_step("unsloth", steps.twin(load), ranks)


@pytest.mark.parametrize("sites", [QKV, {"proj": 8}])
def test_a_function_that_falls_back_to_peft_is_an_error(monkeypatch, sites):
    def back(parent, X, inplace=True):
        return parent.q_proj(X), parent.k_proj(X), parent.v_proj(X)

    installed(
        monkeypatch,
        "unsloth.kernels",
        apply_lora_qkv=back,
        apply_lora_o=lambda parent, X: parent.o_proj(X),
        apply_lora_mlp_swiglu=None,
    )
    load = group(sites)
    step = peers.build_step("unsloth", load, steps.uniform_ranks(load.targets))
    with pytest.raises(BenchError, match="leaves these layers to PEFT"):
        step()


@pytest.mark.parametrize("variant", external.PEERS)
def test_another_version_is_one_clear_error(monkeypatch, variant):
    installed(monkeypatch, "unsloth.kernels")
    installed(monkeypatch, "liger_kernel.transformers")
    load = llama()
    with pytest.raises(BenchError, match="cannot load apply_l.*needs a version that has them"):
        peers.build_step(variant, load, steps.uniform_ranks(load.targets))


class Liger:
    """`liger_kernel.transformers`: it exchanges names of transformers and binds to the model."""

    def __init__(self, monkeypatch) -> None:
        self.counts = SimpleNamespace(rope=0, forward=0)
        self.rope = modeling_llama.apply_rotary_pos_emb
        self.model = None
        installed(
            monkeypatch,
            "liger_kernel.transformers",
            apply_liger_kernel_to_llama=lambda **options: self.patch(**options),
        )

    def patch(
        self,
        rope=True,
        cross_entropy=False,
        fused_linear_cross_entropy=True,
        rms_norm=True,
        swiglu=True,
        model=None,
    ):
        assert rope and fused_linear_cross_entropy and rms_norm and swiglu and not cross_entropy
        self.model = model

        def rotary(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
            self.counts.rope += 1
            return self.rope(q, k, cos, sin, unsqueeze_dim)

        def forward(model, *args, **kwargs):
            self.counts.forward += 1
            return type(model).forward(model, *args, **kwargs)

        modeling_llama.apply_rotary_pos_emb = rotary
        modeling_llama.LlamaRMSNorm = modeling_llama.LlamaMLP = type("Theirs", (), {})
        model.forward = MethodType(forward, model)


def test_liger_runs_in_its_own_model_only(monkeypatch):
    before = dict(vars(modeling_llama))
    liger, load = Liger(monkeypatch), llama()
    ranks = steps.mixed_ranks(load.targets)
    theirs = peers.build_step("liger-peft", steps.twin(load), ranks)
    assert liger.model is theirs.module.get_base_model()
    peft = peers.build_step("peft", steps.twin(load), ranks)
    peft()
    llama()
    assert (liger.counts.rope, liger.counts.forward) == (0, 0)
    theirs()
    # Every layer's rotary embedding is theirs, once a forward.
    assert (liger.counts.rope, liger.counts.forward) == (2, 1)
    assert vars(modeling_llama) == before
    assert_same("liger-peft", load, ranks)


def test_liger_leaves_no_trace_when_a_step_fails(monkeypatch):
    before = dict(vars(modeling_llama))
    Liger(monkeypatch)
    load = llama()
    step = peers.build_step("liger-peft", load, steps.uniform_ranks(load.targets))
    step.inputs = {"nonsense": torch.zeros(1)}
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        step()
    assert vars(modeling_llama) == before
