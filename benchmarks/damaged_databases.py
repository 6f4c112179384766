"""Does a damaged database end in a traceback or a hang?

Damages copies of one real database, of a search that was tested, and runs in this process every
command that reads one.
    python benchmarks/damaged_databases.py 100 0    # databases, seed
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from study.cli.main import main

HANG_S = 120  # a report takes a tenth of it
RUN = """run --data digits --name s --trials 3 --set backbone=timm:test_resnet --set weights=none
--set image_size=32 --set limit=40 --set epochs=1 --set space.base_lr={low=1e-3,high=0.1}"""
COMMANDS = """list\nlist --json\nshow s\nshow s --json\nshow s --trial 1\nreport s --out out
resume s --trials 3\ntest s\nablate s --factor momentum=0.5 --dry-run\ndelete s --yes"""
VALUES = [None, "", "x", -1, 1.5, 2**63 - 1, b"\xff\x00", "[]", "{}", '"x"', "[1, {}]", '{"a": 1}']
ENDS = "exit 0", "exit 1", "exit 2"  # answered, halted, refused
SETTINGS = ("studies", "config"), ("studies", "data"), ("trials", "config")
STATEMENTS = {
    "table": "DROP TABLE {table}",
    "column": "ALTER TABLE {table} RENAME COLUMN {column} TO other",
    "rows": "DELETE FROM {table} WHERE rowid % 2 = {half}",
    "value": "UPDATE {table} SET {column} = ?",
}


def damage(path: Path, rng: random.Random) -> tuple[str, str]:
    """Damage a database in one way; return which, and where."""
    kind = rng.choice(("bytes", "bytes", "bytes", "end", "json", "value", *STATEMENTS))
    if kind in ("bytes", "end"):
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice((1, 10, 200))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data if kind == "bytes" else data[: rng.randrange(len(data))])
        return kind, ""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        tables = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
        table = rng.choice([name for (name,) in tables if not name.startswith("sqlite_")])
        column = rng.choice(connection.execute(f"PRAGMA table_info({table})").fetchall())[1]
        values = [rng.choice(VALUES)]
        if kind == "json":
            name, column = rng.choice(SETTINGS)
            table = f"frostline_{name}"
            text = connection.execute(f"SELECT {column} FROM {table}").fetchone()[0]
            values = [json.dumps(changed(json.loads(text), rng))]
        statement = STATEMENTS.get(kind, STATEMENTS["value"]).format(
            table=table, column=column, half=rng.randrange(2)
        )
        with contextlib.suppress(sqlite3.IntegrityError):
            connection.execute(statement, values if "?" in statement else [])
    return kind, f"{table}.{column}"


def changed(value: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Change or leave out one value, at any depth."""
    key = rng.choice(list(value))
    if isinstance(value[key], dict) and value[key] and rng.random() < 0.8:
        return {**value, key: changed(value[key], rng)}
    kept = {name: inner for name, inner in value.items() if name != key}
    return kept if rng.random() < 0.5 else {**kept, key: rng.choice(([], {}, None, "x", -1, 1e9))}


def outcome(line: str) -> str:
    """Run a command; return its exit status, or what went wrong."""
    signal.alarm(HANG_S)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return f"exit {main(line.split())}"
    except BaseException as err:
        return f"{type(err).__name__}: {err}"
    finally:
        signal.alarm(0)


def run(n: int, seed: int) -> bool:
    """Print a table of outcomes; return whether a command did not end with a status."""
    count: Counter[tuple[str, str]] = Counter()
    for k in range(seed, seed + n):
        shutil.copytree("whole", ".", dirs_exist_ok=True)
        kind, place = damage(Path("studies.db"), random.Random(k))
        for line in COMMANDS.splitlines():
            found = outcome(line)
            if found not in ENDS:
                print(f"seed {k}, {kind} {place}, {line}: {found}", flush=True)
            count[kind, found.partition(":")[0]] += 1
        for left in Path().glob("studies.db*"):
            left.unlink()
    print(*(f"{k:6} {found:12} {times}" for (k, found), times in sorted(count.items())), sep="\n")
    return any(found not in ENDS for _, found in count)


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # a hang ends with status 130
    os.chdir(tempfile.mkdtemp())
    made = [outcome(line) for line in (f"{RUN} --set data.cache_dir=cache", "test s")]
    assert made == ["exit 0"] * 2, made
    shutil.copytree(".", "whole", ignore=shutil.ignore_patterns("cache", "whole"))
    sys.exit(run(*map(int, sys.argv[1:3] or ("100", "0"))))
