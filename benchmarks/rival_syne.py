"""Syne Tune's ASHA on the naive side's training function, space, pictures and record.

One worker of its local backend on one core: every trial is this script again, in a process of
its own. Proposals are random, as in its ASHA. The clock runs from the tuner's start.

Syne Tune is no part of the project; give it an environment of its own that sees the project's
torch:

    python -m venv rivals/syne
    echo $PWD/.venv/lib/python3.11/site-packages > rivals/syne/lib/python3.11/site-packages/own.pth
    rivals/syne/bin/pip install syne-tune==0.16
    rivals/syne/bin/python benchmarks/rival_syne.py --task work/task --budget 200 --out syne.jsonl
"""

import argparse
import os
import tempfile
from pathlib import Path

from naive import DEPTHS, RATES, Diverged, Recorder, Settings, add_study_options, read_task, train

# How often the tuner looks for results, seconds; its default of 5 would leave the worker idle.
_POLL_S = 0.2


def one_trial(args: argparse.Namespace) -> None:
    """Train one trial in the backend's process, and report every epoch."""
    from syne_tune import Reporter

    report = Reporter()
    task = read_task(args.task)
    recorder = Recorder(args.out, args.began)
    settings = Settings(
        args.backbone, args.freeze_depth, args.base_lr, args.head_lr_mult, args.weight_decay
    )
    trial = Path(args.st_checkpoint_dir).parent.name
    try:
        epochs = train(task, settings, seed=args.seed, epochs=args.epochs)
        for epoch, (val_acc, model) in enumerate(epochs):
            recorder.add(trial, epoch, val_acc, task, settings, model)
            report(epoch=epoch + 1, val_acc=val_acc)
    except Diverged:
        report(epoch=args.epochs, val_acc=0.0)


def search(args: argparse.Namespace) -> None:
    """Search until the budget is spent."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SYNETUNE_FOLDER"] = folder  # read when syne_tune is imported
        from syne_tune import Tuner
        from syne_tune.backend import LocalBackend
        from syne_tune.config_space import choice, loguniform, randint
        from syne_tune.optimizer.baselines import ASHA

        recorder = Recorder(args.out.resolve(), args.began)
        space = {
            "backbone": choice(list(read_task(args.task).networks)),
            "freeze_depth": randint(DEPTHS[0], DEPTHS[-1]),
            **{name: loguniform(*ends) for name, ends in RATES.items()},
            "task": str(args.task.resolve()),
            "out": str(recorder.file),
            "began": args.began,
            "seed": args.seed,
            "epochs": args.epochs,
        }
        scheduler = ASHA(
            space,
            metric="val_acc",
            time_attr="epoch",
            max_t=args.epochs,
            do_minimize=False,
            random_seed=args.seed,
        )
        tuner = Tuner(
            trial_backend=LocalBackend(entry_point=__file__, rotate_gpus=False),
            scheduler=scheduler,
            stop_criterion=lambda status: recorder.seconds() > args.budget,
            n_workers=1,
            sleep_time=_POLL_S,
            save_tuner=False,
        )
        tuner.run()
        recorder.end(trials=tuner.tuning_status.num_trials_started)


def main() -> None:
    """Search; or, where the backend calls, train one trial."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_study_options(parser)
    parser.add_argument("--budget", type=float, help="seconds")
    for name in ("backbone", "st_checkpoint_dir"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--freeze_depth", type=int, help=argparse.SUPPRESS)
    for name in RATES:
        parser.add_argument(f"--{name}", type=float, help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args()
    if args.backbone:
        one_trial(args)
    else:
        search(args)


if __name__ == "__main__":
    main()
