"""Warm-ups, the floor and scores by layer: against plain loops, and undone to the last bit."""

import copy
import itertools
import json

import pytest
import torch
from model_state import fingerprint, lived_in, random_states
from peft import LoraConfig, get_peft_model

from heterolora import Allocation, Budget, SearchSpace, Variant, allocate
from heterolora.errors import BudgetError, DataError, ScoreError, SearchSpaceError
from heterolora.search import PROXIES
from heterolora.search.preserve import preserved
from heterolora.search.scores.gradients import batch_loss
from heterolora.search.variant import Training, own_heads
from heterolora.shortcuts.model import KINDS

WARM = [
    Variant(head_steps=2),
    Variant(train_steps=2),
    Variant(head_steps=1, train_steps=1, floor=1, by_layer=True, shuffle=True),
]


@pytest.mark.parametrize("variant", WARM)
@pytest.mark.parametrize("proxy", sorted(PROXIES))
def test_the_model_and_the_generators_come_back_bit_identical(subject, proxy, variant):
    made = subject("bert", dropout=0.1)
    model = lived_in(made)
    before, states = fingerprint(model), random_states()
    space = SearchSpace(shortcuts=KINDS)
    options = {"proxy": proxy, "variant": variant, "space": space}
    found = allocate(model, made.batches(), budget=Budget(rank=2), **options)
    assert len(found.shortcuts) == 7 and found.parameters == found.budget_parameters
    assert random_states() == states
    after = fingerprint(model)
    for key, value in before.items():
        assert after[key] == value, key


def test_a_head_of_convolutions_and_batch_norm_comes_back_too(subject):
    made = subject("mobilevit")
    model = lived_in(made)
    before = fingerprint(model)
    allocate(model, made.batches(), budget=Budget(rank=2), variant=WARM[2])
    assert fingerprint(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_head_of_16_bits_learns_as_one_of_32_does(subject, dtype):
    made = subject("bert")
    losses = []
    for model in (copy.deepcopy(made.model).to(dtype), made.model):
        with preserved(model):
            heads = own_heads(model)
            training = Training(model, heads, made.batches(1), 1e-2)
            before = batch_loss(model, made.batch(0), 0).item()
            training.run(20, "training the head")
            losses.append((before, batch_loss(model, made.batch(0), 0).item()))
            assert {parameter.dtype for parameter in heads} == {next(model.parameters()).dtype}
    (start, low), (whole_start, whole) = losses
    assert whole < whole_start - 0.05
    # Eight bits of the losses are alike, over a gain of more than 0.05.
    assert start == pytest.approx(whole_start, abs=0.02) and low == pytest.approx(whole, abs=0.02)


class Interruption(Exception):
    pass


class Late(dict):
    """A batch that the model can read `reads` times."""

    def __init__(self, batch, error, reads):
        super().__init__(batch)
        self.error, self.reads = error, reads

    def items(self):
        self.reads -= 1
        if self.reads < 0:
            raise self.error
        return super().items()


@pytest.mark.parametrize("error", [Interruption, KeyboardInterrupt])
@pytest.mark.parametrize("reads", [0, 1, 3])
@pytest.mark.parametrize("steps", [{"head_steps": 5}, {"train_steps": 5}])
def test_an_interrupted_warm_up_leaves_the_model_alone(subject, steps, reads, error):
    made = subject("bert")
    model = lived_in(made)
    before, states = fingerprint(model), random_states()
    with pytest.raises(error):
        allocate(
            model,
            [Late(made.batch(0), error, reads)],
            budget=Budget(rank=2),
            variant=Variant(**steps),
        )
    assert random_states() == states
    assert fingerprint(model) == before


def test_a_head_that_is_trained_is_a_copy(subject):
    model = subject("bert").model
    before = fingerprint(model)
    with preserved(model):
        copies = own_heads(model)
        assert [p.shape for p in copies] == [p.shape for p in model.classifier.parameters()]
        assert all(p is q for p, q in zip(copies, model.classifier.parameters(), strict=True))
        with torch.no_grad():
            copies[0].fill_(3.0)
    assert fingerprint(model) == before


def plain_grad_norm(model, batches):
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    return {
        name: sum(float(m[key]["default"].weight.grad.double().norm()) for key in (0, 1))
        for name, m in (
            (name, {0: layer.lora_A, 1: layer.lora_B})
            for name, layer in model.get_base_model().named_modules()
            if hasattr(layer, "lora_A")
        )
    }


def plain_steps(model, parameters, batches, count, optimizer=None):
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    for batch in itertools.islice(itertools.cycle(batches), count):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def assert_close(scores, expected, rel):
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=rel), name


