"""The report of an ablation: what each design shows, as a page, tables, figures and CSV."""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import fisher_exact

from reports.ablation import BASELINE, Ablation, Split, read_ablations
from reports.ablation_plots import (
    Plot,
    plot_forest,
    plot_interaction,
    plot_path,
    plot_replicates,
    plot_training_size,
)
from reports.across import compare_across
from reports.disagreement import Disagreement, disagreements
from reports.effects import Effect, fallen, judge
from reports.methods import (
    analyses_words,
    bias_words,
    data_words,
    methods_paragraph,
    scope_words,
    seeds_words,
)
from reports.page import render_template
from reports.publish import (
    Grid,
    difference_words,
    latex_document,
    mean_words,
    p_equals,
    p_words,
    seconds_words,
    signed,
    to_markdown,
)
from reports.words import config_words, count, moment, plural
from study.config.formatting import hide_password
from study.record.record import Record

_MOST_INTERACTIONS = 3
_IN_REACH = 10  # times as many images as there are; of more nothing is said
_HEADS = {
    "improves": "Improves:",
    "degrades": "Degrades:",
    "improves on these images": "Improves on these images:",
    "degrades on these images": "Degrades on these images:",
    "equivalent": "Equivalent, within ±{margin:g} points:",
    "identical": "Identical predictions in all replicates:",
    "fails": "Runs failed:",
    "leaning": "Inconclusive, though its own interval excludes 0:",
    "inconclusive": "Inconclusive:",
    "unfinished": "Not finished, so not tested:",
}


@dataclass(frozen=True, slots=True)
class Section:
    """What the report says of one design.

    Attributes:
        name: Of its files, and its place in the page.
        cards: Name, figure and explanation of figures at a glance.
        findings: What improves, what degrades, what is open: what kind it is, and a sentence.
        methods: Paragraph for a paper.
        effects: What was compared.
        on_test: The same on the test split.
        disagreement: The images on which a level and the baseline differ most; None where their
            names are not known.
    """

    ablation: Ablation
    name: str
    title: str
    cards: tuple[tuple[str, str, str], ...]
    findings: tuple[tuple[str, str], ...]
    grids: tuple[Grid, ...]
    plots: tuple[Plot, ...]
    methods: str
    effects: tuple[Effect, ...]
    on_test: tuple[Effect, ...]
    disagreement: Disagreement | None


@dataclass(frozen=True, slots=True)
class AblationPaths:
    """Where an ablation's report lies.

    Attributes:
        html: The page, complete in itself.
        markdown: Every table.
        latex: Every table, and the methods, in a document that compiles.
        csv: Effects and runs, unrounded.
        figures: PDF, SVG and PNG of each, for one and for two columns.
        sections: What it says of each design, the last one used first.
    """

    html: Path
    markdown: Path
    latex: Path
    csv: tuple[Path, ...]
    figures: tuple[Path, ...]
    sections: tuple[Section, ...]


# What is said of a design


def describe_ablation(store: Record, name: str) -> list[Section]:
    """Analyse every design of an ablation, the last one used first.

    The first one of a kind that was made keeps the plain name for good.

    Raises:
        RecordError: There is no such study, or it is no ablation.
    """
    ablations = read_ablations(store, name)
    names: dict[int, str] = {}
    for ablation in sorted(ablations, key=lambda each: each.spec["analyses"][0]["order"]):
        n = sum(own.split("-")[0] == ablation.kind for own in names.values())
        names[ablation.design.id] = ablation.kind + (f"-{n + 1}" if n else "")
    return [_section(store, each, names[each.design.id]) for each in ablations]


