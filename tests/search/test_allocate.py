"""`allocate` end to end on tiny models, and the model it gives back."""

import pytest
import torch
from model_state import fingerprint, lived_in, random_states, tensor_bytes
from peft import LoraConfig, get_peft_model
from rich.console import Console

from heterolora.errors import BudgetError, DataError, ModelError, ScoreError, SearchSpaceError
from heterolora.search import PROXIES, Budget, SearchSpace, allocate, uniform
from heterolora.search.preserve import preserved
from heterolora.shortcuts.model import KINDS

MODELS = ["bert", "opt", "gpt2", "mobilevit"]


def space_of(name):
    """All there is to search: shortcuts too, where there are layers to put them on."""
    return SearchSpace() if name == "mobilevit" else SearchSpace(shortcuts=KINDS)


@pytest.mark.parametrize("proxy", sorted(PROXIES))
@pytest.mark.parametrize("name", MODELS)
def test_the_model_and_the_generators_come_back_bit_identical(subject, name, proxy):
    made = subject(name)
    model = lived_in(made)
    before, states = fingerprint(model), random_states()
    space = space_of(name)
    allocate(model, made.batches(), budget=Budget(rank=2), proxy=proxy, space=space, seed=3)
    assert random_states() == states
    after = fingerprint(model)
    for key, value in before.items():
        assert after[key] == value, key
    assert not hasattr(model, "peft_config")


def test_batch_norm_statistics_do_move_while_scoring(subject):
    """Without this the test above would not show that they are put back."""
    made = subject("mobilevit")
    before = {name: tensor_bytes(b) for name, b in made.model.named_buffers()}
    made.model.train()(**made.batch(0))
    assert any(tensor_bytes(b) != before[name] for name, b in made.model.named_buffers())


def test_gradient_checkpointing_hooks_and_flags_come_back(subject):
    made = subject("opt")
    made.model.gradient_checkpointing_enable()
    before = fingerprint(made.model)
    allocate(made.model, made.batches(), budget=Budget(rank=2), space=space_of("opt"))
    assert fingerprint(made.model) == before


class Interruption(Exception):
    pass


@pytest.mark.parametrize("error", [Interruption, KeyboardInterrupt])
@pytest.mark.parametrize("name", MODELS)
def test_an_interrupted_search_leaves_the_model_alone(subject, name, error):
    made = subject(name)
    model = lived_in(made)
    before, states = fingerprint(model), random_states()

    def interrupted():
        yield made.batch(0)
        raise error

    with pytest.raises(error):
        allocate(model, interrupted(), budget=Budget(rank=2), space=space_of(name))
    assert random_states() == states
    assert fingerprint(model) == before


def test_a_nan_loss_leaves_the_model_alone(subject):
    made = subject("mobilevit")
    before = fingerprint(made.model)
    batches = made.batches()
    batches[2]["pixel_values"][:] = float("inf")
    with pytest.raises(ScoreError, match="loss of batch 2 is nan"):
        allocate(made.model, batches, budget=Budget(rank=2))
    assert fingerprint(made.model) == before


def test_preserved_puts_back_what_code_inside_changes(subject):
    model = lived_in(subject("mobilevit"))
    before = fingerprint(model)
    with pytest.raises(Interruption), preserved(model):
        model.train().requires_grad_(False)
        model.classifier = torch.nn.Identity()
        model.added = torch.nn.Linear(2, 2)
        model.forward = None
        model.config.problem_type = "regression"
        model.register_forward_hook(print)
        model.__class__ = torch.nn.Module
        next(model.buffers()).fill_(9)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        raise Interruption
    assert fingerprint(model) == before


def test_a_forward_that_writes_to_a_parameter_is_reported(subject):
    made = subject("opt")
    made.model.model.decoder.embed_tokens.max_norm = 0.01
    with pytest.raises(ModelError, match="embed_tokens.weight"):
        allocate(made.model, made.batches(), budget=Budget(rank=2))


