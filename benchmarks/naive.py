"""The naive side: what a good practitioner writes with plain Optuna, torchvision and timm.

ImageFolder, DataLoader, RandomResizedCrop and flip; the frozen part without gradients and in eval
mode, pretrained batch norms kept; SGD with two groups, cosine per step; TPE with Hyperband. It
knows nothing of Frostline while it runs: `prepare` writes down beforehand, off the clock, which
pictures belong to which split, where the freeze levels lie, and the weights.

    python benchmarks/naive.py prepare --data photos/hotdog --size 96 --out work/task
    python benchmarks/naive.py study --task work/task --trials 14 --seed 0 --out work/naive.jsonl
    python benchmarks/naive.py trial --task work/task --epochs 3

The records of a study are JSON lines: one an epoch of every trial, with the seconds since the
process began. A new best over all epochs of all trials so far (generous: a user's own script
would keep the best of whole trials) is evaluated on the test split with the clock stopped.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# The clock begins before torch and Optuna are imported, which is done where they are needed.
_BEGAN = time.time()
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

BACKBONES = ("timm:tf_efficientnet_lite0", "timm:tf_efficientnet_lite1")
"""The default pair: both have real ImageNet weights in packages of the `demo` extra."""
DEPTHS = range(6)
BASE_LR = (1e-4, 3e-2)
HEAD_LR_MULT = (1.0, 100.0)
WEIGHT_DECAY = (1e-6, 1e-2)
RATES = {"base_lr": BASE_LR, "head_lr_mult": HEAD_LR_MULT, "weight_decay": WEIGHT_DECAY}
"""With the backbone and DEPTHS, the space that every side searches; on a logarithmic scale."""
EPOCHS = 9
"""A full trial: Hyperband's rungs lie at 1, 3 and 9 epochs."""
BATCH_SIZE = 32
CROP_SCALE = (0.35, 1.0)
_EVAL_BATCH = 64


@dataclass(frozen=True)
class Settings:
    """What one trial trains with; the fields are the searched names."""

    backbone: str
    freeze_depth: int
    base_lr: float
    head_lr_mult: float
    weight_decay: float


@dataclass(frozen=True)
class Network:
    """A backbone as `prepare` wrote it down.

    Attributes:
        name: torchvision's name, or `timm:NAME`.
        weights: File of the pretrained state, without the head.
        head: Names of the head's layers.
        stage_of: Stage of every parameter; depth d freezes the stages below d.
        eval_modules: For each depth, the modules that lie wholly in the frozen part.
        image_size: Side of the input, pixels.
        resize_size: Shorter side before the centre crop, pixels.
        mean: Per-channel mean of pixels in [0, 1].
        std: Per-channel standard deviation.
        interpolation: `bilinear` or `bicubic`.
    """

    name: str
    weights: str
    head: tuple[str, ...]
    stage_of: dict[str, int]
    eval_modules: tuple[tuple[str, ...], ...]
    image_size: int
    resize_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


@dataclass(frozen=True)
class Task:
    """Pictures and networks, as all sides have them.

    Attributes:
        name: The data set's.
        root: Its folder.
        classes: Names in the order of class numbers.
        splits: Relative paths of the pictures of `train`, `val` and `test`.
        networks: By their names.
    """

    name: str
    root: str
    classes: tuple[str, ...]
    splits: dict[str, list[str]]
    networks: dict[str, Network]


