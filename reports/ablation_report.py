"""Write an ablation's report: HTML, Markdown, LaTeX, CSV, and figures as PNG, SVG and PDF."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reports import ablation_tables as tables
from reports.ablation import Ablation, read_ablations
from reports.ablation_plots import (
    forest_size,
    plot_cell_means,
    plot_forest,
    plot_half_normal,
    plot_interactions,
    plot_main_effects,
    plot_path,
    plot_seeds,
    set_footer,
    short_footer,
)
from reports.across import Across, compare_across
from reports.effects import Effect, Verdict, roughly
from reports.factorial import (
    Contrast,
    analyse_variance,
    estimate_contrasts,
    has_interactions,
    interaction_means,
    main_effect_means,
)
from reports.figures import Draw, Drawing, Plan, drawn, save_figures
from reports.methods import data_words, methods_paragraph, test_split_words
from reports.path import Step, path_steps
from reports.publish import (
    Grid,
    difference_words,
    latex_document,
    p_equals,
    plus_minus,
    signed,
)
from reports.ranks import RankMethod
from reports.templating import render_template
from reports.words import moment, plural
from study.passwords import hide_password
from study.store import Store

_MOST_MAPS = 6
_TITLES = {
    "ofat": "One factor at a time",
    "loco": "Leave one component out",
    "factorial": "Factorial",
    "screen": "Screening",
    "path": "Path",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A sentence of the summary.

    Attributes:
        head: What kind of finding it is.
        text: The rest.
    """

    head: str
    text: str


@dataclass(frozen=True, slots=True)
class Card:
    """A figure at the top of a section."""

    name: str
    figure: str
    more: str


@dataclass(frozen=True, slots=True)
class Section:
    """What the report says of one design.

    Attributes:
        name: Of its files, and its place in the page.
        title: Its heading.
        cards: Figures at a glance.
        findings: What helped, what hurt, what is open.
        grids: Tables.
        plans: Figures, to be drawn.
        methods: Paragraph for a paper.
        effects: Against the baseline; empty for other designs.
        drawings: The figures, where they have been drawn.
    """

    name: str
    title: str
    cards: tuple[Card, ...]
    findings: tuple[Finding, ...]
    grids: tuple[Grid, ...]
    plans: tuple[Plan, ...]
    methods: str
    effects: tuple[Effect, ...]
    drawings: tuple[Drawing, ...] = ()


@dataclass(frozen=True, slots=True)
class AblationPaths:
    """Where an ablation's report lies.

    Attributes:
        html: The page, complete in itself.
        markdown: The same as text.
        latex: Every table, in a document that compiles.
        csv: Effects and runs, unrounded.
        figures: PNG, SVG and PDF of each.
    """

    html: Path
    markdown: Path
    latex: Path
    csv: tuple[Path, ...]
    figures: tuple[Path, ...]


def describe_ablation(store: Store, name: str) -> list[Section]:
    """Analyse every design of an ablation, the last one used first.

    Raises:
        StoreError: There is no such study, or it is no ablation.
    """
    return [section for _, section in _sections(read_ablations(store, name))]


def _sections(ablations: Sequence[Ablation]) -> list[tuple[Ablation, Section]]:
    """Analyse designs; the first one of a kind that was made keeps the plain name for good."""
    names: dict[int, str] = {}
    for ablation in sorted(ablations, key=lambda each: each.design.id):
        n = sum(name.split("-")[0] == ablation.kind for name in names.values())
        names[ablation.design.id] = ablation.kind + (f"-{n + 1}" if n else "")
    return [(each, _section(each, names[each.design.id])) for each in ablations]


