"""Two well-known recipes, from scratch, and ours, on photo sets: the table of docs/results.md.

Every row goes through the whole of Frostline: a study of one recipe whose only dimension is the
seed, then `study test` on each trial. The reference does not: scikit-learn's logistic regression
on features of the frozen network, taken with torchvision's transforms.

    python benchmarks/results.py --data photos/hotdog photos/hymenoptera --work /tmp/results

torchvision's own weights cannot be had offline, so EfficientNet-Lite0 and MobileNetV2 stand in
for ResNet-18 and ResNet-50; --weights gives MobileNetV2's file.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image
from scipy.stats import t
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.transforms import InterpolationMode, v2

from core.device import choose_device
from core.models.builder import build
from study.config.load import load_config
from study.config.study_config import StudyConfig
from study.execution.progress import QuietProgress
from study.execution.session import load_images
from study.record.record import Record
from study.search.final_test import test_trials
from study.search.search import run_search

CONFIGS = Path(__file__).parent.parent / "configs"
# Plain values in the space fix its dimensions.
OURS = [
    "train.epochs=12",
    # docs/results.md was measured before heads were standardised and loss chose the epoch.
    "train.standardize=false",
    "train.monitor=val_acc",
    "space.base_lr=0.001",
    "space.head_lr_mult=10",
    "space.weight_decay=1e-4",
]
# Name -> (shipped study or None for the defaults, further settings).
RECIPES: dict[str, tuple[str | None, list[str]]] = {
    "frozen extractor, as written": ("frozen-extractor.toml", []),
    "D2L, as written (5 epochs)": ("d2l-hotdog.toml", []),
    "D2L from scratch, as written": ("d2l-hotdog-scratch.toml", []),
    "D2L, 16 epochs": ("d2l-hotdog.toml", ["train.epochs=16"]),
    "D2L from scratch, 16 epochs": ("d2l-hotdog-scratch.toml", ["train.epochs=16"]),
    "D2L, 16 epochs, batch norm frozen": (
        "d2l-hotdog.toml",
        ["train.epochs=16", "train.batch_norm=frozen"],
    ),
    "D2L, rate 5e-5 on the mean loss": ("d2l-hotdog.toml", ["train.loss_reduction=mean"]),
    "linear probe (ours)": (
        None,
        [*OURS, "space.freeze_depth=5"],
    ),
    "fine-tune half (ours)": (
        None,
        [*OURS, "space.freeze_depth=3"],
    ),
}


def study_config(
    recipe: str, backbone: str, weights: str, folder: Path, args: argparse.Namespace
) -> StudyConfig:
    """Return the one-dimensional study of a recipe: its seeds."""
    file, settings = RECIPES[recipe]
    scratch = "scratch" in recipe
    name = f"{folder.name}-{backbone.rpartition(':')[2]}-{list(RECIPES).index(recipe)}"
    return load_config(
        CONFIGS / file if file else None,
        [
            *settings,
            f"space.seed=[{', '.join(str(s) for s in range(args.seeds))}]",
            f'train.backbone="{backbone}"',
            f'train.weights="{"none" if scratch else weights}"',
            f"train.image_size={args.size}",
            "search.sampler=grid",
            "search.pruner=none",
            f"study.keep_checkpoints={args.seeds}",
        ],
        {
            "study.name": name,
            "study.trials": args.seeds,
            "study.storage": str(args.work / "results.db"),
            "study.output": str(args.work / "runs"),
            "data.source": f"folder:{folder}",
            "data.cache_dir": str(args.work / "cache"),
            "data.store_size": round(args.size * 1.3),
        },
    )


def run_recipe(config: StudyConfig) -> tuple[list[float], float, int]:
    """Run a recipe's seeds and test each; return accuracies, seconds, and test images."""
    begin = time.perf_counter()
    progress = QuietProgress()
    run_search(config, progress=progress, command="benchmarks/results.py")
    seconds = time.perf_counter() - begin
    with Record(config.study.storage) as store:
        study = store.study(config.study.name)
        numbers = [row.number for row in store.trials(study.id) if row.state == "complete"]
        rows = [
            test_trials(store, study.name, [k], progress=progress, command="benchmarks/results.py")
            for k in numbers
        ]
    return [row.accuracy for row in rows], seconds, rows[0].n if rows else 0


