"""The worked examples of CONTRIBUTING.md: every patch applies, and every check holds with it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COUNTS = {"one file": 1, "two files": 2}
SECTION = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("worked examples\n")[2]
EXAMPLES = {
    title: {kind: body for kind, body in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)}
    for title, text in re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", SECTION, re.DOTALL | re.M)
}
# All checks share one process: loading torch takes longer than each of them.
RUN_CHECKS = """
import pathlib, traceback
for check in sorted(pathlib.Path("checks").iterdir()):
    try:
        exec(compile(check.read_text(), check.name, "exec"), {"__name__": "example"})
    except BaseException:
        check.with_suffix(".failed").write_text(traceback.format_exc())
    else:
        check.with_suffix(".passed").touch()
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the packages, all patches applied, where all checks were run."""
    folder = tmp_path_factory.mktemp("contributing")
    for package in ("core", "study", "reports"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    shutil.copy(ROOT / "frostline.py", folder)
    (folder / "checks").mkdir()
    for number, example in enumerate(EXAMPLES.values()):
        command = ["git", "apply", "--whitespace=nowarn", "-"]
        subprocess.run(command, cwd=folder, input=example["diff"], text=True, check=True)
        (folder / "checks" / f"{number}.py").write_text(example["python"], encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    subprocess.run([sys.executable, "-c", RUN_CHECKS], cwd=folder, env=environment, check=True)
    return folder


def test_there_are_seven_examples() -> None:
    assert len(EXAMPLES) == 7


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_works_and_touches_as_many_files_as_it_says(patched: Path, title: str) -> None:
    files = re.findall(r"^\+\+\+ b/(.+)$", EXAMPLES[title]["diff"], re.M)
    assert len(files) == COUNTS[title.partition(": ")[2]]
    check = patched / "checks" / f"{list(EXAMPLES).index(title)}.py"
    failed = check.with_suffix(".failed")
    assert check.with_suffix(".passed").exists(), failed.read_text(encoding="utf-8")
