"""The command line, `python -m study` or `frostline`: every command with its options.

Only click is imported at the top: help and mistyped options are answered at once.
"""

import contextlib
import dataclasses
import functools
import io
import math
import os
import re
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from study.config.study_config import StudyConfig
    from study.execution.progress import Progress
    from study.record.record import Record
    from study.search.search import SearchOutcome

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_STORAGE = "studies.db"
"""The database where no other is named; the configuration's default is the same."""
_BY_SIGNAL = 128  # a shell reports this plus the signal's number
_WATCH_S = 5  # between two pages of `report --watch`
_PACKAGES = ("core", "study", "reports")
_CONFIG_KEYS = {
    "data": "data.source",
    "download": "search.download",
    **{name: f"study.{name}" for name in ("name", "trials", "time", "storage", "cache")},
    **{name: f"study.{name}" for name in ("finish", "refit")},
    **{name: f"ablation.{name}" for name in ("design", "replicates", "folds", "adaptive")},
}
"""Options that set a key of the configuration."""


class _Group(click.Group):
    """Commands in the order in which they are defined."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_Group,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 99},
)
def cli() -> None:
    """Search how to fine-tune a pretrained image classifier on your own images."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, with the process's own arguments if none are given; return its status."""
    # Before anything loads torch: OpenMP threads that wait otherwise spin, and take the cores from
    # whatever runs at the same time. Measured, ResNet-18 step on two cores with a busy neighbour:
    # 3.3 to 7 times slower with spinning, no clear difference on a quiet machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal's encoding may lack letters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if wrong := [text for text in given if re.search("[\0\ud800-\udfff]", text)]:
            return _refuse(f"arguments must be UTF-8 without NUL, but got {ascii(wrong[0])}.")
        os.getcwd()  # the folder that we stand in may have been removed
        with cli.make_context("python -m study", given, obj=(given, argv is None)) as context:
            status: int | None = cli.invoke(context)
        sys.stdout.flush()
        return status or 0
    except click.exceptions.Exit as end:  # after --help
        return end.exit_code
    except (KeyboardInterrupt, click.Abort):
        print("Interrupted.", file=sys.stderr)
        return _BY_SIGNAL + signal.SIGINT
    except BrokenPipeError:
        # The reader of the pipe (`| head`) has what it wanted; nothing is to be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except click.ClickException as err:
        path = err.ctx.command_path if isinstance(err, click.UsageError) and err.ctx else ""
        return _refuse(err.format_message() + (f" See {path} --help" if path else ""))
    except OSError as err:
        place = err.filename or "the working folder or standard output"
        return _refuse(f"{place}: {err.strerror}. Use another, or correct that.")
    except (ValueError, RuntimeError) as err:
        # One of our own kinds is about what the user gave, or what halts a study; any other is a
        # bug.
        if type(err).__module__.partition(".")[0] not in _PACKAGES:
            raise
        status = _refuse(str(err))
        return status if isinstance(err, ValueError) else 1


def _refuse(message: str) -> int:
    from study.config.formatting import hide_password

    text = hide_password(message).replace("\n", "\n  ")
    shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    print("error:", shown, file=sys.stderr)
    return 2


# What the commands share.


def _given(name: str) -> Any:
    """Return the value of an option of the running command; None where it has none."""
    return click.get_current_context().params.get(name)


def _command_line() -> str:
    """Return the command line, for the record: without passwords."""
    from study.config.formatting import hide_password

    given, _ = click.get_current_context().find_root().obj
    return shlex.join(["python", "-m", "study", *map(hide_password, given)])


def _flags() -> dict[str, Any]:
    """Return the keys of the configuration that options set, with their values."""
    return {key: _given(name) for name, key in _CONFIG_KEYS.items() if _given(name) is not None}


def _open(storage: str | None = None) -> "Record":
    from study.record.record import Record

    return Record(storage or _given("storage"))


def _progress() -> "contextlib.closing[Progress]":
    from study.execution.progress import choose_progress

    progress = choose_progress(is_quiet=bool(_given("quiet")), is_json=_given("as_json"))
    return contextlib.closing(progress)


def _print(view: Any, record: object) -> None:
    """Print what a command found, as JSON where that is asked for."""
    from study.cli.views import print_json, print_view

    if _given("as_json"):
        print_json(record)
    else:
        print_view(view)