def reference(config: StudyConfig) -> float:
    """Test scikit-learn's logistic regression on the frozen network's features."""
    data = load_images(config, QuietProgress())
    train = config.train
    built = build(train, data.classes)
    shown = built.preprocessing
    for name in built.head:
        parent, _, child = name.rpartition(".")
        setattr(built.model.get_submodule(parent), child, torch.nn.Identity())
    transform = v2.Compose(
        [
            v2.Resize(shown.resize_size, InterpolationMode(shown.interpolation)),
            v2.CenterCrop(shown.image_size),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(shown.mean, shown.std),
        ]
    )
    device = choose_device("auto")
    model = built.model.eval().to(device)
    root = Path(config.data.source.removeprefix("folder:"))

    def features(paths: tuple[str, ...]) -> np.ndarray:
        rows = []
        with torch.inference_mode():
            for at in range(0, len(paths), 64):
                images = [Image.open(root / p).convert("RGB") for p in paths[at : at + 64]]
                batch = torch.stack([transform(image) for image in images])
                rows.append(model(batch.to(device)).float().cpu().numpy())
        return np.concatenate(rows)

    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    head.fit(features(data.train.paths), data.train.labels)
    assert data.test is not None
    return float(head.score(features(data.test.paths), data.test.labels))


def told(values: list[float]) -> str:
    """Return mean, 95 % t interval over seeds, and each value, in per cent."""
    scores = 100 * np.array(values)
    each = ", ".join(f"{v:.1f}" for v in scores)
    if len(scores) < 2:
        return f"{scores.mean():.1f} ({each})"
    half = t.ppf(0.975, len(scores) - 1) * scores.std(ddof=1) / len(scores) ** 0.5
    return f"{scores.mean():.1f} ± {half:.1f} ({each})"


def main() -> None:
    """Run every recipe on every set and backbone, and print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--weights", type=Path, help="file of MobileNetV2's weights")
    parser.add_argument("--lite-weights", type=Path, help="file of EfficientNet-Lite0's weights")
    parser.add_argument("--work", type=Path, required=True, help="folder for studies and caches")
    parser.add_argument("--backbones", nargs="+", help="only these")
    parser.add_argument("--skip", nargs="*", default=[], help="recipes to leave out")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON lines, one a cell")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    backbones = {
        "timm:tf_efficientnet_lite0": str(args.lite_weights or "packaged"),
        "mobilenet_v2": str(args.weights or "packaged"),
    }
    for folder in args.data:
        for backbone, weights in backbones.items():
            if args.backbones and backbone not in args.backbones:
                continue
            print(f"\n{folder.name}, {backbone}, {args.size} px, {args.seeds} seeds")
            for recipe in [name for name in RECIPES if name not in args.skip]:
                config = study_config(recipe, backbone, weights, folder, args)
                accuracies, seconds, n = run_recipe(config)
                print(f"  {recipe:48} {told(accuracies):32} {seconds:7.1f} s", flush=True)
                write(args.out, folder.name, backbone, recipe, accuracies, seconds, n)
            score = reference(study_config("linear probe (ours)", backbone, weights, folder, args))
            print(f"  {'logistic regression on frozen features':48} {100 * score:.1f}", flush=True)
            write(args.out, folder.name, backbone, "logistic regression", [score], 0.0, n)


def write(
    out: Path | None,
    data: str,
    backbone: str,
    recipe: str,
    accuracies: list[float],
    seconds: float,
    n: int,
) -> None:
    """Add a cell to the JSON lines."""
    if out is not None:
        cell = {"data": data, "backbone": backbone, "recipe": recipe, "test_acc": accuracies}
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps({**cell, "seconds": round(seconds, 1), "n_test": n}) + "\n")


if __name__ == "__main__":
    main()
