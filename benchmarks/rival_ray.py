"""Ray Tune with ASHA on the naive side's training function, space, pictures and record.

One trial at a time on one core, as every other side. Ray proposes by Optuna's TPE (`--searcher
optuna`) or at random, its own default; ASHA stops trials at the rungs 1, 3 and 9. The clock runs
from the process's start, so that Ray's own start and its worker's import of torch count.

Ray is no part of the project; give it an environment of its own that sees the project's torch:

    python -m venv rivals/ray
    echo $PWD/.venv/lib/python3.11/site-packages > rivals/ray/lib/python3.11/site-packages/own.pth
    rivals/ray/bin/pip install "ray[tune]==2.60"
    rivals/ray/bin/python benchmarks/rival_ray.py --task work/task --budget 200 --out ray.jsonl
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from naive import DEPTHS, RATES, Diverged, Recorder, Settings, add_study_options, read_task, train

# No reports of use to Ray's makers, and no table of trials on the screen.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AIR_NEW_OUTPUT": "0"}
_OBJECT_STORE_BYTES = 200 << 20


def one_trial(config: dict[str, Any], task: str, out: str, began: float, seed: int) -> None:
    """Train one trial in Ray's worker, and report every epoch."""
    from ray import tune

    told = read_task(Path(task))
    recorder = Recorder(Path(out), began)
    epochs = config.pop("epochs")
    settings = Settings(**config)
    trial = tune.get_context().get_trial_id()
    try:
        for epoch, (val_acc, model) in enumerate(train(told, settings, seed=seed, epochs=epochs)):
            recorder.add(trial, epoch, val_acc, told, settings, model)
            tune.report({"val_acc": val_acc})
    except Diverged:
        tune.report({"val_acc": 0.0})


def main() -> None:
    """Search until the budget is spent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_study_options(parser)
    parser.add_argument("--budget", type=float, required=True, help="seconds")
    parser.add_argument("--searcher", choices=("optuna", "random"), default="optuna")
    args = parser.parse_args()

    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator
    from ray.tune.search.optuna import OptunaSearch

    recorder = Recorder(args.out.resolve(), args.began)

    class Budget(tune.Stopper):
        """Ends the study when its seconds, those of testing not counted, are spent."""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return recorder.seconds() > args.budget

    task = read_task(args.task)
    space = {
        "backbone": tune.choice(list(task.networks)),
        "freeze_depth": tune.randint(DEPTHS[0], DEPTHS[-1] + 1),
        **{name: tune.loguniform(*ends) for name, ends in RATES.items()},
        "epochs": args.epochs,
    }
    # Workers import this folder's modules.
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    searchers = {
        "optuna": lambda: OptunaSearch(seed=args.seed),
        "random": lambda: BasicVariantGenerator(random_state=args.seed),
    }
    with tempfile.TemporaryDirectory() as folder:
        ray.init(
            num_cpus=1, include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False, configure_logging=False,
        )  # fmt: skip
        trained = tune.with_parameters(
            one_trial,
            task=str(args.task.resolve()),
            out=str(recorder.file),
            began=args.began,
            seed=args.seed,
        )
        tuner = tune.Tuner(
            tune.with_resources(trained, {"cpu": 1}),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="val_acc",
                mode="max",
                num_samples=-1,
                reuse_actors=True,  # else every trial imports torch anew
                scheduler=ASHAScheduler(max_t=args.epochs, grace_period=1, reduction_factor=3),
                search_alg=searchers[args.searcher](),
            ),
            run_config=tune.RunConfig(storage_path=folder, stop=Budget(), verbose=0),
        )
        results = tuner.fit()
        recorder.end(trials=len(results), searcher=args.searcher)
        ray.shutdown()


if __name__ == "__main__":
    main()
