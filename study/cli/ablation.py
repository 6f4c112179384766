"""What the commands about ablations do: plan, run, describe, report and test."""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import filesize

from core.data.splits import ImageData
from core.training.no_effect import without_effect
from reports.ablation import read_ablations
from reports.ablation_report import describe_ablation, write_ablation
from reports.effects import Effect, foresee, open_cells
from reports.record import optimism
from study.ablation.baseline import find_baseline, read_flags
from study.ablation.designs import BASELINE, Cell
from study.ablation.run import (
    Plan,
    check_begun,
    choose_folds,
    make_plan,
    record_test,
    run_ablation,
)
from study.cli.views import (
    grid_table,
    make_table,
    print_json,
    print_next,
    print_view,
)
from study.config.errors import ConfigError
from study.config.formatting import format_duration, study_command
from study.config.load import check_inputs
from study.execution.progress import Note, Progress
from study.execution.session import load_images, preflight
from study.record.record import Record
from study.search.final_test import test_trials
from study.search.plan import estimate


def plan_ablation(
    base: str,
    which: str,
    factors: Sequence[str],
    overrides: Sequence[str],
    flags: Mapping[str, Any],
) -> Plan:
    """Settle baseline, factors (`KEY=V1,V2` of --factor) and design, as `find_baseline` does."""
    if levels := read_flags(factors):
        flags = {**flags, "ablation.factors": levels}
    baseline = find_baseline(base, which, overrides, flags)
    if baseline.source is not None:
        with Record(baseline.config.study.storage) as store:
            chosen = {**baseline.chosen, "bias": optimism(store, base)}
        baseline = dataclasses.replace(baseline, chosen=chosen)
    plan = make_plan(baseline)
    check_inputs(baseline.config)
    return plan


def print_plan(plan: Plan) -> None:
    """Print what an ablation will run."""
    baseline, design, settings = plan.baseline, plan.design, plan.baseline.config.ablation
    print(f"Ablation of {baseline.origin}: study {baseline.config.study.name}")
    print(f"Design: {design.construction}")
    header = ("factor", "baseline", "start" if design.grows else "levels")
    rows = (
        (factor.name, factor.baseline, ", ".join(level.label for level in factor.levels))
        for factor in design.factors
    )
    print_view(make_table(header, rows))
    most = "at most " if settings.adaptive or design.grows else ""
    n, first = plan.looks[-1], baseline.config.train.seed
    seeds = f"{n} replicates, seeds {first} to {first + n - 1}"
    seeds = f"1 replicate, seed {first}" if n == 1 else seeds
    print(f"Runs: {most}{plan.n_runs} ({seeds}, the same for every setting)")
    if settings.adaptive:
        interim = ", ".join(str(n) for n in plan.looks)
        print(f"Adaptive: analysed after {interim} replicates; decided levels get no more.")
    sys.stdout.flush()


def announce(plan: Plan, progress: Progress, data: ImageData, n_folds: int, order: int) -> None:
    """Show before a run what its replicates and images can decide, as `foresee` says it."""
    settings = plan.baseline.config.ablation
    judged = data.val if n_folds == 1 else data.development
    texts = list(_idle_words(plan))
    if n_folds > 1:
        texts.append(
            f"Each replicate validates on one of {n_folds} folds of all {len(judged)} images but "
            "the test split (ablation.folds = 1: on the validation split)."
        )
    if all("seed" in without_effect(config) for config in plan.configs()):
        once = "; on one split each is trained once." if n_folds == 1 else "."
        texts.append(f"Solved heads have no seed: images alone decide about them{once}")
    n, n_tests = plan.looks[-1], plan.design.n_tests
    for text in [*texts, foresee(n, n_tests, len(judged), n_folds, settings.alpha, order)]:
        progress.emit(Note(text))


def _idle_words(plan: Plan) -> Iterator[str]:
    """Name settings of single levels that change nothing there: they would not be compared."""
    for cell, train in zip(plan.design.cells, plan.configs(), strict=True):
        idle = [key for key in cell.overrides if key in without_effect(train)]
        if idle and len(cell.levels) == 1:
            why = "; its head is solved (head_solver = sgd trains it)" if train.is_solved else ""
            yield f"warning: {cell.label}: without effect are {', '.join(idle)}{why}."


