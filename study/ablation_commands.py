"""The commands about ablations; like `study.__main__` they stand above all three rooms."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.ablation.baseline import find_baseline, read_flags
from study.ablation.designs import BASELINE, Decide, Scores, cell_label
from study.ablation.run import AblationOutcome, Plan, check_begun, make_plan, run_ablation
from study.config.errors import ConfigError
from study.config.formatting import format_duration, hide_password
from study.config.load import check_backbones
from study.execution.progress import Note, Progress
from study.record.record import Record
from study.show import make_table, print_json, print_view

if TYPE_CHECKING:
    from reports.ablation_sections import Section
    from reports.effects import Rules
    from reports.publish import Grid

_INTERRUPTED = 130


def ablate(args: argparse.Namespace, progress: Progress) -> int:
    """Run an ablation, or print what it would run."""
    plan = plan_of(args)
    check_backbones(plan.baseline.config)
    if not args.json:
        _print_plan(plan)
    for warning in _foreseen(plan):
        progress.emit(Note(warning))
    if args.dry_run:
        return _dry_run(plan, args, progress)
    outcome = run_ablation(
        plan,
        progress=progress,
        command=args.line,
        decide=_still_open(plan),
        take_over=args.take_over,
    )
    progress.close()
    return _tell(outcome, plan, args)


def plan_of(args: argparse.Namespace) -> Plan:
    """Read baseline, factors and design from the flags.

    Raises:
        ConfigError: Something is wrong; every fault is told.
        RecordError: There is no such database, study or trial.
    """
    factors, faults = read_flags(args.factor)
    if faults:
        raise ConfigError(*faults)
    flags = {
        "ablation.design": args.design,
        "ablation.factors": factors or None,
        "ablation.replicates": args.replicates,
        "ablation.resplit": args.resplit or None,
        "ablation.adaptive": args.adaptive or None,
        "study.timeout": args.timeout,
        "study.cache": 0 if args.no_sharing else args.cache,
        "data.source": args.data,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    baseline = find_baseline(args.storage, args.base, args.which, args.name, args.set, given)
    return make_plan(baseline)


def _rules(plan: Plan) -> "Rules":
    from reports.effects import Rules

    settings = plan.baseline.settings
    looks = plan.looks if len(plan.looks) > 1 else ()
    return Rules(settings.alpha, settings.margin / 100, looks=looks)


def _still_open(plan: Plan) -> Decide:
    """Judge at a look as the report will, by one picture's share too."""
    from reports.effects import open_levels

    study = plan.baseline.config.study

    def decide(scores: Scores, looks: Sequence[int]) -> set[int]:
        with Record.open(study.storage) as store:
            n_val = int(store.study(study.name).data["n_val"])
        return open_levels(scores, dataclasses.replace(_rules(plan), resolution=1 / n_val))

    return decide


def _foreseen(plan: Plan) -> list[str]:
    """Say before a run what its replicates could decide."""
    from reports.effects import foresee

    return foresee(plan.looks[-1], plan.n_tests, _rules(plan))


def _seeds(first: int, n: int) -> str:
    if n == 1:
        return f"1 replicate, seed {first}"
    return f"{n} replicates, seeds {first} to {first + n - 1}"


def _print_plan(plan: Plan) -> None:
    baseline, design, settings = plan.baseline, plan.design, plan.baseline.settings
    print(f"Ablation of {baseline.origin}: study {baseline.config.study.name}")
    print(f"Design: {design.construction}")
    table = make_table("factor", "baseline", "start" if design.grows else "levels")
    for factor in design.factors:
        table.add_row(
            factor.name, factor.baseline, ", ".join(level.label for level in factor.levels)
        )
    print_view(table)
    for line in design.aliasing:
        print(f"Aliasing: {line}")
    most = "at most " if settings.adaptive or design.grows else ""
    first = baseline.config.train.seed
    again = ", each with a validation split of its own" if settings.resplit else ""
    print(
        f"Runs: {most}{plan.n_runs} ({_seeds(first, plan.looks[-1])}, the same for every "
        f"setting{again})"
    )
    if settings.adaptive:
        looks = ", ".join(str(n) for n in plan.looks)
        print(f"Adaptive: looks after {looks} replicates; settled levels get no more.")
    sys.stdout.flush()


