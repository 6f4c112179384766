"""What to choose a model by: validation accuracy, loss, or loss behind one scale of the logits.

Heads with settings drawn from the search space are trained on the features of frozen backbones,
and after every epoch of every head the validation and the test split are evaluated. Then studies
of so many heads are drawn from them, and each rule chooses the best epoch of all of them, as a
study does, or the best last epoch. With --thawed, every study has some thawed trials beside its
heads, drawn from so many a seed, of levels 0 to 4. Told is the test accuracy of what it chooses:
the mean over the drawn studies, and how far they spread. The trials of all studies are the same
few hundred, so the spread says what luck a study has, not how sure the mean is; other pictures
would say that.

    python benchmarks/monitor.py --data photos/hotdog photos/hymenoptera --size 128
    python benchmarks/monitor.py --data photos/hotdog --size 96 --heads 20 --seeds 0 --thawed 10
"""

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import numpy as np
import torch
from naive import BACKBONES, RATES
from numpy.typing import NDArray

from core.config import DataConfig, TrainConfig
from core.data import ImageData, Split, load_data
from core.device import choose_device
from core.evaluate import Evaluation, count_confusion, evaluate
from core.features import Features, feature_config, frozen_part
from core.feed import Feed, Normalizer, eval_batches, view_spec
from core.fit import build_for, fit
from core.head_runs import HeadRuns
from core.metrics import TrainingDiverged
from core.models.builder import Network
from core.prefix_cache import PrefixCache

_STARTS = ("default", "probe")
_LEVELS = (4, 3, 4, 2, 3, 1, 4, 2, 3, 0)
_THAWED_RATES = RATES | {"base_lr": (3e-4, 5e-3), "head_lr_mult": (1.0, 20.0)}
_CACHE_BYTES = 1 << 30
Double = NDArray[np.float64]
# Newton's method: the loss is flat at its minimum, so this is exact to some 1e-7.
_LOG_FACTORS, _MOST_STEPS, _CLOSE = (-4.0, 4.0), 30, 1e-3


def scaled_loss(found: Evaluation) -> float:
    """Mean cross-entropy, nats, with the logits multiplied by the one factor that suits best.

    So it says how well pictures are told apart, whether the network is too sure of itself or
    not sure enough. The factor's logarithm has a normal prior of deviation 1 that weighs as
    much as one picture: a few pictures that are all told right do not make it infinite.

    References:
        Guo et al. 2017, https://arxiv.org/abs/1706.04599 (temperature scaling); Berta et al.
        2025, https://arxiv.org/abs/2501.19195 (choosing a model by the loss behind it).
    """
    logits = found.log_probs.astype(np.float64)
    n = len(logits)
    true = logits[np.arange(n), found.labels].mean()
    at = 0.0  # logarithm of the factor
    for _ in range(_MOST_STEPS):
        factor = np.exp(at)
        log_norms, means, squares = _moments(logits, factor)
        slope = factor * (means.mean() - true) + at / n
        bend = factor**2 * (squares - means**2).mean() + slope - at / n + 1 / n
        # Far from the minimum the curve may bend down: then a step in the right direction.
        step = -slope / bend if bend > 0 else -np.sign(slope)
        at = float(np.clip(at + np.clip(step, -1, 1), *_LOG_FACTORS))
        if abs(step) < _CLOSE:
            break
    factor = np.exp(at)
    return float((_moments(logits, factor)[0] - factor * true).mean())


def _moments(logits: Double, factor: float) -> tuple[Double, Double, Double]:
    """Return what the loss of logits times a factor and its derivatives are made of.

    Returns:
        Of each picture, (N,): log-sum-exp, and mean and mean square of the plain logits under the
        probabilities.
    """
    scaled = factor * logits
    top = scaled.max(axis=1, keepdims=True)
    weights = np.exp(scaled - top)
    total = weights.sum(axis=1, keepdims=True)
    weights /= total
    weighted = weights * logits
    log_norms = (top + np.log(total))[:, 0]
    return log_norms, weighted.sum(axis=1), (weighted * logits).sum(axis=1)