def write_ablation(
    store: Store,
    name: str,
    out_dir: Path,
    *,
    beside: Sequence[str] = (),
    method: RankMethod = "nemenyi",
) -> AblationPaths:
    """Write an ablation's report into a folder, over an earlier one.

    Args:
        store: The record.
        name: The ablation's study.
        out_dir: Made where it is missing.
        beside: Further ablations, on other data sets, to be compared in one table.
        method: How pairs of levels are tested across data sets.

    Raises:
        StoreError: There is no such study, or it is no ablation.
    """
    ablations = read_ablations(store, name)
    others = [read_ablations(store, other)[0] for other in beside]
    pairs = _sections(ablations)
    across = compare_across([ablations[0], *others], method) if others else None
    out_dir.mkdir(parents=True, exist_ok=True)
    sections = [
        replace(section, drawings=tuple(drawn(plan) for plan in section.plans))
        for _, section in pairs
    ]
    drawings = [drawing for section in sections for drawing in section.drawings]
    grids = [grid for section in sections for grid in section.grids]
    if across:
        drawings += across.drawings
        grids += across.grids
    told = _contents(ablations, sections, across)
    paths = AblationPaths(
        html=out_dir / "ablation.html",
        markdown=out_dir / "ablation.md",
        latex=out_dir / "ablation.tex",
        csv=tuple(_write_csv(pairs, out_dir)),
        figures=save_figures(drawings, out_dir / "figures"),
    )
    paths.html.write_text(render_template("ablation.html", told), encoding="utf-8")
    paths.markdown.write_text(render_template("ablation.md", told), encoding="utf-8")
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
        if ablation.kind in ("factorial", "screen"):
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
    config = json.dumps(first.study.config, indent=2, ensure_ascii=False, default=str)
    return {
        "study": first.study,
        "data": data_words(first),
        "written": moment(datetime.now(UTC)),
        "warnings": [str(text) for text in first.study.data.get("warnings", [])],
        "sections": sections,
        "across": across,
        "commands": [hide_password(a.design.command) for a in ablations],
        "config": hide_password(config),
    }


def _section(ablation: Ablation, name: str) -> Section:
    """Analyse a design: its kind decides what is estimated and drawn."""
    analyse = {
        "ofat": _levels,
        "loco": _levels,
        "factorial": _factorial,
        "screen": _screening,
        "path": _path,
    }[ablation.kind]
    section = analyse(ablation, name)
    failures = tables.failures_grid(ablation)
    grids = (*section.grids, failures) if failures else section.grids
    renamed = tuple(replace(grid, name=f"{name}-{grid.name}") for grid in grids)
    number = name.removeprefix(ablation.kind).strip("-")
    title = f"{section.title} ({number})" if number else section.title
    return replace(section, title=title, grids=renamed)


def _figure(
    ablation: Ablation, name: str, title: str, caption: str, draw: Draw, **more: Any
) -> Plan:
    def with_footer(ax: Any) -> None:
        draw(ax)
        set_footer(ax, short_footer(ablation))

    return Plan(name, title, caption, with_footer, with_pdf=True, **more)


def _cards(ablation: Ablation) -> list[Card]:
    base = ablation.baseline
    n_runs = sum(runs.arm.n_run for runs in ablation.runs)
    n_failed = sum(runs.arm.n_failed for runs in ablation.runs)
    missing = f", {ablation.n_missing} still missing" if ablation.n_missing else ""
    cards = []
    if base is not None:
        cards.append(Card("Baseline", f"{plus_minus(base.arm.accuracy)} %", "validation accuracy"))
    first = int(ablation.spec["first_seed"])
    n = ablation.replicates
    seeds = f"seeds {first} to {first + n - 1}" if n > 1 else f"seed {first}"
    cards.append(Card("Replicates", str(n), f"{seeds}, paired over settings"))
    cards.append(Card("Runs", str(n_runs), f"{n_failed} failed{missing}"))
    cards.append(
        Card("Test split", "read" if ablation.n_tested else "not used", _kept_aside(ablation))
    )
    return cards


def _kept_aside(ablation: Ablation) -> str:
    n = int(ablation.study.data.get("n_test") or 0)
    if not n:
        return "there is none"
    if ablation.n_tested:
        return f"{n} pictures, {plural(ablation.n_tested, 'run')}"
    return f"{n} pictures kept aside"


def _levels(ablation: Ablation, name: str) -> Section:
    effects = ablation.effects()
    grids = [tables.effects_grid(ablation, effects)]
    on_test = tables.test_grid(ablation, ablation.test_effects())
    mcnemar = tables.mcnemar_grid(ablation)
    grids += [grid for grid in (on_test, mcnemar) if grid is not None]
    base = ablation.baseline
    assert base is not None, "such a design has its baseline"
    first = int(ablation.spec["first_seed"])
    size = forest_size(len(effects))
    plans = [
        _figure(
            ablation, f"{name}-forest", "Effects",
            "Difference of each level to the baseline with its 95 % interval; the shape is the "
            "verdict after correction, the band the margin of what does not matter.",
            lambda ax: plot_forest(effects, ablation.rules, ax), size=size,
        ),
        _figure(
            ablation, f"{name}-seeds", "Seed by seed",
            "Every run. A line joins the runs of one seed: where lines run parallel, the seeds "
            "agree about the differences.",
            lambda ax: plot_seeds([base, *ablation.others], first, ax), size=size,
        ),
    ]  # fmt: skip
    return Section(
        name, _TITLES[ablation.kind], tuple(_cards(ablation)),
        tuple(_level_findings(ablation, effects)), tuple(grids),
        tuple(plans), methods_paragraph(ablation, effects), tuple(effects),
    )  # fmt: skip


