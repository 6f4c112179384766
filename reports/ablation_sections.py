"""What an ablation's report says of each design: figures at a glance, findings, tables, plots."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reports import ablation_tables as tables
from reports.ablation import Ablation, read_ablations
from reports.ablation_findings import (
    Finding,
    contrast_findings,
    level_findings,
    path_findings,
)
from reports.ablation_plots import (
    forest_size,
    plot_cell_means,
    plot_forest,
    plot_interactions,
    plot_main_effects,
    plot_path,
    plot_seeds,
)
from reports.effects import Effect
from reports.factorial import (
    Contrast,
    analyse_variance,
    estimate_contrasts,
    interaction_means,
    main_effect_means,
)
from reports.figures import Draw, Drawing, Plan
from reports.methods import methods_paragraph, test_split_words
from reports.path import path_steps
from reports.publish import Grid, p_equals, plus_minus
from reports.words import plural
from study.record.record import Record

_MOST_MAPS = 6
_TITLES = {
    "ofat": "One factor at a time",
    "loco": "Leave one component out",
    "factorial": "Factorial",
    "path": "Path",
}


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


def describe_ablation(store: Record, name: str) -> list[Section]:
    """Analyse every design of an ablation, the last one used first.

    Raises:
        RecordError: There is no such study, or it is no ablation.
    """
    return [section for _, section in sections_of(read_ablations(store, name))]


def sections_of(ablations: Sequence[Ablation]) -> list[tuple[Ablation, Section]]:
    """Analyse designs; the first one of a kind that was made keeps the plain name for good."""
    names: dict[int, str] = {}
    for ablation in sorted(ablations, key=lambda each: each.design.id):
        n = sum(name.split("-")[0] == ablation.kind for name in names.values())
        names[ablation.design.id] = ablation.kind + (f"-{n + 1}" if n else "")
    return [(each, _section(each, names[each.design.id])) for each in ablations]


def _section(ablation: Ablation, name: str) -> Section:
    """Analyse a design: its kind decides what is estimated and drawn."""
    analyse = {
        "ofat": _levels,
        "loco": _levels,
        "factorial": _factorial,
        "path": _path,
    }[ablation.kind]
    section = analyse(ablation, name)
    failures = tables.failures_grid(ablation)
    grids = (*section.grids, failures) if failures else section.grids
    renamed = tuple(replace(grid, name=f"{name}-{grid.name}") for grid in grids)
    number = name.removeprefix(ablation.kind).strip("-")
    title = f"{section.title} ({number})" if number else section.title
    return replace(section, title=title, grids=renamed)


def _figure(name: str, title: str, caption: str, draw: Draw, **more: Any) -> Plan:
    return Plan(name, title, caption, draw, is_for_paper=True, **more)


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
        return f"{n} images, {plural(ablation.n_tested, 'run')}"
    return f"{n} images kept aside"


def _levels(ablation: Ablation, name: str) -> Section:
    effects = ablation.effects()
    grids = [tables.effects_grid(ablation, effects)]
    on_test = tables.test_grid(ablation, ablation.test_effects())
    if on_test is not None:
        grids.append(on_test)
    base = ablation.baseline
    assert base is not None, "such a design has its baseline"
    first = int(ablation.spec["first_seed"])
    size = forest_size(len(effects))
    plans = [
        _figure(
            f"{name}-forest", "Effects",
            "Difference of each level to the baseline with its 95 % interval; the shape is the "
            "verdict after correction, the band the margin of what does not matter.",
            lambda ax: plot_forest(effects, ablation.rules, ax), size=size,
        ),
        _figure(
            f"{name}-seeds", "Seed by seed",
            "Every run. A line joins the runs of one seed: where lines run parallel, the seeds "
            "agree about the differences.",
            lambda ax: plot_seeds([base, *ablation.others], first, ax), size=size,
        ),
    ]  # fmt: skip
    return Section(
        name, _TITLES[ablation.kind], tuple(_cards(ablation)),
        tuple(level_findings(ablation, effects)), tuple(grids),
        tuple(plans), methods_paragraph(ablation, effects), tuple(effects),
    )  # fmt: skip


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
            f"{name}-main-effects", "Main effects",
            "Mean accuracy by level with its 95 % interval, all other factors averaged.",
            lambda ax: plot_main_effects(means, ax), size=(5.2, 3.8),
        )
    ]  # fmt: skip
    if contrasts:
        plans.append(
            _figure(
                f"{name}-interactions", "Effects and interactions",
                "Main effects on the diagonal, interactions below it; a star: p ≤ 0.05 after "
                "Holm’s correction.",
                lambda ax: plot_interactions(contrasts, names, ax),
                size=(2.6 + 0.5 * len(names), 2.2 + 0.45 * len(names)),
            )
        )  # fmt: skip
    plans += list(_maps(ablation, name, names, contrasts))
    if sources and not contrasts:
        clear = [s for s in sources[:-1] if s.p <= ablation.rules.alpha and s.name != "replicate"]
        text = "; ".join(
            f"{s.name} ({p_equals(s.p)}, partial η² = {s.partial_eta_squared:.2f})" for s in clear
        )
        findings = [
            Finding("Matters:", f"{text}." if text else "no effect is distinguishable from noise.")
        ]
    else:
        findings = list(contrast_findings(contrasts, ablation.rules.alpha))
    findings.append(Finding("Design:", f"{ablation.spec['construction']}."))
    return _without_levels(ablation, name, findings, grids, plans)


def _maps(
    ablation: Ablation, name: str, names: Sequence[str], contrasts: Sequence[Contrast]
) -> Iterator[Plan]:
    """Plan the heat maps of two factors' cells: of the strongest interactions, or the first."""
    pairs = [(a, b) for k, a in enumerate(names) for b in names[k + 1 :]]
    size = {c.name: abs(c.effect.estimate) for c in contrasts}
    pairs.sort(key=lambda pair: -size.get(f"{pair[0]} × {pair[1]}", 0.0))
    if not any(runs.arm.n_run > runs.arm.n_failed for runs in ablation.runs):
        return
    for a, b in pairs[:_MOST_MAPS]:
        yield _figure(
            f"{name}-cells-{a}-{b}", f"{a} × {b}",
            "Mean accuracy by the levels of two factors, all else averaged.",
            _map_draw(ablation, a, b), size=(4.2, 3.0),
        )  # fmt: skip