def _no_best(name: str, command: str, *flags: str) -> click.ClickException:
    from study.config.formatting import study_command

    line = study_command(command, name, _given("storage"), *flags)
    return click.ClickException(
        f"study {name} is an ablation, of which no run is the best. Use: {line}"
    )


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Join options that several commands have."""
    return lambda command: functools.reduce(lambda made, add: add(made), options[::-1], command)


_flag = functools.partial(click.option, is_flag=True)
_many = functools.partial(click.option, multiple=True)
_path = click.Path(path_type=Path)
_number = click.IntRange(0, 2**63 - 1)  # what a database's integer holds
_study = click.argument("study")
_json = _flag("--json", "as_json", help="Print JSON.")
_quiet = _flag("--quiet", help="Print warnings and the summary only.")
_take_over = _flag("--take-over", help="Continue where a process on a lost machine left off.")
_dry_run = _flag("--dry-run", help="Print the settings, time and disk that it needs; run nothing.")
_database = functools.partial(
    click.option,
    "--storage",
    metavar="DB",
    help=f"Database: a file or an SQLAlchemy URL (default {DEFAULT_STORAGE}).",
)
_storage = _database(default=DEFAULT_STORAGE)
_settings = _options(
    click.option("--time", "--timeout", "time", metavar="TIME", help="Time of this run: 15m, 2h."),
    _many("--set", "overrides", metavar="KEY=VALUE", help="Override a key; may be repeated."),
    click.option("--cache", metavar="SIZE", help="Most bytes for shared work, such as 8GB; or 0."),
    _take_over,
    _quiet,
    _json,
)
_search_settings = _options(
    click.option("--trials", type=int, metavar="N", help="Finished trials in total."),
    click.option("--finish", metavar="KIND", help="The model: ensemble (default) or single."),
    _flag(
        "--no-refit", "refit", flag_value=False, default=None, help="Keep validation images out."
    ),
    _settings,
    _flag("--allow-changes", help="Continue although the configuration or the images changed."),
)


# Search.


@cli.command()
@click.option("--data", metavar="PATH", help="Folder of images, torchvision:NAME, or digits.")
@click.option("--config", "path", type=_path, metavar="FILE", help="A study.toml.")
@click.option("--name", help="Name of the study (default: that of the data folder).")
@_flag("--download", default=None, help="Search modern backbones, too; download their weights.")
@click.option("--plan", type=_path, metavar="FILE", help="Run the trials of a study's plan.json.")
@_dry_run
@_search_settings
@_database()
def run(
    path: Path | None,
    data: str | None,
    overrides: Sequence[str],
    plan: Path | None,
    dry_run: bool,
    **_: Any,
) -> int:
    """Run a study, or continue it; without options, the demo."""
    from study.config.load import check_inputs, load_config, parse_config

    if path is None and data is None:
        from study.config.toml import DEMO, read_file

        if Path("study.toml").exists():
            print("This is the demo. For study.toml add --config study.toml.", file=sys.stderr)
        config = parse_config(read_file(DEMO), "the demo", overrides, _flags())
    else:
        config = load_config(path, overrides, _flags())
    check_inputs(config)
    if plan is not None and dry_run:
        raise click.UsageError("--dry-run makes a plan, so --plan must not be given with it.")
    return _estimate(config) if dry_run else _search(config, plan)


@cli.command()
@_study
@_search_settings
@_storage
def resume(study: str, overrides: Sequence[str], **_: Any) -> int:
    """Continue a study as it was configured."""
    from study.config.load import check_inputs, parse_config

    with _open() as store:
        row = store.study(study)
        if store.designs(row.id):
            raise _no_best(study, "ablate")
    config = parse_config(row.config, f"study {study}", overrides, _flags())
    check_inputs(config)
    return _search(config)


def _search(config: "StudyConfig", plan: Path | None = None) -> int:
    from study.search.search import run_search

    _, is_own_process = click.get_current_context().find_root().obj
    with _progress() as progress:
        _say_downloads(config, progress)
        outcome = run_search(
            config,
            progress=progress,
            command=_command_line(),
            allow_changes=_given("allow_changes"),
            take_over=_given("take_over"),
            begin=_process_begin() if is_own_process else None,
            plan=plan,
        )
    _print_outcome(config, outcome)
    if outcome.stopped_because == "interrupted":
        return _BY_SIGNAL + progress.stopped_by
    return 0 if outcome.best or (outcome.n_first_look and not outcome.counts.failed) else 1


def _say_downloads(config: "StudyConfig", progress: "Progress") -> None:
    """Say how large the weights are that will be downloaded."""
    from study.config.backbones import MODERN
    from study.execution.progress import Note
    from study.execution.session import corner_configs, is_on_this_machine

    corners = {train.backbone: train for train in corner_configs(config)}
    found = [m for m in MODERN if m.name in corners and not is_on_this_machine(corners[m.name])]
    if found:
        listed = ", ".join(f"{modern.name} ({modern.megabytes} MB)" for modern in found)
        total = sum(modern.megabytes for modern in found)
        progress.emit(Note(f"Weights to be downloaded, {total} MB: {listed}."))


def _process_begin() -> float:
    """Return when this process began, as `time.monotonic` counts."""
    import psutil

    began: float = psutil.Process().create_time()
    return time.monotonic() - (time.time() - began)


def _print_outcome(config: "StudyConfig", outcome: "SearchOutcome") -> None:
    """Print how a search ended and what to do next, and write its report."""
    from study.cli import views
    from study.config.formatting import study_command
    from study.search.search import HALTED

    name, storage, report = config.study.name, config.study.storage, None
    with _open(storage) as store:
        if not _given("as_json"):
            from reports.record import optimism

            bias = optimism(store, name)
            views.print_view(views.summary_view(outcome, config.study, bias))
        if outcome.stopped_because != "interrupted":  # drawing takes seconds
            from reports.search_report import write_report

            report = write_report(store, name, outcome.output / "report").html
    if _given("as_json"):
        names = ("stopped_because", "counts", "best", "model")
        facts = {key: getattr(outcome, key) for key in names}
        views.print_json({"event": "study_ended", "study": name, **facts, "report": report})
        return
    if report:
        print(f"Report: {report}")
    commands = ["resume" if outcome.stopped_because in HALTED else "show"]
    commands += ["report"] * (report is None)
    commands += ["test"] * bool(outcome.best and outcome.n_test)
    again = outcome.next_time
    is_short = outcome.stopped_because == "timeout" and not outcome.counts.failed
    if is_short and outcome.best is None:  # too short for one trial
        again = f"{2 * math.ceil((config.study.seconds or 60) / 60)}m"
    lines = [study_command(command, name, storage) for command in commands]
    lines[0] += f" --time {again}" if again else ""
    views.print_next([*lines, study_command("dashboard", "", storage)])


def _estimate(config: "StudyConfig") -> int:
    from study.cli.views import estimate_view
    from study.config.toml import config_text
    from study.execution.session import corner_configs, load_images, preflight, without_weights
    from study.search.plan import estimate_search

    if not _given("as_json"):
        print(config_text(config))
    with _progress() as progress:
        _say_downloads(config, progress)
        data = load_images(config, progress)
    preflight([without_weights(train) for train in corner_configs(config, with_starts=True)], data)
    found = estimate_search(config, data)
    _print(estimate_view(found), {"config": config.to_record(), "estimate": found})
    return 0


# Ablation and audit.


@cli.command()
@click.argument("base", metavar="STUDY|FILE")
@click.option("--from", "which", default="best", metavar="TRIAL", help="Baseline (default best).")
@click.option(
    "--design",
    metavar="KIND",
    help="Which settings are run: ofat (default), loco, factorial or path.",
)
@_many("--factor", "factors", metavar="KEY=V1,V2", help="A key and its levels; may be repeated.")
@click.option("--replicates", type=int, metavar="R", help="Runs of every setting (default 5).")
@click.option("--folds", type=int, metavar="K", help="Folds of a cross-validation; 1 for none.")
@_flag("--adaptive", default=None, help="Add replicates where a result is inconclusive.")
@click.option("--name", help="Name of the ablation's study (default: STUDY-ablation).")
@click.option("--data", metavar="PATH", help="Images, where a file is ablated.")
@_dry_run
@_settings
@_database()
def ablate(
    base: str, which: str, factors: Sequence[str], overrides: Sequence[str], **given: Any
) -> int:
    """Ablate a study's best trial, or a configuration."""
    from study.cli import ablation

    plan = ablation.plan_ablation(base, which, factors, overrides, _flags())
    if not given["as_json"]:
        ablation.print_plan(plan)
    with _progress() as progress:
        if given["dry_run"]:
            ablation.estimate_plan(plan, progress, as_json=given["as_json"])
            return 0
        because, is_done = ablation.run_plan(
            plan,
            progress,
            command=_command_line(),
            take_over=given["take_over"],
            as_json=given["as_json"],
        )
    return _BY_SIGNAL + progress.stopped_by if because == "interrupted" else int(not is_done)