def _section(store: Record, ablation: Ablation, name: str) -> Section:
    effects = judge(ablation)
    on_test = judge(ablation, "test")
    found = disagreements(store, ablation, effects)
    grids = [effects_grid(ablation, effects), cells_grid(ablation)]
    if on_test:
        grids.append(effects_grid(ablation, on_test, "test"))
    if found:
        grids.append(found.by_class)
    if failures := failures_grid(ablation):
        grids.append(failures)
    number = name.removeprefix(ablation.kind).strip("-")
    return Section(
        ablation=ablation,
        name=name,
        title=str(ablation.spec["title"]) + (f" ({number})" if number else ""),
        cards=tuple(_cards(ablation)),
        findings=tuple(_findings(ablation, effects, on_test)),
        grids=tuple(replace(grid, name=f"{name}-{grid.name}") for grid in grids),
        plots=tuple(replace(p, name=f"{name}-{p.name}") for p in _plots(ablation, effects)),
        methods=methods_paragraph(ablation),
        effects=tuple(effects),
        on_test=tuple(on_test),
        disagreement=found,
    )


def _cards(ablation: Ablation) -> Iterator[tuple[str, str, str]]:
    if ablation.baseline is not None:
        spread = "validation accuracy, mean ± SD over replicates"
        yield "Baseline, %", mean_words(ablation.baseline.accuracies["val"]), spread
    folds = f", {ablation.n_folds} folds" if ablation.n_folds > 1 else ""
    how = f"{seeds_words(ablation)}{folds}, paired over settings"
    yield "Replicates", str(ablation.replicates), how if ablation.replicates else "none yet"
    n_failed = sum(runs.n_failed for runs in ablation.runs)
    missing = f", {ablation.n_missing} missing" if ablation.n_missing else ""
    yield "Runs", str(sum(runs.n_run() for runs in ablation.runs)), f"{n_failed} failed{missing}"
    parts = (
        f"{ablation.n_folds} folds, one for each replicate in turn" if ablation.n_folds > 1 else ""
    )
    yield "Images", count(ablation.n_images), parts or "by which all runs are judged"
    n_test = int(ablation.study.data["n_test"])
    if ablation.n_tested:
        used = f"{plural(ablation.n_tested, 'run')} on {n_test} images"
    else:
        used = f"{n_test} images kept apart" if n_test else "there is none"
    yield "Test split", "read" if ablation.n_tested else "not read", used


def _findings(
    ablation: Ablation, effects: Sequence[Effect], on_test: Sequence[Effect]
) -> Iterator[tuple[str, str]]:
    """Say what improves, what degrades and what is open, and over what that generalises."""
    is_tested = any(effect.verdict != "unfinished" for effect in effects)
    for verdict, head in _HEADS.items():
        found = [effect for effect in effects if _heading(effect) == verdict]
        if found:
            found.sort(key=lambda effect: -abs(effect.difference.estimate))
            text = "; ".join(_finding_words(effect, ablation.n_images) for effect in found)
            yield head.format(margin=100 * ablation.margin), f"{text}."
        elif verdict in ("improves", "degrades") and is_tested:
            yield head, "nothing, by the corrected test."
    if not effects:
        yield "Not finished:", "no comparison has its runs yet."
    failed = [runs for runs in ablation.runs if runs.n_failed]
    if failed and not any(effect.verdict == "fails" for effect in effects):
        text = "; ".join(f"{r.label} ({r.n_failed} of {r.n_run()} runs)" for r in failed)
        yield _HEADS["fails"], f"{text}."
    yield from _fallen_findings(ablation)
    if ablation.kind == "factorial":
        yield "Design:", f"{ablation.spec['construction']}."
    yield from _test_finding(ablation, effects, on_test)
    yield "Generalises over:", scope_words(ablation)
    if bias := bias_words(ablation):
        yield "The search's choice:", bias
    yield "Analyses:", analyses_words(ablation)


def _heading(effect: Effect) -> str:
    """Return under which heading an effect stands: its verdict, or that it leans to one side."""
    found = effect.difference
    leans = found.low > 0 or found.high < 0
    return "leaning" if leans and effect.verdict == "inconclusive" else effect.verdict