def _dry_run(plan: Plan, args: argparse.Namespace, progress: Progress) -> int:
    from study.execution.session import load_images, preflight
    from study.search.plan import estimate_runs

    data = load_images(plan.baseline.config, progress)
    preflight(plan.configs(), data)
    check_begun(plan)
    seconds, size = estimate_runs(plan.configs(), data)
    total = sum(seconds) / len(seconds) * plan.n_runs
    kept = size * plan.n_runs if plan.baseline.settings.keep_checkpoints else 0
    progress.close()
    if args.json:
        print_json(
            {
                "design": plan.design.to_record(),
                "n_runs": plan.n_runs,
                "total_s": total,
                "checkpoint_bytes": kept,
            }
        )
        return 0
    from study.show import format_bytes

    print(
        f"About {format_duration(total / plan.n_runs)} a run, {format_duration(total)} in all "
        f"(loading of pictures not counted); {format_bytes(kept)} of checkpoints "
        "(ablation.keep_checkpoints = false keeps none)."
    )
    return 0


def _tell(outcome: AblationOutcome, plan: Plan, args: argparse.Namespace) -> int:
    from reports.ablation_report import write_ablation
    from reports.ablation_sections import describe_ablation

    study = plan.baseline.config.study
    is_interrupted = outcome.stopped_because == "interrupted"
    with Record.open(study.storage) as store:
        section = describe_ablation(store, study.name)[0]
        folder = Path(study.output) / study.name / "ablation"
        report = None if is_interrupted else write_ablation(store, study.name, folder).html
    if args.json:
        print_json(
            {
                "event": "ablation_ended",
                "study": outcome.study_name,
                "stopped_because": outcome.stopped_because,
                "n_done": outcome.n_done,
                "n_planned": outcome.n_planned,
                "findings": [f"{f.head} {f.text}" for f in section.findings],
                "effects": [_effect_record(effect) for effect in section.effects],
                "report": report,
            }
        )
    else:
        _print_results(outcome, section)
        if report:
            print(f"\nReport: {report}")
        print("\nNext:")
        for line in _next(
            study.name, study.storage, is_open=outcome.stopped_because != "complete"
        ):
            print(f"  {line}")
    return _INTERRUPTED if is_interrupted else 0


def _effect_record(effect: Any) -> dict[str, Any]:
    return {
        "factor": effect.arm.factor,
        "level": effect.arm.level,
        "n": effect.n,
        "n_failed": effect.arm.n_failed,
        "accuracy": effect.arm.accuracy.estimate,
        "difference": effect.difference.estimate,
        "low": effect.difference.low,
        "high": effect.difference.high,
        "p": effect.p,
        "p_family": effect.p_family,
        "verdict": effect.verdict,
        "n_needed": effect.n_needed,
    }


def _print_results(outcome: AblationOutcome, section: "Section") -> None:
    done = f"{outcome.n_done} of {outcome.n_planned} runs are done"
    print(f"\nAblation {outcome.study_name}: {done} ({format_duration(outcome.duration_s)})")
    print_view(_as_table(section.grids[0]))
    for finding in section.findings:
        print(f"{finding.head} {finding.text}")


def _as_table(grid: "Grid") -> Any:
    end = len(grid.header) - grid.is_last_text
    table = make_table(*grid.header, right=grid.header[grid.n_text : end])
    for number, row in enumerate(grid.rows):
        if grid.begins_group(number):
            table.add_section()
        table.add_row(*row)
    return table


def _next(name: str, storage: str, *, is_open: bool) -> list[str]:
    words = shlex.quote(name)
    if storage != "studies.db":
        words += f" --storage {shlex.quote(hide_password(storage))}"
    lines = [f"python -m study report {words} --methods"]
    if is_open:
        lines.insert(0, f"python -m study ablate {words}")
    else:
        lines.append(f"python -m study test {words} --levels all")
    return lines


