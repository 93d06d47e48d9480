"""Graphs of a step against the eager step, bit for bit, with CUDA graphs simulated on a CPU."""

import copy
import logging
from typing import Any
from unittest import mock

import helpers
import pytest
import torch
from recorder import CpuRecorder
from torch import Tensor, nn

import heterolora
from heterolora.train.cuda_graphs import (
    LIMIT,
    WARM_UP,
    NoHostReads,
    StepGraph,
    StepGraphs,
    host_read,
)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.GELU(), nn.Linear(8, 1))


def _batches(count: int, rows: tuple[int, ...] = (4,)) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(rows[i % len(rows)], 6, generator=draw)} for i in range(count)]


class _Run:
    """Steps of one model with plain SGD, eager or through graphs."""

    def __init__(self, recorder: CpuRecorder | None = None, **options: Any) -> None:
        self.model = _model()
        self.parameters = list(self.model.parameters())
        self.graphs = None if recorder is None else StepGraphs(recorder, **options)
        self.losses: list[Tensor] = []

    def step(self, values: dict[str, Any]) -> Tensor:
        loss = self.model(values["x"]).square().mean() * values.get("scale", 1.0)
        loss.backward()
        return loss.detach()

    def train(self, batches: list[dict[str, Any]], *, every: int = 1) -> None:
        """One update for `every` batches."""
        torch.manual_seed(7)
        for index, batch in enumerate(batches, 1):
            loss = self.step(batch) if self.graphs is None else self.run(batch)
            self.losses.append(loss)
            if index % every == 0:
                with torch.no_grad():
                    for parameter in self.parameters:
                        if parameter.grad is not None:
                            parameter -= 0.1 * parameter.grad
                self.model.zero_grad()

    def run(self, batch: dict[str, Any]) -> Tensor:
        assert self.graphs is not None
        return self.graphs.run(self.step, batch, self.parameters)


def _same(one: _Run, other: _Run) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.losses, other.losses, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, other.parameters, strict=True))


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("rows", [(4,), (4, 2), (4, 4, 2)])
def test_steps_through_graphs_are_the_eager_steps(rows: tuple[int, ...], every: int) -> None:
    batches = _batches(24, rows)
    recorder = CpuRecorder()
    eager, graphed = _Run(), _Run(recorder)
    eager.train(batches, every=every)
    random = torch.get_rng_state()
    graphed.train(batches, every=every)
    assert torch.equal(torch.get_rng_state(), random)
    _same(eager, graphed)
    shapes = len(set(rows))
    assert recorder.recordings == shapes and recorder.warm_ups == shapes * WARM_UP
    assert graphed.graphs.replayed == 24 - shapes * WARM_UP and graphed.graphs.reason is None
    # All from the pool of the first.
    assert recorder.pools[0] is None and len(set(recorder.pools[1:])) <= 1
    assert None not in recorder.pools[1:]
    named = "1 shape" if shapes == 1 else "2 shapes"
    expected = f"{named} captured, {24 - shapes * WARM_UP} of 24 steps replayed"
    assert graphed.graphs.summary() == expected


def test_losses_are_the_callers_own_and_gradients_are_not_copied() -> None:
    recorder = CpuRecorder()
    run = _Run(recorder)
    graph = StepGraph(run.step, _batches(1)[0], run.parameters, recorder)
    assert all(parameter.grad is None for parameter in run.parameters)
    assert all(grad.isnan().all() for grad in graph.gradients)
    static = {id(grad) for grad in graph.gradients}
    first = graph(_batches(1)[0], static)
    kept = first.clone()
    assert [id(p.grad) for p in run.parameters] == [id(grad) for grad in graph.gradients]
    run.model.zero_grad()
    second = graph(_batches(2)[1], static)
    assert torch.equal(first, kept) and not torch.equal(first, second)
    # Zeroed instead of dropped: added to, as backward does.
    run.model.zero_grad(set_to_none=False)
    graph(_batches(1)[0], static)
    assert not {id(p.grad) for p in run.parameters} & static
    assert all(p.grad.abs().sum() > 0 for p in run.parameters)


def test_numbers_take_a_graph_each_and_the_rest_runs_eagerly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = _batches(60)
    batches = [{**batch, "scale": float(1 + i % (LIMIT + 1))} for i, batch in enumerate(plain)]
    recorder = CpuRecorder()
    eager, graphed = _Run(), _Run(recorder)
    eager.train(batches)
    with caplog.at_level(logging.WARNING, "heterolora"):
        graphed.train(batches)
    _same(eager, graphed)
    assert recorder.recordings == LIMIT
    assert graphed.graphs.replayed == LIMIT * (12 - WARM_UP)
    reason = f"shapes vary, and no more than {LIMIT} are captured"
    assert graphed.graphs.summary().endswith(f"of 60 steps replayed; {reason}")
    assert [record.getMessage() for record in caplog.records] == [
        f"steps run without a CUDA graph: {reason}"
    ]


def test_what_is_neither_tensor_nor_number_runs_eagerly() -> None:
    recorder = CpuRecorder()
    run = _Run(recorder)
    run.train([{**batch, "extra": {"a": 1}} for batch in _batches(6)])
    assert recorder.recordings == recorder.warm_ups == 0
    assert run.graphs.summary() == "extra is a dict, neither tensor nor plain value"