def _level_findings(ablation: Ablation, effects: Sequence[Effect]) -> Iterator[Finding]:
    margin = f"±{100 * ablation.rules.margin:g} points"
    heads: dict[Verdict, str] = {
        "helps": "Better than the baseline:",
        "hurts": "Worse than the baseline:",
        "no difference": f"No difference beyond {margin}:",
        "fails": "Runs failed:",
        "undecided": "Undecided:",
    }
    for verdict, head in heads.items():
        found = [effect for effect in effects if effect.verdict == verdict]
        if not found:
            if verdict in ("helps", "hurts"):
                yield Finding(head, "no level, by the corrected test.")
            continue
        found.sort(key=lambda effect: -abs(effect.difference.estimate))
        yield Finding(head, "; ".join(_told(effect) for effect in found) + ".")
    yield _care(ablation)
    yield Finding("Test split:", test_split_words(ablation))


def _care(ablation: Ablation) -> Finding:
    """Say in a sentence what the findings rest on."""
    data, n = ablation.study.data, ablation.replicates
    split = "splits drawn anew for each seed" if ablation.is_resplit else "a fixed split"
    return Finding(
        "Read with care:",
        f"{plural(n, 'seed')} on {data.get('n_val', 0)} validation pictures ({split}), each run "
        "at its best epoch. The intervals say what other seeds would give, not other pictures or "
        "other data; p values are corrected for all levels together.",
    )


def _told(effect: Effect) -> str:
    label, points = effect.arm.label, signed(100 * effect.difference.estimate, 1)
    if effect.verdict == "fails":
        return f"{label} ({effect.arm.n_failed} of {effect.arm.n_run} runs)"
    if effect.verdict == "undecided":
        if effect.n < 2:
            return f"{label} ({'too few replicates' if effect.n else 'not run yet'})"
        more = "over 1,000" if effect.n_needed is None else f"about {roughly(effect.n_needed)}"
        return f"{label} ({points} points; {more} replicates would settle it)"
    if effect.verdict == "no difference":
        return f"{label} ({points} points)"
    return f"{label} ({points} points, {p_equals(effect.p_family)})"


def _contrast_findings(contrasts: Sequence[Contrast], alpha: float) -> Iterator[Finding]:
    def is_clear(contrast: Contrast) -> bool:
        p = contrast.p_family if math.isfinite(contrast.p_family) else contrast.p
        return p <= alpha

    if not contrasts:
        yield Finding("Not estimated:", "no replicate has a finished run of every setting.")
        return
    clear = [contrast for contrast in contrasts if is_clear(contrast)]
    told = "; ".join(
        f"{c.name}{f' from {c.low} to {c.high}' if c.high else ' (interaction)'} "
        f"({difference_words(c.effect)} points)"
        for c in clear
    )
    yield Finding("Matters:", f"{told}." if told else "no effect is told from noise.")
    rest = [contrast.name for contrast in contrasts if not is_clear(contrast)]
    if rest:
        yield Finding("Not told from noise:", ", ".join(rest) + ".")


def _factorial(ablation: Ablation, name: str) -> Section:
    contrasts, sources = estimate_contrasts(ablation), analyse_variance(ablation)
    names = [str(factor["name"]) for factor in ablation.spec["factors"]]
    grids = []
    if contrasts:
        grids.append(tables.contrasts_grid(ablation, contrasts))
    if sources:
        grids.append(tables.anova_grid(ablation, sources))
    grids.append(tables.cells_grid(ablation))
    means = [(factor, main_effect_means(ablation, factor)) for factor in names]
    plans = [
        _figure(
            ablation, f"{name}-main-effects", "Main effects",
            "Mean accuracy by level with its 95 % interval, all other factors averaged.",
            lambda ax: plot_main_effects(means, ax), size=(5.2, 3.8),
        )
    ]  # fmt: skip
    if contrasts and has_interactions(ablation):
        plans.append(
            _figure(
                ablation, f"{name}-interactions", "Effects and interactions",
                "Main effects on the diagonal, interactions below it; a star: p ≤ 0.05 after "
                "Holm’s correction.",
                lambda ax: plot_interactions(contrasts, names, ax),
                size=(2.6 + 0.5 * len(names), 2.2 + 0.45 * len(names)),
            )
        )  # fmt: skip
    plans += list(_maps(ablation, name, names, contrasts))
    if sources and not contrasts:
        clear = [s for s in sources[:-1] if s.p <= ablation.rules.alpha and s.name != "replicate"]
        told = "; ".join(
            f"{s.name} ({p_equals(s.p)}, partial η² = {s.partial_eta_squared:.2f})" for s in clear
        )
        findings = [Finding("Matters:", f"{told}." if told else "no effect is told from noise.")]
    else:
        findings = list(_contrast_findings(contrasts, ablation.rules.alpha))
    findings.append(Finding("Design:", f"{ablation.spec['construction']}."))
    findings.append(Finding("Test split:", test_split_words(ablation)))
    return Section(
        name, _TITLES[ablation.kind], tuple(_cards(ablation)), tuple(findings), tuple(grids),
        tuple(plans), methods_paragraph(ablation, []), (),
    )  # fmt: skip


