"""Tables for publication: one grid of texts, written as Markdown, LaTeX (booktabs) or HTML."""

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from reports.intervals import Interval
from reports.words import markdown_text, shorten

_MOST_DIGITS = 3
_NO_WIDTH = 1e-9
# Of a LaTeX table: rows that fit a page with its note, letters of a cell, columns at full size.
_ROWS_PER_PAGE = 45
_LETTERS_PER_CELL = 40
_MOST_COLUMNS = 7
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "−": r"$-$", "±": r"$\pm$", "×": r"$\times$", "–": "--", "<": r"$<$", ">": r"$>$",
    "→": r"$\to$", "²": r"$^2$", "≤": r"$\le$", "…": r"\dots{}", "µ": r"$\mu$",
    "[": "{[}", "]": "{]}", "*": "{*}", "’": "'", "“": "``", "”": "''", "|": r"\textbar{}",
}  # fmt: skip
# The last letter that LaTeX's T1 fonts have: those of European languages.
_LAST_LETTER = "\u017e"


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of texts that is published in several forms.

    Attributes:
        name: Of its files, without suffix.
        rows: Cells, as many a row as there are columns.
        has_groups: Whether rows whose first cell is empty belong to the one above.
        n_text: Leading columns that are names, not figures; the last column is text where
            `is_last_text`.
        is_last_text: Whether the last column is text.
        note: What was done, below the table.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    has_groups: bool = False
    n_text: int = 1
    is_last_text: bool = False
    note: str = ""

    def begins_group(self, row: int) -> bool:
        """Say whether a row is the first of its group, but not the first of the table."""
        return self.has_groups and row > 0 and self.rows[row][0] != ""


def digits_for(half_width: float) -> int:
    """Return the decimals that an interval of this half-width (in points) can bear.

    Two significant figures of the half-width, so that no digit is printed that other seeds would
    change at random.
    """
    if not math.isfinite(half_width) or half_width < _NO_WIDTH:
        return 1
    return max(0, min(_MOST_DIGITS, 1 - math.floor(math.log10(half_width))))


def signed(points: float, digits: int) -> str:
    """Write a difference in points with its sign; a rounded zero has none, halves go outwards."""
    text = f"{points + math.copysign(1e-9, points):+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def mean_words(values: Iterable[float]) -> str:
    """Write the mean of accuracies in per cent with their standard deviation, NaN left out."""
    finite = filter(math.isfinite, map(float, values))
    done = [100 * value + 1e-9 for value in finite]  # halves go up
    if not done:
        return "–"
    if len(done) == 1:
        return f"{done[0]:.1f}"
    return f"{statistics.fmean(done):.1f} ± {statistics.stdev(done):.1f}"


def difference_words(found: Interval) -> str:
    """Write a difference in points with its interval: `−3.2 [−5.0, −1.4]`."""
    if not math.isfinite(found.estimate):
        return "–"
    if not math.isfinite(found.low):
        return signed(100 * found.estimate, 1)
    digits = digits_for(100 * (found.high - found.low) / 2)
    ends = ", ".join(signed(100 * end, digits) for end in (found.low, found.high))
    return f"{signed(100 * found.estimate, digits)} [{ends}]"


def p_words(p: float) -> str:
    """Write a p value with two significant figures, down to 0.001."""
    if not math.isfinite(p):
        return "–"
    if p < 0.001:
        return "<0.001"
    if p > 0.995:
        return "1"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def p_equals(p: float) -> str:
    """Write `p = 0.012` or `p < 0.001`."""
    words = p_words(p)
    return f"p < {words[1:]}" if words.startswith("<") else f"p = {words}"


def seconds_words(value: float) -> str:
    """Write seconds with three figures at most."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def to_markdown(grid: Grid) -> str:
    """Write a grid as Markdown, its note below."""
    rows = [" | ".join(map(markdown_text, row)) for row in (grid.header, *grid.rows)]
    rows.insert(1, " | ".join(["---"] * len(grid.header)))
    table = "\n".join(f"| {row} |" for row in rows)
    parts = [f"**{markdown_text(grid.title)}**", table]
    if grid.note:
        parts.append(f"_{markdown_text(grid.note)}_")
    return "\n\n".join(parts)


def latex_text(text: str) -> str:
    """Escape a text for LaTeX; letters that its standard fonts lack become a question mark."""
    # Two hyphens in a row would become a dash.
    parts = ("".join(map(_latex_letter, part)) for part in text.split("--"))
    return "-{}-".join(parts)


def _latex_letter(letter: str) -> str:
    if letter in _LATEX:
        return _LATEX[letter]
    is_known = letter.isascii() or (letter.isalpha() and letter <= _LAST_LETTER)
    return letter if is_known else "?"


def to_latex(grid: Grid) -> str:
    """Write a grid as a LaTeX table over both columns of a page; it needs booktabs only."""
    n = len(grid.header)
    size = "footnotesize" if n <= _MOST_COLUMNS else "scriptsize"
    columns = ["l"] * grid.n_text + ["r"] * (n - grid.n_text)
    if grid.is_last_text:
        columns[-1] = "l"
    lines = [
        r"\begin{table*}[tp]",
        rf"\centering\{size}\setlength{{\tabcolsep}}{{3pt}}",
        rf"\caption{{{latex_text(grid.title)}.}}",
        rf"\label{{tab:{re.sub(r'[^A-Za-z0-9]+', '-', grid.name)}}}",
        rf"\begin{{tabular}}{{{''.join(columns)}}}",
        r"\toprule",
        latex_row(grid.header),
        r"\midrule",
    ]
    for number, row in enumerate(grid.rows):
        if grid.begins_group(number):
            lines.append(r"\addlinespace")
        lines.append(latex_row(row))
    lines += [r"\bottomrule", r"\end{tabular}"]
    if grid.note:
        lines.append(rf"\par\smallskip{{\raggedright {latex_text(grid.note)}\par}}")
    return "\n".join([*lines, r"\end{table*}", ""])


def latex_row(cells: Sequence[str]) -> str:
    """Write a row of a LaTeX table; long cells are cut in the middle."""
    shown = (latex_text(shorten(" ".join(cell.split()), _LETTERS_PER_CELL)) for cell in cells)
    return " & ".join(shown) + r" \\"


def latex_document(title: str, grids: Iterable[Grid], methods: str) -> str:
    """Write a two-column article that compiles as it stands; each table can be cut out."""
    head = [
        r"\documentclass[10pt,twocolumn]{article}",
        r"\usepackage[T1]{fontenc}",
        r"\usepackage[utf8]{inputenc}",
        r"\usepackage[a4paper,margin=18mm]{geometry}",
        r"\usepackage{booktabs}",
        r"\begin{document}",
        rf"\section*{{{latex_text(title)}}}",
        "",
        latex_text(methods),
        "",
    ]
    pages = [page for grid in grids for page in _pages(grid)]
    tables = [f"% Table {page.name}: cut from here\n{to_latex(page)}% to here\n" for page in pages]
    return "\n".join([*head, *tables, r"\clearpage", r"\end{document}", ""])


def _pages(grid: Grid) -> Iterator[Grid]:
    """Divide a long table into tables that fit a page each."""
    for page, first in enumerate(range(0, len(grid.rows), _ROWS_PER_PAGE), start=1):
        name, title = grid.name, grid.title
        if len(grid.rows) > _ROWS_PER_PAGE:
            name, title = f"{name}-{page}", f"{title} ({page})"
        yield replace(grid, name=name, title=title, rows=grid.rows[first : first + _ROWS_PER_PAGE])