def _test_finding(
    ablation: Ablation, effects: Sequence[Effect], on_test: Sequence[Effect]
) -> Iterator[tuple[str, str]]:
    """Say whether the test split agrees with validation."""
    base = ablation.baseline
    if not on_test or base is None:
        return
    known = {effect.contrast.label: effect.difference.estimate for effect in effects}
    pairs = [(e.difference.estimate, known[e.contrast.label]) for e in on_test]
    n_alike = sum(a * b > 0 for a, b in pairs)
    text = (
        f"the baseline has {mean_words(base.accuracies['test'])} % (in validation "
        f"{mean_words(base.accuracies['val'])} %); {n_alike} of "
        f"{plural(len(pairs), 'difference')} have the sign that they have in validation."
    )
    yield "Test split:", text


def _finding_words(effect: Effect, n_images: int) -> str:
    label, points = effect.contrast.label, signed(100 * effect.difference.estimate, 1)
    if effect.verdict == "fails":
        return f"{label} ({effect.n_failed} of {effect.n_run} runs)"
    if not effect.n:
        return f"{label} (no complete replicate)"
    if effect.verdict == "unfinished":
        return f"{label} ({plural(effect.n, 'replicate')})"
    if effect.verdict == "identical":
        return f"{label} ({effect.n})"
    if effect.verdict == "equivalent":
        return f"{label} ({difference_words(effect.difference)})"
    if effect.verdict.endswith("these images"):
        return (
            f"{label} ({points} points, {p_equals(effect.p_seeds)} over seeds; "
            f"{p_equals(effect.p_family)} with other images)"
        )
    if effect.verdict == "inconclusive":
        if not math.isfinite(effect.p):
            return f"{label} ({points} points; one replicate)"
        return f"{label} ({points} points{_wanted(effect, n_images)})"
    return f"{label} ({points} points, {p_equals(effect.p_family)})"


def _wanted(effect: Effect, n_images: int) -> str:
    """Say what would settle it, as far as the observed scatter lets one guess."""
    if effect.n_needed is not None:
        return f"; about {_roughly(effect.n_needed)} replicates might settle it"
    if effect.images_needed is not None and effect.images_needed <= _IN_REACH * n_images:
        return f"; some {_roughly(effect.images_needed):,} images would show such a difference"
    return ""


def _roughly(n: int) -> int:
    """Round to two figures: an estimate from few replicates has no more."""
    return n if n < 100 else round(n, 2 - len(str(n)))


def _fallen_findings(ablation: Ablation) -> Iterator[tuple[str, str]]:
    """Flag settings of which single runs fell: no comparison of means describes them."""
    texts = []
    base = ablation.baseline
    for runs in ablation.runs:
        lost = len(fallen(runs, ablation.n_folds))
        if not lost:
            continue
        done = runs.done
        words = [f"median {100 * np.median(done):.1f} %, lowest {100 * done.min():.1f} %"]
        if base is not None and runs is not base:
            n, n_lost = len(base.done), len(fallen(base, ablation.n_folds))
            counts = np.array([[lost, len(done) - lost], [n_lost, n - n_lost]])
            words.append(f"baseline {n_lost} of {n}, {p_equals(fisher_exact(counts).pvalue)}")
        texts.append(
            f"{runs.label}: {lost} of {len(done)} replicates fell by more than 5 points "
            f"({'; '.join(words)})"
        )
    if texts:
        text = (
            f"{'; '.join(texts)}. That is also more than the other replicates' scatter and a "
            "fold's images explain: look at the replicates, since a mean does not describe such a "
            "setting. (p: Fisher's exact test of how many fell, not corrected; medians are in the "
            "CSV.)"
        )
        yield "Single runs fell:", text


# Tables


def _confidence_words(effects: Sequence[Effect]) -> str:
    """Say of which confidence the intervals are; they may differ."""
    low, high = (find((e.confidence for e in effects), default=0.95) for find in (min, max))
    return f"{100 * low:.4g} %" if low == high else f"{100 * low:.4g} % or more"


