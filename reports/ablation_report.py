"""Write an ablation's report: a page, tables, CSV, and figures as PNG, SVG and PDF."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reports import ablation_tables as tables
from reports.ablation import Ablation, read_ablations
from reports.ablation_sections import Section, sections_of
from reports.across import Across, compare_across
from reports.factorial import estimate_contrasts
from reports.figures import drawn, save_figures
from reports.methods import data_words
from reports.page import render_template
from reports.publish import latex_document, to_markdown
from reports.words import config_words, moment
from study.config.formatting import hide_password
from study.record.record import Record


@dataclass(frozen=True, slots=True)
class AblationPaths:
    """Where an ablation's report lies.

    Attributes:
        html: The page, complete in itself.
        markdown: Every table.
        latex: Every table, and the methods, in a document that compiles.
        csv: Effects and runs, unrounded.
        figures: PNG, SVG and PDF of each.
        sections: What it says of each design, the last one used first.
    """

    html: Path
    markdown: Path
    latex: Path
    csv: tuple[Path, ...]
    figures: tuple[Path, ...]
    sections: tuple[Section, ...]


def write_ablation(
    store: Record,
    name: str,
    out_dir: Path,
    *,
    beside: Sequence[str] = (),
) -> AblationPaths:
    """Write an ablation's report into a folder, over an earlier one.

    Args:
        store: The record.
        name: The ablation's study.
        out_dir: Made where it is missing.
        beside: Further ablations, on other datasets, to be compared in one table.

    Raises:
        RecordError: There is no such study, or it is no ablation.
    """
    ablations = read_ablations(store, name)
    others = [read_ablations(store, other)[0] for other in beside]
    pairs = sections_of(ablations)
    across = compare_across([ablations[0], *others]) if others else None
    out_dir.mkdir(parents=True, exist_ok=True)
    sections = [
        replace(section, drawings=tuple(drawn(plan) for plan in section.plans))
        for _, section in pairs
    ]
    drawings = [drawing for section in sections for drawing in section.drawings]
    grids = [grid for section in sections for grid in section.grids]
    if across:
        grids += across.grids
    contents = _contents(ablations, sections, across)
    paths = AblationPaths(
        html=out_dir / "ablation.html",
        markdown=out_dir / "tables.md",
        latex=out_dir / "tables.tex",
        csv=tuple(_write_csv(pairs, out_dir)),
        figures=save_figures(drawings, out_dir / "figures"),
        sections=tuple(sections),
    )
    paths.html.write_text(render_template("ablation.html", contents), encoding="utf-8")
    paths.markdown.write_text("\n\n".join(map(to_markdown, grids)) + "\n", encoding="utf-8")
    methods = "\n\n".join(section.methods for section in sections)
    paths.latex.write_text(latex_document(name, grids, methods), encoding="utf-8")
    return paths


def _write_csv(pairs: Sequence[tuple[Ablation, Section]], out_dir: Path) -> Iterator[Path]:
    for ablation, section in pairs:
        if section.effects:
            path = out_dir / f"{section.name}-effects.csv"
            text = tables.effects_csv(ablation, section.effects)
            path.write_text(text, encoding="utf-8", newline="")
            yield path
        if ablation.spec["coded"]:
            path = out_dir / f"{section.name}-effects.csv"
            text = tables.contrasts_csv(estimate_contrasts(ablation))
            path.write_text(text, encoding="utf-8", newline="")
            yield path
        path = out_dir / f"{section.name}-runs.csv"
        path.write_text(tables.runs_csv(ablation), encoding="utf-8", newline="")
        yield path


def _contents(
    ablations: Sequence[Ablation], sections: Sequence[Section], across: Across | None
) -> dict[str, Any]:
    first = ablations[0]
    return {
        "study": first.study,
        "data": data_words(first),
        "written": moment(datetime.now(UTC)),
        "warnings": [str(text) for text in first.study.data.get("warnings", [])],
        "sections": sections,
        "across": across,
        "commands": [hide_password(a.design.command) for a in ablations],
        "config": config_words(first.study.config),
    }
