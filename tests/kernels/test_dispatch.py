"""Which path "auto" takes: as measured, where nothing was, and under a compiler."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from heterolora.kernels import Branch, Site, dispatch
from heterolora.kernels.tuned.measured import GroupShape, LowRank, MeasuredPath, Tuned

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def h100(monkeypatch):
    """Fake tensors on a GPU that torch says is an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    dispatch._cached.cache_clear()
    yield
    dispatch._cached.cache_clear()


@pytest.fixture
def compiled_kernels(monkeypatch):
    """Skips where the kernels run in Triton's interpreter, which changes what a CPU can run."""
    import triton

    from heterolora.kernels.gpu.pack import pack_kernel

    if not isinstance(pack_kernel, triton.runtime.JITFunction):
        pytest.skip("this process runs Triton's interpreter")


def group(m, k, ns, rank=16, device="cuda", dtype=torch.bfloat16, dropout=0.0):
    x = torch.empty(m, k, device=device, dtype=dtype)
    sites = [Site(torch.empty(n, k, device=device, dtype=dtype)) for n in ns]
    branches = [
        Branch(
            i,
            torch.empty(rank, k, device=device),
            torch.empty(n, rank, device=device),
            dropout=dropout,
        )
        for i, n in enumerate(ns)
    ]
    return x, sites, branches


def choose(x, sites, branches, implementation="auto"):
    factors = [f for branch in branches for f in (branch.a, branch.b)]
    return dispatch.choose(implementation, x, factors, sites, branches)


def test_auto_is_aten_on_a_cpu():
    assert choose(*group(4, 8, [8], device="cpu", dtype=torch.float32)) == "aten"


def test_few_rows_are_left_to_peft_where_nothing_was_measured(monkeypatch):
    monkeypatch.setattr(dispatch, "device_name", lambda device: "a processor that nobody measured")
    dispatch._cached.cache_clear()
    for m, expected in ((4, "peft"), (128, "peft"), (256, "aten"), (1024, "aten")):
        given = group(m, 512, [512], device="cpu", dtype=torch.float32)
        choice = dispatch.quickest(*given)
        assert choice.path == expected
        assert choice.reason.startswith("not measured on this device")
        assert dispatch.quickest(*given, captured=True).path == "aten"
    dispatch._cached.cache_clear()


def test_triton_on_a_cpu_needs_the_interpreter(compiled_kernels):
    with pytest.raises(ValueError, match="cannot run here: CPU tensors need Triton's interpreter"):
        choose(*group(4, 8, [8], device="cpu", dtype=torch.float32), "triton")


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown implementation 'cuda'; choose one of auto"):
        dispatch.choose("cuda", torch.empty(1, 1))


def test_auto_on_a_gpu_that_nobody_measured_is_aten(h100):
    with FakeTensorMode():
        for m, k, ns in ((8192, 2048, [2048]), (128, 4096, [4096] * 3), (32768, 2048, [2048])):
            assert choose(*group(m, k, ns)) == "aten"
            assert dispatch.quickest(*group(m, k, ns), captured=True).path == "aten"
        assert dispatch.quickest(*group(128, 2048, [2048])).path == "peft"
        assert dispatch.quickest(*group(8192, 2048, [2048])).path == "aten"


def test_dropout_is_never_left_to_aten(h100, monkeypatch):
    """Its masks would be made one operation at a time."""
    given = [(64, 512), (8192, 2048)]
    with FakeTensorMode():
        paths = {dispatch.quickest(*group(m, d, [d], dropout=0.1)).path for m, d in given}
    assert paths == {"peft"}
    shape = GroupShape(8192, (2048,), (2048,), (LowRank(16, dropout=True),), 2, 4)
    known = tuned((shape, {"peft": 2.0, "triton": 1.0}))
    monkeypatch.setattr(dispatch, "shipped_for", lambda name: known)
    dispatch._cached.cache_clear()
    with FakeTensorMode():
        assert dispatch.quickest(*group(8192, 2048, [2048], dropout=0.1)).path == "triton"


def test_autocast_decides_by_the_dtype_it_casts_to():
    # torch enables it for a GPU only where there is one.
    with FakeTensorMode():
        wide = group(512, 384, [384], device="cpu", dtype=torch.float32)
        narrow = dispatch.quickest(*group(512, 384, [384], device="cpu"))
        assert dispatch.quickest(*wide) != narrow
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert dispatch.quickest(*wide) == narrow


MEASURED = GroupShape(1024, (512,), (512,), (LowRank(16),), 2, 4)
EVERY = ("peft", "aten", "triton")


def tuned(*entries):
    return Tuned("a device", paths=tuple(MeasuredPath(s, seconds) for s, seconds in entries))


def test_what_was_measured_decides():
    known = tuned((MEASURED, {"peft": 3.0, "aten": 2.0, "triton": 1.0}))
    assert dispatch.decide(MEASURED, None, EVERY) == ("aten", "not measured on this device")
    found = dispatch.decide(MEASURED, known, EVERY)
    assert found == ("triton", "1e+03 ms measured, peft 3e+03, aten 2e+03")
    assert dispatch.decide(MEASURED, known, ("peft", "aten")).path == "aten"
    assert dispatch.decide(MEASURED, known, ("triton",)).reason == "the only path that can run"
    # The host launched what was measured.
    graph = dispatch.decide(MEASURED, known, EVERY, captured=True)
    assert graph == ("aten", "not measured on this device")


