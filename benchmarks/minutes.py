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
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import optuna
import torch
from PIL import Image
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.fusion import fuse_conv_bn_weights

from core.config import TrainConfig
from core.data.decode import View, decode, strict_and_quiet
from core.data.partition import partition
from core.heads.solver import SolvedHead, solve_head
from core.model import load_model
from core.models.builder import Network, build

ROOT = Path(__file__).resolve().parent.parent
MOMENTS = (60, 180, 300, 900)
LITES = ("lite0", "lite1", "lite2")
N_FOLDS, SEED = 5, 15
BATCH = 32
# A processor without bf16 emulates it, a hundred times slower.
_CPU = Path("/proc/cpuinfo")
_HAS_BF16 = _CPU.exists() and "bf16" in _CPU.read_text()
KINDS = ("folded", "folded bf16") if _HAS_BF16 else ("folded",)
_REDUCED = 288  # shorter side that crops are cut from, 224 / 0.78; assumption
_CROP_SCALE = 0.35  # smallest share of the image in a crop, Frostline's own default
_RATE, _DECAY, _WARMUP = 3e-4, 0.05, 0.2  # a lab on the same sets
_THAW_EPOCHS, _THAW_VIEWS = 8, 3  # the same
_THAW_FROM = 10  # of Lite0's 16 blocks: "from about 60 % of its blocks on", the same
_MARGIN = 0.96  # of the time that is left is planned for, so that the last epoch still counts
_GRACE_S = 120  # after which a run that ignores its deadline is ended

Entry = tuple[float, float, float]
"""Seconds since the start, test accuracy, test log-loss."""
Array = np.ndarray[Any, Any]


def outer_folds(labels: Sequence[int], contents: Sequence[str]) -> Array:
    """Return each image's fold, stratified, images of equal contents in one."""
    return partition(labels, contents, N_FOLDS, SEED)


def value_at(entries: Iterable[Sequence[float]], moment: float, guess: Sequence[float]) -> Any:
    """Return accuracy and log-loss of the last entry up to a moment, else those of a guess."""
    due = [entry for entry in entries if entry[0] <= moment]
    return tuple(max(due, key=lambda entry: entry[0])[1:] if due else guess)


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

    @property
    def labels(self) -> Tensor:
        """Labels of the training part."""
        return torch.from_numpy(self.photos.labels[self.train])

    def link(self) -> Path:
        """Make the folder of links to the training part, empty of all else."""
        folder = self.work / "cases" / f"{self.photos.name}-{self.fold}"
        shutil.rmtree(folder, ignore_errors=True)
        for path in (self.photos.paths[i] for i in self.train):
            link = folder / "train" / path.parent.name / f"{path.parent.parent.name}-{path.name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
        return folder.resolve()

    def inner_folds(self, parts: Sequence[float] | int) -> Array:
        """Divide the training part."""
        contents = [self.photos.contents[i] for i in self.train]
        return partition(self.labels.tolist(), contents, parts, SEED + 1)

    def entry(self, seconds: float, probs: Array) -> Entry:
        """Score the test part's probabilities, (N, K)."""
        labels = self.photos.labels[self.test]
        own = np.clip(probs[np.arange(len(labels)), labels], 1e-7, 1)
        return seconds, float((probs.argmax(1) == labels).mean()), float(-np.log(own).mean())

    def guess(self) -> Entry:
        """Score the classes' shares of the training part."""
        shares = np.bincount(self.photos.labels[self.train]) / len(self.train)
        return self.entry(0, np.tile(shares, (len(self.test), 1)))