def test_few_steps_are_not_captured() -> None:
    recorder = CpuRecorder()
    run = _Run(recorder)
    run.train(_batches(WARM_UP))
    assert recorder.recordings == 0
    assert run.graphs.summary() == f"no shape came more than {WARM_UP} times"


class _Branching(_Run):
    """Its step reads the loss on the host, for some shapes."""

    def step(self, values: dict[str, Any]) -> Tensor:
        loss = self.model(values["x"]).square().mean()
        if len(values["x"]) == 4 and loss > 1e9:
            loss = loss * 2
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize(("rows", "recordings"), [((4,), 1), ((2, 2, 4), 2)])
def test_a_step_that_cannot_be_captured_runs_eagerly_and_leaves_no_trace(
    rows: tuple[int, ...], recordings: int, caplog: pytest.LogCaptureFixture
) -> None:
    batches = _batches(30, rows)
    recorder = CpuRecorder()
    eager, graphed = _Branching(), _Branching(recorder)
    # Accumulating, so that the capture fails between two halves of a gradient.
    eager.train(batches, every=3)
    random = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "heterolora"):
        graphed.train(batches, every=3)
    assert torch.equal(torch.get_rng_state(), random)
    _same(eager, graphed)
    assert recorder.recordings == recordings
    reason = "the step cannot be captured: aten::_local_scalar_dense reads a tensor on the host"
    assert graphed.graphs.reason == reason and len(caplog.records) == 1
    assert (graphed.graphs.replayed == 0) is (recordings == 1)


def test_errors_of_the_step_itself_come_up() -> None:
    run = _Run(CpuRecorder())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run.train([{"x": torch.zeros(2, 5)}])


@pytest.mark.parametrize("change", ["freeze", "replace"])
def test_changed_parameters_are_captured_anew(change: str) -> None:
    runs = [_Run(), _Run(recorder := CpuRecorder())]
    for run in runs:
        run.train(_batches(8))
        weight = run.parameters[0]
        if change == "freeze":
            weight.requires_grad_(False)
        else:
            weight.data = weight.data.clone() + 1
        run.train(_batches(8))
    _same(*runs)
    assert recorder.recordings == 2 and recorder.pools == [None, None]
    assert runs[1].graphs.replayed == 2 * (8 - WARM_UP)


X = torch.arange(6.0)
READS = {
    "item": lambda: X[0].item(),
    "bool": lambda: bool((X > 1).all()),
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(X > 1),
    "mask": lambda: X[X > 1],
    "put by mask": lambda: X.clone().index_put((X > 1,), X[:4]),
    "unique": lambda: X.unique(),
    "masked select": lambda: X.masked_select(X > 1),
    "equal": lambda: torch.equal(X, X),
}
WORK = {
    "matmul": lambda: X @ X,
    "index": lambda: X[torch.tensor([0, 2])],
    "masked fill": lambda: X.masked_fill(X > 1, 0.0),
    "where": lambda: torch.where(X > 1, X, 0.0),
    "cast": lambda: X.to(torch.bfloat16),
    "random": lambda: torch.randint(9, (3,)) + X[:3],
    "size": lambda: X.new_zeros(X.shape[0] // 2),
}


@pytest.mark.parametrize("name", READS)
def test_reads_on_the_host_are_caught(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"on the host"), NoHostReads("cpu"):
        READS[name]()
    # Only those of the device that is captured.
    with NoHostReads("cuda"):
        READS[name]()


@pytest.mark.parametrize("name", WORK)
def test_what_stays_on_the_device_passes(name: str) -> None:
    with NoHostReads("cpu"):
        WORK[name]()


def test_copies_between_host_and_device_are_caught() -> None:
    there, here = torch.empty(3, device="meta"), torch.empty(3)
    copy_, cast = torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default
    words = "copies between host and device"
    assert words in (host_read(copy_, (there, here), {}, "meta") or "")
    assert words in (host_read(cast, (there,), {"device": torch.device("cpu")}, "meta") or "")
    assert host_read(cast, (there,), {"dtype": torch.float16}, "meta") is None
    assert host_read(copy_, (there, there), {}, "meta") is None


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "qwen3", "mistral", "gemma", "opt"])
def test_a_fused_training_step_reads_nothing_on_the_host(name: str, dropout: float) -> None:
    model = helpers.with_lora(helpers.build(name), lora_dropout=dropout)
    batch = helpers.batch_for(model)
    assert bool((batch["attention_mask"] == 0).any())
    plain = helpers.step(copy.deepcopy(model), batch)[1] if not dropout else {}
    heterolora.fuse(model, backend="aten", example=batch)
    model.zero_grad()
    capturing = "transformers.utils.import_utils.is_cuda_stream_capturing"
    counter = helpers.CountOps()
    with mock.patch(capturing, lambda: True), counter, NoHostReads("cpu"):
        model(**batch).loss.backward()
    if not dropout:
        assert counter.forward > 0 and counter.backward == counter.forward
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert grads.keys() == plain.keys()
        for key, grad in grads.items():
            assert helpers.error(grad, plain[key]) < 1e-5
    # Outside a capture transformers looks at the mask; the detector sees it.
    with pytest.raises(RuntimeError, match="reads a tensor on the host"), NoHostReads("cpu"):
        model(**batch)