def prepare(
    folder: Path,
    size: int,
    out: Path,
    backbones: Sequence[str],
    limit: int | None = None,
    val_seed: int | None = None,
) -> None:
    """Write down Frostline's splits, freeze levels and weights, for sides that do without it."""
    import torch

    from core.config import DataConfig
    from core.data.splits import load_data
    from core.models.builder import build

    out.mkdir(parents=True, exist_ok=True)
    chosen = DataConfig(
        source=f"folder:{folder}", limit=limit, val_seed=val_seed, cache_dir=str(out / "cache")
    )
    data = load_data(chosen, round(1.25 * size))
    assert data.test is not None, "the data set must have a test split"
    networks = {}
    for name in backbones:
        built = build(name, "auto", data.classes, seed=0, image_size=size)
        heads = tuple(f"{head}." for head in built.head)
        state = {k: v for k, v in built.model.state_dict().items() if not k.startswith(heads)}
        file = out / f"{name.rpartition(':')[2]}.pt"
        torch.save(state, file)
        shown = built.preprocessing
        networks[name] = asdict(
            Network(
                name, str(file), built.head, built.stages.stage_of, built.stages.eval_modules,
                shown.image_size, shown.resize_size, shown.mean, shown.std, shown.interpolation,
            )
        )  # fmt: skip
    parts = {"train": data.train, "val": data.val, "test": data.test}
    splits = {name: list(part.paths) for name, part in parts.items()}
    task = {"name": folder.name, "root": str(folder.resolve()), "classes": data.classes}
    text = json.dumps({**task, "splits": splits, "networks": networks}, indent=1)
    (out / "task.json").write_text(text, encoding="utf-8")


def read_task(folder: Path) -> Task:
    """Read what `prepare` wrote."""
    raw = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    networks = {}
    for name, values in raw["networks"].items():
        values["eval_modules"] = tuple(tuple(names) for names in values["eval_modules"])
        values["head"] = tuple(values["head"])
        networks[name] = Network(**values)
    raw["classes"] = tuple(raw["classes"])
    return Task(**{**raw, "networks": networks})


class Recorder:
    """Writes epochs as they end, and tests each new best of a study with the clock stopped.

    What it knows it reads back from its file, so that trials in processes of their own, one at a
    time, share one record.
    """

    def __init__(self, file: Path, began: float) -> None:
        self.file = file
        self.began = began

    def rows(self) -> list[dict[str, Any]]:
        """Return the records so far."""
        if not self.file.exists():
            return []
        return [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]

    def seconds(self, rows: Sequence[Mapping[str, Any]] | None = None) -> float:
        """Return the seconds since the study's process began, without those spent on testing."""
        spent = time.time() - self.began
        return spent - sum(row.get("test_s", 0.0) for row in rows or self.rows())

    def add(
        self,
        trial: str | int,
        epoch: int,
        val_acc: float,
        task: Task,
        settings: Settings,
        model: Any,
    ) -> None:
        """Record a finished epoch.

        Args:
            trial: Number or name of the trial.
            epoch: From 0.
            val_acc: Validation accuracy, in [0, 1].
            task: Holds the test split.
            settings: The trial's, for the record.
            model: The network as it is now.
        """
        rows = self.rows()
        row: dict[str, Any] = {"seconds": self.seconds(rows), "trial": trial, "epoch": epoch}
        best = max((r["val_acc"] for r in rows if "val_acc" in r), default=-math.inf)
        row |= {"val_acc": val_acc, "is_best": val_acc > best, **asdict(settings)}
        if row["is_best"]:
            begin = time.time()
            row["test_acc"] = accuracy(model, loader(task, settings.backbone, "test"))
            row["test_s"] = time.time() - begin
        self.write(row)

    def end(self, **facts: Any) -> None:
        """Record that the study has ended."""
        self.write({"event": "end", "seconds": self.seconds(), **facts})

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a record."""
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def folder_dataset(task: Task, split: str, transform: Any) -> Any:
    """Return torchvision's ImageFolder of a split's pictures."""
    from torchvision.datasets import ImageFolder

    root = Path(task.root)
    paths = {str(root / path) for path in task.splits[split]}
    top = Path(task.splits[split][0]).parts[0]
    is_split = top not in task.classes  # train/, test/; a folder that is not split has classes
    dataset = ImageFolder(
        root / top if is_split else root, transform=transform, is_valid_file=paths.__contains__
    )
    assert tuple(dataset.classes) == task.classes and len(dataset) == len(paths)
    return dataset


def loader(task: Task, backbone: str, split: str, seed: int = 0, workers: int = 0) -> Any:
    """Return a DataLoader: shuffled and augmented for `train`, the centre crop otherwise."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision import transforms as tv

    shown = task.networks[backbone]
    how = tv.InterpolationMode(shown.interpolation)
    is_train = split == "train"
    crop = (
        [
            tv.RandomResizedCrop(shown.image_size, scale=CROP_SCALE, interpolation=how),
            tv.RandomHorizontalFlip(),
        ]
        if is_train
        else [tv.Resize(shown.resize_size, interpolation=how), tv.CenterCrop(shown.image_size)]
    )
    transform = tv.Compose([*crop, tv.ToTensor(), tv.Normalize(shown.mean, shown.std)])
    return DataLoader(
        folder_dataset(task, split, transform),
        batch_size=BATCH_SIZE if is_train else _EVAL_BATCH,
        shuffle=is_train,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(seed),
    )


