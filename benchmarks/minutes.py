"""The best model for the same minutes: Frostline against rivals written by hand, on photo sets.

Each set's train and test parts are pooled and dealt into five folds, each the test part once. All
wall time is charged, that of decoding and features too; the test part is evaluated off the clock.
Every finished (set, fold, arm) is a line of the results and is skipped the next time; those so far
are in benchmarks/tables/minutes.jsonl.

    python benchmarks/minutes.py --data photos/hotdog photos/flowers5 --work /tmp/minutes
    python benchmarks/minutes.py --data photos/hotdog --work /tmp/minutes --folds 0 \
        --only full-finetune plain-optuna
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import optuna
import pandas as pd
import torch
from scipy.stats import t as student
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.transforms import InterpolationMode, v2

from core.config import Preprocessing, TrainConfig
from core.data.decode import View, decode, strict_and_quiet
from core.data.partition import partition
from core.heads.solver import SolvedHead, solve_head
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
_REDUCED = 288  # shorter side that crops are cut from, 224 / 0.78; assumption
_CROP_SCALE = 0.35  # smallest share of the image in a crop, Frostline's own default
_RATE, _DECAY, _WARMUP = 3e-4, 0.05, 0.2  # a lab on the same sets
_THAW_EPOCHS, _THAW_VIEWS = 8, 3  # the same
_THAW_FROM = 10  # of Lite0's 16 blocks: "from about 60 % of its blocks on", the same
_MARGIN = 0.96  # of the time that is left is planned for, so that the last epoch still counts

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
    """One fold of a set as the test part; `train` and `test` are rows of the pooled images.

    An arm leaves in `facts` what it has to tell beyond its entries.
    """

    photos: PhotoSet
    fold: int
    work: Path
    train: Array
    test: Array
    facts: dict[str, Any] = field(default_factory=dict)

    def inner_folds(self, parts: Sequence[float] | int) -> Array:
        """Divide the training part."""
        contents = [self.photos.contents[i] for i in self.train]
        return partition(self.photos.labels[self.train].tolist(), contents, parts, SEED + 1)

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


def frostline(case: Case, seconds: int) -> list[Entry]:
    """Run Frostline as it comes, and evaluate the copies afterwards."""
    name = f"{case.photos.name}-{case.fold}-{seconds}s"
    folder = (case.work / "frostline" / name).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "study", "run", "--data", str(case.link())]
    command += ["--time", f"{seconds}s", "--name", name, "--storage", str(folder / "studies.db")]
    command += ["--set", f'data.cache_dir="{folder / "cache"}"']
    model = folder / "frostline-runs" / name / "model"
    spent, code = watch(command, folder, model, seconds)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    if code != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {code}; see {folder / 'log.txt'}")
    entries = []
    plan = json.loads((model.parent / "plan.json").read_text())
    case.facts["trials"] = [[t["origin"], t["forecast_s"], t["duration_s"]] for t in plan]
    case.facts["ended_s"] = spent
    copies = {f"at-{m}": float(m) for m in MOMENTS} | {"at-end": spent}
    for part, s in copies.items():
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


def batches(rows: Array) -> list[Array]:
    """Cut rows into batches, the last one shorter."""
    return [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]


def read_views(photos: PhotoSet, shown: Preprocessing, rows: Array) -> Tensor:
    """Decode a network's views of pooled images."""
    pixels = [decode(photos.paths[i], [View.of(shown)]).pixels[0] for i in rows]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255  # channels last
    return v2.functional.normalize(images, list(shown.mean), list(shown.std))


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
        read = functools.partial(read_views, photos, network.preprocessing)
        every, found = np.arange(len(photos.paths)), []
        parts = batches(every)
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


