"""Time to quality: seconds until a study's best model is as good as plain Optuna's at its end.

For each seed the naive side (benchmarks/naive.py: TPE and Hyperband, a fixed number of trials)
runs first and sets the budget, its wall time, and the target, the test accuracy of its
best-by-validation model at its end. Then Frostline's sides get the same seconds, pictures,
space, core and thread. All clocks begin with the process: imports and decoding count. Testing does
not: the naive side stops its clock for it, and Frostline's models are made again
from its record afterwards.

The ratio is the naive side's whole budget over a side's seconds until its best-by-validation model
first reaches the target. The naive side has a ratio, too: it often has its final accuracy early.
Each seed has its own validation split, so the data folder must have none of its own. Best by
validation means by accuracy on the naive side, as its script does it, and by what
`train.monitor` says for Frostline; `frostline-acc` tells what that alone is worth.

    python benchmarks/time_to_quality.py --data photos/hotdog --trials 10 --seeds 0 1 2 \
        --work work
    python benchmarks/anytime.py work/results.jsonl --out work

Every side's epochs stay in `work/runs`; a run that is there is not run again. What the machine
does besides falls on the sides unequally: run it on a quiet one, with a core of its own.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from naive import BACKBONES, BATCH_SIZE, CROP_SCALE, DEPTHS, EPOCHS, RATES

if TYPE_CHECKING:
    from core.config import TrainConfig
    from core.data.splits import ImageData
    from core.prefix_cache import PrefixCache
    from study.record.record import Record

# One thread on every side; the replay must add in the same order as the run did, too.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

ROOT = Path(__file__).parent.parent
FROSTLINE: dict[str, dict[str, dict[str, Any]]] = {
    "frostline": {},
    "frostline-acc": {"train": {"monitor": "val_acc"}},
    "frostline-alone": {"study": {"cache": 0}},
}
"""Frostline's sides: what each sets beyond the common study. The one place for its settings."""
# The naive side with one line more (channels-last memory): measured a quarter to a third faster.
NAIVE = {"naive": [], "naive-channels-last": ["--channels-last"]}
SIDES = (*NAIVE, *FROSTLINE)
_STUDY = "ttq"
_NO_END = 10**6
_REPLAY_CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class Point:
    """A new best-by-validation model of a study.

    Attributes:
        seconds: Since the side's process began.
        val_acc: Validation accuracy, in [0, 1].
        test_acc: Test accuracy.
    """

    seconds: float
    val_acc: float
    test_acc: float


@dataclass(frozen=True)
class Case:
    """One seed on one data set.

    Attributes:
        data: Folder of pictures.
        seed: Of the sampler, of training and of the validation split: a split that happens to be
            easy for one kind of model would otherwise count in every seed.
        args: The command line.
    """

    data: Path
    seed: int
    args: argparse.Namespace

    @property
    def task(self) -> Path:
        """Folder that `naive.py prepare` wrote."""
        return self.args.work / "tasks" / f"{self.data.name}-{self.seed}"

    def record(self, side: str) -> Path:
        """Return the file of a side's epochs."""
        return self.args.work / "runs" / f"{self.data.name}-{self.seed}-{side}.jsonl"


