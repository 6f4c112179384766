"""The best model for the same minutes: Frostline against rivals written by hand, on photo sets.

Each set's train and test parts are pooled and dealt into five folds, each the test part once. All
wall time is charged, that of decoding and features too; the test part is evaluated off the clock.
Every finished (set, fold, arm) is a line of the results and is skipped the next time; those so far
are in benchmarks/tables/minutes.jsonl.

    python benchmarks/minutes.py --data photos/hotdog photos/flowers5 --work /tmp/minutes
    python benchmarks/minutes.py --work /tmp/minutes --report \
        --results benchmarks/tables/minutes.jsonl --figure docs/images/minutes.png
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from core.config import TrainConfig
from core.data.decode import View, decode, strict_and_quiet
from core.data.partition import partition
from core.heads.solver import solve_head
from core.model import load_model
from core.models.builder import build

ROOT = Path(__file__).resolve().parent.parent
MOMENTS = (60, 180, 300, 900)
LITES = ("lite0", "lite1", "lite2")
N_FOLDS, SEED = 5, 15
BATCH = 32
# A processor without bf16 emulates it, a hundred times slower.
_CPU = Path("/proc/cpuinfo")
_HAS_BF16 = _CPU.exists() and "bf16" in _CPU.read_text()
_GRACE_S = 120  # after which a run that ignores its deadline is ended

Entry = tuple[float, float, float]
"""Seconds since the start, test accuracy, test log-loss."""
Array = np.ndarray[Any, Any]
Rows = dict[tuple[str, int, str], dict[str, Any]]
"""Results by set, fold and arm."""


@dataclass(frozen=True, slots=True)
class PhotoSet:
    """A set's images, pooled: paths, labels (N,), hashes of their contents, and class names."""

    name: str
    classes: tuple[str, ...]
    paths: list[Path]
    labels: Array
    contents: list[str]

    @classmethod
    def read(cls, folder: Path) -> "PhotoSet":
        """Pool the folder's train and test parts."""
        paths = sorted(p for part in ("train", "test") for p in folder.glob(f"{part}/*/*"))
        classes = tuple(sorted({path.parent.name for path in paths}))
        labels = np.array([classes.index(path.parent.name) for path in paths])
        contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        return cls(folder.name, classes, [p.resolve() for p in paths], labels, contents)


@dataclass(frozen=True, slots=True)
class Case:
    """One fold of a set as the test part; `train` and `test` are rows of the pooled images."""

    photos: PhotoSet
    fold: int
    work: Path
    train: Array
    test: Array

    def link(self) -> Path:
        """Make the folder of links to the training part, empty of all else."""
        folder = self.work / "cases" / f"{self.photos.name}-{self.fold}"
        shutil.rmtree(folder, ignore_errors=True)
        for path in (self.photos.paths[i] for i in self.train):
            link = folder / "train" / path.parent.name / f"{path.parent.parent.name}-{path.name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
        return folder.resolve()

    def entry(self, seconds: float, probs: Array) -> Entry:
        """Score the test part's probabilities, (N, K)."""
        labels = self.photos.labels[self.test]
        own = np.clip(probs[np.arange(len(labels)), labels], 1e-7, 1)
        return seconds, float((probs.argmax(1) == labels).mean()), float(-np.log(own).mean())

    def guess(self) -> Entry:
        """Score the classes' shares of the training part."""
        shares = np.bincount(self.photos.labels[self.train]) / len(self.train)
        return self.entry(0, np.tile(shares, (len(self.test), 1)))


# Frostline


def watch(command: list[str], folder: Path, model: Path, limit: float) -> tuple[float, int]:
    """Run a command in a folder, copying its model at the moments; return seconds, exit code."""
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with open(folder / "log.txt", "wb") as log:
        begin = time.perf_counter()
        env = {**os.environ, "PYTHONPATH": path}
        run = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=env)
        for moment in (*(m for m in MOMENTS if m <= limit), limit + _GRACE_S):
            try:
                code = run.wait(max(0, begin + moment - time.perf_counter()))
                break
            except subprocess.TimeoutExpired:
                copy_model(model, folder / f"at-{moment}")
        else:
            run.kill()
            code = run.wait()
        seconds = time.perf_counter() - begin
    copy_model(model, folder / "at-end")
    return seconds, code


def copy_model(model: Path, target: Path) -> None:
    """Copy a model, again if it is replaced meanwhile; none if there is none."""
    text, file = None, model / "model.json"
    while file.exists() and text != file.read_bytes():
        text = file.read_bytes()
        shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(OSError):  # what is replaced is removed
            shutil.copytree(model, target)


