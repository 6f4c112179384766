"""Tables and numbers for publication: digits, escapes, and LaTeX that compiles."""

import html
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

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
    to_markdown,
)
from reports.words import duration, markdown_text, setting, shorten
from study.ablation.designs import Cell
from tests.reports.pages import Page
from tests.reports.studies import design_of, make_ablation

NAN = math.nan
NASTY = [
    "a&b", "50%", "$x$", "#1", "under_score", "{br}", "til~de", "hat^2", "back\\slash", "<b>",
    "a>b", "p|q", "Größe", "学習率", "\\end{tabular}", "Ångström", "Łódź", "naïve…", "`tick'",
    "% comment",
]  # fmt: skip
Table = list[list[str]]


def from_markdown(text: str) -> list[Table]:
    tables: list[Table] = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("| ") or line.startswith("| ---"):
            continue
        if not lines[number - 1].startswith("| "):
            tables.append([])
        cells = re.split(r"(?<!\\) \| ", f" {line[2:].removesuffix(' |')} ")
        tables[-1].append([html.unescape(re.sub(r"\\(.)", r"\1", c.strip())) for c in cells])
    return tables


_READ = {
    r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^",
    r"\textbar{}": "|", r"$-$": "−", r"$\pm$": "±", r"$\times$": "×", "--": "–", r"$<$": "<",
    r"$>$": ">", r"$\to$": "→", r"$\eta$": "η", r"$\omega$": "ω", r"$^2$": "²", r"\ss{}": "ß",
    r"\dots{}": "…", r"\L{}": "Ł", r"$\le$": "≤", r'\"{o}': "ö", r'\"{i}': "ï", r"\'{o}": "ó",
    r"\'{z}": "ź", r"\AA{}": "Å", r"\&": "&", r"\%": "%", r"\$": "$", r"\#": "#", r"\_": "_",
    r"\{": "{", r"\}": "}", "{[}": "[", "{]}": "]", "{*}": "*", "-{}-": "--",
}  # fmt: skip
_LATEX = re.compile("|".join(re.escape(key) for key in sorted(_READ, key=len, reverse=True)))


def read_latex(text: str) -> str:
    """Read escaped text as LaTeX would set it."""
    return _LATEX.sub(lambda found: _READ[found[0]], text)


def from_latex(text: str) -> list[Table]:
    tables = []
    for body in re.findall(r"\\begin\{tabular\}\{[lr]*\}\n(.*?)\n\\end\{tabular\}", text, re.S):
        rows = [line for line in body.splitlines() if line.endswith(r" \\")]
        tables.append([[read_latex(c) for c in row[:-3].split(" & ")] for row in rows])
    return tables


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


def small(*rows: tuple[str, ...], note: str = "") -> Grid:
    return Grid("grid", "A title", ("a column",) * len(rows[0]), rows, note=note)


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


def grids_of(written: AblationPaths) -> list[Table]:
    grids = [grid for section in written.sections for grid in section.grids]
    return [[list(grid.header), *map(list, grid.rows)] for grid in grids]


def each_cell(tables: list[Table], change: Callable[[str], str]) -> list[Table]:
    return [[[change(cell) for cell in row] for row in table] for table in tables]


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


def test_a_rounded_zero_has_no_sign_and_a_missing_number_is_a_dash() -> None:
    assert [signed(v, 1) for v in (0.04, -0.04, -0.06, 0.06)] == ["0.0", "0.0", "−0.1", "+0.1"]
    assert (number_words(NAN), number_words(-1.25, 1)) == ("–", "−1.2")


def test_p_values_have_two_figures() -> None:
    assert [p_words(p) for p in (0.0004, 0.0123, 0.051, 0.456, 1.0, NAN)] == [
        "<0.001", "0.012", "0.051", "0.46", "1", "–",
    ]  # fmt: skip
    assert [p_equals(p) for p in (0.0004, 0.456, NAN)] == ["p < 0.001", "p = 0.46", "p = –"]


def test_settings_read_as_in_the_configuration_and_long_texts_are_cut() -> None:
    assert [setting(v) for v in (0.001234, 3, True, None, "cosine", NAN)] == [
        "0.00123", "3", "true", "none", "cosine", "–",
    ]  # fmt: skip
    assert [shorten("abcdefghijklmnop", n) for n in (3, 10)] == ["a…p", "abcde…mnop"]
    assert [duration(s) for s in (0.04, 59.94, 61, 7322, None)] == [
        "0.0 s", "59.9 s", "1 min 01 s", "2 h 02 min", "–",
    ]  # fmt: skip


# The same numbers in every form


def test_markdown_latex_and_html_have_the_same_cells(written: AblationPaths) -> None:
    expected = grids_of(written)
    assert len(expected) == 3  # effects, on the test split, failures
    flat = each_cell(expected, lambda cell: " ".join(cell.split()))
    assert Page(written.html).tables == expected
    assert from_markdown(written.markdown.read_text(encoding="utf-8")) == flat
    read = from_latex(re.sub(r"\n(?=at )", " ", written.latex.read_text(encoding="utf-8")))
    assert read == each_cell(flat, lambda cell: cell.replace("学習率", "???"))


# Markup


def test_latex_escapes_read_back_letter_by_letter() -> None:
    for name in NASTY:
        if name.isascii() or name[0] in "GÅŁn":
            assert read_latex(latex_text(name)) == name
    assert latex_text("学習率") == "???"
    assert latex_text("Größe") == r"Gr\"{o}\ss{}e"


def test_markdown_cells_do_not_break_the_table() -> None:
    grid = small(*[(name, "1") for name in NASTY])
    (table,) = from_markdown(to_markdown(grid))
    assert [row[0] for row in table[1:]] == NASTY
    assert markdown_text("<b>") == "&lt;b&gt;"


def test_the_document_of_twenty_nasty_levels_compiles(
    written: AblationPaths, tmp_path: Path
) -> None:
    log, shown = compiled(tmp_path, written.latex.read_text(encoding="utf-8"))
    for fault in ("Overfull", "Float too large", "Missing character"):
        assert fault not in log
    for name in ("a&b", "50%", "$x$", "#1", "{br}", "back\\slash", "p|q"):
        assert name in shown


def test_each_table_can_be_cut_out(written: AblationPaths, tmp_path: Path) -> None:
    text = written.latex.read_text(encoding="utf-8")
    cut = re.findall(r"% Table \S+: cut from here\n(.*?)% to here\n", text, re.S)
    grids = [grid for section in written.sections for grid in section.grids]
    assert [c.rstrip("\n") for c in cut] == [to_latex(grid).rstrip("\n") for grid in grids]
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(set(labels)) == len(labels) == 3
    head = r"\documentclass{article}\usepackage{booktabs}\usepackage{graphicx}\begin{document}"
    compiled(tmp_path, "\n".join([head, *cut, r"\end{document}"]))


@pytest.mark.parametrize("name", ["[x]", "[", "*", "*x"])
def test_a_first_cell_that_latex_could_take_for_an_option_is_set(
    name: str, tmp_path: Path
) -> None:
    document = latex_document("title", [small((name, "1"), (name, "2"), note=name)], "methods")
    assert compiled(tmp_path, document)[1].count(name) == 3


def test_a_table_of_a_hundred_rows_stays_on_its_page(tmp_path: Path) -> None:
    grid = small(*[(f"level {k}", "1.0", "2.0") for k in range(100)], note="A note.")
    assert "Float too large" not in compiled(tmp_path, latex_document("t", [grid], "m"))[0]