def test_near_shapes_count_and_the_nearest_wins():
    far = dataclasses.replace(MEASURED, m=4096)
    known = tuned(
        (MEASURED, {"peft": 3.0, "aten": 2.0, "triton": 1.0}),
        (far, {"peft": 3.0, "aten": 1.0, "triton": 2.0}),
    )

    def decide(**changes):
        return dispatch.decide(dataclasses.replace(MEASURED, **changes), known, EVERY)

    assert decide(m=2048, sites=(600,)).path == "triton"
    assert decide(m=2048, sites=(600,)).reason.startswith("1e+03 ms measured at m 1024, n 512")
    assert decide(m=4096, sites=(600,)).path == "aten"
    assert decide(branches=(LowRank(32),)).path == "triton"
    for other in (
        {"m": 16384},
        {"itemsize": 4},
        {"factor_itemsize": 2},
        {"sites": (512, 512), "branches": (LowRank(16), LowRank(16, 1))},
        {"branches": (LowRank(64),)},
        {"branches": (LowRank(16, dropout=True),)},
    ):
        assert decide(**other) == ("aten", "not measured on this device")


def test_a_path_that_was_not_measured_is_not_compared_with_ones_that_were():
    known = tuned((MEASURED, {"peft": 1e-9, "aten": 2e-9}))
    assert dispatch.decide(MEASURED, known, EVERY) == ("aten", "not measured on this device")


def test_an_unknown_gpu_gets_one_line_of_advice(h100, monkeypatch):
    device = torch.device("cuda")
    line = dispatch.advice(device)
    assert H100 in line and "gpu --tune" in line and "\n" not in line
    monkeypatch.setattr(dispatch, "shipped_for", lambda name: tuned())
    assert dispatch.advice(device) is None
    assert dispatch.advice(torch.device("cpu")) is None


def test_forced_implementations_look_nothing_up(h100):
    with FakeTensorMode():
        assert choose(*group(8192, 8192, [8192]), "triton") == "triton"
        assert choose(*group(8192, 2048, [2048]), "aten") == "aten"
        assert dispatch._cached.cache_info().misses == 0


def test_what_triton_cannot_run_is_aten_or_an_error(h100):
    with FakeTensorMode():
        wide = group(8192, 2048, [2048], dtype=torch.float64)
        assert choose(*wide) == "aten"
        with pytest.raises(ValueError, match=r"no Triton kernels for torch\.float64"):
            choose(*wide, "triton")


def test_without_a_group_auto_is_triton_where_it_can_run(h100):
    with FakeTensorMode():
        assert dispatch.choose("auto", torch.empty(8, 8, device="cuda")) == "triton"


def test_neighbouring_batch_sizes_share_one_answer(h100):
    with FakeTensorMode():
        for m in range(1025, 1100):
            choose(*group(m, 512, [512]))
    info = dispatch._cached.cache_info()
    assert (info.misses, info.hits) == (1, 74)


def test_gradient_mode_does_not_change_the_answer(h100):
    with FakeTensorMode():
        given = group(32768, 2048, [2048])
        with torch.no_grad():
            first = choose(*given)
        assert dispatch._cached.cache_info().currsize == 1
        assert choose(*given) == first
        assert dispatch._cached.cache_info().currsize == 1


def seen(monkeypatch):
    """Every shape that is looked up."""
    shapes = []

    def record(shape, tuned, among, captured):
        shapes.append(shape)
        return dispatch.Choice("triton", "")

    monkeypatch.setattr(dispatch, "decide", record)
    return shapes


def test_sources_are_told_apart_by_identity_and_masks(h100, monkeypatch):
    looked_up = seen(monkeypatch)
    with FakeTensorMode():
        x, sites, branches = group(64, 32, [32, 32])
        source = torch.empty(64, 48, device="cuda")
        a, b = torch.empty(4, 48, device="cuda"), torch.empty(32, 4, device="cuda")
        mask = torch.empty(64, 32, device="cuda")
        branches += [Branch(0, a, b, source=source), Branch(1, a, b, source=source, dropout=0.1)]
        branches.append(Branch(0, branches[0].a, branches[0].b, source=x, mask=mask))
        choose(x, sites, branches)
    assert looked_up == [
        GroupShape(
            64,
            (32, 48, 32),
            (32, 32),
            (
                LowRank(16, 0, 0),
                LowRank(16, 1, 0),
                LowRank(4, 0, 1),
                LowRank(4, 1, 1, True),
                LowRank(16, 0, 2),
            ),
            itemsize=2,
            factor_itemsize=4,
        )
    ]


def test_symbolic_rows_are_not_guarded_and_count_as_many(h100, monkeypatch):
    looked_up = seen(monkeypatch)
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes) as fake:
        m = shapes.create_unbacked_symint()
        x, sites, branches = group(8, 32, [32])
        x = torch.empty(m, 32, device="cuda", dtype=torch.bfloat16)
        assert fake is not None and choose(x, sites, branches) == "triton"
    assert looked_up[0].m == dispatch._LARGE_M
    assert not shapes.guards


@pytest.mark.parametrize(("dynamic", "rows"), [(False, [64, 128]), (True, [dispatch._LARGE_M])])
def test_under_a_compiler(h100, compiled_kernels, monkeypatch, dynamic, rows):
    looked_up = seen(monkeypatch)

    def step(x, weight, a, b):
        return x.shape[0], dispatch.choose("auto", x, [a, b], [Site(weight)], [Branch(0, a, b)])

    compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=dynamic)
    with FakeTensorMode():
        _, [site], [branch] = group(1, 16, [32], rank=4)
        for m in (50, 100):
            x = torch.empty(m, 16, device="cuda", dtype=torch.bfloat16)
            assert compiled(x, site.weight, branch.a, branch.b) == (m, "triton")
    # One question for each compilation: an open m compiles once.
    assert looked_up == [GroupShape(m, (16,), (32,), (LowRank(4),), 2, 4) for m in rows]