def solved(case: Case, rows: Tensor) -> tuple[SolvedHead, Array, float]:
    """Solve a head on the training part; return it, the test part's probabilities, and seconds."""
    begin = time.perf_counter()
    labels, folds = case.photos.labels[case.train], torch.from_numpy(case.inner_folds(4))
    n_classes = len(case.photos.classes)
    head = solve_head(rows[case.train], torch.from_numpy(labels), n_classes, folds)
    seconds = time.perf_counter() - begin
    return head, (rows[case.test] @ head.weight.t() + head.bias).softmax(1).numpy(), seconds


def heads(case: Case, kind: str) -> list[Entry]:
    """Solve heads of Lite0 and of all three networks.

    Args:
        case: The case.
        kind: `best` or `average` of their last layers, or `sixty`: one head on several layers of
            them all, mirrored.
    """
    is_sixty = kind == "sixty"
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
        head, found, seconds = solved(case, torch.cat(seen, 1) if is_sixty else seen[-1])
        spent += seconds
        probs.append(found)
        losses.append(min(head.oof_log_loss.values()))
        if lite in (LITES[0], LITES[-1]):
            best = probs[int(np.argmin(losses))] if kind == "best" else probs[-1]
            entries.append(case.entry(spent, np.mean(probs, 0) if kind == "average" else best))
    return entries


# The rivals that train Lite0


class Lite0:
    """Lite0, the pooled images `rows` in memory to train it on, and a clock that has `spent`."""

    def __init__(self, case: Case, rows: Array, spent: float) -> None:
        self.begin = time.perf_counter() - spent
        torch.manual_seed(SEED)
        config = TrainConfig(backbone=f"timm:tf_efficientnet_{LITES[0]}", freeze_depth=5)
        network = build(config, case.photos.classes)
        self.case, self.model, self.shown = case, network.model, network.preprocessing
        self.labels, paths = torch.from_numpy(case.photos.labels[rows]), case.photos.paths
        with strict_and_quiet(), ThreadPoolExecutor(2) as pool:
            images = pool.map(lambda i: decode(paths[i], [_REDUCED]).pixels[0], rows)
            self.images = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
        bicubic, scale = InterpolationMode.BICUBIC, (_CROP_SCALE, 1.0)
        crop = v2.RandomResizedCrop(self.shown.image_size, scale, interpolation=bicubic)
        numbers = v2.ToDtype(torch.float32, scale=True)
        normalize = v2.Normalize(list(self.shown.mean), list(self.shown.std))
        self.augment = v2.Compose([crop, v2.RandomHorizontalFlip(), numbers, normalize])
        self.inputs = self.crops

    def seconds(self) -> float:
        """Return the seconds so far, but for those off the clock."""
        return time.perf_counter() - self.begin

    def crops(self, part: Array) -> Tensor:
        """Return random crops of some images."""
        return torch.stack([self.augment(self.images[i]) for i in part])

    def halves(self, n_blocks: int) -> tuple[nn.Sequential, nn.Sequential]:
        """Copy the network, cut after its stem and so many blocks; the first half is frozen."""
        model: Any = copy.deepcopy(self.model)
        blocks = [block for stage in model.blocks for block in stage]
        ends = (model.conv_head, model.bn2, model.global_pool, model.classifier)
        start = nn.Sequential(model.conv_stem, model.bn1, *blocks[:n_blocks]).eval()
        return start, nn.Sequential(*blocks[n_blocks:], *ends)

    def epochs(
        self, start: nn.Module, rest: nn.Module, n: int, rate: float, decay: float
    ) -> Iterator[None]:
        """Train the rest by AdamW and one cycle, yielding after every epoch, while there is time.

        The start is frozen; the rest keeps its mode, of training or of evaluation.
        """
        rng, is_training = np.random.default_rng(SEED), rest.training
        n_steps = n * -(-len(self.images) // BATCH)
        optimizer = create_optimizer_v2(rest, "adamw", lr=rate, weight_decay=decay)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, n_steps, pct_start=_WARMUP)
        for _ in range(n):
            rest.train(is_training)
            parts = batches(rng.permutation(len(self.images)))
            for part, images in zip(parts, ahead(self.inputs, parts), strict=True):
                if self.seconds() > MOMENTS[-1]:
                    return
                with torch.no_grad():
                    outputs = start(images)
                optimizer.zero_grad()
                cross_entropy(rest(outputs), self.labels[part]).backward()
                optimizer.step()
                cycle.step()
            yield

    @torch.no_grad()
    def probs(self, model: nn.Module, rows: Array, views: int = 1) -> Array:
        """Predict pooled images, averaging the mirror image's probabilities for two views."""
        model.eval()
        read, found = functools.partial(read_views, self.case.photos, self.shown), []
        with strict_and_quiet():
            for images in ahead(read, batches(rows)):
                both = [model(view).softmax(1) for view in (images, images.flip(-1))[:views]]
                found.append(torch.stack(both).mean(0))
        return torch.cat(found).numpy()

    def entry(self, model: nn.Module, views: int = 1) -> Entry:
        """Evaluate a model on the test part, off the clock."""
        now = self.seconds()
        probs = self.probs(model, self.case.test, views)
        self.begin += self.seconds() - now
        return self.case.entry(now, probs)


