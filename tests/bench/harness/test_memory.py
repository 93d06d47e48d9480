"""The memory meters on allocations whose sizes are known."""

import os

import torch

from heterolora.bench.harness.memory import MemoryUse, peak_bytes, resident_bytes, saved_bytes


def test_peak_follows_what_is_alive_at_once():
    def step() -> None:
        a = torch.empty(1_000_000)
        b = torch.empty(500_000)
        del a
        c = torch.empty(250_000)
        del b, c

    # 4 MB + 2 MB alive together; the sum of all allocations would be 7 MB.
    assert peak_bytes(step) == 6_000_000


def test_peak_is_over_what_was_alive_before():
    older = torch.ones(1_000_000)
    assert peak_bytes(lambda: older.neg_()) == 0
    assert peak_bytes(lambda: older.neg()) == 4_000_000


def test_peak_sees_temporaries_inside_one_operator():
    x = torch.ones(1000, 1000)
    # The result has 1000 numbers; on the way the exponentials of all 1000 x 1000 are held.
    assert peak_bytes(lambda: x.logsumexp(1)) >= 4_000_000


def test_other_messages_on_stderr_survive(capfd):
    def step() -> None:
        os.write(2, b"a warning of the step\n")
        torch.empty(1)

    peak_bytes(step)
    assert capfd.readouterr().err == "a warning of the step\n"


def test_saved_bytes_of_a_known_graph():
    x = torch.randn(64, 32, requires_grad=True)
    weight = torch.randn(16, 32)
    # linear keeps only its frozen weight for dX; y * y keeps y, one storage twice.
    y_bytes = 64 * 16 * 4

    def forward() -> torch.Tensor:
        y = torch.nn.functional.linear(x, weight)
        return (y * y).sum()

    assert saved_bytes(forward, exclude=[weight]) == y_bytes
    assert saved_bytes(forward) == y_bytes + weight.nbytes


def test_saved_bytes_counts_a_view_as_its_whole_storage():
    x = torch.randn(10, 10, requires_grad=True)

    def forward() -> torch.Tensor:
        return (x.exp()[:5] ** 2).sum()

    # exp keeps its result (10 x 10), the square keeps a view of the same storage.
    assert saved_bytes(forward) == 10 * 10 * 4


def test_resident_counts_tied_tensors_once():
    shared = torch.empty(100)
    assert resident_bytes([shared, shared.view(10, 10), torch.empty(5)]) == 420
    assert MemoryUse(resident=420, peak=80, saved=1).total == 500
