"""Rules of the code base, read from its syntax trees, and what importing heterolora costs."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import heterolora

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
MODELS = sorted(
    path
    for path in (ROOT / "heterolora").rglob("*.py")
    if path.relative_to(ROOT / "heterolora").parts[0] not in ("kernels", "bench")
)
APPLICATION = [path for path in MODELS if path.parent.name in ("cli", "demo")]
LIBRARY = [path for path in MODELS if path not in APPLICATION]


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module, as (name, number of leading dots)."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module:
                yield node.module, node.level
            yield from (
                (f"{node.module}.{alias.name}" if node.module else alias.name, node.level)
                for alias in node.names
            )


def test_the_folders_hold_code() -> None:
    assert {path.name for path in KERNELS} >= {"spec.py", "group.py", "linear.py", "passes.py"}
    assert {path.name for path in LIBRARY} >= {"fuse.py", "adapters.py", "errors.py", "run.py"}
    assert {path.name for path in APPLICATION} >= {"main.py"}


def test_kernels_has_no_init() -> None:
    """A regular package of that name would hide Hugging Face's `kernels` from transformers."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", KERNELS, ids=label)
def test_kernels_import_only_the_standard_library_torch_triton_and_themselves(path: Path) -> None:
    for name, level in imports(path):
        top = name.split(".")[0]
        assert level or top in {"torch", "triton"} | sys.stdlib_module_names, name


@pytest.mark.parametrize("path", [*KERNELS, *LIBRARY], ids=label)
def test_modules_declare_their_public_names(path: Path) -> None:
    body = tree(path).body
    declared = [
        ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    only_a_docstring = path.name == "__main__.py" or (path.name == "__init__.py" and len(body) <= 1)
    assert len(declared) == 1 or only_a_docstring


@pytest.mark.parametrize("path", [*KERNELS, *LIBRARY], ids=label)
def test_library_neither_prints_nor_reads_the_environment(path: Path) -> None:
    parsed = tree(path)
    # A module's `main` is a command of its own (`python -m`).
    parsed.body = [node for node in parsed.body if getattr(node, "name", "") != "main"]
    for node in ast.walk(parsed):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used = (node.value.id, node.attr)
            assert used not in {("os", "environ"), ("os", "getenv")}, f"line {node.lineno}"
    names = {name for name, _ in imports(path)}
    assert not names & {"os.environ", "os.getenv"}


def test_imports_point_down_and_nothing_goes_round() -> None:
    """The contracts of `[tool.importlinter]` in pyproject.toml."""
    code = "from importlinter.cli import lint_imports as run; raise SystemExit(run(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_importing_heterolora_is_cheap_and_safe() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import heterolora
heavy = ("transformers", "peft", "datasets", "accelerate", "matplotlib", "pandas", "rich")
print([name for name in heavy if name in sys.modules])
import torch
print(torch.cuda.is_initialized())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines() == ["[]", "False"]


def test_public_names() -> None:
    """Names are added here on purpose, and never renamed."""
    assert sorted(heterolora.__all__) == [
        "Allocation",
        "Budget",
        "DynamicSearchCallback",
        "FuseCallback",
        "FuseReport",
        "GraphedTrainer",
        "SearchSpace",
        "ShortcutCallback",
        "Variant",
        "adapt",
        "add_shortcuts",
        "allocate",
        "errors",
        "fuse",
        "kernels",
        "load_adapter",
        "remove_shortcuts",
        "save_adapter",
        "unfuse",
    ]
    assert set(heterolora.__all__) <= set(dir(heterolora))


@pytest.mark.parametrize("name", sorted(heterolora.__all__))
def test_public_names_resolve_and_are_documented(name: str) -> None:
    public = getattr(heterolora, name)
    assert inspect.getdoc(public)
    if not inspect.ismodule(public):
        assert public.__doc__ and not public.__doc__.startswith(f"{public.__name__}(")


def test_every_error_derives_from_one_and_is_documented() -> None:
    from heterolora import errors

    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.HeteroLoraError)
        assert kind.__doc__
