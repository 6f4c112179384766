"""Tables and numbers for publication: digits, escapes, and LaTeX that compiles."""

import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reports.ablation_report import AblationPaths, write_ablation
from reports.intervals import Interval
from reports.publish import (
    Grid,
    difference_words,
    latex_document,
    latex_text,
    number_words,
    p_equals,
    p_words,
    plus_minus,
    signed,
    to_latex,
)
from reports.words import duration, markdown_table, markdown_text, setting, shorten
from study.ablation.designs import Cell
from tests.reports.pages import Page
from tests.reports.studies import design_of, make_ablation

NAN = math.nan
NASTY = [
    "a&b", "50%", "$x$", "#1", "under_score", "{br}", "til~de", "hat^2", "back\\slash", "<b>",
    "a>b", "p|q", "Größe", "学習率", "\\end{tabular}", "Ångström", "Łódź", "naïve…", "`tick'",
    "% comment",
]  # fmt: skip


def compiled(folder: Path, document: str) -> tuple[str, str]:
    """Return what LaTeX says of a document, and the text that its pages show."""
    for tool in ("pdflatex", "pdftotext"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed: whether the tables compile is not tested")
    (folder / "a.tex").write_text(document, encoding="utf-8")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "a.tex"],
        cwd=folder, capture_output=True, text=True, errors="replace", timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:]
    command = ["pdftotext", "-layout", "a.pdf", "-"]
    shown = subprocess.run(command, cwd=folder, capture_output=True, check=True)
    return done.stdout, shown.stdout.decode()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> AblationPaths:
    """The report of twenty levels with every bad name, of which two are tested and one fails."""
    named = {f"fac&tor_{k} #%": ("own", *NASTY[4 * k : 4 * k + 4]) for k in range(5)}
    design = design_of("ofat", **named)
    rng = np.random.default_rng(0)
    seeds = rng.normal(0, 0.02, 5)
    means = {cell.label: 0.75 + 0.01 * k for k, cell in enumerate(design.cells)}

    def score(cell: Cell, replicate: int) -> float | str:
        if "学習率" in cell.label and replicate == 2:
            return "diverged: the loss_is nan & 50% <b>\nat {epoch} 1"
        drawn = means[cell.label] + seeds[replicate] + rng.normal(0, 0.01)
        return round(400 * drawn) / 400

    def test(cell: Cell, replicate: int) -> float | None:
        is_tested = not cell.levels or "a&b" in cell.label or "back\\slash" in cell.label
        return 0.8 + 0.01 * replicate if is_tested else None

    folder = tmp_path_factory.mktemp("nasty")
    store = make_ablation(folder / "s.db", design, score, test=test, origin="trial 4 of <pets_&>")
    with store:
        return write_ablation(store, "pets-ablation", folder / "report")


# Words


