"""Quick-Tune-Tool's optimizer on its published search space, as far as both can be made to run.

Its own trainer cannot be used: it hard-codes CUDA, 50 epochs and eight loaders, and of its 24
backbones no weights could be had. So its tuner and its optimizer (cost-aware, expected improvement
per second, trials paused and continued epoch by epoch) call a training loop here, which does what
its space asks for with timm's own parts, on the naive side's pictures, backbones and epochs.

- Searched as published: share frozen, layer decay, linear probing, mixup, CutMix, their
  probability, dropout, smoothing, gradient clipping, optimizer with momentum and betas, rate,
  decay, warm-up, schedule with its details, batch size, augmentation.
- Left out: stochastic norm, the regularisers sp, delta, bss and co-tuning, and mixed precision.
- Its pretrained predictors are a download from a host that could not be reached. Untrained ones
  refuse to predict, so they are fitted, by its own `fit`, to the study's first random trials, and
  refitted from then on. That is not the published meta-learned method; a study this short would
  be where meta-learning helps most.

    python -m venv rivals/qtt
    echo $PWD/.venv/lib/python3.11/site-packages > rivals/qtt/lib/python3.11/site-packages/own.pth
    rivals/qtt/bin/pip install quicktunetool==0.0.4 requests
    rivals/qtt/bin/python benchmarks/rival_qtt.py --task work/task --budget 200 --out qtt.jsonl
"""

import argparse
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from naive import (
    Diverged,
    Network,
    Recorder,
    Task,
    accuracy,
    add_study_options,
    loader,
    pretrained,
    read_task,
    train_mode,
)

# The published space (examples/define_search_space.py of automl/quicktunetool).
ORDINAL: dict[str, list[Any]] = {
    "pct-to-freeze": [0.0, 0.2, 0.4, 0.6, 0.8, 1.0],
    "layer-decay": [0.0, 0.65, 0.75],
    "linear-probing": [False, True],
    "mixup": [0.0, 0.2, 0.4, 1.0, 2.0, 4.0, 8.0],
    "mixup-prob": [0.0, 0.25, 0.5, 0.75, 1.0],
    "cutmix": [0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0],
    "drop": [0.0, 0.1, 0.2, 0.3, 0.4],
    "smoothing": [0.0, 0.05, 0.1],
    "clip-grad": [0, 1, 10],
    "lr": [1e-05, 5e-05, 0.0001, 0.0005, 0.001, 0.005, 0.01],
    "warmup-epochs": [0, 5, 10],
    "warmup-lr": [0.0, 1e-05, 1e-06],
    "weight-decay": [0, 1e-05, 0.0001, 0.001, 0.01, 0.1],
    "batch-size": [2, 4, 8, 16, 32, 64, 128, 256, 512],
    "momentum": [0.0, 0.8, 0.9, 0.95, 0.99],
    "patience-epochs": [2, 5, 10],
    "decay-rate": [0.1, 0.5],
    "decay-epochs": [10, 20],
    "ra-num-ops": [2, 3],
    "ra-magnitude": [9, 17],
}
CATEGORICAL: dict[str, list[str]] = {
    "opt": ["sgd", "momentum", "adam", "adamw", "adamp"],
    "opt-betas": ["0.9 0.999", "0.0 0.99", "0.9 0.99", "0.0 0.999"],
    "sched": ["cosine", "step", "multistep", "plateau"],
    "data-augmentation": ["auto-augment", "random-augment", "trivial-augment", "none"],
    "auto-augment": ["v0", "original"],
}
CONDITIONS: dict[str, tuple[str, list[str]]] = {
    "patience-epochs": ("sched", ["plateau"]),
    "decay-rate": ("sched", ["step", "multistep"]),
    "decay-epochs": ("sched", ["step", "multistep"]),
    "momentum": ("opt", ["momentum"]),
    "opt-betas": ("opt", ["adam", "adamw", "adamp"]),
    "ra-num-ops": ("data-augmentation", ["random-augment"]),
    "ra-magnitude": ("data-augmentation", ["random-augment"]),
    "auto-augment": ("data-augmentation", ["auto-augment"]),
}
N_CONFIGS = 128
"""The pool of settings that its README draws."""
# Trials of one epoch before the predictors are fitted (its documentation says 10), and the cost
# predictor's batch: fewer of either, or larger batches, and it divides by zero.
_N_RANDOM = 12
_COST_BATCH = 1


@dataclass(frozen=True)
class Drawn:
    """A drawn setting, as the recorder takes it."""

    backbone: str
    settings: dict[str, Any]


