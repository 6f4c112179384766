"""Seconds until `python -m study --help`, and `list` on a database of 5,000 trials, answer.

python benchmarks/startup.py
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from core.metrics import EpochMetrics
from study.store import Store

STUDIES, TRIALS, EPOCHS, RUNS = 20, 5000, 5, 7


def fill(path: Path) -> None:
    """Write a database of 5,000 trials in 20 studies."""
    with Store.open(str(path), create=True) as store:
        for k in range(STUDIES):
            study = store.create_study(f"study{k}", {"study": {}}, {"fingerprint": "x"}, {})
            run = store.begin_run(study, command="x", device="cpu", versions={})
            for number in range(TRIALS // STUDIES):
                key = store.begin_trial(
                    study, number, run, origin="sampler", params={"base_lr": 0.01},
                    config={"seed": 0}, config_hash=str(number), seed=0, backbone="resnet18",
                    freeze_depth=0, device="cpu",
                )  # fmt: skip
                for epoch in range(EPOCHS):
                    acc = (number % 97) / 100
                    metrics = EpochMetrics(
                        epoch, 0.5, 0.5, acc, acc, acc, 1e-3, 1e-2, 99.0, 0.1, 1.0, 0.1, 10**9,
                        32, epoch == 0,
                    )  # fmt: skip
                    store.add_epoch(key, metrics, 1.0)
                store.end_trial(
                    key, "complete", reason=None, value=(number % 97) / 100, best_epoch=0,
                    epochs_done=EPOCHS, duration_s=1.0, checkpoint=None,
                )  # fmt: skip
            store.end_run(run, "trials")


def seconds(*command: str) -> list[float]:
    """Time a command in fresh processes, after one that is not counted."""
    times = []
    for _ in range(RUNS + 1):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    return times[1:]


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "studies.db"
        fill(path)
        for label, command in (
            ("--help", ("study", "--help")),
            (f"list, {TRIALS} trials", ("study", "list", "--storage", str(path))),
        ):
            times = seconds(*command)
            print(
                f"{label:20} median {statistics.median(times):.2f} s "
                f"(n = {RUNS}, {min(times):.2f} to {max(times):.2f})"
            )


if __name__ == "__main__":
    main()
