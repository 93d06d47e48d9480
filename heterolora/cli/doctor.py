"""`heterolora doctor`: what this environment has, what heterolora needs, and how to mend it."""

import argparse
import os
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata

from heterolora.console import add_json, emit
from heterolora.errors import ModelError

__all__ = ["EPILOG", "Check", "add_arguments", "examine", "is_healthy", "render", "run"]

EPILOG = """\
examples:
  heterolora doctor
  heterolora doctor --json -
"""

# (distribution, lowest version, first version that is too new, required)
_PACKAGES: tuple[tuple[str, str | None, str | None, bool], ...] = (
    ("torch", "2.11", "2.15", True),
    ("transformers", "5", "6", True),
    ("peft", "0.19", None, True),
    ("datasets", None, None, True),
    ("accelerate", None, None, True),
    ("safetensors", None, None, True),
    ("rich", None, None, True),
    ("triton", "3.6", "3.10", False),
    ("matplotlib", None, None, False),
    ("jinja2", None, None, False),
)


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at.
        found: what is there.
        ok: whether heterolora can work with it; False with `required` unset costs a feature only.
        required: nothing works without it.
        fix: command or sentence that mends it; empty where nothing is broken.
    """

    name: str
    found: str
    ok: bool = True
    required: bool = True
    fix: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report.

    Returns:
        0 if everything required is there, else 1.
    """
    checks = examine()
    healthy = is_healthy(checks)
    result = {"healthy": healthy, "checks": [asdict(check) for check in checks]}
    emit(args.json, result, [render(checks)])
    return 0 if healthy else 1


def examine() -> list[Check]:
    """Look at Python, the packages, the devices and the embedded weights; changes nothing."""
    checks = [_python(), Check("platform", platform.platform())]
    checks += [_package(*package) for package in _PACKAGES]
    for probe in (_torch_build, _gpus, _triton, _hub_kernels, _minilm, _threads):
        checks += _guarded(probe)
    return checks


def is_healthy(checks: list[Check]) -> bool:
    """True when everything required is there."""
    return all(check.ok for check in checks if check.required)


def render(checks: list[Check]) -> str:
    """The report as lines of text."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        mark = "ok" if check.ok else "BROKEN" if check.required else "absent"
        lines.append(f"{mark:<7}{check.name:<{width}}  {check.found}")
        if check.fix:
            lines.append(f"{'':<7}{'':<{width}}  fix: {check.fix}")
    return "\n".join(lines)


def _guarded(probe: Callable[[], list[Check]]) -> list[Check]:
    """A broken installation must not stop the report that is meant to explain it."""
    try:
        return probe()
    except Exception as error:
        name = probe.__name__.lstrip("_").replace("_", " ")
        return [Check(name, f"{type(error).__name__}: {error}", False, True, "reinstall torch")]


def _python() -> Check:
    version = platform.python_version()
    ok = _numbers(version) >= (3, 10)
    return Check("python", version, ok, True, "" if ok else "use Python 3.10 or newer")


def _package(name: str, lowest: str | None, too_new: str | None, required: bool) -> Check:
    wanted = ",".join(
        part for part in (f">={lowest}" if lowest else "", f"<{too_new}" if too_new else "") if part
    )
    fix = f'pip install "{name}{wanted}"'
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "not installed", False, required, fix)
    numbers = _numbers(version)
    low = lowest is not None and numbers < _numbers(lowest)
    high = too_new is not None and numbers >= _numbers(too_new)
    if low or high:
        return Check(name, f"{version}, outside {wanted}", False, required, fix)
    return Check(name, version, True, required)


def _numbers(version: str) -> tuple[int, ...]:
    """Leading release numbers: 2.13.0+cpu -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def _torch_build() -> list[Check]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return [Check("torch build", build, required=False)]


def _gpus() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        return [Check("GPU", "none; everything runs on the CPU", required=False)]
    checks = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found = (
            f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"
        )
        checks.append(Check(f"GPU {index}", found, required=False))
    return checks


def _triton() -> list[Check]:
    try:
        import triton
    except ImportError as error:
        found = f"cannot be imported ({error}); the PyTorch path is used"
        return [Check("triton import", found, False, False)]
    return [Check("triton import", f"works ({triton.__version__})", required=False)]


def _hub_kernels() -> list[Check]:
    # By distribution, not by import: a folder called kernels on the path would answer too.
    try:
        found = f"{metadata.version('kernels')} (not used by heterolora)"
    except metadata.PackageNotFoundError:
        found = "not installed (not needed)"
    return [Check("Hugging Face kernels", found, required=False)]


def _minilm() -> list[Check]:
    from heterolora.data.models import MINILM_INSTALL, embedded_minilm

    try:
        return [Check("MiniLM weights", str(embedded_minilm()), required=False)]
    except ModelError:
        return [Check("MiniLM weights", "not installed (the demo)", False, False, MINILM_INSTALL)]


def _threads() -> list[Check]:
    import torch

    found = f"{torch.get_num_threads()} for torch, {os.cpu_count()} CPUs"
    return [Check("threads", found, required=False)]
