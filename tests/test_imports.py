"""The arrows between the packages: core -> nothing, study -> core, reports -> the record only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("core", "study", "reports")
MODULES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))
# What a report may read of the study: the record. Parts of it may be files of their own.
RECORD = (
    "study.config.formatting",
    "study.record.database",
    "study.record.frames",
    "study.record.models",
    "study.record.record",
)
# The command line stands above all three packages.
ABOVE = tuple(f"study/cli/{name}.py" for name in ("main", "ablation", "dashboard", "views"))
HEAVY = ("torch", "torchvision", "timm")
# These answer before torch is loaded, or run where it is not needed.
WITHOUT_TORCH = (
    "core/config.py",
    "core/metrics.py",
    "study/cli/main.py",
    "study/cli/views.py",
    "study/config/formatting.py",
    "study/config/load.py",
    "study/config/toml.py",
    "study/execution/progress.py",
    "study/execution/terminal.py",
)


def imports(path: Path, *, at_top_only: bool = False) -> Iterator[str]:
    """Give the modules that a file imports; not those for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            # `from core.models import weights` names a file too.
            is_folder = (ROOT / module.replace(".", "/")).is_dir() and package(module) in OURS
            yield from [f"{module}.{a.name}" for a in node.names] if is_folder else [module]
        elif not (at_top_only and isinstance(node, ast.FunctionDef)):
            nodes.extend(ast.iter_child_nodes(node))  # type: ignore[arg-type]


def package(module: str) -> str:
    return module.partition(".")[0]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_follow_the_arrows(path: Path) -> None:
    if name(path) in ABOVE:
        return
    allowed = {"core": ("core",), "study": ("core", "study"), "reports": ("reports", "study")}
    for module in imports(path):
        assert module not in OURS, f"{name(path)} imports {module}: name the file"
        if package(module) in OURS:
            assert package(module) in allowed[package(name(path).split("/")[0])], module
        if name(path).startswith("reports/"):
            assert package(module) not in HEAVY, module
            assert package(module) != "study" or module in RECORD, module


def test_the_record_imports_neither_torch_nor_pandas_at_the_top() -> None:
    for module in RECORD:
        path = ROOT / f"{module.replace('.', '/')}.py"
        packages = {package(name) for name in imports(path, at_top_only=True)}
        assert not packages & {*HEAVY, "pandas"}, module


@pytest.mark.parametrize("file", WITHOUT_TORCH)
def test_light_modules_load_nothing_heavy(file: str) -> None:
    """Follow the imports of a file through our own modules."""
    seen: set[str] = set()
    todo = [ROOT / file]
    while todo:
        for module in imports(todo.pop(), at_top_only=True):
            assert package(module) not in (*HEAVY, "optuna", "pandas", "matplotlib"), module
            if package(module) in OURS and module not in seen:
                seen.add(module)
                todo.append(ROOT / f"{module.replace('.', '/')}.py")