def search_space(backbones: list[str], seed: int) -> Any:
    """Return the published space with the task's backbones."""
    from ConfigSpace import (
        Categorical,
        ConfigurationSpace,
        EqualsCondition,
        OrConjunction,
        OrdinalHyperparameter,
    )

    space = ConfigurationSpace("image-classification", seed=seed)
    made = {name: OrdinalHyperparameter(name, values) for name, values in ORDINAL.items()}
    chosen = {**CATEGORICAL, "model": backbones}
    made |= {name: Categorical(name, values) for name, values in chosen.items()}
    space.add(*made.values())
    for name, (parent, values) in CONDITIONS.items():
        parts = [EqualsCondition(made[name], made[parent], value) for value in values]
        space.add(parts[0] if len(parts) == 1 else OrConjunction(*parts))
    return space


def set_frozen(model: Any, network: Network, share: float) -> None:
    """Freeze the first share of the layers that have parameters; never the head."""
    layers = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    heads = [model.get_submodule(name) for name in network.head]
    trunk = [layer for layer in layers if all(layer is not head for head in heads)]
    for k, layer in enumerate(trunk):
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(k / len(trunk) >= share)


def augmented(batches: Any, settings: Mapping[str, Any], seed: int) -> Any:
    """Return the loader with the setting's batch size and augmentation."""
    import torch
    from timm.data.auto_augment import auto_augment_transform
    from torch.utils.data import DataLoader
    from torchvision import transforms as tv

    added = {
        # For v0, too: its posterizing to no bits at all is refused by today's Pillow.
        "auto-augment": lambda: auto_augment_transform("original", {}),
        "random-augment": lambda: tv.RandAugment(settings["ra-num-ops"], settings["ra-magnitude"]),
        "trivial-augment": tv.TrivialAugmentWide,
    }.get(settings["data-augmentation"])
    dataset = batches.dataset
    crop, flip, *rest = dataset.transform.transforms
    dataset.transform = tv.Compose([crop, flip, *([added()] if added else []), *rest])
    size = min(settings["batch-size"], len(dataset))
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, size, shuffle=True, drop_last=True, generator=generator)


def make_optimizer(model: Any, settings: Mapping[str, Any]) -> Any:
    """Return timm's optimizer for a setting."""
    from timm.optim import create_optimizer_v2

    more: dict[str, Any] = {}
    if "opt-betas" in settings:
        first, second = settings["opt-betas"].split()
        more["betas"] = (float(first), float(second))
    return create_optimizer_v2(
        model,
        opt=settings["opt"],
        lr=settings["lr"],
        weight_decay=settings["weight-decay"],
        momentum=settings.get("momentum", 0.9),  # its trainer's own where none is drawn
        layer_decay=settings["layer-decay"] or None,
        **more,
    )


def make_schedule(optimizer: Any, settings: Mapping[str, Any], epochs: int) -> Any:
    """Return timm's schedule, by epochs, for a setting."""
    from timm.scheduler import create_scheduler_v2

    decay_epochs = settings.get("decay-epochs", epochs)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=settings["sched"],
        num_epochs=epochs,
        decay_epochs=decay_epochs,
        decay_milestones=list(range(decay_epochs, epochs, decay_epochs)) or [epochs],
        decay_rate=settings.get("decay-rate", 0.1),
        patience_epochs=settings.get("patience-epochs", 10),
        warmup_epochs=settings["warmup-epochs"],
        warmup_lr=settings["warmup-lr"],
    )
    return schedule


def train(
    task: Task, settings: Mapping[str, Any], seed: int, epochs: int
) -> Iterator[tuple[float, Any]]:
    """Train one setting; yield validation accuracy and the network after every epoch.

    Raises:
        Diverged: The training loss is not finite.
    """
    import torch
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy

    backbone = settings["model"]
    network, n_classes = task.networks[backbone], len(task.classes)
    model = pretrained(task, backbone, seed)
    model.drop_rate = settings["drop"]
    optimizer = make_optimizer(model, settings)
    schedule = make_schedule(optimizer, settings, epochs)
    schedule.step(0)
    batches = augmented(loader(task, backbone, "train", seed), settings, seed)
    val = loader(task, backbone, "val", seed)
    is_mixed = (settings["mixup"] > 0 or settings["cutmix"] > 0) and settings["mixup-prob"] > 0
    mix = Mixup(
        settings["mixup"], settings["cutmix"], prob=settings["mixup-prob"],
        label_smoothing=settings["smoothing"], num_classes=n_classes,
    )  # fmt: skip
    plain = torch.nn.CrossEntropyLoss(label_smoothing=settings["smoothing"])
    for epoch in range(epochs):
        is_probe = settings["linear-probing"] and epoch < epochs // 2
        set_frozen(model, network, 1.0 if is_probe else settings["pct-to-freeze"])
        trained = [p for p in model.parameters() if p.requires_grad]
        train_mode(model, network, 0)
        for images, labels in batches:
            if is_mixed and len(images) % 2 == 0:
                images, targets = mix(images, labels)
                loss = SoftTargetCrossEntropy()(model(images), targets)
            else:
                loss = plain(model(images), labels)
            if not math.isfinite(loss.item()):
                raise Diverged
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if settings["clip-grad"]:
                torch.nn.utils.clip_grad_norm_(trained, settings["clip-grad"])
            optimizer.step()
        val_acc = accuracy(model, val)
        schedule.step(epoch + 1, metric=val_acc)
        yield val_acc, model