def frostline(case: Case, minutes: int) -> list[Entry]:
    """Run Frostline as it comes, and evaluate the copies afterwards."""
    name = f"{case.photos.name}-{case.fold}-{minutes}m"
    folder = (case.work / "frostline" / name).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "study", "run", "--data", str(case.link())]
    command += ["--time", f"{minutes}m", "--name", name, "--storage", str(folder / "studies.db")]
    command += ["--set", f'data.cache_dir="{folder / "cache"}"']
    model = folder / "frostline-runs" / name / "model"
    seconds, code = watch(command, folder, model, 60 * minutes)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    if code != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {code}; see {folder / 'log.txt'}")
    entries = []
    for part, s in {f"at-{m}": float(m) for m in MOMENTS} | {"at-end": seconds}.items():
        if (folder / part).exists():
            entries.append(model_entry(case, s, folder / part))
            shutil.rmtree(folder / part)
    return entries


def model_entry(case: Case, seconds: float, folder: Path) -> Entry:
    """Evaluate a saved model on the test part; a class that it does not know has probability 0."""
    model = load_model(folder)
    found = model.predict([case.photos.paths[i] for i in case.test])
    probs = np.zeros((len(found), len(case.photos.classes)))
    probs[:, [case.photos.classes.index(name) for name in model.classes]] = found
    return case.entry(seconds, probs)


# The rivals: heads on features of three pretrained networks


def imports_s(work: Path) -> float:
    """Measure once what imports cost a rival, the second time in a row."""
    file = work / "imports.json"
    if not file.exists():
        code = "import core.heads.solver, core.models.builder, core.data.decode"
        for _ in range(2):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
            file.write_text(json.dumps(time.perf_counter() - begin))
    return float(json.loads(file.read_text()))


class Layers(nn.Module):
    """Pooled inputs of the last three stages, and the last convolution's pooled output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net: Any = model

    def forward(self, images: Tensor) -> Tensor:
        """Return features, (N, F)."""
        net, found = self.net, []
        images = net.bn1(net.conv_stem(images))
        for k, stage in enumerate(net.blocks):
            if k >= len(net.blocks) - 3:
                found.append(images.float().mean((2, 3)))
            images = stage(images)
        found.append(net.bn2(net.conv_head(images)).float().mean((2, 3)))
        return torch.cat(found, 1)


def folded(module: nn.Module) -> nn.Module:
    """Fold the batch norms of a frozen network into the convolutions before them, in place."""
    before = ""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            conv: Any = module.get_submodule(before)
            setattr(module, before, fuse_conv_bn_eval(conv, child))
            # timm's norms hold their dropout and activation.
            setattr(module, name, nn.Sequential(*child.children()))
        else:
            folded(child)
            before = name
    return module


def ahead(work: Callable[[Array], Tensor], items: Sequence[Array]) -> Iterator[Tensor]:
    """Yield work(item) of each, the next one begun in a thread."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(work, items[0])
        for item in items[1:]:
            done, waiting = waiting, pool.submit(work, item)
            yield done.result()
        yield waiting.result()


@dataclass(frozen=True, slots=True)
class Features:
    """Features of a set's pooled images, (N, F), the last layer's at the end, and their cost."""

    rows: Tensor
    n_last: int
    per_image_s: float
    setup_s: float