def report_ablation(args: argparse.Namespace, store: Record) -> int:
    """Write an ablation's report, or print its methods paragraph."""
    from reports.ablation_report import write_ablation
    from reports.ablation_sections import describe_ablation

    if args.methods:
        sections = describe_ablation(store, args.study)
        for section in sections:
            # One paragraph is ready to be pasted; several need to be told apart.
            print(f"{section.title}: {section.methods}\n" if sections[1:] else section.methods)
        return 0
    output = Path(store.study(args.study).config["study"]["output"])
    paths = write_ablation(
        store,
        args.study,
        args.out or output / args.study / "ablation",
        beside=args.beside,
    )
    for path in (paths.html, paths.markdown, paths.latex, *paths.csv):
        print(path)
    return 0


def test_levels(args: argparse.Namespace, store: Record, progress: Progress) -> int:
    """Test every replicate of chosen levels, and of the baseline, on the test split."""
    from study.search.final_test import test_trials

    numbers = _numbers_of(store, args.study, args.levels)
    rows = test_trials(store, args.study, numbers, progress=progress, command=args.line)
    progress.close()
    if args.json:
        print_json(rows)
        return 0
    from reports.ablation_report import write_ablation
    from reports.ablation_sections import describe_ablation

    section = describe_ablation(store, args.study)[0]
    for grid in section.grids:
        if grid.name.endswith("-test"):
            print_view(_as_table(grid))
    output = Path(store.study(args.study).config["study"]["output"])
    paths = write_ablation(store, args.study, output / args.study / "ablation")
    print(f"Tested {len(rows)} runs. Report: {paths.html}")
    return 0


def _numbers_of(store: Record, name: str, levels: Sequence[str]) -> list[int]:
    """Find the complete runs of the chosen levels and of the baseline, in all designs.

    Raises:
        ConfigError: A level is none of the design's.
    """
    study = store.study(name)
    specs = [design.spec for design in store.designs(study.id)]
    cells = [
        (cell_label(cell["levels"]), hashes)
        for spec in specs
        for cell, hashes in zip(spec["cells"], spec["runs"], strict=True)
    ]
    labels = list(dict.fromkeys(label for label, _ in cells))
    unknown = [level for level in levels if level not in (*labels, "all")]
    if unknown:
        raise ConfigError(
            f"--levels must be all or levels of {name}, but got {', '.join(unknown)}. They are: "
            f"{'; '.join(labels)}."
        )
    done = {
        row.config_hash: row.number for row in store.trials(study.id) if row.state == "complete"
    }
    wanted = {BASELINE, *(labels if "all" in levels else levels)}
    numbers = [
        done[text] for label, hashes in cells if label in wanted for text in hashes if text in done
    ]
    return list(dict.fromkeys(numbers))


def audit(args: argparse.Namespace, store: Record, progress: Progress) -> int:
    """Train a sample of a search's pruned trials to the end, and say what pruning cost."""
    from reports.audit import audited_grid, rank_grid, read_audit
    from study.search.audit import audit_study

    if args.sample < 0:
        raise ConfigError(f"--sample must be >= 0, but got {args.sample}.")
    outcome = None
    if args.sample:
        outcome = audit_study(
            store,
            args.study,
            args.sample,
            progress=progress,
            command=args.line,
            take_over=args.take_over,
        )
    progress.close()
    found = read_audit(store, args.study)
    if args.json:
        print_json(found)
        return 0
    for grid in (rank_grid(found), audited_grid(found)):
        if grid.rows:
            print_view(grid.title)
            print_view(_as_table(grid))
            print(f"{grid.note}\n")
    if found.early.why_empty:
        print(found.early.why_empty)
    if not found.n_pruned:
        print("No trial of this study was pruned, so there is nothing to train again.")
    for text in found.findings:
        print(text)
    is_interrupted = outcome is not None and outcome.stopped_because == "interrupted"
    return _INTERRUPTED if is_interrupted else 0
