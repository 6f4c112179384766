"""Read the test split, once, for a chosen trial, and keep the result."""

from collections.abc import Sequence
from pathlib import Path

import torch

from core.data.splits import ImageData
from core.device import amp_dtype, choose_device
from core.metrics import Evaluation
from core.training.batches import Normalizer, eval_batches, view_spec
from core.training.checkpoint import load_checkpoint
from core.training.trainer import evaluate
from study.config.errors import ConfigError
from study.config.study_config import StudyConfig
from study.progress import Progress
from study.session import load_pictures
from study.store import Store, StudyRow, TestRow, TrialRow


def test_study(
    store: Store, name: str, number: int | None, *, progress: Progress, command: str
) -> TestRow:
    """Evaluate a trial on the test split and record it; a recorded result is returned as it is.

    Args:
        store: The record.
        name: The study.
        number: The trial; None for the best by validation.
        progress: What the user sees.
        command: Command line, for the record.

    Returns:
        Accuracy with a 95 % Wilson interval, beside the trial's validation accuracy.

    Raises:
        ConfigError: No complete trial, no checkpoint, no test split, or other pictures.
        StoreError: No such study or trial.
    """
    trial = _chosen(store, store.study(name), number)
    return test_trials(store, name, [trial.number], progress=progress, command=command)[0]


def test_trials(
    store: Store, name: str, numbers: Sequence[int], *, progress: Progress, command: str
) -> list[TestRow]:
    """Evaluate trials on the test split and record it; recorded results are returned as they are.

    Args:
        store: The record.
        name: The study.
        numbers: Its trials.
        progress: What the user sees.
        command: Command line, for the record.

    Raises:
        ConfigError: A trial without checkpoint, no test split, or other pictures.
        StoreError: No such study or trial.
    """
    study = store.study(name)
    known = {row.trial_number: row for row in store.tests(study.id)}
    missing = [_chosen(store, study, n) for n in dict.fromkeys(numbers) if n not in known]
    if missing:
        config = StudyConfig.from_record(study.config)
        data = _pictures(config, study, progress)
        for trial in missing:
            evaluation = _evaluate(config, data, trial)
            _record(store, study, trial, evaluation, command)
        known = {row.trial_number: row for row in store.tests(study.id)}
    return [known[number] for number in numbers]


def _record(
    store: Store, study: StudyRow, trial: TrialRow, evaluation: Evaluation, command: str
) -> None:
    labels, predicted = evaluation.labels.tolist(), evaluation.predicted.tolist()
    store.add_predictions(trial.id, "test", labels, predicted)
    store.add_test(
        study.id,
        trial.number,
        n=len(labels),
        n_correct=evaluation.n_correct,
        balanced_acc=evaluation.balanced_acc,
        macro_f1=evaluation.macro_f1,
        val_acc=trial.value,
        confusion=evaluation.confusion.tolist(),
        command=command,
    )


def _chosen(store: Store, study: StudyRow, number: int | None) -> TrialRow:
    if number is not None:
        trial = store.trial(study.id, number)
    else:
        complete = [row for row in store.trials(study.id) if row.state == "complete"]
        if not complete:
            raise ConfigError(
                f"study {study.name} must have a complete trial to be tested, but has none. Run "
                f"it on: python -m study resume {study.name}"
            )
        trial = min(complete, key=lambda row: row.rank)
    if trial.checkpoint is None or not Path(trial.checkpoint).is_dir():
        raise ConfigError(
            f"trial {trial.number} of study {study.name} must have its checkpoint, but "
            f"{trial.checkpoint or 'none'} was kept ({trial.state}). Choose a trial that has one "
            f"(python -m study show {study.name}), or keep more of them: study.keep_checkpoints, "
            "or ablation.keep_checkpoints for an ablation."
        )
    return trial


def _pictures(config: StudyConfig, study: StudyRow, progress: Progress) -> ImageData:
    data = load_pictures(config, progress)
    if data.fingerprint != study.data["fingerprint"]:
        raise ConfigError(
            f"the pictures of study {study.name} must be those it was run on, but they have "
            "changed since. Restore them, or run the study again under another name."
        )
    if data.test is None or len(data.test) == 0:
        raise ConfigError(
            f"study {study.name} must have a test split, but {data.source} has none."
        )
    return data


def _evaluate(config: StudyConfig, data: ImageData, trial: TrialRow) -> Evaluation:
    assert data.test is not None, "the pictures were checked"
    model, card = load_checkpoint(Path(str(trial.checkpoint)))
    train = card.config
    device = choose_device(config.train.device)
    normalize = Normalizer(card.preprocessing, device)
    spec = view_spec(train, card.preprocessing)
    batches = map(normalize, eval_batches(data.test, spec, device))
    dtype = amp_dtype(train.amp, device)

    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        return evaluate(model.to(device), batches, data.test.labels)