def effects_grid(ablation: Ablation, effects: Sequence[Effect], split: Split = "val") -> Grid:
    """Show every comparison of a design in seven columns, the baseline first."""
    header = (
        "Factor", "Level", "Accuracy, %", f"Difference, points [{_confidence_words(effects)}]",
        "p, corrected", "n", "Verdict",
    )  # fmt: skip
    rows, group = [], ""
    own = ablation.own_levels
    if ablation.baseline is not None:
        values = ablation.baseline.accuracies[split]
        n = np.isfinite(values).sum()
        failed = _failed(ablation.baseline.n_failed)
        rows.append(("baseline", "", mean_words(values), "", "", f"{n}{failed}", "baseline"))
    for effect in effects:
        contrast, accuracy = effect.contrast, ""
        if contrast.cell is not None:
            accuracy = mean_words(ablation.runs[contrast.cell].accuracies[split])
        factor = contrast.factor
        if own.get(factor, BASELINE) != BASELINE:
            factor += f" ({own[factor]})"
        rows.append(
            (
                factor if group != contrast.factor else "",
                contrast.level,
                accuracy,
                difference_words(effect.difference),
                p_words(effect.p_family),
                f"{effect.n}{_failed(effect.n_failed)}",
                effect.verdict,
            )
        )
        group = contrast.factor
    title = f"Ablation of {ablation.spec['origin']}"
    scope = scope_words(ablation, split)
    is_wider = any(effect.confidence > 0.95 for effect in effects)
    wider = " (wider than 95 %, for repeated analyses or selected steps)" if is_wider else ""
    how = "for the candidates of all steps" if ablation.kind == "path" else "by Holm's method"
    note = (
        f"Accuracy: mean ± SD over replicates, each at its best epoch by {ablation.chosen_by}, "
        f"which favours settings with more epochs. In brackets: the baseline's own level. p: "
        f"corrected {how} and for the analyses made so far (compare with {ablation.alpha:g}). "
        f"Intervals, each for itself{wider} (one that excludes 0 may be inconclusive after the "
        f"correction), generalise over {scope}{_composed_words(ablation)}"
    )
    if split == "test":
        title = "The same runs on the test split"
        n_left = sum(not np.isfinite(runs.accuracies["test"]).any() for runs in ablation.runs)
        note += f" {plural(n_left, 'setting')} not tested." if n_left else ""
    name = "effects" if split == "val" else "test"
    return Grid(
        name, title, header, tuple(rows), has_groups=True, n_text=2, is_last_text=True, note=note
    )


def _composed_words(ablation: Ablation) -> str:
    """Say what levels of several settings are made of."""
    texts = []
    for factor in ablation.spec["factors"]:
        for level in factor["levels"]:
            if len(level["overrides"]) > 1:
                settings = ", ".join(f"{k} = {v}" for k, v in level["overrides"].items())
                texts.append(f" {factor['name']} = {level['label']}: {settings}.")
    return "".join(texts)


def _failed(n: int) -> str:
    return f" ({n} failed)" if n else ""


def cells_grid(ablation: Ablation) -> Grid:
    """Show every setting with its accuracy and what it costs."""
    own = ablation.own_levels
    is_alone = ablation.kind in ("ofat", "loco")
    settings = ["Setting"] if is_alone else list(own)
    tested = ["Test accuracy, %"] if ablation.n_tested else []
    rows = tuple(
        (
            *([runs.label] if is_alone else {**own, **runs.levels}.values()),
            mean_words(runs.accuracies["val"]),
            *([mean_words(runs.accuracies["test"])] if tested else []),
            f"{len(runs.done)}{_failed(runs.n_failed)}",
            count(runs.parameters),
            seconds_words(runs.seconds),
        )
        for runs in ablation.runs
    )
    header = (*settings, "Accuracy, %", *tested, "n", "Parameters trained", "Seconds per run")
    n_text = len(settings)
    return Grid("settings", "Every setting and its cost", header, rows, n_text=n_text)


def failures_grid(ablation: Ablation) -> Grid | None:
    """Show the runs that failed, and why; None where none did."""
    rows = tuple(
        (runs.label, str(ablation.first_seed + replicate), reason)
        for runs in ablation.runs
        for replicate, reason in enumerate(runs.failures)
        if reason
    )
    header = ("Setting", "Seed", "Reason")
    return Grid("failures", "Runs that failed", header, rows, n_text=3) if rows else None


