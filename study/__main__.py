"""The command line, `python -m study`: a function for each command, its imports inside it."""

import os

# Before anything loads torch: OpenMP threads that wait otherwise spin, and take the cores from
# whatever runs beside them. Measured, ResNet-18 step on two cores with a busy neighbour: 3.3 to 7
# times slower with spinning, no clear difference on a quiet machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.parser import make_parser

if TYPE_CHECKING:
    from rich.console import RenderableType

    from study.config.study_config import StudyConfig
    from study.execution.progress import Progress
    from study.record.record import Record
    from study.search.search import SearchOutcome

_OURS = ("core", "study", "reports")
_INTERRUPTED = 130  # what a shell reports for a program that SIGINT ended: 128 + 2


def _run(args: argparse.Namespace) -> int:
    from study.config.load import check_source

    config = _configured(args)
    check_source(config)
    return _dry_run(config, args) if args.dry_run else _search(config, args)


def _configured(args: argparse.Namespace) -> "StudyConfig":
    from study.config.load import load_config, parse_config

    flags = _flags(args) | _given({"data.source": args.data, "study.name": args.name})
    if args.config is None and args.data is None:
        import tomllib

        from study.config.toml import demo_text

        if Path("study.toml").exists():
            print("This is the demo; yours: --config study.toml", file=sys.stderr)
        return parse_config(tomllib.loads(demo_text()), "the demo", args.set, flags)
    return load_config(args.config, args.set, flags)


def _flags(args: argparse.Namespace) -> dict[str, object]:
    return _given(
        {
            "study.trials": args.trials,
            "study.timeout": args.timeout,
            "study.storage": args.storage,
            "study.cache": 0 if args.no_sharing else args.cache,
        }
    )


def _given(flags: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in flags.items() if value is not None}


def _resume(args: argparse.Namespace) -> int:
    from study.config.load import check_source, parse_config

    with _opened(args) as store:
        row = store.study(args.study)
        _refuse_ablation(store, args.study, "ablate", "")
    config = parse_config(row.config, f"study {args.study}", args.set, _flags(args))
    check_source(config)
    return _search(config, args)


def _progress(args: argparse.Namespace) -> "contextlib.closing[Progress]":
    from study.execution.progress import choose_progress

    is_quiet = getattr(args, "quiet", False)
    return contextlib.closing(choose_progress(is_quiet=is_quiet, is_json=args.json))


def _search(config: "StudyConfig", args: argparse.Namespace) -> int:
    from study.config.formatting import hide_password
    from study.execution.progress import Note
    from study.search.search import run_search

    with _progress(args) as progress:
        where = Path(config.study.output) / config.study.name
        storage = hide_password(config.study.storage)
        progress.emit(Note(f"Study {config.study.name} in {storage}, files in {where}"))
        outcome = run_search(
            config,
            progress=progress,
            command=args.line,
            allow_changes=args.allow_changes,
            take_over=args.take_over,
        )
    is_interrupted = outcome.stopped_because == "interrupted"
    if not args.json:
        _print_summary(config, outcome)
    # Drawing takes seconds; who pressed Ctrl-C wants the terminal back.
    report = None if is_interrupted else _written(config, where / "report")
    if args.json:
        _print_json({"event": "study_ended", **_dict(outcome), "report": report})
    else:
        _print_next(config, outcome, report)
    if is_interrupted:
        return _INTERRUPTED
    return 0 if outcome.best_number is not None else 1


def _written(config: "StudyConfig", folder: Path) -> Path:
    from reports.html import write_report
    from study.record.record import Record

    with Record.open(config.study.storage) as store:
        return write_report(store, config.study.name, folder).html


def _print_summary(config: "StudyConfig", outcome: "SearchOutcome") -> None:
    from study.record.record import Record
    from study.show import summary_view

    with Record.open(config.study.storage) as store:
        trials = store.trials(store.study(config.study.name).id)
    _print(summary_view(outcome, trials, outcome.n_val, config.study.trials))