class Clock:
    """Seconds since it was made, but for those off the clock."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def read(self) -> float:
        """Return the seconds."""
        return time.perf_counter() - self._start

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Do not count what happens inside."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before


def imports_s(work: Path) -> float:
    """Measure once what imports cost a rival, the second time in a row."""
    file = work / "imports.json"
    if not file.exists():
        for _ in range(2):
            clock = Clock()
            code = "import core.heads.solver, core.models.builder, core.data.decode"
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
            file.write_text(json.dumps(clock.read()))
    return float(json.loads(file.read_text()))


# Frostline


def watch(command: list[str], folder: Path, model: Path, limit: float) -> tuple[float, int]:
    """Run a command in a folder, copying its model at the moments; return seconds, exit code."""
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with open(folder / "log.txt", "wb") as log:
        clock = Clock()
        env = {**os.environ, "PYTHONPATH": path}
        run = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=env)
        for moment in (*(m for m in MOMENTS if m <= limit), limit + _GRACE_S):
            try:
                code = run.wait(max(0, moment - clock.read()))
                break
            except subprocess.TimeoutExpired:
                copied(model, folder / f"at-{moment}")
        else:
            run.kill()
            code = run.wait()
        seconds = clock.read()
    copied(model, folder / "at-end")
    return seconds, code


def copied(model: Path, target: Path) -> None:
    """Copy a model that may be replaced meanwhile; none if there is none."""
    for _ in range(5):
        shutil.rmtree(target, ignore_errors=True)
        if not (model / "model.json").exists():
            return
        with contextlib.suppress(OSError):
            text = (model / "model.json").read_bytes()
            shutil.copytree(model, target)
            if text == (model / "model.json").read_bytes():
                return
    shutil.rmtree(target, ignore_errors=True)


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
    moments = {f"at-{m}": float(m) for m in MOMENTS} | {"at-end": seconds}
    there = [(s, folder / part) for part, s in moments.items() if (folder / part).exists()]
    entries = [model_entry(case, s, part) for s, part in there]
    for _, part in there:
        shutil.rmtree(part)
    return entries


def model_entry(case: Case, seconds: float, folder: Path) -> Entry:
    """Evaluate a saved model on the test part; a class that it does not know has probability 0."""
    model = load_model(folder)
    found = model.predict([case.photos.paths[i] for i in case.test])
    probs = np.zeros((len(found), len(case.photos.classes)))
    probs[:, [case.photos.classes.index(name) for name in model.classes]] = found
    return case.entry(seconds, probs)


# Features and heads


@dataclass(frozen=True, slots=True)
class Features:
    """Features of a set's pooled images, (N, F), the last layer's at the end, and their cost."""

    rows: Tensor
    n_last: int
    per_image_s: float
    setup_s: float
    kind: str


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
    conv: nn.Conv2d | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            conv = child
        elif isinstance(child, nn.BatchNorm2d) and conv is not None:
            mean, var = child.running_mean, child.running_var
            assert mean is not None and var is not None, "a pretrained norm has statistics"
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, mean, var, child.eps, child.weight, child.bias
            )
            rest: Any = child  # timm's norms hold their activation
            setattr(module, name, nn.Sequential(rest.drop, rest.act))
        else:
            folded(child)
    return module


def ahead(work: Callable[[Any], Any], items: Iterable[Any], is_threaded: bool) -> Iterator[Any]:
    """Yield work(item) of each, one item ahead in a thread if wanted."""
    if not is_threaded:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            before, waiting = waiting, pool.submit(work, item)
            if before is not None:
                yield before.result()
        if waiting is not None:
            yield waiting.result()


def scaled(network: Network, pixels: Sequence[Array]) -> Tensor:
    """Turn images of equal size into the network's input."""
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255  # channels last
    shown = network.preprocessing
    return (images - torch.tensor(shown.mean).view(-1, 1, 1)) / torch.tensor(shown.std).view(
        -1, 1, 1
    )


def batches(rows: Array) -> list[Array]:
    """Cut rows into batches, the last one shorter."""
    return [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]


def network_of(lite: str, classes: tuple[str, ...]) -> Network:
    """Build a pretrained network with a random head."""
    return build(TrainConfig(backbone=f"timm:tf_efficientnet_{lite}", freeze_depth=5), classes)


@torch.no_grad()
def extract(
    photos: PhotoSet, rows: Array, network: Network, views: int, kind: str, is_threaded: bool
) -> Tensor:
    """Decode images and return features, averaged over the view and its mirror image for two."""
    model = copy.deepcopy(network.model).eval()
    layers = Layers(folded(model))
    found = []
    with strict_and_quiet():

        def read(part: Array) -> Tensor:
            view = View.of(network.preprocessing)
            return scaled(network, [decode(photos.paths[i], [view]).pixels[0] for i in part])

        for images in ahead(read, batches(rows), is_threaded):
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "folded bf16"):
                each = (
                    [layers(images), layers(images.flip(-1))] if views == 2 else [layers(images)]
                )
            found.append(torch.stack(each).mean(0))
    return torch.cat(found)