def timed(command: Sequence[str | Path], log: Path, **env: str) -> dict[str, float]:
    """Run a command to its end.

    Returns:
        When it `began`, seconds since 1970; its `wall_s`; `cpu_s` of its processes, as far as
        they were waited for; and the machine's `load` before it.

    Raises:
        SystemExit: It failed; names the log.
    """
    load, before = os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.time()
    words = [str(word).replace("{began}", repr(began)) for word in command]
    with open(log, "w", encoding="utf-8") as file:
        ended = subprocess.run(
            words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **env}, stdout=file,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if ended.returncode:
        sys.exit(f"{' '.join(words[:3])} failed with {ended.returncode}; see {log}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"began": began, "wall_s": time.time() - began, "cpu_s": cpu, "load": load}


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run_script(case: Case, side: str, *options: str) -> None:
    """Run the naive side, which writes its record itself."""
    out = case.record(side)
    partial = out.with_suffix(".part")
    partial.unlink(missing_ok=True)
    words = [sys.executable, ROOT / "benchmarks" / "naive.py", "study", *NAIVE[side]]
    words += ["--task", case.task, "--seed", str(case.seed), "--epochs", str(case.args.epochs)]
    facts = timed(
        [*words, "--out", partial, "--began", "{began}", *options],
        out.with_suffix(".log"),
    )
    finish(partial, out, facts)


def finish(partial: Path, out: Path, facts: Mapping[str, Any]) -> None:
    """Add what is known of a whole run to its record, and call it done."""
    with open(partial, "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "process", **facts}) + "\n")
    partial.rename(out)


def toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Write settings as TOML."""
    lines = []
    for section, values in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml_value(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)  # strings, numbers, booleans and lists are the same in both


def frostline_config(case: Case, side: str, folder: Path, budget: float) -> str:
    """Return the study that Frostline runs: the naive side's space, for so many seconds."""
    args = case.args
    sections: dict[str, dict[str, Any]] = {
        "study": {
            "name": _STUDY,
            "trials": _NO_END,
            "timeout": budget,
            "storage": str(folder / "studies.db"),
            "output": str(folder / "runs"),
            "seed": case.seed,
        },
        "data": {
            "source": f"folder:{case.data.resolve()}",
            "val_seed": case.seed,
            "cache_dir": str(folder / "cache"),
        },
        "train": {
            "weights": "auto",
            "image_size": args.size,
            "epochs": args.epochs,
            "batch_size": BATCH_SIZE,
            "crop_scale": CROP_SCALE[0],
            "seed": case.seed,
            "device": "cpu",
        },
        "search": {},
        "space": {
            "backbone": {"choices": list(args.backbones)},
            "freeze_depth": {"low": DEPTHS[0], "high": DEPTHS[-1]},
            **{
                name: {"low": low, "high": high, "log": True}
                for name, (low, high) in RATES.items()
            },
        },
    }
    if args.limit:
        sections["data"]["limit"] = args.limit
    for section, values in FROSTLINE[side].items():
        sections[section] |= values
    return toml(sections)


def frostline_side(case: Case, side: str, budget: float) -> None:
    """Run a study by its command line with an empty store, and make its record afterwards."""
    folder = (case.args.work / "frostline" / case.record(side).stem).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = folder / "study.toml"
    config.write_text(frostline_config(case, side, folder, budget), encoding="utf-8")
    out = case.record(side)
    command = [sys.executable, "-m", "study", "run", "--config", config, "--quiet"]
    facts = timed(command, out.with_suffix(".log"))
    partial = out.with_suffix(".part")
    with open(partial, "w", encoding="utf-8") as file:
        for row in frostline_record(folder / "studies.db", facts["began"]):
            file.write(json.dumps(row) + "\n")
    finish(partial, out, facts)
    shutil.rmtree(folder / "cache", ignore_errors=True)


def frostline_record(storage: Path, began: float) -> list[dict[str, Any]]:
    """Turn a study's record into rows as the naive side writes them.

    The record has every epoch's validation accuracy and when it was known. The models are gone,
    but trials repeat exactly: each trial that had a new best over all epochs of all trials is
    trained again as far as that, and its network as it is then is tested. `repeats` says whether
    its training loss and validation accuracy were those of the record, to the last digit.

    Args:
        storage: The study's database.
        began: When the process began, seconds since 1970.
    """
    from core.config import TrainConfig
    from core.prefix_cache import PrefixCache
    from study.config.study_config import StudyConfig
    from study.execution.progress import QuietProgress
    from study.execution.session import load_images
    from study.record.record import Record

    with Record.open(str(storage)) as store:
        study = store.study(_STUDY)
        rows = timeline(store, began)
        trains = {trial.number: trial.config for trial in store.trials(study.id)}
        data = load_images(StudyConfig.from_record(study.config), QuietProgress())
    last_best: dict[int, int] = {}
    for row in rows:
        if row["is_best"]:
            last_best[row["trial"]] = max(row["epoch"], last_best.get(row["trial"], 0))
    cache = PrefixCache(_REPLAY_CACHE_BYTES)
    for number, last in last_best.items():
        own = {row["epoch"]: row for row in rows if row["trial"] == number}
        wanted = {epoch for epoch, row in own.items() if row["is_best"]}
        again = replay(TrainConfig(**trains[number]), data, wanted, last, cache)
        for epoch, facts in again.items():
            row = own[epoch]
            row["repeats"] = all(row[k] == facts[k] for k in ("train_loss", "val_acc"))
            row["replayed_val_acc"] = facts["val_acc"]
            row["test_acc"] = facts["test_acc"]
    return rows


def _as_written(store: "Record") -> list[tuple[int, int]]:
    """List trial and epoch in the order in which the study wrote them."""
    from sqlalchemy import text

    query = (
        "select t.number, e.epoch from frostline_epochs e "
        "join frostline_trials t on t.id = e.trial_id order by e.rowid"
    )
    with store.engine.connect() as connection:
        return [(int(number), int(epoch)) for number, epoch in connection.execute(text(query))]


def timeline(store: "Record", began: float) -> list[dict[str, Any]]:
    """List all epochs of a study in the order in which they ended.

    Epochs of one process cannot overlap, so an epoch ends when its trial's clock says, or as late
    as the epoch before it and its own time ask.
    """
    from study.record.frames import read_epochs

    trials = {trial.number: trial for trial in store.trials(store.study(_STUDY).id)}
    epochs = {
        (epoch["number"], epoch["epoch"]): epoch
        for epoch in read_epochs(store, _STUDY).to_dict("records")
    }
    rows = []
    best = before = 0.0
    for key in _as_written(store):
        epoch, trial = epochs[key], trials[key[0]]
        started = trial.started_at.replace(tzinfo=UTC).timestamp() - began
        spent = epoch["data_s"] + epoch["train_s"] + epoch["eval_s"]
        ended = before = max(started + epoch["seconds_since_start"], before + spent)
        row = {"seconds": ended, "trial": trial.number, "spent_s": spent}
        row |= {key: epoch[key] for key in ("epoch", "val_acc", "train_loss", "score")}
        row["is_best"] = row["score"] > best
        best = max(best, row["score"])
        rows.append(row | {"origin": trial.origin} | trial.params)
    return rows


def replay(
    config: "TrainConfig", data: "ImageData", wanted: set[int], last: int, cache: "PrefixCache"
) -> dict[int, dict[str, float]]:
    """Train a trial again and test its network after the wanted epochs.

    `fit` hands out figures only, and a checkpoint only of a run's end; the network is taken from
    the generator while it waits.

    Returns:
        Training loss, validation and test accuracy, by epoch.
    """
    from core.fit import fit

    found = {}
    with contextlib.closing(fit(config, data, None, cache)) as epochs:
        for metrics in epochs:
            if metrics.epoch in wanted:
                state = epochs.gi_frame.f_locals["run"].snapshot()
                found[metrics.epoch] = {
                    "train_loss": metrics.train_loss,
                    "val_acc": metrics.val_acc,
                    "test_acc": test_accuracy(config, data, state),
                }
            if metrics.epoch == last:
                break
    return found


def test_accuracy(config: "TrainConfig", data: "ImageData", state: Mapping[str, Any]) -> float:
    """Test a network's weights as `study test` does."""
    from core.device import choose_device
    from core.evaluate import evaluate
    from core.feed import Normalizer, eval_batches, view_spec
    from core.fit import build_for

    assert data.test is not None
    built, device = build_for(config, data.classes), choose_device(config.device)
    built.model.load_state_dict(state)
    normalize = Normalizer(built.preprocessing, device, config.channels_last)
    views = eval_batches(data.test, view_spec(config, built.preprocessing), device)
    model = built.model.to(device)
    return evaluate(model, map(normalize, views), data.test.labels).acc


def curve(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return the new bests of a record, in order."""
    best = [row for row in rows if row.get("is_best")]
    return [Point(row["seconds"], row["val_acc"], row["test_acc"]) for row in best]


def first_reach(points: Sequence[Point], target: float) -> float | None:
    """Return when the best-by-validation model first had the target, seconds; None if never."""
    return next((point.seconds for point in points if point.test_acc >= target), None)


def lasting_reach(points: Sequence[Point], target: float) -> float | None:
    """Return since when it has had the target to the end, seconds; None if it has not."""
    below = [k for k, point in enumerate(points) if point.test_acc < target]
    after = points[below[-1] + 1 :] if below else points
    return after[0].seconds if after else None


def summary(case: Case, side: str, budget: float, target: float) -> dict[str, Any]:
    """Sum up a side's run."""
    rows = read_rows(case.record(side))
    points = curve(rows)
    in_budget = [point for point in points if point.seconds <= budget]
    process = next(row for row in rows if row.get("event") == "process")
    epochs = [row for row in rows if "epoch" in row]
    reach = first_reach(points, target)
    return {
        "data": case.data.name,
        "seed": case.seed,
        "side": side,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "budget_s": budget,
        "target": target,
        "final_test_acc": in_budget[-1].test_acc if in_budget else None,
        "final_val_acc": in_budget[-1].val_acc if in_budget else None,
        "reach_s": reach,
        "lasting_reach_s": lasting_reach(points, target),
        "ratio": budget / reach if reach else None,
        "ended_s": next((row["seconds"] for row in rows if row.get("event") == "end"), None),
        "n_epochs": len(epochs),
        "n_trials": len({row["trial"] for row in epochs}),
        "repeats": all(row.get("repeats", True) for row in rows),
        "curve": [[point.seconds, point.val_acc, point.test_acc] for point in points],
        **{key: process[key] for key in ("wall_s", "cpu_s", "load")},
    }


def run_case(case: Case) -> None:
    """Run every side for one seed; the naive one first, since it sets budget and target."""
    run_side(case, "naive", None)
    rows = read_rows(case.record("naive"))
    budget = next(row["seconds"] for row in rows if row.get("event") == "end")
    target = curve(rows)[-1].test_acc
    for side in ("naive", *(side for side in case.args.sides if side != "naive")):
        run_side(case, side, budget)
        row = summary(case, side, budget, target)
        with open(case.args.work / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        told = [row[key] for key in ("final_test_acc", "reach_s", "lasting_reach_s", "ratio")]
        print(
            f"{case.data.name:12} seed {case.seed} {side:18} budget {budget:6.1f} s, target "
            f"{target:.3f}: final {_told(told[0], 3)}, reached {_told(told[1], 1)} s, for good "
            f"{_told(told[2], 1)} s, ratio {_told(told[3], 2)}; {row['n_trials']} trials, "
            f"{row['n_epochs']} epochs{'' if row['repeats'] else '; DOES NOT REPEAT'}",
            flush=True,
        )


def run_side(case: Case, side: str, budget: float | None) -> None:
    """Run a side, unless its record is there."""
    if case.record(side).exists():
        return
    if side in NAIVE:
        run_script(case, side, "--trials", str(case.args.trials))
        return
    assert budget is not None, "the naive side runs first"
    if side in FROSTLINE:
        frostline_side(case, side, budget)
    else:
        run_script(case, side, "--budget", repr(budget))


def _told(value: float | None, digits: int) -> str:
    return "never" if value is None else f"{value:.{digits}f}"


def prepare_task(case: Case) -> None:
    """Write down splits, freeze levels and weights for the other sides; warms the disk, too."""
    if (case.task / "task.json").exists():
        return
    args = case.args
    words = [sys.executable, ROOT / "benchmarks" / "naive.py", "prepare", "--data", case.data]
    words += ["--size", str(args.size), "--out", case.task, "--backbones", *args.backbones]
    words += ["--val-seed", str(case.seed)]
    words += ["--limit", str(args.limit)] if args.limit else []
    timed(words, args.work / "prepare.log")


def main() -> None:
    """Run all sides, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--trials", type=int, required=True, help="of the naive side")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["naive", "frostline"])
    parser.add_argument("--work", type=Path, required=True, help="folder for all that is written")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--limit", type=int, help="training pictures")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES))
    parser.add_argument("--core", type=int, default=0, help="the one core that all sides run on")
    args = parser.parse_args()
    args.work = args.work.resolve()
    if (args.work / "tasks" / args.data.name / "task.json").exists():
        sys.exit(f"{args.work} holds runs of one split for all seeds; use another --work.")
    os.sched_setaffinity(0, {args.core})  # as `taskset -c`; every process below inherits it
    (args.work / "runs").mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        case = Case(args.data, seed, args)
        prepare_task(case)
        run_case(case)


if __name__ == "__main__":
    main()
