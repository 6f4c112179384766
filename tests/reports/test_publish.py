"""Tables and numbers for publication: digits, escapes, and LaTeX that compiles."""

import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import without_figures
from reports.ablation_report import AblationPaths, write_ablation
from reports.intervals import Interval
from reports.publish import (
    difference_words,
    latex_row,
    latex_text,
    mean_words,
    p_equals,
    p_words,
    signed,
    to_latex,
    to_markdown,
)
from reports.words import duration, markdown_text, setting, shorten
from study.ablation.designs import Cell
from tests.reports.pages import Page
from tests.reports.studies import analysis, design_of, make_ablation

NAN = math.nan
EVIL = "<script>alert(1)</script>"
NASTY = [
    EVIL,
    "a&b", "50%", "$x$", "#1", "under_score", "{br}", "til~de", "hat^2", "back\\slash", "<b>",
    "a>b", "p|q", "Größe", "学習率", "\\end{tabular}", "Ångström", "Łódź", "naïve…", "`tick'",
    "% comment",
]  # fmt: skip


def compiled(folder: Path, document: str) -> str:
    """Return the text that a document's pages show; nothing may be wider than its column."""
    for tool in ("pdflatex", "pdftotext"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed: whether the tables compile is not tested")
    (folder / "a.tex").write_text(document, encoding="utf-8")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "a.tex"],
        cwd=folder, capture_output=True, text=True, errors="replace", timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:]
    faults = r"Overfull \\[hv]box.*|Float too large.*|Missing character.*"
    assert re.findall(faults, done.stdout) == []
    command = ["pdftotext", "-layout", "a.pdf", "-"]
    return subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout.decode()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> AblationPaths:
    """The report of levels with every bad name, of which two are tested and one fails."""
    named = {f"fac&tor_{k} #%": ("own", *NASTY[7 * k : 7 * k + 7]) for k in range(3)}
    design = design_of("ofat", **named)
    long = "diverged: the loss_is nan & 50% <b>\nat {epoch} 1. " + "Long reasons are usual. " * 8

    def score(cell: Cell, replicate: int) -> float | str:
        return long if "学習率" in cell.label else 0.75 + 0.002 * len(cell.label)

    def test(cell: Cell, replicate: int) -> float | None:
        is_tested = not cell.levels or "a&b" in cell.label or "back\\slash" in cell.label
        return 0.8 if is_tested else None

    folder = tmp_path_factory.mktemp("nasty")
    analyses = analysis(1, 1), analysis(2, 1, split="test")
    evil = f"python -m study ablate '{EVIL}' --storage postgresql://me:hunter2@db/studies"
    made = {"test": test, "origin": f"trial 4 of {EVIL}", "command": evil}
    made["data"] = {"source": f"folder:{EVIL}", "warnings": [EVIL], "classes": [EVIL, "b"]}
    store = make_ablation(folder / "s.db", design, score, *analyses, **made)
    with store, without_figures():
        return write_ablation(store, "pets-ablation", folder / "report")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (
            difference_words,
            {
                Interval(-0.0321, -0.0505, -0.0137): "−3.2 [−5.1, −1.4]",
                Interval(0.01234, 0.01200, 0.01268): "+1.234 [+1.200, +1.268]",
                Interval(0.3, 0.1, 0.5): "+30 [+10, +50]",
                Interval(0.00001, -0.02, 0.02002): "0.0 [−2.0, +2.0]",
                Interval(0.9, 0.9, 0.9): "+90.0 [+90.0, +90.0]",
                Interval(0.9, NAN, NAN): "+90.0",
                Interval(NAN, NAN, NAN): "–",
            },
        ),
        (lambda v: signed(v, 1), {0.04: "0.0", -0.04: "0.0", -0.06: "−0.1", 0.06: "+0.1"}),
        (mean_words, {(0.5, 0.7, NAN): "60.0 ± 14.1", (0.5,): "50.0", (NAN,): "–"}),
        (p_words, {0.0004: "<0.001", 0.0123: "0.012", 0.051: "0.051", 0.456: "0.46", 1.0: "1"}),
        (p_equals, {0.0004: "p < 0.001", 0.456: "p = 0.46", NAN: "p = –"}),
        (setting, {0.001234: "0.00123", 3: "3", True: "true", None: "none", NAN: "–"}),
        (lambda n: shorten("abcdefghijklmnop", n), {3: "a…p", 10: "abcde…mnop"}),
        (duration, {0.04: "0.0 s", 59.94: "59.9 s", 61: "1 min 01 s", 7322: "2 h 02 min"}),
        (markdown_text, {"p|q": "p\\|q", "*x": "\\*x", "_a_b_": "\\_a_b\\_", "<b>": "&lt;b&gt;"}),
        (latex_text, {"50% & $x_1$": r"50\% \& \$x\_1\$", "{a}": r"\{a\}", "学": "?"}),
        (latex_text, {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "--": "-{}-"}),
        (latex_text, {"Größe Łódź": "Größe Łódź", "−1": "$-$1"}),
        (latex_text, {"\\end|": r"\textbackslash{}end\textbar{}", "[*]": "{[}{*}{]}"}),
    ],
)  # fmt: skip
def test_values_have_the_digits_and_escapes_of_their_format(
    write: Callable[[Any], str], words: dict[Any, str]
) -> None:
    assert [write(value) for value in words] == list(words.values())


def test_markdown_latex_and_html_have_the_same_cells(written: AblationPaths) -> None:
    grids = [grid for section in written.sections for grid in section.grids]
    names = ("effects", "settings", "test", "classes", "failures")
    assert [grid.name for grid in grids] == [f"ofat-{name}" for name in names]
    markdown = written.markdown.read_text(encoding="utf-8")
    latex = written.latex.read_text(encoding="utf-8")
    for grid in grids:
        assert to_markdown(grid) in markdown
        rows = list(map(latex_row, (grid.header, *grid.rows)))
        own = to_latex(grid)
        assert [row for row in rows if row not in own] == []
        assert f"% Table {grid.name}: cut from here\n{own}% to here\n" in latex
        assert all(own.count(f"\\{kind}rule") == 1 for kind in ("top", "mid", "bottom"))
    labels = re.findall(r"\\label\{(.*?)\}", latex)
    assert len(set(labels)) == len(labels) == len(grids)
    page = Page(written.html)  # which refuses scripts
    assert page.tables == [[list(g.header), *map(list, g.rows)] for g in grids]
    assert page.text.count(EVIL) >= 8 and "postgresql://me:***@db/studies" in page.text
    assert "<script" not in markdown and "hunter2" not in page.text + markdown + latex


def test_two_columns_of_nasty_tables_compile(written: AblationPaths, tmp_path: Path) -> None:
    shown = compiled(tmp_path, written.latex.read_text(encoding="utf-8"))
    for name in ("a&b", "50%", "$x$", "#1", "{br}", "back\\slash", "p|q"):
        assert name in shown