def features(case: Case, lite: str, views: int) -> Features:
    """Return a set's features by the fastest way of four, computed once and kept with its cost."""
    photos = case.photos
    digest = hashlib.sha256("".join(photos.contents).encode()).hexdigest()[:12]
    file = case.work / f"{photos.name}-{digest}-{lite}-{views}.npz"
    if not file.exists():
        clock = Clock()
        network = network_of(lite, photos.classes)
        setup, pace = clock.read(), {}
        every = np.arange(len(photos.paths))
        sample = np.random.default_rng(SEED).permutation(every)[: 4 * BATCH]
        for _ in range(2):  # the first round warms up
            for kind in KINDS:
                for is_threaded in (False, True):
                    clock = Clock()
                    extract(photos, sample, network, views, kind, is_threaded)
                    pace[kind, is_threaded] = clock.read() / len(sample)
        kind, is_threaded = min(pace, key=lambda way: pace[way])
        clock = Clock()
        rows = extract(photos, every, network, views, kind, is_threaded).numpy()
        named = {f"{k}{', decoding in a thread' * th}": v for (k, th), v in pace.items()}
        per_image, last = clock.read() / len(every), network.model.get_submodule("classifier")
        assert isinstance(last, nn.Linear)
        what = {"n_last": last.in_features, "per_image_s": per_image, "setup_s": setup}
        np.savez(file, rows=rows, facts=json.dumps({**what, "kind": kind, "probed": named}))
    with np.load(file) as kept:
        facts = json.loads(str(kept["facts"]))
        facts.pop("probed")
        return Features(torch.from_numpy(kept["rows"]), **facts)


def solved(case: Case, rows: Tensor) -> tuple[SolvedHead, Array, float]:
    """Solve a head on the training part; return it, the test part's probabilities, and seconds."""
    clock = Clock()
    folds, k = torch.from_numpy(case.inner_folds(4)), len(case.photos.classes)
    head = solve_head(rows[case.train], case.labels, k, folds)
    seconds = clock.read()
    probs = (rows[case.test] @ head.weight.t() + head.bias).softmax(1)
    return head, probs.numpy(), seconds


def heads(case: Case, kind: str) -> list[Entry]:
    """Solve heads of Lite0 and of all three: `best` or `average` of last layers, or `sixty`."""
    entries, spent = [], imports_s(case.work)
    seen: list[Tensor] = []
    probs: list[Array] = []
    losses: list[float] = []
    for lite in LITES:
        of = features(case, lite, 2 if kind == "sixty" else 1)
        spent += of.setup_s + of.per_image_s * len(case.train)
        seen.append(of.rows if kind == "sixty" else of.rows[:, -of.n_last :])
        if kind == "sixty" and lite == LITES[1]:
            continue
        head, found, seconds = solved(case, torch.cat(seen, 1) if kind == "sixty" else seen[-1])
        spent += seconds
        probs.append(found)
        losses.append(min(head.oof_log_loss.values()))
        if lite in (LITES[0], LITES[-1]):
            best = probs[int(np.argmin(losses))] if kind == "best" else probs[-1]
            shown = np.mean(probs, axis=0) if kind == "average" else best
            entries.append(case.entry(spent, shown))
    return entries


# Training by hand