class Trials:
    """The function that the tuner calls: one more epoch of a setting.

    Trials stay in memory between their epochs; its own trainer would write a checkpoint and begin
    a new process for each.

    Attributes:
        costs: Seconds of the epochs of each setting.
    """

    def __init__(self, task: Task, recorder: Recorder, seed: int, epochs: int) -> None:
        self.train = partial(train, task, seed=seed, epochs=epochs)
        self.task = task
        self.recorder = recorder
        self.running: dict[int, Iterator[tuple[float, Any]]] = {}
        self.costs: dict[int, list[float]] = {}

    def __call__(self, trial: dict[str, Any], trial_info: dict[str, Any]) -> dict[str, Any]:
        """Train an epoch; return the trial with status, score and cost, as the tuner wants it."""
        number, settings = int(trial["config-id"]), plain_values(trial["config"])
        if number not in self.running:
            self.running[number] = self.train(settings)
        begin = time.time()
        try:
            val_acc, model = next(self.running[number])
        except Diverged:
            return trial | {"status": False, "score": 0.0, "cost": math.inf}
        cost = time.time() - begin
        self.costs.setdefault(number, []).append(cost)
        drawn = Drawn(settings["model"], settings)
        epoch = int(trial["fidelity"]) - 1
        self.recorder.add(number, epoch, val_acc, self.task, drawn, model)
        if epoch == self.train.keywords["epochs"] - 1:
            del self.running[number]
        return trial | {"status": True, "score": val_acc, "cost": cost}


def plain_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn NumPy's values, as ConfigSpace gives them, into Python's."""
    return {k: v.item() if hasattr(v, "item") else v for k, v in config.items()}


def search(args: argparse.Namespace) -> None:
    """Search until the budget is spent."""
    import numpy as np
    from qtt import QuickTuner
    from qtt.optimizers import QuickOptimizer
    from qtt.predictors import CostPredictor, perf
    from torch.utils.data import DataLoader

    # Its predictor starts four loader processes for each pass over these few rows: 80 s a fit.
    perf.DataLoader = lambda *args, **kw: DataLoader(*args, **{**kw, "num_workers": 0})
    task = read_task(args.task)
    recorder = Recorder(args.out.resolve(), args.began)
    trials = Trials(task, recorder, args.seed, args.epochs)

    class SelfTaught(QuickOptimizer):  # type: ignore[misc]  # untyped library
        """Fits its predictors to the study's own first trials, for want of pretrained ones."""

        def ante(self) -> None:
            if self.perf_predictor.is_fit:
                super().ante()
            elif len(self.evaled) >= _N_RANDOM:
                seen = sorted(self.evaled)
                cost = np.array([[np.mean(trials.costs[k])] for k in seen])
                self.fit(self.pipelines.iloc[seen].reset_index(drop=True), self.curves[seen], cost)

    class Budgeted(QuickTuner):  # type: ignore[misc]  # untyped library
        """Ends when the study's seconds, those of testing not counted, are spent."""

        def _is_budget_exhausted(self, *_: object) -> bool:
            return recorder.seconds() > args.budget

    with tempfile.TemporaryDirectory() as folder:
        optimizer = SelfTaught(
            search_space(list(task.networks), args.seed),
            args.epochs,
            cost_predictor=CostPredictor(fit_params={"batch_size": _COST_BATCH}),
            cost_aware=True,
            init_random_search_steps=_N_RANDOM,
            refit=True,
            seed=args.seed,
        )
        optimizer.setup(N_CONFIGS)
        Budgeted(optimizer, trials, path=folder).run()
    recorder.end(trials=len(trials.costs))


def main() -> None:
    """Search until the budget is spent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_study_options(parser)
    parser.add_argument("--budget", type=float, required=True, help="seconds")
    search(parser.parse_args())


if __name__ == "__main__":
    main()
