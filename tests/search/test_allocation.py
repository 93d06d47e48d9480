"""From an allocation to PEFT, to disk, and back."""

import copy
import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from heterolora.errors import AllocationFileError, ModelError
from heterolora.search import Allocation, Budget, SearchSpace, adapt, allocate, uniform
from heterolora.search.sites import Site

OLD = Path(__file__).parent / "old"
MODELS = ["bert", "opt", "gpt2", "t5", "mobilevit"]


def lora_layers(peft_model):
    modules = peft_model.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLayer)}


def check_adapted(peft_model, allocation):
    """Ranks, parameter count and scales of all layers are those of the allocation, no other."""
    layers = lora_layers(peft_model)
    assert {name: layer.r["default"] for name, layer in layers.items()} == {
        name: rank for name, rank in allocation.ranks.items() if rank
    }
    lora = [p for name, p in peft_model.named_parameters() if ".lora_" in name]
    assert sum(p.numel() for p in lora) == allocation.parameters
    config = peft_model.peft_config["default"]
    for layer in layers.values():
        # vLLM: rank from the tensor's shape, one scale from the global alpha and r.
        assert layer.lora_A["default"].weight.shape[0] == layer.r["default"]
        assert layer.scaling["default"] == pytest.approx(config.lora_alpha / config.r, rel=1e-12)
        assert layer.scaling["default"] == pytest.approx(allocation.scaling, rel=1e-12)


@pytest.mark.parametrize("scaling", [2.0, 0.7])
@pytest.mark.parametrize("name", MODELS)
def test_peft_builds_exactly_the_allocation(subject, name, scaling):
    made = subject(name)
    found = allocate(made.model, made.batches(), budget=Budget(rank=2), scaling=scaling)
    assert len(set(found.ranks.values())) > 2
    config = found.lora_config
    assert config.r == max(found.ranks.values())
    assert set(config.rank_pattern) == set(config.alpha_pattern)
    assert all(key.startswith("^") for key in config.rank_pattern)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out.*")
        peft_model = get_peft_model(made.model, config)
    check_adapted(peft_model, found)


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_trained_where_there_is_one(subject, name):
    made = subject(name)
    found = uniform(made.model, 2)
    trained = {
        parameter.rsplit(".", 1)[0]
        for parameter, p in get_peft_model(made.model, found.lora_config).named_parameters()
        if p.requires_grad and ".lora_" not in parameter
    }
    expected = {"base_model.model.classifier.modules_to_save.default"}
    assert trained == (expected if name in ("bert", "mobilevit") else set())


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_adapter_round_trips_through_peft_on_disk(subject, name, tmp_path):
    made = subject(name)
    found = allocate(made.model, made.batches(), budget=Budget(rank=2))
    fresh = copy.deepcopy(made.model)
    peft_model = get_peft_model(made.model, found.lora_config).eval()
    with torch.no_grad():
        for parameter_name, parameter in peft_model.named_parameters():
            if ".lora_" in parameter_name:
                parameter.normal_()
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    check_adapted(loaded, found)
    inputs = made.batch(0)
    with torch.no_grad():
        assert torch.equal(peft_model(**inputs).logits, loaded(**inputs).logits)


class Leaky(nn.Module):
    """Names that end in each other or start with each other, which PEFT's matching can confuse."""

    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        self.layer = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(layers))
        self.x = nn.ModuleDict(
            {"layer": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(layers))}
        )
        self.q = nn.Linear(8, 8)


def allocation_for(model, ranks, **fields):
    sites = {name: Site(name, 8, 8) for name in ranks}
    return Allocation(
        scores=dict.fromkeys(ranks, 1.0),
        ranks=ranks,
        sites=sites,
        budget_parameters=16 * sum(ranks.values()),
        proxy="constant",
        **fields,
    )


def test_names_that_end_or_start_alike_do_not_leak():
    names = [s for s in dict(Leaky().named_modules()) if s.endswith("q")]
    assert len(names) == 25
    ranks = {name: i % 4 for i, name in enumerate(names)}
    for chosen in (
        ranks,
        {**dict.fromkeys(names, 0), "layer.1.q": 4},
        {**dict.fromkeys(names, 0), "q": 4, "layer.11.q": 2},
        {**dict.fromkeys(names, 3), "x.layer.1.q": 1, "layer.1.q": 0},
    ):
        found = allocation_for(Leaky(), chosen)
        check_adapted(get_peft_model(Leaky(), found.lora_config), found)
        check_adapted(adapt(Leaky(), found), found)