def _map_draw(ablation: Ablation, a: str, b: str) -> Callable[[Any], Any]:
    table = interaction_means(ablation, a, b)
    return lambda ax: plot_cell_means(table, ax)


def _path(ablation: Ablation, name: str) -> Section:
    steps = path_steps(ablation)
    plan = _figure(
        f"{name}-waterfall", "Path",
        "Each bar is what a step gained over the one before; whiskers are its interval over all "
        "candidates of the step.",
        lambda ax: plot_path(steps, ax), size=forest_size(len(steps) + 1),
    )  # fmt: skip
    findings = list(path_findings(steps, ablation.rules.alpha))
    grids = [tables.path_grid(ablation, steps), tables.cells_grid(ablation)]
    return _without_levels(ablation, name, findings, grids, [plan])


def _without_levels(
    ablation: Ablation,
    name: str,
    findings: Sequence[Finding],
    grids: Sequence[Grid],
    plans: Sequence[Plan],
) -> Section:
    """Put together what is said of a design that does not compare levels with a baseline."""
    on_test = Finding("Test split:", test_split_words(ablation))
    return Section(
        name, _TITLES[ablation.kind], tuple(_cards(ablation)), (*findings, on_test), tuple(grids),
        tuple(plans), methods_paragraph(ablation, []), (),
    )  # fmt: skip
