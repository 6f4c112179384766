"""Write the report of a study: one HTML page, the trials as CSV, and every figure as SVG."""

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from reports import tables
from reports.audit import Audit, audit_of, audited_grid, rank_grid
from reports.figures import Drawing, draw_figures, save_figures
from reports.importance import Importance, estimate_importance
from reports.record import SearchRecord, read_record
from reports.summary import summarise
from reports.templating import render_template
from reports.words import config_words, moment
from study.record.record import Record


@dataclass(frozen=True, slots=True)
class ReportPaths:
    """Where a report's files lie.

    Attributes:
        html: The page, complete in itself.
        csv: All trials.
        figures: SVG of each figure.
    """

    html: Path
    csv: Path
    figures: tuple[Path, ...]


def write_report(store: Record, study_name: str, out_dir: Path) -> ReportPaths:
    """Write a study's report into a folder, over an earlier one.

    Reads the database only. The same record gives the same figures and numbers.

    Args:
        store: The record.
        study_name: Which study.
        out_dir: Made where it is missing.

    Raises:
        RecordError: There is no such study.
    """
    record = read_record(store, study_name)
    rng = np.random.default_rng(_seed(study_name))
    importance = estimate_importance(record.trials, record.epochs, record.dims, rng)
    audit = audit_of(record)
    drawings = draw_figures(record, importance, audit.early)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = ReportPaths(
        html=out_dir / "report.html",
        csv=out_dir / "trials.csv",
        figures=save_figures(drawings, out_dir / "figures"),
    )
    contents = _contents(record, importance, audit, drawings)
    paths.html.write_text(render_template("report.html", contents), encoding="utf-8")
    paths.csv.write_text(tables.trials_csv(record.trials), encoding="utf-8", newline="")
    return paths


def _seed(name: str) -> int:
    """Seed the bootstrap by the study's name, so that a report repeats itself."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _contents(
    record: SearchRecord, importance: Importance, audit: Audit, drawings: list[Drawing]
) -> dict[str, Any]:
    """Collect what the template shows."""
    summary = summarise(record, importance)
    slices = [drawing for drawing in drawings if drawing.name.startswith("slice-")]
    return {
        "study": record.study,
        "record": record,
        "summary": summary,
        "importance": importance,
        "audit": audit,
        "audit_grids": [grid for grid in (rank_grid(audit), audited_grid(audit)) if grid.rows],
        "basis": tables.importance_basis(importance),
        "figure": {drawing.name: drawing for drawing in drawings},
        "slices": slices,
        "best": tables.best_table(record),
        "epochs": tables.epochs_table(record),
        "tests": tables.tests_table(summary),
        "importances": tables.importance_table(importance),
        "confused": tables.confused_table(record),
        "trials": tables.trials_table(record),
        "data": tables.data_table(record),
        "space": tables.space_table(record.dims),
        "runs": tables.runs_table(record),
        "warnings": [str(warning) for warning in record.study.data.get("warnings", [])],
        "config": config_words(record.study.config),
        "best_config": _json(record.best.config) if record.best else "",
        "written": moment(datetime.now(UTC)),
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
