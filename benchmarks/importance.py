"""How often the importance names the setting that decides, in planted searches with pruned trials.

Five settings with weights 0.5, 0.25, 0.12, 0.08 and 0.05 act on the final accuracy smoothly, as a
cliff, or with interactions; the second one also on the speed of learning, where that is unequal.

    python benchmarks/importance.py --n 100
"""

import argparse
import itertools
import math
import warnings

import numpy as np
import optuna
import pandas as pd

from reports.trials import final_accuracies, importances

NAMES, EPOCHS = list("abcde"), 10
WEIGHTS = np.array([0.5, 0.25, 0.12, 0.08, 0.05])


def quality(x: np.ndarray, kind: str) -> float:
    """Return what settings are worth, 0 to 1."""
    each = np.where(x < 0.6, 1.0, 0.0) if kind == "cliff" else 1 - 4 * (x - 0.5) ** 2
    plain = float((WEIGHTS * each).sum())
    if kind == "interaction":
        return 0.6 * plain + 0.4 * WEIGHTS[0] * float(each[0] * (each[1] + each[2]))
    return plain


def search(
    kind: str, pruner: str, n: int, *, is_unequal: bool, seed: int
) -> tuple[optuna.Study, pd.DataFrame, pd.DataFrame, str]:
    """Run a planted search; return it, its trials and epochs, and the setting that decides."""
    rng = np.random.default_rng(seed)
    order = np.random.default_rng(seed).permutation(len(NAMES))
    made = {
        "hyperband": lambda: optuna.pruners.HyperbandPruner(1, EPOCHS, 3),
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
    }
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=made[pruner]())
    rows, epochs = [], []
    for k in range(n):
        trial = study.ask()
        x = np.array([trial.suggest_float(name, 0, 1) for name in NAMES])[order]
        final = 0.5 + 0.45 * quality(x, kind) + rng.normal(0, 0.01)
        speed = 0.5 + (x[1] if is_unequal else 0)
        best, state = 0.0, optuna.trial.TrialState.COMPLETE
        for epoch in range(EPOCHS):
            value = final * (1 - 0.6 * math.exp(-speed * (epoch + 1))) + rng.normal(0, 0.008)
            trial.report(value, epoch)
            epochs.append((k, epoch, value))
            best = max(best, value)
            if trial.should_prune():
                state = optuna.trial.TrialState.PRUNED
                break
        is_complete = state is optuna.trial.TrialState.COMPLETE
        study.tell(trial, best if is_complete else None, state=state)
        rows.append((k, state.name.lower(), None, "sampler", best))
    trials = pd.DataFrame(rows, columns=["number", "state", "reason", "origin", "value"])
    frame = pd.DataFrame(epochs, columns=["number", "epoch", "val_acc"])
    return study, trials, frame, NAMES[order[0]]


def main() -> None:
    """Print the share of searches in which the setting that decides comes first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100)
    n = parser.parse_args().n
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    cases = itertools.product(
        ("smooth", "cliff", "interaction"), ("hyperband", "median"), (False, True), (30, 60)
    )
    for kind, pruner, is_unequal, size in cases:
        ours = optunas = 0
        for seed in range(n):
            study, trials, epochs, truth = search(
                kind, pruner, size, is_unequal=is_unequal, seed=seed
            )
            final = final_accuracies(trials, epochs)
            found = importances(study.get_trials(deepcopy=False), final).shares["setting"]
            ours += len(found) > 0 and found.iloc[0] == truth
            shares = optuna.importance.get_param_importances(study)
            optunas += max(shares, key=lambda name: shares[name]) == truth
        speeds = "unequal" if is_unequal else "equal"
        print(
            f"{kind:12} {pruner:10} {speeds:8} {size} trials: ours {ours / n:.0%}, Optuna's "
            f"default {optunas / n:.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