def test_a_model_made_in_inference_mode_is_refused(subject):
    with torch.inference_mode():
        made = subject("bert")
    with pytest.raises(ModelError, match="inference_mode"):
        allocate(made.model, made.batches(), budget=Budget(rank=2))


def test_inference_mode_is_refused(subject):
    made = subject("bert")
    with torch.inference_mode(), pytest.raises(ModelError, match="inference_mode is on"):
        allocate(made.model, made.batches(), budget=Budget(rank=2))


@pytest.mark.parametrize("name", ["bert", "opt", "gpt2"])
def test_scores_are_those_of_a_seeded_rank_8_adapter(subject, name):
    made = subject(name, **({} if name == "gpt2" else {"dropout": 0.0}))
    if name == "gpt2":
        for module in made.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    found = allocate(made.model, made.batches(), budget=Budget(rank=2), seed=11)
    assert found.probe_rank == 8

    torch.manual_seed(11)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=list(found.ranks), fan_in_fan_out=name == "gpt2"
    )
    model = get_peft_model(made.model, config).train()
    total = sum(model(**batch).loss for batch in made.batches())
    for module, score in found.scores.items():
        layer = model.get_base_model().get_submodule(module)
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        gradients = torch.autograd.grad(total, weights, retain_graph=True)
        expected = sum(float(g.double().square().sum().sqrt()) for g in gradients)
        assert score == pytest.approx(expected, rel=1e-4), module


@pytest.mark.parametrize(
    ("name", "proxy"),
    [("opt", proxy) for proxy in sorted(PROXIES)]
    + [("bert", "snip"), ("gpt2", "synflow"), ("t5", "synflow"), ("mobilevit", "grad-norm")],
)
def test_the_budget_is_spent_exactly(subject, name, proxy):
    made = subject(name)
    found = allocate(made.model, made.batches(2), budget=Budget(rank=2), proxy=proxy)
    assert found.budget_parameters == uniform(made.model, 2).parameters
    assert found.parameters == found.budget_parameters
    assert set(found.ranks) == set(found.scores) == set(found.sites)
    assert set(found.ranks.values()) <= {0, 1, 2, 4, 8, 16, 32}
    assert found.shortcuts == {}
    assert found.seconds > 0 and found.step_seconds > 0
    assert found.ratio == found.seconds / found.step_seconds


def test_the_seed_decides_everything_that_is_random(subject):
    made = subject("opt", dropout=0.3)
    first, again, other = (
        allocate(made.model, made.batches(), budget=Budget(rank=2), proxy="snip", seed=seed)
        for seed in (1, 1, 2)
    )
    assert first.scores == again.scores and first.ranks == again.ranks
    assert first.scores != other.scores


def test_a_shuffling_loader_is_seeded_too(subject):
    made = subject("bert")
    loader = torch.utils.data.DataLoader(made.batches(6), batch_size=None, shuffle=True)
    scores = []
    for _ in range(2):
        torch.rand(5)
        scores.append(allocate(made.model, loader, budget=Budget(rank=2), proxy="synflow").scores)
    assert scores[0] == scores[1]


def test_constant_is_a_random_control(subject):
    made = subject("opt")
    space = SearchSpace(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], ranks=(0, 8))
    picks = set()
    for seed in range(6):
        found = allocate(
            made.model,
            made.batches(1),
            budget=Budget(rank=2),
            proxy="constant",
            space=space,
            seed=seed,
        )
        assert sorted(found.ranks.values()) == [0] * 6 + [8] * 2
        picks.add(tuple(name for name, rank in found.ranks.items() if rank))
    assert len(picks) > 2


def test_batches_are_consumed_once_and_all(subject):
    made = subject("bert")
    seen = []

    def stream():
        for index in range(4):
            seen.append(index)
            yield made.batch(index)

    found = allocate(made.model, stream(), budget=Budget(rank=2))
    assert seen == [0, 1, 2, 3]
    listed = allocate(made.model, made.batches(4), budget=Budget(rank=2))
    assert found.scores == listed.scores