@dataclass(frozen=True)
class Epoch:
    """A trial after an epoch.

    Attributes:
        seed: Of its views.
        trial: Which head of its seed, over all backbones, or which thawed trial.
        is_thawed: Whether it trains more than its head.
        is_last: Whether it was the last epoch.
        val: On the validation split.
        test_acc: On the test split, in [0, 1].
    """

    seed: int
    trial: int
    is_thawed: bool
    is_last: bool
    val: Evaluation
    test_acc: float


RULES: dict[str, Callable[[Evaluation], float]] = {
    "accuracy": lambda found: found.acc,
    "loss": lambda found: -found.loss,
    "scaled loss": lambda found: -scaled_loss(found),
}
"""What is highest is chosen; of equals the earlier head."""


def settings(
    rng: np.random.Generator, rates: Mapping[str, tuple[float, float]] = RATES
) -> dict[str, float]:
    """Draw rates, by default from the space that every side of time_to_quality.py searches."""
    return {
        name: float(np.exp(rng.uniform(np.log(low), np.log(high))))
        for name, (low, high) in rates.items()
    }


def heads(base: TrainConfig, data: ImageData, n: int, first: int) -> Iterator[Epoch]:
    """Train n heads of one backbone and one seed; give every epoch of each."""
    rng = np.random.default_rng((base.seed, first))
    configs = [
        dataclasses.replace(base, head_init=_STARTS[k % 2], **settings(rng)) for k in range(n)
    ]
    built = {
        start: build_for(dataclasses.replace(base, head_init=start), data.classes)
        for start in _STARTS
    }
    device = choose_device("cpu")
    network = built["default"]
    prefix = frozen_part(network, base, device)
    assert prefix is not None, "the backbones here end in one linear layer"
    assert data.test is not None, "the data have a test split"
    with Feed(feature_config(base, len(data.train)), network.preprocessing, data, device) as feed:
        features = Features(base, network, data, feed, prefix, PrefixCache(_CACHE_BYTES))
        with torch.no_grad():
            batches = eval_batches(data.test, feed.spec, device)
            test = torch.cat([prefix(feed.normalize(images))[0].float() for images in batches])
        runs = HeadRuns(configs, [built[c.head_init] for c in configs], data, features)
        for epoch in range(base.epochs):
            runs.train_epoch(epoch)
            found = zip(runs.members, runs.evaluate(), runs.heads(), strict=True)
            for k, val, (weight, bias) in found:
                predicted = (test @ weight.t() + bias).argmax(1).numpy().astype(np.int64)
                confusion = count_confusion(data.test.labels, predicted, len(data.classes))
                test_acc = float(np.trace(confusion) / len(predicted))
                if np.isfinite(val.loss):
                    is_last = epoch == base.epochs - 1
                    yield Epoch(base.seed, first + k, False, is_last, val, test_acc)


def thawed(base: TrainConfig, data: ImageData, n: int, backbones: list[str]) -> Iterator[Epoch]:
    """Train n thawed trials of one seed, backbones and levels in turn; give every epoch of each.

    Rates are drawn where such trials learn: over the whole space most diverge or stand still.
    """
    rng = np.random.default_rng((base.seed, n))
    cache = PrefixCache(_CACHE_BYTES)
    for k in range(n):
        config = dataclasses.replace(
            base,
            backbone=backbones[k % len(backbones)],
            freeze_depth=int(_LEVELS[k % len(_LEVELS)]),
            head_init=_STARTS[int(rng.integers(2))],
            **settings(rng, _THAWED_RATES),
        )
        built = build_for(config, data.classes)
        with (
            contextlib.suppress(TrainingDiverged),
            contextlib.closing(fit(config, data, None, cache)) as epochs,
        ):
            for metrics in epochs:
                state = epochs.gi_frame.f_locals["run"].snapshot()
                built.model.load_state_dict(state)
                val, test = (evaluated(built, config, split) for split in (data.val, data.test))
                is_last = metrics.epoch == base.epochs - 1
                yield Epoch(base.seed, k, True, is_last, val, test.acc)