def probe_of(model, found, seed):
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=list(found.ranks)))


def test_head_steps_against_a_plain_loop(subject):
    made = subject("bert")
    variant = Variant(head_steps=7, lr=0.01)
    batches = made.batches(3)
    found = allocate(made.model, batches, budget=Budget(rank=2), seed=4, variant=variant)
    twin = copy.deepcopy(made.model).train()
    head = list(twin.classifier.parameters())
    plain_steps(twin, head, batches, 7)
    expected = plain_grad_norm(probe_of(twin, found, 4).train(), batches)
    assert_close(found.scores, expected, rel=1e-3)
    cold = allocate(made.model, batches, budget=Budget(rank=2), seed=4)
    moved = [abs(cold.scores[n] / s - 1) for n, s in found.scores.items()]
    assert min(moved) > 0.01


@pytest.mark.parametrize(("steps", "ends"), [(8, (2, 4, 6, 8)), (5, (1, 2, 3, 5)), (2, (1, 2))])
def test_train_steps_against_a_plain_loop(subject, steps, ends):
    """Adapter and head trained together, and the mean of the scores of the parts."""
    made = subject("bert")
    batches = made.batches(3)
    variant = Variant(train_steps=steps, lr=0.01)
    found = allocate(made.model, batches, budget=Budget(rank=2), seed=4, variant=variant)
    model = probe_of(copy.deepcopy(made.model), found, 4).train()
    parameters = [
        p
        for name, p in model.named_parameters()
        if "lora_" in name or name.startswith("base_model.model.classifier.")
    ]
    assert len(parameters) == 2 * len(found.scores) + 2
    measured = []
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    stream = itertools.cycle(batches)
    for start, end in itertools.pairwise((0, *ends)):
        plain_steps(
            model, parameters, list(itertools.islice(stream, end - start)), end - start, optimizer
        )
        measured.append(plain_grad_norm(model, batches))
    expected = {n: sum(m[n] for m in measured) / len(measured) for n in measured[0]}
    assert_close(found.scores, expected, rel=1e-3)


def test_a_trained_probe_is_scored_by_its_own_b(subject):
    """Snip would see a drawn B of its own otherwise; and a spectrum is averaged as a whole."""
    made = subject("opt")
    for proxy in ("snip", "spectral"):
        found = [
            allocate(
                made.model,
                made.batches(),
                budget=Budget(rank=2),
                proxy=proxy,
                variant=Variant(train_steps=4, lr=lr),
            )
            for lr in (1e-2, 1e-7)
        ]
        assert found[0].scores != found[1].scores
        if proxy == "snip":
            # Linear in B: of 1e-7 a step here, of 1e-3 where it is drawn.
            drawn = allocate(made.model, made.batches(), budget=Budget(rank=2), proxy=proxy)
            assert max(found[1].scores.values()) < 0.01 * max(drawn.scores.values())
    small = found[1]
    fresh = allocate(made.model, made.batches(), budget=Budget(rank=2), proxy="spectral")
    assert_close(small.scores, fresh.scores, rel=1e-3)
    assert small.ranks == fresh.ranks


def test_a_file_says_which_variant_it_was(subject, tmp_path):
    made = subject("bert")
    found = allocate(made.model, made.batches(1), budget=Budget(rank=2), variant=WARM[2])
    found.save(tmp_path / "a.json")
    loaded = Allocation.load(tmp_path / "a.json")
    assert loaded == found and loaded.variant == WARM[2]
    document = json.loads((tmp_path / "a.json").read_text())
    for key in ("variant", "mapping", "shortcut_candidates", "shortcut_scaling"):
        del document[key]
    (tmp_path / "one.json").write_text(json.dumps({**document, "schema_version": 1}))
    assert Allocation.load(tmp_path / "one.json").variant == Variant()


def test_seconds_include_the_warm_up(subject):
    made = subject("bert")
    plain = allocate(made.model, made.batches(1), budget=Budget(rank=2))
    warm = allocate(
        made.model, made.batches(1), budget=Budget(rank=2), variant=Variant(head_steps=150)
    )
    assert warm.seconds > 2 * plain.seconds