@pytest.mark.parametrize(
    ("interval", "accuracy", "difference"),
    [
        (Interval(0.9123, 0.8923, 0.9323), "91.2 ± 2.0", "+91.2 [+89.2, +93.2]"),
        (Interval(-0.0321, -0.0505, -0.0137), "-3.2 ± 1.8", "−3.2 [−5.1, −1.4]"),
        (Interval(0.01234, 0.01200, 0.01268), "1.234 ± 0.034", "+1.234 [+1.200, +1.268]"),
        (Interval(0.5, 0.4966, 0.5034), "50.00 ± 0.34", "+50.00 [+49.66, +50.34]"),
        (Interval(0.3, 0.1, 0.5), "30 ± 20", "+30 [+10, +50]"),
        (Interval(0.00001, -0.02, 0.02002), "0.0 ± 2.0", "0.0 [−2.0, +2.0]"),
        (Interval(0.9, 0.9, 0.9), "90.0 ± 0.0", "+90.0 [+90.0, +90.0]"),
        (Interval(0.9, NAN, NAN), "90.0", "+90.0"),
        (Interval(NAN, NAN, NAN), "–", "–"),
    ],
)
def test_an_interval_and_its_estimate_have_the_digits_that_its_width_allows(
    interval: Interval, accuracy: str, difference: str
) -> None:
    assert plus_minus(interval) == accuracy
    assert difference_words(interval) == difference


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda v: signed(v, 1), {0.04: "0.0", -0.04: "0.0", -0.06: "−0.1", 0.06: "+0.1"}),
        (number_words, {NAN: "–", -1.254: "−1.25"}),
        (p_words, {0.0004: "<0.001", 0.0123: "0.012", 0.051: "0.051", 0.456: "0.46", 1.0: "1"}),
        (p_equals, {0.0004: "p < 0.001", 0.456: "p = 0.46", NAN: "p = –"}),
        (setting, {0.001234: "0.00123", 3: "3", True: "true", None: "none", NAN: "–"}),
        (lambda n: shorten("abcdefghijklmnop", n), {3: "a…p", 10: "abcde…mnop"}),
        (duration, {0.04: "0.0 s", 59.94: "59.9 s", 61: "1 min 01 s", 7322: "2 h 02 min"}),
        (markdown_text, {"p|q": "p\\|q", "*x": "\\*x", "_a_b_": "\\_a_b\\_", "<b>": "&lt;b&gt;"}),
        (latex_text, {"50% & $x_1$": r"50\% \& \$x\_1\$", "{a}": r"\{a\}", "学": "?"}),
        (latex_text, {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "--": "-{}-"}),
        (latex_text, {"Größe": r"Gr\"{o}\ss{}e", "Łódź": r"\L{}\'{o}d\'{z}", "−1": "$-$1"}),
        (latex_text, {"\\end|": r"\textbackslash{}end\textbar{}", "[*]": "{[}{*}{]}"}),
    ],
)  # fmt: skip
def test_values_are_written_for_the_reader_and_the_format(
    write: Callable[[Any], str], words: dict[Any, str]
) -> None:
    assert [write(value) for value in words] == list(words.values())


# The same numbers in every form


def test_markdown_latex_and_html_have_the_same_cells(written: AblationPaths) -> None:
    grids = [grid for section in written.sections for grid in section.grids]
    assert len(grids) == 3  # effects, on the test split, failures
    assert Page(written.html).tables == [[list(g.header), *map(list, g.rows)] for g in grids]
    markdown = written.markdown.read_text(encoding="utf-8")
    latex = written.latex.read_text(encoding="utf-8")
    for grid in grids:
        assert markdown_table(grid.header, grid.rows) in markdown
        rows = [" & ".join(map(latex_text, row)) for row in (grid.header, *grid.rows)]
        own = to_latex(grid)
        assert [row for row in rows if row not in own] == []
        assert f"% Table {grid.name}: cut from here\n{own}% to here\n" in latex
    labels = re.findall(r"\\label\{(.*?)\}", latex)
    assert len(set(labels)) == len(labels) == 3


def test_long_and_nasty_tables_compile(written: AblationPaths, tmp_path: Path) -> None:
    nasty = [*NASTY, "[x]", "[", "*", "*x"]  # LaTeX could take a first cell for an option
    rows = tuple((name, "1") for name in [*nasty, *(f"level {k}" for k in range(100))])
    long = Grid("grid", "A title", ("a column",) * 2, rows, note="[x]")
    for document in (
        written.latex.read_text(encoding="utf-8"),
        latex_document("title", [long], "methods"),
    ):
        log, shown = compiled(tmp_path, document)
        for fault in ("Overfull", "Float too large", "Missing character"):
            assert fault not in log
        for name in ("a&b", "50%", "$x$", "#1", "{br}", "back\\slash", "p|q"):
            assert name in shown
    assert shown.count("[x]") > 1


def test_a_long_table_is_divided_into_pages_with_a_label_each() -> None:
    grid = Grid("grid", "A title", ("a", "b"), tuple((f"level {k}", "1") for k in range(100)))
    text = latex_document("t", [grid], "m")
    assert text.count(r"\begin{table}") == len(set(re.findall(r"\\label\{.*?\}", text))) == 4
    assert [text.count(f"level {k} &") for k in range(100)] == [1] * 100
