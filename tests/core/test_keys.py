import shutil
from pathlib import Path

from core.keys import source_digest

CORE = Path(__file__).parents[2] / "core"


def test_a_change_in_any_folder_of_core_changes_the_digest(tmp_path: Path) -> None:
    copy = tmp_path / "core"
    shutil.copytree(CORE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = source_digest(copy)
    assert before == source_digest(CORE)
    folders = {path.parent for path in copy.rglob("*.py")}
    assert len(folders) > 1
    seen = {before}
    for folder in folders:
        with open(next(folder.glob("*.py")), "a") as file:
            file.write("\n")
        seen.add(source_digest(copy))
    assert len(seen) == 1 + len(folders)
