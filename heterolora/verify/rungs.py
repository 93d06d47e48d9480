"""The five rungs: each proves what the one below it takes for granted."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import heterolora
from heterolora.kernels.dispatch import triton_reason
from heterolora.verify.cases import Verdict, parity_cases, repeat_cases
from heterolora.verify.checks import (
    check_added_derivative,
    check_derivative,
    check_score_meaning,
    guarded,
)
from heterolora.verify.child import child
from heterolora.verify.fused_models import MODELS, check_model
from heterolora.verify.groups import GROUPS, SEEDED

__all__ = ["RUNGS", "Request", "Rung"]

_INTERPRETER = ("TRITON_INTERPRET=1", "OMP_NUM_THREADS=1", "OPENBLAS_NUM_THREADS=1")
_TESTS = Path(heterolora.__file__).resolve().parents[1] / "tests"


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        archs: GPU architectures to compile for; empty for all.
        quick: a subset of rungs 3 to 5 that takes seconds.
    """

    archs: tuple[str, ...] = ()
    quick: bool = False


@dataclass(frozen=True)
class Rung:
    """One kind of proof.

    Attributes:
        number: its place; a rung means little if one below it fails.
        title: what it proves.
        run: yields each check's verdict as it is decided.
        missing: why none of it can run here, or None.
    """

    number: int
    title: str
    run: Callable[[Request], Iterator[Verdict]]
    missing: Callable[[Request], str | None]


def _nothing(request: Request) -> str | None:
    return None


def _spec(request: Request) -> Iterator[Verdict]:
    checks = {
        "group_linear": check_derivative,
        "low_rank_add": check_added_derivative,
        "group_score": check_score_meaning,
    }
    for operation, check in checks.items():
        for name, group in {**GROUPS, **SEEDED}.items():
            # gradcheck moves single elements of an input, which an expanded input does not have.
            if name != "expanded_input":
                yield Verdict(f"{operation} {name}", guarded(check, group))


def _aten(request: Request) -> Iterator[Verdict]:
    yield from parity_cases("aten", "cpu", ("float32", "bfloat16", "float16"))
    for name in MODELS:
        yield Verdict(f"fused PEFT model {name}", guarded(check_model, name))


def _no_triton(request: Request) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def _interpreted(request: Request) -> Iterator[Verdict]:
    quick = ("--quick",) if request.quick else ()
    yield from child("interpreted", *quick, environment=_INTERPRETER)
    missing = _no_suite("interp", "hypothesis")
    if missing is None:
        marker = ("-m", "quick") if request.quick else ()
        suite = str(_TESTS / "interp")
        yield from child("suite", suite, *marker, environment=_INTERPRETER)
    else:
        why = f"Triton's interpreter gets it wrong, the repair is in the test tree, and {missing}"
        yield Verdict("bfloat16", skipped=why)
        yield Verdict("guard buffers, random groups", skipped=missing)


def _compiled(request: Request) -> Iterator[Verdict]:
    quick = ("--quick",) if request.quick else ()
    # A child, because compiling for another GPU replaces the driver that Triton uses.
    yield from child("compiled", *quick, *request.archs, environment=("-u", "TRITON_INTERPRET"))


def _no_gpu(request: Request) -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return triton_reason(torch.empty(0, device="cuda"))


def _gpu(request: Request) -> Iterator[Verdict]:
    yield from parity_cases("triton", "cuda", ("float32", "bfloat16", "float16"))
    yield from repeat_cases("triton", "cuda", torch.bfloat16)
    missing = _no_suite("gpu")
    if request.quick:
        missing = "left out by --quick"
    if missing is None:
        yield from child("suite", str(_TESTS / "gpu"))
    else:
        yield Verdict("sanitizer, graphs, streams, large tensors", skipped=missing)


def _no_suite(folder: str, *modules: str) -> str | None:
    if not (_TESTS / folder / "conftest.py").exists():
        return "this is not a checkout: there is no test tree"
    for module in ("pytest", *modules):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return None


RUNGS = {
    rung.number: rung
    for rung in (
        Rung(1, "spec is its own derivative (gradcheck, float64)", _spec, _nothing),
        Rung(2, "aten is as exact as spec, a fused PEFT model equals PEFT", _aten, _nothing),
        Rung(3, "Triton, interpreted, is as exact as spec", _interpreted, _no_triton),
        Rung(4, "every kernel compiles as it should for each GPU", _compiled, _no_triton),
        Rung(5, "Triton on this GPU is as exact as spec, and repeats", _gpu, _no_gpu),
    )
}