def _print_next(config: "StudyConfig", outcome: "SearchOutcome", report: Path | None) -> None:
    from study.search.search import HALTED
    from study.show import next_commands

    if report:
        print(f"Report: {report}")
    print("\nNext:")
    has_best = outcome.best_number is not None
    goes_on = outcome.stopped_because in HALTED
    for line in next_commands(
        config.study.name, config.study.storage, goes_on=goes_on, has_best=has_best
    ):
        print(f"  {line}")


def _dry_run(config: "StudyConfig", args: argparse.Namespace) -> int:
    from study.config.load import check_backbones
    from study.config.toml import config_text
    from study.execution.session import corner_configs, load_images, preflight, without_weights
    from study.search.plan import estimate
    from study.show import estimate_view

    check_backbones(config)
    if not args.json:
        print(config_text(config))
    with _progress(args) as progress:
        data = load_images(config, progress)
    corners = corner_configs(config, with_starts=True)
    preflight([without_weights(train) for train in corners], data)
    found = estimate(config, data)
    if args.json:
        _print_json({"config": config.to_record(), "estimate": found})
    else:
        _print(estimate_view(found))
    return 0


def _ablate(args: argparse.Namespace) -> int:
    from study.ablation_commands import ablate

    with _progress(args) as progress:
        return ablate(args, progress)


def _audit(args: argparse.Namespace) -> int:
    from study.ablation_commands import audit

    with _opened(args) as store, _progress(args) as progress:
        return audit(args, store, progress)


def _init(args: argparse.Namespace) -> int:
    from study.config.load import load_config
    from study.config.toml import demo_text, template, write_new

    config = load_config(flags=_given({"data.source": args.data}))
    write_new(args.file, demo_text() if args.demo else template(config), may_replace=args.force)
    if args.data is None and not args.demo:
        print(f"Wrote {args.file}. Set data.source in it to your pictures (now the digits), then:")
    else:
        print(f"Wrote {args.file}. Next:")
    print(f"  python -m study run --config {shlex.quote(str(args.file))}")
    return 0


def _schema(args: argparse.Namespace) -> int:
    import json

    from study.config.toml import config_schema

    print(json.dumps(config_schema(), indent=2))
    return 0


def _backbones(args: argparse.Namespace) -> int:
    from core.models.sources import backbone_names, find_source

    names = backbone_names()
    if args.name in names:
        return _levels(args)
    found = [name for name in names if args.name is None or args.name in name]
    if not found:
        find_source(args.name)
    if args.json:
        _print_json(found)
    else:
        print("\n".join(found))
    return 0


def _levels(args: argparse.Namespace) -> int:
    from core.models.builder import stages_of
    from core.models.freeze_stages import describe_levels
    from study.show import levels_table

    levels = describe_levels(*stages_of(args.name))
    if args.json:
        _print_json(levels)
    else:
        _print(levels_table(args.name, levels))
    return 0


def _list(args: argparse.Namespace) -> int:
    from study.show import studies_table

    with _opened(args) as store:
        summaries = store.studies()
    if args.json:
        _print_json(summaries)
    else:
        _print(studies_table(summaries))
    return 0


def _show(args: argparse.Namespace) -> int:
    from study.show import study_view, trial_view

    with _opened(args) as store:
        study = store.study(args.study)
        if args.trial is not None:
            trial = store.trial(study.id, args.trial)
            epochs = store.epochs(trial.id)
            view, facts = trial_view(trial, epochs), {**_dict(trial), "epochs": epochs}
        else:
            trials, tests = store.trials(study.id), store.tests(study.id)
            view = study_view(study, trials, tests)
            facts = {**_dict(study), "trials": trials, "tests": tests}
    if args.json:
        _print_json(facts)
    else:
        _print(view)
    return 0


def _diff(args: argparse.Namespace) -> int:
    from study.show import differences_table, trial_differences

    with _opened(args) as store:
        study = store.study(args.study)
        a, b = (store.trial(study.id, number) for number in args.trials)
    if args.json:
        _print_json(trial_differences(a, b))
    else:
        _print(differences_table(a, b))
    return 0


