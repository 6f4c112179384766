"""The arrows between the packages: core -> nothing, study -> core, reports -> the record only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("core", "study", "reports")
# What a report may read of the study: the record. Parts of it may be files of their own.
RECORD = (
    "study.config.formatting",
    "study.record.database",
    "study.record.frames",
    "study.record.models",
    "study.record.record",
)
# The command line stands above all three packages.
ABOVE = [ROOT / f"study/cli/{name}.py" for name in ("main", "ablation", "dashboard", "views")]
MODULES = sorted({path for name in OURS for path in (ROOT / name).rglob("*.py")} - {*ABOVE})
HEAVY = ("torch", "torchvision", "timm")
# These, and what they import, answer before torch is loaded, or run where it is not needed.
LIGHT = ("study.cli.main", "study.cli.views", "study.config.load", "study.execution.terminal")
TOO_HEAVY = {module: (*HEAVY, "pandas") for module in RECORD} | {
    module: (*HEAVY, "pandas", "optuna", "matplotlib") for module in LIGHT
}


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
    allowed = {"core": ("core",), "study": ("core", "study"), "reports": ("reports", "study")}
    for module in imports(path):
        assert module not in OURS, f"{name(path)} imports {module}: name the file"
        if package(module) in OURS:
            assert package(module) in allowed[package(name(path).split("/")[0])], module
        if name(path).startswith("reports/"):
            assert package(module) not in HEAVY, module
            assert package(module) != "study" or module in RECORD, module


@pytest.mark.parametrize("light", TOO_HEAVY)
def test_light_modules_load_nothing_heavy(light: str) -> None:
    """Follow the imports of a module through our own."""
    seen = {light}
    todo = [light]
    while todo:
        path = ROOT / f"{todo.pop().replace('.', '/')}.py"
        for module in imports(path, at_top_only=True):
            assert package(module) not in TOO_HEAVY[light], module
            if package(module) in OURS and module not in seen:
                seen.add(module)
                todo.append(module)