def evaluated(built: Network, config: TrainConfig, split: Split | None) -> Evaluation:
    """Evaluate a network as `fit` does."""
    assert split is not None, "the data have a test split"
    device = choose_device("cpu")
    normalize = Normalizer(built.preprocessing, device, config.channels_last)
    views = eval_batches(split, view_spec(config, built.preprocessing), device)
    return evaluate(built.model.eval(), map(normalize, views), split.labels)


def told(epochs: list[Epoch], sizes: list[int], n_studies: int) -> str:
    """Draw studies, of so many heads and two thirds of the thawed trials; say what is chosen."""
    scores = {name: np.array([rule(e.val) for e in epochs]) for name, rule in RULES.items()}
    every_seed = sorted({e.seed for e in epochs})
    seeds, which = np.array([e.seed for e in epochs]), np.array([e.trial for e in epochs])
    is_thawed = np.array([e.is_thawed for e in epochs])
    is_last, test = np.array([e.is_last for e in epochs]), np.array([e.test_acc for e in epochs])
    n_heads = int(which[~is_thawed].max()) + 1
    n_thawed = round(2 / 3 * (int(which[is_thawed].max()) + 1)) if is_thawed.any() else 0
    which = np.where(is_thawed, n_heads + which, which)
    lines = []
    for size in sizes:
        rng = np.random.default_rng(0)
        chosen: dict[str, list[float]] = {}
        for study in range(n_studies):
            turn = rng.permutation(which.max() + 1)
            order = np.argsort(turn)  # trials as the study has them
            picked = [order[order < n_heads][:size], order[order >= n_heads][:n_thawed]]
            drawn = np.isin(which, np.concatenate(picked))
            for when, among in (("any epoch", drawn), ("last epoch", drawn & is_last)):
                at = np.flatnonzero(among & (seeds == every_seed[study % len(every_seed)]))
                at = at[np.argsort(turn[which[at]], kind="stable")]  # in the study's order
                for name, score in scores.items():
                    best = at[int(score[at].argmax())]
                    chosen.setdefault(f"{name}, {when}", []).append(100 * test[best])
        parts = [f"{name} {np.mean(v):.1f} ± {np.std(v):.1f}" for name, v in chosen.items()]
        among_them = f" and {n_thawed} thawed trials" if n_thawed else ""
        lines.append(f"  of {size} heads{among_them}: {'; '.join(parts)}")
    return "\n".join(lines)


def main() -> None:
    """Print a block for each data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of pictures")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--limit", type=int, help="training pictures")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--heads", type=int, default=100, help="of each backbone and seed")
    parser.add_argument("--thawed", type=int, default=0, help="trials of each seed")
    parser.add_argument("--studies", type=int, default=300)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 50], help="heads of a study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES))
    parser.add_argument("--cache-dir", help="folder of decoded pictures")
    args = parser.parse_args()
    for folder in args.data:
        source = DataConfig(f"folder:{folder}", limit=args.limit, cache_dir=args.cache_dir)
        data = load_data(source, round(args.size * 1.25))
        base = TrainConfig(freeze_depth=5, image_size=args.size, epochs=args.epochs, device="cpu")
        epochs: list[Epoch] = []
        for seed in args.seeds:
            for k, backbone in enumerate(args.backbones):
                config = dataclasses.replace(base, seed=seed, backbone=backbone)
                epochs += heads(config, data, args.heads, k * args.heads)
            config = dataclasses.replace(base, seed=seed)
            epochs += thawed(config, data, args.thawed, args.backbones)
        assert data.test is not None, "the data have a test split"
        print(
            f"{folder.name}: {len(data.train)} training, {len(data.val)} validation, "
            f"{len(data.test)} test pictures; test accuracy of what is chosen, %"
        )
        print(told(epochs, args.sizes, args.studies), flush=True)


if __name__ == "__main__":
    main()