@cli.command()
@_study
@click.option("--sample", type=click.IntRange(0), default=10, help="Trials to train (default 10).")
@_take_over
@_storage
@_quiet
@_json
def audit(study: str, sample: int, take_over: bool, as_json: bool, **_: Any) -> int:
    """Audit a search's pruner: train a sample of its pruned trials."""
    from reports.pruning import audit_of, audited_grid
    from reports.record import read_record
    from study.cli.views import grid_table, print_json, print_view
    from study.search.audit import audit_study

    because = None
    with _open() as store, _progress() as progress:
        if sample:
            line = _command_line()
            because = audit_study(
                store, study, sample, progress=progress, command=line, take_over=take_over
            )
        found = audit_of(read_record(store, study))
    status = _BY_SIGNAL + progress.stopped_by if because == "interrupted" else 0
    if as_json:
        print_json(found)
        return status
    grid = audited_grid(found)
    if grid.rows:
        print_view(grid.title)
        print_view(grid_table(grid))
        print(f"{grid.note}\n")
    none = ["No trial of this study was pruned; nothing to audit."]
    print(*(found.findings or none), sep="\n")
    return status


# The record.


@cli.command("list")
@_storage
@_json
def list_studies(**_: Any) -> None:
    """List the studies of a database."""
    from study.cli.views import studies_table

    with _open() as store:
        summaries = store.studies()
    _print(studies_table(summaries), summaries)


