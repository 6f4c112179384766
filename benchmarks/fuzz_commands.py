"""Does a configuration or a command line end in a traceback, a hang, or a file written outside?

Changes values, keys, types and bytes of the shipped configurations and documented commands, and
runs each in this process, in a temporary folder. `run` and `ablate` only print their plan.
    python benchmarks/fuzz_commands.py 2000 0    # commands, seed
"""

import io
import os
import random
import re
import shlex
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import click

from study.cli.main import cli, main

CONFIGS = [*(Path(__file__).resolve().parents[1] / "configs").glob("*.toml")]
HANG_S = 60  # no command here needs a tenth of it
DATA = "--data digits --set backbone=timm:test_resnet --set weights=none --set image_size=32 \
--set limit=40 --set epochs=1"
COMMANDS = f"""run --config study.toml {DATA}\nrun {DATA} --trials 3 --timeout 2h --cache 8GB
ablate study.toml {DATA} --factor head_lr_mult=1,100 --replicates 5
ablate study.toml {DATA} --design loco --resplit --adaptive
ablate a --factor weights=none --factor augment=none --from 0
resume a --trials 1\ntest a --trial 0\ntest a --levels all\naudit a --sample 0\ndelete b --yes
list --json\nshow a\nshow a --trial 0 --json\nreport a --out out --beside a\nbackbones resnet
backbones timm:test_vit\ninit new.toml --force\ninit --data digits"""
# What a command ends with, so that none trains for as long as it asks for.
LAST = {"run": ["--dry-run"], "ablate": ["--dry-run"], "resume": ["--timeout", "1s"]}
WORDS = """0 -1 1 2 3.5 1e400 -1e400 nan inf 1e-400 true none '' x [] {} [[[ ]]] { = , . - -- best
9223372036854775807 9223372036854775808 -9223372036854775809 99999999 0x7fffffffffffffffff ä/b
2000-01-01 07:32:00 1e5h 2h 8GB 9YB sqlite:// sqlite:///s.db postgresql://a:b@localhost:1/c x://
folder: digits torchvision: torchvision:CIFAR10 timm: timm:test_vit resnet18 study.toml {low={}}
{low=0,high=1} {low=1e-4,high=1e400} {choices=[]} [1,'a',true] {low=1,high=2,step=1e-320} "\\u0000"
[9223372036854775808] {low=0,high=9223372036854775807} "\\ud800" \ud800 \0 \u202e \x1b[31m all"""
VALUES = [*WORDS.split(), "9" * 5000, "[" * 3000, "{a=" * 500, f"0x{'f' * 5000}", "x" * 256, "\n"]


def mutated_file(rng: random.Random) -> bytes:
    """Return a shipped configuration with a few lines or bytes changed."""
    text = rng.choice(sorted(CONFIGS)).read_text(encoding="utf-8")
    lines = re.sub(r"# (\w+ =.*)", r"\1", text).splitlines()
    for _ in range(rng.randint(1, 3)):
        k, new = rng.randrange(len(lines)), rng.choice([*VALUES, rng.choice(lines)])
        key, _, value = lines[k].partition("=")
        pairs = (f"{key}={new}", f"{key}='{new}'", f"{new}={value}", lines[k] * 2, f"[{new}]", "")
        lines[k] = rng.choice(pairs)
    data = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
    for _ in range(rng.choice((0, 0, 0, 1, 20))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def mutated_line(rng: random.Random, keys: list[str]) -> list[str]:
    """Return a documented command with a few arguments changed, added or taken away."""
    words = shlex.split(rng.choice(COMMANDS.splitlines()))
    options = [o for o in cli.commands[words[0]].params if isinstance(o, click.Option)]
    for _ in range(rng.randint(0, 3)):
        value, option = rng.choice(VALUES), rng.choice(options)
        pair = f"{rng.choice(keys)}={value}"
        given = {"--set": pair, "--factor": f"{pair},{rng.choice(VALUES)}"}
        words += option.opts[:1] + [given.get(option.opts[0], value)] * (not option.is_flag)
        if rng.random() < 0.3:
            k = rng.randrange(1, len(words))
            words[k : k + 1] = rng.choice(([value], [value], []))
    return words + LAST.get(words[0], [])


def attempt(words: list[str]) -> str:
    """Run a command; return what was wrong with its end, if anything."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", how) for how in ("strict", "replace"))
    signal.alarm(HANG_S)
    try:
        with mock.patch("sys.stdout", out), mock.patch("sys.stderr", err):
            status = main(words)
        return "" if status in (0, 1, 2, 130) else f"status {status}"
    except BaseException as error:
        return "".join(traceback.format_exception(error)[-3:])
    finally:
        signal.alarm(0)


def run(n: int, seed: int, home: str) -> int:
    """Try `n` commands in a folder; print what went wrong, and return how much did."""
    rng, found = random.Random(seed), Counter[str]()
    keys = re.findall(r"(?m)^#? ?(\w+) =", "\n".join(c.read_text("utf-8") for c in CONFIGS))
    keys += ["space", "space.epochs", "space.base_lr.low"]

    def watch(event: str, args: tuple[object, ...]) -> None:
        is_write = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)  # type: ignore[operator]
        if is_write or event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir"):
            path = "/dev" if isinstance(args[0], int) else os.path.realpath(os.fsdecode(args[0]))
            if not path.startswith((home, "/dev")):
                found[f"outside: {event} {path}"] += 1

    sys.addaudithook(watch)
    for name in "ab":
        attempt(["run", *shlex.split(DATA), "--trials", "1", "--name", name])
    for k in range(n):
        Path("study.toml").write_bytes(mutated_file(rng))
        words = mutated_line(rng, keys)
        if wrong := attempt(words):
            found[wrong.strip().rpartition("\n")[2][:60]] += 1
            print(f"{k}: {[word[:80] for word in words]}\n{wrong[-3000:]}", flush=True)
    print(f"{n} commands, seed {seed}; wrong: {dict(found)}")
    return found.total()


if __name__ == "__main__":
    # Nothing of the program catches the exit by which the alarm ends a command that hangs.
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("hang"))
    with tempfile.TemporaryDirectory() as folder, mock.patch("matplotlib.figure.Figure.savefig"):
        home = tempfile.tempdir = os.path.realpath(folder)
        os.environ |= {"HOME": home, "XDG_CACHE_HOME": f"{home}/cache"}
        os.chdir(home)
        sys.exit(bool(run(int(sys.argv[1]), int(sys.argv[2]), home)))