def estimate_plan(plan: Plan, progress: Progress, *, as_json: bool) -> None:
    """Print the runs of an ablation and what they would cost."""
    data = load_images(plan.baseline.config, progress)
    preflight(plan.configs(), data)
    n_folds = choose_folds(plan.baseline, len(data.val))
    announce(plan, progress, data, n_folds, check_begun(plan, n_folds))
    n_kept = plan.n_runs if plan.baseline.config.ablation.keep_checkpoints else 0
    found = estimate(plan.configs(), data, n_trials=plan.n_runs, n_kept=n_kept)
    progress.close()
    if as_json:
        print_json({"design": plan.design.to_record(), "estimate": found})
        return
    print(
        f"About {format_duration(found.trial_s)} per run, {format_duration(found.total_s)} in all "
        f"(without loading of images); {filesize.decimal(found.checkpoint_bytes)} of checkpoints "
        "(ablation.keep_checkpoints = false keeps none)."
    )


def run_plan(
    plan: Plan, progress: Progress, *, command: str, take_over: bool, as_json: bool
) -> tuple[str, bool]:
    """Run an ablation, print its results and write its report.

    Return why it stopped, and whether any run is complete.
    """
    study = plan.baseline.config.study

    def decide() -> set[int]:
        with Record(study.storage) as store:
            return open_cells(read_ablations(store, study.name)[0])

    outcome = run_ablation(
        plan,
        progress=progress,
        command=command,
        decide=decide,
        announce=functools.partial(announce, plan, progress),
        take_over=take_over,
    )
    progress.close()
    with Record(study.storage) as store:
        if outcome.stopped_because == "interrupted":  # drawing takes seconds
            section, report = describe_ablation(store, study.name)[0], None
        else:
            folder = store.study(study.name).output / "ablation"
            paths = write_ablation(store, study.name, folder)
            section, report = paths.sections[0], paths.html
    findings = [f"{head} {text}" for head, text in section.findings]
    ended = outcome.stopped_because, any(len(runs.done) for runs in section.ablation.runs)
    if as_json:
        facts = {key: getattr(outcome, key) for key in ("stopped_because", "n_done", "n_planned")}
        effects = [_effect_record(effect) for effect in section.effects]
        facts |= {"study": study.name, "findings": findings, "effects": effects, "report": report}
        print_json({"event": "ablation_ended"} | facts)
        return ended
    done = f"{outcome.n_done} of {outcome.n_planned} runs are done"
    print(f"\nAblation {study.name}: {done} ({format_duration(outcome.duration_s)})")
    print_view(grid_table(section.grids[0]))
    print(*findings, sep="\n")
    if report:
        print(f"\nReport: {report}")
    where = study.name, study.storage
    is_done = outcome.stopped_because == "complete"
    then = ("test", *where, "--levels all") if is_done else ("ablate", *where)
    print_next([study_command(*then)])
    return ended


def _effect_record(effect: Effect) -> dict[str, Any]:
    keys = ("n", "n_failed", "p", "p_family", "verdict", "n_needed", "images_needed")
    record = {"factor": effect.contrast.factor, "level": effect.contrast.level}
    record |= {key: getattr(effect, key) for key in keys}
    found = effect.difference
    return record | {"difference": found.estimate, "low": found.low, "high": found.high}


def test_levels(
    store: Record,
    name: str,
    levels: Sequence[str],
    progress: Progress,
    *,
    command: str,
    as_json: bool,
) -> None:
    """Test every replicate of chosen levels, and of the baseline, on the test split."""
    numbers = _numbers_of(store, name, levels)
    rows = test_trials(store, name, numbers, progress=progress, command=command)
    record_test(store, store.study(name).id)
    progress.close()
    if as_json:
        print_json(rows)
        return
    folder = store.study(name).output / "ablation"
    paths = write_ablation(store, name, folder)
    for grid in paths.sections[0].grids:
        if grid.name.endswith("-test"):
            print_view(grid_table(grid))
    print(f"Tested {len(rows)} runs. Report: {paths.html}")


def _numbers_of(store: Record, name: str, levels: Sequence[str]) -> list[int]:
    """Find the complete runs of the chosen levels and of the baseline, in all designs."""
    study = store.study(name)
    runs: dict[str, list[str]] = {}
    for design in store.designs(study.id):
        for cell, hashes in zip(design.spec["cells"], design.spec["runs"], strict=True):
            runs.setdefault(Cell(**cell).label, []).extend(hashes)
    unknown = [level for level in levels if level not in (*runs, "all")]
    if unknown:
        raise ConfigError(
            f"--levels must be all or levels of {name}, but got {', '.join(unknown)}. They are: "
            f"{'; '.join(runs)}."
        )
    wanted = runs if "all" in levels else (BASELINE, *levels)
    hashes = {text for label in wanted for text in runs.get(label, ())}
    complete = (row for row in store.trials(study.id) if row.state == "complete")
    return list({r.config_hash: r.number for r in complete if r.config_hash in hashes}.values())