def thaw(case: Case) -> list[Entry]:
    """Train the last blocks from Lite0's solved head, on views whose frozen part is kept."""
    of = features(case, LITES[0], 1)
    head, probs, seconds = solved(case, of.rows[:, -of.n_last :])
    spent = imports_s(case.work) + of.setup_s + of.per_image_s * len(case.train) + seconds
    first, lite = case.entry(spent, probs), Lite0(case, case.train, spent)
    last: Any = lite.model.get_submodule("classifier")
    last.load_state_dict({"weight": head.weight, "bias": head.bias})
    start, rest = lite.halves(_THAW_FROM)
    frozen, parts = folded(copy.deepcopy(start)), batches(np.arange(len(case.train)))
    kept = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=_HAS_BF16):
        for _ in range(_THAW_VIEWS):
            kept.append(torch.cat([frozen(x).float() for x in ahead(lite.crops, parts)]))

    lite.inputs = lambda part: kept[int(torch.randint(_THAW_VIEWS, ()))][part]
    rest.eval()  # norms keep the source's statistics
    list(lite.epochs(nn.Identity(), rest, _THAW_EPOCHS, _RATE, _DECAY))
    return [first, lite.entry(nn.Sequential(start, rest), views=2)]


def full(case: Case) -> list[Entry]:
    """Train all of Lite0 by one cycle of as many epochs as fit."""
    some = np.random.default_rng(SEED).permutation(case.train)[: 3 * BATCH]
    probe, start = Lite0(case, some, imports_s(case.work)), nn.Identity()
    trained = probe.epochs(start, probe.model.train(), 2, _RATE, _DECAY)
    first, second = (probe.seconds() for _ in trained)
    epoch_s = (second - first) * len(case.train) / len(some)  # the first one warms up
    lite = Lite0(case, case.train, probe.seconds())
    n = max(1, int((_MARGIN * MOMENTS[-1] - lite.seconds()) / epoch_s))
    trained = lite.epochs(start, lite.model.train(), n, _RATE, _DECAY)
    return [lite.entry(lite.model) for _ in trained]