@cli.command()
@_study
@click.option("--trial", type=_number, metavar="N", help="Show this trial in full.")
@_storage
@_json
def show(study: str, trial: int | None, **_: Any) -> None:
    """Show a study, or one of its trials."""
    from study.cli import views

    with _open() as store:
        row = store.study(study)
        if trial is None:
            trials, tests = store.trials(row.id), store.tests(row.id)
            view = views.study_view(row, trials, tests)
            _print(view, {**dataclasses.asdict(row), "trials": trials, "tests": tests})
        else:
            found = store.trial(row.id, trial)
            epochs = store.epochs(found.id)
            view = views.trial_view(found, epochs)
            _print(view, {**dataclasses.asdict(found), "epochs": epochs})


@cli.command()
@_study
@_storage
@_json
def status(study: str, **_: Any) -> None:
    """Say whether a study is running, and where it stands."""
    from study.cli.views import status_text

    with _open() as store:
        row = store.study(study)
        trials, run = store.trials(row.id), store.working(row.id)
    facts = {"study": study, "process": run and run.pid, "host": run and run.host}
    _print(status_text(study, trials, run), {**facts, "states": Counter(t.state for t in trials)})


@cli.command()
@_study
@_storage
def stop(study: str, **_: Any) -> None:
    """Stop a running study as Ctrl-C does; `resume` continues it."""
    import socket

    with _open() as store:
        run = store.working(store.study(study).id)
    if run is None:
        print(f"Study {study} is not running.")
        return
    if run.host != socket.gethostname():
        raise click.ClickException(
            f"study {study} runs on {run.host} (process {run.pid}). Stop it there."
        )
    try:
        os.kill(run.pid, signal.SIGINT)
    except PermissionError as err:
        text = f"process {run.pid} of study {study} belongs to another user, who can stop it."
        raise click.ClickException(text) from err
    print(f"Asked process {run.pid} to stop; its trial is kept, and `resume` continues it.")


@cli.command()
@_study
@_flag("--yes", help="Do not ask.")
@_flag("--take-over", help="Also where a process on a lost machine has not signed off.")
@_storage
def delete(study: str, yes: bool, take_over: bool, **_: Any) -> None:
    """Delete a study and its checkpoints."""
    from study.cli.delete import delete_study

    with _open() as store:
        n_trials = len(store.trials(store.study(study).id))
        if not yes and not sys.stdin.isatty():
            message = "delete must be confirmed, but there is no terminal; add --yes."
            raise click.ClickException(message)
        question = f"Delete study {study}, {n_trials} trials, with its checkpoints?"
        if not yes and not click.confirm(question):
            print("Nothing deleted.")
            return
        line = _command_line()
        gone, left = delete_study(store, study, command=line, take_over=take_over)
    print(f"Deleted study {study}: {n_trials} trials, {len(gone)} checkpoints.")
    if left:
        print("Not this study's, so they stay:", *left, sep="\n  ")