def pretrained(task: Task, backbone: str, seed: int) -> Any:
    """Return a network with pretrained weights and a new head, PyTorch's own linear layer.

    The head that timm would make for EfficientNets (uniform up to `1 / sqrt(classes)`) is 25 times
    as large, and costs ten points and more in studies as short as these.
    """
    import timm
    import torch
    from torchvision import models

    network = task.networks[backbone]
    torch.manual_seed(seed)
    if backbone.startswith("timm:"):
        name = backbone.removeprefix("timm:")
        model = timm.create_model(name, num_classes=len(task.classes))
    else:
        model = models.get_model(backbone, weights=None, num_classes=len(task.classes))
    missing, unexpected = model.load_state_dict(torch.load(network.weights), strict=False)
    heads = tuple(f"{head}." for head in network.head)
    assert not unexpected and all(name.startswith(heads) for name in missing)
    for head in network.head:
        model.get_submodule(head).reset_parameters()
    return model


def freeze(model: Any, network: Network, depth: int) -> None:
    """Freeze the stages below a depth.

    Where no parameter wants a gradient and neither do the pictures, autograd records nothing: the
    frozen part runs as under `torch.no_grad`, at the same cost.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(network.stage_of.get(name, -1) >= depth)


def train_mode(model: Any, network: Network, depth: int) -> None:
    """Put the network in training mode, frozen part and pretrained batch norms in eval mode."""
    from torch.nn.modules.batchnorm import _BatchNorm

    model.train()
    for name in network.eval_modules[depth]:
        model.get_submodule(name).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def accuracy(model: Any, batches: Any) -> float:
    """Return the share of pictures classified rightly."""
    import torch

    model.eval()
    correct = n = 0
    with torch.inference_mode():
        for images, labels in batches:
            correct += int((model(images).argmax(1) == labels).sum())
            n += len(labels)
    return correct / n


class Diverged(Exception):
    """The loss is not a finite number any more."""


def train(
    task: Task,
    settings: Settings,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    workers: int = 0,
    channels_last: bool = False,
) -> Iterator[tuple[float, Any]]:
    """Train one trial: build the network, fine-tune it, and yield after every epoch.

    Args:
        task: Pictures and networks.
        settings: The searched settings.
        seed: Seed of head, order and augmentation.
        epochs: Length of the cosine.
        workers: Loader processes.
        channels_last: Keep network and pictures channels-last in memory.

    Yields:
        Validation accuracy in [0, 1], and the network as it is then.

    Raises:
        Diverged: The training loss is not finite.
    """
    import torch

    network = task.networks[settings.backbone]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = pretrained(task, settings.backbone, seed).to(memory_format=layout)
    freeze(model, network, settings.freeze_depth)
    heads = tuple(f"{head}." for head in network.head)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head_lr = settings.base_lr * settings.head_lr_mult
    groups = [
        {"params": [p for name, p in trained if not name.startswith(heads)]},
        {"params": [p for name, p in trained if name.startswith(heads)], "lr": head_lr},
    ]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=settings.base_lr,
        momentum=0.9,
        weight_decay=settings.weight_decay,
    )
    batches = loader(task, settings.backbone, "train", seed, workers)
    val = loader(task, settings.backbone, "val", seed, workers)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    for _ in range(epochs):
        train_mode(model, network, settings.freeze_depth)
        for images, labels in batches:
            images = images.contiguous(memory_format=layout)
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            if not math.isfinite(loss.item()):
                raise Diverged
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        yield accuracy(model, val), model


def random_settings(task: Task, rng: random.Random) -> Settings:
    """Draw a point of the space."""
    rates = [math.exp(rng.uniform(*map(math.log, ends))) for ends in RATES.values()]
    return Settings(rng.choice(list(task.networks)), rng.choice(DEPTHS), *rates)


def run_study(args: argparse.Namespace) -> None:
    """Search with TPE and Hyperband, and record every epoch."""
    import optuna

    task = read_task(args.task)
    recorder = Recorder(args.out, args.began)
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(trial: optuna.Trial) -> float:
        settings = Settings(
            backbone=trial.suggest_categorical("backbone", list(task.networks)),
            freeze_depth=trial.suggest_int("freeze_depth", DEPTHS[0], DEPTHS[-1]),
            **{name: trial.suggest_float(name, *ends, log=True) for name, ends in RATES.items()},
        )
        best = 0.0
        try:
            epochs = train(
                task,
                settings,
                seed=args.seed,
                epochs=args.epochs,
                workers=args.workers,
                channels_last=args.channels_last,
            )
            for epoch, (val_acc, model) in enumerate(epochs):
                recorder.add(trial.number, epoch, val_acc, task, settings, model)
                best = max(best, val_acc)
                trial.report(val_acc, epoch + 1)
                if trial.should_prune():
                    raise optuna.TrialPruned
        except Diverged as err:
            raise optuna.TrialPruned from err
        return best

    study = optuna.create_study(
        study_name=f"naive-{args.seed}",  # Hyperband deals its brackets by name
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=args.seed),
        pruner=optuna.pruners.HyperbandPruner(1, args.epochs, 3),
    )
    study.optimize(objective, n_trials=args.trials)
    recorder.end(trials=len(study.trials))


def run_trials(args: argparse.Namespace) -> None:
    """Print what one trial costs, a depth and backbone: building, and each epoch.

    Seconds of the processor (of this process alone) stand beside the clock's, since they hold on
    a machine that does other things too.
    """
    task = read_task(args.task)
    sizes = {name: len(paths) for name, paths in task.splits.items()}
    print(f"{task.name}: {sizes}, {args.epochs} epochs, {args.workers} workers")
    for backbone in task.networks:
        for depth in args.depths:
            settings = Settings(backbone, depth, 1e-3, 10.0, 1e-4)
            times, cpu = [time.perf_counter()], time.process_time()
            figures = []
            epochs = train(
                task,
                settings,
                seed=args.seed,
                epochs=args.epochs,
                workers=args.workers,
                channels_last=args.channels_last,
            )
            for val_acc, _ in epochs:
                figures.append(f"{val_acc:.3f}")
                times.append(time.perf_counter())
            cpu = time.process_time() - cpu
            print(
                f"  {backbone:28} depth {depth}: {times[-1] - times[0]:6.2f} s, processor "
                f"{cpu:6.2f} s ({cpu / args.epochs:.2f} an epoch); val {' '.join(figures)}",
                flush=True,
            )


def add_study_options(parser: argparse.ArgumentParser) -> None:
    """Add what every side of the comparison is told."""
    parser.add_argument("--task", type=Path, required=True, help="folder that prepare wrote")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument(
        "--began",
        type=float,
        default=_BEGAN,
        help="when the clock began, seconds since 1970; default: with this script",
    )


def main() -> None:
    """Prepare, search, or time single trials."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("prepare")
    made.add_argument("--data", type=Path, required=True, help="folder of pictures")
    made.add_argument("--size", type=int, default=96)
    made.add_argument("--limit", type=int, help="training pictures")
    made.add_argument("--val-seed", type=int, help="of the validation split")
    made.add_argument("--backbones", nargs="+", default=BACKBONES)
    made.add_argument("--out", type=Path, required=True)
    study = commands.add_parser("study")
    add_study_options(study)
    study.add_argument("--trials", type=int, required=True)
    trial = commands.add_parser("trial")
    trial.add_argument("--task", type=Path, required=True)
    trial.add_argument("--seed", type=int, default=0)
    trial.add_argument("--epochs", type=int, default=2)
    trial.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS))
    for command in (study, trial):
        command.add_argument("--workers", type=int, default=0, help="loader processes")
        command.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.data, args.size, args.out, args.backbones, args.limit, args.val_seed)
    elif args.command == "study":
        run_study(args)
    else:
        run_trials(args)


if __name__ == "__main__":
    main()
