"""Does a kill lose, change or repeat a trial? `kill -9` at random moments of two studies.

A search and an ablation are started again and again, and each start kills itself: most at a random
time of training, one in six between the two commits at a trial's end (ours, then Optuna's). After
each kill the record is compared with that after the kill before it.
    python benchmarks/kills.py 60 0    # kills, seed
"""

import faulthandler
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import optuna

from core.training import resume
from study.cli.main import main
from study.execution import trial_engine
from study.record.record import Record

# Where a kill lands: the first of these functions that is under way.
PLACES = {
    "_save": "writing a file", "save_if_due": "writing a file", "train_epoch": "inside an epoch",
    "evaluate": "inside an epoch", "add_epoch": "recording an epoch", "recover": "recovering",
    "_end": "ending a trial", "_begin": "beginning a trial", "_ask": "asking for a trial",
    "fit": "between epochs", "run": "between trials",
}  # fmt: skip
STUDY = """
data.source = "digits"
train = {backbone = "timm:test_resnet", weights = "none", image_size = 32, epochs = 2, \
batch_size = 64, freeze_depth = 0, head_solver = "sgd", device = "cpu"}
search = {sampler = "random", pruner = "median", recipes = false}
space.base_lr = {low = 1e-4, high = 1e-1, log = true}
"""
COMMANDS = {
    "search": "run --config study.toml --name search --quiet --trials",
    "ablation": "ablate study.toml --factor train.base_lr=0.001,0.003,0.03,0.1 --name ablation "
    "--quiet --replicates",
}
Trials = dict[int, tuple[Any, ...]]


def die(note: Path, place: str = "") -> None:
    """End this process as `kill -9` does, and leave word of where: a place, or all stacks."""
    with open(note, "w") as file:
        print(place, file=file, flush=True)
        faulthandler.dump_traceback(file)
        os.kill(os.getpid(), signal.SIGKILL)


def run_child(note: Path, plan: str, amount: float, arguments: list[str]) -> int:
    """Run a command that dies so long after training began, or at the so many-th second commit."""
    whole = {"training": trial_engine.fit, "commits": Record.tell}.get(plan)
    calls = itertools.count(1)

    def call(*args: Any, **more: Any) -> Any:
        n = next(calls)
        if plan == "training" and n == 1:
            threading.Timer(amount, die, [note]).start()
        elif plan == "commits" and n == amount:
            die(note, "between the two commits")
        return whole(*args, **more)

    if plan == "training":
        trial_engine.fit, resume._EVERY_S = call, 0.5  # states within an epoch, too
    elif plan == "commits":
        Record.tell = call  # type: ignore[method-assign]
    return main(arguments)


def start(work: Path, plan: str, amount: float, *arguments: str) -> str:
    """Run a command that kills itself as planned; return where it was."""
    note = work / "note"
    note.write_text("")
    command = [sys.executable, __file__, "--child", str(note), plan, str(amount), *arguments]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert done.returncode == (0 if plan == "none" else -signal.SIGKILL), done.stderr
    place, _, stacks = note.read_text().partition("\n")
    names = set(re.findall(r" in (\w+)$", stacks, re.M))
    return place or next((text for name, text in PLACES.items() if name in names), stacks)


def read(work: Path, name: str) -> Trials:
    """Return a study's trials, the state first; check that Optuna's tables and ours agree."""
    theirs = optuna.load_study(study_name=name, storage=f"sqlite:///{work / 'studies.db'}").trials
    trials: Trials = {}
    with Record(str(work / "studies.db")) as record:
        rows = {row.number: row for row in record.trials(record.study(name).id)}
        for trial in theirs:
            state, row = trial.state.name, rows.pop(trial.number, None)
            trials[trial.number] = (state,)
            if row is None:  # waiting, or asked for and never begun
                assert state in ("WAITING", "RUNNING", "FAIL"), trial
                continue
            known = [m.val_acc for m in record.epochs(row.id)]
            reported = [trial.intermediate_values[k] for k in sorted(trial.intermediate_values)]
            if state in ("COMPLETE", "PRUNED"):
                assert (reported, row.epochs_done) == (known, len(known)), trial
                assert state == "PRUNED" or trial.value == row.value, trial
            else:  # the last epoch may not have been reported
                assert reported in (known, known[:-1]), trial
            assert state == "RUNNING" or (row.ended_at and row.ended_as == row.state), trial
            trials[trial.number] = (state, row.config_hash, row.ended_at, row.reason, known)
    assert not rows, f"in our tables alone: {list(rows)}"
    return trials


def compare(before: Trials, after: Trials) -> int:
    """Check what a start made of the trials that were there; return how many are done by now."""
    for number, trial in before.items():
        assert trial[0] in ("RUNNING", "WAITING") or after[number] == trial, f"trial {number}"
    running = {number for number, trial in after.items() if trial[0] == "RUNNING"}
    assert len(running) <= 1, f"running: {running}"
    # One that was running before is being continued, so no other has been asked for since.
    assert not running & before.keys() or len(after) == len(before), f"running: {running}"
    done = [trial[1] for trial in after.values() if trial[0] in ("COMPLETE", "PRUNED")]
    assert len(done) == len(set(done)), "equal settings count twice"
    return len(done)


def run(kills: int, seed: int) -> None:
    """Kill both studies, let them end, and print where the kills landed."""
    rng, places = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "study.toml").write_text(STUDY)
        for name, line in COMMANDS.items():
            command, n_cells = line.split(), 1 if name == "search" else 5
            plans = [("commits", rng.choice((1, 1, 2))) for _ in range(kills // 12)]
            plans += [("training", rng.uniform(0, 6.0)) for _ in range(kills // 2 - len(plans))]
            rng.shuffle(plans)
            trials: Trials = {}
            for plan, amount in plans:
                place = start(work, plan, amount, *command, "200")
                before, trials = trials, read(work, name)
                n_done = compare(before, trials)
                places[place] += 1
                print(f"{name}: {place}, {n_done} done", flush=True)
            goal = n_done // n_cells + 1
            start(work, "none", 0, *command, str(goal))
            before, trials = trials, read(work, name)
            assert compare(before, trials) == goal * n_cells, trials
            states = Counter(trial[0] for trial in trials.values())
            assert not states["RUNNING"], states
            print(f"{name}: {dict(states)} after {len(plans)} kills", flush=True)
    print(*(f"{n:>3}  {place}" for place, n in places.most_common()), sep="\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(run_child(Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]), sys.argv[5:]))
    run(int(sys.argv[1]), int(sys.argv[2]))