# Figures


def _plots(ablation: Ablation, effects: Sequence[Effect]) -> Iterator[Plot]:
    margin = ablation.margin
    yield Plot(
        "forest", "Differences",
        f"Each difference with its interval ({_confidence_words(effects)}), not corrected for the "
        "others; the shape is the verdict after correction; differences within the band, "
        f"±{100 * margin:g} points, do not matter.",
        lambda ax: plot_forest(effects, margin, ax), max(4, len(effects)),
    )  # fmt: skip
    runs = sorted(ablation.runs, key=lambda each: bool(each.levels))
    numbers, k = range(len(runs[0].numbers)), ablation.n_folds
    replicates = [f"seed {ablation.first_seed + r}" for r in numbers]
    if k > 1:
        replicates = [f"fold {r % k + 1}" for r in numbers]
        if len(numbers) > k:
            replicates = [f"{replicates[r]}, division {r // k + 1}" for r in numbers]
    yield Plot(
        "replicates", "Replicate by replicate",
        "Every run. A line joins the runs of one replicate: where lines run parallel, the "
        "replicates agree about the differences.",
        lambda ax: plot_replicates(runs, replicates, ax), max(4, len(runs)),
    )  # fmt: skip
    if ablation.kind == "path":
        cells = [ablation.runs[k] for k in ablation.path_cells()]
        means = [each.mean for each in cells]
        steps = [effect for effect in effects if effect.contrast.factor != "all steps"]
        if all(map(math.isfinite, means)):
            yield Plot(
                "path", "Path",
                "Each bar is what a step gained over the one before; whiskers are its interval, "
                "corrected for all candidates of the path.",
                lambda ax: plot_path(means, steps, ax), len(steps) + 3,
            )  # fmt: skip
    if ablation.kind == "factorial":
        yield from _interaction_plots(ablation, effects)
    yield from _size_plot(ablation)


def _interaction_plots(ablation: Ablation, effects: Sequence[Effect]) -> Iterator[Plot]:
    """Draw the pairs of factors with the strongest interactions."""
    strength: defaultdict[str, float] = defaultdict(float)
    for effect in effects:
        factor, size = effect.contrast.factor, abs(effect.difference.estimate)
        strength[factor] = max(strength[factor], size)
    pairs = itertools.combinations(ablation.own_levels, 2)
    for a, b in sorted(pairs, key=lambda ab: -strength[" × ".join(ab)])[:_MOST_INTERACTIONS]:
        table = cell_means(ablation, a, b)
        if not table.isna().to_numpy().any():
            yield Plot(
                f"interaction-{a}-{b}", f"{a} × {b}",
                "Mean accuracy by the levels of two factors, all else averaged; lines that are "
                "not parallel interact.",
                functools.partial(plot_interaction, table),
            )  # fmt: skip


def cell_means(ablation: Ablation, a: str, b: str) -> pd.DataFrame:
    """Return mean accuracy by the levels of two factors: rows a, columns b; all else averaged."""
    levels = pd.DataFrame([{**ablation.own_levels, **runs.levels} for runs in ablation.runs])
    means = pd.Series([runs.mean for runs in ablation.runs])
    table = means.groupby([levels[a], levels[b]]).mean().unstack(b)
    return table.reindex(index=levels[a].unique(), columns=levels[b].unique())