def test_batches_may_be_a_generator(subject):
    made = subject("bert")
    seen = []

    def stream():
        for index in range(3):
            seen.append(index)
            yield made.batch(index)

    variant = Variant(head_steps=5, train_steps=5)
    once = allocate(made.model, stream(), budget=Budget(rank=2), variant=variant)
    listed = allocate(made.model, made.batches(3), budget=Budget(rank=2), variant=variant)
    assert seen == [0, 1, 2] and once.scores == listed.scores


def test_the_floor(subject):
    made = subject("opt")
    space = SearchSpace(target_modules=["q_proj", "k_proj", "v_proj", "fc1"], ranks=(0, 1, 2, 4, 8))
    for floor, least in ((0, 0), (1, 1), (2, 2), (3, 4)):
        found = allocate(
            made.model,
            made.batches(),
            budget=Budget(rank=4),
            proxy="spectral",
            space=space,
            variant=Variant(floor=floor),
        )
        assert min(found.ranks.values()) == least
        assert found.parameters == found.budget_parameters
    assert set(found.ranks.values()) == {4}  # all the budget went into the floor


def test_by_layer_spends_on_both_layers(subject):
    """A layer of larger gradients no longer takes everything."""
    made = subject("opt")
    with torch.no_grad():
        for parameter in made.model.model.decoder.layers[0].parameters():
            if parameter.ndim == 2:
                parameter.mul_(30.0)
    space = SearchSpace(target_modules=["q_proj", "k_proj", "v_proj", "fc1"], ranks=(0, 8))

    def lower(variant):
        found = allocate(
            made.model, made.batches(), budget=Budget(rank=4), space=space, variant=variant
        )
        return sum(rank for name, rank in found.ranks.items() if "layers.0" in name), found.scores

    (raw, scores), (equal, same) = lower(None), lower(Variant(by_layer=True))
    assert scores == same
    assert raw == 4 * 8 and 0 < equal < 4 * 8


@pytest.mark.parametrize("proxy", ["grad-norm", "spectral"])
def test_shuffled_scores_are_the_same_numbers_elsewhere(subject, proxy):
    made = subject("opt")
    found = [
        allocate(made.model, made.batches(), budget=Budget(rank=2), proxy=proxy, variant=v, seed=2)
        for v in (None, Variant(shuffle=True))
    ]
    plain, control = (allocation.scores for allocation in found)
    assert plain != control and sorted(plain.values()) == sorted(control.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_steps": -1}, "head_steps=-1: expected a whole number"),
        ({"train_steps": 1.5}, "train_steps=1.5"),
        ({"floor": True}, "floor=True"),
        ({"lr": 0}, "lr=0: expected a positive number"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": "1"}, "lr='1'"),
        ({"by_layer": 1}, "by_layer=1: expected True or False"),
    ],
)
def test_malformed_fields(fields, message):
    with pytest.raises(SearchSpaceError, match=message):
        Variant(**fields)


@pytest.mark.parametrize(
    ("name", "variant", "error", "message"),
    [
        ("opt", Variant(head_steps=3), SearchSpaceError, "OPTForCausalLM has no task head"),
        ("bert", Variant(floor=64), SearchSpaceError, "floor=64 is above the largest rank .*32"),
        ("bert", Variant(floor=3), BudgetError, "does not pay for the smallest rank"),
    ],
)
def test_refusals_leave_the_model_alone(subject, name, variant, error, message):
    made = subject(name)
    before = fingerprint(made.model)
    with pytest.raises(error, match=message):
        allocate(made.model, made.batches(), budget=Budget(rank=2), variant=variant)
    assert fingerprint(made.model) == before


@pytest.mark.parametrize("steps", [{"head_steps": 5}, {"train_steps": 5}])
def test_a_nan_loss_in_the_warm_up_names_its_batch(subject, steps):
    made = subject("mobilevit")
    before = fingerprint(made.model)
    batches = made.batches()
    batches[2]["pixel_values"][:] = float("inf")
    with pytest.raises(ScoreError, match="loss of batch 2 is nan"):
        allocate(made.model, batches, budget=Budget(rank=2), variant=Variant(**steps, lr=1e-9))
    assert fingerprint(made.model) == before


def test_no_batches_to_warm_up_with(subject):
    with pytest.raises(DataError, match="empty"):
        allocate(subject("bert").model, [], budget=Budget(rank=2), variant=Variant(head_steps=1))