def test_a_loader_of_a_stream_has_no_length(subject):
    made = subject("bert")

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(made.batches())

    sources = (Stream(), made.batches())
    streamed, listed = (
        allocate(
            made.model,
            torch.utils.data.DataLoader(source, batch_size=None),
            budget=Budget(rank=2),
        )
        for source in sources
    )
    assert streamed.scores == listed.scores


def test_scoring_ignores_a_surrounding_no_grad(subject):
    made = subject("bert")
    with torch.no_grad():
        found = allocate(made.model, made.batches(), budget=Budget(rank=2))
    assert found.scores == allocate(made.model, made.batches(), budget=Budget(rank=2)).scores


def test_a_module_outside_the_loss_scores_zero_and_is_named(subject, caplog):
    made = subject("bert")
    allocate(made.model, made.batches(), budget=Budget(rank=2))
    assert not caplog.records
    made.model.unused = torch.nn.Linear(32, 32)
    found = allocate(made.model, made.batches(), budget=Budget(rank=2))
    assert "1 of 14 candidates score 0 (unused)" in caplog.text
    assert found.scores["unused"] == 0 and found.ranks["unused"] == 0
    space = SearchSpace(target_modules=["unused"])
    with pytest.raises(ModelError, match="depends on no adapted module"):
        allocate(made.model, made.batches(), budget=Budget(rank=2), space=space)


def test_nothing_is_printed_off_a_terminal(subject, capfd):
    made = subject("bert")
    capfd.readouterr()
    assert not Console(stderr=True).is_terminal
    allocate(made.model, made.batches(), budget=Budget(rank=2))
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"proxy": "fisher"}, SearchSpaceError, "constant, grad-norm, snip, .*spectral"),
        ({"budget": 8}, BudgetError, "must be a Budget"),
        ({"budget": Budget(rank=64)}, BudgetError, "above the largest rank"),
        ({"budget": Budget(params=7)}, BudgetError, "below one adapter"),
        ({"scaling": 0}, SearchSpaceError, "scaling=0"),
        ({"scaling": float("nan")}, SearchSpaceError, "scaling=nan"),
        ({"seed": -1}, SearchSpaceError, "seed=-1"),
        ({"seed": 1.5}, SearchSpaceError, "seed=1.5"),
        ({"batches": []}, DataError, "empty"),
        ({"batches": 3}, DataError, "iterable of dicts, not int"),
        ({"batches": [{"input_ids": torch.ones(1, 3).long()}]}, DataError, "no labels"),
        ({"batches": {"input_ids": [1]}}, DataError, "batch 0 is a str"),
        ({"space": SearchSpace(target_modules=["qq"])}, SearchSpaceError, "matches no linear"),
    ],
)
def test_refusals_come_with_the_model_untouched(subject, changes, error, message):
    made = subject("bert")
    before = fingerprint(made.model)
    arguments = {"batches": made.batches(), "budget": Budget(rank=2), **changes}
    with pytest.raises(error, match=message):
        allocate(made.model, **arguments)
    assert fingerprint(made.model) == before


def test_no_batches_for_the_constant_proxy_are_refused_too(subject):
    with pytest.raises(DataError, match="empty"):
        allocate(subject("bert").model, [], budget=Budget(rank=2), proxy="constant")


def test_uniform(subject):
    model = subject("bert").model
    found = uniform(model, 3, SearchSpace(target_modules=["query", "value"]))
    assert set(found.ranks.values()) == {3} and len(found.ranks) == 4
    assert found.parameters == found.budget_parameters == 4 * 3 * 64
    assert found.proxy == "uniform" and found.ratio is None
    with pytest.raises(BudgetError, match="rank=0"):
        uniform(model, 0)
