"""The commands and flags of the command line, and the nearest one for a misspelt one."""

import argparse
import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

DEFAULT_STORAGE = "studies.db"
"""The database where no other is named; the configuration's default is the same."""


class _Parser(argparse.ArgumentParser):
    """A parser that offers the nearest command or flag for a misspelt one."""

    def error(self, message: str) -> NoReturn:
        known = {flag for parser in _all_parsers(self) for flag in _words(parser)}
        wrong = re.search(r"invalid choice: '([^']+)'|unrecognized arguments: (\S+)", message)
        if wrong:
            word = (wrong[1] or wrong[2]).partition("=")[0]
            found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
            if found:
                is_elsewhere = found[0] == word  # a flag, but of another command
                message += ", a flag of other commands" if is_elsewhere else ""
                message += "" if is_elsewhere else f". Did you mean {found[0]}?"
        super().error(message)


def _children(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return {name: child for group in groups for name, child in group.choices.items()}


def _all_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    yield from _children(parser).values()


def _words(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield from _children(parser)
    for action in parser._actions:
        yield from action.option_strings


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = _Parser(
        prog="python -m study",
        description="Search how to fine-tune a pretrained image classifier on your own pictures.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        made.set_defaults(command=name)
        return made

    _add_run(command("run", "Run a study, or continue it; without flags, the demo."))
    _add_resume(command("resume", "Continue a study as it was configured."))
    _add_ablate(command("ablate", "Ablate a study's best trial, or a configuration."))
    _add_init(command("init", "Write a commented study.toml."))
    command("schema", "Print the JSON schema of study.toml.")
    backbones = command("backbones", "List backbones, or the freeze levels of one.")
    backbones.add_argument("name", nargs="?", help="a backbone, or a part of its name")
    _add_json(backbones)
    listed = command("list", "List the studies of a database.")
    show = command("show", "Show a study, or one of its trials.")
    show.add_argument("study")
    show.add_argument("--trial", type=int, metavar="N", help="show this trial in full")
    diff = command("diff", "Show what differs between two trials.")
    diff.add_argument("study")
    diff.add_argument("--trials", type=int, nargs=2, metavar=("A", "B"), required=True)
    delete = command("delete", "Delete a study and its checkpoints.")
    delete.add_argument("study")
    delete.add_argument("--yes", action="store_true", help="do not ask")
    test = command("test", "Evaluate the best trial on the test split, once.")
    test.add_argument("study")
    test.add_argument("--trial", type=int, metavar="N", help="this trial instead of the best")
    test.add_argument(
        "--levels",
        nargs="+",
        metavar="LEVEL",
        help="of an ablation: these levels ('weights = none' ...) and the baseline; or all",
    )
    report = command("report", "Write the report: a page, CSV, plots.")
    report.add_argument("study")
    report.add_argument("--out", type=Path, metavar="FOLDER", help="where to write it")
    report.add_argument("--ablation", action="store_true", help="the report of an ablation")
    report.add_argument(
        "--beside",
        nargs="+",
        default=[],
        metavar="STUDY",
        help="ablations on other datasets, compared with this one in one table",
    )
    report.add_argument(
        "--methods", action="store_true", help="print the paragraph for a paper, and nothing else"
    )
    audit = command("audit", "Audit a search's pruner: train a sample of its pruned trials.")
    audit.add_argument("study")
    audit.add_argument(
        "--sample", type=int, default=10, metavar="N", help="pruned trials to train (default 10)"
    )
    audit.add_argument(
        "--take-over", action="store_true", help="go on where a lost machine has not signed off"
    )
    audit.add_argument("--quiet", action="store_true", help="print warnings and the summary only")
    for made in (listed, show, diff, delete, test, report, audit):
        _add_storage(made, DEFAULT_STORAGE)
    for made in (listed, show, diff, test, audit):
        _add_json(made)
    return parser


def _add_storage(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--storage",
        default=default,
        metavar="DB",
        help=f"database: a file or an SQLAlchemy URL (default {DEFAULT_STORAGE})",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_sharing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        metavar="SIZE",
        help="most bytes for work that trials share, in memory and on disk, such as 8GB",
    )
    parser.add_argument(
        "--no-sharing",
        action="store_true",
        help="let every trial do all its work alone; the numbers are the same",
    )


def _add_search(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `run` and `resume` share."""
    _add_sharing(parser)
    add = parser.add_argument
    add("--trials", type=int, metavar="N", help="finished trials in total")
    add("--timeout", metavar="TIME", help="longest time of this run: seconds, or 90m, 2h")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the configuration; may be repeated",
    )
    add(
        "--allow-changes",
        action="store_true",
        help="continue a study although its configuration or its pictures changed",
    )
    add(
        "--take-over",
        action="store_true",
        help="continue a study that a process on another, lost machine has not signed off",
    )
    add("--quiet", action="store_true", help="print warnings and the summary only")
    _add_json(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", metavar="PATH", help="folder of pictures, torchvision:NAME, or digits")
    add("--config", type=Path, metavar="FILE", help="study.toml")
    add("--name", help="name of the study (default: that of the data folder)")
    _add_search(parser)
    add(
        "--dry-run",
        action="store_true",
        help="print the configuration and an estimate of time and disk instead of searching",
    )
    _add_storage(parser, None)


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study")
    _add_search(parser)
    _add_storage(parser, DEFAULT_STORAGE)


def _add_ablate(parser: argparse.ArgumentParser) -> None:
    _add_sharing(parser)
    add = parser.add_argument
    add("base", metavar="STUDY|FILE", help="a study, an ablation to go on with, or a study.toml")
    add(
        "--from",
        dest="which",
        default="best",
        metavar="TRIAL",
        help="the baseline: best (default), or a trial's number",
    )
    add(
        "--design",
        metavar="DESIGN",
        help="which settings are run: ofat (default), loco, factorial, path or screen",
    )
    add(
        "--factor",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="a training key and its levels; may be repeated",
    )
    add("--replicates", type=int, metavar="R", help="runs of every setting (default 5)")
    add("--resplit", action="store_true", help="draw a new validation split for each replicate")
    add("--adaptive", action="store_true", help="add replicates where a question is open")
    add("--name", help="name of the ablation's study (default: STUDY-ablation)")
    add("--data", metavar="PATH", help="pictures, where a file is ablated")
    add("--timeout", metavar="TIME", help="begin no run after this: seconds, or 90m, 2h")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the configuration (say, ablation.margin=0.5); may be repeated",
    )
    add("--take-over", action="store_true", help="go on where a lost machine has not signed off")
    add("--dry-run", action="store_true", help="print the runs and the time they need")
    add("--quiet", action="store_true", help="print warnings and the summary only")
    _add_json(parser)
    _add_storage(parser, None)


def _add_init(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", nargs="?", type=Path, default=Path("study.toml"))
    add("--data", metavar="PATH", help="folder of pictures to write into it")
    add("--demo", action="store_true", help="write the embedded demo's configuration")
    add("--force", action="store_true", help="replace the file")