def _delete(args: argparse.Namespace) -> int:
    with _opened(args) as store:
        n_trials = len(store.trials(store.study(args.study).id))
        question = f"Delete study {args.study}, {n_trials} trials, with its checkpoints?"
        if not args.yes and not _agreed(question):
            print("Nothing deleted.")
            return 0
        from study.delete import delete_study

        folders = delete_study(store, args.study, command=args.line)
    print(f"Deleted study {args.study}: {n_trials} trials, {len(folders)} checkpoints.")
    return 0


def _agreed(question: str) -> bool:
    from study.config.errors import ConfigError

    if not sys.stdin.isatty():
        raise ConfigError("delete must be confirmed, but there is no terminal; add --yes.")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _test(args: argparse.Namespace) -> int:
    from study.search.final_test import test_study
    from study.show import say_looks, say_test

    with _opened(args) as store, _progress(args) as progress:
        if args.levels:
            from study.ablation_commands import test_levels

            _require_ablation(store, args.study, "--levels")
            return test_levels(args, store, progress)
        if args.trial is None:
            _refuse_ablation(store, args.study, "test", " --levels all")
        study_id = store.study(args.study).id
        before = store.tests(study_id)
        row = test_study(store, args.study, args.trial, progress=progress, command=args.line)
        looks = store.tests(study_id)
        output = Path(store.study(args.study).config["study"]["output"])
        report = output / args.study / "report"
        if (report / "report.html").exists():  # what it says of the test split has changed
            from reports.html import write_report

            write_report(store, args.study, report)
    if args.json:
        _print_json(row)
    else:
        print(say_test(row))
        if more := say_looks(looks, row, is_new=len(looks) > len(before)):
            print(more)
    return 0


def _report(args: argparse.Namespace) -> int:
    from reports.html import write_report

    with _opened(args) as store:
        study = store.study(args.study)
        if args.ablation or args.methods or args.beside or store.designs(study.id):
            from study.ablation_commands import report_ablation

            return report_ablation(args, store)
        output = Path(study.config["study"]["output"])
        paths = write_report(store, args.study, args.out or output / args.study / "report")
    for path in (paths.html, paths.csv):
        print(path)
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "resume": _resume,
    "ablate": _ablate,
    "audit": _audit,
    "init": _init,
    "schema": _schema,
    "backbones": _backbones,
    "list": _list,
    "show": _show,
    "diff": _diff,
    "delete": _delete,
    "test": _test,
    "report": _report,
}

# What the commands share.


def _refuse_ablation(store: "Record", name: str, command: str, rest: str) -> None:
    """Send the user of an ablation to the command that is meant for it."""
    from study.config.errors import ConfigError

    if store.designs(store.study(name).id):
        raise ConfigError(
            f"study {name} is an ablation, of which no run is the best. Use: python -m study "
            f"{command} {shlex.quote(name)}{rest}"
        )


def _require_ablation(store: "Record", name: str, flag: str) -> None:
    from study.config.errors import ConfigError

    if not store.designs(store.study(name).id):
        raise ConfigError(
            f"{flag} is for ablations, but study {name} is a search. Leave it out, or make an "
            f"ablation of it: python -m study ablate {shlex.quote(name)}"
        )


def _opened(args: argparse.Namespace) -> "Record":
    from study.record.record import Record

    return Record.open(args.storage)


def _print(view: "RenderableType") -> None:
    from study.show import print_view

    print_view(view)


def _print_json(value: object) -> None:
    from study.show import print_json

    print_json(value)


def _dict(row: Any) -> dict[str, Any]:
    import dataclasses

    return {item.name: getattr(row, item.name) for item in dataclasses.fields(row)}


def _is_users(err: Exception) -> bool:
    """Say whether an error is the user's to correct: one of our own kinds."""
    return type(err).__module__.partition(".")[0] in _OURS


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Args:
        argv: Arguments; None for the process's own.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(given)
    args.line = shlex.join(["python", "-m", "study", *given])
    try:
        status = _COMMANDS[args.command](args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of the pipe (`| head`) has what it wanted; nothing is to be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, RuntimeError) as err:
        if not _is_users(err):
            raise
        from study.config.formatting import hide_password

        print("error:", hide_password(str(err)).replace("\n", "\n  "), file=sys.stderr)
        return 2 if isinstance(err, ValueError) else 1  # 1: the study halted
    return status


if __name__ == "__main__":
    sys.exit(main())