@torch.no_grad()
def features(case: Case, lite: str, views: int) -> Features:
    """Return a set's features, computed once and kept with what they cost.

    They are averaged over the view and its mirror image for two views; norms are folded, images
    decoded ahead, and the network is in bf16 where the processor has it.
    """
    photos = case.photos
    digest = hashlib.sha256("".join(photos.contents).encode()).hexdigest()[:12]
    file = case.work / f"{photos.name}-{digest}-{lite}-{views}.npz"
    if not file.exists():
        begin = time.perf_counter()
        config = TrainConfig(backbone=f"timm:tf_efficientnet_{lite}", freeze_depth=5)
        network = build(config, photos.classes)
        layers = Layers(folded(copy.deepcopy(network.model).eval()))
        setup_s = time.perf_counter() - begin
        shown = network.preprocessing
        mean, std = (torch.tensor(figures).view(-1, 1, 1) for figures in (shown.mean, shown.std))

        def read(part: Array) -> Tensor:
            pixels = [decode(photos.paths[i], [View.of(shown)]).pixels[0] for i in part]
            images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)  # channels last
            return (images.float() / 255 - mean) / std

        every, found = np.arange(len(photos.paths)), []
        parts = [every[i : i + BATCH] for i in range(0, len(every), BATCH)]
        layers(read(parts[0]))  # warms up
        begin = time.perf_counter()
        with strict_and_quiet(), torch.autocast("cpu", torch.bfloat16, enabled=_HAS_BF16):
            for images in ahead(read, parts):
                both = [layers(view) for view in (images, images.flip(-1))[:views]]
                found.append(torch.stack(both).mean(0))
        per_image_s = (time.perf_counter() - begin) / len(every)
        n_last = network.model.get_submodule("classifier").in_features
        figures = {"n_last": n_last, "per_image_s": per_image_s, "setup_s": setup_s}
        np.savez(file, rows=torch.cat(found).numpy(), **figures)
    with np.load(file) as kept:
        cost = float(kept["per_image_s"]), float(kept["setup_s"])
        return Features(torch.from_numpy(kept["rows"]), int(kept["n_last"]), *cost)


def heads(case: Case, kind: str) -> list[Entry]:
    """Solve heads of Lite0 and of all three networks.

    Args:
        case: The case.
        kind: `best` or `average` of their last layers, or `sixty`: one head on several layers of
            them all, mirrored.
    """
    photos, is_sixty = case.photos, kind == "sixty"
    labels = torch.from_numpy(photos.labels[case.train])
    contents = [photos.contents[i] for i in case.train]
    folds = torch.from_numpy(partition(labels.tolist(), contents, 4, SEED + 1))
    entries, spent = [], imports_s(case.work)
    seen: list[Tensor] = []
    probs: list[Array] = []
    losses: list[float] = []
    for lite in LITES:
        of = features(case, lite, 2 if is_sixty else 1)
        spent += of.setup_s + of.per_image_s * len(case.train)
        seen.append(of.rows if is_sixty else of.rows[:, -of.n_last :])
        if is_sixty and lite == LITES[1]:
            continue
        rows = torch.cat(seen, 1) if is_sixty else seen[-1]
        begin = time.perf_counter()
        head = solve_head(rows[case.train], labels, len(photos.classes), folds)
        spent += time.perf_counter() - begin
        probs.append((rows[case.test] @ head.weight.t() + head.bias).softmax(1).numpy())
        losses.append(min(head.oof_log_loss.values()))
        if lite in (LITES[0], LITES[-1]):
            best = probs[int(np.argmin(losses))] if kind == "best" else probs[-1]
            entries.append(case.entry(spent, np.mean(probs, 0) if kind == "average" else best))
    return entries


ARMS: dict[str, Callable[[Case], list[Entry]]] = {
    "frostline": functools.partial(frostline, minutes=15),
    "frostline-1m": functools.partial(frostline, minutes=1),
    "last-layer-best": functools.partial(heads, kind="best"),
    "last-layer-average": functools.partial(heads, kind="average"),
    "sixty-lines": functools.partial(heads, kind="sixty"),
}


def run_cases(args: argparse.Namespace) -> bool:
    """Run what is missing, all arms of a case in one sitting; return whether all went well."""
    is_good = True
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    for photos in map(PhotoSet.read, args.data):
        fold_of = partition(photos.labels.tolist(), photos.contents, N_FOLDS, SEED)
        for fold in args.folds:
            train, test = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
            case = Case(photos, fold, args.work, train, test)
            done = read_results(args.results)
            for arm in [a for a in args.only if (photos.name, fold, a) not in done]:
                try:
                    entries = ARMS[arm](case)
                except Exception:  # one arm that fails must not end a night; it is run again
                    traceback.print_exc()
                    is_good = False
                    continue
                row = {"set": photos.name, "fold": fold, "arm": arm, "entries": entries}
                row |= {"commit": commit, "guess": case.guess()[1:]}
                row |= {"n_train": len(train), "n_test": len(test)}
                with open(args.results, "a", encoding="utf-8") as out:
                    out.write("\n" + json.dumps(row) + "\n")  # after a cut line
                print(photos.name, fold, arm, np.round(entries, 3).tolist(), flush=True)
    return is_good


# What came of it


def read_results(file: Path) -> Rows:
    """Read finished lines; one that a kill cut short is none."""
    found = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            found[row["set"], row["fold"], row["arm"]] = row
    return found