def _maps(
    ablation: Ablation, name: str, names: Sequence[str], contrasts: Sequence[Contrast]
) -> Iterator[Plan]:
    """Plan the heat maps of two factors' cells: of the strongest interactions, or the first."""
    pairs = [(a, b) for k, a in enumerate(names) for b in names[k + 1 :]]
    size = {c.name: abs(c.effect.estimate) for c in contrasts}
    pairs.sort(key=lambda pair: -size.get(f"{pair[0]} × {pair[1]}", 0.0))
    if ablation.spec["resolution"] is not None and not has_interactions(ablation):
        return
    if not any(runs.arm.n_run > runs.arm.n_failed for runs in ablation.runs):
        return
    for a, b in pairs[:_MOST_MAPS]:
        yield _figure(
            ablation, f"{name}-cells-{a}-{b}", f"{a} × {b}",
            "Mean accuracy by the levels of two factors, all else averaged.",
            _map_draw(ablation, a, b), size=(4.2, 3.0),
        )  # fmt: skip


def _map_draw(ablation: Ablation, a: str, b: str) -> Callable[[Any], Any]:
    table = interaction_means(ablation, a, b)
    return lambda ax: plot_cell_means(table, ax)


def _screening(ablation: Ablation, name: str) -> Section:
    contrasts = estimate_contrasts(ablation)
    grids = [tables.cells_grid(ablation)]
    plans: list[Plan] = []
    if contrasts:
        grids.insert(0, tables.contrasts_grid(ablation, contrasts))
        plan = _figure(
            ablation, f"{name}-half-normal", "Half-normal plot",
            "Effects by size: those of noise lie on the line, those that leave it to the right "
            "are more.",
            lambda ax: plot_half_normal(contrasts, ax), size=(4.8, 3.6),
        )  # fmt: skip
        plans.append(plan)
    findings = list(_contrast_findings(contrasts, ablation.rules.alpha))
    findings.append(Finding("Design:", f"{ablation.spec['construction']}."))
    findings.append(Finding("Test split:", test_split_words(ablation)))
    return Section(
        name, _TITLES[ablation.kind], tuple(_cards(ablation)), tuple(findings), tuple(grids),
        tuple(plans), methods_paragraph(ablation, []), (),
    )  # fmt: skip


def _path(ablation: Ablation, name: str) -> Section:
    steps = path_steps(ablation)
    plan = _figure(
        ablation, f"{name}-waterfall", "Path",
        "Each bar is what a step gained over the one before; whiskers are its interval over all "
        "candidates of the step.",
        lambda ax: plot_path(steps, ax), size=forest_size(len(steps) + 1),
    )  # fmt: skip
    findings = list(_path_findings(steps, ablation.rules.alpha))
    findings.append(Finding("Test split:", test_split_words(ablation)))
    grids = (tables.path_grid(ablation, steps), tables.cells_grid(ablation))
    return Section(
        name, _TITLES[ablation.kind], tuple(_cards(ablation)), tuple(findings), grids,
        (plan,), methods_paragraph(ablation, []), (),
    )  # fmt: skip


def _path_findings(steps: Sequence[Step], alpha: float) -> Iterator[Finding]:
    if len(steps) < 2:
        yield Finding("Path:", "no step was finished yet.")
        return
    order = ", then ".join(step.factor for step in steps[1:])
    yield Finding("Order:", f"{order}.")
    clear = [
        f"{step.factor} ({difference_words(step.gain)} points)"
        for step in steps[1:]
        if step.gain is not None and step.p <= alpha
    ]
    yield Finding(
        "Steps that changed the accuracy:",
        "; ".join(clear) + "." if clear else "none, by its test.",
    )
    total = steps[-1].total
    if total is not None:
        n = plural(len(steps) - 1, "step")
        yield Finding("In all:", f"{difference_words(total)} points over {n}.")
