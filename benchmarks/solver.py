"""Compare solving a head with scikit-learn's logistic regression at one strength.

Run: python benchmarks/solver.py [rows features classes] [--one] [--baseline]
`--one` tries a single strength; `--baseline` fits scikit-learn too and prints the ratio.
"""

import argparse
import resource
import time

import torch
from sklearn.linear_model import LogisticRegression

from core.heads.solver import solve_head


def make_data(n: int, n_features: int, n_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw correlated features, (N, F), whose classes overlap, and labels, (N,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % n_classes
    centers = torch.randn(n_classes, n_features, generator=generator)
    mixing = torch.randn(n_features, n_features, generator=generator) / n_features**0.5
    mixing *= torch.logspace(0, -1.5, n_features)
    noise = torch.randn(n, n_features, generator=generator)
    return (noise + 0.1 * centers[labels]) @ mixing, labels


def main() -> None:
    """Print seconds, CPU seconds and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", type=int, nargs="*", default=[2000, 1280, 10])
    parser.add_argument("--one", action="store_true")
    parser.add_argument("--baseline", action="store_true")
    args = parser.parse_args()
    n, n_features, n_classes = args.shape
    features, labels = make_data(n, n_features, n_classes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    folds = torch.arange(n) // n_classes % 5
    head = solve_head(features, labels, n_classes, folds, [1 / (0.01 * n)] if args.one else None)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"solve_head: {wall:.1f} s, {cpu:.1f} CPU s, peak {peak / 2**20:.2f} GiB in all", end=" "
    )
    print(f"({before / 2**20:.2f} before), {len(head.oof_log_loss)} strengths,", end=" ")
    print(f"C {1 / (head.decay * n):.3g}, {head.converged=}")
    if args.baseline:
        rows = ((features - features.mean(0)) / features.std(0, correction=0)).numpy()
        model = LogisticRegression(C=1 / (head.decay * n), tol=1e-6, max_iter=10_000)
        reference, spent = time.perf_counter(), time.process_time()
        model.fit(rows, labels.numpy())
        reference, spent = time.perf_counter() - reference, time.process_time() - spent
        print(f"one fit of scikit-learn: {reference:.1f} s, {spent:.1f} CPU s", end=" ")
        print(f"({spent / cpu:.2f} of all our CPU seconds)")


if __name__ == "__main__":
    main()