def _size_plot(ablation: Ablation) -> Iterator[Plot]:
    """Draw accuracy over training images where their share is a factor of its own."""
    cells = zip(ablation.spec["cells"], ablation.runs, strict=True)
    sized = [
        (c["overrides"], runs) for c, runs in cells if [*c["overrides"]] == ["train_fraction"]
    ]
    if ablation.kind != "ofat" or not sized:
        return
    n_train = int(ablation.study.data["n_train"])
    if ablation.n_folds > 1:
        n_train = round(ablation.n_images_planned * (1 - 1 / ablation.n_folds))
    own = ablation.study.config["train"].get("train_fraction", 1.0)
    sized.append(({"train_fraction": own}, ablation.runs[ablation.position({})]))
    found = {round(float(each["train_fraction"]) * n_train): runs for each, runs in sized}
    done = {size: runs for size, runs in sorted(found.items()) if math.isfinite(runs.mean)}
    yield Plot(
        "training-size", "Training images",
        "Validation accuracy over the number of training images: every run, and the means.",
        functools.partial(plot_training_size, done),
    )  # fmt: skip


# Files


def effects_csv(section: Section) -> str:
    """Write effects as CSV: unrounded, fractions in [0, 1], a row per comparison and split."""
    keys = (
        "median", "sd", "n", "n_failed", "p", "p_family", "p_equivalence", "p_seeds", "verdict",
        "n_needed", "images_needed",
    )  # fmt: skip
    rows = [
        {
            "split": split,
            "factor": effect.contrast.factor,
            "level": effect.contrast.level,
            "difference": effect.difference.estimate,
            "low": effect.difference.low,
            "high": effect.difference.high,
            **{key: getattr(effect, key) for key in keys},
        }
        for split, found in (("val", section.effects), ("test", section.on_test))
        for effect in found
    ]
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")


def runs_csv(ablation: Ablation) -> str:
    """Write every run as CSV: setting, seed, fold and division, accuracies, why it failed."""
    rows = [
        {
            "setting": runs.label,
            "seed": ablation.first_seed + k,
            "fold": k % ablation.n_folds,
            "division": k // ablation.n_folds if ablation.n_folds > 1 else 0,
            "val_acc": runs.accuracies["val"][k],
            "test_acc": runs.accuracies["test"][k],
            "failure": runs.failures[k],
            "trial": number,
            **ablation.own_levels,
            **runs.levels,
        }
        for runs in ablation.runs
        for k, number in enumerate(runs.numbers)
        if number is not None
    ]
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")


def write_ablation(
    store: Record, name: str, out_dir: Path, *, beside: Sequence[str] = ()
) -> AblationPaths:
    """Write an ablation's report into a folder, over an earlier one.

    Ablations that are named in `beside`, on other datasets, are compared with it in one table.

    Raises:
        RecordError: There is no such study, or it is no ablation.
    """
    others = [read_ablations(store, other)[0] for other in beside]
    sections = describe_ablation(store, name)
    grids = [grid for section in sections for grid in section.grids]
    across = compare_across([sections[0].ablation, *others]) if others else None
    if across and across[1]:
        grids.append(across[1])
    out_dir.mkdir(parents=True, exist_ok=True)
    csv = []
    for section in sections:
        texts = {"effects": effects_csv(section), "runs": runs_csv(section.ablation)}
        for kind, text in texts.items():
            csv.append(out_dir / f"{section.name}-{kind}.csv")
            csv[-1].write_text(text, encoding="utf-8", newline="")
    figures = out_dir / "figures"
    paths = AblationPaths(
        html=out_dir / "ablation.html",
        markdown=out_dir / "tables.md",
        latex=out_dir / "tables.tex",
        csv=tuple(csv),
        figures=tuple(p for each in sections for plot in each.plots for p in plot.save(figures)),
        sections=tuple(sections),
    )
    study = sections[0].ablation.study
    contents = {
        "study": study,
        "data": data_words(sections[0].ablation),
        "written": moment(datetime.now(UTC)),
        "warnings": study.data["warnings"],
        "sections": sections,
        "across": across,
        "commands": [hide_password(each.ablation.design.command) for each in sections],
        "config": config_words(study.config),
    }
    paths.html.write_text(render_template("ablation.html", contents), encoding="utf-8")
    paths.markdown.write_text("\n\n".join(map(to_markdown, grids)) + "\n", encoding="utf-8")
    methods = "\n\n".join(section.methods for section in sections)
    paths.latex.write_text(latex_document(name, grids, methods), encoding="utf-8")
    return paths