@cli.command()
@_study
@click.option("--trial", type=_number, metavar="N", help="This trial instead of the model.")
@_many("--levels", metavar="LEVEL", help="Of an ablation: all, or 'weights = none'.")
@_storage
@_json
def test(study: str, trial: int | None, levels: Sequence[str], as_json: bool, **_: Any) -> None:
    """Evaluate the model on the test split, once."""
    from study.cli.views import describe_use
    from study.search.final_test import test_model, test_trials

    with _open() as store, _progress() as progress:
        found, line = store.study(study), _command_line()
        is_ablation = bool(store.designs(found.id))
        if levels and trial is not None:
            raise click.UsageError("--trial and --levels must not both be given.")
        if levels:
            from study.cli.ablation import test_levels

            if not is_ablation:
                raise click.ClickException(
                    f"--levels is for ablations, but study {study} is a search. Leave it out, or "
                    f"make an ablation of it: python -m study ablate {shlex.quote(study)}"
                )
            test_levels(store, study, levels, progress, command=line, as_json=as_json)
            return
        if is_ablation and trial is None:
            raise _no_best(study, "test", "--levels all")
        n_before = len(store.tests(found.id))
        if trial is None:
            store.best_trial(found)  # says so where no trial is complete
            row = test_model(store, study, progress=progress, command=line)
        else:
            (row,) = test_trials(store, study, [trial], progress=progress, command=line)
        tests = store.tests(found.id)
        folder = found.output / "report"
        if (folder / "report.html").exists():  # what it says of the test has changed
            from reports.search_report import write_report

            write_report(store, study, folder)
    _print(describe_use(row, tests, is_new=len(tests) > n_before), row)


@cli.command()
@_study
@click.option("--out", type=_path, metavar="FOLDER", help="Where to write it.")
@_many("--beside", metavar="STUDY", help="Another study to compare with.")
@_flag("--watch", help="Write it again while the study runs; the page follows.")
@_storage
def report(study: str, out: Path | None, beside: Sequence[str], watch: bool, **_: Any) -> None:
    """Write the report: a page, CSV, plots."""
    with _open() as store:
        row = store.study(study)
        if store.designs(row.id):
            from reports.ablation_report import write_ablation

            if watch:
                raise click.ClickException(f"--watch is for searches, but {study} is an ablation.")
            made = write_ablation(store, study, out or row.output / "ablation", beside=beside)
            print(made.html, made.markdown, made.latex, *made.csv, sep="\n")
        else:
            from reports.search_report import write_report

            target, is_first = out or row.output / "report", True
            while True:
                is_last = not watch or store.working(row.id) is None
                refresh_s = 0 if is_last else _WATCH_S  # the last page stands still
                paths = write_report(store, study, target, beside=beside, refresh_s=refresh_s)
                if is_first:
                    print(paths.html, paths.csv, sep="\n", flush=True)
                if is_last:
                    break
                is_first = False
                time.sleep(_WATCH_S)


@cli.command()
@_study
@click.option("--out", type=_path, metavar="FILE", help="By default STUDY.zip.")
@_storage
def archive(study: str, out: Path | None, **_: Any) -> None:
    """Write a study's record, configuration, split file and reports into one ZIP file."""
    from study.cli.archive import write_archive

    with _open() as store:
        print(write_archive(store, study, out or Path(f"{study}.zip")))


@cli.command()
@click.option("--port", type=click.IntRange(1, 65535), default=8080, help="8080 by default.")
@_storage
def dashboard(port: int, **_: Any) -> int:
    """Open Optuna's dashboard on the studies of a database."""
    from study.cli.dashboard import open_dashboard

    with _open() as store:
        return open_dashboard(store, port)


# Configuration and backbones.


@cli.command()
@click.argument("file", type=_path, default="study.toml")
@click.option("--data", metavar="PATH", help="Folder of images to write into it.")
@_flag("--force", help="Replace the file.")
def init(file: Path, data: str | None, force: bool) -> None:
    """Write a commented study.toml."""
    from study.config.load import load_config
    from study.config.toml import config_text, write_new

    text = config_text(load_config(flags=_flags()), with_help=True)
    write_new(file, text, may_replace=force)
    todo = "Next:" if data else "Set data.source in it to your images (now the digits):"
    print(f"Wrote {file}. {todo}\n  python -m study run --config {shlex.quote(str(file))}")


@cli.command()
@click.argument("name", required=False)
@_flag("--modern", help="List those that run --download adds, with their sources.")
@_json
def backbones(name: str | None, modern: bool, **_: Any) -> None:
    """List backbones, or the freeze levels of one."""
    from core.models.builder import stages_of
    from core.models.freeze_stages import describe_levels
    from core.models.sources import backbone_names, find_source
    from study.cli.views import levels_view, modern_view
    from study.config.backbones import MODERN

    if modern:
        _print(modern_view(MODERN), MODERN)
        return
    names = backbone_names()
    if name in names:
        levels = describe_levels(*stages_of(name))
        _print(levels_view(name, levels), levels)
        return
    found = [known for known in names if name is None or name in known]
    if name and not found:
        find_source(name)  # raises, with the nearest names
    _print("\n".join(found), found)