def accuracy_at(row: dict[str, Any], moment: float) -> float:
    """Return the accuracy of the last entry up to a moment, else that of a guess."""
    due = [entry for entry in row["entries"] if entry[0] <= moment]
    return float(max(due)[1] if due else row["guess"][0])


def corrected_interval(sets: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Return the mean of the sets' means and half its 95 % interval (None with one fold a set).

    Args:
        sets: Paired differences of each set's folds.

    References:
        Nadeau and Bengio 2003, https://doi.org/10.1023/A:1024068626366: folds share training
        images, so a mean's variance is that of the folds times (1/J + n_test/n_train).
        Degrees of freedom by Welch and Satterthwaite.
    """
    mean = float(np.mean([np.mean(folds) for folds in sets]))
    if min(len(folds) for folds in sets) < 2:
        return mean, None
    factor = 1 / (N_FOLDS - 1)
    each = [float(np.var(f, ddof=1)) * (1 / len(f) + factor) / len(sets) ** 2 for f in sets]
    if sum(each) == 0:
        return mean, 0.0
    freedom = sum(each) ** 2 / sum(v**2 / (len(f) - 1) for v, f in zip(each, sets, strict=True))
    return mean, float(student.ppf(0.975, freedom) * sum(each) ** 0.5)


def show(rows: Rows) -> None:
    """Print accuracies in per cent by arm and set, and Frostline's differences in points."""
    arms = list(dict.fromkeys(arm for *_, arm in rows))
    for moment in MOMENTS:
        cells = [(*key, accuracy_at(row, moment)) for key, row in rows.items()]
        frame = pd.DataFrame(cells, columns=["set", "fold", "arm", "accuracy"])
        frame = frame.pivot(index=["set", "fold"], columns="arm", values="accuracy")
        print(f"\nafter {moment / 60:g} min: test accuracy, %")
        print((100 * frame.groupby("set").mean())[arms].T.round(1).to_string())
        ours = [arm for arm in arms if arm == "frostline" or moment == 60 and "frostline" in arm]
        for our, rival in [(o, a) for o in ours for a in arms if "frostline" not in a]:
            gap = (frame[our] - frame[rival]).dropna()
            gaps = {name: folds.tolist() for name, folds in gap.groupby("set")}
            parts = [("all", list(gaps.values())), *((name, [gaps[name]]) for name in gaps)]
            texts = []
            for name, sets in parts if gaps else ():
                mean, half = corrected_interval(sets)
                ends = "" if half is None else f" ± {100 * half:.1f}"
                texts.append(f"{name} {100 * mean:+.1f}{ends} (n = {sum(map(len, sets))})")
            print(f"  {our} - {rival}: " + "; ".join(texts))


def draw(rows: Rows, file: Path) -> None:
    """Draw the accuracy over time, averaged over the cases that every arm has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = {"frostline": "Frostline", "sixty-lines": "three networks, one head (sixty lines)",
            "last-layer-average": "last layers of three networks, averaged",
            "last-layer-best": "last layer, best of three networks"}  # fmt: skip
    cases = [k[:2] for k in rows if k[2] == "frostline" and all((*k[:2], a) in rows for a in arms)]
    times = np.geomspace(20, MOMENTS[-1], 400)
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for arm, label in arms.items():
        each = [rows[*case, arm] for case in cases]
        first = max(min(e[0] for e in row["entries"]) for row in each)  # where every case has one
        shown = times[times >= first]
        curve = [100 * np.mean([accuracy_at(row, t) for row in each]) for t in shown]
        axes.plot(shown, curve, label=label, linewidth=2.5 if arm == "frostline" else 1.5)
    axes.set_xscale("log")
    axes.set_xticks([30, *MOMENTS], ["30 s", *(f"{m // 60} min" for m in MOMENTS)])
    axes.minorticks_off()
    axes.set_ylabel("test accuracy, %")
    axes.set_xlabel(f"time, two CPU cores; mean of {len(cases)} cases")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Run the cases, then print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", default=[])
    parser.add_argument("--work", type=Path, required=True, help="folder for results and features")
    parser.add_argument("--results", type=Path, help="file of results (WORK/results.jsonl)")
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--folds", type=int, nargs="+", default=range(N_FOLDS))
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--figure", type=Path, help="draw accuracy over time there")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.results = args.results or args.work / "results.jsonl"
    is_good = args.report or run_cases(args)
    if rows := read_results(args.results):
        show(rows)
        if args.figure:
            draw(rows, args.figure)
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