def plain_optuna(case: Case) -> list[Entry]:
    """Search with plain Optuna; the best so far on a holdout is what a user would have."""
    is_held = case.inner_folds([0.2]) == 0
    held = case.train[is_held]
    lite = Lite0(case, case.train[~is_held], imports_s(case.work))
    entries: list[Entry] = []
    best = -1.0

    def objective(trial: optuna.Trial) -> float:
        nonlocal best
        start, rest = lite.halves(trial.suggest_int("frozen", 0, 16))
        rate = trial.suggest_float("lr", 1e-5, 1e-2, log=True)
        decay = trial.suggest_float("weight_decay", 1e-5, 0.1, log=True)
        n, whole, score = trial.suggest_int("epochs", 3, 8), nn.Sequential(start, rest), 0.0
        for epoch, _ in enumerate(lite.epochs(start, rest.train(), n, rate, decay)):
            found = lite.probs(whole, held).argmax(1)
            score = float((found == case.photos.labels[held]).mean())
            if score > best:
                best = score
                entries.append(lite.entry(whole))
            trial.report(score, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return score

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler, pruner = optuna.samplers.TPESampler(seed=SEED), optuna.pruners.MedianPruner()
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    while lite.seconds() < MOMENTS[-1]:
        study.optimize(objective, n_trials=1)
    return entries


ARMS: dict[str, Callable[[Case], list[Entry]]] = {
    "frostline": functools.partial(frostline, seconds=900),
    "frostline-1m": functools.partial(frostline, seconds=60),
    "last-layer-best": functools.partial(heads, kind="best"),
    "last-layer-average": functools.partial(heads, kind="average"),
    "sixty-lines": functools.partial(heads, kind="sixty"),
    "thaw-by-hand": thaw,
    "full-finetune": full,
    "plain-optuna": plain_optuna,
}
DEFAULT = list(ARMS)
DEADLINES = (30, 45, 90, 120, 150, 200, 300, 420, 600)
ARMS |= {f"frostline-{s}s": functools.partial(frostline, seconds=s) for s in DEADLINES}


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
                case.facts.clear()
                try:
                    entries = ARMS[arm](case)
                except Exception:  # one arm that fails must not end a night; it is run again
                    traceback.print_exc()
                    is_good = False
                    continue
                row = {"set": photos.name, "fold": fold, "arm": arm, "entries": entries}
                row |= {"commit": commit, "guess": case.guess()[1:]}
                row |= {"n_train": len(train), "n_test": len(test)} | case.facts
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
    arms = list(dict.fromkeys(arm for *_, arm in rows if arm in DEFAULT))
    for moment in MOMENTS:
        cells = [(*k, accuracy_at(row, moment)) for k, row in rows.items() if k[2] in DEFAULT]
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


def show_times(rows: Rows) -> None:
    """Print how Frostline kept its deadlines, and how long trials took against their forecasts."""
    known = {key: row for key, row in rows.items() if "ended_s" in row}
    limits = {"frostline": 900, "frostline-1m": 60} | {f"frostline-{s}s": s for s in DEADLINES}
    late = {key: row["ended_s"] - limits[key[2]] for key, row in known.items()}
    print(f"\n{len(late)} deadlines, seconds after each (negative: before it):")
    for name, fold, arm in sorted(late, key=lambda key: (limits[key[2]], key)):
        print(f"  {limits[arm]} s, {name} {fold}: {late[name, fold, arm]:+.1f}")
    for word in ("head", "thawed"):
        trials = (trial for row in known.values() for trial in row["trials"])
        ratios = [took / said for origin, said, took in trials if said and took and word in origin]
        ends = np.quantile(ratios or [np.nan], (0, 0.05, 0.5, 0.95, 1)).round(2)
        print(f"{word}: seconds per second of forecast, least to most (n = {len(ratios)}): {ends}")


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
    axes.legend(loc=(0.42, 0.14), frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Run the cases, then print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", default=[])
    parser.add_argument("--work", type=Path, required=True, help="folder for results and features")
    parser.add_argument("--results", type=Path, help="file of results (WORK/results.jsonl)")
    parser.add_argument("--only", nargs="+", choices=ARMS, default=DEFAULT)
    parser.add_argument("--folds", type=int, nargs="+", default=range(N_FOLDS))
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--figure", type=Path, help="draw accuracy over time there")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.results = args.results or args.work / "results.jsonl"
    is_good = args.report or run_cases(args)
    if rows := read_results(args.results):
        show(rows)
        show_times(rows)
        if args.figure:
            draw(rows, args.figure)
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