def test_modules_outside_the_search_space_do_not_leak():
    found = uniform(Leaky(), 2, SearchSpace(target_modules=r"layer\.\d+\.q"))
    assert len(found.ranks) == 12 and len(found.lookalikes) == 12
    check_adapted(get_peft_model(Leaky(), found.lora_config), found)
    found = uniform(Leaky(), 2, SearchSpace(target_modules="q"))
    assert list(found.ranks) == ["q"]
    check_adapted(get_peft_model(Leaky(), found.lora_config), found)


def test_target_modules_are_a_list_of_names_where_that_is_safe(subject):
    found = uniform(subject("bert").model, 2)
    assert set(found.lora_config.target_modules) == set(found.ranks)


def test_a_leak_into_modules_the_allocation_never_saw_is_refused():
    found = allocation_for(Leaky(), {f"layer.{i}.q": 2 for i in range(12)})
    with pytest.raises(ModelError, match=r"'x.layer.0.q' is not in the allocation"):
        adapt(Leaky(), found)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_adapt_gives_a_trainable_peft_model(subject, name):
    made = subject(name)
    found = allocate(made.model, made.batches(), budget=Budget(rank=2))
    peft_model = adapt(made.model, found)
    assert isinstance(peft_model, PeftModel)
    check_adapted(peft_model, found)
    peft_model(**made.batch(0)).loss.backward()
    for layer_name, layer in lora_layers(peft_model).items():
        assert layer.lora_B["default"].weight.grad.abs().max() > 0, layer_name


def test_adapt_refuses_another_model(subject):
    found = uniform(subject("bert").model, 2)
    with pytest.raises(ModelError, match="no linear layer 'bert.encoder.layer.0"):
        adapt(subject("opt").model, found)
    smaller = subject("bert").model
    smaller.bert.pooler.dense = nn.Linear(32, 16)
    with pytest.raises(ModelError, match=r"'bert.pooler.dense' is Linear\(32, 16\).*\(32, 32\)"):
        adapt(smaller, found)
    model = subject("bert").model
    adapted = adapt(model, found)
    with pytest.raises(ModelError, match="already carries PEFT adapters"):
        adapt(adapted, found)


def test_save_and_load_keep_everything(subject, tmp_path):
    made = subject("mobilevit")
    found = allocate(made.model, made.batches(), budget=Budget(rank=2), proxy="snip", seed=4)
    path = tmp_path / "new" / "allocation.json"
    found.save(path)
    loaded = Allocation.load(path)
    assert loaded == found
    assert loaded.lora_config.to_dict() == found.lora_config.to_dict()
    text = path.read_text()
    document = json.loads(text)
    assert document["schema_version"] == 2
    assert text == json.dumps(document, indent=2, sort_keys=True) + "\n"
    check_adapted(adapt(made.model, loaded), found)


def test_a_file_of_the_removed_budget_of_time_loads(caplog):
    """Both were written by the last version that knew it, one with `Budget(step_time=0.9)`."""
    for name, warned in (("allocation-step-time.json", True), ("allocation.json", False)):
        caplog.clear()
        found = Allocation.load(OLD / name)
        written = json.loads((OLD / name).read_text())
        assert ("step_time is ignored" in caplog.text) == warned
        assert (found.ranks, found.scores) == (written["ranks"], written["scores"])
        assert found.parameters == written["parameters"]


def test_uniform_saves_too(subject, tmp_path):
    found = uniform(subject("opt").model, 3)
    found.save(str(tmp_path / "u.json"))
    assert Allocation.load(str(tmp_path / "u.json")) == found