def halves(model: Any, n_blocks: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Cut the network after its stem and so many blocks."""
    blocks = [block for stage in model.blocks for block in stage]
    start = nn.Sequential(model.conv_stem, model.bn1, *blocks[:n_blocks]).requires_grad_(False)
    ends = (model.conv_head, model.bn2, model.global_pool, model.classifier)
    return start.eval(), nn.Sequential(*blocks[n_blocks:], *ends)


def augmented(image: Array, side: int, rng: np.random.Generator) -> Array:
    """Cut a random crop and mirror it half of the time."""
    height, width = image.shape[:2]
    area, ratio = rng.uniform(_CROP_SCALE, 1) * height * width, np.exp(rng.uniform(-0.288, 0.288))
    w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    bicubic = Image.Resampling.BICUBIC
    cut = np.array(Image.fromarray(image).resize((side, side), bicubic, (x, y, x + w, y + h)))
    return cut[:, ::-1] if rng.random() < 0.5 else cut


def epochs(
    rest: nn.Module,
    feed: Callable[[Array], Iterator[tuple[Tensor, Tensor]]],
    n: int,
    n_images: int,
    rate: float,
    decay: float,
) -> Iterator[None]:
    """Train by AdamW and one cycle, yielding after every epoch."""
    steps, rng = len(batches(np.arange(n_images))), np.random.default_rng(SEED)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in rest.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, n * steps, pct_start=_WARMUP)
    for _ in range(n):
        for inputs, labels in feed(rng.permutation(n_images)):
            loss = cross_entropy(rest(inputs), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            cycle.step()
        yield


class Photos:
    """A case's training images in memory, reduced, and its views to evaluate on."""

    def __init__(self, case: Case, network: Network, rows: Array) -> None:
        paths = case.photos.paths
        with strict_and_quiet(), ThreadPoolExecutor(2) as pool:
            self.images = list(pool.map(lambda i: decode(paths[i], [_REDUCED]).pixels[0], rows))
        self.network, self.case, self.rng = network, case, np.random.default_rng(SEED)
        self.labels = torch.from_numpy(case.photos.labels[rows])

    def crops(self, part: Array) -> Tensor:
        """Return random crops of some images."""
        side = self.network.preprocessing.image_size
        return scaled(self.network, [augmented(self.images[i], side, self.rng) for i in part])

    def feed(self, start: nn.Module) -> Callable[[Array], Iterator[tuple[Tensor, Tensor]]]:
        """Return what yields an epoch's batches, behind the frozen start."""

        def batched(order: Array) -> Iterator[tuple[Tensor, Tensor]]:
            parts = batches(order)
            for part, images in zip(parts, ahead(self.crops, parts, True), strict=True):
                with torch.no_grad():
                    inputs = start(images)
                yield inputs, self.labels[part]

        return batched

    @torch.inference_mode()
    def probs(self, rows: Array, model: nn.Module, views: int = 1) -> Array:
        """Predict pooled images, averaging the mirror image's probabilities for two views."""
        was, found = model.training, []
        model.eval()
        view = View.of(self.network.preprocessing)
        with strict_and_quiet():
            for part in batches(rows):
                paths = [self.case.photos.paths[i] for i in part]
                images = scaled(self.network, [decode(p, [view]).pixels[0] for p in paths])
                both = [images, images.flip(-1)][:views]
                found.append(torch.stack([model(x).softmax(1) for x in both]).mean(0))
        model.train(was)
        return torch.cat(found).numpy()


def thaw(case: Case) -> list[Entry]:
    """Train the last blocks from Lite0's solved head, on views whose frozen part is kept."""
    of = features(case, LITES[0], 1)
    head, probs, seconds = solved(case, of.rows[:, -of.n_last :])
    spent = imports_s(case.work) + of.setup_s + of.per_image_s * len(case.train) + seconds
    entries, clock = [case.entry(spent, probs)], Clock()
    network = network_of(LITES[0], case.photos.classes)
    network.model.get_submodule("classifier").load_state_dict(
        {"weight": head.weight, "bias": head.bias}
    )
    start, rest = halves(network.model, _THAW_FROM)
    rest.eval()  # norms keep the source's statistics
    data = Photos(case, network, case.train)
    is_fast = of.kind == "folded bf16"
    frozen: nn.Module = folded(copy.deepcopy(start))
    kept, parts = [], batches(np.arange(len(case.train)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_fast):
        for _ in range(_THAW_VIEWS):
            kept.append(torch.cat([frozen(x).float() for x in ahead(data.crops, parts, True)]))

    def feed(order: Array) -> Iterator[tuple[Tensor, Tensor]]:
        for part in batches(order):
            view = int(data.rng.integers(_THAW_VIEWS))
            yield kept[view][part], data.labels[part]

    for _ in epochs(rest, feed, _THAW_EPOCHS, len(case.train), _RATE, _DECAY):
        pass
    spent += clock.read()
    return [*entries, case.entry(spent, data.probs(case.test, nn.Sequential(start, rest), 2))]


def full(case: Case) -> list[Entry]:
    """Train all of Lite0 by one cycle of as many epochs as fit."""
    base, clock, entries = imports_s(case.work), Clock(), []
    network = network_of(LITES[0], case.photos.classes)
    data = Photos(case, network, case.train)
    n = len(case.train)
    feed, trial = data.feed(nn.Identity()), copy.deepcopy(network.model).train()
    order, begin = np.arange(min(n, 3 * BATCH)), clock.read()
    for _ in epochs(trial, feed, 2, len(order), 1e-6, 0.0):
        before, begin = begin, clock.read()  # the second epoch counts
    epoch_s = (begin - before) / len(order) * n
    n_epochs = max(1, int((_MARGIN * MOMENTS[-1] - base - clock.read()) / epoch_s))
    model = network.model.train()
    for _ in epochs(model, feed, n_epochs, n, _RATE, _DECAY):
        now = base + clock.read()
        with clock.stopped():
            entries.append(case.entry(now, data.probs(case.test, model)))
    return entries


def plain_optuna(case: Case) -> list[Entry]:
    """Search with plain Optuna; the best so far on a holdout is what a user would have."""
    base, clock = imports_s(case.work), Clock()
    entries: list[Entry] = []
    is_held = case.inner_folds([0.2]) == 0
    held, rows = case.train[is_held], case.train[~is_held]
    network = network_of(LITES[0], case.photos.classes)
    data, best = Photos(case, network, rows), -1.0

    def objective(trial: optuna.Trial) -> float:
        nonlocal best
        model, score = copy.deepcopy(network.model), 0.0
        start, rest = halves(model, trial.suggest_int("frozen", 0, 16))
        rate = trial.suggest_float("lr", 1e-5, 1e-2, log=True)
        decay = trial.suggest_float("weight_decay", 1e-5, 0.1, log=True)
        feed = data.feed(start)

        def timed(order: Array) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in feed(order):
                if base + clock.read() > MOMENTS[-1]:
                    trial.study.stop()
                    raise optuna.TrialPruned
                yield batch

        n = trial.suggest_int("epochs", 3, 8)
        for epoch, _ in enumerate(epochs(rest.train(), timed, n, len(rows), rate, decay)):
            whole = nn.Sequential(start, rest)
            found = data.probs(held, whole)
            rest.train()
            start.eval()
            score = float((found.argmax(1) == case.photos.labels[held]).mean())
            if score > best:
                best, now = score, base + clock.read()
                with clock.stopped():
                    entries.append(case.entry(now, data.probs(case.test, whole)))
                rest.train()
                start.eval()
            trial.report(score, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return score

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler, pruner = optuna.samplers.TPESampler(seed=SEED), optuna.pruners.MedianPruner()
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    study.optimize(objective)  # until `timed` stops it
    return entries


ARMS: dict[str, Callable[[Case], list[Entry]]] = {
    "frostline": lambda case: frostline(case, 15),
    "frostline-1m": lambda case: frostline(case, 1),
    "last-layer-best": lambda case: heads(case, "best"),
    "last-layer-average": lambda case: heads(case, "average"),
    "sixty-lines": lambda case: heads(case, "sixty"),
    "thaw-by-hand": thaw,
    "full-finetune": full,
    "plain-optuna": plain_optuna,
}
_FIRST_FOLD_ONLY = ("full-finetune", "plain-optuna")


def read_results(file: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Read finished lines by (set, fold, arm); one that a kill cut short is none."""
    found = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            found[row["set"], row["fold"], row["arm"]] = row
    return found


def summary(rows: dict[tuple[str, int, str], dict[str, Any]]) -> dict[str, Any]:
    """Return accuracies by moment, arm and set, and Frostline's differences to each rival."""
    sets, arms = sorted({s for s, _, _ in rows}), [a for a in ARMS if any(a == k[2] for k in rows)]
    found: dict[str, Any] = {}
    for moment in MOMENTS:
        at = {k: value_at(row["entries"], moment, row["guess"])[0] for k, row in rows.items()}
        mean = {
            arm: {
                s: float(np.mean(v))
                for s in sets
                if (v := [at[k] for k in at if k[::2] == (s, arm)])
            }
            for arm in arms
        }
        differences = {}
        for ours in [
            a for a in arms if a == "frostline" or (a == "frostline-1m" and moment == 60)
        ]:
            for rival in [a for a in arms if not a.startswith("frostline")]:
                each = {
                    s: [
                        at[k] - at[s, k[1], rival]
                        for k in at
                        if k[::2] == (s, ours) and (s, k[1], rival) in at
                    ]
                    for s in sets
                }
                each = {s: v for s, v in each.items() if v}
                if each:
                    by_set = {s: (*corrected_interval([v]), len(v)) for s, v in each.items()}
                    whole = (
                        *corrected_interval(list(each.values())),
                        sum(map(len, each.values())),
                    )
                    differences[f"{ours} - {rival}"] = {"all": whole, **by_set}
        found[str(moment)] = {"accuracy": mean, "difference": differences}
    return found


def show(found: dict[str, Any]) -> None:
    """Print the summary in per cent and points."""
    for moment, part in found.items():
        print(f"\nafter {int(moment) / 60:g} min: test accuracy, %")
        for arm, sets in part["accuracy"].items():
            print(f"  {arm:20}", *(f"{s} {100 * v:.1f}" for s, v in sets.items()), sep="  ")
        for pair, sets in part["difference"].items():
            each = [
                f"{s} {100 * m:+.1f}" + ("" if h is None else f" ± {100 * h:.1f}") + f" (n = {n})"
                for s, (m, h, n) in sets.items()
            ]
            print(f"  {pair}: " + "; ".join(each))


def draw(rows: dict[tuple[str, int, str], dict[str, Any]], file: Path) -> None:
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
        curve = [
            100 * float(np.mean([value_at(row["entries"], t, row["guess"])[0] for row in each]))
            for t in times[times >= first]
        ]
        is_ours = arm == "frostline"
        axes.plot(times[times >= first], curve, label=label, linewidth=2.5 if is_ours else 1.5)
    axes.set_xscale("log")
    axes.set_xticks([30, *MOMENTS], ["30 s", *(f"{m // 60} min" for m in MOMENTS)])
    axes.minorticks_off()
    axes.set_ylabel("test accuracy, %")
    axes.set_xlabel(f"time, two CPU cores; mean of {len(cases)} cases")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(file, dpi=150)


def run_cases(args: argparse.Namespace) -> bool:
    """Run what is missing, all arms of a case in one sitting; return whether all went well."""
    file, is_good = args.results, True
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    for photos in [s for s in map(PhotoSet.read, args.data) if s.name in (args.sets or [s.name])]:
        fold_of = outer_folds(photos.labels.tolist(), photos.contents)
        for fold in args.folds:
            train, test = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
            case = Case(photos, fold, args.work, train, test)
            for arm in [
                a for a in ARMS if a in args.only and (fold == 0 or a not in _FIRST_FOLD_ONLY)
            ]:
                if (photos.name, fold, arm) in read_results(file):
                    continue
                try:
                    entries = ARMS[arm](case)
                except Exception:  # one arm that fails must not end a night; it is run again
                    traceback.print_exc()
                    is_good = False
                    continue
                row = {"set": photos.name, "fold": fold, "arm": arm, "entries": entries}
                row["commit"] = commit
                sizes = {"guess": case.guess()[1:], "n_train": len(train), "n_test": len(test)}
                with open(file, "a", encoding="utf-8") as out:
                    out.write("\n" + json.dumps({**row, **sizes}) + "\n")  # after a cut line
                print(
                    photos.name, fold, arm, [[round(v, 3) for v in e] for e in entries], flush=True
                )
    return is_good


def main() -> None:
    """Run the cases, then print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", default=[])
    parser.add_argument("--work", type=Path, required=True, help="folder for results and features")
    parser.add_argument("--results", type=Path, help="file of results (WORK/results.jsonl)")
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--sets", nargs="+", help="names of folders of --data")
    parser.add_argument("--folds", type=int, nargs="+", default=range(N_FOLDS))
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--figure", type=Path, help="draw accuracy over time there")
    parser.add_argument("--json", type=Path, help="write the summary there")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.results = args.results or args.work / "results.jsonl"
    is_good = args.report or run_cases(args)
    if rows := read_results(args.results):
        found = summary(rows)
        show(found)
        if args.figure:
            draw(rows, args.figure)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
