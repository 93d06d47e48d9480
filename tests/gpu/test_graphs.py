"""Real CUDA graphs: what tests/train simulates on a CPU.

Everything is compared bit for bit. Attention is the eager one, because the backward pass of a fused
one may add in any order.
"""

import copy
import dataclasses
from typing import Any

import helpers
import pytest
import torch
import transformers

import heterolora
from heterolora.train.cuda_graphs import WARM_UP, CudaRecorder, StepGraphs

DEVICE = torch.device("cuda", 0)


def _model(name: str, dropout: float) -> torch.nn.Module:
    model = helpers.build(name)
    model.set_attn_implementation("eager")
    model.config.use_cache = False  # as Trainer sets it
    return helpers.with_lora(model, lora_dropout=dropout).to(DEVICE, torch.bfloat16).train()


def _batches(model: torch.nn.Module, count: int, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    made = []
    for index in range(count):
        length = lengths[index % len(lengths)]
        batch = helpers.batch_for(model, rows=4, length=length, seed=index)
        made.append({key: value.to(DEVICE) for key, value in batch.items()})
    return made


class _Run:
    """Steps of plain SGD, eager or through graphs."""

    def __init__(self, model: torch.nn.Module, *, graphed: bool) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.graphs = StepGraphs(CudaRecorder(DEVICE)) if graphed else None
        self.losses: list[torch.Tensor] = []

    def step(self, values: dict[str, Any]) -> torch.Tensor:
        loss = self.model(**values).loss
        loss.backward()
        return loss.detach()

    def train(self, batches: list[dict[str, Any]], every: int = 1) -> None:
        torch.manual_seed(3)
        for index, batch in enumerate(batches, 1):
            if self.graphs is None:
                self.losses.append(self.step(batch))
            else:
                self.losses.append(self.graphs.run(self.step, batch, self.parameters))
            if index % every == 0:
                with torch.no_grad():
                    for parameter in self.parameters:
                        if parameter.grad is not None:
                            parameter -= 0.05 * parameter.grad
                self.model.zero_grad()
        torch.cuda.synchronize()


def _assert_same(eager: _Run, graphed: _Run) -> None:
    for index, (one, other) in enumerate(zip(eager.losses, graphed.losses, strict=True)):
        assert torch.equal(one, other), f"loss {index}"
    for one, other in zip(eager.parameters, graphed.parameters, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("lengths", [(24,), (24, 16)])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_replays_are_the_eager_steps(
    name: str, dropout: float, lengths: tuple[int, ...], every: int
) -> None:
    runs = []
    first = _model(name, dropout)
    batches = _batches(first, 16, lengths)
    for graphed in (False, True):
        model = copy.deepcopy(first)
        report = heterolora.fuse(model, backend="triton", example=batches[0])
        assert report.fused and not report.declined
        runs.append(_Run(model, graphed=graphed))
        runs[-1].train(batches, every)
        runs.append(torch.cuda.get_rng_state())
    _assert_same(runs[0], runs[2])
    assert torch.equal(runs[1], runs[3])
    shapes = len(lengths)
    named = "1 shape" if shapes == 1 else "2 shapes"
    expected = f"{named} captured, {16 - shapes * WARM_UP} of 16 steps replayed"
    assert runs[2].graphs.summary() == expected


class _Reading(_Run):
    """Its step looks at the loss on the host: an operator that the first capture refuses."""

    def step(self, values: dict[str, Any]) -> torch.Tensor:
        loss = self.model(**values).loss
        if float(loss) > 1e9:
            loss = loss * 2
        loss.backward()
        return loss.detach()


class _Waiting(_Run):
    """Its step waits for the device without an operator, which breaks a capture off."""

    def step(self, values: dict[str, Any]) -> torch.Tensor:
        loss = self.model(**values).loss
        torch.cuda.current_stream().synchronize()
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("kind", [_Reading, _Waiting])
def test_a_step_that_cannot_be_captured_runs_eagerly_to_the_end(kind: Any) -> None:
    """The random generator and the allocator work on, with dropout in every layer."""
    first = _model("llama", 0.25)
    batches = _batches(first, 12, (24,))
    runs = []
    for graphed in (False, True):
        model = copy.deepcopy(first)
        heterolora.fuse(model, backend="triton", example=batches[0])
        runs.append(kind(model, graphed=graphed))
        stream = torch.cuda.current_stream()
        # Two batches an update, so that the capture fails with a gradient half done.
        runs[-1].train(batches, every=2)
        assert torch.cuda.current_stream() == stream
    _assert_same(*runs)
    graphs = runs[1].graphs
    assert graphs.replayed == 0 and graphs.reason.startswith("the step cannot be captured: ")
    if kind is _Reading:
        assert graphs.reason.endswith("aten::_local_scalar_dense reads a tensor on the host")
    # Another model can still be captured.
    other = _Run(copy.deepcopy(first), graphed=True)
    other.train(batches)
    assert other.graphs.replayed == 12 - WARM_UP


def test_more_shapes_than_the_limit_run_eagerly() -> None:
    first = _model("bert", 0.0)
    batches = _batches(first, 40, (8, 12, 16, 20, 24))
    eager, graphed = (_Run(copy.deepcopy(first), graphed=flag) for flag in (False, True))
    eager.train(batches)
    graphed.train(batches)
    _assert_same(eager, graphed)
    expected = "4 shapes captured, 20 of 40 steps replayed; shapes vary, and no more than 4 are"
    assert graphed.graphs.summary().startswith(expected)


@pytest.fixture
def files(tmp_path: Any) -> dict[str, Any]:
    pytest.importorskip("datasets")
    from tiny import save_model, save_reviews

    return {
        "bert": save_model(tmp_path / "bert", dropout=0.2),
        "data": save_reviews(tmp_path / "reviews.jsonl", 64),
        "out": tmp_path / "run",
    }


def _ready(files: dict[str, Any]) -> tuple[Any, Any]:
    from heterolora.data.models import load_model
    from heterolora.data.text import load_text_data, tokenize
    from heterolora.search import adapt, uniform

    data = load_text_data(files["data"], task="classification", text="text")
    model, tokenizer = load_model(files["bert"], task="classification", num_labels=2)
    model.set_attn_implementation("eager")
    torch.manual_seed(0)
    model = adapt(model, uniform(model, 4))
    heterolora.unfuse(model)
    return model, tokenize(data, tokenizer, max_length=32)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_graphed_trainer_is_a_trainer(files: dict[str, Any], accumulation: int) -> None:
    from heterolora.train.callbacks import FuseCallback
    from heterolora.train.trainers import GraphedTrainer, constant_length

    logs, weights, trainers = [], [], []
    for kind in (transformers.Trainer, GraphedTrainer):
        model, data = _ready(files)
        args = transformers.TrainingArguments(
            str(files["out"]),
            max_steps=14 // accumulation,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=accumulation,
            learning_rate=5e-3,
            bf16=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        if args.n_gpu > 1:
            pytest.skip("several GPUs in one process run under nn.DataParallel")
        trainer = kind(
            model=model,
            args=args,
            data_collator=constant_length(data),
            train_dataset=data.splits["train"],
            callbacks=[FuseCallback(backend="triton")],
        )
        trainer.train()
        keys = ("loss", "grad_norm", "learning_rate")
        logs.append([{k: e[k] for k in keys} for e in trainer.state.log_history if "loss" in e])
        weights.append([p.detach() for p in model.parameters() if p.requires_grad])
        trainers.append(trainer)
    assert logs[0] == logs[1] and len(logs[0]) == 14 // accumulation
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert trainers[1].graph_summary.startswith("1 shape captured, ")


def test_train_with_graphs_follows_the_run_without(files: dict[str, Any]) -> None:
    from heterolora.train.run import train
    from heterolora.train.trainers import constant_length

    losses = []
    for asked in (False, True):
        model, data = _ready(files)
        if not asked:
            data = dataclasses.replace(data, collator=constant_length(data))
        # PEFT's own forward: the fused path may choose otherwise where it will be captured.
        result = train(
            model,
            data,
            output_dir=files["out"] / str(asked),
            max_steps=14,
            batch_size=8,
            learning_rate=5e-3,
            logging_steps=1,
            fused=False,
            cuda_graph=asked,
        )
        losses.append([e["loss"] for e in result.log_history if "loss" in e])
        captured = f"1 shape captured, {14 - 2 - WARM_UP} of 14 steps replayed"
        assert result.cuda_graph == (captured if asked else None)
    assert losses[0] == losses[1] and len(losses[0]) == 14


@pytest.mark.parametrize("variant", ["graph-peft", "graph-fused", "graph-base-only"])
def test_the_variants_of_the_bench_are_their_eager_steps(variant: str) -> None:
    from heterolora.bench.cases import groups, peers
    from heterolora.bench.harness import steps

    sites = {"q_proj": 256, "k_proj": 128, "v_proj": 128}
    load = groups.group(m=128, k=256, sites=sites, repeats=3, dtype=torch.bfloat16, device=DEVICE)
    ranks = steps.mixed_ranks(load.targets)
    assert peers.unavailable(variant, load, ranks, DEVICE) is None
    # Both are built for a capture, so that the fused path chooses alike.
    eager, graphed = (peers.build_step(variant, steps.twin(load), ranks) for _ in range(2))
    for _ in range(3):
        graphed()
    for _ in range(WARM_UP + 3):
        steps.Step.__call__(eager)
    torch.cuda.synchronize()
    for one, other in zip(eager.tensors(), graphed.tensors(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(
        (*eager.module.parameters(), *eager.inputs.values()),
        (*graphed.module.parameters(), *graphed.inputs.values()),
        strict=True,
    ):
        assert (one.grad is None) is (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)