def test_a_score_that_is_not_finite_is_not_written(tmp_path):
    found = allocation_for(Leaky(), {"q": 2})
    found.scores["q"] = math.nan
    with pytest.raises(AllocationFileError, match="cannot write"):
        found.save(tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()
    with pytest.raises(AllocationFileError, match="cannot write"):
        allocation_for(Leaky(), {"q": 2}).save(tmp_path)


def entry(*path):
    """A function that sets document[path[0]]...[path[-2]] = path[-1]."""

    def change(document):
        *keys, last, value = path
        for key in keys:
            document = document[key]
        document[last] = value

    return change


def drop(key):
    return lambda document: document.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("schema_version"), "schema_version is missing"),
        (drop("ranks"), "ranks is missing"),
        (drop("sites"), "sites is missing"),
        (drop("seed"), "seed is missing"),
        (drop("shortcuts"), "shortcuts is missing"),
        (entry("schema_version", 3), "schema_version is 3.*upgrade"),
        (entry("schema_version", 0), "schema_version is 0"),
        (entry("schema_version", "1"), "schema_version must be a whole number"),
        (entry("extra", 1), "extra is not a key"),
        (entry("ranks", []), "ranks must be a JSON object, not a list"),
        (entry("ranks", {}), "ranks must name the candidates, and 'p' is in only one"),
        (entry("ranks", {"q": 0, "p": 0}), "ranks are all 0"),
        (entry("ranks", "q", -1), r"ranks\['q'\] is -1"),
        (entry("ranks", "q", 10**9), r"ranks\['q'\] is 1000000000"),
        (entry("ranks", "q", 2.0), r"ranks\['q'\] must be a whole number"),
        (entry("ranks", "q", True), r"ranks\['q'\] must be a whole number"),
        (entry("ranks", "other", 2), "ranks must name the candidates, and 'other' is in only one"),
        (entry("scores", {"q": 1.0}), "scores must name the candidates, and 'p' is in only one"),
        (entry("scores", "q", "high"), r"scores\['q'\] must be a number"),
        (entry("scores", "q", -1.0), r"scores\['q'\] is -1.0"),
        (entry("scores", "q", math.nan), "scores.q is nan"),
        (entry("scores", "q", math.inf), "scores.q is inf"),
        (entry("sites", "q", [8, 8]), r"sites\['q'\] must be a JSON object"),
        (entry("sites", "q", "in_features", 0), r"sites\['q'\].in_features is 0"),
        (entry("sites", "q", "conv1d", 1), r"sites\['q'\].conv1d must be true or false"),
        (entry("parameters", 1), "parameters is 1, but the ranks add up to 64"),
        (entry("budget_parameters", 63), "parameters is 64, above budget_parameters 63"),
        (entry("proxy", ""), "proxy must be a non-empty string"),
        (entry("scaling", 0), "scaling is 0"),
        (entry("seed", -1), "seed is -1"),
        (entry("probe_rank", 0), "probe_rank is 0"),
        (entry("task_type", "CLS"), "task_type is 'CLS'"),
        (entry("modules_to_save", "head"), "modules_to_save must be a list"),
        (entry("lookalikes", [1]), r"lookalikes\[0\] must be a non-empty string"),
        (
            entry("shortcuts", {"in-attn": 1}),
            "shortcuts must name the candidates, and 'in-attn' is in only one",
        ),
        (entry("shortcut_scaling", 0), "shortcut_scaling is 0"),
        (drop("shortcut_candidates"), "shortcut_candidates is missing"),
        (drop("variant"), "variant is missing"),
        (entry("variant", {"floor": 1}), "variant.head_steps is missing"),
        (entry("variant", "floor", -1), "variant floor=-1: expected a whole number"),
        (entry("variant", "shuffle", 1), "variant shuffle=1: expected True or False"),
        (entry("seconds", None), "seconds must be a number"),
        (entry("step_seconds", 0), "step_seconds is 0"),
        (entry("mapping", []), "mapping must be null or a list"),
    ],
)
def test_malformed_files_name_the_key(tmp_path, change, message):
    path = tmp_path / "allocation.json"
    allocation_for(Leaky(), {"q": 4, "p": 0}).save(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(AllocationFileError, match=f"^{re.escape(str(path))}: .*{message}"):
        Allocation.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "the file must be a JSON object"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_files_that_are_no_allocation(tmp_path, content, message):
    path = tmp_path / "allocation.json"
    path.write_bytes(content)
    with pytest.raises(AllocationFileError, match=message):
        Allocation.load(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(AllocationFileError, match="no such file"):
        Allocation.load(tmp_path / "none.json")
    with pytest.raises(AllocationFileError, match="cannot be read"):
        Allocation.load(tmp_path)
