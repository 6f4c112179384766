"""Read the test split, once, for chosen trials, and keep the result."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.config import Amp, TrainConfig
from core.device import amp_dtype, choose_device
from core.heads.ensemble import Mean
from core.metrics import Evaluation
from core.model import Model, described, load_model, model_hash
from core.training.batches import Normalizer, eval_batches
from core.training.checkpoint import weights_hash
from core.training.trainer import evaluate
from study.config.errors import ConfigError
from study.config.formatting import study_command
from study.config.study_config import StudyConfig
from study.execution.progress import Progress
from study.execution.session import load_images
from study.record.models import MODEL_FOLDER, Study, Test, Trial, is_model_of
from study.record.record import Record


def test_trials(
    record: Record, name: str, numbers: Sequence[int], *, progress: Progress, command: str
) -> list[Test]:
    """Evaluate trials on the test split and record it; recorded results are returned as they are.

    Raises:
        ConfigError: A trial without checkpoint, no test split, or other images.
        RecordError: No such study or trial.
    """
    study = record.study(name)
    known = {row.trial_number: row for row in record.tests(study.id)}
    new = [number for number in dict.fromkeys(numbers) if number not in known]
    trials = [_with_checkpoint(study, record.trial(study.id, number)) for number in new]
    if trials:
        models = (
            (load_model(Path(str(row.checkpoint))), TrainConfig(**row.config).amp)
            for row in trials
        )
        for trial, found in zip(trials, _evaluate(study, models, progress), strict=True):
            record.add_predictions(trial.id, "test", found.labels, found.predicted)
            facts = {"trial_number": trial.number, "val_acc": trial.value}
            known[trial.number] = _add(record, study, found, command, facts)
    return [known[number] for number in numbers]


def test_model(record: Record, name: str, *, progress: Progress, command: str) -> Test:
    """Evaluate the model that a search left on the test split, as `test_trials` does.

    Raises:
        ConfigError: No model, no test split, or other images.
        RecordError: No such study.
    """
    study = record.study(name)
    folder = study.output / MODEL_FOLDER
    own, facts, model = _read(folder)
    if own is None or model is None:
        raise ConfigError(
            f"study {name} must have its model, but there is none in {folder}. Run it, or test a "
            "trial: --trial NUMBER."
        )
    if not facts.get("trials"):
        raise ConfigError(
            f"study {name} must have a model of its trials, but that in {folder} is a first one "
            "from a few images. Continue the study: "
            + study_command("resume", name, record.storage)
        )
    if not is_model_of(study, facts):
        raise ConfigError(
            f"study {name} must have its own model, but that in {folder} is of another study of "
            "this name, which ran here too. Give one of them another study.output, and run it."
        )
    for row in record.tests(study.id):
        if row.model_hash == own:
            return row
    amp = StudyConfig.from_record(study.config).train.amp
    (found,) = _evaluate(study, [(model, amp)], progress)
    own_facts = {"trial_number": None, "model_hash": own, "val_acc": facts.get("val_acc")}
    return _add(record, study, found, command, own_facts)


def _read(folder: Path) -> tuple[str | None, dict[str, Any], Model | None]:
    """Read a model with its hash and description; a running study may replace it meanwhile."""
    while (own := model_hash(folder)) is not None:
        facts, model = described(folder), load_model(folder)
        if model_hash(folder) == own:
            return own, facts, model
    return None, {}, None


def _add(
    record: Record, study: Study, evaluation: Evaluation, command: str, facts: dict[str, Any]
) -> Test:
    test = Test(
        study_id=study.id,
        n=len(evaluation.labels),
        n_correct=evaluation.n_correct,
        balanced_acc=evaluation.balanced_acc,
        macro_f1=evaluation.macro_f1,
        confusion=evaluation.confusion.tolist(),
        command=command,
        **facts,
    )
    record.save(test)
    return test


def _with_checkpoint(study: Study, trial: Trial) -> Trial:
    """Refuse a trial whose checkpoint was not kept, is gone, or is another one's by now."""
    rule = f"trial {trial.number} of study {study.name} must have its checkpoint, but "
    if trial.checkpoint is None:
        raise ConfigError(
            f"{rule}none was kept ({trial.state}). Choose a trial that has one, as the best ones "
            "and the model's have, or keep more of them: study.keep_checkpoints, or "
            "ablation.keep_checkpoints for an ablation."
        )
    if weights_hash(Path(trial.checkpoint)) != trial.weights_hash:
        raise ConfigError(
            f"{rule}{trial.checkpoint} holds other weights than it trained: another run wrote "
            "there, or they were changed. Bring its own back, or train it again."
        )
    return trial


def _evaluate(
    study: Study, models: Iterable[tuple[Model, Amp]], progress: Progress
) -> Iterator[Evaluation]:
    """Evaluate models, each with its precision, on the test split of a study."""
    config = StudyConfig.from_record(study.config)
    data = load_images(config, progress)
    if data.fingerprint != study.data["fingerprint"]:
        raise ConfigError(
            f"the images of study {study.name} must be those it was run on, but they have "
            "changed since. Restore them, or run the study again under another name."
        )
    split = data.test
    if split is None or len(split) == 0:
        raise ConfigError(
            f"study {study.name} must have a test split, but {data.source} has none."
        )
    device = choose_device(config.train.device)
    for model, amp in models:
        members = model.members
        dtype, found = amp_dtype(amp, device), []
        for member in members:
            shown = member.preprocessing
            batches = map(Normalizer(shown, device), eval_batches(data, split, shown, device))
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                evaluation = evaluate(member.network.to(device), batches, split.labels)
            found.append(evaluation.log_probs)
        mean = Mean(
            np.array([member.weight for member in members], dtype=np.float32),
            np.array([member.temperature for member in members], dtype=np.float32),
        )
        yield Evaluation(split.labels, mean.log_probs(np.stack(found)))
